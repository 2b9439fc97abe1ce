"""Losses beside T_n, to tell the idea from its side effects: train.py with another loss in its place.

    python results/reddit_taylor/arms.py focal [the options of train.py]

Each is a function of log p of the target, whose exact gradient linear_token_log_prob gives. The log's train_loss is
that of the arm; train_ce and every evaluation are as always.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from configurator import run  # noqa: E402
from losses import TaylorSums, linear_token_log_prob, taylor_loss  # noqa: E402

SMOOTHING = 0.1  # epsilon of label smoothing


ARMS = {
    'taylor_ce': lambda log_p: -log_p - taylor_loss(log_p, 2),  # q + q^2/2, what T_2 drops (Feng et al. 2020)
    'focal': lambda log_p: -torch.expm1(log_p) ** 2 * log_p,    # -q^2 log p, gamma = 2 (Lin et al. 2017)
    'dft': lambda log_p: -log_p.detach().exp() * log_p,         # weighted by p (Wu et al. 2025)
    'label_smoothing': lambda log_p: -(1 - SMOOTHING) * log_p}  # and epsilon of the mean of all -log p, below


def sums(arm, hidden, weight, targets, vocab_size):
    """The arm's loss in place of T_n's -> TaylorSums; its weight counts tokens, so that a mean of 1 is logged."""
    hidden, targets = hidden[targets >= 0], targets[targets >= 0]
    log_p = linear_token_log_prob(hidden, weight, targets, vocab_size)
    loss = ARMS[arm](log_p).sum()
    if arm == 'label_smoothing':
        # mean_v log p_v = mean_v z_v - logsumexp z, and logsumexp z = z_target - log p
        target_logit, mean_logit = ((hidden.to(weight.dtype) * row).sum(-1)
                                    for row in (weight[targets], weight[:vocab_size].mean(0)))
        loss = loss - SMOOTHING * (mean_logit - target_logit + log_p).sum()
    count = torch.tensor(float(len(targets)), device=hidden.device)
    return TaylorSums(loss, -log_p.detach().sum(), count, len(targets))


if __name__ == '__main__':
    arm = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1] in ARMS else sys.exit(
        f'error: name one of {", ".join(ARMS)} first: python results/reddit_taylor/arms.py focal --out_dir=out/focal')
    train.linear_taylor_loss = lambda hidden, weight, targets, n, vocab_size, skip_below=0.0: sums(
        arm, hidden, weight, targets, vocab_size)
    run(train.main, train.Config)
