"""Every equation of nanoTaylor, one short function each. README, section "Equations", is the index.

Letters: B rows, T tokens, C channels, V vocabulary, N = B * T, G prompts, K answers. All losses are in nats.
"""
import functools
import inspect
import math
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Tokens -----------------------------------------------------------------------------------------------------------


def token_log_prob(logits, targets):
    """log p(target) of every token: logits (..., T, V), targets (..., T) -> (..., T); 0 where the target is -1."""
    ignored = targets < 0
    log_p = F.log_softmax(logits, -1).gather(-1, targets.masked_fill(ignored, 0)[..., None])[..., 0]
    return log_p.masked_fill(ignored, 0.0)


def taylor_loss(log_p, n):
    """T_n = -log p - sum_{k=1..n} q^k / k, with q = 1 - p: cross-entropy without the first n terms of its series.

    log_p (any shape), log-probabilities of tokens or of ranking stages -> the same shape. n = 0 is cross-entropy.
    The gradient is d T_n / d log p = -q^n: that of cross-entropy, each element weighted by (1 - p)^n.
    Exact for the log_p given; a loss that starts from logits should use `linear_loss`, which computes q better.
    Raises ValueError if n is not an integer >= 0.
    """
    return _TaylorLoss.apply(log_p, _order(n))


def _order(n):
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f'the order of a Taylor loss must be an integer n >= 0, not {n!r}')
    return n


class _TaylorLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_p, n):
        exact = log_p.to(torch.promote_types(log_p.dtype, torch.float32))  # bfloat16 has too few digits
        q = -torch.expm1(exact)
        ctx.save_for_backward(q)
        ctx.n = n
        return _taylor_value(exact, q, n).to(log_p.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, = ctx.saved_tensors
        return (-grad * q ** ctx.n).to(grad.dtype), None


def _taylor_value(log_p, q, n):
    """T_n without cancellation: sum_{k>n} q^k / k = q^(n+1) * integral_0^1 s^n / (1 - q s) ds.

    All terms of the Gauss-Legendre sum are positive, so its relative error is that of rounding up to q = 0.8. Above,
    little cancels in -log p - sum_{k<=n} q^k / k, and the value is finite for every finite log p.
    """
    if n == 0:
        return -log_p
    s, w = _gauss_legendre(20 + n // 2, q.dtype, q.device)
    tail = q ** (n + 1) * (w * s ** n / (1 - q.clamp(max=0.8)[..., None] * s)).sum(-1)
    plain = -log_p - sum(q ** k / k for k in range(1, n + 1))
    return torch.where(q <= 0.8, tail, plain)


@functools.cache
def _gauss_legendre(m, dtype, device):
    """Nodes and weights (m,) of Gauss-Legendre quadrature on [0, 1] (Golub and Welsch 1969)."""
    k = torch.arange(1, m, dtype=torch.float64)
    nodes, vectors = torch.linalg.eigh(torch.diag(k / (4 * k * k - 1).sqrt(), 1), UPLO='U')
    return ((nodes + 1) / 2).to(device, dtype), (vectors[0] ** 2).to(device, dtype)


def taylor_link(log_probs, n):
    """log link_n(p), link_n(p)_i = [p_i / (1 - p_i)^n] / sum_j [p_j / (1 - p_j)^n]: (..., V) -> (..., V).

    T_n with n >= 1 is not a proper scoring rule: its minimiser p for a true distribution pi is under-confident, and
    link_n(p) = pi undoes that exactly. n = 0 changes nothing; where p rounds to one-hot, so does the result.
    """
    if _order(n) == 0:
        return log_probs
    # log(1 - p_i): at most one p_i exceeds 1/2, and only for that one log1p(-p_i) loses digits
    top = log_probs.argmax(-1, keepdim=True)
    log_others = log_probs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.log1p(-log_probs.exp()).scatter(-1, top, log_others)
    link = torch.log_softmax(log_probs - n * log_q, -1)
    one_hot = torch.full_like(link, -torch.inf).scatter(-1, top, 0.0)
    return torch.where(log_others == -torch.inf, one_hot, link)


def link_order(loss):
    """n if the loss is T_n with n >= 1, whose under-confidence link_n undoes; 0 for any other loss."""
    if isinstance(loss, functools.partial) and loss.func is taylor_loss:
        return loss.keywords['n']
    return 0


def slope_of(loss, log_p):
    """loss(log_p) and its slope d loss / d log_p, elementwise, by autograd: (N,) -> (N,), (N,). For T_n: T_n, -q^n."""
    with torch.enable_grad():
        log_p = log_p.detach().requires_grad_()
        value = loss(log_p)
        slope, = torch.autograd.grad(value.sum(), log_p)
    return value.detach(), slope


def _slope(loss, log_p):
    """Only the slope of `slope_of`. That of T_n is written out: autograd made a step at 64 channels 3 % slower."""
    if isinstance(loss, functools.partial) and loss.func is taylor_loss:
        return -(-torch.expm1(log_p)) ** loss.keywords['n']
    return slope_of(loss, log_p)[1]


@torch.compiler.disable
def linear_loss(hidden, weight, targets, loss, vocab_size=None):
    """Head and loss in one pass: the sum of loss(log p(target)) under softmax(hidden @ weight.T), and each log p.

    hidden (N, C), weight (V, C), targets (N,) -> total (), log_p (N,). The plain version, compared in a test:

        log_p = token_log_prob(hidden @ weight[:vocab_size].T, targets)
        total = loss(log_p)[targets >= 0].sum()

    loss is any differentiable elementwise function of log p. At most one chunk of the (N, V) logits exists at a time.
    Its gradient is slope * (onehot - softmax), with the slope d loss / d log p from autograd on the chunk's log p. So
    the forward pass computes both gradients (three matrix products), and the backward pass only scales them.
    log_p carries no gradient, and is 0 where the target is -1. It comes from the sum of the OTHER probabilities, so
    that -expm1(log_p) is q = 1 - p with all digits of the dtype. In float32 the gradient of a row of hidden errs by up
    to 1e-5 of its norm at logits of scale 3, by up to 1e-4 at scale 30, from the rounding of the logits.

    vocab_size: ids from here on are padding and have probability 0 (default: none). Products run in the autocast dtype
    if autocast is on, else in hidden's; float16 becomes float32. Sums are kept in float32 or better.
    Raises ValueError if shapes do not fit, or if loss mixes distant elements: it would depend on the chunk.
    """
    _check_elementwise(loss, hidden.device)
    return _LinearLoss.apply(hidden, weight, targets, loss, *_head_options(hidden, weight, targets, vocab_size))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, loss, vocab_size, dtype, wanted):
        w, gradients = weight.to(dtype), _Gradients(hidden, weight, wanted)
        log_ps = [hidden.new_zeros(0, dtype=gradients.exact)]
        for rows, h, error, log_p in _chunks(hidden, w, targets, vocab_size):
            if any(wanted):
                gradients.add(rows, h, w, error, _slope(loss, log_p).masked_fill(targets[rows] < 0, 0.0))
            log_ps.append(log_p)
        ctx.save_for_backward(gradients.hidden, gradients.weight)
        log_p = torch.cat(log_ps)
        total = loss(log_p).masked_fill(targets < 0, 0.0).sum()
        ctx.mark_non_differentiable(log_p)
        return total, log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        # in place, so that autograd rejects a second backward pass
        return *(x if x is None else x.mul_(grad) for x in ctx.saved_tensors), *[None] * 5


@torch.compiler.disable
def linear_token_log_prob(hidden, weight, targets, vocab_size=None):
    """Head and log p(target) in one pass: hidden (N, C), weight (V, C), targets (N,) -> (N,); 0 where the target is -1.

    Differentiable for any upstream gradient. It is not known in the forward pass, so the backward pass recomputes each
    chunk (four matrix products); a single chunk is kept instead. Otherwise as `linear_loss`.
    """
    return _LinearTokenLogProb.apply(hidden, weight, targets, *_head_options(hidden, weight, targets, vocab_size))


class _LinearTokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, dtype, wanted):
        ctx.save_for_backward(hidden, weight, targets)
        chunks, log_ps = _chunks(hidden, weight.to(dtype), targets, vocab_size), []
        for chunk in chunks:
            log_ps.append(chunk[-1])
        ctx.kept = [chunk] if len(log_ps) == 1 else None
        ctx.rest = vocab_size, dtype, wanted
        return torch.cat([hidden.new_zeros(0, dtype=_exact(dtype)), *log_ps])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (hidden, weight, targets), (vocab_size, dtype, wanted) = ctx.saved_tensors, ctx.rest
        w, gradients, grad = weight.to(dtype), _Gradients(hidden, weight, wanted), grad.masked_fill(targets < 0, 0.0)
        for rows, h, error, _ in ctx.kept or _chunks(hidden, w, targets, vocab_size):
            gradients.add(rows, h, w, error, grad[rows])
        return gradients.hidden, gradients.weight, *[None] * 4


def _chunks(hidden, w, targets, vocab_size):
    """Yields rows (a slice), h (R, C), error = softmax - onehot (R, V), log_p (R,) with 0 where the target is -1.

    All errors share one buffer.
    """
    size, error_of = chunk_rows(len(hidden), *w.shape, w.dtype, w.device.type), _error_of(w.device.type)
    buffer = w.new_empty(size, len(w))
    for first in range(0, len(hidden), size):
        rows = slice(first, first + size)
        h, target = hidden[rows].to(w.dtype), targets[rows]
        error = buffer[:len(h)]
        log_p = error_of(h, w, target.clamp(min=0), vocab_size, out=error)
        yield rows, h, error, log_p.masked_fill(target < 0, 0.0)


@functools.cache
def _error_of(device):
    """`plain_error`, or, on CUDA with triton (part of torch on Linux), the kernel that replaces it."""
    if device == 'cuda' and find_spec('triton'):
        from extras import kernels
        return kernels.error_of
    return plain_error


def plain_error(h, w, targets, vocab_size, out):
    """softmax(h @ w.T) - onehot (R, V) into `out`, its padding 0: h (R, C), w (V, C), targets (R,) -> log_p (R,)."""
    torch.mm(h, w.T, out=out)
    out[:, vocab_size:] = -torch.inf
    torch.softmax(out, 1, out=out)
    exact, at_target = _exact(out.dtype), (torch.arange(len(h), device=h.device), targets)
    p = out[at_target].to(exact)
    out[at_target] = 0.0               # not by scatter_, which on a CPU takes longer than the softmax
    q = out.sum(1)                     # 1 - p would lose all digits of q where the model is sure of the target
    out[at_target] = -q
    q = q.to(exact)
    log_p = torch.where(q < 0.5, torch.log1p(-q), p.log())
    lost = p < torch.finfo(exact).tiny
    if lost.any():                     # p underflows: log p from the logits
        log_p[lost] = token_log_prob((h[lost] @ w[:vocab_size].T).to(exact), targets[lost])
    return log_p


class _Gradients:
    """The gradients of hidden and weight, if wanted, summed over chunks in float32 or better."""

    def __init__(self, hidden, weight, wanted):
        self.exact = _exact(weight.dtype)
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight, self.first = torch.empty_like(weight, dtype=self.exact) if wanted[1] else None, True
        if wanted[1] and not len(hidden):
            self.weight.zero_()

    def add(self, rows, h, w, error, slope):
        """Adds the gradients of sum(slope * log p). The slope multiplies an (R, C) tensor, which is cheap."""
        slope = -slope[:, None]
        if self.hidden is not None:
            self.hidden[rows] = error @ w * slope
        if self.weight is None:
            return
        h, first, self.first = (h * slope).to(h.dtype), self.first, False  # the first chunk writes, the others add
        if h.dtype == self.exact or h.is_cuda:
            wider = {} if h.dtype == self.exact else dict(out_dtype=self.exact)
            torch.addmm(self.weight, error.T, h, beta=0.0 if first else 1.0, out=self.weight, **wider)
            return
        for total, part in zip(self.weight.split(4096), error.T.split(4096)):  # added while still in cache
            total.copy_(part @ h) if first else total.add_(part @ h)


def _exact(dtype):
    return torch.promote_types(dtype, torch.float32)


def rows_with_targets(hidden, targets):
    """hidden (..., C), targets (...) on the CPU -> hidden (N, C), targets (N,) with targets >= 0, on hidden's device.

    The indices are computed on the host, so that it does not wait for the GPU.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    rows = (targets >= 0).nonzero()[:, 0]
    if len(rows) < len(targets):
        hidden, targets = hidden.index_select(0, to_device(rows, hidden.device)), targets[rows]
    return hidden, to_device(targets, hidden.device)


def to_device(x, device):
    """x on the CPU -> on the device, through pinned memory, so that the host does not wait for the GPU."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == 'cuda' else x.to(device)


def _head_options(hidden, weight, targets, vocab_size):
    """-> vocabulary without padding, dtype of the products, whether gradients of hidden and of weight are wanted."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f'a linear head takes hidden (N, C), weight (V, C) and targets (N,), not '
                         f'{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}')
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    dtype = torch.float32 if dtype == torch.float16 else dtype  # float16 rounds 1e-8 to 0
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    return vocab_size or len(weight), dtype, wanted


@functools.lru_cache(16)
def _check_elementwise(loss, device):
    """Checks, once per loss, that the losses of two halves are those of the whole."""
    log_p = torch.linspace(-9, -0.1, 8, device=device)
    whole = loss(log_p)
    if whole.shape != log_p.shape or not torch.allclose(whole, torch.cat([loss(part) for part in log_p.split(4)])):
        raise ValueError(f'a loss must be an elementwise function of log p, but {loss_name(loss)} mixes its elements; '
                         'return one value per element, and leave sums and means to linear_loss')


def loss_name(loss):
    """A name for the log, config.json and checkpoints: taylor_loss(n=2), focal, or of a lambda its source."""
    if isinstance(loss, functools.partial):
        arguments = [*map(str, loss.args), *(f'{name}={value}' for name, value in loss.keywords.items())]
        return f'{loss_name(loss.func)}({", ".join(arguments)})'
    name = getattr(loss, '__name__', type(loss).__name__)
    if name == '<lambda>':
        return 'lambda' + inspect.getsource(loss).partition('lambda')[2].partition('  #')[0].rstrip()
    return name


def chunk_rows(N, V, C, dtype, device):
    """Rows per chunk of logits. On a CPU, few enough for its cache, but more for wide models, since each chunk adds to
    a (V, C) gradient, and for small vocabularies (measured on two CPUs). On a GPU 2^28 logits, 512 MiB of bfloat16.
    """
    most = 2 ** 28 // V if device == 'cuda' else max(128, min(8 * C // dtype.itemsize, 1024), 2 ** 20 // V)
    return max(1, min(N, most))


ECE_BINS = 15  # of equal width


def calibration_gaps(confidence, right, lowest=0.0):
    """Sums of confidence - right over bins of the confidence in [lowest, 1]: (N,), (N,) -> (ECE_BINS,), float64.

    The expected calibration error is the sum of their absolute values over N (Guo et al. 2017).
    """
    confidence = confidence.double()  # a NaN makes the sum of its bin NaN
    place = ((confidence.nan_to_num(lowest) - lowest) / (1 - lowest) * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    return torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, place, confidence - right.double())


def entropy(log_p):
    """-sum_v p_v log p_v: (..., V) -> (...), nats. torch.special.entr takes three times as long on a CPU."""
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # 0 * -inf is NaN


def token_statistics(log_p, targets, b=None):
    """(R, V), (R,) -> (R, 4), per token: cross-entropy, whether the likeliest token is the target, its probability,
    entropy. With b = 1/t, also the four columns of `scaled_ce`."""
    confidence, likeliest = log_p.max(1)
    columns = torch.stack([-log_p.gather(1, targets[:, None])[:, 0], (likeliest == targets).to(log_p.dtype),
                           confidence.exp(), entropy(log_p)], 1)
    return columns if b is None else torch.cat([columns, scaled_ce(log_p, targets, b)], 1)


def scaled_ce(log_p, targets, b):
    """Cross-entropy at temperature t = 1/b and its first three derivatives in b: (R, V), (R,) -> (R, 4).

    f(b) = -log softmax(b z)_target for z = log p, so f' = E[z] - z_target, and f'', f''' are the second and the third
    central moment of z, all under softmax(b z). f is convex in b.
    """
    z = log_p.float().clamp(min=-1e4)
    z -= z.gather(1, targets[:, None])
    weight = b * z
    peak = weight.amax(1, keepdim=True)
    weight = weight.sub_(peak).exp_()
    total = weight.sum(1)
    m1, m2, m3 = (weight.mul_(z).sum(1) / total for _ in range(3))  # E[z], E[z^2], E[z^3], with 0 at the target
    return torch.stack([total.log() + peak[:, 0], m1, m2 - m1 ** 2, m3 - 3 * m1 * m2 + 2 * m1 ** 3], 1)


def fitted_scale(chunks):
    """b = 1/t that minimises the sum of `scaled_ce`, by Halley's method from b = 1: [((R, V), (R,)), ...] -> float."""
    b = 1.0
    for _ in range(20):
        step = _step(sum(scaled_ce(*chunk, b).double().sum(0) for chunk in chunks).tolist(), b)
        b += step
        if abs(step) < 0.02 * b:
            break
    return b


def _step(series, b):
    """The step from b to the minimum of f given by its value and derivatives there, by Halley's formula for f' = 0."""
    _, first, second, third = series
    return min(max(-2 * first * second / max(2 * second ** 2 - first * third, 1e-30), -b / 2), b)


def cross_fitted(series, b):
    """Sums of `scaled_ce` at b over two halves, [[f, f', f'', f'''], [...]] -> (cross-entropy, t).

    Each half is scored at the t fitted on the other half (by a step from b, and a Taylor series of f), so that no text
    affects its own temperature. The cross-entropy is the sum over both halves, t the geometric mean. Both are NaN if a
    step is too long for the series.
    """
    steps = [_step(half, b) for half in series]
    if any(abs(d * f3) > f2 for (_, _, f2, f3), d in zip(series, reversed(steps))):
        return math.nan, math.nan  # the cubic term is more than a third of the quadratic one: too far for the series
    ce = sum(f + d * (f1 + d * (f2 / 2 + d * f3 / 6)) for (f, f1, f2, f3), d in zip(series, reversed(steps)))
    return ce, 1 / math.sqrt((b + steps[0]) * (b + steps[1]))


# Rankings ---------------------------------------------------------------------------------------------------------


def implicit_reward(log_p, ref_log_p, beta):
    """s = beta (log pi(y|x) - log pi_ref(y|x)): log-probabilities of whole answers (any shape, nats) -> the same shape.

    Up to a constant per prompt, the reward for which pi is optimal under a KL penalty of strength beta (Rafailov et al.
    2023).
    """
    return beta * (log_p - ref_log_p)


def plackett_luce_log_prob(scores, valid=None):
    """log p_k = s_k - logsumexp_{j>=k} s_j, the k-th choice of a ranking: scores (..., K), best first -> (..., K).

    valid (..., K) bool, the valid answers first; an invalid score may be anything, its stage and gradient are 0.
    The last stage is certain: 0. K = 2 is Bradley-Terry. Plackett 1975; Luce 1959. Plain version:

        log_p = scores - scores.flip(-1).logcumsumexp(-1).flip(-1)
    """
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    # finite, since -inf - -inf is NaN
    lowest = torch.finfo(scores.dtype).min
    # a shift changes no probability, and preserves the digits of large scores
    largest = scores.detach().masked_fill(~valid, lowest).amax(-1, keepdim=True)
    scores = (scores - largest).masked_fill(~valid, lowest)
    worse = scores.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    # logsigmoid also preserves the digits of a nearly certain stage
    log_p = F.pad(F.logsigmoid(scores[..., :-1] - worse), (0, 1))
    return log_p.masked_fill(~valid, 0.0)


def plackett_luce_loss(scores, n=0, valid=None, top=None):
    """sum_k T_n(p_k) over the stages of a ranking: scores (..., K), best first -> (...); log K! at equal scores, n = 0.

    With implicit rewards as scores and n = 0 this is PL-DPO (K = 2: DPO). `valid` as in `plackett_luce_log_prob`.
    top: only the first `top` stages count, as in a partial ranking: the best `top` are in order, the rest are below
    them in unknown order. top = 1 is the choice of the best, -log softmax(scores)_1; None counts all stages.
    """
    return taylor_loss(plackett_luce_log_prob(scores, valid)[..., :top], n).sum(-1)


# Rewards ----------------------------------------------------------------------------------------------------------


class Renormalized(NamedTuple):
    reward: torch.Tensor    # (..., K) R
    residual: torch.Tensor  # (...) |E[R^3] - 1| for n = 3, 0 for n = 2; NaN where a reward is not finite
    exact: torch.Tensor     # (...) bool: the group has spread, and its residual is at most 1e-8


@torch.no_grad()
def renormalize_reward(reward, n=2, monotone=True):
    """R = sum_{k<=n} c_k r^k with E[R] = 0 and E[R^k] = 1 for k = 2..n: reward (..., K) -> Renormalized, no gradient.

    E is the mean over the K answers of a group. n = 2 is whitening. For n = 3, R = a_1 phi_1 + a_2 phi_2 + a_3 phi_3
    with the group's orthonormal polynomials phi and |a| = 1 has the first two moments, and a sets the third.
    monotone: R keeps the order of r; differences between neighbours are at least 1 % of phi_1's. Of all solutions the
    one nearest to phi_1, with c_3 = 0 where that suffices; where there is none, the R with E[R^3] nearest to 1.
    False: the solution with c_3 = 0 nearest to phi_1, which often ranks a worse answer higher.
    Two distinct rewards give phi_1, rewards without spread (std <= 1e-6 max(1, max |r|)) give R = 0.
    Raises ValueError for an n other than 2 and 3.
    """
    if n not in (2, 3):
        raise ValueError(f'renormalised rewards exist for n = 2 and n = 3 only, but got n={n}' + (
            ': E[R] = 0, E[R^2] = 1 and E[R^3] = 1 force E[R^4] >= 2 (kurtosis >= skewness^2 + 1)' if n >= 4 else ''))
    # sorted, so that the order depends on neighbours only; in float64, since E[R^3] cancels
    r, order = reward.double().reshape(-1, reward.shape[-1]).sort(-1)
    phi = _orthonormal_polynomials(r)
    R = whitened = phi[:, 0]
    residual = (0 * R).sum(-1)
    if n == 3:
        R = _third_moment(phi, monotone)
        kept = (phi[:, 1] != 0).any(-1, keepdim=True)  # two distinct values have no phi_2
        if monotone:  # rounding may swap rewards that are nearly equal
            kept &= ((R.diff() > 0) == (whitened.diff() > 0)).all(-1, keepdim=True)
        R = torch.where(kept, R, whitened)
        residual = ((R ** 3).mean(-1) - 1).abs()
    exact = (residual <= 1e-8) & (whitened != 0).any(-1)
    shape, R = reward.shape[:-1], torch.empty_like(R).scatter_(-1, order, R)
    return Renormalized(R.to(reward.dtype).view_as(reward), residual.to(reward.dtype).view(shape), exact.view(shape))


def _orthonormal_polynomials(r):
    """phi_1, phi_2, phi_3 of r over each group: sorted r (G, K) -> (G, 3, K); 0 if too few values are distinct."""
    x = r - r[:, :1]  # first, so that a large offset costs no digits
    x = x - x.mean(-1, keepdim=True)
    std = x.square().mean(-1, keepdim=True).sqrt()
    flat = std <= 1e-6 * r.abs().amax(-1, keepdim=True).clamp(min=1)
    phi = [torch.ones_like(r), torch.where(flat, 0.0, x / std)]
    for _ in range(2):
        v = phi[1] * phi[-1]
        for p in phi + phi:  # Gram-Schmidt; twice is enough
            v = v - (v * p).mean(-1, keepdim=True) * p
        norm = v.square().mean(-1, keepdim=True).sqrt()
        phi.append(torch.where(norm > 1e-12, v / norm, 0.0))
    return torch.stack(phi[1:], 1)


def _third_moment(phi, monotone):
    """R of n = 3 over phi (G, 3, K) -> (G, K): first with c_3 = 0, then in directions t all around phi_1."""
    t = phi.new_tensor([0, torch.pi]).expand(len(phi), 2)
    _, R, residual = _best_direction(phi, t, monotone)
    free = (residual > 1e-8) & (phi[:, 2] != 0).any(-1)
    if monotone and free.any():
        width = torch.pi / 16
        t = width * torch.arange(32).to(phi).expand(int(free.sum()), 32)
        for _ in range(11):  # each time a quarter of the width, around the best
            best, R[free], residual[free] = _best_direction(phi[free], t, monotone)
            t = best + width * torch.linspace(-1, 1, 9).to(phi)
            width /= 4
    return R


def _best_direction(phi, t, monotone):
    """The best R = cos(a) phi_1 + sin(a) (cos(t) phi_2 + sin(t) phi_3), a >= 0, over the directions t (G, D).

    The best is the root of E[R^3] = 1 with the smallest a, or else the least error -> t (G, 1), R (G, K), error (G,).
    """
    phi_1, phi_2, phi_3 = phi[:, :, None].unbind(1)
    v = t.cos()[..., None] * phi_2 + t.sin()[..., None] * phi_3
    end, cells = torch.full_like(t, torch.pi), 512  # many, since two roots may lie close together
    if monotone:  # the order holds while cos(a) + sin(a) slope >= 0.01, for the least slope of v over phi_1
        slope = torch.where(phi_1.diff() > 0, v.diff() / phi_1.diff(), 0.0)
        slope = F.pad(slope, (0, 1)).amin(-1)  # 0 binds nothing, at ties or for K = 1
        end = 2 * torch.atan2(torch.full_like(t, 0.99), (slope ** 2 + 1 - 0.01 ** 2).sqrt() - slope)
        cells = 32
    m0, m1, m2, m3 = ((phi_1 ** (3 - k) * v ** k).mean(-1, keepdim=True) for k in range(4))
    lo, hi = torch.zeros_like(end)[..., None], end[..., None]
    for cells in (cells, *[8] * 11):  # each time into the first cell with a root, or the two around the least error
        a = lo + (hi - lo) * torch.linspace(0, 1, cells + 1).to(phi)
        cos, sin = a.cos(), a.sin()
        error = m0 * cos ** 3 + 3 * m1 * cos ** 2 * sin + 3 * m2 * cos * sin ** 2 + m3 * sin ** 3 - 1
        roots = (error[..., :-1] < 0) != (error[..., 1:] < 0)
        found, least = roots.any(-1, keepdim=True), error.abs().argmin(-1, keepdim=True)
        start = torch.where(found, roots.byte().argmax(-1, keepdim=True), least - 1).clamp(min=0)
        stop = torch.where(found, start, least).add(1).clamp(max=cells)
        lo, hi = a.gather(-1, start), a.gather(-1, stop)
    a = ((lo + hi) / 2)[..., 0]
    best = torch.where(found[..., 0], a - 10, error.abs().amin(-1)).argmin(-1, keepdim=True)  # roots first
    t, a = t.gather(1, best), a.gather(1, best)
    R = a.cos() * phi[:, 0] + a.sin() * (t.cos() * phi[:, 1] + t.sin() * phi[:, 2])
    return t, R, ((R ** 3).mean(-1) - 1).abs()


# Policies ---------------------------------------------------------------------------------------------------------


def masked_mean(x, mask):
    """Mean of x where mask is true (same shapes) -> a scalar; 0 for an empty mask. Values outside it may be NaN."""
    mask = mask.bool()
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def gae(reward, value, mask, gamma, lam):
    """Generalised advantages A_t = sum_{l>=0} (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    reward, value, mask (B, T), the mask contiguous in each row -> (B, T), 0 outside, no gradient.
    The return, which the value is trained on, is A + V. Schulman et al. 2016.
    """
    mask = mask.bool()
    reward, value = reward.masked_fill(~mask, 0.0), value.masked_fill(~mask, 0.0)
    # zero value past the end: the episode is over
    delta = reward + gamma * F.pad(value[:, 1:], (0, 1)) - value
    advantage = torch.zeros_like(delta)
    after = delta.new_zeros(len(delta))
    for t in reversed(range(delta.shape[1])):
        after = torch.where(mask[:, t], delta[:, t] + gamma * lam * after, 0.0)
        advantage[:, t] = after
    return advantage


def ppo_policy_loss(log_p, old_log_p, advantage, clip):
    """-min(rho A, clamp(rho, 1 - clip, 1 + clip) A), rho = p / p_old: elementwise, any shape. Schulman et al. 2017.

    No KL to a reference here: it is part of the reward.
    """
    ratio = (log_p - old_log_p).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def ppo_value_loss(value, old_value, returns, clip):
    """max((V - returns)^2, (V_clipped - returns)^2) / 2, V_clipped within clip of V_old: elementwise, any shape."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return torch.maximum((value - returns) ** 2, (clipped - returns) ** 2) / 2
