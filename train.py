"""Trains a GPT on text with a Taylor loss T_n. Read it top to bottom.

    python train.py config/toy_t2.py                              # embedded data, any CPU
    torchrun --nproc_per_node=8 train.py config/t2_shp.py         # stanfordnlp/SHP on 8 GPUs
"""
import contextlib
import math
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch.nn.parallel import DistributedDataParallel

import prepare_shp
from configurator import Refusal, at_least, at_most, progress, run
from losses import linear_taylor_loss, taylor_link
from model import GPT, GPTConfig, logit_rows
from runs import (SHAPE, Metrics, RunConfig, StopSignal, Updates, check_resume, checkpoints, describe, entries, finish,
                  load_checkpoint, lr_at, matmul_peak, not_own_folder, open_run, open_start, restoring,
                  save_checkpoint, seed_everything, setup, start_files)

ECE_BINS = 15              # of equal width, over the confidence of the likeliest token


@dataclass(frozen=True)
class Config(RunConfig):
    batch_size: int = 32          # global, in sequences; ranks and micro-batches share it
    micro_batch_size: int = 0     # per rank, in sequences, as memory allows; 0 = the rank's whole share
    block_size: int = 128         # tokens of context; a start's is cropped to it
    init_from: str = ''           # start from gpt2, ..., gpt2-xl, a Hugging Face folder or a run; '' = random weights
    cut: str = 'stream'           # stream: random windows of packed text; examples: each document from its start
    max_iters: int = 1000         # steps in all, unless epochs is set
    epochs: float = 0.0           # passes over the training text; 0 = max_iters counts
    n_layer: int = 2              # transformer blocks; with init_from, all that makes the shape is the start's
    n_head: int = 2               # attention heads; divides n_embd
    n_embd: int = 128             # channels
    dropout: float = 0.0          # in the residual stream and in attention
    bias: bool = True             # in linear layers and LayerNorms
    tie_weights: bool = True      # the head is the token embedding
    taylor_order: int = 0         # n of T_n; 0 = cross-entropy
    skip_below: float = 0.0       # tokens with q^n below this share of their chunk's largest get no gradient; 0 = exact
    probe_interval: int = 0       # steps between looks at batch_size sequences spread over eval_split; 0 = none

    def check(self):
        yield from super().check()
        if self.cut not in ('stream', 'examples'):
            yield f"cut='{self.cut}' is not one of stream, examples"
        yield from at_least(self, 1, 'batch_size', 'block_size', 'max_iters', 'n_layer', 'n_head', 'n_embd')
        yield from at_least(self, 0, 'micro_batch_size', 'epochs', 'taylor_order', 'skip_below', 'dropout',
                            'probe_interval')
        yield from at_most(self, 1000, 'taylor_order')
        yield from at_most(self, 10 ** 9, 'max_iters')
        yield from at_most(self, 10 ** 6, 'batch_size')
        if self.dropout >= 1:
            yield f'dropout={self.dropout} drops everything; it is a probability below 1'
        yield from at_most(self, 1, 'skip_below')
        if self.n_head >= 1 and self.n_embd % self.n_head:
            yield f'n_embd={self.n_embd} does not divide by n_head={self.n_head}; pick a multiple of {self.n_head}'


@torch.no_grad()
def evaluate(model, documents, cfg, machine, order, stop):
    """One complete pass over `documents`, shared among ranks -> the metrics of an 'eval' line; None if stopped.

    Per token: cross-entropy of p and of link_n(p) in nats, top-1 accuracy, expected calibration error of both (Guo et
    al. 2017: sum over bins of |accuracy - confidence|, weighted by the bin's share), the mean entropy of both where
    the likeliest token is wrong; under split='row' cross-entropy of documents identical to a training document and of
    the others apart.
    """
    model.eval()
    count = prepare_shp.eval_length(documents, cfg.cut, cfg.block_size)
    size = min(cfg.micro_batch_size or cfg.batch_size, 64)
    sums = torch.zeros(8, dtype=torch.float64)
    bins = torch.zeros(2, 3, ECE_BINS, dtype=torch.float64)  # (p, link) x (tokens, confidence, correct) x bins
    for first in progress(range(machine.rank * size, count, machine.world_size * size), 'evaluating', machine.print):
        idx, targets, leaked = prepare_shp.eval_batch(documents, cfg.cut, cfg.block_size,
                                                      range(first, min(first + size, count)))
        if stop.number:
            break
        with machine.autocast():
            hidden = model(idx.to(machine.device))
            valid = targets.reshape(-1) >= 0
            hidden = hidden.flatten(0, 1)[valid.to(machine.device)]
            targets, leaked = targets.reshape(-1)[valid].to(machine.device), leaked.reshape(-1)[valid]
            for h, target, known in zip(*(x.split(logit_rows(model)) for x in (hidden, targets[:, None], leaked))):
                log_p = model.logits(h).log_softmax(-1)
                tokens = [(log.gather(1, target)[:, 0], *log.max(1), torch.special.entr(log.exp()).sum(1))
                          for log in ((log_p, taylor_link(log_p, order)) if order else (log_p,))]
                tokens = [tokens[0], tokens[-1]]  # T_0's link is p itself
                ce, ce_link = (-at_target.cpu().double() for at_target, *_ in tokens)
                right = (tokens[0][2] == target[:, 0]).cpu().double()
                entropy, entropy_link = ((1 - right) @ entropy.cpu().double() for *_, entropy in tokens)
                sums += torch.stack([torch.tensor(float(len(h))), ce.sum(), ce_link.sum(), right.sum(), entropy,
                                     entropy_link, known.sum(), ce[known].sum()])
                for b, (_, top, *_) in zip(bins, tokens):
                    confidence = top.exp().cpu().double().nan_to_num(0.0)  # of a model that is no more: its CE says so
                    bin = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
                    for row, x in zip(b, (torch.ones_like(confidence), confidence, right)):
                        row.index_add_(0, bin, x)
    model.train()
    stopped, n, ce, ce_link, right, entropy, entropy_link, n_leaked, ce_leaked, *bins_ = machine.sum(
        [stop.number, *sums.tolist(), *bins.flatten().tolist()])
    if stopped:
        return None
    bins = torch.tensor(bins_, dtype=torch.float64).view_as(bins)
    ece = ((bins[:, 1] - bins[:, 2]).abs().sum(-1) / n).tolist()
    wrong = max(n - right, 1)
    metrics = dict(val_ce=ce / n, val_ce_link=ce_link / n, val_accuracy=right / n, val_ece=ece[0], val_ece_link=ece[1],
                   val_entropy_wrong=entropy / wrong, val_entropy_wrong_link=entropy_link / wrong)
    if cfg.split == 'row' and 0 < n_leaked < n:
        metrics |= dict(val_ce_leaked=ce_leaked / n_leaked, val_ce_clean=(ce - ce_leaked) / (n - n_leaked))
    return metrics


@torch.no_grad()
def probe(model, documents, cfg, machine):
    """Cross-entropy of p, nats per token, over batch_size sequences spread over a split: cheap, and a fixed sample."""
    length = prepare_shp.eval_length(documents, cfg.cut, cfg.block_size)
    count = min(cfg.batch_size, length)
    share = [i * length // count for i in range(count)][machine.rank::machine.world_size]
    idx, targets, _ = prepare_shp.eval_batch(documents, cfg.cut, cfg.block_size, share)
    model.eval()
    with machine.autocast():
        sums = linear_taylor_loss(model(idx.to(machine.device)).flatten(0, 1), model.lm_head.weight,
                                  targets.flatten().to(machine.device), 0, model.config.vocab_size)
    model.train()
    ce, n = machine.sum([float(sums.ce), int((targets >= 0).sum())])
    return ce / n


def load_start(cfg, data):
    """What init_from names, or, of a run that is resumed, its shape alone: its weights are in its checkpoint."""
    not_own_folder(cfg, 'init_from')
    if cfg.resume and checkpoints(cfg.out_dir):
        with restoring(cfg):
            return dict(model_config=load_checkpoint(cfg.out_dir)['model_config'])
    return open_start(cfg, prepare_shp.encoding(data.meta['encoding']))


def main(cfg):
    machine = setup(cfg.device, cfg.dtype, cfg.compile)
    if cfg.batch_size < machine.world_size:
        raise Refusal(f'batch_size={cfg.batch_size} sequences do not go round {machine.world_size} ranks; '
                      f'use --batch_size={machine.world_size} or more')
    machine.on_rank_0(lambda: prepare_shp.open_dataset(cfg))  # makes the toy data where it is missing
    data = prepare_shp.open_dataset(cfg)
    cfg = replace(cfg, source=data.meta['source'], columns=tuple(data.meta['columns']))  # what a run need not name
    documents, held_out = data.documents('train'), data.documents(cfg.eval_split)
    # what is too short is refused here, before an earlier run is overwritten
    prepare_shp.lm_batch(documents, cfg.cut, cfg.block_size, cfg.seed, 0, 1)
    prepare_shp.eval_length(held_out, cfg.cut, cfg.block_size)
    if cfg.epochs:
        passes = len(documents.offsets) - 1 if cfg.cut == 'examples' else len(documents.tokens) / cfg.block_size
        cfg = replace(cfg, max_iters=math.ceil(cfg.epochs * passes / cfg.batch_size))

    origin = load_start(cfg, data) if cfg.init_from else {}
    if origin:
        cfg = replace(cfg, **{name: origin['model_config'][name] for name in SHAPE})
        machine.print(f'start {cfg.init_from}, whose shape holds, whatever the options say: '
                      + ', '.join(f'{name}={getattr(cfg, name)}' for name in SHAPE))
    seed_everything(cfg.seed, 0, 0)
    model_config = GPTConfig(data.meta['vocab_size'], cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout,
                             cfg.bias, cfg.tie_weights)
    model = GPT(model_config).to(machine.device)
    if 'model' in origin:
        model.load_state_dict(origin.pop('model'))
    updates = Updates([model], cfg, machine)
    described = describe(cfg, machine, model_config, data)
    step, tokens, seconds, best = 0, 0, 0.0, math.inf
    with open_run(cfg, machine) as state, StopSignal() as stop:
        if state is not None:
            with restoring(cfg):
                machine.print(f'resumed at step {state["step"]} ({check_resume(state, described)})')
                model.load_state_dict(state['model'])
                updates.load_state_dict(state)
                step, tokens, seconds, best = entries(state, step=0, tokens=0, seconds=0.0, best=0.0)
            del state
        machine.on_rank_0(lambda: start_files(cfg, step))
        metrics = Metrics(cfg, machine, step)

        forward = torch.compile(model) if machine.compile else model
        if machine.world_size > 1:
            forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
        share = range(machine.rank * cfg.batch_size // machine.world_size,
                      (machine.rank + 1) * cfg.batch_size // machine.world_size)  # this rank's rows of the global batch
        micro = min(cfg.micro_batch_size or len(share), len(share))
        peak = matmul_peak(machine)
        machine.print(f'parameters {sum(p.numel() for p in model.parameters()):,}, '
                      f'vocabulary {model_config.vocab_size:,}, T_{cfg.taylor_order} loss\n'
                      f'{cfg.max_iters:,} steps of {cfg.batch_size} x {cfg.block_size} tokens: '
                      f'{machine.world_size} rank(s) x {math.ceil(len(share) / micro)} micro-batch(es) of {micro}\n'
                      f'{len(documents.tokens):,} training tokens; MFU is measured against {peak / 1e9:,.0f} GFLOP/s')

        def weights():
            return dict(described, step=step, tokens=tokens, model=model.state_dict())

        def save_state():
            state = dict(weights(), seconds=time.perf_counter() - start, best=best, **updates.state_dict())
            machine.on_rank_0(lambda: save_checkpoint(cfg.out_dir, state))  # nobody goes on before the file is whole

        start, saved_step = time.perf_counter() - seconds, step if step else None
        mark = step, tokens, time.perf_counter()  # of the last line of the log, for the speed since then
        while True:
            if step % cfg.eval_interval == 0 or step == cfg.max_iters:
                if step and step != saved_step:
                    save_state()
                    saved_step = step
                result = evaluate(model, held_out, cfg, machine, cfg.taylor_order, stop)
                if result is not None:
                    metrics.write('eval', step=step, tokens=tokens, seconds=time.perf_counter() - start, **result)
                    machine.print(f'step {step} evaluation: ' + ', '.join(f'{k} {v:.4f}' for k, v in result.items()) +
                                  (f' (log V = {math.log(model_config.vocab_size):.4f})' if step == 0 else ''))
                    if not math.isfinite(result['val_ce']):
                        kept = 'best.pt' if best < math.inf else 'nothing'
                        machine.print(f'warning: this model is no more, {kept} is from before; try a smaller '
                                      'learning_rate')
                    if result['val_ce'] < best or cfg.eval_split == 'test':  # which chooses nothing: the latest stays
                        best = result['val_ce']
                        machine.on_rank_0(lambda: save_checkpoint(cfg.out_dir, dict(weights(), val_ce=best), 'best.pt'))
                mark = step, tokens, time.perf_counter()
            if cfg.probe_interval and step % cfg.probe_interval == 0:
                metrics.write('probe', step=step, tokens=tokens, probe_ce=probe(model, held_out, cfg, machine))
            if step == cfg.max_iters or cfg.stop_step and step >= cfg.stop_step:
                break

            x, y = prepare_shp.lm_batch(documents, cfg.cut, cfg.block_size, cfg.seed, step, cfg.batch_size, share)
            count, *signals = machine.sum([int((y >= 0).sum()), *stop.flags()])
            if any(signals):
                break
            seed_everything(cfg.seed, step + 1, machine.rank)
            sums = torch.zeros(3, device=machine.device)
            for first in range(0, len(share), micro):
                idx, targets = x[first:first + micro], y[first:first + micro].flatten()
                waits = machine.world_size > 1 and first + micro < len(share)
                with forward.no_sync() if waits else contextlib.nullcontext():  # gradients travel once a step
                    with machine.autocast():
                        hidden = forward(idx.to(machine.device, non_blocking=True)).flatten(0, 1)
                        part = linear_taylor_loss(hidden, model.lm_head.weight,
                                                  targets.to(machine.device, non_blocking=True), cfg.taylor_order,
                                                  model_config.vocab_size, cfg.skip_below)
                    # DDP averages over ranks; what is wanted is the mean over all tokens of the step
                    updates.backward(part.loss * (machine.world_size / max(count, 1)))
                sums += torch.stack([part.loss.detach(), part.ce, part.weight])
            grad_norm = updates.step(step + 1, save_state)
            step, tokens = step + 1, tokens + int(count)

            if step % cfg.log_interval == 0 or step == cfg.max_iters:
                loss, ce, weight = (total / max(count, 1) for total in machine.sum(sums.tolist()))
                now = time.perf_counter()
                speed = (tokens - mark[1]) / (now - mark[2])
                eta = (cfg.max_iters - step) * (now - mark[2]) / (step - mark[0])
                mfu = speed * model.flops_per_token(cfg.block_size) / (peak * machine.world_size)
                metrics.write('train', step=step, tokens=tokens, seconds=now - start, train_loss=loss, train_ce=ce,
                              grad_norm=grad_norm, taylor_weight=weight, lr=lr_at(step - 1, cfg),
                              tokens_per_second=speed, skipped=updates.skipped)
                machine.print(f'step {step}/{cfg.max_iters} {step / cfg.max_iters:.0%} loss {loss:.4f} ce {ce:.4f} '
                              f'norm {grad_norm:.2f} {speed / 1000:.1f}k tok/s MFU {mfu:.0%} '
                              f'ETA {timedelta(seconds=round(eta))}')
                mark = step, tokens, now
        if step != saved_step:
            save_state()
        finish(cfg, machine, stop, step, step == cfg.max_iters, time.perf_counter() - start,
               f'; hear it with python sample.py --out_dir={cfg.out_dir}')


if __name__ == '__main__':
    run(main, Config)
