"""The table and the picture of these runs: python results/reddit_taylor/figure.py

Reads <split>_t<n>_s<seed>.jsonl beside it. Minima are those of full passes over the validation texts, every fifth
epoch; the curves are of a fixed sample of 20 of them, looked at after every step.
"""
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import plot  # noqa: E402

PANELS = [('row', 'By row: a fixed sample, smoothed', {'probe_ce': '-'}, (0, 8)),
          ('row', 'By row: texts seen in training (dotted), new ones', {'val_ce_leaked': ':', 'val_ce_clean': '-'},
           (0, 8)),
          ('post', 'By post: a fixed sample, smoothed', {'probe_ce': '-'}, (5, 9)),
          ('post', 'By post: all texts, p and link (dashed)', {'val_ce': '-', 'val_ce_link': '--'}, (6, 10))]


def read():
    """{(split, n): {seed: events}}."""
    runs = defaultdict(dict)
    for path in sorted(HERE.glob('*_t*_s*.jsonl')):
        split, n, seed = path.stem.split('_')
        runs[split, int(n[1:])][int(seed[1:])] = [json.loads(line) for line in path.read_text().splitlines()]
    return runs


def epochs(events):
    """Events with `epoch` in place of their step: a run is 100 of them."""
    last = events[-1]['step']
    return [dict(event, epoch=100 * event['step'] / last) for event in events]


def summary(events):
    """What one run is worth."""
    passes = [event for event in epochs(events) if event['event'] == 'eval']
    best, end = min(passes, key=lambda e: e['val_ce']), passes[-1]
    found = {'lowest': best['val_ce'], 'at epoch': best['epoch'], 'end': end['val_ce'],
             'rise': end['val_ce'] - best['val_ce'], 'lowest, link': min(e['val_ce_link'] for e in passes),
             'end, link': end['val_ce_link'], 'accuracy': end['val_accuracy'], 'ECE': end['val_ece'],
             'ECE, link': end['val_ece_link'], 'entropy where wrong': end['val_entropy_wrong']}
    if 'val_ce_leaked' in end:
        found |= {'end, seen texts': end['val_ce_leaked'], 'lowest, new texts': min(e['val_ce_clean'] for e in passes),
                  'end, new texts': end['val_ce_clean']}
    return found


def spread(values):
    return f'{mean(values):.3f}' + (f' ± {stdev(values):.3f}' if len(values) > 1 else '')


def paired(differences):
    """Mean and standard deviation of differences between runs of equal seeds, and Student's t of n - 1 degrees."""
    t = mean(differences) / (stdev(differences) / math.sqrt(len(differences))) if stdev(differences) else math.inf
    return f'{spread(differences)}, t {t:.1f}'


def table(runs):
    for split in ('row', 'post'):
        of_split = {n: {seed: summary(events) for seed, events in seeds.items()}
                    for (s, n), seeds in sorted(runs.items()) if s == split}
        if not of_split:
            continue
        columns = next(iter(next(iter(of_split.values())).values()))
        print(f'split={split}\n\n| | n | ' + ' | '.join(columns) + ' |\n|' + '---|' * (len(columns) + 2))
        for n, seeds in of_split.items():
            print(f'| T_{n} | {len(seeds)} | ' + ' | '.join(spread([run[c] for run in seeds.values()])
                                                         for c in columns) + ' |')
        for n in of_split:
            both = sorted(set(of_split[n]) & set(of_split.get(0, {})))
            if n and len(both) > 1:
                rows = {c: [of_split[n][seed][c] - of_split[0][seed][c] for seed in both] for c in columns}
                print(f'| T_{n} - T_0, paired | {len(both)} | ' + ' | '.join(map(paired, rows.values())) + ' |')
        print()


def picture(runs, path):
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(10, 7), dpi=150, layout='constrained')
        for ax, (split, title, metrics, limits) in zip(figure.subplots(2, 2).flatten(), PANELS):
            for (s, n), seeds in sorted(runs.items()):
                if s != split:
                    continue
                for metric, line in metrics.items():
                    for i, events in enumerate(seeds.values()):
                        x, y = zip(*plot.series(epochs(events), 'epoch', metric))
                        label = f'$T_{n}$' if i == 0 and line == '-' else None
                        if metric == 'probe_ce':
                            ax.plot(x, y, color=plot.COLOURS[n], linewidth=0.5, alpha=0.25)
                            y = plot.moving_average(y, plot.SMOOTHING)
                        ax.plot(x, y, line, color=plot.COLOURS[n], linewidth=1.4, alpha=0.8, label=label)
            ax.set(title=title, xlabel='epoch', ylabel='nats per token', ylim=limits)
            ax.legend(loc='lower left')
        figure.savefig(path)


if __name__ == '__main__':
    table(read())
    picture(read(), HERE / 'reddit_taylor.png')
