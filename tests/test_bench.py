"""bench.py: its contenders compute the same thing, and its figures are what they are called."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
from bench import Config, extra_memory, in_own_process, predicted_memory, take_turns
from runs import setup

ROOT = Path(__file__).parent.parent
MACHINE = setup('cpu')


def results(contenders, *words):
    return {name: make()() for name, make in contenders.items()
            if all(word in name for word in words) and 'compiled' not in name}


def test_contenders_of_the_head_have_the_same_loss():
    torch.manual_seed(0)
    contenders = bench.head(Config(), MACHINE, 16, rows=60, vocabulary=512)
    cross_entropy, log_p = results(contenders, 'F.linear'), results(contenders, 'linear_token_log_prob')
    taylor = results(contenders, 'T_2')
    assert len(cross_entropy) == 3 and len(log_p) == 1 and len(taylor) == 3
    ce, t2 = cross_entropy['F.linear + F.cross_entropy, float32'].item(), taylor['naive T_2, float32'].item()
    assert [loss.item() for loss in cross_entropy.values()] == pytest.approx([ce] * 3, rel=5e-3)
    assert [-loss.item() for loss in log_p.values()] == pytest.approx([ce], rel=5e-3)
    assert [loss.item() for loss in taylor.values()] == pytest.approx([t2] * 3, rel=5e-3)


def test_contenders_of_a_preference_step_have_the_same_loss_and_gradient():
    torch.manual_seed(0)
    plain, *others = results(bench.preference(Config(), MACHINE, 3, prompt=20, answer=6), 'float32').values()
    assert len(others) == 2
    for other in others:
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)


def test_contenders_of_generation_write_as_many_tokens():
    contenders = bench.generate(Config(), MACHINE, 3, prompt=5, new=4)
    assert results(contenders, 'no cache')['no cache (nanoGPT-like), float32'].shape == (3, 9)
    for answers in results(contenders, 'GPT.generate').values():
        assert [len(answer) for answer in answers] == [4, 4, 4]


def test_a_step_trains():
    cfg = Config(batch_size=2, block_size=8)
    for name, make in bench.step(cfg, MACHINE, 8).items():
        if 'compiled' not in name:
            call = make()
            losses = [call().item() for _ in range(8)]
            assert losses[0] > 10 and losses[-1] != losses[0]
            assert losses[-1] < losses[0] - 0.01 or 'nanoGPT' in name  # ours repeats one batch, theirs draws


def test_turns_alternate():
    order = []
    seconds = take_turns(MACHINE, {'a': lambda: order.append('a'), 'b': lambda: order.append('b')}, 3)
    assert order == ['a', 'b'] * 4 and len(seconds['a']) == len(seconds['b']) == 3


def test_memory_is_the_contenders_own_and_near_the_predicted():
    cfg = Config(batch_size=4, block_size=64, n_layer=2)
    plain, ours = (in_own_process(extra_memory, cfg, MACHINE, 'step', 64, name)
                   for name in ('nanoGPT-like, float32', 'train.py T_2, float32'))
    assert ours == pytest.approx(predicted_memory(cfg, 64, torch.float32), rel=0.25)
    # a plain step holds all logits, their log-softmax and their gradient
    assert plain > ours + 2 * 256 * 50304 * 4 / 2 ** 20


def test_two_ranks(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', 'bench.py',
               '--parts=ranks', '--n_embd=8', '--repeats=1', '--batch_size=2', '--block_size=16',
               f'--out_dir={tmp_path}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    assert '2 ranks, each with 1 x 16 tokens' in done.stdout
    rows = [json.loads(line) for line in (tmp_path / 'bench.jsonl').read_text().splitlines()]
    assert [row['name'] for row in rows] == ['step alone', 'step under DDP', 'all-reduce alone']


def test_a_wrong_part_is_refused_by_name():
    done = subprocess.run([sys.executable, 'bench.py', '--parts=heads'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "parts: 'heads' is not one of head, step" in done.stderr
    done = subprocess.run([sys.executable, 'bench.py', '--parts=ranks'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'torchrun --nproc_per_node=2 bench.py --parts=ranks' in done.stderr
