"""The head's Triton kernel against float64: on a GPU, or else in Triton's interpreter, in a process of its own.

The tests of the head that test_losses.py runs with plain torch run here with the kernel.
"""
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import linear_loss, linear_token_log_prob
from test_losses import (  # noqa: F401
    LOSSES, V, chunks_of_8, head_case, test_a_nan_reaches_the_gradient,
    test_autocast_runs_products_in_bfloat16_and_returns_float32_gradients, test_fused_head_equals_the_plain_one,
    test_linear_token_log_prob_for_any_upstream_gradient, test_no_target_is_a_loss_of_zero_with_gradients_of_zero)

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


@pytest.mark.skipif(DEVICE == 'cuda' or INTERPRETED, reason='the tests below run here')
def test_in_the_interpreter():
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__],
                          stdout=subprocess.PIPE, text=True, env={**os.environ, 'TRITON_INTERPRET': '1'})
    assert done.returncode == 0 and ' passed' in done.stdout, done.stdout


@pytest.fixture
def kernels(monkeypatch):
    if DEVICE == 'cpu' and not INTERPRETED:
        pytest.skip('runs in the interpreter')
    from extras import kernels
    monkeypatch.setattr(losses, '_error_of', lambda device: kernels.error_of)
    return kernels


@pytest.fixture
def device(kernels):
    return DEVICE


ON_LOGITS = [(torch.float32, 2e-5), (torch.float16, 1e-3),
             (torch.bfloat16, 4e-3 if DEVICE == 'cuda' else 8e-3)]  # to which the interpreter rounds towards zero


@pytest.mark.parametrize('dtype, tolerance', ON_LOGITS)
@pytest.mark.parametrize('vocabulary', [2, 300, 9000])  # the last in three blocks
def test_every_entry_of_the_error(kernels, dtype, tolerance, vocabulary):
    """An identity as weight makes the logits those given: targets known down to q = 1e-30, others below 1e-25."""
    logits = torch.zeros(8, vocabulary + 20)
    logits[:, :vocabulary] = torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, *[vocabulary - 1] * 6])
    logits[torch.arange(8), targets] += torch.tensor([0, 5, 10, 20, 40, 69 + math.log(vocabulary), -20, -60])
    logits, targets = logits.to(DEVICE, dtype), targets.to(DEVICE)
    error = torch.empty_like(logits)
    log_p = kernels.error_of(logits, torch.eye(vocabulary + 20).to(logits), targets, vocabulary, error)
    z = logits[:, :vocabulary].double()
    log_odds = z.gather(1, targets[:, None]) - z.scatter(1, targets[:, None], -torch.inf).logsumexp(1, keepdim=True)
    exact = z.softmax(1).scatter(1, targets[:, None], -log_odds.neg().sigmoid())
    assert 1e-31 < -exact[5, -1] < 1e-29 and log_p[7] < -55
    torch.testing.assert_close(log_p.double(), F.logsigmoid(log_odds[:, 0]), rtol=2e-5, atol=0)
    torch.testing.assert_close(error[:, :vocabulary].double(), exact, rtol=tolerance,
                               atol=6e-8 if dtype == torch.float16 else 1e-37)  # the smallest number of the dtype
    assert error[:, vocabulary:].eq(0).all()


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs CUDA')
def test_the_host_does_not_wait():
    hidden, weight, targets = head_case(torch.float32, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):  # compiled in the first, and the loss is checked there
            with torch.autocast('cuda', dtype=dtype, enabled=dtype != torch.float32):
                total, _ = linear_loss(hidden, weight, targets, LOSSES['focal'], V)
                (total - linear_token_log_prob(hidden, weight, targets, V).sum()).backward()
            torch.cuda.set_sync_debug_mode('error')
        torch.cuda.set_sync_debug_mode('default')
