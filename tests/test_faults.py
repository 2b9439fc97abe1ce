"""Real faults in real processes: killed, stopped, hung, orphaned and crowded runs; full disks; broken pipes.

Every run that is cut short goes on with --resume=True and must end bit for bit like the run that was left alone. How
many kills the soak makes, of each kind of run: NANOTAYLOR_KILLS, 100 unless set.
"""
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
import plot
import prepare_shp
import preference
import sample
import test_preference
import test_train
import runs
import train
from configurator import Refusal
from runs import load_checkpoint
from toy_shp import toy_rows

ROOT = Path(__file__).parent.parent
LIMIT = 300  # seconds, for what would hang
SOAK = int(os.environ.get('NANOTAYLOR_KILLS', 100))
KINDS = 'train', *test_preference.METHODS
folder = test_preference.folder  # a working directory with data, a start, a teacher and a reward model
TRAIN = dict(max_iters=40, eval_interval=6, dropout=0.1, micro_batch_size=3)
PREFERENCE = dict(iterations=3, eval_interval=3)


@pytest.fixture(autouse=True)
def work(folder, monkeypatch):
    monkeypatch.chdir(folder)


def config(kind, out_dir, **changes):
    if kind == 'train':
        return test_train.config(out_dir, **{**TRAIN, **changes})
    return test_preference.config(out_dir, kind, **{**PREFERENCE, **changes})


def assert_same_run(kind, a, b):
    (test_train if kind == 'train' else test_preference).assert_same_run(a, b)
    for sub in ('', 'iterations', 'selves'):
        names = [{p.name for p in (out / sub).glob('*')} for out in (a, b)]
        # a stop saves one more checkpoint, and which iterations and past selves are still kept depends on those
        assert {name for name in names[0] ^ names[1] if not name.startswith('ckpt_') and not (
            sub and name.endswith('.pt'))} == set()
    best = [load_checkpoint(out, 'best.pt') for out in (a, b)]
    assert best[0]['step'] == best[1]['step']
    for part in {'model', 'reward_model', 'critic'} & set(best[0]):
        assert all(torch.equal(w, best[1][part][name]) for name, w in best[0][part].items())


# Killed at any moment -----------------------------------------------------------------------------------------------


def whole_run(folder, kind, cfg, log):
    os.chdir(folder)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    (train if kind == 'train' else preference).main(cfg)


@pytest.fixture(scope='module')
def processes():
    """Processes that begin where torch is already imported: a killed one costs no seconds."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['preference'])
    first = context.Process(target=os.getpid)  # waits for the import
    first.start()
    first.join()
    return context


@pytest.mark.parametrize('kind, kills', [*((kind, 2) for kind in ('train', 'spin', 'ppo')), *(
    pytest.param(kind, SOAK, marks=pytest.mark.soak) for kind in KINDS)])
def test_kill_9_at_random_moments(tmp_path, folder, processes, kind, kills):
    """Start-up, collections, generation, updates, evaluations, saves: a kill may fall into any."""
    def start(cfg):
        process = processes.Process(target=whole_run, args=(folder, kind, cfg, tmp_path / 'log'))
        process.start()
        return process

    whole, killed = config(kind, tmp_path / 'whole'), config(kind, tmp_path / 'killed', resume=True)
    began = time.perf_counter()
    process = start(whole)
    process.join(LIMIT)
    assert process.exitcode == 0, (tmp_path / 'log').read_text()
    length, rng, hits, ends = time.perf_counter() - began, random.Random(f'{kind} {kills}'), 0, 0
    while hits < kills:
        process = start(killed)
        process.join(rng.uniform(0, length))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / 'log').read_text()[-3000:]
        hits += process.exitcode != 0
        if process.exitcode == 0 and hits < kills:  # it reached its end: compared, and begun anew
            assert_same_run(kind, tmp_path / 'whole', tmp_path / 'killed')
            (tmp_path / 'killed').rename(tmp_path / f'ended{ends}')
            ends += 1
        elif list((tmp_path / 'killed').glob('ckpt_*.pt')):
            load_checkpoint(tmp_path / 'killed')
    process = start(killed)
    process.join(LIMIT)
    assert process.exitcode == 0, (tmp_path / 'log').read_text()[-3000:]
    assert_same_run(kind, tmp_path / 'whole', tmp_path / 'killed')
    print(f'{kind}: {hits} kills, {ends + 1} runs brought to their end')


def one_prepare(folder, cfg):
    os.chdir(folder)
    prepare_shp.prepare(cfg)


@pytest.mark.parametrize('kills', [2, pytest.param(SOAK, marks=pytest.mark.soak)])
def test_a_killed_prepare_leaves_all_or_nothing(tmp_path, processes, monkeypatch, kills):
    """Under a new name nothing, or the whole; a kill while it replaces a dataset may leave no dataset, but no mixture.
    """
    monkeypatch.chdir(tmp_path)
    for name, count in (('old', 200), ('new', 300)):
        Path(f'{name}.jsonl').write_text('\n'.join(json.dumps(row) for row in toy_rows('train', count, 0)))
    old, new = (prepare_shp.Config(dataset='d', source=f'{name}.jsonl', encoding='bytes', workers=1, overwrite=True)
                for name in ('old', 'new'))
    began = time.perf_counter()
    sound = [prepare_shp.prepare(cfg)['sha256'] for cfg in (old, new)]
    length, rng, hits = time.perf_counter() - began, random.Random(kills), 0
    while hits < kills:
        process = processes.Process(target=one_prepare, args=(tmp_path, rng.choice([old, new])))
        process.start()
        process.join(rng.uniform(0, length))
        process.kill()
        process.join()
        hits += process.exitcode != 0
        if Path('data/d').exists():
            assert prepare_shp.open_dataset(replace(old, overwrite=False, source='hub')).meta['sha256'] in sound
    assert prepare_shp.prepare(old)['sha256'] == sound[0] and os.listdir('data') == ['d']
    print(f'prepare: {hits} kills')


# Ranks --------------------------------------------------------------------------------------------------------------


def in_suite(chosen):
    """Every kind of run, all but the chosen one in the soak only."""
    return [chosen, *(pytest.param(kind, marks=pytest.mark.soak) for kind in KINDS if kind != chosen)]


def endless(kind):
    return dict(max_iters=100_000, eval_interval=50_000) if kind == 'train' else dict(
        iterations=10_000, eval_interval=50_000)


class Ranks:
    """torchrun with two ranks that say their process numbers, and a fault in Python among them."""

    def __init__(self, tmp_path, kind, fault='', restarts=0, **changes):
        script, self.pids, self.output = tmp_path / 'ranks.py', {}, []
        script.write_text(f'import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n'
                          'import configurator, preference, runs, train\nrank = int(os.environ["RANK"])\n'
                          # in one write, or the lines of two ranks could mix
                          'os.write(1, f"rank {rank} is process {os.getpid()}\\n".encode())\n' + fault +
                          f'\nm = {"train" if kind == "train" else "preference"}\nconfigurator.run(m.main, m.Config)\n')
        source = test_train.command if kind == 'train' else test_preference.command
        method = [] if kind == 'train' else [kind]
        options = source(tmp_path / 'run', *method, '--resume=True',
                         **{**(TRAIN if kind == 'train' else PREFERENCE), **changes})[2:]
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
             f'--max-restarts={restarts}', '--monitor-interval=0.1', str(script), *options], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.limit = threading.Timer(LIMIT, self.kill)
        self.limit.start()

    def until(self, words):
        """Reads what they say, up to a line that begins with `words`."""
        for line in self.process.stdout:
            self.output.append(line)
            for rank, pid in re.findall(r'rank (\d) is process (\d+)', line):
                self.pids[int(rank)] = int(pid)
            if words and line.startswith(words):
                return
        assert not words, self.said()

    def end(self):
        """-> torchrun's exit code, when it and both ranks are gone: all of them held the pipe."""
        self.until(None)
        return self.process.wait()

    def said(self):
        return ''.join(self.output)

    def kill(self):
        for pid in (self.process.pid, *self.pids.values()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.limit.cancel()
        if self.process.poll() is None:
            self.kill()
        self.process.stdout.close()


def at_step(step, rank, action):
    """A fault: `action` on a rank where the update after `step` steps begins; once, whatever restarts."""
    return ('sound = runs.lr_at\n'
            'def lr_at(step, cfg):\n'
            f'    if rank == {rank} and step == {step} and not os.path.exists(f"{{cfg.out_dir}}.{step}"):\n'
            f'        open(f"{{cfg.out_dir}}.{step}", "w").close()\n'
            f'        {action}\n'
            '    return sound(step, cfg)\n'
            'runs.lr_at = lr_at\n')


def finish_and_compare(tmp_path, kind, **changes):
    """The run goes on with two ranks, and ends like one that was left alone."""
    with Ranks(tmp_path, kind, **changes) as ranks:
        assert ranks.end() == 0, ranks.said()
    (tmp_path / 'alone').mkdir()
    with Ranks(tmp_path / 'alone', kind, **changes) as ranks:
        assert ranks.end() == 0, ranks.said()
    assert_same_run(kind, tmp_path / 'alone' / 'run', tmp_path / 'run')


@pytest.mark.parametrize('kind', in_suite('spin'))
def test_a_rank_killed_ends_the_run_and_nothing_is_lost(tmp_path, kind):
    step = 8 if kind == 'train' else 4
    with Ranks(tmp_path, kind, at_step(step, 1, 'os.kill(os.getpid(), signal.SIGKILL)')) as ranks:
        assert ranks.end() != 0
    assert 'another rank has ended' in ranks.said()
    assert ranks.said().count('Traceback') == 1, ranks.said()  # torchrun's own
    assert load_checkpoint(tmp_path / 'run')['step'] == step // 3 * 3
    finish_and_compare(tmp_path, kind)


@pytest.mark.parametrize('kind', in_suite('train'))
def test_restarts_of_torchrun_bring_a_killed_run_to_its_end(tmp_path, kind):
    first, second = (5, 9) if kind == 'train' else (2, 4)
    fault = at_step(first, 0, 'os.kill(os.getpid(), signal.SIGKILL)') + at_step(
        second, 1, 'os.kill(os.getpid(), signal.SIGKILL)').replace('sound', 'other')
    with Ranks(tmp_path, kind, fault, restarts=2) as ranks:
        assert ranks.end() == 0, ranks.said()
    assert ranks.said().count('rank 0 is process') == 3
    finish_and_compare(tmp_path, kind)  # has nothing left to do


def test_an_exception_on_one_rank_ends_both(tmp_path):
    with Ranks(tmp_path, 'train', at_step(8, 1, 'raise MemoryError("no more of it")')) as ranks:
        assert ranks.end() != 0 and 'no more of it' in ranks.said()
    assert load_checkpoint(tmp_path / 'run')['step'] == 6


def test_a_rank_that_hangs_is_not_waited_for_for_ever(tmp_path):
    with Ranks(tmp_path, 'train', 'runs.RANK_TIMEOUT = 6\n' + at_step(8, 1, 'time.sleep(12)')) as ranks:
        assert ranks.end() != 0, ranks.said()
    assert load_checkpoint(tmp_path / 'run')['step'] == 6


@pytest.mark.parametrize('kind', in_suite('train'))
def test_ranks_whose_torchrun_was_killed_save_and_end(tmp_path, kind):
    with Ranks(tmp_path, kind, **endless(kind)) as ranks:
        ranks.until('step 20/')
        ranks.process.kill()
        ranks.end()
    step = load_checkpoint(tmp_path / 'run')['step']
    assert step >= 20
    finish_and_compare(tmp_path, kind, **endless(kind), stop_step=step + 2)


def test_sigterm_to_one_rank_stops_both_at_one_step(tmp_path):
    with Ranks(tmp_path, 'train', **endless('train')) as ranks:
        ranks.until('step 20/')
        os.kill(ranks.pids[1], signal.SIGTERM)
        assert ranks.end() != 0
    step = load_checkpoint(tmp_path / 'run')['step']
    assert f'stopped after step {step}, saved' in ranks.said()


@pytest.mark.parametrize('kind', in_suite('spin'))
def test_ctrl_c_twice_at_torchrun(tmp_path, kind):
    """A terminal sends it to torchrun and to its ranks; torchrun passes its own on as well."""
    with Ranks(tmp_path, kind, **endless(kind)) as ranks:
        ranks.until('step 20/')
        for pid in (*ranks.pids.values(), ranks.process.pid):
            os.kill(pid, signal.SIGINT)
        os.kill(ranks.pids[0], signal.SIGINT)
        assert ranks.end() != 0
    step = load_checkpoint(tmp_path / 'run')['step']
    assert step >= 20 and f'stopped after step {step}, saved' in ranks.said()


@pytest.mark.parametrize('kind, name, bad', [
    ('train', 'linear_taylor_loss', 'nan'), ('dpo', 'plackett_luce_loss', 'inf'), ('ppo', 'ppo_value_loss', 'nan')])
def test_a_nan_or_inf_on_one_rank_reaches_no_parameter_of_any(tmp_path, kind, name, bad):
    module = 'train' if kind == 'train' else 'preference'
    fault = (f'sound, calls = {module}.{name}, []\n'
             'def broken(*args):\n'
             '    result = sound(*args)\n'
             '    calls.append(1)\n'
             '    if rank == 0 or len(calls) not in (3, 4):\n'
             '        return result\n'
             f'    return result._replace(loss=result.loss * float("{bad}")) if hasattr(result, "loss") else '
             f'result * float("{bad}")\n'
             f'{module}.{name} = broken\n')
    micro = dict(micro_batch_size=0) if kind == 'train' else dict(micro_groups=0)
    with Ranks(tmp_path, kind, fault, stop_step=6, **micro) as ranks:
        assert ranks.end() == 0, ranks.said()
    assert 'its update is skipped' in ranks.said()
    assert test_train.metrics(tmp_path / 'run', 'train')[-1]['skipped'] >= 1
    state = load_checkpoint(tmp_path / 'run')
    assert all(w.isfinite().all() for part in {'model', 'critic'} & set(state) for w in state[part].values())


def test_a_nan_for_ever_on_one_rank_ends_both_with_what_was_sound(tmp_path):
    fault = ('sound = preference.plackett_luce_loss\n'
             'preference.plackett_luce_loss = lambda *args: sound(*args) * (float("nan") if rank else 1.0)\n')
    with Ranks(tmp_path, 'dpo', fault, iterations=10) as ranks:
        assert ranks.end() == 1 and '10 gradients in a row were not finite' in ranks.said()
    state = load_checkpoint(tmp_path / 'run')
    assert state['skipped'] == 10 and all(w.isfinite().all() for w in state['model'].values())


def test_ranks_must_find_the_same_checkpoint(tmp_path):
    train.main(config('train', tmp_path / 'run', stop_step=12))
    fault = ('import pathlib\nsound = runs.load_checkpoint\n'
             'def other(out):\n'
             '    return sound(sorted(pathlib.Path(out).glob("ckpt_*.pt"))[-1 - rank])\n'
             'runs.load_checkpoint = other\n')
    before = {p: p.read_bytes() for p in (tmp_path / 'run').iterdir()}
    with Ranks(tmp_path, 'train', fault) as ranks:
        assert ranks.end() != 0 and 'the ranks do not find the same checkpoint' in ranks.said()
    assert before == {p: p.read_bytes() for p in (tmp_path / 'run').iterdir()}


# Signals, terminals, folders ----------------------------------------------------------------------------------------


def running(tmp_path, step, **options):
    """A run in a process of its own, which has just said that it reached `step`."""
    process = subprocess.Popen(test_train.command(tmp_path / 'run', max_iters=4000, eval_interval=2000, dropout=0.1),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    for line in process.stdout:
        if line.startswith(f'step {step}/'):
            return process
    raise AssertionError('it ended early')


def test_a_closed_terminal_stops_the_run_and_nohup_does_not(tmp_path):
    process = running(tmp_path, 20)
    process.send_signal(signal.SIGHUP)
    assert 'stopped after step' in process.communicate()[0] and process.returncode == 129
    assert load_checkpoint(tmp_path / 'run')['step'] >= 20
    (tmp_path / 'run').rename(tmp_path / 'first')
    process = running(tmp_path, 20, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    for line in process.stdout:  # 300 more steps are more than the pipe held
        if line.startswith('step 400/'):
            break
    process.terminate()
    assert 'stopped after step' in process.communicate()[0] and process.returncode == 143


def test_a_run_that_nobody_listens_to_any_more_is_saved(tmp_path):
    process = running(tmp_path, 20)
    process.stdout.close()  # as tee or head would
    assert process.wait(60) == 129
    assert load_checkpoint(tmp_path / 'run')['step'] >= 20


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_during_a_save(tmp_path, monkeypatch, number, code):
    """Before the file is renamed and after: the save ends as if nothing had come, then the run."""
    cfg = config('train', tmp_path / 'whole')
    train.main(cfg)
    replace_file = os.replace

    def interrupted(source, target):
        if str(target).endswith('ckpt_00000012.pt'):
            os.kill(os.getpid(), number)
            replace_file(source, target)
            os.kill(os.getpid(), number)
        else:
            replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', interrupted)
        with pytest.raises(SystemExit) as end:
            train.main(replace(cfg, out_dir=str(tmp_path / 'cut')))
    assert end.value.code == code and load_checkpoint(tmp_path / 'cut')['step'] == 12
    train.main(replace(cfg, out_dir=str(tmp_path / 'cut'), resume=True))
    assert_same_run('train', tmp_path / 'whole', tmp_path / 'cut')


def test_one_folder_is_for_one_run(tmp_path, monkeypatch):
    """Two runs in one folder would mix their lines and delete each other's checkpoints."""
    monkeypatch.setattr(runs, 'LOCK_TIMEOUT', 0.3)
    process = running(tmp_path, 5)
    for changes in (dict(resume=True), dict(overwrite=True), {}):
        with pytest.raises(Refusal, match='run is in use by another run; wait for its end'):
            train.main(test_train.config(tmp_path / 'run', **changes))
    process.terminate()
    assert 'stopped after step' in process.communicate()[0] and process.returncode == 143
    with pytest.raises(Refusal, match='is not empty'):
        train.main(test_train.config(tmp_path / 'run'))


@pytest.mark.parametrize('kind', ['train', 'spin'])
def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(tmp_path, capsys, kind):
    (tmp_path / 'file').touch()
    with pytest.raises(Refusal, match='out_dir=.*file/run cannot be made a folder'):
        (train if kind == 'train' else preference).main(config(kind, tmp_path / 'file' / 'run'))
    assert 'evaluation' not in capsys.readouterr().out


def test_checkpoints_that_are_gone(tmp_path):
    """best.pt is no checkpoint to go on from, and what it is worth must not be overwritten by a run from step 0."""
    cfg = config('train', tmp_path / 'run', max_iters=12)
    train.main(cfg)
    best = (tmp_path / 'run' / 'best.pt').read_bytes()
    for path in (tmp_path / 'run').glob('ckpt_*'):
        path.unlink()
    with pytest.raises(Refusal, match='has lost its checkpoints, though it was evaluated at step 12'):
        train.main(replace(cfg, resume=True))
    assert (tmp_path / 'run' / 'best.pt').read_bytes() == best
    (tmp_path / 'run' / 'best.pt').unlink()  # metrics.jsonl tells as well
    with pytest.raises(Refusal, match='has lost its checkpoints, though it was evaluated at step 12'):
        train.main(replace(cfg, resume=True))
    (tmp_path / 'run' / 'metrics.jsonl').unlink()  # nothing is left that could be lost
    train.main(replace(cfg, resume=True))


def test_lost_lines_of_the_log_are_told(tmp_path, capsys):
    cfg = config('train', tmp_path / 'run', max_iters=12)
    train.main(replace(cfg, stop_step=10))
    path = tmp_path / 'run' / 'metrics.jsonl'
    whole = path.read_text()
    for text, words in ((whole, ''), (whole[:len(whole) // 8], 'metrics.jsonl ends at step '),
                        ('', 'metrics.jsonl has no line left, though this run goes on at step 10')):
        path.write_text(text)
        capsys.readouterr()
        train.main(replace(cfg, resume=True, stop_step=10))
        said = capsys.readouterr().out
        assert words in said and ('a part of the curve is lost' in said) == bool(words)


@pytest.mark.parametrize('kind', ['train', 'spin'])
def test_overwrite_deletes_the_run_and_nothing_else(tmp_path, kind):
    main = (train if kind == 'train' else preference).main
    main(config(kind, tmp_path / 'run', stop_step=6))
    for name in ('iterations', 'selves', ''):
        (tmp_path / 'run' / name).mkdir(exist_ok=True)
        (tmp_path / 'run' / name / 'notes.txt').write_text('mine')
    main(config(kind, tmp_path / 'run', stop_step=3, overwrite=True))
    assert all((tmp_path / 'run' / name / 'notes.txt').exists() for name in ('iterations', 'selves', ''))
    assert load_checkpoint(tmp_path / 'run')['step'] == 3


def test_a_folder_that_holds_no_run_is_not_touched(tmp_path):
    files = {name: 'mine' for name in ('best.pt', 'loss.png', 'thesis.txt')} | {'config.json': '{"model_type": "bert"}'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(Refusal, match='holds no run, so nothing in it is touched'):
            train.main(config('train', tmp_path, overwrite=overwrite))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_read_only_folder_is_told_before_the_first_step(tmp_path, folder, monkeypatch, capsys):
    """As a user who may read the data and not write; root, who may do anything, becomes nobody meanwhile."""
    readonly = folder / 'readonly'
    readonly.mkdir(exist_ok=True)
    root = os.geteuid() == 0
    for path in (folder, readonly):
        path.chmod(0o755 if root else 0o555)
    try:
        if root:
            os.seteuid(65534)
        for name in ('readonly', 'readonly/run'):
            with pytest.raises(Refusal, match=f'{name}.*(cannot be made a folder|could not be written).*Permission'):
                train.main(config('train', name))
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, readonly):
            path.chmod(0o755)
    assert 'evaluation' not in capsys.readouterr().out and not list(readonly.iterdir())


def test_nothing_asks_the_network(tmp_path, monkeypatch):
    """The toy data, a training run, a preference run, samples and a picture, first use included."""
    def call(*_, **__):
        raise AssertionError('the network was asked')

    for name in ('connect', 'connect_ex', 'sendto'):
        monkeypatch.setattr(socket.socket, name, call)
    monkeypatch.setattr(socket, 'getaddrinfo', call)
    monkeypatch.chdir(tmp_path)
    toy = dict(dataset='', source='toy', encoding='')
    train.main(config('train', 'out/start', max_iters=2, block_size=80, **toy))
    preference.main(config('spin', 'out/spin', iterations=1, stop_step=1, init_from='out/start', eval_groups=4,
                           eval_samples=4, **toy))
    sample.main(sample.Config(out_dir='out/spin', checkpoint='last', max_new_tokens=2, device='cpu', prompt='x'))
    plot.plot(['out/start'])


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    cfg = config('train', tmp_path / 'run', max_iters=6)
    train.main(cfg)
    path = tmp_path / 'run' / 'ckpt_00000006.pt'
    state = load_checkpoint(path)
    moments = state['optimizer']['state'][0]
    for broken, words in (({k: v for k, v in state.items() if k != 'tokens'}, 'tokens'),
                          (dict(state, optimizer=[1]), 'indices'),
                          (dict(state, optimizer={**state['optimizer'], 'state': {
                              **state['optimizer']['state'], 0: {**moments, 'exp_avg': torch.zeros(3)}}}), 'moments')):
        torch.save(broken, path)
        before = {p.name: p.read_bytes() for p in (tmp_path / 'run').iterdir()}
        with pytest.raises(Refusal, match=f'does not fit this version of the program.*{words}'):
            train.main(replace(cfg, resume=True, max_iters=12))
        assert before == {p.name: p.read_bytes() for p in (tmp_path / 'run').iterdir()}


def test_data_exchanged_under_a_run(tmp_path, monkeypatch):
    (tmp_path / 'rows').mkdir()
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        for split, posts in dict(train=40, validation=6, test=6).items():
            lines = (json.dumps(row) for row in toy_rows(split, posts, seed))
            (tmp_path / 'rows' / f'{split}.json').write_text('\n'.join(lines) + '\n')
        prepare_shp.prepare(prepare_shp.Config(dataset='small', source='rows', encoding='bytes', overwrite=True))
        if seed == 0:
            train.main(config('train', 'run', stop_step=6))
    with pytest.raises(Refusal, match='of another dataset'):
        train.main(config('train', 'run', resume=True))


# Disks --------------------------------------------------------------------------------------------------------------


def on_a_full_disk(arguments, size):
    """The command where no file can grow beyond `size` bytes, as on a disk without room."""
    return subprocess.run(arguments, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


@pytest.mark.parametrize('kind', ['train', 'spin'])
def test_a_full_disk_ends_the_run_with_a_sentence_and_costs_nothing(tmp_path, kind):
    cfg = config(kind, tmp_path / 'run')
    main = (train if kind == 'train' else preference).main
    main(replace(cfg, out_dir=str(tmp_path / 'whole')))
    main(replace(cfg, stop_step=6))
    before = {p: p.read_bytes() for p in (tmp_path / 'run').glob('ckpt_*')}
    command = test_train.command if kind == 'train' else test_preference.command
    method = [] if kind == 'train' else [kind]
    options = TRAIN if kind == 'train' else PREFERENCE
    for size in (30_000, 8_000):
        done = on_a_full_disk(command(tmp_path / 'run', *method, '--resume=True', **options), size)
        assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
        assert 'could not be written (' in done.stderr and 'is the disk full' in done.stderr
        assert before == {p: p.read_bytes() for p in (tmp_path / 'run').glob('ckpt_*')}
        assert not list((tmp_path / 'run').rglob('*tmp*'))
    main(replace(cfg, resume=True))
    assert_same_run(kind, tmp_path / 'whole', tmp_path / 'run')


def test_a_full_disk_leaves_no_half_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('rows.jsonl').write_text('\n'.join(json.dumps(row) for row in toy_rows('train', 300, 0)))
    command = [sys.executable, str(ROOT / 'prepare_shp.py'), '--dataset=d', '--source=rows.jsonl', '--encoding=bytes']
    done = on_a_full_disk(command, 20_000)
    assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
    assert done.stderr.startswith('error: data/d could not be written')
    assert os.listdir('data') == []
    assert subprocess.run(command, capture_output=True).returncode == 0


# Python -------------------------------------------------------------------------------------------------------------


def test_without_assertions(tmp_path):
    """python -O: what guards a run is no assert."""
    command = test_train.command(tmp_path / 'run')
    train.main(test_train.config(tmp_path / 'run', stop_step=4))
    done = subprocess.run([command[0], '-O', *command[1:]], capture_output=True, text=True)
    assert done.returncode == 1 and 'is not empty' in done.stderr


@pytest.mark.parametrize('kind', ['dpo', 'reward'])
def test_a_nan_in_a_preference_evaluation_chooses_no_best(tmp_path, monkeypatch, kind):
    """Scores and rewards that are not finite: no best.pt, and the reward's offset stays finite."""
    row, rewards = preference.METHODS[kind], evaluate.rewards

    def broken(run, batch):
        score, log_p = row.score(run, batch)
        return (score if torch.is_grad_enabled() else score * math.nan), log_p

    monkeypatch.setitem(preference.METHODS, kind, row._replace(score=broken))
    monkeypatch.setattr(evaluate, 'rewards', lambda *args: rewards(*args) * math.nan)
    preference.main(config(kind, tmp_path / 'run', iterations=1))
    assert all(math.isnan(line['rank_accuracy']) for line in test_train.metrics(tmp_path / 'run', 'eval'))
    assert not (tmp_path / 'run' / 'best.pt').exists()
    state = load_checkpoint(tmp_path / 'run')
    assert all(w.isfinite().all() for part in {'model', 'reward_model'} & set(state) for w in state[part].values())
