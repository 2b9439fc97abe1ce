"""link_n as a mere map, over T_0's p as well: python results/temperature/maps.py --source=DIR

Reads the last checkpoints of study.py's runs in out/temperature, and prints a line for each run and n: cross-entropy of
link_n(p) at its own temperature. maps.jsonl is what it printed. Not part of the protocol: it was made when link_n(p)
of T_1 and T_2 had come out lower than p of T_0 by row.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))
import prepare_shp  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

machine = runs.setup('cpu')
for split in ('row', 'post'):
    cfg = train.Config(source=sys.argv[1].partition('=')[2], dataset=f'study_{split}', split=split, max_rows=250,
                       domains=('askengineers',), cut='examples', batch_size=20)
    data = prepare_shp.open_dataset(cfg)
    documents, halves = data.documents('val'), data.halves('val')
    rows = range(prepare_shp.eval_length(documents, cfg.cut, cfg.block_size))
    for arm, orders in (('t0', (1, 2, 3)), ('t2', (2, 3))):
        for seed in range(3):
            state = runs.load_checkpoint(f'out/temperature/{split}_{arm}_s{seed}')
            model = GPT(GPTConfig(**state['model_config']))
            model.load_state_dict(state['model'])
            for n in orders:
                found = train.evaluate(model, documents, rows, cfg, machine, n, SimpleNamespace(number=0), halves)
                print(json.dumps(dict(split=split, arm=arm, seed=seed, map=n, **{
                    key: round(found[key], 3) for key in ('val_ce_t', 'val_ce_link_t', 'val_t_link')})), flush=True)
