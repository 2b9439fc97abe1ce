"""Trains a GPT on text. Read it from top to bottom: options, `main`, which ends in the loop, then what it calls.

    python train.py config/toy_t2.py                              # embedded data, any CPU
    torchrun --nproc_per_node=8 train.py config/t2_shp.py         # stanfordnlp/SHP on 8 GPUs
    python train.py config/toy_t2.py --init_from=out/toy_t2 --eval_split=test --max_iters=1 --learning_rate=0 \\
        --out_dir=out/toy_t2_test                                 # the best checkpoint on the test split, at step 0
"""
import contextlib
import math
import shlex
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import prepare_shp
import runs
from configurator import Refusal, progress, run
from losses import (ECE_BINS, calibration_gaps, cross_fitted, fitted_scale, linear_loss, link_order, loss_name,
                    rows_with_targets, slope_of, taylor_link, taylor_loss, to_device, token_statistics)
from model import GPT, GPTConfig

SHAPE = 'n_layer', 'n_head', 'n_embd', 'bias', 'tie_weights'  # options that a start determines


@dataclass(frozen=True)
class Config(runs.RunConfig):
    """Model and training."""
    batch_size: int = 32          # sequences per step, over all ranks and micro-batches
    micro_batch_size: int = 0     # sequences per micro-batch and rank, fewer take less memory; 0 = the rank's share
    block_size: int = 128         # context length in tokens; a longer context of the start is cropped
    init_from: str = ''           # start: folder of a run or a Hugging Face GPT-2, or gpt2, ..., gpt2-xl; '' = random
    cut: str = 'stream'           # stream: random windows of packed text; examples: each document from its start
    max_iters: int = 1000         # number of steps, unless epochs is set
    epochs: float = 0.0           # passes over the training text; 0 = train for max_iters steps
    n_layer: int = 2              # transformer blocks; with init_from the start sets the shape
    n_head: int = 2               # attention heads; must divide n_embd
    n_embd: int = 128             # channels
    dropout: float = 0.0          # dropout in the residual stream and in attention
    bias: bool = True             # biases in linear layers and LayerNorms
    tie_weights: bool = True      # the head shares the weights of the token embedding
    taylor_order: int = 0         # n of the Taylor loss T_n; 0 = cross-entropy
    probe_interval: int = 0       # steps between evaluations on batch_size sequences of eval_split; 0 = none

    choices = dict(cut=('stream', 'examples'))
    lowest = dict(batch_size=1, block_size=1, max_iters=1, n_layer=1, n_head=1, n_embd=1)

    def check(self):
        yield from super().check()
        if self.dropout >= 1:
            yield f'dropout={self.dropout} is a probability; it must be below 1'
        if self.n_head >= 1 and self.n_embd % self.n_head:
            yield f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}; pick a multiple of {self.n_head}'
        if self.epochs and 'max_iters' in self.given:
            yield f'max_iters has no effect with epochs={self.epochs}; leave max_iters out, or add --epochs=0'


def main(cfg, loss_of=None):
    machine = runs.setup(cfg.device, cfg.dtype, cfg.compile)
    machine.on_rank_0(lambda: prepare_shp.open_dataset(cfg))  # makes the toy data if they are missing
    data = prepare_shp.open_dataset(cfg)
    documents, held_out, vocab_size = data.documents('train'), data.documents(cfg.eval_split), data.meta['vocab_size']
    halves = data.halves(cfg.eval_split)                      # to fit the temperature
    cfg, start = settle(cfg, machine, data)                   # options that depend on the data and on the start
    eval_rows = range(prepare_shp.eval_length(held_out, cfg.cut, cfg.block_size))
    count = min(cfg.batch_size, len(eval_rows))               # sequences of a probe, spread over the split
    probe_rows = [i * len(eval_rows) // count for i in range(count)]
    rows = machine.share(cfg.batch_size)                      # this rank's share of each batch
    micro = min(cfg.micro_batch_size or len(rows), len(rows))

    runs.seed_everything(cfg.seed, 0, 0)
    model = GPT(GPTConfig(vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.dropout, cfg.bias,
                          cfg.tie_weights)).to(machine.device)
    if 'model' in start:
        model.load_state_dict(start.pop('model'))
    loss_of = loss_of or partial(taylor_loss, n=cfg.taylor_order)  # change the loss here: any function of log p
    optimizers = [torch.optim.AdamW(runs.decay_groups([model], cfg), lr=cfg.learning_rate, fused=True)]
    updates = runs.Updates(optimizers, [model], cfg, machine)
    forward = torch.compile(model) if machine.compile else model
    if machine.world_size > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)

    order = link_order(loss_of)                               # n of T_n, n >= 1; 0 for any other loss
    if cfg.taylor_order not in (0, order):
        raise Refusal(f'taylor_order={cfg.taylor_order} has no effect on the loss {loss_name(loss_of)}; leave it out')
    # its values tell two losses of one name apart
    values = [f'{loss_of(torch.tensor(p, device=machine.device).log()).item():.4g}' for p in (0.9, 0.5, 0.1)]
    described = runs.describe(cfg, machine, model.config, data, optimizers, loss=loss_name(loss_of),
                              **{'the loss at p = 0.9, 0.5, 0.1': values})
    described |= dict(link_order=order)                       # sample.py --link reads it
    # FLOP/s; on a CPU inf, since MFU means little there
    peak = runs.matmul_peak(machine) * machine.world_size if machine.device.type == 'cuda' else math.inf
    machine.print(f'parameters {sum(p.numel() for p in model.parameters()):,}, vocabulary {vocab_size:,}, '
                  f'loss {loss_name(loss_of)}\n{cfg.max_iters:,} steps of {cfg.batch_size} x {cfg.block_size} tokens: '
                  f'{machine.world_size} rank(s) x {math.ceil(len(rows) / micro)} micro-batch(es) of {micro}; '
                  f'{len(documents.tokens):,} training tokens')
    step, tokens, seconds, best, due, saved_step = 0, 0, 0.0, math.inf, False, None
    with runs.open_run(cfg, machine) as state, runs.StopSignal() as stop:
        if state is not None:
            machine.print(f'resumed at step {state["step"]} ({runs.check_resume(state, described)})')
            model.load_state_dict(state['model'])
            updates.load_state_dict(state)
            step, tokens, seconds, best, due = (state[name] for name in ('step', 'tokens', 'seconds', 'best', 'due'))
            saved_step = step
            state.clear()                                     # frees the second copy of the optimizer state
        machine.on_rank_0(lambda: runs.start_files(cfg, step, loss=loss_name(loss_of)))
        metrics, clock = runs.Metrics(cfg, machine, step), runs.Clock(seconds, step, tokens)

        def save(name=None, **more):
            state = dict(described, step=step, tokens=tokens, model=model.state_dict(), **more)
            machine.on_rank_0(lambda: runs.save_checkpoint(cfg.out_dir, state, name))  # all wait until it is written

        def save_state(due=False):                            # due: an evaluation follows, which a resume repeats
            save(seconds=clock.seconds(), best=best, due=due, **updates.state_dict())

        while True:
            if due or step % cfg.eval_interval == 0 or step == cfg.max_iters:
                if step and step != saved_step:
                    save_state(due=True)
                    saved_step = step
                due = False
                with clock.part('evaluation'):
                    result = evaluate(model, held_out, eval_rows, cfg, machine, order, stop, halves)
                if result is not None:                        # None after a signal
                    metrics.write('eval', step=step, tokens=tokens, seconds=clock.seconds(), **result)
                    machine.print(f'step {step} evaluation: {runs.in_words(result)}' +
                                  (f' (log V = {math.log(vocab_size):.4f})' if step == 0 else ''))
                    if not math.isfinite(result['val_ce']):
                        machine.print('warning: the loss is not finite; the best checkpoint so far is kept; try a '
                                      'smaller learning_rate')
                    # step 0 is never the best; nothing is selected on the test split: there best.pt is the latest
                    if step and (result['val_ce'] < best or cfg.eval_split == 'test'):
                        best = result['val_ce']
                        save('best.pt', val_ce=best)
            if cfg.probe_interval and step % cfg.probe_interval == 0:
                with clock.part('probe'):
                    result = evaluate(model, held_out, probe_rows, cfg, machine, order=0, stop=stop)
                if result is not None:
                    metrics.write('probe', step=step, tokens=tokens, probe_ce=result['val_ce'])
            if step == cfg.max_iters or cfg.stop_step and step >= cfg.stop_step:
                break

            x, y = prepare_shp.lm_batch(documents, cfg.cut, cfg.block_size, cfg.seed, step, cfg.batch_size, rows)
            # over all ranks, which wait for each other here: the step's targets, and whether a signal has arrived
            count, stopped = machine.sum([int((y >= 0).sum()), stop.number])
            if stopped:
                break
            runs.seed_everything(cfg.seed, step + 1, machine.rank)
            log_ps = []
            for first, idx, targets in zip(range(0, len(rows), micro), x.split(micro), y.split(micro)):
                last = first + micro >= len(rows)
                with contextlib.nullcontext() if last or machine.world_size == 1 else forward.no_sync():
                    with machine.autocast():
                        hidden = forward(to_device(idx, machine.device))
                        hidden, targets = rows_with_targets(hidden, targets)
                        loss, log_p = linear_loss(hidden, model.lm_head.weight, targets, loss_of, vocab_size)
                    # DDP averages over ranks, but the loss is the mean over all targets of the step
                    updates.backward(loss * (machine.world_size / max(count, 1)))
                log_ps.append(log_p)
            lr = cfg.learning_rate * runs.lr_factor(step, cfg)
            updates.clip_and_step(step + 1, save_state)       # and zero_grad; no step where the gradient is not finite
            step, tokens = step + 1, tokens + int(count)

            if step % cfg.log_interval == 0 or step in (1, cfg.max_iters):
                log_p = torch.cat(log_ps)
                value, slope = slope_of(loss_of, log_p)       # the mean |slope| is q^n for T_n
                sums = torch.stack([value.sum(), -log_p.sum(), slope.abs().sum()]).tolist()
                loss, ce, weight = (total / max(count, 1) for total in machine.sum(sums))
                grad_norm = updates.read_norms()
                speed, left = clock.pace(step, tokens, cfg.max_iters, evaluation=math.ceil(
                    cfg.max_iters / cfg.eval_interval) - (step - 1) // cfg.eval_interval)
                mfu = speed * model.flops_per_token(cfg.block_size) / peak
                metrics.write('train', step=step, tokens=tokens, seconds=clock.seconds(), train_loss=loss, train_ce=ce,
                              grad_norm=grad_norm, taylor_weight=weight, lr=lr, tokens_per_second=speed,
                              skipped=updates.skipped)
                machine.print(f'step {step}/{cfg.max_iters} {step / cfg.max_iters:.0%} loss {loss:.4f} ce {ce:.4f} '
                              f'norm {grad_norm:.2f} {speed / 1000:.1f}k tok/s {f"MFU {mfu:.0%} " if mfu else ""}'
                              f'ETA {left}')
        if step != saved_step:
            save_state()
        runs.finish(cfg, machine, stop, step, step == cfg.max_iters, clock.seconds(),
                    f'; sample from it: python sample.py --out_dir={shlex.quote(cfg.out_dir)} --temperature=0.5'
                    f'{" --link=True" if order else ""} --prompt={runs.example_prompt(data)}')


def settle(cfg, machine, data):
    """Sets the options that depend on the data and on the start -> cfg, start (the weights of init_from, or {}).

    Raises Refusal if they do not fit, before an earlier run is overwritten.
    """
    if cfg.batch_size < machine.world_size:
        raise Refusal(f'batch_size={cfg.batch_size} is less than the number of ranks, {machine.world_size}; use '
                      f'--batch_size={machine.world_size} or more')
    cfg = replace(cfg, source=data.meta['source'], columns=tuple(data.meta['columns']))
    documents = data.documents('train')
    prepare_shp.lm_batch(documents, cfg.cut, cfg.block_size, cfg.seed, 0, 1)  # raises Refusal if the data are too short
    if cfg.epochs:
        sequences = len(documents.offsets) - 1 if cfg.cut == 'examples' else len(documents.tokens) / cfg.block_size
        cfg = replace(cfg, max_iters=math.ceil(cfg.epochs * sequences / cfg.batch_size))
    for note in notes(cfg, documents):
        machine.print(f'note: {note}')
    if not cfg.init_from:
        return cfg, {}
    if cfg.resume and runs.checkpoints(cfg.out_dir):  # the weights are in the checkpoint: only the shape is needed
        start = dict(model_config=runs.load_checkpoint(cfg.out_dir)['model_config'])
    else:
        start = runs.open_start(cfg, prepare_shp.encoding(data.meta['encoding']))
    cfg = replace(cfg, **{name: start['model_config'][name] for name in SHAPE})
    machine.print(f'start from {cfg.init_from}, which sets the shape: '
                  + ', '.join(f'{name}={getattr(cfg, name)}' for name in SHAPE))
    return cfg, start


def notes(cfg, documents):
    """A sentence for each option whose effect may differ from what its value suggests."""
    tokens, lengths = len(documents.tokens), np.diff(documents.offsets)
    if cfg.block_size > (8 if cfg.cut == 'examples' else 64) * lengths.max():
        raise Refusal(f'block_size={cfg.block_size}, but no document is longer than {lengths.max()} tokens; use '
                      f'--block_size={lengths.max()}')
    if cfg.cut == 'examples' and (cut := (lengths > cfg.block_size + 1).mean()):
        yield f'{cut:.0%} of the documents are longer than block_size and lose their end-of-text'
    if cfg.batch_size * cfg.block_size > tokens:
        yield (f'a step uses {cfg.batch_size} x {cfg.block_size} tokens, more than the {tokens:,} of the training '
               'text; a smaller --batch_size makes steps faster')
    yield from runs.run_notes(cfg)


@torch.no_grad()
def evaluate(model, documents, rows, cfg, machine, order, stop, halves=None):
    """Metrics over the sequences `rows` of a split, divided among the ranks; None after a signal.

    For p, and for order n >= 1 also for link_n(p): val_ce, cross-entropy in nats per token; val_ece, expected
    calibration error; val_entropy_wrong, mean entropy where the likeliest token is wrong. val_accuracy is top-1. With
    split='row', val_ce_leaked is over documents identical to a training document, val_ce_clean over the others. Given
    the `halves` of the documents, val_ce_t is cross-entropy at temperature val_t, which is fitted on the other half.
    """
    names = ['', '_link'] if order else ['']
    size = min(cfg.micro_batch_size or cfg.batch_size, 64)
    model.eval()

    def read(rows):
        idx, targets, document = prepare_shp.eval_batch(documents, cfg.cut, cfg.block_size, rows)
        return *rows_with_targets(model(to_device(idx, machine.device)), targets), document[targets >= 0]

    with machine.autocast():
        scales = {}
        if halves is not None:  # a first estimate of 1/t from 512 tokens of 64 sequences, the same on every rank
            spread = rows[::max(1, len(rows) // 64)][:64]
            hidden, targets, _ = map(torch.cat, zip(*(read(spread[i:i + size]) for i in range(0, len(spread), size))))
            some = slice(None, None, -(-len(hidden) // 512))
            log_p = list(model.log_prob_chunks(hidden[some]))
            targets = targets[some].split(len(log_p[0]))
            scales = {name: fitted_scale(list(zip(log_q, targets)))
                      for name, log_q in zip(names, (log_p, [taylor_link(chunk, order) for chunk in log_p]))}
        found = {name: [torch.zeros(0, 8 if scales else 4)] for name in names}  # statistics of each token
        places = [torch.zeros(0, dtype=torch.int64)]                            # document of each token
        firsts = range(machine.rank * size, len(rows), machine.world_size * size)
        for first in progress(firsts, 'evaluating', machine.print):
            if stop.number:
                break  # all ranks return together, after the sum below
            hidden, targets, document = read(rows[first:first + size])
            places.append(document)
            for log_p in model.log_prob_chunks(hidden):
                target, targets = targets[:len(log_p)], targets[len(log_p):]
                for name, log_q in zip(names, (log_p, taylor_link(log_p, order))):
                    found[name].append(token_statistics(log_q, target, scales.get(name)))
    model.train()
    place = torch.cat(places).numpy()
    leaked = torch.from_numpy(documents.leaked[place]).double()
    half = torch.zeros_like(leaked) if halves is None else torch.from_numpy(halves[place]).double()
    stopped, n, n_leaked, n_half = machine.sum([stop.number, len(place), float(leaked.sum()), float(half.sum())])
    if stopped:
        return None
    metrics = {}
    for name in names:
        token = torch.cat([part.double().cpu() for part in found[name]])
        ce, right, confidence, entropy = token.T[:4]
        gaps, scaled = calibration_gaps(confidence, right), torch.stack([1 - half, half]) @ token[:, 4:]
        right, ce, ce_leaked, entropy, *sums = machine.sum(torch.cat([torch.stack(
            [right.sum(), ce.sum(), ce @ leaked, entropy @ (1 - right)]), gaps, scaled.flatten()]).tolist())
        gaps, series = sums[:ECE_BINS], (sums[ECE_BINS:ECE_BINS + 4], sums[ECE_BINS + 4:])
        metrics.setdefault('val_accuracy', right / n)
        metrics |= {'val_ce' + name: ce / n, 'val_ece' + name: sum(map(abs, gaps)) / n,
                    'val_entropy_wrong' + name: entropy / max(n - right, 1)}
        if 0 < n_half < n:
            ce_t, t = cross_fitted(series, scales[name])
            if math.isfinite(ce_t):
                metrics |= {f'val_ce{name}_t': ce_t / n, f'val_t{name}': t}
            elif math.isfinite(ce):
                machine.print(f'note: no val_ce{name}_t; the temperature of 512 tokens is too far from that of all')
        if not name and cfg.split == 'row' and 0 < n_leaked < n:
            metrics |= dict(val_ce_leaked=ce_leaked / n_leaked, val_ce_clean=(ce - ce_leaked) / (n - n_leaked))
    return metrics


if __name__ == '__main__':
    run(main, Config)
