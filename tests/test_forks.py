"""The diffs of the README, section "Fork it", each applied to a copy of the repository, trained and resumed."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare_shp
from toy_shp import toy_rows

ROOT = Path(__file__).parent.parent
OPTIONS = dict(dataset='small', encoding='bytes', source='rows.jsonl', n_layer=1, n_head=2, n_embd=16, block_size=80,
               batch_size=8, max_iters=6, eval_interval=3, log_interval=1, warmup_iters=2, device='cpu', dropout=0.1)
DIFFS = re.findall(r'```diff\n--- (\S+)\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)


def fork(folder, number):
    """A copy of the repository, with the README's diff of that number applied; its rows are the toy's."""
    for pattern in ('*.py', 'extras/*.py'):
        for path in ROOT.glob(pattern):
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in toy_rows('train', 60, 0)))
    name, diff = DIFFS[number]
    lines = diff.splitlines(keepends=True)
    old, new = (''.join(line[1:] for line in lines if line[0] in signs) for signs in (' -', ' +'))
    text = (folder / name).read_text()
    assert text.count(old) == 1, old
    (folder / name).write_text(text.replace(old, new))


def run(folder, script, code=0, **options):
    command = [sys.executable, script, *(f'--{name}={value}'.rstrip('=') for name, value in options.items())]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == code, done.stdout
    return done.stdout


def train_and_resume(folder, script='train.py', **options):
    """A run of six steps, and one that is stopped and continued with nothing but --resume=True: bit for bit."""
    printed = run(folder, script, out_dir='out/whole', **options)
    run(folder, script, out_dir='out/stopped', stop_step=2, **options)
    assert '(exact)' in run(folder, script, out_dir='out/stopped', resume=True)
    states = [torch.load(folder / 'out' / name / 'ckpt_00000006.pt') for name in ('whole', 'stopped')]
    for a, b in zip(*(state['model'].values() for state in states)):
        assert torch.equal(a, b)
    return printed, states[0]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    def prepare(number):
        fork(tmp_path, number)
        monkeypatch.chdir(tmp_path)
        prepare_shp.prepare(prepare_shp.Config(dataset='small', encoding='bytes', source='rows.jsonl'))
        return tmp_path
    return prepare


def test_another_loss(prepared):
    folder = prepared(0)
    printed, state = train_and_resume(folder, **OPTIONS)
    assert 'focal, gamma = 2' in printed and 'link' not in printed
    for name in (state['fixed']['loss'], json.loads((folder / 'out/whole/config.json').read_text())['loss']):
        assert name == 'loss_of = lambda log_p: -torch.expm1(log_p) ** 2 * log_p  # focal, gamma = 2'
    lines = [json.loads(line) for line in (folder / 'out/whole/metrics.jsonl').read_text().splitlines()]
    assert not any('link' in key for line in lines for key in line)
    p = torch.tensor(-lines[1]['train_ce']).exp()  # of a model that is near uniform still
    q = 1 - p
    assert lines[1]['taylor_weight'] == pytest.approx((q ** 2 - 2 * q * p * p.log()).item(), rel=0.05)
    assert 'its probabilities have no link' in run(folder, 'sample.py', 1, out_dir='out/whole', link=True, prompt='Hi?')
    shutil.copy(ROOT / 'train.py', folder)
    assert 'cannot resume: loss is' in run(folder, 'train.py', 1, out_dir='out/whole', resume=True)


def test_another_optimizer(prepared):
    folder = prepared(1)
    _, state = train_and_resume(folder, **OPTIONS)
    assert len(state['optimizers']) == 2 and 'momentum_buffer' in state['optimizers'][0]['state'][0]
    shutil.copy(ROOT / 'train.py', folder)
    assert 'cannot resume: optimizers is' in run(folder, 'train.py', 1, out_dir='out/whole', resume=True)


def test_another_architecture_is_not_exported(prepared):
    pytest.importorskip('safetensors')
    folder = prepared(2)
    train_and_resume(folder, **OPTIONS)
    assert 'GPT-2 only' in run(folder, 'sample.py', 1, out_dir='out/whole', export_hf='hf')
    assert not (folder / 'hf').exists()


def test_another_schema(tmp_path):
    rows = [dict(question=f'{i}?', replies=[dict(text=f'{k} {i}', votes=k) for k in range(3)]) for i in range(60)]
    (tmp_path / 'mine.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    fork(tmp_path, 3)
    assert '60' in run(tmp_path, 'prepare_shp.py', dataset='small', encoding='bytes', source='mine.jsonl')
    train_and_resume(tmp_path, **dict(OPTIONS, source='mine.jsonl', block_size=8))


def test_another_method(prepared):
    folder = prepared(4)
    run(folder, 'train.py', out_dir='out/start', **OPTIONS)
    options = {name: OPTIONS[name] for name in ('dataset', 'encoding', 'source', 'max_iters', 'eval_interval')}
    printed, state = train_and_resume(folder, 'preference.py', method='extremes', init_from='out/start',
                                      max_new_tokens=30, groups_per_step=4, inner_epochs=2, eval_samples=8, **options)
    assert 'extremes: model of' in printed and state['fixed']['method'] == 'extremes'
    assert 'extremes   The best answer' in run(folder, 'preference.py', help='')
