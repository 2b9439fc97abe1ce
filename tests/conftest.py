"""Settings of pytest, and what the tests of runs share: by default all tests run but those that take long."""
import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import plot
import prepare_shp
import preference
import runs
import train
from runs import load_checkpoint
from toy_shp import toy_rows

os.environ['OMP_NUM_THREADS'] = '1'  # models this small: two threads wait for each other longer than they compute
torch.set_num_threads(1)

hypothesis.settings.register_profile('suite', max_examples=100, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile('long', max_examples=20_000, deadline=None, database=None,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.load_profile('suite')


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: hundreds of killed runs; python -m pytest -m soak')
    config.option.markexpr = config.option.markexpr or 'not soak'


ROOT = Path(__file__).parent.parent
DATASET = dict(dataset='small', source='rows', encoding='bytes')
SMALL = dict(DATASET, init_from='start', groups_per_iteration=8, groups_per_step=4, inner_epochs=2, iterations=3,
             max_new_tokens=20, eval_interval=4, log_interval=1, eval_groups=12, eval_samples=6, warmup_iters=2,
             learning_rate=1e-3, device='cpu')
METHODS = dict(dpo=dict(max_answers=3), spin=dict(opponents=2, margin_stop=0.0),
               distill=dict(teacher='teacher', reward_model='reward', margin_stop=0.0),
               reward=dict(reward_read='sum', sft_weight=0.3),
               ppo=dict(reward_model='reward', answers_per_prompt=4, moment_order=3))


def write_rows(path, rows):
    """A file of JSON lines."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def succeed(command):
    """Runs it; where it fails, its output is the message of the test."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f'exit code {done.returncode}\n{done.stdout}'


def typed(script, *more, ranks=1, **options):
    """The command of a script with options, on some ranks."""
    torchrun = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', '--standalone'] if ranks > 1 else []
    return [sys.executable, *torchrun, str(ROOT / script), *(f'--{k}={v}' for k, v in options.items()), *more]


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """A working directory with small data split by post, the same split by row, a start, a teacher, a reward model."""
    path = tmp_path_factory.mktemp('work')
    for split, posts in dict(train=40, validation=12, test=6).items():
        write_rows(path / 'rows' / f'{split}.json', toy_rows(split, posts, 0))
    here = os.getcwd()
    os.chdir(path)
    for options in (DATASET, dict(DATASET, dataset='leaky', split='row')):
        prepare_shp.prepare(prepare_shp.Config(**options))
    for name, seed in (('start', 0), ('teacher', 1)):
        train.main(train.Config(**DATASET, out_dir=name, seed=seed, device='cpu', n_layer=1, n_head=2, n_embd=32,
                                block_size=80, cut='examples', batch_size=16, max_iters=40, learning_rate=1e-2,
                                eval_interval=40, dropout=0.1, tie_weights=False))
    # of the test split the latest is the best, and so not the start
    options = dict(SMALL, method='reward', eval_split='test', **METHODS['reward'])
    preference.main(preference.Config(out_dir='reward', **options))
    os.chdir(here)
    return path


@pytest.fixture
def work(folder, monkeypatch):
    """In that directory; pictures of runs are empty files, for to draw one takes longer than a small run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(plot.Figure, 'savefig', lambda *_, **__: None)


def metrics(out_dir, event):
    """The lines of an event in metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]
    timing = {'seconds', 'tokens_per_second'}
    return [{k: v for k, v in line.items() if k not in timing} for line in lines if line['event'] == event]


def content(state):
    """A nested dict as text, every digit of every tensor included."""
    return json.dumps(state, default=torch.Tensor.tolist)


def assert_same_run(*out_dirs):
    """Two finished runs in all that they wrote, but for times, options, source files and what only a stop keeps."""
    for name in {path.name for out in out_dirs for path in (runs.checkpoints(out)[-1], *out.glob('best.pt'))}:
        a, b = (load_checkpoint(out, name) for out in out_dirs)
        for part in (a.keys() | b.keys()) - {'seconds', 'config', 'machine', 'code'}:
            assert content(a[part]) == content(b[part]), part
    for event in ('train', 'eval'):
        assert metrics(out_dirs[0], event) == metrics(out_dirs[1], event)
    a, b = ({str(path.relative_to(out)): path.read_bytes() if path.suffix in ('.json', '.jsonl') else b''
             for path in out.rglob('*') if path.suffix not in ('.pt', '.damaged') or path.name == 'best.pt'}
            for out in out_dirs)
    assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} <= {'config.json', 'metrics.jsonl'}
