"""Losses beside T_n, to tell the idea from its side effects: train.py with another loss in its place.

    python results/reddit_taylor/arms.py config/t0_shp.py --arm=focal [the options of train.py]

Each is a function of log p of the target and of the mean of log p over the vocabulary; the exact gradient of the former
comes from linear_token_log_prob. The log's train_loss is that of the arm; train_ce and every evaluation are as always.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from configurator import run  # noqa: E402
from losses import TaylorSums, linear_token_log_prob, taylor_loss  # noqa: E402

SMOOTHING = 0.1  # epsilon of label smoothing


def taylor_ce(log_p, _):
    """q + q^2/2: what T_2 drops (Feng et al. 2020)."""
    return -log_p - taylor_loss(log_p, 2)


def focal(log_p, _):
    """-q^2 log p, gamma = 2 (Lin et al. 2017)."""
    return -torch.expm1(log_p) ** 2 * log_p


def dft(log_p, _):
    """Cross-entropy weighted by p, the weight without gradient (Wu et al. 2025)."""
    return -log_p.detach().exp() * log_p


def label_smoothing(log_p, mean_log_p):
    """A share of epsilon of the target goes to the whole vocabulary (Szegedy et al. 2016)."""
    return -(1 - SMOOTHING) * log_p - SMOOTHING * mean_log_p


ARMS = {loss.__name__: loss for loss in (taylor_ce, focal, dft, label_smoothing)}


@dataclass(frozen=True)
class Config(train.Config):
    arm: str = ''  # taylor_ce, focal, dft or label_smoothing

    def check(self):
        yield from super().check()
        if self.arm not in ARMS:
            yield f"arm='{self.arm}' is not one of {', '.join(ARMS)}"
        if self.taylor_order or self.skip_below:
            yield 'an arm takes the place of T_n: taylor_order and skip_below must be 0'


def sums(arm, hidden, weight, targets, n, vocab_size, skip_below=0.0):
    """linear_taylor_loss with an arm's loss; n and skip_below are 0. Its `weight` counts tokens: a mean of 1 is logged.
    """
    hidden, targets = hidden[targets >= 0], targets[targets >= 0]
    log_p = linear_token_log_prob(hidden, weight, targets, vocab_size)
    # mean_v log p_v = mean_v z_v - logsumexp z, and logsumexp z = z_target - log p
    target_logit, mean_logit = ((hidden.to(weight.dtype) * row).sum(-1)
                                for row in (weight[targets], weight[:vocab_size].mean(0)))
    loss = ARMS[arm](log_p, mean_logit - target_logit + log_p).sum()
    return TaylorSums(loss, -log_p.detach().sum(), torch.tensor(float(len(targets)), device=hidden.device), len(targets))


def main(cfg):
    train.linear_taylor_loss = partial(sums, cfg.arm)
    train.main(cfg)


if __name__ == '__main__':
    run(main, Config)
