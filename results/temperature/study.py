"""The runs of README.md that are not stored yet, two at a time: python results/temperature/study.py --source=DIR

An arm is a run of train.py; label smoothing, which needs more than log p of the target, has another head.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import train  # noqa: E402
from configurator import Options, run  # noqa: E402
from losses import linear_token_log_prob  # noqa: E402

SMOOTHING = 0.1
PROTOCOL = ('--domains=askengineers --max_rows=250 --n_embd=64 --batch_size=20 --epochs=100 --min_lr=1e-3 '
            '--warmup_iters=0 --dtype=bfloat16 --compile=False --eval_interval=40 --log_interval=20').split()
ARMS = {'t0': ('t0',), 't1': ('t1',), 't2': ('t2',), 't0-wd1': ('t0', '--weight_decay=1'),
        't2-wd1': ('t2', '--weight_decay=1'), 'smooth': ('t0', '--smooth=True')}  # config and options


@dataclass(frozen=True)
class Config(Options):
    source: str = ''  # folder of rows in SHP's schema
    jobs: int = 2     # runs at a time, one thread each


def main(cfg):
    data = {split: [f'--source={cfg.source}', f'--dataset=study_{split}', f'--split={split}'] for split in ('post', 'row')}
    for split, options in data.items():
        if not Path('data', f'study_{split}').exists():
            subprocess.run([sys.executable, HERE.parents[1] / 'prepare_shp.py', *options, *PROTOCOL[:2]], check=True)
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
    log = out.with_suffix('.log')
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') as file:
        done = subprocess.run([sys.executable, __file__, f'config/{config}_shp.py', *PROTOCOL, *options, *resume,
                               f'--out_dir={out}'], stdout=file, stderr=file, env=os.environ | dict(OMP_NUM_THREADS='1'))
    if done.returncode == 0:
        stored.parent.mkdir(exist_ok=True)
        lines = (out / 'metrics.jsonl').read_text().splitlines()
        stored.write_text(''.join(f'{line}\n' for line in lines if json.loads(line)['event'] == 'eval'))
    print(f'{name}: {"stored" if done.returncode == 0 else f"failed, see {log}"}', flush=True)


@dataclass(frozen=True)
class Arm(train.Config):
    smooth: bool = False  # label smoothing of 0.1 in place of T_n


def label_smoothing(log_p):
    """The target's part of label smoothing, which the log shows; smoothed_head adds the rest."""
    return -(1 - SMOOTHING) * log_p


def smoothed_head(hidden, weight, targets, loss, vocab_size):
    """As losses.linear_loss: a share of epsilon of the target goes to the whole vocabulary (Szegedy et al. 2016)."""
    log_p = linear_token_log_prob(hidden, weight, targets, vocab_size)
    # mean_v log p_v = mean_v z_v - logsumexp z, and logsumexp z = z_target - log p
    mean_logit, target_logit = ((hidden * row).sum(-1) for row in (weight[:vocab_size].mean(0), weight[targets]))
    return (loss(log_p) - SMOOTHING * (mean_logit - target_logit + log_p)).sum(), log_p.detach()


def train_arm(cfg):
    if cfg.smooth:  # no function of log p alone
        train.linear_loss = smoothed_head
    train.main(cfg, label_smoothing if cfg.smooth else None)


if __name__ == '__main__':
    if any(arg.startswith('config/') for arg in sys.argv[1:]):
        run(train_arm, Arm)
    else:
        run(main, Config)
