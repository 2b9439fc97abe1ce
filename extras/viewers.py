"""Metrics in TensorBoard and in Weights & Biases, in addition to metrics.jsonl: --tensorboard=True, --wandb=True."""
import os
import secrets
from dataclasses import asdict
from pathlib import Path

from runs import write_whole


def viewers(cfg, step):
    """Functions of (event, values) that show metrics elsewhere, from `step` on. None of them prompts the user."""
    found = []
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(Path(cfg.out_dir) / 'tensorboard', purge_step=step + 1)

        def show_in_tensorboard(event, values):
            for name, value in values.items():
                writer.add_scalar(f'{event}/{name}', value, values['step'])
            writer.flush()

        found.append(show_in_tensorboard)
    if cfg.wandb:
        import wandb
        name = Path(cfg.out_dir) / 'wandb.id'  # a resume continues the same curves
        if not name.exists():
            write_whole(name, secrets.token_hex(8))
        logged_in = 'WANDB_MODE' in os.environ or wandb.login(prompt=False)
        run = wandb.init(project='nanotaylor', name=cfg.out_dir, id=name.read_text(), resume='allow', dir=cfg.out_dir,
                         config=asdict(cfg), mode=None if logged_in else 'offline')
        run.define_metric('*', step_metric='step')
        found.append(lambda event, values: run.log(dict(step=values['step'], **{
            f'{event}/{name}': value for name, value in values.items()})))
    return found
