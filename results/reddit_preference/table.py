"""The table of these runs: python results/reddit_preference/table.py

Reads <run>.jsonl beside it, each a run's metrics.jsonl: its last evaluation.
"""
import json
from pathlib import Path

RUNS = {'reward': '`reward`', 'dpo-k3': '`dpo`, rankings of 3 at most', 'dpo-k2': 'of 2, equal tokens',
        'spin-1': '`spin`, 1 opponent', 'spin-2': '2 opponents', 'spin-3': '3 opponents', 'distill': '`distill`',
        'ppo': '`ppo`, n = 2', 'ppo-n3': 'n = 3, monotone', 'ppo-n3-bare': 'n = 3, bare', 'ppo-batch': 'n = 2 per batch'}
COLUMNS = dict(rank_accuracy=3, reward=2, kl=2, entropy=2, eot_rate=2, tokens=0, sampled_tokens=0, seconds=0)

print('| run | ' + ' | '.join(COLUMNS) + ' |\n|' + '---|' * (1 + len(COLUMNS)))
for name, label in RUNS.items():
    events = map(json.loads, (Path(__file__).parent / f'{name}.jsonl').read_text().splitlines())
    evals = [event for event in events if event['event'] == 'eval']
    columns = COLUMNS if name != 'reward' else ('rank_accuracy', 'tokens', 'seconds')  # it writes nothing
    print(f'| {label} | ' + ' | '.join(f'{evals[-1][c]:,.{digits}f}' if c in columns and c in evals[-1] else ''
                                       for c, digits in COLUMNS.items()) + ' |')
    if name in ('reward', 'dpo-k3', 'ppo'):
        print(f'{label} at the start: ' + ', '.join(f'{k} {v:.3f}' for k, v in evals[0].items() if k.startswith(
            ('rank_accuracy_', 'eot_rate', 'reward', 'entropy'))))
