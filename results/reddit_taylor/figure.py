"""The tables and the picture of these runs: python results/reddit_taylor/figure.py

Reads runs/<data>_<arm>_s<seed>.jsonl. Every number is of a full pass over the validation texts; only the curves called
a fixed sample are of 20 of these texts, looked at 22 times an epoch.
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

DATA = dict(whole64=358, whole1024=358, arms=20)  # folders of README, and their steps an epoch
NAMES = {'t0': 'T_0', 't1': 'T_1', 't2': 'T_2', 'lr': 'T_0, learning rate 4e-4', 'wd0.1': 'T_0, weight decay 0.1',
         'wd1': 'T_0, weight decay 1', 'wd1-t2': 'T_2, weight decay 1', 'label_smoothing': 'label smoothing 0.1',
         'focal': 'focal, gamma 2', 'dft': 'DFT', 'taylor_ce': 'TaylorCE'}
SHARED = {'accuracy': 'val_accuracy', 'ECE': 'val_ece', 'ECE of link_n(p)': 'val_ece_link',
          'entropy where wrong': 'val_entropy_wrong', 'that of link_n(p)': 'val_entropy_wrong_link'}
LOWEST = {'lowest': 'val_ce', 'at epoch': 'epoch', 'of link_n(p), lowest': 'lowest_link',
          'new texts, lowest': 'lowest_clean', **SHARED}
END = {'at the end': 'val_ce', 'of link_n(p)': 'val_ce_link', 'texts seen': 'val_ce_leaked', 'new texts': 'val_ce_clean',
       **SHARED}
SEEN_AND_NEW = {'val_ce_leaked': ':', 'val_ce_clean': '-'}
PANELS = [('whole64', '64 channels: a fixed sample', {'probe_ce': '-'}, (2, 10)),
          ('whole64', '64 channels: texts seen in training (dotted), new ones', SEEN_AND_NEW, (0, 14)),
          ('whole1024', '1024 channels: a fixed sample', {'probe_ce': '-'}, (2, 10)),
          ('whole1024', '1024 channels: texts seen in training (dotted), new ones', SEEN_AND_NEW, (0, 14))]


def read():
    """{data: {arm: {seed: events}}}, events with `epoch` beside their step."""
    runs = defaultdict(lambda: defaultdict(dict))
    for path in sorted((HERE / 'runs').glob('*_s*.jsonl')):
        data, _, rest = path.stem.partition('_')
        arm, _, seed = rest.rpartition('_s')
        runs[data][arm][int(seed)] = [dict(event, epoch=event['step'] / DATA[data])
                                      for event in map(json.loads, path.read_text().splitlines())]
    return runs


def passes(events):
    """The full passes over the validation texts, each with the lowest values up to it."""
    evals = [dict(e) for e in events if e['event'] == 'eval']
    for part in {'link', 'clean'} & {key.removeprefix('val_ce_') for key in evals[0]}:
        for e, lowest in zip(evals, accumulate((e[f'val_ce_{part}'] for e in evals), min)):
            e[f'lowest_{part}'] = lowest
    return evals


def spread(values, digits=3):
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


def paired(differences, digits):
    """Mean and standard deviation of differences between runs of equal seeds, and Student's t of n - 1 degrees."""
    error = stdev(differences) / math.sqrt(len(differences))
    return spread(differences, digits) + (f', t {mean(differences) / error:.1f}' if error else '')


def table(data, arms):
    """Each arm at its lowest cross-entropy, where early stopping ends, and at the last pass that all runs reached."""
    evals = {arm: {seed: passes(events) for seed, events in arms[arm].items()} for arm in NAMES if arm in arms}
    reached = min(e[-1]['step'] for seeds in evals.values() for e in seeds.values())
    evals = {arm: {s: [x for x in e if x['step'] <= reached] for s, e in seeds.items()} for arm, seeds in evals.items()}
    end = {arm: {s: e[-1] for s, e in seeds.items()} for arm, seeds in evals.items()}
    lowest = {arm: {s: dict(min(e, key=lambda x: x['val_ce']), **{k: v for k, v in e[-1].items() if 'lowest_' in k})
                    for s, e in seeds.items()} for arm, seeds in evals.items()}
    for columns, points in ((LOWEST, lowest), (END, end)):
        first = next(iter(points['t0'].values()))
        columns = {name: key for name, key in columns.items() if key in first and not (
            data == 'arms' and 'clean' in key)}  # two in five tokens of these have an answer of train under another title
        print(f'\n{data}, to epoch {reached / DATA[data]:.0f}\n\n| | seeds | ' + ' | '.join(columns) + ' |\n|' +
              '---|' * (len(columns) + 2))
        digits = {key: 0 if key == 'epoch' else 3 for key in columns.values()}
        for arm, seeds in points.items():
            print(f'| {NAMES[arm]} | {len(seeds)} | ' + ' | '.join(
                spread([run[key] for run in seeds.values()], digits[key]) for key in columns.values()) + ' |')
        for arm, seeds in points.items():
            both = sorted(set(seeds) & set(points['t0']))
            if arm != 't0' and len(both) > 2:
                print(f'| {NAMES[arm]}, minus T_0 | {len(both)} | ' + ' | '.join(
                    paired([seeds[s][key] - points['t0'][s][key] for s in both], digits[key])
                    for key in columns.values()) + ' |')


def picture(runs, path):
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(10, 7), dpi=150, layout='constrained')
        for ax, (data, title, metrics, limits) in zip(figure.subplots(2, 2).flatten(), PANELS):
            shown = [n for n in range(3) if f't{n}' in runs[data]]
            plot.draw(ax, [(plot.series(events, 'epoch', metric), plot.COLOURS[n], line) for n in shown
                           for events in runs[data][f't{n}'].values() for metric, line in metrics.items()])
            ax.set_title(title)
            ax.set(xlabel='epoch', ylabel='nats per token', ylim=limits)
            ax.legend([ax.plot([], [], color=plot.COLOURS[n])[0] for n in shown], [f'$T_{n}$' for n in shown])
        figure.savefig(path)


if __name__ == '__main__':
    runs = read()
    for data in DATA:
        if data in runs:
            table(data, runs[data])
    picture(runs, HERE / 'source.png')
