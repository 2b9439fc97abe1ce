"""Speed and memory of this project, side by side in one run with what a user would write or use instead.

    python bench.py                                  # all parts
    python bench.py --parts=head,step --n_embd=64    # some of them
    python bench.py --parts=step --n_layer=12 --n_head=12 --n_embd=768 --batch_size=12 --block_size=1024   # GPT-2 124M

The contenders of a table take turns, `repeats` times after a warm-up. `times` is the median over rounds of the first
contender's seconds divided by this one's: a shared machine changes milliseconds more than ratios. `MiB` is the peak
memory beyond the part's inputs, including weights and what torch.compile holds; on a CPU in a separate process.
`MFU`, for a training step, is its FLOPs over those of a large matrix product in the same time and the same dtype.
results/speed has results, and describes how they were measured.
"""
import gc
import json
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import prepare_shp
from answers import Lab, make_batch
from configurator import Options, Refusal, run
from losses import linear_loss, plackett_luce_loss, rows_with_targets, taylor_loss, to_device
from model import GPT, GPTConfig, ScalarHead
from preference import METHODS, accumulate, step_prompts
from preference import Config as PreferenceConfig
from runs import DEVICES, Updates, decay_groups, matmul_peak, setup, synchronize, write_whole
from train import Config as TrainConfig

VOCABULARY = prepare_shp.VOCABULARIES['gpt2']
F32, BF16 = torch.float32, torch.bfloat16
T_2 = partial(taylor_loss, n=2)


@dataclass(frozen=True)
class Config(Options):
    parts: tuple[str, ...] = ('head', 'step', 'preference', 'generate')  # what to measure; also iteration
    n_embd: tuple[int, ...] = (64, 1024)  # head, step: channels of the model
    n_layer: int = 1                      # step: layers of the model
    n_head: int = 8                       # step: attention heads of the model
    batch_size: int = 8                   # step: sequences per batch
    block_size: int = 256                 # step: tokens per sequence
    answers: tuple[int, ...] = (2, 4, 8)  # preference: answers per prompt
    groups: int = 1                       # preference, iteration: prompts per step
    shape: tuple[int, ...] = (6, 6, 384)  # preference, iteration: layers, heads and channels of the model
    methods: tuple[str, ...] = ('spin', 'ppo')  # iteration: methods to time
    prompts: tuple[int, ...] = (1, 8, 32)  # generate: prompts per batch
    repeats: int = 5                      # rounds per table
    memory: bool = True                   # measure memory on a CPU, too (Linux only); doubles the time
    device: str = 'auto'                  # cpu, cuda or mps; auto = the best available
    out_dir: str = 'out/bench'            # folder of bench.jsonl

    choices = dict(device=DEVICES)
    lowest = dict(n_layer=1, n_head=1, batch_size=1, block_size=1, groups=1, repeats=1)

    def check(self):
        yield from super().check()
        for part in self.parts:
            if part not in PARTS:
                yield f"parts: '{part}' is not one of {', '.join(PARTS)}"


# Contenders: part(cfg, machine, size) -> {name: make}, make() -> one call to be timed ---------------------------------


def head(cfg, machine, n_embd, rows=4096, vocabulary=VOCABULARY):
    """The last linear layer and its loss, forward and backward."""
    hidden = torch.randn(rows, n_embd, device=machine.device)
    weight = torch.randn(-(-vocabulary // 64) * 64, n_embd, device=machine.device) * 0.02
    targets = torch.randint(vocabulary, (rows,), device=machine.device)

    def layer(loss, dtype, compile=False, chunks=False):
        options = {'auto_chunker.enable': True} if chunks else None
        loss = torch.compile(loss, dynamic=False, options=options) if compile else loss
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))

        def call():
            h.grad = w.grad = None
            with machine._replace(dtype=dtype).autocast():
                value = loss(h, w)
            value.backward()
            return value
        return call

    def cross_entropy(h, w):
        return F.cross_entropy(F.linear(h, w), targets)

    def naive_t2(h, w):
        p = F.linear(h, w).float().softmax(-1).gather(1, targets[:, None])
        return (-p.log() - (1 - p) - (1 - p) ** 2 / 2).mean()

    def torchs_own(h, w, policy):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(256, n_embd), acc_policy=policy)
        return F.linear_cross_entropy(h.to(BF16), w.to(BF16), targets, options=options)

    def ligers(h, w, size):  # liger_kernel 0.8.4 or later; its own default makes chunks of 8 rows at 64 channels
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        return liger_fused_linear_cross_entropy(h.to(BF16), w.to(BF16), targets, chunk_mem_const=size)

    def ours(h, w):
        return linear_loss(h, w, targets, T_2, vocabulary)[0] / rows

    def floor():
        h, w = hidden.to(BF16), weight.to(BF16)
        chunk, product = h.new_empty(max(256, n_embd), len(w)), torch.empty_like(w)

        def call():
            for part in h.split(len(chunk)):
                z = torch.mm(part, w.T, out=chunk[:len(part)])
                z @ w
                torch.mm(z.T, part, out=product)
        return call

    contenders = {
        'F.linear + F.cross_entropy, float32': lambda: layer(cross_entropy, F32),
        'naive T_2, float32': lambda: layer(naive_t2, F32),
        'F.linear + F.cross_entropy, compiled, bfloat16': lambda: layer(cross_entropy, BF16, True),
        'naive T_2, compiled, bfloat16': lambda: layer(naive_t2, BF16, True),
        'the same, in chunks of torch.compile': lambda: layer(cross_entropy, BF16, True, True),
        'F.linear_cross_entropy, accurate, bfloat16': lambda: layer(partial(torchs_own, policy='accurate'), F32),
        'F.linear_cross_entropy, compact, bfloat16': lambda: layer(partial(torchs_own, policy='compact'), F32)}
    if machine.device.type == 'cuda' and find_spec('liger_kernel'):
        contenders |= {f"Liger's fused head, chunk_mem_const={size}, bfloat16":
                       partial(layer, partial(ligers, size=size), F32) for size in (64, 16)}
    if machine.device.type == 'cuda' and find_spec('cut_cross_entropy'):
        from cut_cross_entropy import linear_cross_entropy as apples
        contenders["Apple's head, bfloat16"] = partial(layer, lambda h, w: apples(h.to(BF16), w.to(BF16), targets), F32)
    return contenders | {'linear_loss T_2, float32': lambda: layer(ours, F32),
                         'linear_loss T_2, bfloat16': lambda: layer(ours, BF16),
                         'floor: three matrix products, bfloat16': floor}


def step(cfg, machine, n_embd):
    """A whole training step: batch, forward, backward, clipping, AdamW."""
    B, T = cfg.batch_size, cfg.block_size
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=2 ** 20).astype(np.uint16)
    documents = prepare_shp.Documents(tokens, np.array([0, len(tokens)]), np.zeros(1, bool))
    config = GPTConfig(VOCABULARY, T, cfg.n_layer, cfg.n_head, n_embd)
    batch = partial(prepare_shp.lm_batch, documents, 'stream', T, 0, 0, B)

    def plain(dtype, compile=False, fused=machine.device.type == 'cuda'):  # as nanoGPT does it
        gpt = GPT(config).to(machine.device)

        def loss_of(x, y):
            return F.cross_entropy(F.linear(gpt(x), gpt.lm_head.weight).flatten(0, 1), y.flatten())
        loss_of = torch.compile(loss_of, dynamic=False) if compile else loss_of
        return plain_step(machine, dtype, gpt, lambda: loss_of(*(x.to(machine.device) for x in batch())), fused)

    def ours(dtype, compile=False):  # as train.py does it
        gpt = GPT(config).to(machine.device)
        forward = torch.compile(gpt, dynamic=False) if compile else gpt
        updates = make_updates([gpt], TrainConfig(warmup_iters=0), machine)

        def call():
            x, y = batch()
            count = int((y >= 0).sum())
            with machine._replace(dtype=dtype).autocast():
                hidden, targets = rows_with_targets(forward(to_device(x, machine.device)), y)
                loss, log_p = linear_loss(hidden, gpt.lm_head.weight, targets, T_2, VOCABULARY)
            updates.backward(loss / count)
            updates.clip_and_step(1, None)
            return -log_p.mean()
        return call

    return {'nanoGPT-like, float32': lambda: plain(F32),
            'nanoGPT-like, compiled, bfloat16': lambda: plain(BF16, True),
            'nanoGPT-like, compiled, bfloat16, fused AdamW': lambda: plain(BF16, True, True),
            'train.py T_2, float32': lambda: ours(F32),
            'train.py T_2, bfloat16': lambda: ours(BF16),
            'train.py T_2, compiled, bfloat16': lambda: ours(BF16, True)}


def preference(cfg, machine, K, prompt=256, answer=64):
    """A whole step of Plackett-Luce DPO, prompts of 256 tokens, answers of 64."""
    G, config = cfg.groups, GPTConfig(VOCABULARY, prompt + answer, *cfg.shape)
    prompts, answers = torch.randint(VOCABULARY, (G, prompt)), torch.randint(VOCABULARY, (G, K, answer))
    texts = torch.cat([prompts[:, None].expand(G, K, prompt), answers], 2).flatten(0, 1)
    batch = make_batch([prepare_shp.Group(g, '', prompts[g].tolist(), answers[g].tolist()) for g in range(G)])
    batch['ref_log_p'] = torch.zeros(G, K)
    weights = GPT(config).state_dict()

    def padded(dtype, first=0, compile=False):  # as TRL does it: a row for each answer, with a copy of its prompt
        gpt = GPT(config).to(machine.device)
        gpt.load_state_dict(weights)

        def log_p_of(x):
            log_p = gpt.logits(gpt(x[:, :-1])[:, first:]).log_softmax(-1)[:, -answer:]
            return log_p.gather(2, x[:, -answer:, None]).sum((1, 2)).view(G, K)
        log_p_of = torch.compile(log_p_of, dynamic=False) if compile else log_p_of
        return plain_step(machine, dtype, gpt,
                          lambda: plackett_luce_loss(0.1 * log_p_of(texts.to(machine.device))).mean(), fused=True)

    def packed(dtype, compile=False):  # as preference.py does it
        options = PreferenceConfig(warmup_iters=0, learning_rate=1e-3, weight_decay=0.01)
        method, updates = start_method(options, machine._replace(dtype=dtype), weights, config, compile=compile)

        def call():
            stats = accumulate(method, updates, batch, torch.arange(G), dict(iteration=0, groups=G))
            updates.clip_and_step(1, None)
            return stats['loss']
        return call

    return {'padded copies, all logits, float32': lambda: padded(F32),
            'padded copies, all logits, bfloat16': lambda: padded(BF16),
            'padded copies, logits of answers, float32': lambda: padded(F32, prompt - 1),
            'padded copies, logits of answers, compiled, bfloat16': lambda: padded(BF16, prompt - 1, True),
            'preference.py, float32': lambda: packed(F32),
            'preference.py, bfloat16': lambda: packed(BF16),
            'preference.py, compiled, bfloat16': lambda: packed(BF16, True)}


def iteration(cfg, machine, name, prompt=256, answer=64, steps=4):
    """A whole iteration of preference.py: sampling and scoring answers of 64 tokens, then 4 updates."""
    n, config = steps * cfg.groups, GPTConfig(VOCABULARY, prompt + answer, *cfg.shape)
    offsets = np.cumsum([0] + [prompt, answer, answer] * n)
    pieces = np.arange(3 * n).reshape(n, 3)
    tokens = np.random.default_rng(0).integers(VOCABULARY - 1, size=offsets[-1]).astype(np.uint16)
    groups = prepare_shp.Groups(tokens, offsets, pieces[:, 0], pieces[:, 1:].flatten(), 2 * np.arange(n + 1),
                                np.zeros(2 * n), np.full(n, ''))

    def make(dtype):
        options = PreferenceConfig(method=name, groups_per_step=cfg.groups, max_new_tokens=answer, learning_rate=1e-2)
        weights, scorer = GPT(config).state_dict(), ScalarHead(GPT(config)).eval().requires_grad_(False)
        torch.nn.init.normal_(scorer.head.weight)
        with patch('preference.frozen_reward_model', return_value=scorer):
            method, updates = start_method(options, machine._replace(dtype=dtype), weights, config, groups)

        def call():
            batch, _ = method.collect(0, 0)
            for update in range(steps):
                rows = step_prompts(method.lab, batch, 0, update)
                counts = dict(tokens=int(batch['answer_length'][rows].sum()), groups=len(rows))
                stats = accumulate(method, updates, batch, rows, dict(counts, iteration=0, update=update))
                updates.clip_and_step(1, None)
            return stats['loss']
        return call

    return {'preference.py, float32': lambda: make(F32), 'preference.py, bfloat16': lambda: make(BF16)}


def plain_step(machine, dtype, gpt, loss_of_a_batch, fused):
    optimizer = torch.optim.AdamW(gpt.parameters(), fused=fused)

    def call():
        with machine._replace(dtype=dtype).autocast():
            loss = loss_of_a_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return call


def start_method(cfg, machine, weights, config, groups=None, compile=False):
    """A method and its updates, as preference.py makes them. All sampled answers have full length."""
    nothing = SimpleNamespace(eot_token=-1, number=0)  # in place of the encoding and of signals
    method = METHODS[cfg.method](Lab(cfg, machine, nothing, dict(train=groups), config.block_size, nothing,
                                     dict(model=weights, model_config=asdict(config))))
    for module in (*method.trained.values(), *method.frozen.values()):
        module.to(machine.device)
    method.wrapped = {name: torch.compile(module, dynamic=True) if compile else module
                      for name, module in method.trained.items()}
    return method, make_updates(list(method.trained.values()), cfg, machine)


def make_updates(modules, cfg, machine):
    adam = torch.optim.AdamW(decay_groups(modules, cfg), lr=cfg.learning_rate, fused=True)
    return Updates([adam], modules, cfg, machine)


def generate(cfg, machine, batch, prompt=64, new=128):
    """Samples of 128 tokens after prompts of 64, 4 layers of 256 channels."""
    prompts = torch.randint(VOCABULARY, (batch, prompt)).to(machine.device)

    def model():
        return GPT(GPTConfig(VOCABULARY, prompt + new, 4, 4, 256)).to(machine.device).eval()

    @torch.no_grad()
    def uncached(gpt):
        idx = prompts
        for _ in range(new):
            p = gpt.logits(gpt(idx)[:, -1]).softmax(-1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], 1)
        return idx

    def ours(gpt, dtype, on_token=None):
        with machine._replace(dtype=dtype).autocast():
            return gpt.generate(prompts.tolist(), new, on_token=on_token)

    def hugging_face(dtype, **options):
        from transformers import GPT2Config, GPT2LMHeadModel
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=prompt + new, n_embd=256, n_layer=4, n_head=4)
        theirs = GPT2LMHeadModel(config).to(machine.device, dtype).eval()
        return partial(theirs.generate, prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                       pad_token_id=0, max_new_tokens=new, min_new_tokens=new, **options)

    contenders = {'no cache (nanoGPT-like), float32': lambda: partial(uncached, model())}
    if find_spec('transformers'):
        contenders |= {'Hugging Face GPT-2, float32': lambda: hugging_face(F32),
                       'Hugging Face GPT-2, bfloat16': lambda: hugging_face(BF16)}
        if machine.device.type == 'cuda':  # transformers compiles the step there
            contenders |= {f'Hugging Face GPT-2, static cache, {str(dtype)[6:]}':
                           partial(hugging_face, dtype, cache_implementation='static') for dtype in (F32, BF16)}
    if machine.device.type == 'cuda':  # with on_token, generate uses the loop
        contenders['GPT.generate, float32, no graph'] = lambda: partial(ours, model(), F32, lambda *_: None)
    return contenders | {'GPT.generate, float32': lambda: partial(ours, model(), F32),
                         'GPT.generate, bfloat16': lambda: partial(ours, model(), BF16)}


PARTS = dict(head=(head, 'n_embd'), step=(step, 'n_embd'), preference=(preference, 'answers'),
             generate=(generate, 'prompts'), iteration=(iteration, 'methods'))  # function, option with the sizes


# Time and memory ------------------------------------------------------------------------------------------------------


def take_turns(machine, calls, repeats):
    """{name: call} -> {name: [seconds of each round]}, after a round of warm-up."""
    seconds = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            synchronize(machine)
            start = time.perf_counter()
            call()
            synchronize(machine)
            seconds[name].append(time.perf_counter() - start)
    return {name: of_rounds[1:] for name, of_rounds in seconds.items()}


def extra_memory(cfg, machine, part, size, name):
    """Peak memory of a contender beyond the part's inputs, in MiB, on a CPU; runs in a separate process."""
    torch.manual_seed(0)
    # a first call, since libraries allocate memory at first use
    step(replace(cfg, batch_size=1, block_size=8), machine, cfg.n_head)['train.py T_2, bfloat16']()()
    contenders = PARTS[part][0](cfg, machine, size)
    gc.collect()
    before = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')
    call = contenders[name]()
    for _ in range(2):
        call()
    return (status('VmHWM') - before) / 2 ** 20


def with_memory(make):
    """A contender on CUDA, and its peak memory beyond what was allocated before, in MiB."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before, call = torch.cuda.memory_allocated(), make()
    call(), call()
    return call, (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def status(name):
    """In bytes. Not by getrusage, whose peak includes that of the parent process."""
    return 1024 * int(re.search(name + r':\s+(\d+)', Path('/proc/self/status').read_text())[1])


def in_own_process(function, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def compare(cfg, machine, part, size, peaks):
    """Prints one table and returns its rows."""
    build, option = PARTS[part]
    torch.manual_seed(0)
    contenders = build(cfg, machine, size)
    print(f'\n{part}, {option}={size}: {build.__doc__}\n{"":<54}{"median ms":>10}{"min ms":>10}{"times":>8}{"MiB":>9}'
          f'{"MFU":>6}', flush=True)
    make_of = with_memory if machine.device.type == 'cuda' else lambda make: (make(), None)
    made = {name: make_of(make) for name, make in contenders.items()}
    seconds = take_turns(machine, {name: call for name, (call, _) in made.items()}, cfg.repeats)
    first, rows, flops = next(iter(seconds.values())), [], 0
    if part == 'step':
        gpt = SimpleNamespace(config=GPTConfig(VOCABULARY, cfg.block_size, cfg.n_layer, cfg.n_head, size))
        flops = cfg.batch_size * cfg.block_size * GPT.flops_per_token(gpt, cfg.block_size)
    for name, times in seconds.items():
        mib = in_own_process(extra_memory, cfg, machine, part, size, name) if cfg.memory else made[name][1]
        rows.append(dict(part=part, size=size, name=name, median_ms=1e3 * median(times), min_ms=1e3 * min(times),
                         times=median(a / b for a, b in zip(first, times)), mib=mib,
                         mfu=flops / median(times) / peaks['bfloat16' in name]))
        print('{name:<54}{median_ms:>10.2f}{min_ms:>10.2f}{times:>8.2f}'.format(**rows[-1]) +
              (' ' * 9 if mib is None else f'{mib:>9.0f}') + (f'{rows[-1]["mfu"]:>6.0%}' if flops else ''), flush=True)
    return rows


def main(cfg):
    machine = setup(cfg.device)
    if machine.world_size > 1:
        raise Refusal('bench.py runs in one process; start it with python, not torchrun')
    cfg = replace(cfg, memory=cfg.memory and machine.device.type == 'cpu' and Path('/proc/self/clear_refs').exists())
    peaks = [matmul_peak(machine._replace(dtype=dtype)) for dtype in (F32, BF16)]
    absent = [name for name in ('transformers', 'liger_kernel', 'cut_cross_entropy') if not find_spec(name)]
    print(f'{torch.get_num_threads()} threads; a large matrix product reaches {peaks[0] / 1e9:,.0f} GFLOP/s in '
          f'float32, {peaks[1] / 1e9:,.0f} in bfloat16; not installed: {", ".join(absent) or "none"}')
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    rows = []
    for part in cfg.parts:
        for size in getattr(cfg, PARTS[part][1]):
            rows += compare(cfg, machine, part, size, peaks)
            write_whole(Path(cfg.out_dir) / 'bench.jsonl', ''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
    run(main, Config)
