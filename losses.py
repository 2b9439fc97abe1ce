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
        q = -torch.expm1(log_p)
        ctx.save_for_backward(q)
        ctx.n = n
        return _taylor_value(log_p, q, n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, = ctx.saved_tensors
        return -grad * q ** ctx.n, None


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
    """Head and loss in one pass: T_n of softmax(hidden @ weight.T) without ever holding an (N, V) tensor.

    hidden (N, C), weight (V, C), targets (N,) with -1 = ignored -> TaylorSums, sums over the valid rows, in nats.
    Rows go through `chunk_rows` at a time. The gradient on the logits is q^n (p - onehot), and q^n is known as soon
    as the logits are, so the forward pass makes both gradients (three matrix products, nothing recomputed) and the
    backward pass only scales them. Divide `loss` by the count of the whole step, over all ranks and micro-batches.

    vocab_size: ids from here on are padding and have probability 0 (default: V, no padding).
    skip_below: rows with q^n < skip_below * (their chunk's largest q^n) get no gradient; 0 is exact.
    Products run in the autocast dtype where autocast is on, else in hidden's; all else at least in float32.
    Raises ValueError if the shapes do not fit.
    """
    _check_shapes(hidden, weight, targets)
    args = _order(n), vocab_size or len(weight), skip_below, chunk_rows or _chunk_rows(hidden), _product_dtype(hidden)
    return TaylorSums(*_LinearTaylorLoss.apply(hidden, weight, targets, *args), int((targets >= 0).sum()))


class _LinearTaylorLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, n, vocab_size, skip_below, chunk_rows, dtype):
        head = _Head(weight, vocab_size, chunk_rows, dtype)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=head.exact)
        sums = torch.zeros(3, dtype=head.exact, device=hidden.device)
        for rows in (targets >= 0).nonzero()[:, 0].split(chunk_rows):
            h = hidden[rows].to(dtype)
            others, log_p, q = head.softmax_of_others(h, targets[rows])
            q_n = q ** n
            sums += torch.stack([_taylor_value(log_p, q, n).sum(), -log_p.sum(), q_n.sum()])
            if any(ctx.needs_input_grad):
                slope = q_n * q
                if skip_below > 0:
                    keep = q_n >= skip_below * q_n.max()
                    rows, h, others, slope = rows[keep], h[keep], others[keep], slope[keep]
                head.add_gradients(grad_hidden, grad_weight, rows, h, others, slope)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        loss, ce, weight_sum = (s.clone() for s in sums)
        ctx.mark_non_differentiable(ce, weight_sum)
        return loss, ce, weight_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place: a second backward is an error of autograd, not a wrong number
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), *[None] * 6


def linear_token_log_prob(hidden, weight, targets, vocab_size=None, chunk_rows=None):
    """Head and log p(target) in one pass: hidden (N, C), weight (V, C), targets (N,) -> (N,); 0 where the target is -1.

    Differentiable for any upstream gradient: that comes later than the logits, so the backward pass makes each chunk
    again (four matrix products). Options and errors as in `linear_taylor_loss`.
    """
    _check_shapes(hidden, weight, targets)
    args = vocab_size or len(weight), chunk_rows or _chunk_rows(hidden), _product_dtype(hidden)
    return _LinearTokenLogProb.apply(hidden, weight, targets, *args)


class _LinearTokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, chunk_rows, dtype):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.args = vocab_size, chunk_rows, dtype
        head = _Head(weight, *ctx.args)
        result = torch.zeros(len(targets), dtype=head.exact, device=hidden.device)
        for rows in (targets >= 0).nonzero()[:, 0].split(chunk_rows):
            result[rows] = head.softmax_of_others(hidden[rows].to(dtype), targets[rows])[1]
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        vocab_size, chunk_rows, dtype = ctx.args
        head = _Head(weight, *ctx.args)
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=head.exact)
        for rows in (targets >= 0).nonzero()[:, 0].split(chunk_rows):
            h = hidden[rows].to(dtype)
            others, _, q = head.softmax_of_others(h, targets[rows])
            head.add_gradients(grad_hidden, grad_weight, rows, h, others, -grad[rows] * q)
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 4


class _Head:
    """The products of a linear head with a chunk of rows, in buffers that all chunks share."""

    def __init__(self, weight, vocab_size, chunk_rows, dtype):
        self.weight, self.vocab_size = weight.to(dtype), vocab_size
        self.exact = torch.promote_types(dtype, torch.float32)
        self.logits = weight.new_empty(chunk_rows, len(weight), dtype=dtype)
        self.others = self.logits if dtype == self.exact else self.logits.to(self.exact)

    def softmax_of_others(self, h, targets):
        """h (R, C), targets (R,) -> p_j / q over the tokens j that are not the target (R, V), log p (R,), q (R,).

        q is the sum of the OTHER probabilities, q = sigmoid(lse_others - z_target): 1 - p would lose all digits of
        it where the model knows the token. With it the gradient is q^(n+1) (p_j / q), and -q^(n+1) at the target.
        """
        logits, others = self.logits[:len(h)], self.others[:len(h)]
        torch.mm(h, self.weight.T, out=logits)
        if others is not logits:
            others.copy_(logits)
        targets = targets[:, None]
        z_target = others.gather(1, targets)[:, 0]
        others.scatter_(1, targets, -torch.inf)[:, self.vocab_size:] = -torch.inf
        top = others.amax(1)
        torch.softmax(others, 1, out=others)
        gap = top - others.amax(1).log() - z_target  # the log-odds against the target
        others.scatter_(1, targets, -1.0)            # p_j / q - onehot, up to the factor q of both
        if others is not logits:
            logits.copy_(others)
        return logits, F.logsigmoid(-gap), torch.sigmoid(gap)

    def add_gradients(self, grad_hidden, grad_weight, rows, h, others, slope):
        """Gradients of sum(slope * (z_others - z_target)) averaged over the others; the slope enters at (R, C) size."""
        slope = slope[:, None]
        grad_hidden[rows] = (others @ self.weight * slope).to(grad_hidden.dtype)
        h = (h * slope).to(h.dtype)
        if h.dtype == grad_weight.dtype:
            grad_weight.addmm_(others.T, h)
        else:
            grad_weight += others.T @ h


def _check_shapes(hidden, weight, targets):
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f'a linear head takes hidden (N, C), weight (V, C) and targets (N,), but got '
                         f'{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}')


def _order(n):
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f'the order of a Taylor loss is an integer n >= 0, but got {n!r}')
    return n


def _chunk_rows(hidden):
    # few rows keep a chunk of logits in cache; a wide model needs more, for each chunk adds to the (V, C) gradient once
    return min(max(hidden.shape[1], 128), 1024)


def _product_dtype(hidden):
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
