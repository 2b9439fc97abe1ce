"""Speed and memory of the project, side by side in one run with what a user would write or pick instead.

    python bench.py                                  # all parts but `ranks`
    python bench.py --parts=head,step --n_embd=64    # some of them
    torchrun --nproc_per_node=2 bench.py --parts=ranks
    python bench.py --parts=step --n_layer=12 --n_head=12 --n_embd=768 --batch_size=12 --block_size=1024   # GPT-2 124M

The contenders of a table take turns, `repeats` times after a warm-up: `times` is the median over rounds of the first
one's seconds divided by this one's. `MiB` is the peak memory beyond the inputs, each contender in a process of its own,
weights of its model and what torch.compile holds included. A floor is the bare products of a head in bfloat16, chunk by
chunk as torch's own library makes them here, without and with one softmax over the logits.
"""
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import plot
import prepare_shp
import toy_shp
from answers import answer_log_prob, answer_token_log_prob, group_batch
from configurator import Refusal, at_least, run
from losses import chunk_rows_for, linear_taylor_loss, linear_token_log_prob, plackett_luce_loss
from model import GPT, GPTConfig
from runs import (DEVICES, StopSignal, Updates, matmul_peak, peak_memory, save_checkpoint, setup, synchronize,
                  write_whole)
from train import Config as TrainConfig

VOCABULARY = prepare_shp.VOCABULARIES['gpt2']  # the heads' weights are padded
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = ('head', 'step', 'update', 'save', 'preference', 'generate', 'tokenise',
                              'scaling')  # or ranks
    n_embd: tuple[int, ...] = (64, 1024)  # channels of the models of head and step
    n_layer: int = 1                      # of step and ranks
    n_head: int = 8                       # of step and ranks
    batch_size: int = 8                   # sequences of step and ranks
    block_size: int = 256                 # their tokens
    repeats: int = 5                      # rounds of turns
    memory: bool = True                   # measure it, which doubles the time
    device: str = 'auto'                  # cpu, cuda or mps; auto = the best there is
    out_dir: str = 'out/bench'            # bench.jsonl and scaling.png go here

    def check(self):
        for part in self.parts:
            if part not in PARTS and part not in ('scaling', 'ranks'):
                yield f"parts: '{part}' is not one of {', '.join([*PARTS, 'scaling', 'ranks'])}"
        if self.device not in DEVICES:
            yield f"device='{self.device}' is not one of {', '.join(DEVICES)}"
        yield from at_least(self, 1, 'n_layer', 'n_head', 'batch_size', 'block_size', 'repeats')
        for n_embd in self.n_embd:
            if n_embd < 1 or n_embd % max(self.n_head, 1):
                yield f'n_embd={n_embd} does not divide by n_head={self.n_head}; pick a multiple of {self.n_head}'


# Contenders: part(cfg, machine, size) -> {name: make}, make() -> one call to be timed ---------------------------------


def head(cfg, machine, n_embd, rows=4096, vocabulary=VOCABULARY):
    """The last linear layer and its loss, forward and backward."""
    padded = -(-vocabulary // 64) * 64
    hidden = torch.randn(rows, n_embd, device=machine.device)
    weight = torch.randn(padded, n_embd, device=machine.device) * 0.02
    targets = torch.randint(vocabulary, (rows,), device=machine.device)

    def layer(loss, dtype, compile=False):
        loss = torch.compile(loss, dynamic=False) if compile else loss
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))

        def call():
            h.grad = w.grad = None
            with autocast(machine, dtype):
                value = loss(h, w)
            value.backward()
            return value
        return call

    def cross_entropy(h, w):
        return F.cross_entropy(F.linear(h, w), targets)

    def naive_t2(h, w):
        p = F.linear(h, w).float().softmax(-1).gather(1, targets[:, None])
        return (-p.log() - (1 - p) - (1 - p) ** 2 / 2).mean()

    def ours(h, w):
        return linear_taylor_loss(h, w, targets, 2, vocabulary).loss / rows

    def floor(softmax):
        h, w = hidden.to(BF16), weight.to(BF16)
        size = min(rows, max(256, n_embd))  # as fast as any here
        chunk, product = h.new_empty(size, padded), torch.empty_like(w)

        def call():
            for part in h.split(size):
                z = chunk[:len(part)]
                torch.mm(part, w.T, out=z)
                if softmax:
                    torch.softmax(z, 1, out=z)
                z @ w
                torch.mm(z.T, part, out=product)
        return call

    contenders = {
        'F.linear + F.cross_entropy, float32': lambda: layer(cross_entropy, F32),
        'naive T_2, float32': lambda: layer(naive_t2, F32),
        'F.linear + F.cross_entropy, compiled, bfloat16': lambda: layer(cross_entropy, BF16, True),
        'naive T_2, compiled, bfloat16': lambda: layer(naive_t2, BF16, True)}
    if hasattr(torch.nn, 'LinearCrossEntropyOptions'):
        for policy in ('accurate', 'compact'):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(256, n_embd), acc_policy=policy)
            contenders[f'F.linear_cross_entropy, {policy}, bfloat16'] = lambda options=options: layer(
                lambda h, w: F.linear_cross_entropy(h.to(BF16), w.to(BF16), targets, options=options), F32)
    if machine.device.type == 'cuda' and importlib.util.find_spec('liger_kernel'):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        contenders["Liger's fused head, bfloat16"] = lambda: layer(
            lambda h, w: LigerFusedLinearCrossEntropyLoss()(w.to(BF16), h.to(BF16), targets), F32)
    return contenders | {
        'linear_taylor_loss T_2, float32': lambda: layer(ours, F32),
        'linear_taylor_loss T_2, bfloat16': lambda: layer(ours, BF16),
        'linear_token_log_prob, bfloat16': lambda: layer(
            lambda h, w: linear_token_log_prob(h, w, targets, vocabulary).mean(), BF16),
        'floor: three products, bfloat16': lambda: floor(False),
        'floor: and one softmax, bfloat16': lambda: floor(True)}


def step(cfg, machine, n_embd):
    """A whole training step: batch, forward, backward, clipping, AdamW."""
    B, T = cfg.batch_size, cfg.block_size
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=2 ** 20).astype(np.uint16)
    documents = prepare_shp.Documents(tokens, np.array([0, len(tokens)]), np.zeros(1, bool))
    config = GPTConfig(VOCABULARY, T, cfg.n_layer, cfg.n_head, n_embd)

    def plain(dtype, compile=False, fused=machine.device.type == 'cuda'):  # a nanoGPT-like step
        gpt = GPT(config).to(machine.device)
        optimizer = torch.optim.AdamW(gpt.parameters(), fused=fused)

        def loss_of(x, y):
            return F.cross_entropy(F.linear(gpt(x), gpt.lm_head.weight).flatten(0, 1), y.flatten())
        loss_of = torch.compile(loss_of, dynamic=False) if compile else loss_of

        def call():
            starts = torch.randint(len(tokens) - T, (B,)).tolist()
            x, y = (torch.stack([torch.from_numpy(tokens[s + shift:s + shift + T].astype(np.int64)) for s in starts])
                    for shift in (0, 1))
            with autocast(machine, dtype):
                loss = loss_of(x.to(machine.device), y.to(machine.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss
        return call

    def ours(dtype, compile=False):  # train.py's
        gpt = GPT(config).to(machine.device)
        forward = torch.compile(gpt, dynamic=False) if compile else gpt
        updates = Updates([gpt], TrainConfig(warmup_iters=0), machine)

        def call():
            x, y = prepare_shp.lm_batch(documents, 'stream', T, 0, 0, B)
            with autocast(machine, dtype):
                hidden = forward(x.to(machine.device)).flatten(0, 1)
                sums = linear_taylor_loss(hidden, gpt.lm_head.weight, y.flatten().to(machine.device), 2, VOCABULARY)
            updates.backward(sums.loss / sums.count)
            updates.step(1, None)
            return sums.ce / sums.count
        return call

    return {'nanoGPT-like, float32': lambda: plain(F32),
            'nanoGPT-like, bfloat16': lambda: plain(BF16),
            'nanoGPT-like, compiled, bfloat16': lambda: plain(BF16, True),
            'nanoGPT-like, compiled, bfloat16, fused AdamW': lambda: plain(BF16, True, True),
            'train.py T_2, float32': lambda: ours(F32),
            'train.py T_2, bfloat16': lambda: ours(BF16),
            'train.py T_2, compiled, bfloat16': lambda: ours(BF16, True)}


def update(cfg, machine, n_embd):
    """The end of a training step, from finished gradients on, without and with what keeps a run safe."""
    def gradients():
        gpt = GPT(GPTConfig(VOCABULARY, cfg.block_size, cfg.n_layer, cfg.n_head, n_embd)).to(machine.device)
        return gpt, [torch.full_like(p, 1e-3) for p in gpt.parameters()]

    def plain():
        gpt, given = gradients()
        optimizer = torch.optim.AdamW(gpt.parameters(), fused=True)

        def call():
            for p, grad in zip(gpt.parameters(), given):
                p.grad = grad
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1e9)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return call

    def guarded():
        gpt, given = gradients()
        updates, stop = Updates([gpt], TrainConfig(warmup_iters=0, grad_clip=1e9), machine), StopSignal()

        def call():
            for p, grad in zip(gpt.parameters(), given):
                p.grad = grad
            machine.sum([0, *stop.flags()])
            updates.step(1, None)
        return call

    return {'clip_grad_norm_ and fused AdamW': plain,
            'train.py: no step that is not finite, signals': guarded}


def save(cfg, machine, n_embd):
    """A checkpoint: weights and both moments, by torch.save alone and as it survives a kill at any moment."""
    path = Path(cfg.out_dir) / f'save-{os.getpid()}'

    def writer(write):
        config = GPTConfig(VOCABULARY, cfg.block_size, cfg.n_layer, cfg.n_head, n_embd)
        state = dict(step=1, weights=[GPT(config).state_dict() for _ in range(3)])

        def call():
            path.mkdir(parents=True, exist_ok=True)
            write(state)
            shutil.rmtree(path)
        return call

    return {'torch.save': lambda: writer(lambda state: torch.save(state, path / 'ckpt.pt')),
            'train.py: synced, checked, renamed': lambda: writer(lambda state: save_checkpoint(path, state))}


def preference(cfg, machine, K, prompt=256, answer=64):
    """Plackett-Luce DPO on one prompt of 256 tokens with answers of 64, 6 layers x 384, forward and backward."""
    ids = torch.randint(VOCABULARY, (prompt + K * answer,)).tolist()
    group = prepare_shp.Group(0, '', ids[:prompt], [ids[i:i + answer] for i in range(prompt, len(ids), answer)])
    batch = {name: x.to(machine.device) for name, x in group_batch([group], prompt + answer).items()}
    copies = torch.cat([batch['prompt'].expand(K, prompt), batch['answer'][0]], 1)

    def padded(dtype, only_answers=False):
        def log_p(gpt):
            hidden = gpt(copies[:, :-1])
            if only_answers:
                hidden = hidden[:, prompt - 1:]
            logits = gpt.logits(hidden)[:, -answer:]
            return logits.log_softmax(-1).gather(2, batch['answer'][0][..., None]).sum((1, 2))[None]
        return learn(log_p, dtype)

    def packed(dtype):
        the_run = SimpleNamespace(machine=machine._replace(dtype=dtype))  # all that answer_token_log_prob asks of a Run
        return learn(lambda gpt: answer_log_prob(answer_token_log_prob(the_run, gpt, gpt, batch)), dtype)

    def learn(log_p, dtype):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(VOCABULARY, prompt + answer, 6, 6, 384)).to(machine.device)

        def call():
            gpt.zero_grad(set_to_none=True)
            with autocast(machine, dtype):
                scores = log_p(gpt)
            loss = plackett_luce_loss(0.1 * scores).sum()
            loss.backward()
            return loss.detach(), gpt.lm_head.weight.grad
        return call

    return {'padded copies, all logits, float32': lambda: padded(F32),
            'padded copies, all logits, bfloat16': lambda: padded(BF16),
            'padded copies, logits of answers, float32': lambda: padded(F32, True),
            'prompt once, float32': lambda: packed(F32),
            'prompt once, bfloat16': lambda: packed(BF16)}


def generate(cfg, machine, batch, prompt=64, new=128):
    """Samples of 128 tokens after prompts of 64, 4 layers of 256 channels."""
    prompts = torch.randint(VOCABULARY, (batch, prompt))

    def model():
        return GPT(GPTConfig(VOCABULARY, prompt + new, 4, 4, 256)).to(machine.device).eval()

    def uncached():
        gpt = model()

        @torch.no_grad()
        def call():
            idx = prompts.to(machine.device)
            for _ in range(new):
                p = gpt.logits(gpt(idx)[:, -1]).softmax(-1)
                idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
            return idx
        return call

    def ours(dtype):
        gpt = model()

        def call():
            with autocast(machine, dtype):
                return gpt.generate(prompts.tolist(), new)
        return call

    def hugging_face(dtype):
        from transformers import GPT2Config, GPT2LMHeadModel
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=prompt + new, n_embd=256, n_layer=4, n_head=4)
        theirs = GPT2LMHeadModel(config).to(machine.device, dtype).eval()
        idx = prompts.to(machine.device)
        return lambda: theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, top_k=0,
                                       pad_token_id=0, max_new_tokens=new, min_new_tokens=new)

    contenders = {'no cache (nanoGPT-like), float32': uncached}
    if importlib.util.find_spec('transformers'):
        contenders |= {'Hugging Face GPT-2, float32': lambda: hugging_face(F32),
                       'Hugging Face GPT-2, bfloat16': lambda: hugging_face(BF16)}
    return contenders | {'GPT.generate, float32': lambda: ours(F32), 'GPT.generate, bfloat16': lambda: ours(BF16)}


def tokenise(cfg, machine, count):
    """Ranked JSONL to a dataset on disk with gpt2, beside the tokenizer alone on the same texts."""
    enc = prepare_shp.encoding('gpt2')
    source = Path(cfg.out_dir) / 'rows.jsonl'
    rows = [dict(prompt=f"{row['history']} {i}", responses=[f"{row['human_ref_A']} {row['history']} {i}",
                                                            f"{row['human_ref_B']} {row['history']} {i}"])
            for i, row in enumerate(itertools.islice(toy_shp.toy_rows('train', count, 0), count))]
    texts = [text for row in rows for text in (row['prompt'], *row['responses'])]
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    options = prepare_shp.Config(dataset=f'bench-{os.getpid()}', source=str(source), encoding='gpt2')

    def prepare():
        prepare_shp.prepare(options)
        shutil.rmtree(Path('data', options.dataset))
    return {'tiktoken alone': lambda: lambda: enc.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
            'prepare_shp.py, from rows to checked arrays': lambda: prepare}


# contenders, what their size counts, the sizes, whether their memory tells anything
PARTS = {'head': (head, 'channels', lambda cfg: cfg.n_embd, True),
         'step': (step, 'channels', lambda cfg: cfg.n_embd, True),
         'update': (update, 'channels', lambda cfg: cfg.n_embd, False),
         'save': (save, 'channels', lambda cfg: cfg.n_embd, False),
         'preference': (preference, 'answers', lambda cfg: (2, 4, 8), True),
         'generate': (generate, 'prompts', lambda cfg: (1, 8, 32), True),
         'tokenise': (tokenise, 'rows', lambda cfg: (20000,), False)}


# Time and memory ------------------------------------------------------------------------------------------------------


def autocast(machine, dtype):
    return machine._replace(dtype=dtype).autocast()


def seconds_of(machine, call):
    if machine.world_size > 1:
        dist.barrier()
    synchronize(machine)
    start = time.perf_counter()
    call()
    synchronize(machine)
    return time.perf_counter() - start


def take_turns(machine, calls, repeats):
    """{name: call} -> {name: [seconds of each round]}, after a round of warm-up."""
    for call in calls.values():
        call()
    rounds = [{name: seconds_of(machine, call) for name, call in calls.items()} for _ in range(repeats)]
    return {name: [times[name] for times in rounds] for name in calls}


def extra_memory(cfg, machine, part, size, name):
    """MiB that a contender needs at its peak beyond the part's inputs; runs in a process of its own."""
    torch.manual_seed(0)
    # libraries load their own pages at first use
    step(replace(cfg, batch_size=1, block_size=8), machine, cfg.n_head)['train.py T_2, bfloat16']()()
    contenders = PARTS[part][0](cfg, machine, size)
    gc.collect()
    before = memory(machine)
    reset_peak(machine)
    call = contenders[name]()
    for _ in range(2):
        call()
    return (memory(machine, peak=True) - before) / 2 ** 20


def reset_peak(machine):
    if machine.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    elif Path('/proc/self/clear_refs').exists():
        Path('/proc/self/clear_refs').write_text('5')


def memory(machine, peak=False):
    if machine.device.type == 'cuda':
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    try:  # not getrusage: its peak begins at that of the process which started this one
        status = Path('/proc/self/status').read_text()
    except OSError:
        return peak_memory(machine)
    return 1024 * int(re.search(r'VmHWM:\s+(\d+)' if peak else r'VmRSS:\s+(\d+)', status)[1])


def in_own_process(function, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def compare(cfg, machine, part, size):
    """One table: prints it, and returns its rows."""
    build, unit, _, memory_tells = PARTS[part]
    torch.manual_seed(0)
    contenders = build(cfg, machine, size)
    print(f'\n{part}, {size:,} {unit}: {build.__doc__.splitlines()[0]}\n'
          f'{"":<52}{"median ms":>11}{"min ms":>10}{"times":>8}{"MiB":>9}', flush=True)
    seconds = take_turns(machine, {name: make() for name, make in contenders.items()}, cfg.repeats)
    first, rows = next(iter(seconds.values())), []
    for name, times in seconds.items():
        wanted = cfg.memory and memory_tells
        mib = in_own_process(extra_memory, cfg, machine, part, size, name) if wanted else None
        rows.append(dict(part=part, size=size, name=name, median_ms=1e3 * median(times), min_ms=1e3 * min(times),
                         times=median(a / b for a, b in zip(first, times)), mib=mib))
        print('{name:<52}{median_ms:>11.1f}{min_ms:>10.1f}{times:>8.2f}'.format(**rows[-1]) +
              (f'{mib:>9.0f}' if wanted else f'{"":>9}'), flush=True)
    if part == 'step':
        print(f'predicted for train.py: {predicted_memory(cfg, size, F32, machine.device.type):.0f} MiB in '
              f'float32, {predicted_memory(cfg, size, BF16, machine.device.type):.0f} in bfloat16', flush=True)
    return rows


def predicted_memory(cfg, n_embd, dtype, device='cpu'):
    """MiB of a training step: 16 P + 4 V C + R V b + 70 L B T C bytes.

    Weights, gradients and AdamW's two moments of P parameters; the gradient that tied weights have once more, as an
    embedding; a chunk of R rows of logits at b bytes; and about 70 bytes a token, channel and layer that the backward
    pass needs (in float32: 2 LayerNorms, q, k, v, attention, the MLP before and after GELU, and their sums).
    """
    config = GPTConfig(VOCABULARY, cfg.block_size, cfg.n_layer, cfg.n_head, n_embd)
    with torch.device('meta'):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    tokens, V = cfg.batch_size * cfg.block_size, config.padded_vocab_size
    rows = chunk_rows_for(tokens, V, n_embd, dtype, device)
    return (16 * parameters + 4 * V * n_embd + rows * V * dtype.itemsize
            + 70 * cfg.n_layer * tokens * n_embd) / 2 ** 20


# Scaling and ranks ----------------------------------------------------------------------------------------------------


def scaling(cfg, machine):
    """Seconds of one call against one size at a time (T at a constant number of tokens); -> rows, and scaling.png."""
    matplotlib_or_refuse()
    def of_head(**sizes):
        sizes = dict(n_embd=64, rows=2048, vocabulary=VOCABULARY) | sizes
        return head(cfg, machine, **sizes)['linear_taylor_loss T_2, float32']

    def of_step(**sizes):
        return step(replace(cfg, **sizes), machine, 8 * cfg.n_head)['train.py T_2, float32']
    sweeps = {
        'tokens N (head)': ([512, 1024, 2048, 4096, 8192], lambda N: of_head(rows=N)),
        'vocabulary V (head)': ([6400, 12800, 25600, 51200, 102400], lambda V: of_head(vocabulary=V)),
        'channels C (head)': ([64, 128, 256, 512, 1024], lambda C: of_head(n_embd=C)),
        'sequences B (step)': ([2, 4, 8, 16, 32], lambda B: of_step(batch_size=B)),
        'tokens a sequence T (step, B T = 2048)': ([64, 128, 256, 512, 1024, 2048],
                                                   lambda T: of_step(block_size=T, batch_size=2048 // T)),
        'answers K (preference)': ([2, 4, 8, 16], lambda K: preference(cfg, machine, K)['prompt once, float32'])}
    rows = []
    for what, (sizes, make) in sweeps.items():
        seconds = take_turns(machine, {size: make(size)() for size in sizes}, cfg.repeats)
        times = [median(of_size) for of_size in seconds.values()]
        slope = np.polyfit(np.log(sizes[-3:]), np.log(times[-3:]), 1)[0]
        print(f'{what:<40} ' + ', '.join(f'{size:,}: {1e3 * t:.0f} ms' for size, t in zip(sizes, times)) +
              f'; slope of the last three {slope:.2f}', flush=True)
        rows.append(dict(part='scaling', name=what, sizes=sizes, median_ms=[1e3 * t for t in times], slope=slope))
    picture(rows, Path(cfg.out_dir) / 'scaling.png')
    return rows


def matplotlib_or_refuse():
    try:
        import matplotlib.figure
    except ImportError:
        raise Refusal('the picture of scaling needs matplotlib: pip install matplotlib') from None
    return matplotlib


def picture(rows, path):
    matplotlib = matplotlib_or_refuse()
    with matplotlib.rc_context(plot.STYLE):
        figure = matplotlib.figure.Figure(figsize=(10, 5.4), dpi=150, layout='constrained')
        for ax, row in zip(figure.subplots(2, 3).flat, rows):
            sizes, times = np.array(row['sizes']), np.array(row['median_ms'])
            ax.loglog(sizes, times, 'o-', color=plot.COLOURS[0])
            if 'B T =' in row['name']:  # to be flat, not proportional
                ax.set(yscale='linear', ylim=(0, 1.2 * times.max()))
            else:
                ax.loglog(sizes, times[-1] * sizes / sizes[-1], ':', color=plot.COLOURS[-1])
            ax.set(title=row['name'], ylabel='ms a call')
            ax.minorticks_off()
            ax.set_xticks(sizes, [f'{size:,}' for size in sizes], fontsize=7)
        figure.suptitle('Time against size; dotted: proportional')
        figure.savefig(path)


def ranks(cfg, machine):
    """What ranks cost: a step of each rank alone, with its gradients shared, and the sharing alone."""
    B, T = cfg.batch_size // machine.world_size, cfg.block_size
    if not B:
        raise Refusal(f'batch_size={cfg.batch_size} sequences do not go round {machine.world_size} ranks')
    gpt = GPT(GPTConfig(VOCABULARY, T, cfg.n_layer, cfg.n_head, cfg.n_embd[0])).to(machine.device)
    ddp = DistributedDataParallel(gpt, gradient_as_bucket_view=True)
    x, y = torch.randint(VOCABULARY, (2, B, T), device=machine.device)
    gradient = torch.randn(sum(p.numel() for p in gpt.parameters()), device=machine.device)

    def call(forward):
        with machine.autocast():
            hidden = forward(x).flatten(0, 1)
            linear_taylor_loss(hidden, gpt.lm_head.weight, y.flatten(), 2, VOCABULARY).loss.backward()
        gpt.zero_grad(set_to_none=True)
    seconds = take_turns(machine, {'step alone': lambda: call(gpt), 'step under DDP': lambda: call(ddp),
                                   'all-reduce alone': lambda: dist.all_reduce(gradient)}, cfg.repeats)
    rows = [dict(part='ranks', name=name, median_ms=1e3 * median(times)) for name, times in seconds.items()]
    alone, shared, sharing = (row['median_ms'] for row in rows)
    machine.print(f'{machine.world_size} ranks, each with {B} x {T} tokens: forward and backward {alone:.1f} ms, with '
                  f'gradients shared {shared:.1f} ms, an all-reduce of all gradients alone {sharing:.1f} ms; hidden '
                  f'behind the backward pass: {1 - (shared - alone) / sharing:.0%}')
    return rows


def main(cfg):
    machine = setup(cfg.device)
    if (machine.world_size > 1) != (cfg.parts == ('ranks',)) or 'ranks' in cfg.parts and len(cfg.parts) > 1:
        raise Refusal('the part `ranks`, and only it, runs under torchrun: torchrun --nproc_per_node=2 bench.py '
                      '--parts=ranks')
    peaks = {dtype: matmul_peak(machine._replace(dtype=dtype)) for dtype in (F32, BF16)}
    machine.print(f'{torch.get_num_threads()} threads; a large matrix product reaches {peaks[F32] / 1e9:,.0f} GFLOP/s '
                  f'in float32, {peaks[BF16] / 1e9:,.0f} in bfloat16')
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    rows = []
    for part in cfg.parts:
        try:
            if part in ('scaling', 'ranks'):
                rows += (scaling if part == 'scaling' else ranks)(cfg, machine)
            else:
                for size in PARTS[part][2](cfg):
                    rows += compare(cfg, machine, part, size)
        except Refusal as error:  # gpt2's vocabulary is not to be had, say
            machine.print(f'\n{part} is left out: {error}')
        if machine.rank == 0:
            write_whole(Path(cfg.out_dir) / 'bench.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
    run(main, Config)
