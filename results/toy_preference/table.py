"""The tables of this folder's README from the runs' metrics: mean and standard deviation over seeds.

    python results/toy_preference/table.py results/toy_preference/*.jsonl
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

COLUMNS = 'rank_accuracy', 'true_quality', 'eot_rate', 'answer_length', 'kl', 'entropy', 'tokens', 'sampled_tokens'
DIGITS = dict(answer_length=1, kl=2, tokens=0, sampled_tokens=0)

runs = {}
for path in sys.argv[1:]:
    evals = [line for line in map(json.loads, Path(path).read_text().splitlines()) if line['event'] == 'eval']
    runs.setdefault(Path(path).stem.rpartition('_s')[0], []).append(evals)


def cell(values, digits):
    if any(value is None for value in values):
        return ''
    return f'{mean(values):.{digits}f}' + (f' ± {stdev(values):.{digits}f}' if len(values) > 1 else '')


first = [evals[0] for every in runs.values() for evals in every]
print('held-out pairs ordered by ' + ', '.join(
    f'{name[14:]} {first[0][name]:.3f}' for name in first[0] if name.startswith('rank_accuracy_')))
print('true quality of ' + ', '.join(
    f'{name[13:]} {first[0][name]:.3f}' for name in first[0] if name.startswith('true_quality_')))
print('| run | n | ' + ' | '.join(COLUMNS) + ' |\n' + '|---' * (len(COLUMNS) + 2) + '|')
print(f'| start | {len(first)} | ' + ' | '.join(
    cell([line[name] for line in first], DIGITS.get(name, 3)) for name in COLUMNS[1:6]).join(('| ', ' | | |')))
for name, every in runs.items():
    last = [evals[-1] for evals in every]
    print(f'| {name} | {len(every)} | ' + ' | '.join(
        cell([line.get(column) for line in last], DIGITS.get(column, 3)) for column in COLUMNS) + ' |')
for name, every in runs.items():
    for extra in ('rank_ece', 'rank_loss', 'reward', 'quality_data', 'quality_teacher', 'quality_self',
                  'quality_agrees', 'reward_data', 'reward_teacher', 'reward_self', 'reward_agrees',
                  'reward_quality_correlation'):
        if extra in every[0][-1]:
            print(f'{name}: {extra} {cell([evals[-1][extra] for evals in every], 3)}')
