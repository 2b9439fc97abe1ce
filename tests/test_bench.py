"""bench.py: its contenders compute the same thing, and its figures are what they are called."""
import pytest
import torch

import bench
from bench import Config, extra_memory, in_own_process
import runs

MACHINE = runs.setup('cpu')


def results(contenders, word, calls=1):
    """{name: what its calls return} of the contenders whose name holds a word, without those that are compiled."""
    made = {name: make() for name, make in contenders.items() if word in name and 'compile' not in name}
    return {name: [call() for _ in range(calls)] for name, call in made.items()}


def test_contenders_of_the_head_have_the_same_loss():
    torch.manual_seed(0)
    contenders = bench.head(Config(), MACHINE, 16, rows=60, vocabulary=512)
    for word, count in (('cross_entropy', 3), ('T_2', 3)):
        losses = [loss.item() for loss, in results(contenders, word).values()]
        assert losses == pytest.approx([losses[0]] * count, rel=5e-3)
    assert [name for name in contenders if 'floor' in name and contenders[name]()() is None]


def test_contenders_of_a_preference_step_take_the_same_steps():
    torch.manual_seed(0)
    contenders = bench.preference(Config(groups=2, shape=(1, 2, 32)), MACHINE, 3, 20, 6)
    plain, *others = results(contenders, 'float32', calls=3).values()
    assert len(others) == 2 and plain[2] < plain[0] - 0.01
    for other in others:
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-3)


def test_contenders_of_a_step_start_at_the_same_loss_and_learn():
    torch.manual_seed(0)
    for losses in results(bench.step(Config(batch_size=2, block_size=8), MACHINE, 8), '', calls=8).values():
        assert losses[0].item() == pytest.approx(10.82, abs=0.05) and losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize('name', ['spin', 'ppo'])
def test_an_iteration_collects_and_learns(name):
    torch.manual_seed(0)
    contenders = bench.iteration(Config(groups=2, shape=(1, 1, 8)), MACHINE, name, 6, 4)
    for losses in results(contenders, '', calls=2).values():
        assert all(loss.isfinite() for loss in losses) and losses[0] != losses[1]


def test_memory_is_that_of_the_contender():
    plain, ours = (in_own_process(extra_memory, Config(batch_size=4, block_size=64), MACHINE, 'step', 64, name)
                   for name in ('nanoGPT-like, float32', 'train.py T_2, float32'))
    assert plain > ours + 2 * 256 * 50304 * 4 / 2 ** 20  # all logits, their log-softmax and their gradient
