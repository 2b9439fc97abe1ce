"""Real faults in real processes: killed, stopped, hung, orphaned and crowded runs; full disks; broken pipes.

Every run that is cut short continues with --resume=True and must end bit for bit like the run that was left alone. How
many kills the soak makes, of each kind of run: NANOTAYLOR_KILLS, 100 unless set.
"""
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
import runs
import sample
import test_preference
import test_train
import train
from configurator import Refusal
from conftest import ROOT, assert_same_run, metrics, typed, write_rows
from runs import load_checkpoint
from toy_shp import toy_rows

LIMIT = 300  # seconds, for what would hang
SOAK = int(os.environ.get('NANOTAYLOR_KILLS', 100))
KINDS = 'train', *test_preference.METHODS
OPTIONS = dict(train=dict(max_iters=40, eval_interval=6, dropout=0.1, micro_batch_size=3),
               **dict.fromkeys(test_preference.METHODS, dict(iterations=3, eval_interval=3)))
ENDLESS = dict(train=dict(max_iters=100_000, eval_interval=50_000), spin=dict(iterations=10_000, eval_interval=50_000))
pytestmark = pytest.mark.usefixtures('work')


def config(kind, out_dir, **changes):
    options = {**OPTIONS[kind], **changes}
    if kind == 'train':
        return test_train.config(out_dir, **options)
    return test_preference.config(out_dir, kind, **options)


def command(kind, out_dir, *more, **changes):
    options = {**OPTIONS[kind], **changes}
    if kind == 'train':
        return test_train.command(out_dir, *more, **options)
    return test_preference.command(out_dir, kind, *more, **options)


def program(kind):
    return train if kind == 'train' else preference


def files(folder, pattern='*'):
    return {path: path.read_bytes() for path in folder.glob(pattern)}


# Killed at any moment -----------------------------------------------------------------------------------------------


def quiet(folder, log, act, cfg):
    os.chdir(folder)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    act(cfg)


@pytest.fixture
def run_for(tmp_path):
    """run_for(seconds, folder, act, cfg): act(cfg) in a process that is then killed -> its exit code, or -SIGKILL.

    The processes begin where torch is already imported: a killed one costs no seconds.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['preference'])
    log = tmp_path / 'log'

    def run(seconds, folder, act, cfg):
        process = context.Process(target=quiet, args=(folder, log, act, cfg))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
        return process.exitcode

    run(LIMIT, tmp_path, id, 0)  # waits for the import
    return run


@pytest.mark.parametrize('kind, kills', [*((kind, 2) for kind in ('train', 'spin')), *(
    pytest.param(kind, SOAK, marks=pytest.mark.soak) for kind in KINDS)])
def test_kill_9_at_random_moments(tmp_path, folder, run_for, kind, kills):
    """Start-up, collections, generation, updates, evaluations, saves: a kill may fall into any."""
    whole, killed, main = tmp_path / 'whole', tmp_path / 'killed', program(kind).main
    began = time.perf_counter()
    assert run_for(LIMIT, folder, main, config(kind, whole)) == 0
    length, rng, hits, ends = time.perf_counter() - began, random.Random(f'{kind} {kills}'), 0, 0
    while hits < kills:
        code = run_for(rng.uniform(0, length), folder, main, config(kind, killed, resume=True))
        hits += code != 0
        if code == 0 and hits < kills:  # it reached its end: compared, and begun anew
            assert_same_run(whole, killed)
            killed.rename(tmp_path / f'ended{ends}')
            ends += 1
        elif runs.checkpoints(killed):
            load_checkpoint(killed)
    assert run_for(LIMIT, folder, main, config(kind, killed, resume=True)) == 0
    assert_same_run(whole, killed)
    print(f'{kind}: {hits} kills, {ends + 1} runs brought to their end')


@pytest.mark.parametrize('kills', [2, pytest.param(SOAK, marks=pytest.mark.soak)])
def test_a_killed_prepare_leaves_all_or_nothing(tmp_path, run_for, monkeypatch, kills):
    """Under a new name nothing, or the whole; a kill while it replaces a dataset may leave no dataset, but no mixture.
    """
    monkeypatch.chdir(tmp_path)
    for name, count in (('old', 200), ('new', 300)):
        write_rows(f'{name}.jsonl', toy_rows('train', count, 0))
    old, new = (prepare_shp.Config(dataset='d', source=f'{name}.jsonl', encoding='bytes', overwrite=True)
                for name in ('old', 'new'))
    began = time.perf_counter()
    sound = [prepare_shp.prepare(cfg)['sha256'] for cfg in (old, new)]
    length, rng, hits = time.perf_counter() - began, random.Random(kills), 0
    while hits < kills:
        hits += run_for(rng.uniform(0, length), tmp_path, prepare_shp.prepare, rng.choice([old, new])) != 0
        if Path('data/d').exists():
            assert prepare_shp.open_dataset(replace(old, overwrite=False, source='hub')).meta['sha256'] in sound
    assert prepare_shp.prepare(old)['sha256'] == sound[0] and os.listdir('data') == ['d']


# Ranks --------------------------------------------------------------------------------------------------------------


class Ranks:
    """torchrun with two ranks that print their process numbers, and a fault in Python among them."""

    def __init__(self, tmp_path, kind, fault='', restarts=0, **changes):
        script, self.pids, self.output = tmp_path / 'ranks.py', {}, ''
        script.write_text(f'import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n'
                          'import configurator, preference, runs, train\nrank = int(os.environ["RANK"])\n'
                          # in one write, or the lines of two ranks could mix
                          'os.write(1, f"rank {rank} is process {os.getpid()}\\n".encode())\n' + fault +
                          f'\nm = {program(kind).__name__}\nconfigurator.run(m.main, m.Config)\n')
        options = command(kind, tmp_path / 'run', '--resume=True', **changes)[2:]
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
             f'--max-restarts={restarts}', '--monitor-interval=0.1', str(script), *options], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.limit = threading.Timer(LIMIT, self.kill)
        self.limit.start()

    def until(self, words):
        """Reads their output, up to a line that begins with `words`."""
        for line in self.process.stdout:
            self.output += line
            for rank, pid in re.findall(r'rank (\d) is process (\d+)', line):
                self.pids[int(rank)] = int(pid)
            if words and line.startswith(words):
                return
        assert not words, self.output

    def end(self):
        """-> torchrun's exit code, when it and both ranks are gone: all of them held the pipe."""
        self.until(None)
        return self.process.wait()

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
    """A fault: `action` on a rank in the update after `step` steps; once, whatever restarts."""
    return (f'def lr_factor(step, cfg, sound=runs.lr_factor):\n'
            f'    if rank == {rank} and step == {step} and not os.path.exists(f"{{cfg.out_dir}}.{step}"):\n'
            f'        open(f"{{cfg.out_dir}}.{step}", "w").close()\n'
            f'        {action}\n'
            '    return sound(step, cfg)\n'
            'runs.lr_factor = lr_factor\n')


def test_a_rank_that_hangs_ends_both_and_nothing_is_lost(tmp_path):
    with Ranks(tmp_path, 'train', 'runs.RANK_TIMEOUT = 6\n' + at_step(7, 1, 'time.sleep(12)')) as ranks:
        assert ranks.end() != 0 and 'does not respond' in ranks.output
    assert load_checkpoint(tmp_path / 'run')['step'] == 6


def test_a_restart_of_torchrun_brings_a_killed_run_to_its_end(tmp_path):
    """As one that was left alone. Of the rank that was not killed there is a sentence and no traceback."""
    (tmp_path / 'alone').mkdir()
    for where, fault in ((tmp_path, at_step(7, 1, 'os.kill(os.getpid(), signal.SIGKILL)')), (tmp_path / 'alone', '')):
        with Ranks(where, 'spin', fault, restarts=1, iterations=2) as ranks:
            assert ranks.end() == 0, ranks.output
        for words in ('another rank has ended', 'resumed at step 6 (exact)') if fault else ():
            assert words in ranks.output and 'Traceback' not in ranks.output, ranks.output
    assert_same_run(tmp_path / 'alone' / 'run', tmp_path / 'run')


def test_ranks_whose_torchrun_was_killed_save_and_end(tmp_path):
    with Ranks(tmp_path, 'train', **ENDLESS['train']) as ranks:
        ranks.until('step 20/')
        ranks.process.kill()
        ranks.end()
    assert load_checkpoint(tmp_path / 'run')['step'] >= 20


# a terminal sends Ctrl-C to torchrun and to its ranks; torchrun passes its own on as well
@pytest.mark.parametrize('kind, number, receivers', [
    ('train', signal.SIGTERM, [1]), ('spin', signal.SIGINT, [0, 1, 'torchrun', 0])])
def test_signals_stop_both_ranks_at_one_step(tmp_path, kind, number, receivers):
    with Ranks(tmp_path, kind, **ENDLESS[kind]) as ranks:
        ranks.until('step 20/')
        for who in receivers:
            os.kill(ranks.pids.get(who, ranks.process.pid), number)
        assert ranks.end() != 0
    step = load_checkpoint(tmp_path / 'run')['step']
    assert step >= 20 and f'stopped after step {step}, saved' in ranks.output


def test_a_nan_on_one_rank_reaches_no_parameter_of_any(tmp_path):
    fault = ('sound, calls = preference.ppo_value_loss, []\n'
             'def broken(*args):\n'
             '    calls.append(1)\n'
             '    return sound(*args) * (float("nan") if rank and len(calls) in (3, 4) else 1.0)\n'
             'preference.ppo_value_loss = broken\n')
    with Ranks(tmp_path, 'ppo', fault, stop_step=11) as ranks:
        assert ranks.end() == 0 and 'its update is skipped' in ranks.output, ranks.output
    state = load_checkpoint(tmp_path / 'run')
    assert state['skipped'] in (1, 2)
    assert all(w.isfinite().all() for part in ('model', 'critic') for w in state[part].values())


def test_ranks_must_find_the_same_checkpoint(tmp_path, monkeypatch):
    cfg = config('train', tmp_path / 'run', stop_step=12)
    train.main(cfg)
    before = files(tmp_path / 'run')
    monkeypatch.setattr(runs.Machine, 'gather', lambda self, step: [step, 6])
    with pytest.raises(Refusal, match='the ranks do not find the same checkpoint'):
        train.main(replace(cfg, resume=True))
    assert before == files(tmp_path / 'run')


# Signals, terminals, folders ----------------------------------------------------------------------------------------


def running(tmp_path, step, **options):
    """A run in a process of its own, which has just printed that it reached `step`."""
    process = subprocess.Popen(command('train', tmp_path / 'run', max_iters=4000, eval_interval=2000),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    for line in process.stdout:
        if line.startswith(f'step {step}/'):
            return process
    raise AssertionError('it ended early')


def test_a_run_whose_reader_is_gone_is_saved(tmp_path):
    """Of its pipe into tee or head: it ends as if its terminal were closed, by SIGHUP."""
    process = running(tmp_path, 20)
    process.stdout.close()
    assert process.wait(60) == 129 and load_checkpoint(tmp_path / 'run')['step'] >= 20


def test_nohup_keeps_a_run_alive_and_its_folder_closed_to_others(tmp_path):
    """Two runs in one folder would mix their lines and delete each other's checkpoints."""
    process = running(tmp_path, 5, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    for changes in (dict(resume=True), dict(overwrite=True), {}):
        with pytest.raises(Refusal, match='run is in use by another run; wait until it ends'):
            train.main(config('train', tmp_path / 'run', **changes))
    process.terminate()
    assert 'stopped after step' in process.communicate()[0] and process.returncode == 143


def test_signals_during_a_save(tmp_path, monkeypatch):
    """Before the file is renamed and after: the save ends as if nothing had come, then the run."""
    cfg = config('train', tmp_path / 'whole')
    train.main(cfg)
    replace_file = os.replace

    def interrupted(source, target):
        for act in (lambda: None, lambda: replace_file(source, target)):
            act()
            if str(target).endswith('ckpt_00000012.pt'):
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', interrupted)
        with pytest.raises(SystemExit) as end:
            train.main(replace(cfg, out_dir=str(tmp_path / 'cut')))
    assert end.value.code == 143 and load_checkpoint(tmp_path / 'cut')['step'] == 12
    train.main(replace(cfg, out_dir=str(tmp_path / 'cut'), resume=True))
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    notes = [tmp_path / 'run' / sub / 'notes.txt' for sub in ('', 'iterations', 'selves')]
    preference.main(config('spin', tmp_path / 'run', stop_step=6))
    for path in notes:
        path.write_text('mine')
    preference.main(config('spin', tmp_path / 'run', stop_step=3, overwrite=True))
    assert all(path.exists() for path in notes) and load_checkpoint(tmp_path / 'run')['step'] == 3


def test_a_folder_without_checkpoints_is_not_touched(tmp_path):
    """best.pt is no checkpoint to continue from, and a run from step 0 must not overwrite it."""
    for name in ('best.pt', 'loss.png', 'thesis.txt'):
        (tmp_path / name).write_text('mine')
    before, no_run = files(tmp_path), 'is not empty and is not the folder of a run'
    for changes, words in (({}, no_run), (dict(overwrite=True), no_run),
                           (dict(resume=True), 'has no ckpt_.*, and a run cannot be resumed from best.pt')):
        with pytest.raises(Refusal, match=words):
            train.main(config('train', tmp_path, **changes))
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(folder, capsys):
    """A file in its place; and a folder that one may only read: root, who may all, becomes nobody meanwhile."""
    user = os.geteuid()
    for path in (folder / 'file', folder / 'readonly'):
        path.touch() if path.name == 'file' else path.mkdir(mode=0o555)
    folder.chmod(0o755)
    try:
        os.seteuid(user or 65534)
        for name in ('file/run', 'readonly', 'readonly/run'):
            with pytest.raises((Refusal, OSError), match=f"(denied|directory): '{name}|{name}.*could not be written"):
                preference.main(config('spin', name))
    finally:
        os.seteuid(user)
    assert 'evaluation' not in capsys.readouterr().out


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


def on_a_full_disk(arguments, size):
    """The command where no file can grow beyond `size` bytes, as on a disk without room."""
    done = subprocess.run(arguments, capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1, done.stderr
    return done.stderr


def test_a_full_disk_ends_the_run_with_a_sentence_and_costs_nothing(tmp_path):
    cfg, main = config('spin', tmp_path / 'run'), preference.main
    main(replace(cfg, out_dir=str(tmp_path / 'whole')))
    main(replace(cfg, stop_step=6))
    before = files(tmp_path / 'run', 'ckpt_*')
    for size in (30_000, 8_000):
        error = on_a_full_disk(command('spin', tmp_path / 'run', '--resume=True'), size)
        assert 'is the disk full' in error or 'File too large' in error
        assert before == files(tmp_path / 'run', 'ckpt_*') and not list((tmp_path / 'run').rglob('*tmp*'))
    main(replace(cfg, resume=True))
    assert_same_run(tmp_path / 'whole', tmp_path / 'run')


def test_a_full_disk_leaves_no_half_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows('rows.jsonl', toy_rows('train', 300, 0))
    prepare = typed('prepare_shp.py', dataset='d', source='rows.jsonl', encoding='bytes')
    assert on_a_full_disk(prepare, 20_000).startswith('error: data/d could not be written')
    assert os.listdir('data') == []
    assert subprocess.run(prepare, capture_output=True).returncode == 0


@pytest.mark.parametrize('kind', ['dpo', 'reward'])
def test_a_nan_in_a_preference_evaluation_chooses_no_best(tmp_path, monkeypatch, kind):
    """Scores and rewards that are not finite: no best.pt, and the reward's offset stays finite."""
    judge, rewards = preference.Method.judge, evaluate.rewards
    monkeypatch.setattr(preference.Method, 'judge', lambda self, rows: {
        name: value * math.nan for name, value in judge(self, rows).items()})
    monkeypatch.setattr(evaluate, 'rewards', lambda *args: rewards(*args) * math.nan)
    preference.main(config(kind, tmp_path / 'run', iterations=1))
    assert all(math.isnan(line['rank_accuracy']) for line in metrics(tmp_path / 'run', 'eval'))
    assert not (tmp_path / 'run' / 'best.pt').exists()
    state = load_checkpoint(tmp_path / 'run')
    assert all(w.isfinite().all() for part in {'model', 'reward_model'} & set(state) for w in state[part].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('kind, batches, number, options', [
    ('train', (prepare_shp, 'lm_batch'), 4, dict(max_iters=8, micro_batch_size=0)),
    ('train', (prepare_shp, 'lm_batch'), 4, dict(max_iters=8, micro_batch_size=0, compile=True)),
    ('dpo', (preference, 'step_prompts'), 3, dict(iterations=1, inner_epochs=4, sft_weight=0.1))])
def test_the_host_does_not_wait_within_a_step(tmp_path, monkeypatch, kind, batches, number, options):
    """What makes a step's batch, and is called with the step's number, forbids waiting from step 3 on."""
    sound = getattr(*batches)

    def watched(*args):
        torch.cuda.set_sync_debug_mode('error' if 3 <= args[number] < 7 else 'default')
        return sound(*args)

    monkeypatch.setattr(*batches, watched)
    options = dict(options, device='cuda', log_interval=8, eval_interval=8)
    try:
        program(kind).main(config(kind, tmp_path / 'run', **options))
    finally:
        torch.cuda.set_sync_debug_mode('default')
