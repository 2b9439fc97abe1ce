"""Trains a GPT on text with a Taylor loss T_n. Read it top to bottom.

    python train.py config/toy_t2.py                              # embedded data, any CPU
    torchrun --nproc_per_node=8 train.py config/t2_shp.py         # stanfordnlp/SHP on 8 GPUs
"""
import atexit
import contextlib
import fcntl
import json
import math
import os
import resource
import secrets
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import plot
import prepare_shp
from configurator import Refusal, at_least, at_most, progress, run
from huggingface import open_start
from losses import linear_taylor_loss, taylor_link
from model import GPT, GPTConfig, checkpoints, first_line, load_checkpoint, not_own_folder, save_checkpoint
from plot import read_events

DEVICES = 'auto', 'cpu', 'cuda', 'mps'
DTYPES = 'auto', 'float32', 'bfloat16', 'float16'
MAX_SKIPPED_IN_A_ROW = 10  # non-finite gradients that end a run
RANK_TIMEOUT = 180         # seconds that ranks wait for each other; a dead one must not hold the run for torch's 1800
LOCK_TIMEOUT = 10          # seconds that a run waits for another one to leave its folder
PARENT = os.getppid()      # torchrun, where the run is one of its ranks
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # Ctrl-C, a scheduler, a terminal that has closed
SHAPE = 'n_layer', 'n_head', 'n_embd', 'bias', 'tie_weights'  # of a model, beside block_size and dropout
LOGITS = dict(cpu=2 ** 21, mps=2 ** 24, cuda=2 ** 27)  # that an evaluation holds at once: few, for caches of a CPU
ECE_BINS = 15              # of equal width, over the confidence of the likeliest token
NUMBERED = '[0-9]' * 4 + '*.*'  # the files of iterations/ and selves/
# what overwrite deletes, and the options that may differ between a run and its exact resume
RUN_FILES = ('ckpt_*', 'best.pt', 'best.tmp-*', 'config.json', 'metrics.jsonl', 'loss.png', 'preference.png',
             'samples.jsonl', f'iterations/{NUMBERED}', f'selves/{NUMBERED}', 'tensorboard', 'wandb', 'wandb.id')
INCIDENTAL = ('resume', 'overwrite', 'out_dir', 'stop_step', 'log_interval', 'wandb', 'tensorboard', 'device', 'dtype',
              'compile', 'workers')


@dataclass(frozen=True)
class RunConfig(prepare_shp.Config):
    """What every training run asks, of whatever loss."""
    out_dir: str = 'out/run'      # checkpoints, metrics.jsonl, config.json and the plot go here
    resume: bool = False          # go on from the latest checkpoint in out_dir
    overwrite: bool = False       # delete the earlier run in out_dir
    seed: int = 0                 # of weights, batches and dropout
    device: str = 'auto'          # cpu, cuda or mps; auto = the best there is
    dtype: str = 'auto'           # of matrix products: float32, bfloat16, float16; auto = bfloat16 where the GPU has it
    compile: bool | None = None   # torch.compile the model; None = on CUDA only
    eval_interval: int = 200      # steps between checkpoints, each followed by an evaluation
    eval_split: str = 'val'       # val; test for a final result; train for what was learned by heart
    log_interval: int = 10        # steps between lines of the log
    wandb: bool = False           # send metrics to Weights & Biases too, offline without a login; pip install wandb
    tensorboard: bool = False     # write them to out_dir/tensorboard too; pip install tensorboard
    stop_step: int = 0            # end after this step, the schedule unchanged; 0 = at its end
    learning_rate: float = 1e-3   # after warm-up
    min_lr: float = 1e-4          # at the cosine's end; learning_rate or more = constant
    warmup_iters: int = 100       # steps of linear warm-up
    weight_decay: float = 0.1     # AdamW's, on matrices only
    grad_clip: float = 1.0        # largest norm of the gradient; 0 = any

    def check(self):
        yield from super().check()
        if not self.out_dir.strip():
            yield 'out_dir is empty; name a folder for the run'
        if self.device not in DEVICES:
            yield f"device='{self.device}' is not one of {', '.join(DEVICES)}"
        if self.dtype not in DTYPES:
            yield f"dtype='{self.dtype}' is not one of {', '.join(DTYPES)}"
        if self.eval_split not in ('train', 'val', 'test'):
            yield f"eval_split='{self.eval_split}' is not one of train, val, test"
        for name in ('wandb', 'tensorboard'):
            if getattr(self, name) and not find_spec(name):
                yield f'{name}=True needs {name}, which is not installed: pip install {name}'
        if self.resume and self.overwrite:
            yield 'resume and overwrite exclude each other: one goes on with the earlier run, the other deletes it'
        yield from at_least(self, 1, 'eval_interval', 'log_interval')
        yield from at_least(self, 0, 'seed', 'stop_step', 'learning_rate', 'min_lr', 'warmup_iters', 'weight_decay',
                            'grad_clip')


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


# Machine -------------------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products
    compile: bool

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, values):
        """A list of numbers -> the list of their sums over ranks: one message. All ranks wait here for each other."""
        if self.world_size == 1:
            return values
        values = torch.tensor(values, dtype=torch.float64)  # on the CPU: gloo carries it, the GPU need not wait
        dist.all_reduce(values)
        return values.tolist()

    def gather(self, thing):
        """Any picklable thing -> the list of those of all ranks."""
        if self.world_size == 1:
            return [thing]
        things = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    def on_rank_0(self, act):
        """act() on rank 0, and its result there; the others wait, and where it refuses, they end too, and quietly."""
        refusal = result = None
        if self.rank == 0:
            try:
                result = act()
            except (Refusal, OSError) as error:
                refusal = error
        if self.sum([refusal is not None])[0]:
            raise refusal or SystemExit(1)
        return result

    def print(self, *args):
        """On rank 0; where nobody reads it any more, as if the terminal had closed, which nohup ignores."""
        if self.rank == 0:
            try:
                print(*args, flush=True)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.kill(os.getpid(), signal.SIGHUP)


def setup(device='auto', dtype='auto', compile=False):
    """Device, dtype and, under torchrun, the process group, with one printed line that says what was chosen and why."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    kind = device if device != 'auto' else 'cuda' if cuda else 'mps' if mps else 'cpu'
    if kind == 'cuda' and not cuda or kind == 'mps' and not mps:
        raise Refusal(f'device={kind} was asked for, but torch {torch.__version__} sees none; use --device=cpu')
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device(kind, int(os.environ.get('LOCAL_RANK', 0))) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=RANK_TIMEOUT)
        store, *_ = next(dist.rendezvous('env://', timeout=timeout))
        if world_size == int(os.environ.get('LOCAL_WORLD_SIZE', 0)):
            # --max-restarts keeps one store: ranks must not find the addresses of those that died before them. Of
            # several machines each counts restarts of its own
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group('cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo', store=store, rank=rank,
                                world_size=world_size, timeout=timeout)
        atexit.register(end_ranks)
    if dtype != 'auto':
        dtype, why = getattr(torch, dtype), 'as asked'
    elif kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = torch.bfloat16, 'this GPU has it'
    else:
        dtype, why = torch.float32, f'the exact choice on {kind}'
    compile, why_compile = (kind == 'cuda', 'it pays on CUDA') if compile is None else (
        compile, 'as asked' if compile else 'not asked for')
    machine = Machine(rank, world_size, device, dtype, compile)
    ranks = f' x {world_size} ranks' if world_size > 1 else ''
    machine.print(f'device {device}{ranks}, dtype {str(dtype)[6:]} ({why}), '
                  f'compile {"on" if compile else "off"} ({why_compile}), torch {torch.__version__}')
    return machine


def end_ranks():
    """Before Python ends: a thread of gloo that lets go of its last tensor only then aborts the process."""
    dist.destroy_process_group()
    time.sleep(0.1)  # DDP keeps them; let them finish with their last message


def matmul_peak(machine):
    """FLOP/s of a large square matrix product on this device: what MFU is measured against."""
    a = torch.randn(1024 if machine.device.type == 'cpu' else 8192, device=machine.device).to(machine.dtype)
    a = a[:, None] * a
    best = math.inf
    for _ in range(4):
        synchronize(machine)
        start = time.perf_counter()
        a @ a
        synchronize(machine)
        best = min(best, time.perf_counter() - start)
    return 2 * len(a) ** 3 / best


def synchronize(machine):
    if machine.device.type != 'cpu':
        getattr(torch, machine.device.type).synchronize()


def peak_memory(machine):
    """Bytes: of the GPU where there is one, else of the process."""
    if machine.device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def seed_everything(seed, step, rank):
    # a pure function of the three, so that a checkpoint needs no generator state and any number of ranks can resume
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2 ** 63)


class StopSignal:
    """While it is open, STOP_SIGNALS only set a flag, and the loop saves and ends at its next step.

    So does the death of torchrun, which a kill -9 of it leaves to its workers to notice.
    """
    caught = 0

    def __enter__(self):
        self.handlers = {n: signal.signal(n, self.catch) for n in STOP_SIGNALS
                         if signal.getsignal(n) != signal.SIG_IGN}  # nohup stays in force
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        self.caught = number

    @property
    def number(self):
        """The signal that has come, or 0."""
        orphaned = 'TORCHELASTIC_RUN_ID' in os.environ and os.getppid() != PARENT
        return self.caught or (signal.SIGTERM if orphaned else 0)

    def flags(self):
        """For Machine.sum: which of STOP_SIGNALS it was."""
        number = self.number
        return [number == n for n in STOP_SIGNALS]


# The run's folder ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run(cfg, machine):
    """Makes out_dir this run's alone, and gives the state to resume from, or None for a new run."""
    out = Path(cfg.out_dir)
    held = machine.on_rank_0(lambda: lock(out))
    try:
        resumes = cfg.resume and bool(checkpoints(out))
        if cfg.resume and not resumes:
            if step := evaluated_step(out):
                raise Refusal(f'{out} has lost its checkpoints, though it was evaluated at step {step}, and best.pt is '
                              'none to go on from; choose another --out_dir, or delete it all with --overwrite=True')
            machine.print(f'nothing to resume in {out}: starting at step 0')
        elif not cfg.resume and any(out.iterdir()) and not holds_run(out):
            raise Refusal(f'{out} is not empty and holds no run, so nothing in it is touched; choose another --out_dir')
        elif not cfg.resume and not cfg.overwrite and any(out.iterdir()):
            raise Refusal(f'{out} is not empty; add --resume=True to go on with the run in it, --overwrite=True to '
                          f'delete that run, or choose another --out_dir')
        machine.sum([0])  # every rank has looked before one of them writes
        if cfg.overwrite:
            machine.on_rank_0(lambda: delete_run(out))
        found = [load_checkpoint(out) if resumes else None]
        if len(set(machine.gather(found[0] and found[0]['step']))) > 1:
            raise Refusal(f'the ranks do not find the same checkpoint in {out}; it must be one sound folder for all')
        yield found.pop()  # not held here while the run goes on
    except RuntimeError as error:
        if machine.world_size > 1 and (isinstance(error, dist.DistError) or 'gloo' in str(error)):
            raise Refusal('another rank has ended or does not answer, so this one ends too; what it said last tells '
                          'why. --resume=True goes on from the last checkpoint') from error
        raise
    finally:
        if held is not None:
            os.close(held)


def evaluated_step(out):
    """The last step of which best.pt or metrics.jsonl has an evaluation: there was a checkpoint of it, or it is 0."""
    steps = [event['step'] for _, event in read_events(out / 'metrics.jsonl') if event['event'] == 'eval']
    if (out / 'best.pt').exists():
        steps.append(load_checkpoint(out, 'best.pt')['step'])
    return max(steps, default=0)


def holds_run(out):
    """Whether there is in the folder what a run of ours leaves."""
    try:
        ours = 'out_dir' in json.loads((out / 'config.json').read_text())
    except (OSError, ValueError, TypeError):
        ours = False
    return ours or bool(checkpoints(out)) or (out / 'metrics.jsonl').exists()


def delete_run(out):
    for path in (path for pattern in RUN_FILES for path in out.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def restoring(cfg):
    """A checkpoint that lacks something, or holds it in another form, is refused before anything is written."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise Refusal(f'cannot resume, the checkpoint in {cfg.out_dir} does not fit this version of the program '
                      f'({type(error).__name__}: {first_line(error)}); use the version that made it, or choose another '
                      '--out_dir') from error


def entries(state, **examples):
    """The named entries of a checkpoint; TypeError for one of another kind than its example."""
    def alike(x, example):
        if isinstance(example, dict):  # any keys, values like the one there
            return type(x) is dict and all(alike(y, part) for y in x.values() for part in example.values())
        if isinstance(example, list):
            return type(x) is list and len(x) == len(example) and all(map(alike, x, example))
        return type(x) is type(example) or type(x) is int and type(example) is float

    for name, example in examples.items():
        if not alike(state[name], example):
            raise TypeError(f'{name} is {str(state[name])[:80]}')
    return [state[name] for name in examples]


def lock(out):
    """Opens the folder for this process alone, until it closes it or dies: two runs in one would mix their files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f'out_dir={out} cannot be made a folder ({error.strerror}); choose another --out_dir') from None
    held, last = os.open(out, os.O_RDONLY), time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return held
        except BlockingIOError:
            if time.monotonic() > last:
                os.close(held)
                raise Refusal(f'{out} is in use by another run; wait for its end, or choose another --out_dir')
            time.sleep(0.1)  # it may be saving, at its end
        except OSError:  # NFS, for example
            print(f'warning: the file system of {out} has no locks; let no second run write there', flush=True)
            return held


def describe(cfg, machine, model_config, data):
    """What a checkpoint says of its run, for `check_resume` and for who loads its weights."""
    return dict(model_config=asdict(model_config), config=asdict(cfg), fingerprint=data.fingerprint,
                encoding=data.meta['encoding'],
                machine=dict(ranks=machine.world_size, device=machine.device.type, dtype=str(machine.dtype),
                             compile=machine.compile, torch=str(torch.__version__)))


def check_resume(state, now):
    """Refuses a checkpoint of another model, of other data or beyond this run's end. `now`: what this run would save.

    Returns 'exact', or the options and the parts of the machine that have changed since.
    """
    def differ(part):
        return [(k, was, now[part].get(k)) for k, was in state[part].items() if now[part].get(k) != was]

    # most are preference.py's, and train.py has none: what tells a step's place in which iteration
    for name in ('method', 'init_from', 'groups_per_iteration', 'groups_per_step', 'inner_epochs'):
        there, here = ({'': 'none'}.get(x, x) for x in (part['config'].get(name, '') for part in (state, now)))
        if there != here and (name != 'init_from' or Path(there) != Path(here)):
            raise Refusal(f'cannot resume, the checkpoint is of another run: {name} {there} there, {here} here; ask '
                          'for the same, or choose another --out_dir')
    for name, was in state.get('frozen', {}).items():  # of preference.py: a reward model or a teacher
        if now['frozen'].get(name) != was:
            raise Refusal(f'cannot resume, its {name} is another one now; put the old one back, or choose another '
                          '--out_dir')
    if model := ', '.join(f'{k}: {was} there, {is_now} here' for k, was, is_now in differ('model_config')):
        raise Refusal(f'cannot resume, the checkpoint is of another model: {model}; choose another --out_dir')
    if state['fingerprint'] != now['fingerprint']:
        raise Refusal(f'cannot resume, the checkpoint is of another dataset: fingerprint {state["fingerprint"][:12]} '
                      f'there, {now["fingerprint"][:12]} here; choose another --out_dir')
    if state['step'] > now['config']['max_iters']:
        raise Refusal(f'cannot resume, the checkpoint is at step {state["step"]}, beyond max_iters='
                      f'{now["config"]["max_iters"]}; ask for more steps, or choose another --out_dir')
    changed = [f'{k} {was} -> {is_now}' for k, was, is_now in differ('config') if k not in INCIDENTAL]
    changed += [f'{k} {was} -> {is_now}' for k, was, is_now in differ('machine')]
    return f'changed: {", ".join(changed)}' if changed else 'exact'


def start_files(cfg, step):
    """config.json; and aside with checkpoints beyond the one resumed, which could not be read."""
    out = Path(cfg.out_dir)
    write_whole(out / 'config.json', json.dumps(asdict(cfg), indent=1))  # the first write: out_dir can be written
    for path in checkpoints(out):
        if path.name > f'ckpt_{step:08d}.pt':
            path.rename(path.with_suffix('.damaged'))


class Metrics:
    """out_dir/<name>: a JSON line an event, in the order of steps; a resume first cuts what it will write again."""

    def __init__(self, cfg, machine, step, name='metrics.jsonl'):
        self.path = Path(cfg.out_dir) / name
        self.rank = machine.rank
        self.gap = cfg.eval_interval if name == 'metrics.jsonl' else math.inf  # steps between two lines, at most
        machine.on_rank_0(lambda: write_whole(self.path, ''.join(self.lines_before(step))))
        self.viewers = viewers(cfg, step) if machine.rank == 0 and name == 'metrics.jsonl' else []

    def lines_before(self, step):
        last = -math.inf
        for line, event in read_events(self.path):
            # an evaluation follows its checkpoint, so the one of this very step is made again
            if event['step'] < step or event['step'] == step and event['event'] == 'train':
                last = event['step']
                yield line + '\n'
        if 0 < step > last + self.gap:
            print(f'warning: {self.path} ' + (f'ends at step {last}' if last >= 0 else 'has no line left') +
                  f', though this run goes on at step {step}: a part of the curve is lost', flush=True)

    def write(self, event, **values):
        if self.rank == 0:
            try:
                with open(self.path, 'a') as f:
                    f.write(json.dumps(dict(event=event, **values)) + '\n')
            except OSError as error:
                raise unwritten(self.path, error) from None
            for show in self.viewers:
                show(event, values)


def viewers(cfg, step):
    """Functions of (event, its values) that show metrics elsewhere, from `step` on. None of them asks anything."""
    found = []
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        # an evaluation of this very step comes twice
        writer = SummaryWriter(Path(cfg.out_dir) / 'tensorboard', purge_step=step + 1)

        def show_in_tensorboard(event, values):
            for name, value in values.items():
                writer.add_scalar(f'{event}/{name}', value, values['step'])
            writer.flush()

        found.append(show_in_tensorboard)
    if cfg.wandb:
        import wandb
        name = Path(cfg.out_dir) / 'wandb.id'  # a resume goes on with the same curves
        if not name.exists():
            write_whole(name, secrets.token_hex(8))
        known = 'WANDB_MODE' in os.environ or wandb.login(prompt=False)
        run = wandb.init(project='nanotaylor', name=cfg.out_dir, id=name.read_text(), resume='allow', dir=cfg.out_dir,
                         config=asdict(cfg), mode=None if known else 'offline')
        run.define_metric('*', step_metric='step')
        found.append(lambda event, values: run.log(dict(step=values['step'], **{
            f'{event}/{name}': value for name, value in values.items()})))
    return found


def finish(cfg, machine, stop, step, done, seconds, hint=''):
    """The last words of a run whose state is saved: a picture if it is done, the exit code if a signal has ended it."""
    signals = machine.sum(stop.flags())  # one may have come since the loop last looked
    if any(signals) or not done:
        machine.print(f'stopped after step {step}, saved {cfg.out_dir}; continue with --resume=True')
    if any(signals):
        sys.exit(128 + next(number for number, came in zip(STOP_SIGNALS, signals) if came))
    if machine.rank == 0 and done:
        try:
            picture = plot.plot([cfg.out_dir])
        except Refusal as error:
            picture = f'no picture ({error})'  # a missing matplotlib is no reason to fail a finished run
        print(f'{seconds:.0f} s, peak memory {peak_memory(machine) / 2 ** 20:,.0f} MiB\n'
              f'saved {cfg.out_dir} and {picture}{hint}', flush=True)


def unwritten(path, error):
    return Refusal(f'{path} could not be written ({error.strerror}); is the disk full, or its folder missing?')


def write_whole(path, text):
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'w') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritten(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


# Training ------------------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Linear warm-up to learning_rate, then a cosine to min_lr, if that is lower (Loshchilov & Hutter 2017)."""
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / cfg.warmup_iters
    done = min((step - cfg.warmup_iters) / max(cfg.max_iters - cfg.warmup_iters, 1), 1.0)
    lowest = min(cfg.min_lr, cfg.learning_rate)
    return lowest + (cfg.learning_rate - lowest) * (1 + math.cos(math.pi * done)) / 2


class Updates:
    """AdamW's steps (fused; Loshchilov & Hutter 2019), each gradient clipped, and none that is not finite taken.

    Matrices decay, biases and LayerNorms do not. Each module is clipped by itself. After DDP a gradient is the same on
    all ranks, and so are the decisions here.
    """

    def __init__(self, modules, cfg, machine):
        self.modules, self.cfg, self.machine = modules, cfg, machine
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=cfg.weight_decay),
                  dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.skipped = self.skipped_in_a_row = 0

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, step, save_state):
        """The update after which `step` steps are done -> the first module's gradient norm, before clipping.

        Where a norm is not finite nothing is updated; MAX_SKIPPED_IN_A_ROW such steps save the state and end the run.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = lr_at(step - 1, self.cfg)
        self.scaler.unscale_(self.optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), self.cfg.grad_clip or math.inf)
                 for module in self.modules]
        norm, total = torch.stack([norms[0], sum(norms)]).tolist()  # one wait for the device
        if math.isfinite(total):
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            self.machine.print(f'warning: the gradient norm of step {step} is {total}; its update is skipped')
            if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                save_state()  # no such gradient has touched a parameter
                raise Refusal(f'{self.skipped_in_a_row} gradients in a row were not finite, up to step {step}; the '
                              f'parameters before them are saved in {self.cfg.out_dir}; try a smaller learning_rate')
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self):
        return dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), skipped=self.skipped,
                    skipped_in_a_row=self.skipped_in_a_row)

    def load_state_dict(self, state):
        # the options are this run's
        self.optimizer.load_state_dict(dict(self.optimizer.state_dict(), state=state['optimizer']['state']))
        for group in self.optimizer.param_groups if self.optimizer.state else []:
            for p in group['params']:  # torch does not look
                shapes = {name: moment.shape for name, moment in self.optimizer.state[p].items()}
                if shapes != dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape):
                    raise ValueError(f'moments of shapes {shapes} for a parameter of {tuple(p.shape)}')
        if state['scaler']:  # of float16
            self.scaler.load_state_dict(state['scaler'])
        self.skipped, self.skipped_in_a_row = entries(state, skipped=0, skipped_in_a_row=0)


def logit_rows(model):
    """How many rows of a model's logits an evaluation holds at once."""
    return max(1, LOGITS[model.lm_head.weight.device.type] // model.config.vocab_size)


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
