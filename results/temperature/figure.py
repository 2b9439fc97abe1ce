"""The tables and the pictures of these runs: python results/temperature/figure.py

Reads runs/<split>_<arm>_s<seed>.jsonl; what is not stored yet is left out. Also draws results/front.png.
"""
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import plot  # noqa: E402

NAMES = {'t0': 'T_0', 't1': 'T_1', 't2': 'T_2', 't0-wd1': 'T_0, weight decay 1', 't2-wd1': 'T_2, weight decay 1',
         'smooth': 'label smoothing 0.1'}
STEPS = dict(post=8.5, row=10)  # an epoch
BOTH = 'the better of p and link, temperature fitted'
LOWEST = {'of p': 'val_ce', 'at epoch': 'epoch', 'of p, temperature fitted': 'val_ce_t',
          'of link(p), temperature fitted': 'val_ce_link_t', BOTH: 'both', 'new texts': 'val_ce_clean'}
END = {'of p': 'val_ce', 't': 'val_t', 'of p, temperature fitted': 'val_ce_t',
       'of link(p), temperature fitted': 'val_ce_link_t', 'texts seen': 'val_ce_leaked', 'new texts': 'val_ce_clean',
       'accuracy': 'val_accuracy'}


def read():
    """{split: {arm: {seed: evaluations}}}, evaluations with `epoch` and `both` (the primary endpoint)."""
    runs = defaultdict(lambda: defaultdict(dict))
    for path in sorted((HERE / 'runs').glob('*_s*.jsonl')):
        split, arm, seed = path.stem.split('_')
        evaluations = [json.loads(line) for line in path.read_text().splitlines()]
        for e in evaluations:
            e['epoch'] = e['step'] / STEPS[split]
            e['both'] = min(e['val_ce_t'], e.get('val_ce_link_t', math.inf))
        runs[split][arm][int(seed[1:])] = evaluations
    return runs


def lowest(evaluations):
    """The lowest value of each metric over a run, each at its own step; `epoch` is that of the lowest val_ce."""
    found = {key: min(e[key] for e in evaluations) for key in LOWEST.values() if key in evaluations[0]}
    return found | dict(epoch=min(evaluations, key=lambda e: e['val_ce'])['epoch'])


def cell(values, digits):
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


def paired(differences):
    """Mean and standard deviation of differences between runs of equal seeds, and Student's t of n - 1 degrees."""
    t = mean(differences) / (stdev(differences) / math.sqrt(len(differences)))
    return f'{cell(differences, 3)}, t {t:.1f}'


def table(arms, columns, point, title):
    points = {arm: {seed: point(e) for seed, e in arms[arm].items()} for arm in NAMES if arm in arms}
    columns = {name: key for name, key in columns.items() if any(key in run for run in points['t0'].values())
               or 'link' in key}
    print(f'\n| {title} | seeds | ' + ' | '.join(columns) + ' |\n|' + '---|' * (len(columns) + 2))
    for arm, seeds in points.items():
        cells = [cell([run[key] for run in seeds.values()], 0 if key == 'epoch' else 3)
                 if key in next(iter(seeds.values())) else '' for key in columns.values()]
        print(f'| {NAMES[arm]} | {len(seeds)} | ' + ' | '.join(cells) + ' |')
    for arm, seeds in points.items():
        common = sorted(set(seeds) & set(points['t0']))
        if arm != 't0' and len(common) > 2:
            cells = [paired([seeds[s][key] - points['t0'][s][key] for s in common]) if key != 'epoch' and
                     key in seeds[common[0]] and key in points['t0'][common[0]] else '' for key in columns.values()]
            print(f'| {NAMES[arm]}, minus T_0 | {len(common)} | ' + ' | '.join(cells) + ' |')


def curve(ax, seeds, metric, colour, line, label=None):
    """The mean over seeds, and each seed thin."""
    for evaluations in seeds.values():
        ax.plot(*zip(*plot.series(evaluations, 'epoch', metric)), line, color=colour, linewidth=0.6, alpha=0.4)
    points = [plot.series(evaluations, 'epoch', metric) for evaluations in seeds.values()]
    ax.plot([x for x, _ in points[0]], np.mean([[y for _, y in p] for p in points], 0), line, color=colour,
            linewidth=1.8, label=label)


def picture(runs, path):
    """By post and by row: cross-entropy of p as it is, and at a fitted temperature."""
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(8.4, 6.4), dpi=160, layout='constrained')
        axes = figure.subplots(2, 2, sharex=True, sharey='row')
        for row, (split, title) in zip(axes, (('post', 'By post'), ('row', 'By row'))):
            for ax, (metric, what) in zip(row, (('val_ce', 'p'), ('val_ce_t', 'p at a fitted temperature'))):
                for colour, (arm, name) in zip(plot.COLOURS, NAMES.items()):
                    if arm in runs[split]:
                        curve(ax, runs[split][arm], metric, colour, '-', re.sub(r'(T_\d)', r'$\1$', name))
                ax.set(title=f'{title}: {what}', xlabel='epoch', ylabel='nats per token')
            row[0].set_ylim((6.5, 12) if split == 'post' else (3.9, 7))
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
        figure.savefig(path)


def front(runs, path):
    """The idea, T_n and its weight q^n over p; and what came of it."""
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(10, 3.1), dpi=160, layout='constrained')
        loss, weight, result = figure.subplots(1, 3)
        p = np.linspace(0.005, 1, 400)
        for n, colour in zip(range(3), plot.COLOURS):
            value = -np.log(p) - sum((1 - p) ** k / k for k in range(1, n + 1))
            loss.plot(p, value, color=colour, linewidth=1.8, label=f'$T_{n}$')
            weight.plot(p, (1 - p) ** n, color=colour, linewidth=1.8)
        loss.set(title='$T_n(p)$', xlabel='p of the right token', ylabel='nats', ylim=(0, 4))
        weight.set(title='weight of its gradient, $q^n$', xlabel='p of the right token', ylim=(0, 1.05))
        loss.legend()
        for arm, colour in zip(('t0', 't2'), (plot.COLOURS[0], plot.COLOURS[2])):
            curve(result, runs['post'][arm], 'val_ce', colour, '-')
            curve(result, runs['post'][arm], 'val_ce_t', colour, '--')
        result.set(title='Cross-entropy on new texts', xlabel='epoch', ylabel='nats per token', ylim=(6.8, 12))
        for n in (0, 2):
            result.plot([], [], color=plot.COLOURS[n], label=f'$T_{n}$')
        for line, label in (('-', 'raw p'), ('--', 'temperature fitted')):
            result.plot([], [], line, color='#888888', label=label)
        result.legend(loc='upper left', fontsize=8, handlelength=1.5)
        figure.savefig(path)


if __name__ == '__main__':
    runs = read()
    for split, arms in runs.items():
        table(arms, LOWEST, lowest, f'{split}: lowest cross-entropy')
        table(arms, END, lambda evaluations: evaluations[-1], f'{split}: at epoch 100')
    picture(runs, HERE / 'temperature.png')
    front(runs, HERE.parent / 'front.png')
