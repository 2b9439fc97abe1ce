"""The table of these runs: python results/toy_taylor/table.py

Reads t<n>_s<seed>.jsonl beside it, each a run's metrics.jsonl.
"""
import json
from pathlib import Path
from statistics import mean, stdev

COLUMNS = {'of p': 'val_ce', 'of link_n(p)': 'val_ce_link', 'accuracy': 'val_accuracy', 'ECE of p': 'val_ece',
           'of link_n(p), ECE': 'val_ece_link'}
LOWEST = {'lowest of p': 'val_ce', 'lowest of link_n(p)': 'val_ce_link'}


def spread(values):
    return f'{mean(values):.3f} ± {stdev(values):.3f}'


print('| | seeds | ' + ' | '.join([*COLUMNS, *LOWEST]) + ' |\n|' + '---|' * (2 + len(COLUMNS) + len(LOWEST)))
for n in range(3):
    runs = [[event for event in map(json.loads, path.read_text().splitlines()) if event['event'] == 'eval']
            for path in sorted(Path(__file__).parent.glob(f't{n}_s*.jsonl'))]
    print(f'| T_{n} | {len(runs)} | ' + ' | '.join(
        [*(spread([evals[-1][key] for evals in runs]) for key in COLUMNS.values()),
         *(spread([min(e[key] for e in evals) for evals in runs]) for key in LOWEST.values())]) + ' |')
