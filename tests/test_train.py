"""train.py on small data: exact resume, ranks, accumulation, signals, refusals; evaluation by brute force."""
import copy
import json
import math
import re
import shlex
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch

import prepare_shp
import runs
import sample
import train
from configurator import Refusal, configure
from conftest import DATASET, assert_same_run, content, metrics, succeed, typed
from losses import taylor_link, token_log_prob
from model import GPT, GPTConfig
from runs import load_checkpoint

pytestmark = pytest.mark.usefixtures('work')
SMALL = dict(DATASET, n_layer=1, n_head=2, n_embd=16, block_size=32,
             batch_size=8, max_iters=12, eval_interval=4, log_interval=1, warmup_iters=2, device='cpu')


def config(out_dir, **changes):
    return train.Config(out_dir=str(out_dir), **{**SMALL, **changes})


def command(out_dir, *more, ranks=1, **changes):
    return typed('train.py', *more, ranks=ranks, **{**SMALL, **changes, 'out_dir': out_dir})


def test_files_metrics_and_the_first_loss(tmp_path, capsys):
    train.main(config(tmp_path / 'run', taylor_order=2))
    names = sorted(p.name for p in (tmp_path / 'run').iterdir())
    assert names == ['best.pt', 'ckpt_00000008.pt', 'ckpt_00000012.pt', 'config.json', 'loss.png', 'metrics.jsonl']
    lines = metrics(tmp_path / 'run', 'train')
    assert [line['step'] for line in lines] == list(range(1, 13))
    assert set(lines[0]) == {'event', 'step', 'tokens', 'train_loss', 'train_ce', 'grad_norm', 'taylor_weight', 'lr',
                             'skipped'}
    assert lines[-1]['tokens'] == 12 * 8 * 32
    evals = metrics(tmp_path / 'run', 'eval')
    assert [line['step'] for line in evals] == [0, 4, 8, 12]
    assert set(evals[0]) == {'event', 'step', 'tokens', 'val_ce', 'val_ce_link', 'val_accuracy', 'val_ece',
                             'val_ece_link', 'val_entropy_wrong', 'val_entropy_wrong_link', 'val_ce_t', 'val_t',
                             'val_ce_link_t', 'val_t_link'}
    assert abs(lines[0]['train_ce'] - math.log(257)) < 0.1 and abs(evals[0]['val_ce'] - math.log(257)) < 0.1
    assert evals[-1]['val_ce'] < evals[0]['val_ce'] - 0.1
    printed = capsys.readouterr().out
    assert 'log V = 5.549' in printed and 'step 12/12 100%' in printed and 'ETA 0:00:00' in printed
    saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert saved['taylor_order'] == 2 and saved['loss'] == 'taylor_loss(n=2)' and 'loss taylor_loss(n=2)' in printed
    assert load_checkpoint(tmp_path / 'run', 'best.pt')['step'] > 0
    command_of_sample = printed.partition('sample from it: python sample.py ')[2]
    sample.main(configure(sample.Config, shlex.split(command_of_sample)))  # it works as printed


@pytest.mark.parametrize('cut, stop, dtype', [('stream', 6, 'float32'), ('examples', 4, 'float32'),
                                              ('stream', 6, 'float16')])  # that is bfloat16 and a gradient scaler
def test_resume_is_bit_exact(tmp_path, cut, stop, dtype):
    """With dropout, accumulation and evaluations between, stopped off and at a checkpoint's step."""
    cfg = config(tmp_path / 'whole', cut=cut, dropout=0.2, micro_batch_size=3, taylor_order=1, tie_weights=False,
                 dtype=dtype)
    train.main(cfg)
    lines = metrics(tmp_path / 'whole', 'train')
    assert lines[-1]['train_ce'] < lines[0]['train_ce'] - 0.1
    stopped = replace(cfg, out_dir=str(tmp_path / 'stopped'))
    train.main(replace(stopped, stop_step=stop))
    assert load_checkpoint(stopped.out_dir)['step'] == stop
    train.main(replace(stopped, resume=True))
    assert_same_run(tmp_path / 'whole', tmp_path / 'stopped')


def test_resume_after_lines_and_checkpoints_beyond(tmp_path):
    """A kill between two checkpoints, with a half-written line and a damaged checkpoint left behind.

    A copy under a name of one's own is neither the latest checkpoint nor deleted with old ones.
    """
    cfg = config(tmp_path / 'whole', dropout=0.1)
    train.main(cfg)
    out = tmp_path / 'killed'
    train.main(replace(cfg, out_dir=str(out), stop_step=10))
    with open(out / 'metrics.jsonl', 'a') as f:
        f.write('{"event": "train", "step": 1')
    (out / 'ckpt_00000010.pt').rename(out / 'ckpt_good.pt')
    (out / 'ckpt_00000010.pt').write_bytes(b'PK')
    train.main(replace(cfg, out_dir=str(out), resume=True))
    assert_same_run(tmp_path / 'whole', out)
    assert [load_checkpoint(p)['step'] for p in sorted(out.glob('ckpt_*.pt'))] == [8, 12, 10]  # all good
    assert (out / 'ckpt_00000010.damaged').read_bytes() == b'PK'  # whoever could not read it once may look again


def test_two_ranks_equal_one_and_hand_over(tmp_path):
    """The same losses, evaluations and gradients with 2 gloo ranks, which take over from one process and hand back.

    Nor does accumulation change them, in documents of unequal length, so that a mean of means would differ.
    """
    options = dict(cut='examples', block_size=80, taylor_order=2, micro_batch_size=2, batch_size=7)
    train.main(config(tmp_path / 'one', **{**options, 'micro_batch_size': 0}))
    train.main(config(tmp_path / 'two', stop_step=2, **options))
    succeed(command(tmp_path / 'two', '--resume=True', '--stop_step=10', ranks=2, **options))
    train.main(config(tmp_path / 'two', resume=True, **options))
    for event in ('train', 'eval'):
        one, two = metrics(tmp_path / 'one', event), metrics(tmp_path / 'two', event)
        assert [line['step'] for line in one] == [line['step'] for line in two]
        for a, b in zip(one, two):
            assert a.keys() == b.keys() and a['tokens'] == b['tokens']
            for key in a.keys() - {'event'}:
                assert abs(a[key] - b[key]) < 1e-5 * max(1, abs(a[key])), key


def test_refusals_are_sentences_and_cost_nothing(tmp_path):
    out = tmp_path / 'run'
    train.main(config(out, max_iters=4))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for changes, words in ((dict(), 'is not empty; add --resume=True .* --overwrite=True'),
                           (dict(resume=True, n_embd=32), 'cannot resume: n_embd is 16 in the checkpoint, 32 here'),
                           (dict(resume=True, eval_split='test'), 'eval_split is val in the checkpoint, test here'),
                           (dict(resume=True, dataset='leaky', split='row'), 'cannot resume: data is'),
                           (dict(resume=True, taylor_order=1), 'loss is taylor_loss.n=0. in the .*n=1. here'),
                           (dict(resume=True, max_iters=3), 'at step 4, beyond max_iters=3'),
                           (dict(resume=True, max_iters=4, learning_rate=0.5), 'finished, and would be .* -> 0.5'),
                           (dict(overwrite=True, block_size=100_000), 'do not fill a window of block_size=100000'),
                           (dict(overwrite=True, block_size=8_000), 'but no document is longer than [0-9]+ tokens'),
                           (dict(overwrite=True, block_size=8_000, cut='examples'), 'no document is longer than')):
        with pytest.raises(Refusal, match=words):
            train.main(config(out, **changes))
    assert before == {p.name: p.read_bytes() for p in out.iterdir()}
    train.main(config(out, max_iters=2, overwrite=True))
    assert load_checkpoint(out)['step'] == 2 and not (out / 'ckpt_00000004.pt').exists()


def test_resume_tells_of_changed_options_and_source_files(tmp_path, capsys, monkeypatch):
    train.main(config(tmp_path / 'run', stop_step=2, resume=True))
    assert 'nothing to resume' in capsys.readouterr().out
    monkeypatch.setattr(runs, 'code', lambda code=runs.code: code() | {'losses.py': 'edited', 'model.py': 'edited'})
    train.main(config(tmp_path / 'run', stop_step=3, resume=True, learning_rate=1e-2, dtype='bfloat16'))
    found = re.search('resumed at step 2 .changed: (.*)[)]', capsys.readouterr().out)[1].split(', ')
    assert found == ['learning_rate 0.001 -> 0.01', 'dtype torch.float32 -> torch.bfloat16', 'losses.py', 'model.py']
    monkeypatch.undo()
    runs.load_weights(tmp_path / 'run', 'last')
    assert 'note: model.py has been edited since' in capsys.readouterr().out


def test_optimizers_hold_all_parameters_and_a_resume_needs_the_same_groups():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    make = partial(runs.Updates, modules=[model], cfg=train.Config(), machine=runs.setup('cpu'))
    with pytest.raises(Refusal, match='2 trained tensors are in no optimizer'):
        make([torch.optim.SGD(model[0].parameters())])
    state = make([torch.optim.SGD(model.parameters())]).state_dict()
    with pytest.raises(Refusal, match='groups its parameters differently'):
        make([torch.optim.SGD(runs.decay_groups([model], train.Config()))]).load_state_dict(state)
    model[1].requires_grad_(False)
    make([torch.optim.SGD(model[0].parameters())])


def test_a_resume_refuses_another_loss_of_the_same_name(tmp_path):
    def scaled(factor):
        return lambda log_p: -factor * log_p

    train.main(config(tmp_path / 'run', stop_step=2), scaled(1.0))
    with pytest.raises(Refusal, match='the loss at p = 0.9, 0.5, 0.1 is .* in the checkpoint'):
        train.main(config(tmp_path / 'run', resume=True), scaled(2.0))


def test_a_run_that_is_extended_keeps_its_last_evaluation(tmp_path, monkeypatch):
    losses = iter([5.3, 5.0, 4.0, 4.0, 4.5])  # the last evaluation is repeated, and stays the best
    monkeypatch.setattr(train, 'evaluate', lambda *_: dict(val_ce=next(losses)))
    train.main(config(tmp_path / 'run', max_iters=5, eval_interval=3))
    train.main(config(tmp_path / 'run', max_iters=6, eval_interval=3, resume=True))
    assert [line['step'] for line in metrics(tmp_path / 'run', 'eval')] == [0, 3, 5, 6]
    assert load_checkpoint(tmp_path / 'run', 'best.pt')['step'] == 5


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_non_finite_gradient_never_reaches_a_parameter(tmp_path, monkeypatch, capsys, bad):
    sound, broken, calls = train.linear_loss, (3, 4), []

    def linear_loss(*args):
        total, log_p = sound(*args)
        calls.append(1)
        return total * (bad if len(calls) in broken else 1.0), log_p

    monkeypatch.setattr(train, 'linear_loss', linear_loss)
    for resume in (False, True):
        train.main(config(tmp_path / 'run', grad_clip=0.0, resume=resume, stop_step=0 if resume else 6))
    assert capsys.readouterr().out.count('its update is skipped') == 2
    assert [line['skipped'] for line in metrics(tmp_path / 'run', 'train')] == [0, 0, 1, *[2] * 9]
    assert all(w.isfinite().all() for w in load_checkpoint(tmp_path / 'run')['model'].values())
    broken = range(99)
    with pytest.raises(Refusal, match='10 gradients in a row were not finite'):
        train.main(config(tmp_path / 'all', max_iters=50))
    assert all(w.isfinite().all() for w in load_checkpoint(tmp_path / 'all')['model'].values())


def test_epochs_count_documents(tmp_path):
    train.main(config(tmp_path / 'run', cut='examples', epochs=0.5))
    documents = len(prepare_shp.open_dataset(config(tmp_path)).documents('train').offsets) - 1
    assert load_checkpoint(tmp_path / 'run')['step'] == math.ceil(documents / 2 / 8)


def test_lr_schedule():
    cfg = train.Config(learning_rate=2.0, min_lr=0.2, warmup_iters=10, max_iters=110)
    factor = [runs.lr_factor(step, cfg) for step in range(120)]
    assert factor[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and factor[10] == 1.0
    assert factor[60] == pytest.approx(0.55) and factor[110] == factor[119] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factor[10:], factor[11:]))
    assert {runs.lr_factor(step, replace(cfg, min_lr=9.0)) for step in range(10, 100)} == {1.0}  # it never rises


@torch.no_grad()
@pytest.mark.parametrize('cut, dataset, split', [('stream', 'leaky', 'row'), ('examples', 'small', 'post')])
def test_evaluation_by_brute_force(cut, dataset, split):
    """Every validation text by itself, with all logits at once, in float64; temperatures by bisection."""
    cfg = config('unused', cut=cut, dataset=dataset, split=split, batch_size=3)
    data = prepare_shp.open_dataset(cfg)
    documents, halves = data.documents('val'), data.halves('val')
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, 32, 1, 2, 16))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with torch.enable_grad():
        for step in range(40):
            x, y = prepare_shp.lm_batch(data.documents('train'), cut, 32, 0, step, 16)
            (-token_log_prob(model.logits(model(x)), y).sum() / 512).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.transformer.ln_f.weight.data *= 3  # overconfident: there is a temperature to find
    machine = runs.setup('cpu')
    with runs.StopSignal() as stop:
        rows = range(prepare_shp.eval_length(documents, cut, 32))
        got = train.evaluate(model, documents, rows, cfg, machine, 2, stop, halves)
        of_p = train.evaluate(model, documents, rows, cfg, machine, 0, stop)
        assert of_p == {name: x for name, x in got.items() if '_link' not in name and not name.endswith('_t')}
        stop.caught = signal.SIGTERM
        assert train.evaluate(model, documents, rows, cfg, machine, 2, stop) is None
    assert model.training

    model.eval().double()
    tokens, offsets = torch.from_numpy(documents.tokens.astype('int64')), documents.offsets.tolist()
    if cut == 'stream':
        texts = [(first, min(first + 33, len(tokens))) for first in range(0, len(tokens) - 1, 32)]
    else:
        texts = [(a, min(a + 33, b)) for a, b in zip(offsets, offsets[1:])]
    document = torch.arange(len(halves)).repeat_interleave(torch.tensor(offsets).diff())
    log_p = torch.cat([model.logits(model(tokens[None, a:b - 1]))[0] for a, b in texts]).log_softmax(-1)
    targets = torch.cat([tokens[a + 1:b] for a, b in texts])
    document = torch.cat([document[a + 1:b] for a, b in texts])
    leaked, half = torch.from_numpy(documents.leaked[document]), torch.from_numpy(halves[document])
    expected = {}
    for name, log in (('', log_p), ('_link', taylor_link(log_p, 2))):
        ce = -log[torch.arange(len(targets)), targets]
        expected[f'val_ce{name}'] = ce.mean().item()
        confidence, right = log.exp().amax(-1), (log.argmax(-1) == targets).double()
        ece = 0.0
        for b in range(15):
            inside = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14))
            if inside.any():
                ece += inside.double().mean() * (confidence[inside].mean() - right[inside].mean()).abs()
        expected[f'val_ece{name}'] = float(ece)
        picked = [dict(z=log[half == side, :257], target=targets[half == side, None]) for side in (False, True)]
        scales = [scale_by_bisection(**part) for part in picked]
        at_t = [-(b * part['z']).log_softmax(-1).gather(1, part['target']) for b, part in zip(scales[::-1], picked)]
        expected[f'val_ce{name}_t'], expected[f'val_t{name}'] = torch.cat(at_t).mean().item(), math.prod(scales) ** -0.5
        assert expected[f'val_ce{name}'] - expected[f'val_ce{name}_t'] > 0.3
        expected[f'val_entropy_wrong{name}'] = -(log.exp() * log).nan_to_num(0.0).sum(-1)[right == 0].mean().item()
        if name == '':
            expected['val_accuracy'] = right.mean().item()
            if split == 'row':
                assert leaked.any() and not leaked.all()
                expected |= dict(val_ce_leaked=ce[leaked].mean().item(), val_ce_clean=ce[~leaked].mean().item())
    of_t = {name: (got.pop(name), expected.pop(name)) for name in list(expected) if '_t' in name}
    assert got == pytest.approx(expected, rel=1e-5)
    for name, (ours, exact) in of_t.items():
        assert abs(ours - exact) < (1e-4 if 'ce' in name else 0.01 * exact), name


def scale_by_bisection(z, target):
    """b that minimises the mean cross-entropy of softmax(b z): its derivative E[z] - z_target grows with b."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        b = math.sqrt(low * high)
        slope = ((b * z).softmax(-1) * z).sum(-1) - z.gather(1, target)[:, 0]
        low, high = (b, high) if slope.mean() < 0 else (low, b)
    return b


@pytest.mark.parametrize('split, kept', [('val', 4), ('test', 12)])
def test_the_test_split_chooses_nothing(split, kept, tmp_path, monkeypatch, capsys):
    """best.pt is the run's lowest of val, but neither its start nor a NaN, and of test merely its latest."""
    losses = iter([5.3, 5.4, math.nan, 5.5])
    monkeypatch.setattr(train, 'evaluate', lambda *_: dict(val_ce=next(losses)))
    train.main(config(tmp_path / 'run', eval_split=split))
    assert load_checkpoint(tmp_path / 'run', 'best.pt')['step'] == kept
    assert 'warning: the loss is not finite' in capsys.readouterr().out


def test_probes_change_nothing_and_stand_beside_the_evaluations(tmp_path):
    cfg = config(tmp_path / 'plain', dropout=0.1)
    train.main(cfg)
    train.main(replace(cfg, out_dir=str(tmp_path / 'probed'), probe_interval=3, stop_step=6))
    train.main(replace(cfg, out_dir=str(tmp_path / 'probed'), probe_interval=3, resume=True))
    assert_same_run(tmp_path / 'plain', tmp_path / 'probed')
    assert [line['step'] for line in metrics(tmp_path / 'probed', 'probe')] == [0, 3, 6, 9, 12]


def test_metrics_elsewhere(tmp_path, monkeypatch):
    """wandb and tensorboard, by what they are told; both go on after a resume, without an account offline."""
    monkeypatch.delenv('WANDB_MODE', raising=False)
    wandb, tensorboard = MagicMock(login=lambda prompt: prompt), MagicMock()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', tensorboard)
    cfg = config(tmp_path / 'run', wandb=True, tensorboard=True)
    train.main(replace(cfg, stop_step=6))
    train.main(replace(cfg, resume=True))
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first['id'] == second['id'] and first['mode'] == second['mode'] == 'offline'
    lines = [call.args[0] for call in wandb.init().log.call_args_list]
    assert [line['step'] for line in lines if 'train/train_ce' in line] == list(range(1, 13))
    folder, writer = tmp_path / 'run' / 'tensorboard', tensorboard.SummaryWriter
    assert writer.call_args_list == [call(folder, purge_step=1), call(folder, purge_step=7)]
    points = [point.args for point in writer().add_scalar.call_args_list]
    assert [point for point in points if point[0] == 'eval/val_ce'] == [
        ('eval/val_ce', line['val_ce'], line['step']) for line in metrics(tmp_path / 'run', 'eval')]


def test_training_needs_no_vocabulary(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_shp, 'encoding', MagicMock(side_effect=Refusal('no vocabulary')))
    train.main(config(tmp_path / 'run', max_iters=1))
    assert '--temperature=0.5 --prompt=QUESTION\n' in capsys.readouterr().out


def test_a_run_names_its_data_truly(tmp_path):
    """As they were made, whether or not the command says it."""
    for n, source in enumerate(('hub', 'rows', str(Path('rows').resolve()))):  # hub is the default: not named
        train.main(config(tmp_path / f'{n}', source=source, max_iters=1))
        assert json.loads((tmp_path / f'{n}' / 'config.json').read_text())['source'] == 'rows'


def test_a_step_skipped_by_the_optimizer_itself(tmp_path, capsys):
    """As on CUDA, where the host reads a norm one step later: nothing moves, and the counts come later."""
    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weight.parameters(), fused=True)
    updates = runs.Updates([optimizer], [weight], config(tmp_path, warmup_iters=0), runs.setup('cpu'))
    updates.ahead = True
    seen, states = [], []
    for step, scale in enumerate((1.0, math.nan, 2.0, math.inf, 3.0), 1):
        updates.backward((weight(torch.ones(2)) * scale).sum())
        updates.clip_and_step(step, None)
        states.append(copy.deepcopy((weight.state_dict(), optimizer.state_dict()['state'])))
        seen.append(updates.skipped)
    assert seen == [0, 0, 1, 1, 2] and updates.read_norms() == pytest.approx(3 * 6 ** 0.5)
    assert content(states[0]) == content(states[1]) != content(states[2]) == content(states[3]) != content(states[4])
    for step in range(6, 16):
        updates.backward((weight(torch.ones(2)) * math.nan).sum())
        updates.clip_and_step(step, None)
    saved = []
    with pytest.raises(Refusal, match='10 gradients in a row were not finite, up to step 16'):
        updates.backward((weight(torch.ones(2))).sum())
        updates.clip_and_step(16, lambda: saved.append(updates.state_dict()))
    assert saved[0]['skipped'] == 12 and content(saved[0]['optimizers'][0]['state']) == content(states[4][1])
    assert capsys.readouterr().out.count('its update is skipped') == 12
