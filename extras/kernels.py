"""The softmax of the head as one Triton kernel. losses.py imports this file on CUDA if triton is installed.

A row of logits is read twice, the second time mostly from the GPU's cache, and written once: no other pass over (R, V).
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


def error_of(h, w, targets, vocab_size, out):
    """What `losses.plain_error` computes, without waiting for the GPU."""
    torch.mm(h, w.T, out=out)
    log_odds = out.new_empty(len(h), dtype=torch.promote_types(out.dtype, torch.float32))
    _error[len(h),](out, targets, log_odds, vocab_size, out.shape[1], block=4096, num_warps=16)
    return F.logsigmoid(log_odds)


@triton.jit
def _error(logits, targets, log_odds, vocab_size, width, block: tl.constexpr):
    """One program per row: log(p / q) of the target; softmax - onehot replaces the logits in place, 0 in the padding.
    """
    exact: tl.constexpr = log_odds.dtype.element_ty
    row, lanes = tl.program_id(0), tl.arange(0, block)
    logits += row.to(tl.int64) * width
    target = tl.load(targets + row)
    z_target = tl.load(logits + target).to(exact)
    # maximum and sum over all but the target, in each lane: 1 - p would lose all digits of q if p is near 1
    top, total = tl.full((block,), -1e30, exact), tl.zeros((block,), exact)
    for first in range(0, vocab_size, block):
        v = first + lanes
        z = tl.load(logits + v, mask=(v < vocab_size) & (v != target), other=-float('inf')).to(exact)
        higher = tl.maximum(top, z)
        total = total * tl.exp(top - higher) + tl.exp(z - higher)
        top = higher
    highest = tl.max(top, 0)
    log_others = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    odds = z_target - log_others
    tl.store(log_odds + row, odds)
    q = 1 / (1 + tl.exp(odds))
    log_all = tl.maximum(z_target, log_others) + tl.log(1 + tl.exp(-tl.abs(odds)))
    for first in range(0, width, block):
        v = first + lanes
        z = tl.load(logits + v, mask=v < vocab_size, other=-float('inf')).to(exact)
        error = tl.where(v == target, -q, tl.exp(z - log_all))
        tl.store(logits + v, error.to(logits.dtype.element_ty), mask=v < width)
