"""Losses beside T_n, to separate the idea from its side effects: train.py with another loss.

    python results/reddit_taylor/arms.py config/t0_shp.py --arm=focal [the options of train.py]

The log's train_loss is that of the arm; train_ce and every evaluation are as always.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from configurator import run  # noqa: E402
from losses import linear_token_log_prob, taylor_loss  # noqa: E402

SMOOTHING = 0.1  # epsilon of label smoothing


def taylor_ce(log_p):
    """q + q^2/2: what T_2 drops (Feng et al. 2020)."""
    return -log_p - taylor_loss(log_p, 2)


def focal(log_p):
    """-q^2 log p, gamma = 2 (Lin et al. 2017)."""
    return -torch.expm1(log_p) ** 2 * log_p


def dft(log_p):
    """Cross-entropy weighted by p, the weight without gradient (Wu et al. 2025)."""
    return -log_p.detach().exp() * log_p


def label_smoothing(log_p):
    """The target's part of label smoothing, which the log shows; smoothed_head adds the rest."""
    return -(1 - SMOOTHING) * log_p


def smoothed_head(hidden, weight, targets, loss, vocab_size):
    """As losses.linear_loss: a share of epsilon of the target goes to the whole vocabulary (Szegedy et al. 2016)."""
    log_p = linear_token_log_prob(hidden, weight, targets, vocab_size)
    # mean_v log p_v = mean_v z_v - logsumexp z, and logsumexp z = z_target - log p
    mean_logit, target_logit = ((hidden * row).sum(-1) for row in (weight[:vocab_size].mean(0), weight[targets]))
    mean_log_p = mean_logit - target_logit + log_p
    return (loss(log_p) - SMOOTHING * mean_log_p).sum(), log_p.detach()


ARMS = {loss.__name__: loss for loss in (taylor_ce, focal, dft, label_smoothing)}


@dataclass(frozen=True)
class Config(train.Config):
    arm: str = ''  # taylor_ce, focal, dft or label_smoothing

    choices = dict(arm=tuple(ARMS))

    def check(self):
        yield from super().check()
        if self.taylor_order:
            yield 'an arm takes the place of T_n; use taylor_order=0'


def main(cfg):
    if cfg.arm == 'label_smoothing':  # no function of log p alone
        train.linear_loss = smoothed_head
    train.main(cfg, ARMS[cfg.arm])


if __name__ == '__main__':
    run(main, Config)
