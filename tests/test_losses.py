"""Token losses: every formula against brute force in float64, the fused path against the plain one."""
import math

import pytest
import torch
import torch.nn.functional as F

from losses import linear_taylor_loss, linear_token_log_prob, taylor_link, taylor_loss, token_log_prob

ORDERS = range(5)


def series(q, n, terms=4000):
    """sum_{k>n} q^k / k term by term, in float64, small terms first."""
    k = torch.arange(n + terms, n, -1, dtype=torch.float64)
    return (q.double()[..., None] ** k / k).sum(-1)


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def test_t0_is_cross_entropy():
    logits = torch.randn(6, 5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (6, 5))
    ours = taylor_loss(token_log_prob(logits, targets), 0).mean()
    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_closed_forms_of_t1_and_t2():
    p = torch.linspace(0.05, 0.5, 10, dtype=torch.float64)
    torch.testing.assert_close(taylor_loss(p.log(), 1), -(p.log() - (p - 1)))
    torch.testing.assert_close(taylor_loss(p.log(), 2), -(p.log() - (p - 1) + (p - 1) ** 2 / 2))


@pytest.mark.parametrize('n', [*ORDERS, 9])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_value_keeps_its_digits_for_every_q(n, dtype, tolerance):
    log_p = torch.log1p(-torch.logspace(-4 if n < 9 else -3, -0.02, 400, dtype=torch.float64)).to(dtype)
    q = -torch.expm1(log_p.double())  # exact for the log_p that is given
    torch.testing.assert_close(taylor_loss(log_p, n).double(), series(q, n), rtol=tolerance, atol=0)
    log_p = -torch.linspace(3, 60, 100, dtype=torch.float64).to(dtype)
    plain = -log_p.double() - sum((-log_p.double().expm1()) ** k / k for k in range(1, n + 1))
    torch.testing.assert_close(taylor_loss(log_p, n).double(), plain, rtol=tolerance, atol=0)


@pytest.mark.parametrize('n', ORDERS)
def test_gradient_is_minus_q_to_the_n(n):
    log_p = (-torch.logspace(-5, 4, 200, dtype=torch.float64)).requires_grad_()
    taylor_loss(log_p, n).sum().backward()
    torch.testing.assert_close(log_p.grad, -(-torch.expm1(log_p.detach())) ** n, rtol=1e-12, atol=0)
    x = torch.tensor([-0.01, -0.3, -2.0, -9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: taylor_loss(x, n), x)


def test_certain_impossible_and_hopeless_tokens():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        log_p = torch.tensor([0.0, -1e4, -3e38, -1e-30], dtype=dtype, requires_grad=True)
        for n in ORDERS:
            loss = taylor_loss(log_p, n)
            grad, = torch.autograd.grad(loss.sum(), log_p)
            assert loss.isfinite().all() and grad.isfinite().all()
            assert loss[0] == 0 and grad[1] == -1
            if n:
                assert grad[0] == 0


def test_orders_are_nested():
    log_p = -torch.rand(1000, dtype=torch.float64) * 5
    losses = [taylor_loss(log_p, n) for n in range(8)]
    assert all((a >= b).all() for a, b in zip(losses, losses[1:])) and (losses[-1] >= 0).all()


@pytest.mark.parametrize('n', [-1, 1.0, True, None, '2'])
def test_an_order_must_be_a_whole_number(n):
    with pytest.raises(ValueError, match='n >= 0'):
        taylor_loss(torch.tensor([-1.0]), n)


# link ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 2, 3])
def test_link_recovers_the_truth_from_the_minimiser(n):
    """Minimise E_pi[T_n(p)] over the simplex; link_n of the minimiser is pi."""
    pi = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = (pi * taylor_loss(z.log_softmax(-1), n)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    log_p = z.detach().log_softmax(-1)
    assert log_p[0].exp() < 0.6  # under-confident by design
    torch.testing.assert_close(taylor_link(log_p, n).exp(), pi, rtol=1e-6, atol=1e-8)


def test_link_of_the_binary_examples():
    for p, n in ((0.75, 1), (0.675, 2)):
        link = taylor_link(torch.tensor([p, 1 - p], dtype=torch.float64).log(), n).exp()
        assert abs(link[0] - 0.9) < 2e-3


def test_link_against_its_definition_and_its_edges():
    p = torch.randn(50, 20, dtype=torch.float64).softmax(-1)
    for n in ORDERS:
        plain = p / (1 - p) ** n
        torch.testing.assert_close(taylor_link(p.log(), n).exp(), plain / plain.sum(-1, keepdim=True))
    edge = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, -200.0, -300.0], [-torch.inf, math.log(.5), math.log(.5)]])
    link = taylor_link(edge, 2).exp()
    assert torch.equal(link, torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, .5, .5]]))


# head and loss together ----------------------------------------------------------------------------------------------

V, PADDED, C, N = 300, 320, 16, 37


def head_case(dtype, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, C, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, C, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=g)
    targets[::5] = -1
    return hidden, weight, targets


def plain_head(hidden, weight, targets, n):
    """The same in float64 with every logit in memory; low-precision logits enter as they were rounded."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (h @ w.T)[:, :V]
    rounded = (hidden.detach() @ weight.detach().T)[:, :V].double()
    log_p = token_log_prob(logits + (rounded - logits).detach(), targets)[targets >= 0]
    loss = taylor_loss(log_p, n).sum()
    return loss, *torch.autograd.grad(loss, (h, w)), log_p


@pytest.mark.parametrize('n', ORDERS)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize('scale', [0.1, 3.0])
def test_fused_head_equals_the_plain_one(n, dtype, tolerance, scale):
    hidden, weight, targets = head_case(dtype, scale)
    sums = linear_taylor_loss(hidden, weight, targets, n, vocab_size=V, chunk_rows=8)
    loss, grad_hidden, grad_weight, log_p = plain_head(hidden, weight, targets, n)
    grads = torch.autograd.grad(sums.loss, (hidden, weight))
    assert sums.count == (targets >= 0).sum()
    for ours, theirs in zip((*grads, sums.loss, sums.ce, sums.weight),
                            (grad_hidden, grad_weight, loss, -log_p.sum(), ((-log_p.expm1()) ** n).sum())):
        assert relative_error(ours, theirs) < tolerance
    assert grads[0][targets < 0].eq(0).all() and grads[1][V:].eq(0).all()


@pytest.mark.parametrize('n', ORDERS)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_known_tokens_keep_their_digits(n, dtype, tolerance):
    """One row at a time, q from 1e-4 to 1, value and gradient on the logits, relative to float64."""
    for q in torch.logspace(-4, -0.01, 15).tolist():
        rest = torch.randn(63, generator=torch.Generator().manual_seed(0)).double()
        top = math.log((1 - q) / q) + rest.logsumexp(0)
        logits = torch.cat([top[None], rest]).to(dtype)[None]
        # an identity as the head's weight: the hidden gradient is the gradient on the logits
        hidden = logits.float().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            sums = linear_taylor_loss(hidden, torch.eye(64), torch.tensor([0]), n)
        exact = logits.detach().double().requires_grad_()
        odds = exact[0, 1:].logsumexp(0) - exact[0, 0]
        q_exact = odds.detach().sigmoid()
        other = (exact.detach()[0, 1:] - exact.detach()[0, 1:].logsumexp(0)).exp()
        gradient = q_exact ** (n + 1) * torch.cat([-torch.ones(1), other])
        assert relative_error(sums.loss, series(q_exact, n) if q_exact < .99 else taylor_loss(-F.softplus(odds), n)) < 1e-5
        assert relative_error(torch.autograd.grad(sums.loss, hidden)[0][0], gradient) < tolerance


def test_autocast_runs_products_in_bfloat16_and_returns_float32_gradients():
    hidden, weight, targets = head_case(torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        sums = linear_taylor_loss(hidden, weight, targets, 2, vocab_size=V)
    half = linear_taylor_loss(hidden.bfloat16(), weight.bfloat16(), targets, 2, vocab_size=V)
    assert torch.equal(sums.loss, half.loss)
    grad_hidden, grad_weight = torch.autograd.grad(sums.loss, (hidden, weight))
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32
    _, exact_hidden, exact_weight, _ = plain_head(hidden.bfloat16(), weight.bfloat16(), targets, 2)
    assert relative_error(grad_hidden, exact_hidden) < 3e-3 and relative_error(grad_weight, exact_weight) < 3e-3


def test_chunks_and_upstream_gradient_change_nothing():
    hidden, weight, targets = head_case(torch.float64)
    whole = linear_taylor_loss(hidden, weight, targets, 1, V, chunk_rows=N)
    parts = linear_taylor_loss(hidden, weight, targets, 1, V, chunk_rows=5)
    a = torch.autograd.grad(whole.loss, (hidden, weight))
    b = torch.autograd.grad(parts.loss * 3, (hidden, weight))
    for x, y in zip(a, b):
        torch.testing.assert_close(3 * x, y)


def test_no_valid_row_is_a_loss_of_zero_with_gradients_of_zero():
    hidden, weight, _ = head_case(torch.float32)
    sums = linear_taylor_loss(hidden, weight, torch.full((N,), -1), 2)
    grads = torch.autograd.grad(sums.loss, (hidden, weight))
    assert sums.loss == 0 and sums.count == 0 and all(g.eq(0).all() for g in grads)


def test_ignored_rows_may_hold_anything():
    hidden, weight, targets = head_case(torch.float32)
    spoiled = hidden.detach().clone()
    spoiled[targets < 0] = torch.nan
    clean = linear_taylor_loss(hidden, weight, targets, 2, V).loss
    assert torch.equal(linear_taylor_loss(spoiled, weight, targets, 2, V).loss, clean)


def test_skip_below_leaves_out_only_what_weighs_little():
    hidden, weight, targets = head_case(torch.float64, scale=4.0)
    logits = hidden.detach() @ weight.detach()[:V].T
    targets = logits.argmax(-1)  # known tokens: small q
    exact = torch.autograd.grad(linear_taylor_loss(hidden, weight, targets, 2, V).loss, (hidden, weight))
    q_n = (-token_log_prob(logits, targets).expm1()) ** 2
    for share in (1e-6, 1e-2):
        skipped = q_n < share * q_n.max()
        assert skipped.any()
        sums = linear_taylor_loss(hidden, weight, targets, 2, V, skip_below=share, chunk_rows=N)
        grad_hidden, grad_weight = torch.autograd.grad(sums.loss, (hidden, weight))
        assert grad_hidden[skipped].eq(0).all()
        torch.testing.assert_close(grad_hidden[~skipped], exact[0][~skipped])
        bound = (q_n[skipped] * hidden.detach()[skipped].norm(dim=1)).sum() * 2
        assert (grad_weight - exact[1]).norm() <= bound


def test_only_the_loss_carries_gradient_and_only_once():
    hidden, weight, targets = head_case(torch.float32)
    sums = linear_taylor_loss(hidden, weight, targets, 1, V)
    assert sums.loss.requires_grad and not sums.ce.requires_grad and not sums.weight.requires_grad
    sums.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        sums.loss.backward()


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_linear_token_log_prob_for_any_upstream_gradient(dtype, tolerance):
    hidden, weight, targets = head_case(dtype)
    upstream = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = linear_token_log_prob(hidden, weight, targets, V, chunk_rows=8)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = (h @ w.T)[:, :V]
    rounded = (hidden.detach() @ weight.detach().T)[:, :V].double()
    plain = token_log_prob(logits + (rounded - logits).detach(), targets)
    assert relative_error(ours, plain) < 1e-5 and ours[targets < 0].eq(0).all()
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight), upstream.to(ours.dtype)),
                    torch.autograd.grad(plain, (h, w), upstream)):
        assert relative_error(a, b) < tolerance


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, targets = head_case(torch.float32)
    for bad in ((hidden[:, :-1], weight, targets), (hidden, weight, targets[1:]), (hidden[None], weight, targets)):
        with pytest.raises(ValueError, match='hidden .N, C.'):
            linear_taylor_loss(*bad, 0)
