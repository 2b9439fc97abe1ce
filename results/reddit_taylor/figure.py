"""The tables and the pictures of these runs: python results/reddit_taylor/figure.py

Reads runs/<data>_<arm>_s<seed>.jsonl. Minima are those of full passes over the validation texts, every fifth epoch; the
curves called a fixed sample are of 20 of these texts, looked at 20 times an epoch or more.
"""
import json
import math
import sys
from collections import defaultdict
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import plot  # noqa: E402

EPOCH = dict(row=20, post=16.75, whole64=358, whole1024=358)  # steps
ARMS = {'t0': 'T_0', 't1': 'T_1', 't2': 'T_2', 'lr': 'T_0, learning rate 4e-4', 'wd0.1': 'T_0, weight decay 0.1',
        'wd1': 'T_0, weight decay 1', 'wd1-t2': 'T_2, weight decay 1', 'label-smoothing': 'label smoothing 0.1',
        'focal': 'focal, gamma 2', 'dft': 'DFT', 'taylor-ce': 'TaylorCE'}
SHARED = {'of link_n(p)': 'val_ce_link', 'texts seen': 'val_ce_leaked', 'new texts': 'val_ce_clean',
          'accuracy': 'val_accuracy', 'ECE': 'val_ece', 'ECE of link_n(p)': 'val_ece_link',
          'entropy where wrong': 'val_entropy_wrong', 'of link_n(p) there': 'val_entropy_wrong_link'}
LOWEST = {'lowest': 'val_ce', 'at epoch': 'epoch', **SHARED}
END = {'at the end': 'val_ce', **SHARED, 'link_n(p), lowest': 'lowest_link', 'new texts, lowest': 'lowest_clean'}
PANELS = dict(
    source=[('whole64', '64 channels: a fixed sample, smoothed', {'probe_ce': '-'}, (2, 10)),
            ('whole64', '64 channels: texts seen in training (dotted), new ones', {'val_ce_leaked': ':',
                                                                                 'val_ce_clean': '-'}, (0, 14)),
            ('whole1024', '1024 channels: a fixed sample, smoothed', {'probe_ce': '-'}, (2, 10)),
            ('whole1024', '1024 channels: texts seen in training (dotted), new ones', {'val_ce_leaked': ':',
                                                                                     'val_ce_clean': '-'}, (0, 14))],
    seeds=[('row', 'By row: all texts', {'val_ce': '-'}, (2, 8)),
           ('row', 'By row: texts seen in training (dotted), new ones', {'val_ce_leaked': ':', 'val_ce_clean': '-'},
            (0, 8)),
           ('post', 'By post: a fixed sample, smoothed', {'probe_ce': '-'}, (5, 11)),
           ('post', 'By post: all texts, p and link (dashed)', {'val_ce': '-', 'val_ce_link': '--'}, (6, 11))])


def read():
    """{data: {arm: {seed: events}}}, events with `epoch` beside their step."""
    runs = defaultdict(lambda: defaultdict(dict))
    for path in sorted((HERE / 'runs').glob('*_s*.jsonl')):
        data, arm, seed = path.stem.split('_')
        runs[data][arm][int(seed[1:])] = [dict(event, epoch=event['step'] / EPOCH[data])
                                          for event in map(json.loads, path.read_text().splitlines())]
    return runs


def passes(events):
    """The full passes over the validation texts, each with the lowest of their values so far."""
    evals = [dict(e) for e in events if e['event'] == 'eval']
    for lowest, key in ((n, k) for n, k in (('lowest_link', 'val_ce_link'), ('lowest_clean', 'val_ce_clean'))
                        if k in evals[0]):
        for e, value in zip(evals, accumulate((e[key] for e in evals), min)):
            e[lowest] = value
    return evals


def spread(values, digits=3):
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


def paired(differences):
    """Mean and standard deviation of differences between runs of equal seeds, and Student's t of n - 1 degrees."""
    error = stdev(differences) / math.sqrt(len(differences))
    return spread(differences) + (f', t {mean(differences) / error:.1f}' if error else '')


def table(data, arms):
    """Each arm at the lowest cross-entropy of its own passes, where early stopping ends, and at the end."""
    evals = {arm: {seed: passes(events) for seed, events in arms[arm].items()} for arm in ARMS if arm in arms}
    reached = min(e[-1]['step'] for seeds in evals.values() for e in seeds.values())  # runs cut off share their end
    lowest = {arm: {s: min(e, key=lambda x: x['val_ce']) for s, e in seeds.items()} for arm, seeds in evals.items()}
    end = {arm: {s: next(x for x in e if x['step'] == reached) for s, e in seeds.items()}
           for arm, seeds in evals.items()}
    for columns, points in ((LOWEST, lowest), (END, end)):
        columns = {name: key for name, key in columns.items() if key in points['t0'][0]}
        print(f'\n{data}, epoch {reached / EPOCH[data]:.0f} is the end\n\n| | n | ' + ' | '.join(columns) + ' |\n|' +
              '---|' * (len(columns) + 2))
        for arm, seeds in points.items():
            print(f'| {ARMS[arm]} | {len(seeds)} | ' + ' | '.join(
                spread([run[key] for run in seeds.values()], 0 if key == 'epoch' else 3) for key in columns.values())
                + ' |')
        for arm, seeds in points.items():
            both = sorted(set(seeds) & set(points['t0']))
            if arm != 't0' and len(both) > 1:
                print(f'| {ARMS[arm]}, less T_0 | {len(both)} | ' + ' | '.join(
                    paired([seeds[s][key] - points['t0'][s][key] for s in both]) for key in columns.values()) + ' |')


def picture(runs, panels, path):
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(10, 7), dpi=150, layout='constrained')
        for ax, (data, title, metrics, limits) in zip(figure.subplots(2, 2).flatten(), panels):
            for n in range(3):
                for metric, line in metrics.items():
                    for i, events in enumerate(runs[data][f't{n}'].values()):
                        x, y = zip(*plot.series(events, 'epoch', metric))
                        label = f'$T_{n}$' if i == 0 and line == '-' else None
                        if metric == 'probe_ce':
                            ax.plot(x, y, color=plot.COLOURS[n], linewidth=0.5, alpha=0.25)
                            y = plot.moving_average(y, plot.SMOOTHING)
                        ax.plot(x, y, line, color=plot.COLOURS[n], linewidth=1.4, alpha=0.8, label=label)
            ax.set(title=title, xlabel='epoch', ylabel='nats per token', ylim=limits)
            ax.legend(loc='lower left')
        figure.savefig(path)


if __name__ == '__main__':
    runs = read()
    for data, arms in runs.items():
        table(data, arms)
    for name, panels in PANELS.items():
        picture(runs, panels, HERE / f'{name}.png')
