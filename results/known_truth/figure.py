"""The tables and pictures of the runs that are stored: python results/known_truth/figure.py

Reads runs/<arm>_s<seed>.jsonl, the evaluations of a run; says which arms are missing and draws the others.
"""
import json
import math
import sys
from itertools import count, pairwise
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import plot  # noqa: E402
from study import ARMS  # noqa: E402

STEP = 0.25  # of sqrt(KL), for comparisons at equal KL
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY = plot.COLOURS
BASE = {  # arm: what it is compared with
    'dpo-rank2': 'dpo', 'dpo-beta0.3-rank2': 'dpo-beta0.3', 'dpo-beta3-rank2': 'dpo-beta3', 'dpo-k2-rank2': 'dpo-k2',
    'dpo-plain-rank2': 'dpo-plain', 'dpo-beta0.3': 'dpo', 'dpo-beta3': 'dpo', 'dpo-k2': 'dpo', 'dpo-plain': 'dpo',
    'cdpo': 'dpo', 'ipo': 'dpo', 'ipo-beta0.3': 'dpo-beta0.3', 'language': 'dpo', 'ppo-beta0.05-token2': 'ppo-beta0.05',
    **{arm: 'ppo' for arm in ('ppo-token2', 'ppo-beta0.05', 'ppo-beta0.5', 'ppo-moment3', 'ppo-moment3-bare',
                              'ppo-reward2')},
    **{arm: 'spin' for arm in ARMS['selfplay'] if arm != 'spin'}, **{arm: arm[:-3] for arm in ARMS['chain']}}


def taylor(arm):
    return {arm: ('$T_0$', BLUE), f'{arm}-rank2': ('$T_2$ on the stages', ORANGE)}


def league(name):
    return {'spin': ('SPIN', BLUE), f'{name}2': ('2 opponents', ORANGE), f'{name}3': ('3 opponents', GREEN)}


def starts(arm):
    return {arm: ('start of $T_0$', BLUE), f'{arm}-t2': ('start of $T_2$', ORANGE)}


PICTURES = {  # section: (x, its label, rows of y, {panel: {arm: (label, colour)}})
    'dpo': ('root', 'sqrt(KL to the start, nats per answer)', ('true_quality',), {
        'beta 0.3': taylor('dpo-beta0.3'), 'beta 1': taylor('dpo'), 'beta 3': taylor('dpo-beta3'),
        'beta 1, K = 2': taylor('dpo-k2'), 'beta 1, no language loss': taylor('dpo-plain'),
        'Remedies': {'dpo': ('DPO, beta 1', BLUE), 'cdpo': ('conservative DPO', GREEN), 'ipo': ('IPO, beta 1', PINK),
                     'ipo-beta0.3': ('IPO, beta 0.3', YELLOW), 'language': ('language loss alone', GREY)}}),
    'ppo': ('root', 'sqrt(KL to the start, nats per answer)', ('true_quality', 'reward'), {
        'Strength of the KL': {'ppo-beta0.05': ('beta 0.05', SKY), 'ppo': ('beta 0.15', BLUE),
                               'ppo-beta0.5': ('beta 0.5', GREY)},
        '$T_2$ on tokens': {'ppo': ('beta 0.15', BLUE), 'ppo-token2': ('beta 0.15, $T_2$', ORANGE),
                          'ppo-beta0.05': ('beta 0.05', SKY), 'ppo-beta0.05-token2': ('beta 0.05, $T_2$', YELLOW)},
        'Third moment': {'ppo': ('n = 2', BLUE), 'ppo-moment3': ('n = 3', GREEN),
                         'ppo-moment3-bare': ('n = 3, bare', PINK)},
        'Reward model': {'ppo': ('trained with $T_0$', BLUE), 'ppo-reward2': ('with $T_2$ on the stages', '#8c564b')}}),
    'selfplay': ('millions', 'tokens sampled and trained, millions', ('true_quality',), {
        'Tied': league('tied'), 'Ordered': league('ordered'), 'Anchored': league('anchored'),
        'Distillation': {'spin': ('SPIN', BLUE), 'distill': ('distillation', PINK)}}),
    'chain': ('step', 'updates', ('true_quality',), {
        'DPO': starts('dpo'), 'SPIN': starts('spin'), 'PPO': starts('ppo')})}
LABELS = dict(true_quality='true quality', reward='reward')


def read():
    """{arm: {seed: evaluations}}, with what the pictures add to an evaluation."""
    runs = {}
    for path in sorted((HERE / 'runs').glob('*_s*.jsonl')):
        arm, _, seed = path.stem.rpartition('_s')
        evals = [json.loads(line) for line in path.read_text().splitlines()]
        for e in evals:
            sampled = e['sampled_tokens'] * (2 if arm == 'distill' else 1)  # the teacher writes as much as the policy
            e |= dict(root=math.sqrt(max(e['kl'], 0.0)), millions=(e['tokens'] + sampled) / 1e6)
        runs.setdefault(arm, {})[int(seed)] = evals
    return runs


def quality_at(evals, root):
    """True quality at a value of sqrt(KL), between two evaluations; the best, where a curve meets it again. Or None."""
    met = []
    for a, b in pairwise(evals):
        if min(a['root'], b['root']) < root <= max(a['root'], b['root']):
            share = (root - a['root']) / (b['root'] - a['root'])
            met.append(a['true_quality'] + share * (b['true_quality'] - a['true_quality']))
    return max(met, default=None)


def equal_kl(evals, base):
    """-> mean difference of true quality over a grid of sqrt(KL), None where it is empty; the last value both reach."""
    gaps = []
    for i in count(1):
        pair = [quality_at(run, STEP * i) for run in (evals, base)]
        if None in pair:
            return (mean(gaps) if gaps else None), STEP * (i - 1)
        gaps.append(pair[0] - pair[1])


def late(evals):
    """Mean true quality over the last quarter of a run."""
    return mean(e['true_quality'] for e in evals if e['step'] >= 0.75 * evals[-1]['step'])


def early(evals):
    """True quality where a user would have stopped: at the highest reward, without one at the highest rank_accuracy."""
    seen = 'reward' if 'reward' in evals[-1] else 'rank_accuracy'
    return max(evals[1:], key=lambda e: e[seen])['true_quality']


def cell(values, digits=3, test=False):
    """Mean and standard deviation over seeds; of three differences or more Student's t. '' where a seed has none."""
    if not values or None in values:
        return ''
    text = f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')
    return text + (f', t {mean(values) / stdev(values) * len(values) ** 0.5:.1f}' if test and len(values) > 2 else '')


def table(section, runs):
    arms = list(ARMS[section])
    if missing := [arm for arm in arms if arm not in runs]:
        print(f'\n{section}: not stored yet: {", ".join(missing)}')
    if section == 'chain':
        arms = [arm for pair in zip(map(BASE.get, arms), arms) for arm in pair]
    rows = [('arm', 'seeds', 'last quarter', 'best', 'stopped early', 'rank_accuracy', 'sqrt(KL)', 'reward', 'M tokens',
             'exact_groups', 'compared with', 'difference, last quarter', 'difference, equal KL', 'up to sqrt(KL)')]
    for arm in [arm for arm in arms if arm in runs]:
        seeds, base = runs[arm], runs.get(BASE.get(arm), {})
        evals, both = list(seeds.values()), [(seeds[s], base[s]) for s in seeds if s in base]
        best = [max(e['true_quality'] for e in run) for run in evals]
        exact = [mean(e['exact_groups'] for e in run[1:]) for run in evals if 'exact_groups' in run[-1]]
        ends = [cell([run[-1].get(name) for run in evals], digits)
                for name, digits in (('rank_accuracy', 3), ('root', 2), ('reward', 2), ('millions', 2))]
        equal = [equal_kl(*pair) for pair in both] if section in ('dpo', 'ppo') else []
        rows.append((arm, str(len(evals)), cell([late(run) for run in evals]), cell(best),
                     cell([early(run) for run in evals]), *ends, cell(exact, 2), BASE[arm] if both else '',
                     cell([late(one) - late(two) for one, two in both], test=True),
                     cell([gap for gap, _ in equal], test=True), ', '.join(f'{end:.2f}' for _, end in equal)))
    rows = list(zip(*(column for column in zip(*rows) if any(column[1:]))))  # no column that is empty here
    rows.insert(1, ['---'] * len(rows[0]))
    print()
    for cells in rows:
        print(f'| {" | ".join(cells)} |')
    over = [arm for arm in arms if arm in runs and all(
        max(e['true_quality'] for e in run) - late(run) >= 0.06 for run in runs[arm].values())]
    print(f'\nOver-optimised: {", ".join(over) or "none"}')


def reddit(runs):
    """Held-out pairs in order, beside cheap rankers and the start's log-probability."""
    for arm in ARMS['reddit']:
        for seed, evals in runs.get(arm, {}).items():
            cheap = ', '.join(f'{name.removeprefix("rank_accuracy_")} {evals[0][name]:.3f}'
                              for name in evals[0] if name.startswith('rank_accuracy_'))
            print(f'{arm}, seed {seed}: {evals[-1]["rank_accuracy"]:.3f} (best '
                  f'{max(e["rank_accuracy"] for e in evals[1:]):.3f}); {cheap}')


def picture(section, runs):
    x, label, rows, panels = PICTURES[section]
    if not any(arm in runs for arm in ARMS[section]):
        return
    columns = 3 if len(panels) == 6 else len(panels)
    lines = len(rows) * len(panels) // columns
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(3.6 * columns, 0.4 + 3 * lines), dpi=150, layout='constrained')
        axes = figure.subplots(lines, columns, sharex=True, sharey='row' if len(rows) > 1 else True, squeeze=False)
        cells = [(y, title, arms) for y in rows for title, arms in panels.items()]
        for ax, (y, title, arms) in zip(axes.flat, cells):
            for arm, (name, colour) in arms.items():
                for i, evals in enumerate(runs.get(arm, {}).values()):
                    ax.plot([e[x] for e in evals], [e[y] for e in evals], color=colour, linewidth=1.2, marker='o',
                            markersize=2, label=None if i else name)
                    if x == 'root' and y == 'true_quality':  # where the truth would stop
                        best = max(evals, key=lambda e: e[y])
                        ax.plot(best[x], best[y], '*', color=colour, markersize=10, markeredgecolor='white')
            if y == rows[0]:
                ax.set_title(title)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=7)
        for ax in axes[-1]:
            ax.set_xlabel(label)
        for ax, y in zip(axes[:, 0], rows * lines):
            ax.set_ylabel(LABELS[y])
        figure.savefig(HERE / f'{section}.png')


if __name__ == '__main__':
    runs = read()
    for section in PICTURES:
        table(section, runs)
        picture(section, runs)
    reddit(runs)
