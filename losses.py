"""Every equation of nanoTaylor, one short function each. README, section "Equations", is the index.

Letters: B rows, T tokens, C channels, V vocabulary, N = B * T, G prompts, K answers. All losses are in nats.
"""
import functools
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
    The gradient is closed, d T_n / d log p = -q^n: cross-entropy, each element weighted by (1 - p)^n.
    Exact for the log_p given; a loss that starts from logits should use `linear_taylor_loss`, which knows q better.
    Raises ValueError if n is not an integer >= 0.
    """
    return _TaylorLoss.apply(log_p, _order(n))


class _TaylorLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_p, n):
        exact = log_p.to(torch.promote_types(log_p.dtype, torch.float32))  # bfloat16 has too few digits on the way
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

    Every term of the Gauss-Legendre sum is positive, so it is exact to rounding, relative to itself, up to q = 0.8;
    above, little cancels in -log p - sum_{k<=n} q^k / k, and p -> 0 stays finite for as long as log p is.
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
    # log(1 - p_i): at most one p_i exceeds 1/2, and only there would log1p(-p_i) cancel
    top = log_probs.argmax(-1, keepdim=True)
    log_others = log_probs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.log1p(-log_probs.exp()).scatter(-1, top, log_others)
    link = torch.log_softmax(log_probs - n * log_q, -1)
    one_hot = torch.full_like(link, -torch.inf).scatter(-1, top, 0.0)
    return torch.where(log_others == -torch.inf, one_hot, link)


class TaylorSums(NamedTuple):
    loss: torch.Tensor    # sum of T_n over the valid rows; the only field that carries gradient
    ce: torch.Tensor      # sum of -log p
    weight: torch.Tensor  # sum of q^n
    count: int            # valid rows


def linear_taylor_loss(hidden, weight, targets, n, vocab_size=None, skip_below=0.0, chunk_rows=None):
    """Head and loss in one pass: T_n of softmax(hidden @ weight.T), and of its (N, V) no more than a chunk.

    hidden (N, C), weight (V, C), targets (N,) with -1 = ignored -> TaylorSums, sums over the valid rows, in nats.
    Rows go through `chunk_rows` at a time. The gradient on the logits is q^n (p - onehot), and q^n is known as soon
    as the logits are, so the forward pass makes both gradients (three matrix products, nothing recomputed) and the
    backward pass only scales them. Divide `loss` by the count of the whole step, over all ranks and micro-batches.

    vocab_size: ids from here on are padding and have probability 0 (default: V, no padding).
    skip_below: rows with q^n < skip_below * (their chunk's largest q^n) get no gradient, except for up to 31 a chunk
    that cost nothing; 0 is exact.
    Products run in the autocast dtype where autocast is on, else in hidden's, and so does the softmax (float16: in
    float32); sums and the gradient of the weight are kept at least in float32.
    Raises ValueError if the shapes do not fit.
    """
    _check_shapes(hidden, weight, targets)
    options = _head_options(hidden, weight, vocab_size, chunk_rows)
    return TaylorSums(*_LinearTaylorLoss.apply(hidden, weight, targets, _order(n), skip_below, options,
                                               torch.is_grad_enabled()))


class _LinearTaylorLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, n, skip_below, options, grad_enabled):
        head = _Head(hidden, weight, targets, *options)
        wanted = [needed and grad_enabled for needed in ctx.needs_input_grad[:2]]
        probabilities = []
        for rows, h, error, p, q in head.chunks():
            probabilities.append((p, q))
            if any(wanted):
                q_n = q ** n
                if skip_below > 0:
                    front, error = _largest_to_front(q_n, skip_below, error)
                    rows, h, q, q_n = rows[front], h[front], q[front], q_n[front]
                head.add_gradients(wanted, rows, h, error, q, q_n)
        log_p, q = head.log_prob(probabilities)
        ctx.save_for_backward(*head.gradients(wanted))
        loss, ce, weight_sum = _taylor_value(log_p, q, n).sum(), -log_p.sum(), (q ** n).sum()
        ctx.mark_non_differentiable(ce, weight_sum)
        return loss, ce, weight_sum, len(log_p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        # in place: a second backward is an error of autograd, not a wrong number
        return *(x if x is None else x.mul_(grad) for x in ctx.saved_tensors), *[None] * 5


def _largest_to_front(weights, share, error):
    """Drops the rows of error (R, V) whose weight is below `share` of the largest -> which rows stay, and they.

    In place: kept rows from behind move to where dropped ones were. Their number is a multiple of 32, since matrix
    products of ever new shapes are slow.
    """
    count = int((~(weights < share * weights.max())).sum())  # a NaN is kept, and seen by whoever checks the gradient
    count = min(len(weights), -(-count // 32) * 32)
    kept = torch.zeros_like(weights, dtype=torch.bool)
    kept[weights.topk(count).indices] = True
    front, free = torch.arange(count, device=weights.device), (~kept[:count]).nonzero()[:, 0]
    front[free] = kept[count:].nonzero()[:, 0] + count
    error[free] = error[front[free]]
    return front, error[:count]


def linear_token_log_prob(hidden, weight, targets, vocab_size=None, chunk_rows=None):
    """Head and log p(target) in one pass: hidden (N, C), weight (V, C), targets (N,) -> (N,); 0 where the target is -1.

    Differentiable for any upstream gradient: that comes later than the logits, so the backward pass makes each chunk
    again (four matrix products), unless there is but one, which is kept. Options and errors as in `linear_taylor_loss`.
    """
    _check_shapes(hidden, weight, targets)
    options = _head_options(hidden, weight, vocab_size, chunk_rows)
    return _LinearTokenLogProb.apply(hidden, weight, targets, options)


class _LinearTokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, options):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options = options
        head = _Head(hidden, weight, targets, *options)
        probabilities = []
        for chunk in head.chunks():
            *_, p, q = chunk
            probabilities.append((p, q))
        ctx.kept = (head, [chunk]) if len(probabilities) == 1 else None
        result = torch.zeros(len(targets), dtype=head.exact, device=hidden.device)
        result[head.rows] = head.log_prob(probabilities)[0]
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:2]
        if ctx.kept is None:
            head = _Head(*ctx.saved_tensors, *ctx.options)
            chunks = head.chunks()
        else:
            head, chunks = ctx.kept
        for rows, h, error, _, q in chunks:
            head.add_gradients(wanted, rows, h, error, q, -grad[rows])
        return *head.gradients(wanted), None, None


class _Head:
    """A linear head on the rows that have a target, chunk by chunk, in buffers that all chunks share."""

    def __init__(self, hidden, weight, targets, vocab_size, chunk_rows, dtype):
        self.hidden, self.weight, self.targets, self.vocab_size = hidden, weight.to(dtype), targets, vocab_size
        self.rows = (targets >= 0).nonzero()[:, 0]
        self.chunk_rows = max(1, min(chunk_rows, len(self.rows)))
        self.exact = torch.promote_types(dtype, torch.float32)
        self.logits = weight.new_empty(self.chunk_rows, len(weight), dtype=dtype)
        # float16 holds no probability of 1e-8: its softmax is made in float32
        self.error = torch.empty_like(self.logits, dtype=self.exact) if dtype == torch.float16 else self.logits
        self.weight_dtype = weight.dtype
        self.grad_hidden = self.grad_weight = None  # made by the first chunk; the sum over chunks at least in float32

    def chunks(self):
        """Yields rows (R,) with a target, h (R, C), softmax - onehot (R, V), p (R,) of the target, q (R,).

        q is the sum of the OTHER probabilities: 1 - p would lose all digits of it where the model knows the token. It
        stands at the target too, as -q. A softmax in place and one sum are the work at (R, V) size beside products.
        """
        for rows in self.rows.split(self.chunk_rows) if len(self.rows) else []:
            h, logits, error = self.hidden[rows].to(self.weight.dtype), self.logits[:len(rows)], self.error[:len(rows)]
            at_target = torch.arange(len(rows), device=rows.device), self.targets[rows]
            torch.mm(h, self.weight.T, out=logits)
            if self.error is not self.logits:
                error.copy_(logits)
            error[:, self.vocab_size:] = -torch.inf
            torch.softmax(error, 1, out=error)
            p = error[at_target].to(self.exact)
            error[at_target] = 0.0  # not by scatter_, which on a CPU takes longer than the softmax
            q = error.sum(1)
            error[at_target] = -q.to(error.dtype)
            yield rows, h, error, p, q.to(self.exact)

    def add_gradients(self, wanted, rows, h, error, q, slope):
        """Adds the gradients of sum(slope * -log p), of hidden and of weight where wanted; the slope enters at (R, C).
        """
        slope, scale = slope[:, None], None
        if h.dtype == torch.float16:  # it holds neither a small probability nor a small slope: divide both by their top
            tiny = torch.finfo(self.exact).tiny
            error = torch.div(error, q.clamp(min=tiny)[:, None], out=self.logits[:len(rows)])
            slope = slope * q[:, None]
            scale = slope.abs().amax().clamp(min=tiny)
        if wanted[0]:
            if self.grad_hidden is None:
                self.grad_hidden = torch.zeros_like(self.hidden)
            self.grad_hidden[rows] = (error @ self.weight * slope).to(self.hidden.dtype)
        if not wanted[1]:
            return
        h = (h * (slope if scale is None else slope / scale)).to(h.dtype)
        first = self.grad_weight is None
        if first:
            self.grad_weight = torch.empty_like(self.weight, dtype=self.exact)
        if h.dtype == self.exact:
            torch.addmm(self.grad_weight, error.T, h, beta=0.0 if first else 1.0, out=self.grad_weight)
            return
        # on a CPU by pieces of the vocabulary: a product is added while it is in cache, and takes little memory
        size = 4096 if h.device.type == 'cpu' else len(self.weight)
        for total, part in zip(self.grad_weight.split(size), error.T.split(size)):
            product = part @ h if scale is None else (part @ h) * scale
            total.copy_(product) if first else total.add_(product)

    def gradients(self, wanted):
        """-> those of hidden and weight, None where not wanted; forgets them, for a second pass begins anew."""
        hidden, weight, self.grad_hidden, self.grad_weight = self.grad_hidden, self.grad_weight, None, None
        if wanted[0] and hidden is None:
            hidden = torch.zeros_like(self.hidden)
        if wanted[1]:
            weight = torch.zeros_like(self.weight) if weight is None else weight
            weight = weight.to(self.weight_dtype)
        return hidden, weight

    def log_prob(self, probabilities):
        """[(p, q) of each chunk] -> log p (M,), q (M,) of the rows with a target, to the digits of the softmax."""
        if not probabilities:
            none = self.hidden.new_zeros(0, dtype=self.exact)
            return none, none
        p, q = (torch.cat(parts) for parts in zip(*probabilities))
        log_p = torch.where(q < 0.5, torch.log1p(-q), p.log())
        q = torch.where(q < 0.5, q, 1 - p)  # of one rounding with log p: T_n subtracts the one from the other
        # below the smallest number the logits still tell
        lost = (p < torch.finfo(p.dtype).tiny).nonzero()[:, 0]
        for part in lost.split(self.chunk_rows) if len(lost) else []:
            rows = self.rows[part]
            logits = self.hidden[rows].to(self.weight.dtype) @ self.weight[:self.vocab_size].T
            log_p[part] = token_log_prob(logits.to(self.exact), self.targets[rows])
        return log_p, q


def _check_shapes(hidden, weight, targets):
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f'a linear head takes hidden (N, C), weight (V, C) and targets (N,), but got '
                         f'{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}')


def _order(n):
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f'the order of a Taylor loss is an integer n >= 0, but got {n!r}')
    return n


def chunk_rows_for(N, V, C, dtype, device='cpu'):
    """Rows of a chunk of logits, measured on two CPUs: few keep it in cache (128 are 25 MB of float32 at gpt2's V); a
    wide model needs more, for each chunk adds to the (V, C) gradient once, up to 1024; and so does a small vocabulary,
    whose chunks would cost more in calls than in arithmetic. A GPU waits for calls first: chunks as large as its memory
    does not feel (2^28 logits are 512 MiB of bfloat16).
    """
    if device == 'cuda':
        return max(1, min(N, 2 ** 28 // V))
    return max(1, min(N, max(128, min(8 * C // dtype.itemsize, 1024), 2 ** 20 // V)))


def _head_options(hidden, weight, vocab_size, chunk_rows):
    """-> real vocabulary, rows of a chunk, dtype of the products: the autocast dtype where autocast is on."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return vocab_size or len(weight), chunk_rows or chunk_rows_for(len(hidden), *weight.shape, dtype, device), dtype


# Rankings ---------------------------------------------------------------------------------------------------------


def implicit_reward(log_p, ref_log_p, beta):
    """s = beta (log pi(y|x) - log pi_ref(y|x)): log-probabilities of whole answers (any shape, nats) -> the same shape.

    Up to a constant per prompt, minus the energy that pi minimises under a KL penalty of strength beta
    (Rafailov et al. 2023).
    """
    return beta * (log_p - ref_log_p)


def plackett_luce_log_prob(scores, valid=None):
    """log p_k = s_k - logsumexp_{j>=k} s_j, the k-th choice of a ranking: scores (..., K), best first -> (..., K).

    valid (..., K) bool, the valid answers first; an invalid score may hold anything, its stage and gradient are 0.
    The last stage is certain: 0. K = 2 is Bradley-Terry. Plackett 1975; Luce 1959.
    """
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    # finite, for -inf - -inf is NaN
    lowest = torch.finfo(scores.dtype).min
    # a shift changes no probability, and large scores keep their digits
    top = scores.detach().masked_fill(~valid, lowest).amax(-1, keepdim=True)
    scores = (scores - top).masked_fill(~valid, lowest)
    worse = scores.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    # logsigmoid: a stage that is nearly certain keeps its digits too
    log_p = F.pad(F.logsigmoid(scores[..., :-1] - worse), (0, 1))
    return log_p.masked_fill(~valid, 0.0)


def plackett_luce_loss(scores, n=0, valid=None, top=None):
    """sum_k T_n(p_k) over the stages of a ranking: scores (..., K), best first -> (...); log K! at equal scores, n = 0.

    With implicit rewards as scores and n = 0 this is PL-DPO (K = 2: DPO). `valid` as in `plackett_luce_log_prob`.
    top: only the first `top` stages count, a partial ranking: the best `top` are in order, the rest lie below them in
    no known order. top = 1 is the choice of the best, -log softmax(scores)_1; None counts all stages.
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
    # sorted, so that the order is a matter of neighbours; in float64, for E[R^3] cancels
    r, order = reward.double().reshape(-1, reward.shape[-1]).sort(-1)
    phi = _orthonormal_polynomials(r)
    R = whitened = phi[:, 0]
    residual = (0 * R).sum(-1)
    if n == 3:
        R = _third_moment(phi, monotone)
        kept = (phi[:, 1] != 0).any(-1, keepdim=True)  # two distinct values have no phi_2
        if monotone:  # rewards that are as good as equal may change places by rounding
            kept &= ((R.diff() > 0) == (whitened.diff() > 0)).all(-1, keepdim=True)
        R = torch.where(kept, R, whitened)
        residual = ((R ** 3).mean(-1) - 1).abs()
    exact = (residual <= 1e-8) & (whitened != 0).any(-1)
    shape, R = reward.shape[:-1], torch.empty_like(R).scatter_(-1, order, R)
    return Renormalized(R.to(reward.dtype).view_as(reward), residual.to(reward.dtype).view(shape), exact.view(shape))


def _orthonormal_polynomials(r):
    """phi_1, phi_2, phi_3 of r over each group: sorted r (G, K) -> (G, 3, K); 0 where distinct values run out."""
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
        for _ in range(11):  # each time into a quarter of the width, around the best
            best, R[free], residual[free] = _best_direction(phi[free], t, monotone)
            t = best + width * torch.linspace(-1, 1, 9).to(phi)
            width /= 4
    return R


def _best_direction(phi, t, monotone):
    """The best R = cos(a) phi_1 + sin(a) (cos(t) phi_2 + sin(t) phi_3), a >= 0, over the directions t (G, D).

    That is the root of E[R^3] = 1 with the smallest a, or else the least error -> t (G, 1), R (G, K), error (G,).
    """
    phi_1, phi_2, phi_3 = phi[:, :, None].unbind(1)
    v = t.cos()[..., None] * phi_2 + t.sin()[..., None] * phi_3
    end, cells = torch.full_like(t, torch.pi), 512  # many, for two roots may lie close together
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
    """Mean of x where mask: both of one shape -> a scalar; 0 where nothing is. What lies outside may even be NaN."""
    mask = mask.bool()
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def gae(reward, value, mask, gamma, lam):
    """Generalised advantages A_t = sum_{l>=0} (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t.

    reward, value, mask (B, T), the mask one stretch of each row -> (B, T), 0 outside, no gradient.
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
