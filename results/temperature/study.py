"""The runs of README.md that are not stored yet, two at a time: python results/temperature/study.py --source=DIR

An arm is a run of train.py; label smoothing, which needs more than log p of the target, is one of
reddit_taylor/arms.py.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from configurator import Options, run  # noqa: E402

PROTOCOL = ('--domains=askengineers --max_rows=250 --n_embd=64 --batch_size=20 --epochs=100 --min_lr=1e-3 '
            '--warmup_iters=0 --dtype=bfloat16 --compile=False --eval_interval=40 --log_interval=20').split()
ARMS = {'t0': ('t0',), 't1': ('t1',), 't2': ('t2',), 't0-wd1': ('t0', '--weight_decay=1'),
        't2-wd1': ('t2', '--weight_decay=1'), 'smooth': ('t0', '--arm=label_smoothing')}  # config and options


@dataclass(frozen=True)
class Config(Options):
    source: str = ''  # folder of rows in SHP's schema
    jobs: int = 2     # runs at a time, one thread each


def main(cfg):
    data = {split: [f'--source={cfg.source}', f'--dataset=study_{split}', f'--split={split}']
            for split in ('post', 'row')}
    for split, options in data.items():
        if not Path('data', f'study_{split}').exists():
            subprocess.run([sys.executable, ROOT / 'prepare_shp.py', *options, *PROTOCOL[:2]], check=True)
    with ThreadPoolExecutor(cfg.jobs) as pool:  # T_n first, seed by seed, so that what is stored can be compared
        for controls in (False, True):
            for seed in range(3):
                for split in data:
                    for arm in [arm for arm in ARMS if (arm not in ('t0', 't1', 't2')) == controls]:
                        pool.submit(one, f'{split}_{arm}_s{seed}', *ARMS[arm], *data[split], f'--seed={seed}')


def one(name, config, *options):
    """One run, resumed where it was broken off; its evaluations are stored when it is whole."""
    out, stored = Path('out/temperature', name), HERE / 'runs' / f'{name}.jsonl'
    if stored.exists():
        return
    resume = [f'--resume={any(out.glob("ckpt_*"))}', f'--overwrite={not any(out.glob("ckpt_*"))}']
    script = ROOT / ('results/reddit_taylor/arms.py' if '--arm=label_smoothing' in options else 'train.py')
    log = out.with_suffix('.log')
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as file:
        done = subprocess.run([sys.executable, script, f'config/{config}_shp.py', *PROTOCOL, *options, *resume,
                               f'--out_dir={out}'], stdout=file, stderr=file,
                              env=os.environ | dict(OMP_NUM_THREADS='1'))
    if done.returncode == 0:
        stored.parent.mkdir(exist_ok=True)
        lines = (out / 'metrics.jsonl').read_text().splitlines()
        stored.write_text(''.join(f'{line}\n' for line in lines if json.loads(line)['event'] == 'eval'))
    print(f'{name}: {"stored" if done.returncode == 0 else f"failed, see {log}"}', flush=True)


if __name__ == '__main__':
    run(main, Config)
