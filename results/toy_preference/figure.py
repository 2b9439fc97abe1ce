"""The tables and the picture of these runs: python results/toy_preference/figure.py

Reads <run>_s<seed>.jsonl beside it, each a run's metrics.jsonl; a run's name is its method and what it varies.
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import plot  # noqa: E402
from losses import renormalize_reward  # noqa: E402

RUNS = {'reward': 'reward model', 'dpo': 'DPO', 'dpo-k4': 'K = 4 at most', 'dpo-k2': 'K = 2, equal tokens',
        'dpo-rank1': 'rank_order 1', 'dpo-rank2': 'rank_order 2', 'dpo-token1': 'token_order 1',
        'dpo-token2': 'token_order 2', 'dpo-beta3': 'beta 3', 'spin-1': 'SPIN', 'spin-2': '2 opponents', 'spin-3': '3 opponents',
        'distill': 'distillation', 'ppo': 'PPO, n = 2', 'ppo-n3': 'n = 3, monotone', 'ppo-n3-bare': 'n = 3, bare',
        'ppo-batch': 'n = 2 per batch'}
BASE = dict(dpo='dpo', spin='spin-1', distill='spin-1', ppo='ppo')  # what a method's runs are compared with
COLUMNS = dict(rank_accuracy=3, true_quality=3, reward=2, kl=2, entropy=3, eot_rate=3, answer_length=1)
ALSO = ('rank_ece', 'rank_loss', 'quality_data', 'quality_teacher', 'quality_self', 'quality_agrees', 'reward_data',
        'reward_teacher', 'reward_self', 'reward_agrees', 'reward_quality_correlation')


def read():
    """{run: {seed: evaluations}}."""
    runs = {name: {} for name in RUNS}
    for path in sorted(HERE.glob('*_s*.jsonl')):
        name, _, seed = path.stem.rpartition('_s')
        events = map(json.loads, path.read_text().splitlines())
        runs[name][int(seed)] = [event for event in events if event['event'] == 'eval']
    return runs


def cell(values, digits):
    if None in values:
        return ''
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


def table(runs):
    first = [evals[0] for evals in runs['dpo'].values()]  # the same in all runs of a seed
    last = {name: {seed: evals[-1] for seed, evals in seeds.items()} for name, seeds in runs.items()}
    for prefix, what in (('rank_accuracy_', 'held-out pairs ordered by'), ('true_quality_', 'true quality of')):
        print(what, ', '.join(f'{name.removeprefix(prefix)} {x:.3f}' for name, x in first[0].items()
                              if name.startswith(prefix)))

    def row(name, evals, columns, *more):
        cells = [cell([e.get(c) for e in evals], d) if c in columns else '' for c, d in COLUMNS.items()]
        print('| ' + ' | '.join([name, str(len(evals)), *cells, *more]) + ' |')
    head = ['run', 'seeds', *COLUMNS, 'true_quality less its base', 'updates', 'tokens', 'sampled']
    print('\n| ' + ' | '.join(head) + ' |\n|' + '---|' * len(head))
    row('start', first, set(COLUMNS) - {'rank_accuracy'}, *4 * [''])
    for name, seeds in last.items():
        base = last.get(BASE.get(name.partition('-')[0], name), {})
        less = [seeds[s]['true_quality'] - base[s]['true_quality'] for s in seeds if base is not seeds and s in base]
        evals = list(seeds.values())
        row(RUNS[name], evals, ['rank_accuracy'] if name == 'reward' else COLUMNS,  # a reward model writes nothing
            cell(less, 3) if less else '', ', '.join(str(e['step']) for e in evals),
            *(f'{mean(e[c] for e in evals):,.0f}' for c in ('tokens', 'sampled_tokens')))
    print()
    for name, seeds in last.items():
        print(f'{RUNS[name]}: ' + ', '.join(f'{also} {cell([e[also] for e in seeds.values()], 3)}' for also in ALSO
                                            if also in seeds[0]))


def bare_cubic(groups=20_000, answers=8):
    """How often R of n = 3, without the guard of monotony, praises the worst answer of normally distributed rewards."""
    r = torch.randn(groups, answers, generator=torch.Generator().manual_seed(0)).sort().values
    R = renormalize_reward(r, 3, monotone=False).reward
    print(f'\nn = 3, bare: of {groups:,} groups of {answers} normal rewards {(R.diff() > 0).all(1).float().mean():.0%} '
          f'keep their order, {(R[:, 0] > 0).float().mean():.0%} give the worst answer a positive reward')


def picture(runs, path):
    """True quality: of DPO's ends against their distance, of the others over updates; one line or mark a seed."""
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(10, 7), dpi=150, layout='constrained')
        (dpo, spin), (ppo, reward) = figure.subplots(2, 2)
        for i, name in enumerate(name for name in RUNS if name.startswith('dpo')):
            ends = [evals[-1] for evals in runs[name].values()]
            dpo.plot([e['kl'] for e in ends], [e['true_quality'] for e in ends], 'osDv^Ph*'[i],
                     color=(plot.COLOURS * 2)[i], label=RUNS[name])
        dpo.set(title='DPO: quality over distance at the end', xlabel='KL to the start, nats per answer', ylabel='true quality')
        for ax, names, x, y in ((spin, ('spin-1', 'spin-2', 'spin-3', 'distill'), 'step', 'true_quality'),
                                (ppo, ('ppo', 'ppo-n3', 'ppo-n3-bare', 'ppo-batch'), 'step', 'true_quality'),
                                (reward, ('ppo', 'ppo-n3', 'ppo-n3-bare', 'ppo-batch'), 'kl', 'reward')):
            for i, name in enumerate(names):
                for seed, evals in runs[name].items():
                    ax.plot([e[x] for e in evals], [e[y] for e in evals], color=plot.COLOURS[i], linewidth=1.3,
                            label=RUNS[name] if seed == 0 else None)
            ax.set(xlabel='updates', ylabel='true quality')
        spin.set(title='Self-play and distillation')
        ppo.set(title='PPO: true quality')
        reward.set(title='PPO: reward over distance', xlabel='KL to the start, nats per answer', ylabel='reward')
        for ax in (dpo, spin, ppo, reward):
            ax.legend(fontsize=8)
        figure.savefig(path)


if __name__ == '__main__':
    runs = read()
    table(runs)
    bare_cubic()
    picture(runs, HERE / 'toy_preference.png')
