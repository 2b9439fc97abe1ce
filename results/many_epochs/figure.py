"""The tables, the verdict and the picture of the runs that are stored: python results/many_epochs/figure.py"""
import json
import math
import re
from collections import defaultdict
from statistics import mean, stdev

import matplotlib.figure

from study import ARMS, GRID, HERE, READ, SEEDS, best
import plot

NAMES = dict(t0='T_0', t1='T_1', t2='T_2', smooth='label smoothing', dropout='dropout', mask='input masking',
             average='average of weights', half='T_0, half the text', twice='T_0, twice the text')
ORDERS, CONTROLS = ('t1', 't2'), ('smooth', 'dropout', 'mask', 'average')  # a control is called as its option
MARGIN, BOUND = -0.01, 2.78  # of a win: nats; Student's t at 5 % with 4 degrees of freedom


def read():
    """-> {arm: [run, ...]} of tuning, best first, and {arm: {seed: run}} on test. `ce` of a run is its endpoint."""
    tuning, test = defaultdict(list), defaultdict(dict)
    for path in sorted((HERE / 'runs').glob('*.jsonl')):
        run, *evals = map(json.loads, path.read_text().splitlines())
        if 'read' in run:
            test[run['arm']][run['seed']] = run | evals[-1] | dict(ce=evals[-1][run['read']])
        else:
            ce, step, reading = best(evals)
            tuning[run['arm']].append(run | next(e for e in evals if e['step'] == step) | dict(ce=ce, read=reading))
    return {arm: sorted(runs, key=lambda run: run['ce']) for arm, runs in tuning.items()}, test


def spread(runs, key):
    values = [run[key] for run in runs.values() if key in run]
    return (f'{mean(values):.4f}' if values else '') + (f' ± {stdev(values):.4f}' if len(values) > 1 else '')


def compared(runs, others):
    """Differences of the endpoint, paired by seed -> mean, standard deviation and Student's t."""
    differences = [runs[seed]['ce'] - others[seed]['ce'] for seed in runs.keys() & others.keys()]
    return mean(differences), stdev(differences), mean(differences) / stdev(differences) * math.sqrt(len(differences))


def times_the_data(runs, test):
    """How much text T_0 needs to get as low, in units of the arms' text: linear between (logarithm of text, nats)."""
    ce, half, once, twice = (mean(run['ce'] for run in some.values())
                             for some in (runs, *(test[arm] for arm in ('half', 't0', 'twice'))))
    return 2 ** ((once - ce) / (once - twice if ce < once else half - once))


def test_row(runs, test):
    less, times = ('', ''), ''
    if runs is not test['t0'] and len(runs.keys() & test['t0'].keys()) > 1:
        difference, deviation, t = compared(runs, test['t0'])
        less = f'{difference:.4f} ± {deviation:.4f}', f'{t:.1f}'
    if test['half'] and test['t0'] and test['twice']:
        times = f'{times_the_data(runs, test):.2f}'
    return [len(runs), spread(runs, 'ce'), *less, times, *(spread(runs, key) for key in ('val_ce', *READ))]


def table(title, columns, rows):
    print(f'\n| {title} | ' + ' | '.join(columns) + ' |\n|' + '---|' * (len(columns) + 1))
    for arm, cells in rows:
        print(f'| {NAMES[arm]} | ' + ' | '.join(map(str, cells)) + ' |')


def verdict(tuning, test):
    """The rule of README.md: T_n, of the order that is better in tuning, against T_0 and the best control in tuning."""
    order, control = (min(arms, key=lambda arm: tuning[arm][0]['ce']) for arms in (ORDERS, CONTROLS))
    for other in 't0', control:
        difference, _, t = compared(test[order], test[other])
        won = difference < MARGIN and abs(t) > BOUND
        print(f'\n{NAMES[order]} against {NAMES[other]}: {difference:.4f} nats, t {t:.1f}: {"a" if won else "no"} win')


def picture(tuning):
    with matplotlib.rc_context(plot.STYLE):
        figure = matplotlib.figure.Figure(figsize=(7, 4), dpi=150, layout='constrained')
        ax = figure.subplots()
        ax.set(xscale='log', xlabel='weight decay', ylabel='nats per byte, temperature fitted',
               title='Validation: the lowest of the runs of tuning')
        for arm, colour in zip(('t0', *ORDERS, *CONTROLS), plot.COLOURS):
            lowest = {}  # the runs are sorted
            for run in tuning.get(arm, []):
                lowest.setdefault(run['weight_decay'], run)
            points = [(decay, run['ce'], run['epochs']) for decay, run in sorted(lowest.items())]
            ax.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour,
                    label=re.sub(r'(T_\d)', r'$\1$', NAMES[arm]))
            for x, y, epochs in points:  # a run that was longer is filled
                ax.plot(x, y, 'o', color=colour, markersize=4, markerfacecolor=colour if epochs == 32 else 'white')
        ax.set_xticks(GRID['weight_decay'], GRID['weight_decay'])
        ax.minorticks_off()
        figure.legend(loc='outside right center', title='filled: 32 epochs\nhollow: 16 epochs', fontsize=8,
                      title_fontsize=8)
        figure.savefig(HERE / 'weight_decay.png')


if __name__ == '__main__':
    tuning, test = read()
    table('validation, 1 seed', ['runs', *GRID, 'own option', 'step', 'read', 'lowest'],
          [(arm, [len(runs), *(runs[0][name] for name in GRID), runs[0].get(arm, ''), runs[0]['step'], runs[0]['read'],
                  f'{runs[0]["ce"]:.4f}']) for arm in NAMES if (runs := tuning.get(arm))])
    table('test', ['seeds', 'endpoint', 'minus T_0', 't', 'times the data', 'p', 'p, temperature fitted',
                   'link, temperature fitted'], [(arm, test_row(test[arm], test)) for arm in NAMES if test[arm]])
    if all(len(test[arm]) == len(SEEDS) for arm in ARMS):
        verdict(tuning, test)
    picture(tuning)
