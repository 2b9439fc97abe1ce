"""Nothing silent: what would lead to a number that means something else is refused, or a line of the run says it."""
import re
import shlex
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

import configurator
import evaluate
import prepare_shp
import preference
import runs
import sample
import train
from answers import ROW_TOKENS, make_batch, micro_batches, pack, select
from configurator import Refusal, configure
from conftest import DATASET, metrics, write_rows
from model import sample_token
from runs import load_run
from test_preference import a_run, as_data, config

pytestmark = pytest.mark.usefixtures('work')
TRAIN = dict(DATASET, device='cpu', n_layer=1, n_embd=32, block_size=80, cut='examples', batch_size=4, max_iters=10,
             warmup_iters=1, eval_interval=5, log_interval=2)


@pytest.mark.parametrize('temperature', [0, 1e-38, 1e-300, 1e-9, 1e-3])
def test_a_cold_sample_is_the_likeliest_token(temperature):
    assert sample_token(torch.tensor([[-5.0, 3.0, 90.0]]), torch.tensor([0.5]), temperature).tolist() == [2]


@pytest.mark.parametrize('script, argv, words', [
    (preference, ['--beta=0'], 'beta=0 makes all scores of method=dpo equal'),
    (preference, ['--sft_order=2'], 'sft_order has no effect without sft_weight'),
    (preference, ['--method=spin', '--league=ordered'], 'league has no effect without two or more opponents'),
    (preference, ['--method=ppo', '--monotone=False'], 'monotone has no effect without moment_order=3'),
    (preference, ['--resume=True', '--out_dir=nowhere'], 'there is no run to resume in nowhere'),
    (train, ['--epochs=2', '--max_iters=9'], 'max_iters has no effect with epochs=2.0')])
def test_options_without_effect_are_refused(capsys, script, argv, words):
    with pytest.raises(SystemExit):
        configure(script.Config, argv)
    assert words in capsys.readouterr().err
    assert configure(train.Config, ['--epochs=0', '--max_iters=9']).max_iters == 9
    assert configure(preference.Config, ['--method=ppo', '--beta=0']).beta == 0  # no KL to the start is a choice
    assert configure(preference.Config, ['--sft_order=2', '--sft_weight=1']).sft_order == 2


def test_notes_say_what_options_mean(tmp_path, capsys):
    train.main(train.Config(**dict(TRAIN, max_iters=1), eval_split='train', learning_rate=1e-5,
                            out_dir=str(tmp_path / 'a')))
    out = capsys.readouterr().out
    assert 'note: evaluations, val_ce and best.pt use the train split' in out
    assert 'note: learning_rate=1e-05 stays constant' in out
    assert 'note: the whole run (1 steps) is warm-up' in out and '\nstep 1/1 ' in out
    preference.main(config(tmp_path / 'b', iterations=1, inner_epochs=1, max_iters=3, eval_samples=0, eval_groups=2))
    assert 'note: max_iters=3 is more than the 2 updates of all iterations' in capsys.readouterr().out


def test_one_long_ranking_does_not_split_the_others_apart():
    group = prepare_shp.Group(0, '', [1] * 5, [[2] * 9, [3]])
    batch = make_batch([group] * 99 + [group._replace(answers=[[a] * 400 for a in range(40)])])
    machine = SimpleNamespace(rank=0, world_size=1, device=torch.device('cpu'))
    lab = SimpleNamespace(cfg=SimpleNamespace(micro_groups=0), machine=machine)
    assert [len(rows) for rows in micro_batches(lab, batch)] == [99, 1]
    assert sum(x.numel() for x in batch.values()) < 30_000  # tokens, and (prompts, answers) numbers
    assert pack(select(batch, torch.tensor([99]))).mask.numel() < 17_000 * ROW_TOKENS * 1.2


def test_selfplay_counts_the_answers_that_it_cuts(tmp_path, capsys):
    lab, _ = a_run(tmp_path, 'spin')
    lab.groups['train'] = as_data(([1], [[2] * 21, [3]]), ([1], [[2] * 20, [3] * 30]))
    preference.SPIN(lab)
    assert 'note: 1 of 2 best answers are cut after max_new_tokens=20 tokens' in capsys.readouterr().out


def test_commands_that_make_data_work_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / 'my rows.jsonl', [dict(prompt=f'{i}?', responses=['yes', 'no']) for i in range(9)])
    asked = prepare_shp.Config(dataset='mine')
    prepare_shp.prepare(replace(asked, source=str(file), encoding='bytes'))
    (tmp_path / 'data/mine/train.bin').write_bytes(b'??')
    for cfg in (asked, replace(asked, max_rows=3)):  # damaged; then made with other options
        with pytest.raises(Refusal) as refusal:
            prepare_shp.open_dataset(cfg)
        _, script, *argv = shlex.split(re.search('make it again with: (.*)', str(refusal.value))[1])
        assert script == 'prepare_shp.py'
        prepare_shp.prepare(configure(prepare_shp.Config, argv))
        assert prepare_shp.open_dataset(cfg).meta['encoding'] == 'bytes'


def test_commands_that_make_runs_work_as_printed(monkeypatch, capsys):
    def command(act):
        with pytest.raises(Refusal) as refusal:
            act()
        _, script, *argv = shlex.split(re.search('make one with: ([^,]*)', str(refusal.value))[1])
        monkeypatch.setattr(configurator, 'SCRIPT', script)
        return configure(dict([('train.py', train.Config), ('preference.py', preference.Config)])[script], argv)

    cfg, encoding = config('run', 'ppo', reward_model='rm'), prepare_shp.encoding('bytes')
    made = command(lambda: load_run(cfg, 'reward_model', encoding))
    assert (made.method, made.init_from, made.max_new_tokens) == ('reward', 'start', cfg.max_new_tokens)
    monkeypatch.chdir(configurator.HERE)
    cfg = config('run', 'dpo', init_from='out/none/toy_dpo')
    assert command(lambda: load_run(cfg, 'init_from', encoding)).method == 'dpo'
    assert command(lambda: sample.main(sample.Config(out_dir='out/none/toy_t1', prompt='?'))).taylor_order == 1


def test_eta_counts_steps_collections_and_evaluations(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

    def slow(place, name, seconds):
        act = getattr(place, name)

        def wrapped(*args, **kwargs):
            clock.now += seconds
            return act(*args, **kwargs)
        monkeypatch.setattr(place, name, wrapped)

    monkeypatch.setattr(runs, 'time', clock)
    slow(prepare_shp, 'lm_batch', 1)
    slow(train, 'evaluate', 100)
    slow(preference, 'accumulate', 1)
    slow(evaluate.Evaluation, '__call__', 100)
    slow(preference.DPO, 'collect', 40)

    def etas():
        found = re.findall(r'step (\d+)/.*ETA (\d+):(\d+):(\d+)', capsys.readouterr().out)
        return {int(step): timedelta(hours=int(h), minutes=int(m), seconds=int(s)).seconds for step, h, m, s in found}

    train.main(train.Config(**TRAIN, out_dir=str(tmp_path / 'a')))
    assert etas() == {1: 209, 2: 208, 4: 206, 6: 104, 8: 102, 10: 100}
    assert [line['step'] for line in metrics(tmp_path / 'a', 'train')] == [1, 2, 4, 6, 8, 10]
    preference.main(config(tmp_path / 'b', eval_interval=5))  # 3 iterations of 4 updates
    assert etas() == {1: 391, 2: 390, 3: 389, 4: 388, 5: 347, 6: 246, 7: 245, 8: 244, 9: 203, 10: 202, 11: 101, 12: 100}
