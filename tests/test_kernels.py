"""The head's Triton kernel against float64: on a GPU, or else in Triton's interpreter, in a process of its own."""
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import linear_loss, linear_token_log_prob, token_log_prob
from test_losses import LOSSES, N, V, head_case, plain_head, plain_logits, relative_error

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)]


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
    monkeypatch.setattr(losses, 'chunk_rows', lambda *_: 16)
    return kernels


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


@pytest.mark.parametrize('name', ['T_0', 'T_1', 'T_2', 'T_3', 'focal'])
@pytest.mark.parametrize('dtype, tolerance', DTYPES)
def test_linear_loss(kernels, name, dtype, tolerance):
    """The values, both gradients, the padding and the rows without a target."""
    case = head_case(dtype, 2.0)
    hidden, weight, targets = (x.detach().to(DEVICE) for x in case)
    total, log_p = linear_loss(hidden.requires_grad_(), weight.requires_grad_(), targets, LOSSES[name], V)
    grads = torch.autograd.grad(3 * total, (hidden, weight))
    plain_total, grad_hidden, grad_weight, plain_log_p = plain_head(*case, LOSSES[name])
    for ours, plain in zip((total, log_p[targets >= 0], *grads),
                           (plain_total, plain_log_p, 3 * grad_hidden, 3 * grad_weight)):
        assert relative_error(ours.cpu(), plain) < tolerance
    assert log_p[targets < 0].eq(0).all() and grads[0][targets < 0].eq(0).all() and grads[1][V:].eq(0).all()


@pytest.mark.parametrize('rows', [16, N])  # the chunks are made again for the backward pass, the only one is kept
@pytest.mark.parametrize('dtype, tolerance', DTYPES)
def test_linear_token_log_prob(kernels, dtype, tolerance, rows, monkeypatch):
    monkeypatch.setattr(losses, 'chunk_rows', lambda *_: rows)
    case = head_case(dtype, 2.0)
    hidden, weight, targets = (x.detach().to(DEVICE) for x in case)
    log_p = linear_token_log_prob(hidden.requires_grad_(), weight.requires_grad_(), targets, V)
    h, w = (x.detach().double().requires_grad_() for x in case[:2])
    plain = token_log_prob(plain_logits(h, w, dtype), case[2])
    upstream = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert relative_error(log_p.cpu(), plain) < tolerance and log_p[targets < 0].eq(0).all()
    exact = torch.autograd.grad(plain, (h, w), upstream)
    for _ in range(2):  # a second backward pass gives the same
        ours = torch.autograd.grad(log_p, (hidden, weight), upstream.to(log_p), retain_graph=True)
        assert all(relative_error(a.cpu(), b) < tolerance for a, b in zip(ours, exact))


def test_no_row_and_a_row_that_is_no_number(kernels):
    hidden, weight, targets = (x.detach().to(DEVICE).clone() for x in head_case(torch.float32))
    hidden.requires_grad_(), weight.requires_grad_()
    nothing = linear_loss(hidden[:0], weight, targets[:0], LOSSES['T_2'], V)[0]
    assert nothing == 0 and all(x.eq(0).all() for x in torch.autograd.grad(nothing, (hidden, weight)))
    hidden.data[1] = torch.nan
    total, _ = linear_loss(hidden, weight, targets, LOSSES['T_2'], V)
    assert total.isnan() and torch.autograd.grad(total, weight)[0].isnan().any()


@pytest.mark.skipif(DEVICE == 'cpu', reason='needs CUDA')
def test_the_host_does_not_wait():
    hidden, weight, targets = (x.detach().to(DEVICE) for x in head_case(torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(2):  # compiled in the first, and the loss is checked there
            with torch.autocast('cuda', dtype=dtype, enabled=dtype != torch.float32):
                total, _ = linear_loss(hidden.requires_grad_(), weight.requires_grad_(), targets, LOSSES['focal'], V)
                (total - linear_token_log_prob(hidden, weight, targets, V).sum()).backward()
            torch.cuda.set_sync_debug_mode('error')
        torch.cuda.set_sync_debug_mode('default')
