"""The runs of README.md that are not stored yet: python results/many_epochs/study.py --source=DIR

First every arm is tuned on the validation split, arms beside each other, then its seeds are read on the test split.
What comes next follows from runs/ alone, so that a study that was broken off goes on where it stopped.
"""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from configurator import Options, run  # noqa: E402
from runs import write_whole  # noqa: E402

ROWS = 300   # of train
EVERY = 200  # steps between evaluations
SEEDS = range(1, 6)  # on the test split; tuning has seed 0
DATA = '--domains=askculinary', '--encoding=bytes'
TRAINING = ('--cut=stream --block_size=128 --batch_size=8 --warmup_iters=100 --compile=False --dtype=bfloat16 '
            '--log_interval=100 --overwrite=True').split()
# what every arm chooses from, in the order of the descent, and where it starts
GRID = dict(weight_decay=(0.1, 0.4, 0.8, 1.6, 3.2), epochs=(8, 16, 32), learning_rate=(2e-3, 4e-3))
START = dict(weight_decay=0.8, epochs=16, learning_rate=4e-3)
# an arm's own option starts at its first value; the longest arm comes first, so that both cores end together
ARMS = {'twice': dict(max_rows=(2 * ROWS,)), 't0': {}, 't1': dict(taylor_order=(1,)), 't2': dict(taylor_order=(2,)),
        'smooth': dict(smooth=(0.1, 0.05)), 'dropout': dict(dropout=(0.1, 0.2)), 'mask': dict(mask=(0.1, 0.2)),
        'average': dict(average=(0.99, 0.998)), 'half': dict(max_rows=(ROWS // 2,))}
READ = 'val_ce_t', 'val_ce_link_t'  # p, and under T_1 and T_2 the link, each at its own temperature


@dataclass(frozen=True)
class Config(Options):
    source: str = ''            # folder of rows in SHP's schema
    jobs: int = 2               # runs at a time, one thread each
    only: tuple[str, ...] = ()  # arms; empty = all


def main(cfg):
    arms = [arm for arm in ARMS if not cfg.only or arm in cfg.only]
    for rows in {rows for arm in arms for rows in ARMS[arm].get('max_rows', (ROWS,))}:
        if not Path('data', dataset(rows)).exists():
            subprocess.run([sys.executable, HERE.parents[1] / 'prepare_shp.py', *DATA, f'--max_rows={rows}',
                            f'--source={cfg.source}', f'--dataset={dataset(rows)}'], check=True)
    with ThreadPoolExecutor(cfg.jobs) as pool:
        tuned = list(pool.map(lambda arm: descend(cfg, arm), arms))
        list(pool.map(lambda job: test(cfg, *job), [(*one, seed) for seed in SEEDS for one in zip(arms, tuned)]))


def dataset(rows):
    return f'many_epochs_{rows}'


def descend(cfg, arm):
    """Coordinate descent: along each option to the nearest minimum, and once more along weight decay -> options."""
    def loss(point):
        return best(evaluations(cfg, arm, point))[0]

    grid = GRID | ARMS[arm]
    point = {name: START.get(name, values[0]) for name, values in grid.items()}
    for name in (*grid, 'weight_decay'):
        for values in (grid[name], grid[name][::-1]):  # upwards, then downwards
            while point[name] != values[-1]:
                after = point | {name: values[values.index(point[name]) + 1]}
                if loss(after) >= loss(point):
                    break
                point = after
    return point


def best(events):
    """The primary endpoint of a run on the validation split -> (nats, its step, whether of p or of the link)."""
    return min((event[read], event['step'], read) for event in events if event['event'] == 'eval'
               for read in READ if read in event)


def test(cfg, arm, point, seed):
    """A fresh seed on the test split, at the step and by the reading that tuning found."""
    _, step, read = best(evaluations(cfg, arm, point))
    evaluations(cfg, arm, point, seed, dict(eval_split='test', eval_interval=step, stop_step=step), dict(read=read))


def evaluations(cfg, arm, point, seed=0, more={}, note={}):
    """The stored lines of a run, which is made where there are none: what it is, then its evaluations."""
    name = '_'.join([arm, *(f'{value:g}' for value in point.values()), f's{seed}'])
    stored, out = HERE / 'runs' / f'{name}.jsonl', Path('out/many_epochs', name)
    if not stored.exists():
        options = dict(max_rows=ROWS, eval_interval=EVERY) | point | more
        options |= dict(dataset=dataset(options['max_rows']), min_lr=point['learning_rate'] / 10, seed=seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(f'{out}.log', 'w') as log:
            subprocess.run([sys.executable, HERE / 'arms.py', 'config/toy_t0.py', *DATA, *TRAINING,
                            *(f'--{key}={value}' for key, value in options.items()), f'--source={cfg.source}',
                            f'--out_dir={out}'], check=True, stdout=log, stderr=log,
                           env=os.environ | dict(OMP_NUM_THREADS='1'))
        events = map(json.loads, (out / 'metrics.jsonl').read_text().splitlines())
        lines = [dict(event='run', arm=arm, **options, **note), *(e for e in events if e['event'] == 'eval')]
        stored.parent.mkdir(exist_ok=True)
        write_whole(stored, ''.join(json.dumps(line) + '\n' for line in lines))
        shutil.rmtree(out)
        print(f'{name}: stored', flush=True)
    return [json.loads(line) for line in stored.read_text().splitlines()]


if __name__ == '__main__':
    run(main, Config)
