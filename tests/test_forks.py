"""The diffs of the README, section "Fork it", each applied to a copy of the repository, trained and resumed."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, write_rows
from toy_shp import toy_rows

DATA = '--dataset=small --encoding=bytes --source=rows.jsonl'
TRAIN = (f'train {DATA} --n_layer=1 --n_head=2 --n_embd=16 --block_size=80 --batch_size=8 --max_iters=6 --dropout=0.1 '
         '--eval_interval=3 --log_interval=1 --warmup_iters=2 --device=cpu')
DIFFS = re.findall(r'```diff\n--- (\S+)\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
# commands one after another, for a process each would take seconds to import torch; a refusal ends its command
PROGRAM = '''
import importlib, sys
from configurator import Refusal, configure
for name, *argv in map(str.split, filter(None, sys.argv[1:])):
    script = importlib.import_module(name)
    try:
        script.main(configure(script.Config, argv))
    except (Refusal, SystemExit) as end:
        print(end)
'''


def train_and_resume(folder, number, command, before='', after='', rows=()):
    """In a copy of the repository with the README's diff of that number: a run of six steps, and one that is stopped
    and continued with nothing but --resume=True, bit for bit -> what is printed, the checkpoint.
    """
    for pattern in ('*.py', 'extras/*.py'):
        for path in ROOT.glob(pattern):
            (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    name, diff = DIFFS[number]
    lines = diff.splitlines(keepends=True)
    old, new = (''.join(line[1:] for line in lines if line[0] in signs) for signs in (' -', ' +'))
    text = (folder / name).read_text()
    assert text.count(old) == 1, old
    (folder / name).write_text(text.replace(old, new))
    write_rows(folder / 'rows.jsonl', rows or toy_rows('train', 60, 0))
    commands = [f'prepare_shp {DATA}', before, f'{command} --out_dir=out/whole',
                f'{command} --out_dir=out/stopped --stop_step=2',
                f'{command.split()[0]} --out_dir=out/stopped --resume=True', after]
    done = subprocess.run([sys.executable, '-c', PROGRAM, *commands], cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0 and 'resumed at step 2 (exact)' in done.stdout, done.stdout
    states = [torch.load(folder / 'out' / name / 'ckpt_00000006.pt') for name in ('whole', 'stopped')]
    for a, b in zip(*(state['model'].values() for state in states)):
        assert torch.equal(a, b)
    return done.stdout, states[0]


def test_another_loss(tmp_path):
    printed, state = train_and_resume(tmp_path, 0, TRAIN, f'{TRAIN} --taylor_order=2',
                                      'sample --out_dir=out/whole --link=True --prompt=Hi?')
    assert 'taylor_order=2 has no effect on the loss lambda' in printed and 'its probabilities have no link' in printed
    for name in (state['fixed']['loss'], json.loads((tmp_path / 'out/whole/config.json').read_text())['loss']):
        assert name == 'lambda log_p: -torch.expm1(log_p) ** 2 * log_p'
    lines = [json.loads(line) for line in (tmp_path / 'out/whole/metrics.jsonl').read_text().splitlines()]
    assert not any('link' in key for line in lines for key in line)
    p = torch.tensor(-lines[1]['train_ce']).exp()  # of a model that is near uniform still
    q = 1 - p
    assert lines[1]['taylor_weight'] == pytest.approx((q ** 2 - 2 * q * p * p.log()).item(), rel=0.05)


def test_another_optimizer(tmp_path):
    _, state = train_and_resume(tmp_path, 1, TRAIN)
    assert state['fixed']['optimizers'] == ['Muon', 'AdamW'] and len(state['optimizers']) == 2
    assert 'momentum_buffer' in state['optimizers'][0]['state'][0]


def test_another_architecture_is_not_exported(tmp_path):
    pytest.importorskip('safetensors')
    printed, _ = train_and_resume(tmp_path, 2, TRAIN, after='sample --out_dir=out/whole --export_hf=hf')
    assert 'GPT-2 only' in printed and not (tmp_path / 'hf').exists()


def test_another_schema(tmp_path):
    rows = [dict(question=f'{i}?', replies=[dict(text=f'{k} {i}', votes=k) for k in range(3)]) for i in range(60)]
    printed, _ = train_and_resume(tmp_path, 3, TRAIN.replace('=80', '=8'), rows=rows)
    assert '60 read' in printed


def test_another_method(tmp_path):
    command = (f'preference {DATA} --method=extremes --init_from=out/start --max_new_tokens=30 --groups_per_step=4 '
               '--inner_epochs=2 --eval_samples=8 --max_iters=6 --eval_interval=3 --device=cpu')
    printed, state = train_and_resume(tmp_path, 4, command, f'{TRAIN} --out_dir=out/start', 'preference --help')
    assert 'extremes: model of' in printed and state['fixed']['method'] == 'extremes'
    assert 'extremes   The best answer' in printed
