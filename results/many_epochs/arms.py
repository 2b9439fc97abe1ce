"""train.py with what the controls need: python results/many_epochs/arms.py config/toy_t0.py --smooth=0.1 [options]

The options of train.py and three more, of which a run uses one at most. A run here is minutes: start it anew, for a
resume would not restore the average of the weights.
"""
import copy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import prepare_shp  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
from configurator import run  # noqa: E402
from losses import linear_token_log_prob  # noqa: E402
from prepare_shp import VOCABULARIES, lm_batch  # noqa: E402

MASK = VOCABULARIES['bytes']  # the id of a masked token: a row of the embedding that pads the vocabulary


@dataclass(frozen=True)
class Config(train.Config):
    smooth: float = 0.0   # epsilon of label smoothing
    mask: float = 0.0     # share of the input tokens that are masked in training
    average: float = 0.0  # decay of the moving average of the weights, which is what is evaluated


def smoothed_head(hidden, weight, targets, loss, vocab_size, epsilon):
    """As losses.linear_loss: a share of epsilon of the target goes to the whole vocabulary (Szegedy et al. 2016)."""
    log_p = linear_token_log_prob(hidden, weight, targets, vocab_size)
    # mean_v log p_v = mean_v z_v - logsumexp z, and logsumexp z = z_target - log p
    mean_logit, target_logit = ((hidden * row).sum(-1) for row in (weight[:vocab_size].mean(0), weight[targets]))
    mean_log_p = mean_logit - target_logit + log_p
    return ((1 - epsilon) * loss(log_p) - epsilon * mean_log_p).sum(), log_p.detach()


def masked_batch(documents, cut, block_size, seed, step, *rest, rate):
    """As prepare_shp.lm_batch: each input token is masked with probability `rate` (Xie et al. 2017), no target is."""
    idx, targets = lm_batch(documents, cut, block_size, seed, step, *rest)
    uniform = torch.rand(idx.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    return idx.masked_fill(uniform < rate, MASK), targets


def averaging(decay):
    """-> runs.Updates and train.evaluate, with a moving average of the weights (Polyak & Juditsky 1992)."""
    models, evaluate = [], train.evaluate

    class Averaging(runs.Updates):
        def __init__(self, optimizers, modules, cfg, machine):
            super().__init__(optimizers, modules, cfg, machine)
            models.append(copy.deepcopy(modules[0]))

        def clip_and_step(self, step, save_state):
            norm = super().clip_and_step(step, save_state)
            with torch.no_grad():
                for mean, p in zip(models[0].parameters(), self.modules[0].parameters()):
                    mean.lerp_(p, max(1 - decay, 1 / step))  # the plain mean, as long as the average is young
            return norm

    return Averaging, lambda model, *rest: evaluate(models[0], *rest)


def main(cfg):
    if cfg.smooth:
        train.linear_loss = partial(smoothed_head, epsilon=cfg.smooth)
    if cfg.mask:
        prepare_shp.lm_batch = partial(masked_batch, rate=cfg.mask)
    if cfg.average:
        runs.Updates, train.evaluate = averaging(cfg.average)
    train.main(cfg)


if __name__ == '__main__':
    run(main, Config)
