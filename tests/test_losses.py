"""Every formula against brute force in float64, and the fused paths against the plain ones."""
import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (cross_fitted, fitted_scale, gae, linear_loss, linear_token_log_prob, link_order, loss_name,
                    masked_mean, plackett_luce_log_prob, plackett_luce_loss, ppo_policy_loss, ppo_value_loss,
                    renormalize_reward, scaled_ce, taylor_link, taylor_loss, token_log_prob)

ORDERS = range(5)
NAN, INF = float('nan'), float('inf')


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


# Tokens --------------------------------------------------------------------------------------------------------------


def series(q, n, terms=4000):
    """sum_{k>n} q^k / k term by term, in float64, small terms first."""
    k = torch.arange(n + terms, n, -1, dtype=torch.float64)
    return (q.double()[..., None] ** k / k).sum(-1)


def relative_error(a, b):
    return ((a.cpu().double() - b.double()).norm() / b.double().norm()).item()


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


@pytest.mark.parametrize('n', [-1, 1.0, True, None, '2'])
def test_an_order_must_be_a_whole_number(n):
    with pytest.raises(ValueError, match='n >= 0'):
        taylor_loss(torch.tensor([-1.0]), n)


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


def test_link_against_its_definition_and_its_edges():
    p = torch.randn(50, 20, dtype=torch.float64).softmax(-1)
    for n in ORDERS:
        plain = p / (1 - p) ** n
        torch.testing.assert_close(taylor_link(p.log(), n).exp(), plain / plain.sum(-1, keepdim=True))
    edge = torch.tensor([[0, -INF, -INF], [0, -200, -300], [-INF, math.log(.5), math.log(.5)]])
    link = taylor_link(edge, 2).exp()
    assert torch.equal(link, torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, .5, .5]]))


def test_a_fitted_temperature_is_right_or_nan():
    """A first estimate from a sixth of the tokens, nearly all of them certain, may be too far for the series."""
    unknown = 0
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        z, targets = torch.randn(1200, 257, generator=g), torch.randint(257, (1200,), generator=g)
        z[torch.arange(1200), targets] += 6
        z = z.log_softmax(1)
        halves = [(z[:600], targets[:600]), (z[600:], targets[600:])]
        b = fitted_scale([(z[::6], targets[::6])])
        ce, _ = cross_fitted([scaled_ce(*half, b).double().sum(0).tolist() for half in halves], b)
        of_half = [fitted_scale([half]) for half in halves]
        plain = sum(scaled_ce(*half, x)[:, 0].sum().item() for half, x in zip(halves, reversed(of_half)))
        assert math.isnan(ce) or ce == pytest.approx(plain, rel=0.05)
        unknown += math.isnan(ce)
    assert 0 < unknown < 5, unknown


# head and loss together ----------------------------------------------------------------------------------------------

V, PADDED, C, N = 300, 320, 16, 21


@pytest.fixture
def device():
    """That of the head. test_kernels.py has another, for it imports some of these tests."""
    return 'cpu'


def head_case(dtype, scale=1.0, device='cpu'):
    g = torch.Generator().manual_seed(0)
    hidden = (torch.randn(N, C, generator=g, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()
    weight = torch.randn(PADDED, C, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=g)
    targets[::5] = -1
    return hidden, weight, targets.to(device)


@pytest.fixture
def chunks_of_8(monkeypatch):
    monkeypatch.setattr(losses, 'chunk_rows', lambda *_: 8)


def plain_logits(h, w, dtype):
    """In float64, but rounded as products in `dtype` are, of which float16 is made in float32."""
    logits = (h @ w.T)[:, :V]
    products = torch.float32 if dtype == torch.float16 else dtype
    rounded = (h.detach().to(products) @ w.detach().to(products).T)[:, :V].double()
    return logits + (rounded - logits).detach()


def plain_head(hidden, weight, targets, loss):
    """The same on the CPU in float64, with every logit in memory."""
    h, w = (x.detach().cpu().double().requires_grad_() for x in (hidden, weight))
    log_p = token_log_prob(plain_logits(h, w, hidden.dtype), targets.cpu())[targets.cpu() >= 0]
    total = loss(log_p).sum()
    return total, *torch.autograd.grad(total, (h, w)), log_p


def focal(log_p):
    return -log_p.expm1() ** 2 * log_p


LOSSES = {**{f'T_{n}': partial(taylor_loss, n=n) for n in ORDERS}, 'focal': focal}


@pytest.mark.parametrize('name', ['T_0', 'T_1', 'T_2', 'focal'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3),
                                              (torch.float16, 1e-3)])
@pytest.mark.parametrize('scale', [0.1, 3.0])
def test_fused_head_equals_the_plain_one(name, dtype, tolerance, scale, chunks_of_8, device):
    hidden, weight, targets = head_case(dtype, scale, device)
    total, log_p = linear_loss(hidden, weight, targets, LOSSES[name], vocab_size=V)
    plain_total, grad_hidden, grad_weight, plain_log_p = plain_head(hidden, weight, targets, LOSSES[name])
    grads = torch.autograd.grad(3 * total, (hidden, weight))
    for ours, theirs in zip((*grads, total, log_p[targets >= 0]),
                            (3 * grad_hidden, 3 * grad_weight, plain_total, plain_log_p)):
        assert relative_error(ours, theirs) < tolerance
    assert grads[0][targets < 0].eq(0).all() and grads[1][V:].eq(0).all() and log_p[targets < 0].eq(0).all()
    assert not log_p.requires_grad


@pytest.mark.parametrize('n', ORDERS)
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_known_tokens_keep_their_digits(n, dtype, tolerance):
    """One row at a time, q from 1e-4 to 1, value and gradient on the logits, relative to float64."""
    for q in [*torch.logspace(-4, -0.01, 15).tolist(), 0.82, 0.9]:
        rest = torch.randn(63, generator=torch.Generator().manual_seed(0)).double()
        top = math.log((1 - q) / q) + rest.logsumexp(0)
        logits = torch.cat([top[None], rest]).to(dtype)[None]
        # an identity as the head's weight: the hidden gradient is the gradient on the logits
        hidden = logits.float().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, _ = linear_loss(hidden, torch.eye(64), torch.tensor([0]), partial(taylor_loss, n=n))
        exact = logits.detach().double().requires_grad_()
        odds = exact[0, 1:].logsumexp(0) - exact[0, 0]
        q_exact = odds.detach().sigmoid()
        other = (exact.detach()[0, 1:] - exact.detach()[0, 1:].logsumexp(0)).exp()
        gradient = q_exact ** (n + 1) * torch.cat([-torch.ones(1), other])
        value = series(q_exact, n) if q_exact < .99 else taylor_loss(-F.softplus(odds), n)
        # T_n ~ q^(n+1): its relative error is n + 1 times that of q
        assert relative_error(total, value) < (1e-5 if dtype == torch.float32 else tolerance * (n + 1))
        assert relative_error(torch.autograd.grad(total, hidden)[0][0], gradient) < tolerance * (n + 1)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_a_probability_below_the_smallest_number_keeps_its_logarithm(dtype, tolerance):
    """One row where the target is 300 nats below the best token, beside one that is known."""
    hidden = torch.tensor([[150.0], [-150.0]], dtype=dtype).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype).requires_grad_()
    targets = torch.tensor([1, 1])
    log_p = linear_token_log_prob(hidden, weight, targets)
    assert relative_error(log_p, torch.tensor([-300.0, 0.0])) < tolerance
    total, same = linear_loss(hidden, weight, targets, LOSSES['T_1'])
    assert relative_error(total, torch.tensor(299.0)) < tolerance and torch.equal(same, log_p)
    for output in (log_p.sum(), -total):
        grad, = torch.autograd.grad(output, hidden)
        assert relative_error(grad[:, 0], torch.tensor([-2.0, 0.0])) < tolerance


@pytest.mark.parametrize('rows', [0, N])
def test_no_target_is_a_loss_of_zero_with_gradients_of_zero(rows, device):
    hidden, weight, _ = head_case(torch.float32, device=device)
    nothing = torch.full((rows,), -1, device=device)
    for output in (linear_loss(hidden[:rows], weight, nothing, LOSSES['T_2'])[0],
                   linear_token_log_prob(hidden[:rows], weight, nothing).sum()):
        assert output == 0 and all(g.eq(0).all() for g in torch.autograd.grad(output, (hidden, weight)))


def test_a_nan_reaches_the_gradient(device):
    hidden, weight, targets = head_case(torch.float32, device=device)
    hidden.data[1] = torch.nan
    total, _ = linear_loss(hidden, weight, targets, LOSSES['T_2'], V)
    assert total.isnan() and torch.autograd.grad(total, weight)[0].isnan().any()


def test_no_gradient_is_made_that_is_not_wanted():
    hidden, weight, targets = head_case(torch.float32)
    for function in (lambda h, w: linear_loss(h, w, targets, LOSSES['T_2'], V)[0],
                     lambda h, w: linear_token_log_prob(h, w, targets, V).sum()):
        both = torch.autograd.grad(function(hidden, weight), (hidden, weight))
        assert torch.equal(torch.autograd.grad(function(hidden, weight.detach()), hidden)[0], both[0])
        assert torch.equal(torch.autograd.grad(function(hidden.detach(), weight), weight)[0], both[1])
        with torch.no_grad():
            assert not function(hidden, weight).requires_grad


def test_autocast_runs_products_in_bfloat16_and_returns_float32_gradients(device):
    hidden, weight, targets = head_case(torch.float32, device=device)
    for function in (lambda h, w: linear_loss(h, w, targets, LOSSES['T_0'], V)[0],
                     lambda h, w: -linear_token_log_prob(h, w, targets, V).sum()):
        exact = function(hidden, weight)
        with torch.autocast(device, dtype=torch.bfloat16):
            half = function(hidden, weight)
        torch.testing.assert_close(half, function(hidden.bfloat16(), weight.bfloat16()))
        for a, b in zip(torch.autograd.grad(half, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight))):
            assert a.dtype == torch.float32 and relative_error(a, b.cpu()) < 5e-2


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 8e-3),
                                              (torch.float16, 1e-3)])
@pytest.mark.parametrize('rows', [8, N])  # made again for the backward pass, kept for it
def test_linear_token_log_prob_for_any_upstream_gradient(dtype, tolerance, rows, monkeypatch, device):
    monkeypatch.setattr(losses, 'chunk_rows', lambda *_: rows)
    hidden, weight, targets = head_case(dtype, device=device)
    upstream = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = linear_token_log_prob(hidden, weight, targets, V)
    h, w = (x.detach().cpu().double().requires_grad_() for x in (hidden, weight))
    plain = token_log_prob(plain_logits(h, w, dtype), targets.cpu())
    assert relative_error(ours, plain) < tolerance and ours[targets < 0].eq(0).all()
    exact = torch.autograd.grad(plain, (h, w), upstream)
    for _ in range(2):  # a second backward pass through the same graph gives the same
        for a, b in zip(torch.autograd.grad(ours, (hidden, weight), upstream.to(ours), retain_graph=True), exact):
            assert relative_error(a, b) < tolerance


@pytest.mark.parametrize('loss', [lambda log_p: -log_p.mean(), lambda log_p: log_p.max() - log_p,
                                  lambda log_p: log_p - log_p.mean()])
def test_a_loss_that_mixes_elements_is_refused(loss):
    with pytest.raises(ValueError, match='lambda log_p: .*mixes its elements'):
        linear_loss(*head_case(torch.float32), loss)


def test_a_loss_has_a_name_and_perhaps_a_link():
    assert loss_name(partial(taylor_loss, n=2)) == 'taylor_loss(n=2)' and loss_name(focal) == 'focal'
    square = lambda log_p: log_p ** 2  # noqa: E731
    assert loss_name(square) == 'lambda log_p: log_p ** 2'
    assert [link_order(LOSSES[name]) for name in ('T_0', 'T_2', 'focal')] == [0, 2, 0]


# Rankings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_two_answers_are_bradley_terry(dtype):
    margin = torch.tensor([-1e4, -90, -3, 0, 0.5, 30, 90, 1e4], dtype=dtype)
    ours, theirs = (torch.stack([margin, torch.zeros_like(margin)], -1).requires_grad_() for _ in range(2))
    loss, expected = plackett_luce_loss(ours), -F.logsigmoid(theirs[:, 0] - theirs[:, 1])
    loss.sum().backward(), expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize('n, top', [(0, None), (1, 1), (2, 2)])
@pytest.mark.parametrize('junk', [NAN, -INF, 1e30])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_ragged_equals_separate_and_padding_is_dead(n, top, junk, dtype, rng):
    sizes = [5, 1, 2, 3, 4, 0]
    groups = [4 * normal(rng, k).to(dtype) for k in sizes]
    scores = torch.stack([F.pad(g, (0, 5 - len(g)), value=junk) for g in groups]).requires_grad_()
    valid = torch.arange(5) < torch.tensor(sizes)[:, None]
    loss = plackett_luce_loss(scores, n, valid, top)
    loss.sum().backward()
    assert (plackett_luce_log_prob(scores, valid)[~valid] == 0).all()
    assert (scores.grad[~valid] == 0).all()
    for i, group in enumerate(groups[:-1]):
        alone = group.clone().requires_grad_()
        separate = plackett_luce_loss(alone, n, top=top)
        separate.backward()
        torch.testing.assert_close(loss[i], separate)
        torch.testing.assert_close(scores.grad[i, :len(group)], alone.grad)
    assert loss[1] == 0 and loss[-1] == 0 and (scores.grad[1] == 0).all()


@pytest.mark.parametrize('n', [0, 1, 2])
@pytest.mark.parametrize('K', [2, 3, 5])
def test_all_orders_sum_to_one(K, n, rng):
    scores = 3 * normal(rng, 7, K)
    for top in range(K + 1):
        stages = taylor_loss(plackett_luce_log_prob(scores), n)
        torch.testing.assert_close(plackett_luce_loss(scores, n, top=top), stages[:, :top].sum(-1))
        orders = [[*best, *(set(range(K)) - set(best))] for best in itertools.permutations(range(K), top)]
        total = sum((-plackett_luce_loss(scores[:, order], top=top)).exp() for order in orders)
        torch.testing.assert_close(total, torch.ones(7).double())
    assert torch.equal(plackett_luce_loss(scores, n, top=K), plackett_luce_loss(scores, n))


# Renormalised rewards: groups of many kinds, one row each


def groups(rng, rows=60, K=16):
    x, y = normal(rng, rows, K), normal(rng, rows, K)
    return {'normal': x, 'right-skewed': x.exp(), 'left-skewed': -x.exp(), 'heavy tails': x / y,
            'uniform': x.erf(), 'bimodal': 0.1 * x + y.sign(), 'ties': x.round(), 'few': x[:, :4], 'eight': x[:, :8],
            'many': torch.cat([x, y, x + y, x - y], 1), 'near pairs': torch.cat([x[:, :6], x[:, :6] + 1e-15], 1),
            'offset': 1e3 + x, 'an outlier': torch.cat([x, 1e6 * y[:, :1].abs()], 1)}


KINDS = list(groups(torch.Generator().manual_seed(0), 1))


def moment(x, k):
    return (x ** k).mean(-1)


def basis_of(r):
    """phi_1, phi_2, phi_3 of one group r (K,) with at least four distinct values, by QR -> (3, K)."""
    x = (r - r.mean()) / r.std(correction=0)
    Q, upper = torch.linalg.qr(x[:, None] ** torch.arange(4))
    return (Q * upper.diagonal().sign() * len(r) ** 0.5).T[1:]


def errors(phi, directions, a, monotone):
    """Brute force: E[R^3] - 1 in each direction from phi_1, at each angle a (A,) -> (directions, A).

    NaN where the order is lost: where a difference of neighbours is below 1 % of phi_1's.
    """
    t, a = torch.arange(directions).double() * 2 * math.pi / directions, a[:, None]
    R = a.cos() * phi[0] + a.sin() * (t.cos()[:, None] * phi[1] + t.sin()[:, None] * phi[2])[:, None]
    order = phi[0].argsort()
    lost = (R[..., order].diff() < 0.01 * phi[0, order].diff() - 1e-12).any(-1)
    return (moment(R, 3) - 1).masked_fill(lost & monotone, NAN)


@pytest.mark.parametrize('kind', KINDS)
def test_two_moments_are_whitening(kind, rng):
    reward = groups(rng)[kind]
    R, residual, exact = renormalize_reward(reward)
    expected = (reward - reward.mean(-1, keepdim=True)) / reward.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(R, expected, rtol=1e-9, atol=1e-9)
    assert exact.all() and (residual == 0).all()


@pytest.mark.parametrize('monotone', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_three_moments(kind, monotone, rng):
    reward = groups(rng)[kind]
    R, residual, exact = renormalize_reward(reward, 3, monotone)
    torch.testing.assert_close(moment(R, 1), torch.zeros(len(R)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(moment(R, 2), torch.ones(len(R)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(residual, (moment(R, 3) - 1).abs(), rtol=0, atol=1e-10)
    assert (residual[exact] < 1e-10).all() and (residual[~exact] > 1e-8).all()
    if monotone:
        assert torch.equal(*((x[:, :, None] - x[:, None]).sign() for x in (R, reward)))  # greater where greater
        steps, whitened = (x.gather(1, reward.argsort()).diff() for x in (R, renormalize_reward(reward).reward))
        assert (steps >= 0.01 * whitened - 1e-13).all()


@pytest.mark.parametrize('monotone', [True, False])
@pytest.mark.parametrize('kind', ['normal', 'right-skewed', 'left-skewed', 'heavy tails', 'ties', 'few', 'eight',
                                  'uniform', 'bimodal'])
def test_three_moments_against_a_fine_grid(kind, monotone, rng):
    """c_3 = 0 where that has a solution; else the solution nearest to phi_1 in all directions; else the least error."""
    reward = groups(rng, 6)[kind]
    grids, end = ((2, 20001), (180, 400)) if monotone else ((2, 20001),), math.pi / (2 if monotone else 1)
    for r, R, residual, exact in zip(reward, *renormalize_reward(reward, 3, monotone)):
        if len(r.unique()) < 4:
            continue
        phi = basis_of(r)
        a_1, _, a_3 = phi @ R / len(r)
        for directions, angles in grids:
            error = errors(phi, directions, torch.linspace(0, end, angles).double(), monotone)
            roots = (error[:, 1:] * error[:, :-1] <= 0).nonzero()
            if len(roots):
                break
        least = error.nan_to_num(INF).abs().min()
        if least < 0.02 and not len(roots):
            continue  # the grid cannot tell
        assert bool(exact) == (len(roots) > 0) and (abs(a_3) < 1e-7 or directions == 180)
        if exact:
            nearest = torch.cos(end * (roots[:, 1].min() + 0.5) / (angles - 1))
            assert a_1 > nearest - 0.01 and (directions == 180 or abs(a_1 - nearest) < 1e-3)
        assert residual <= least


KEYWORDS = [dict(n=2), dict(n=3), dict(n=3, monotone=False)]


@pytest.mark.parametrize('kw', KEYWORDS)
def test_no_spread(kw):
    for row in ([0.0] * 4, [-7.5] * 4, [1e6, 1e6 + 0.5, 1e6, 1e6], [0, 1e-7, 0, 0], [1e4 / 3] * 4):
        R, residual, exact = renormalize_reward(torch.tensor([row, [1, 2, 4, 8]]), **kw)
        assert (R[0] == 0).all() and not exact[0] and R[1].std() > 0.5


@pytest.mark.parametrize('kw', KEYWORDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_shape_and_no_gradient(dtype, kw, rng):
    reward = normal(rng, 2, 3, 8).to(dtype).requires_grad_()
    R, residual, exact = renormalize_reward(reward, **kw)
    assert R.dtype == residual.dtype == dtype and exact.dtype == torch.bool and not R.requires_grad
    assert R.shape == (2, 3, 8) and residual.shape == exact.shape == (2, 3)
    torch.testing.assert_close(renormalize_reward(reward[1, 2], **kw).reward, R[1, 2])
    assert kw.get('monotone') is False or ((R.diff() * reward.diff()) >= 0).all()  # rounding may join, never swap


@pytest.mark.parametrize('kw', KEYWORDS)
@pytest.mark.parametrize('value', [NAN, INF])
def test_a_nan_stays_in_its_group(value, kw, rng):
    reward = normal(rng, 3, 8)
    clean = renormalize_reward(reward, **kw)
    reward[1, 4] = value
    R, residual, exact = renormalize_reward(reward, **kw)
    assert R[1].isnan().all() and residual[1].isnan() and not exact[1]
    for mine, other in zip((R, residual, exact), clean):
        assert torch.equal(mine[[0, 2]], other[[0, 2]])


# Policies -------------------------------------------------------------------------------------------------------------


def ragged_mask(rng, B, T):
    start, end = torch.randint(0, T + 1, (2, B, 1), generator=rng).sort(0)[0]
    return (torch.arange(T) >= start) & (torch.arange(T) < end)


@pytest.mark.parametrize('gamma, lam', [(1, 1), (1, 0.95), (0.99, 0.9), (0.9, 0), (0, 0.5)])
def test_gae_is_its_definition(gamma, lam, rng):
    B, T = 12, 9
    reward, value, mask = normal(rng, B, T), normal(rng, B, T), ragged_mask(rng, B, T)
    expected = torch.zeros(B, T).double()
    for b in range(B):
        steps = mask[b].nonzero()[:, 0].tolist()
        v = [value[b, t].item() for t in steps] + [0]
        delta = [reward[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            expected[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(delta)))
    reward[~mask], value[~mask] = NAN, INF
    torch.testing.assert_close(gae(reward, value, mask, gamma, lam), expected, rtol=0, atol=1e-12)


def test_masked_mean(rng):
    x, mask = normal(rng, 5, 7), ragged_mask(rng, 5, 7)
    x[~mask] = NAN
    x.requires_grad_()
    mean = masked_mean(x, mask)
    mean.backward()
    torch.testing.assert_close(mean, x[mask].mean())
    torch.testing.assert_close(x.grad, mask / mask.sum().double())
    assert masked_mean(x, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize('function, x, others, loss, slope', [
    # ratios of 1/2, 1 and 2 at advantages of 2 and -3: where the clip of 0.2 binds there is no slope
    (ppo_policy_loss, [math.log(ratio) - 5 for ratio in [0.5, 1, 2] * 2], ([-5.0] * 6, [2.0] * 3 + [-3.0] * 3),
     [-1, -2, -2.4, 2.4, 3, 6], [-1, -2, 0, 0, 3, 6]),
    # from an old value of 1, within the clip and beyond it, away from the return and towards it
    (ppo_value_loss, [1.1, 2, 2, 0, 0], ([1.0] * 5, [2.0, 3, 0, -1, 2]),
     [0.405, 1.62, 2, 1.62, 2], [-0.9, 0, 2, 0, -2])])
def test_clipped_losses(function, x, others, loss, slope):
    x, *others, loss, slope = (torch.tensor(y, dtype=torch.float64) for y in (x, *others, loss, slope))
    found = function(x.requires_grad_(), *others, clip=0.2)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope)
