"""Fault tolerance of runs: ranks, signals, the run's folder, checkpoints and resume, metrics, finite updates.

You may skip this file: train.py and preference.py can be understood without it.
"""
import atexit
import contextlib
import fcntl
import inspect
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import timeit
import zipfile
import zlib
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import prepare_shp
from configurator import NOT_RESUMED, Refusal, header

DEVICES = 'auto', 'cpu', 'cuda', 'mps'
DTYPES = 'auto', 'float32', 'bfloat16', 'float16'
MAX_SKIPPED_IN_A_ROW = 10  # updates with a gradient that is not finite, after which a run ends
RANK_TIMEOUT = 180         # seconds that ranks wait for each other; torch's default is 1800
PARENT = os.getppid()      # torchrun, if this process is one of its ranks
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # Ctrl-C, a scheduler, a closed terminal
NUMBERED = '[0-9]' * 4 + '*.*'  # the files of iterations/ and selves/
# RUN_FILES: what overwrite deletes. INCIDENTAL: options that leave a resume exact
RUN_FILES = ('ckpt_*', 'best.pt', '.tmp.*', 'config.json', 'metrics.jsonl', 'loss.png', 'preference.png',
             'samples.jsonl', f'iterations/{NUMBERED}', f'selves/{NUMBERED}', 'tensorboard', 'wandb', 'wandb.id')
INCIDENTAL = *NOT_RESUMED, 'log_interval', 'wandb', 'tensorboard', 'device', 'dtype', 'compile'


@dataclass(frozen=True)
class RunConfig(prepare_shp.Config):
    """The run."""
    out_dir: str = 'out/run'      # folder of checkpoints, metrics.jsonl, config.json and the plot
    resume: bool = False          # continue the run in out_dir from its latest checkpoint
    overwrite: bool = False       # delete the earlier run in out_dir
    seed: int = 0                 # seed of weights, batches, dropout and samples
    device: str = 'auto'          # cpu, cuda or mps; auto = the best available
    dtype: str = 'auto'           # dtype of products: float32, bfloat16 or float16; auto = bfloat16 if the GPU has it
    compile: bool | None = None   # torch.compile the model; None = on CUDA only
    eval_interval: int = 200      # steps between checkpoints, each followed by an evaluation
    eval_split: str = 'val'       # split that is evaluated: val, test (for a final result) or train
    log_interval: int = 10        # steps between log lines
    wandb: bool = False           # also log to Weights & Biases, offline without a login; pip install wandb
    tensorboard: bool = False     # also log to out_dir/tensorboard; pip install tensorboard
    stop_step: int = 0            # stop after this step, with the schedule unchanged; 0 = at the end of the schedule
    learning_rate: float = 1e-3   # peak learning rate, after the warm-up
    min_lr: float = 1e-4          # learning rate at the end of the cosine; learning_rate or more = constant
    warmup_iters: int = 100       # steps of linear warm-up
    weight_decay: float = 0.1     # weight decay of matrices; biases and LayerNorms do not decay
    grad_clip: float = 1.0        # maximum norm of the gradient; 0 = no clipping

    choices = dict(device=DEVICES, dtype=DTYPES, eval_split=('train', 'val', 'test'))
    lowest = dict(eval_interval=1, log_interval=1)

    def check(self):
        yield from super().check()
        if self.resume and self.overwrite:
            yield 'resume continues the earlier run and overwrite deletes it; set only one of them'
        for option in 'init_from', 'teacher', 'reward_model':
            path = getattr(self, option, '')
            if self.overwrite and path and Path(path).resolve().is_relative_to(Path(self.out_dir).resolve()):
                yield f'overwrite would delete {option}={path}; choose another --out_dir'


# Ranks and devices ---------------------------------------------------------------------------------------------------


class Machine(NamedTuple):
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products
    compile: bool

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def share(self, count):
        """The part of range(count) that belongs to this rank."""
        return range(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def sum(self, values):
        """A list of numbers -> the list of their sums over ranks, in one message. Ranks wait for each other here."""
        if self.world_size == 1:
            return values
        values = torch.tensor(values, dtype=torch.float64)  # on the CPU: sent by gloo, without waiting for the GPU
        dist.all_reduce(values)
        return values.tolist()

    def gather(self, thing):
        """Any picklable object -> the list of those of all ranks."""
        if self.world_size == 1:
            return [thing]
        things = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    def on_rank_0(self, act):
        """Calls act() on rank 0; the others wait. If it raises Refusal, all ranks end."""
        refusal = None
        if self.rank == 0:
            try:
                act()
            except (Refusal, OSError) as error:
                refusal = error
        if self.sum([refusal is not None])[0]:
            raise refusal or SystemExit(1)

    def print(self, *args):
        """Prints on rank 0. A closed output counts as a closed terminal (SIGHUP, which nohup ignores)."""
        if self.rank == 0:
            try:
                print(*args, flush=True)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.kill(os.getpid(), signal.SIGHUP)


def setup(device='auto', dtype='auto', compile=False):
    """Sets up device, dtype and, under torchrun, the process group. Prints what was chosen and why."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = device if device != 'auto' else next(name for name, there in found.items() if there)
    if not found[kind]:
        raise Refusal(f'device={kind} is not available to torch {torch.__version__}; use --device=cpu')
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = torch.device(kind, int(os.environ.get('LOCAL_RANK', 0))) if kind == 'cuda' else torch.device(kind)
    if kind == 'cuda':
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=RANK_TIMEOUT)
        store, *_ = next(dist.rendezvous('env://', timeout=timeout))
        if world_size == int(os.environ.get('LOCAL_WORLD_SIZE', 0)):
            # --max-restarts reuses the store: ranks must not find the addresses of earlier, dead ranks. Not on several
            # machines, since each counts its own restarts
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group('cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo', store=store, rank=rank,
                                world_size=world_size, timeout=timeout)
        atexit.register(end_ranks)
    if dtype != 'auto':
        dtype, why = getattr(torch, dtype), 'as set'
    elif kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype, why = torch.bfloat16, 'this GPU supports it'
    else:
        dtype, why = torch.float32, f'the default on {kind}'
    compile = kind == 'cuda' if compile is None else compile
    machine = Machine(rank, world_size, device, dtype, compile)
    ranks = f' x {world_size} ranks' if world_size > 1 else ''
    machine.print(f'device {device}{ranks}, dtype {str(dtype)[6:]} ({why}), compile {"on" if compile else "off"}, '
                  f'torch {torch.__version__}')
    return machine


def end_ranks():
    """Runs before Python exits: gloo aborts a process whose threads still hold tensors at that point."""
    dist.destroy_process_group()
    time.sleep(0.1)


def matmul_peak(machine):
    """FLOP/s of a large square matrix product on this device, the reference of MFU."""
    n = 1024 if machine.device.type == 'cpu' else 8192
    a = torch.randn(n, n, dtype=machine.dtype, device=machine.device)

    def product():
        a @ a
        synchronize(machine)

    return 2 * n ** 3 / min(timeit.repeat(product, number=1, repeat=4))


def synchronize(machine):
    getattr(torch, machine.device.type).synchronize()


def seed_everything(seed, step, rank):
    # a pure function of the three: checkpoints need no generator state, and any number of ranks can resume
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2 ** 63)


class StopSignal:
    """Inside its `with` block, STOP_SIGNALS only set a flag, and the loop saves and ends at its next step.

    The death of torchrun counts as SIGTERM: kill -9 of torchrun leaves its ranks alive.
    """
    caught = 0

    def __enter__(self):
        self.handlers = {n: signal.signal(n, self.catch) for n in STOP_SIGNALS
                         if signal.getsignal(n) != signal.SIG_IGN}  # signals that nohup ignores stay ignored
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        self.caught = number

    @property
    def number(self):
        """The signal received, or 0."""
        orphaned = 'TORCHELASTIC_RUN_ID' in os.environ and os.getppid() != PARENT
        return self.caught or (signal.SIGTERM if orphaned else 0)


# The run's folder ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run(cfg, machine):
    """Locks out_dir for this run, and yields the state to resume from, or None for a new run."""
    out = Path(cfg.out_dir)
    with contextlib.ExitStack() as stack:
        machine.on_rank_0(lambda: claim(cfg, out, stack))
        state = load_checkpoint(out) if checkpoints(out) else None
        if len(set(machine.gather(state and state['step']))) > 1:
            raise Refusal(f'the ranks do not find the same checkpoint in {out}; use a folder that all machines share')
        try:
            yield state
        except RuntimeError as error:
            if machine.world_size > 1 and (isinstance(error, dist.DistError) or 'gloo' in str(error)):
                raise Refusal('another rank has ended or does not respond, so this one ends too; see the last message '
                              'of that rank. --resume=True continues from the last checkpoint') from error
            raise


def claim(cfg, out, stack):
    """Locks the folder until `stack` closes or this process dies. With overwrite, deletes the run in it.

    Raises Refusal for a folder that this run must not touch: two runs in one folder would mix their files.
    """
    out.mkdir(parents=True, exist_ok=True)
    held = os.open(out, os.O_RDONLY)
    stack.callback(os.close, held)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refusal(f'{out} is in use by another run; wait until it ends, or choose another --out_dir') from None
    except OSError:  # NFS, for example
        print(f'warning: the file system of {out} has no locks; do not start a second run there', flush=True)
    found = checkpoints(out)
    if cfg.resume and not found:
        if (out / 'best.pt').exists():
            raise Refusal(f'{out} has no ckpt_*.pt, and a run cannot be resumed from best.pt; choose another '
                          '--out_dir, or delete this run with --overwrite=True')
        print(f'nothing to resume in {out}: starting at step 0', flush=True)
    elif not cfg.resume and any(out.iterdir()):
        if not (out / 'config.json').exists() and not found:
            raise Refusal(f'{out} is not empty and is not the folder of a run; choose another --out_dir')
        if not cfg.overwrite:
            raise Refusal(f'{out} is not empty; add --resume=True to continue its run or --overwrite=True to delete '
                          'it, or choose another --out_dir')
        for path in [path for pattern in RUN_FILES for path in out.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def start_files(cfg, step, **more):
    """Writes config.json, and renames to *.damaged the later checkpoints, which could not be read."""
    out = Path(cfg.out_dir)
    script = Path(inspect.getfile(type(cfg))).name
    write_whole(out / 'config.json', json.dumps(dict(asdict(cfg), script=script, **more), indent=1))  # written first
    for path in checkpoints(out):
        if path.name > f'ckpt_{step:08d}.pt':
            path.rename(path.with_suffix('.damaged'))


def finish(cfg, machine, stop, step, done, seconds, hint=''):
    """Ends a run whose state is saved: draws its plot if it is done, exits with a code if a signal has ended it."""
    number = max(machine.gather(stop.number))  # a signal may have arrived since the loop last checked
    if number or not done:
        machine.print(f'stopped after step {step}, saved {cfg.out_dir}; continue with --resume=True '
                      f'--out_dir={shlex.quote(cfg.out_dir)}')
    if number:
        sys.exit(128 + number)
    if machine.rank == 0 and done:
        try:
            import plot  # optional: it needs matplotlib
            picture = plot.plot([cfg.out_dir])
        except (Refusal, ImportError) as error:
            picture = f'no picture ({error})'
        if machine.device.type == 'cuda':
            print(f'peak memory {torch.cuda.max_memory_allocated() / 2 ** 20:,.0f} MiB')
        print(f'{seconds:.0f} s\nsaved {cfg.out_dir} and {picture}{hint}', flush=True)


def example_prompt(data):
    """A short prompt from the data, quoted for the shell."""
    try:
        groups, encoding = data.groups('val'), prepare_shp.encoding(data.meta['encoding'])
    except Refusal:  # no vocabulary on this machine; training needs none
        return 'QUESTION'
    prompts = [groups.piece(p) for p in groups.prompts[:100]] or [data.documents('train').tokens[:20]]
    text = encoding.decode(min(prompts, key=len).tolist()).removesuffix(prepare_shp.SEPARATOR)
    return shlex.quote(' '.join(prepare_shp.visible(text).split())[:100])


# Resume --------------------------------------------------------------------------------------------------------------


def describe(cfg, machine, model_config, data, optimizers, **fixed):
    """What a checkpoint stores about its run, for `check_resume` and for those who load its weights.

    fixed: what must not change in a resume, by name, besides model, data, start, optimizers and eval_split.
    """
    return dict(model_config=asdict(model_config), config=asdict(cfg), encoding=data.meta['encoding'],
                fixed=dict(asdict(model_config), data=data.fingerprint[:12], init_from=str(Path(cfg.init_from)),
                           optimizers=[type(optimizer).__name__ for optimizer in optimizers],
                           eval_split=cfg.eval_split, **fixed),
                machine=dict(ranks=machine.world_size, device=machine.device.type, dtype=str(machine.dtype),
                             compile=machine.compile, torch=str(torch.__version__)), code=code())


def code():
    """The project's source files and the script that runs, each with its crc32, so that a resume tells of an edit."""
    root = Path(__file__).parent
    files = {*root.glob('*.py'), *root.glob('extras/*.py'), Path(sys.argv[0]).resolve()}
    return {path.name: f'{zlib.crc32(path.read_bytes()):08x}' for path in sorted(files) if os.path.isfile(path)}


def check_resume(state, now):
    """Raises Refusal for a checkpoint of another run, or beyond this run's last step. `now`: what this run would save.

    Returns 'exact', or the changes of options, machine and source files since then.
    """
    for name, was in state['fixed'].items():
        if now['fixed'].get(name) != was:
            raise Refusal(f'cannot resume: {name} is {was} in the checkpoint, {now["fixed"].get(name)} here; use the '
                          'same value, or choose another --out_dir')
    if state['step'] > now['config']['max_iters']:
        raise Refusal(f'cannot resume: the checkpoint is at step {state["step"]}, beyond max_iters='
                      f'{now["config"]["max_iters"]}; set more steps, or choose another --out_dir')
    changed = [f'{k} {was} -> {now[part].get(k)}' for part in ('config', 'machine') for k, was in state[part].items()
               if now[part].get(k) != was and (part == 'machine' or k not in INCIDENTAL)]
    if changed and state['step'] == state['config']['max_iters'] == now['config']['max_iters']:
        raise Refusal(f'this run is finished, and would be evaluated again with other options ({", ".join(changed)}); '
                      'leave them out, raise max_iters, or choose another --out_dir')
    changed += [name for name, was in state.get('code', {'source files': ''}).items() if now['code'].get(name) != was]
    return f'changed: {", ".join(changed)}' if changed else 'exact'


# Metrics -------------------------------------------------------------------------------------------------------------


class Metrics:
    """out_dir/<name>: one JSON line per event, in step order. A resume first removes the lines it will write again."""

    def __init__(self, cfg, machine, step, name='metrics.jsonl'):
        self.path, self.rank, self.viewers = Path(cfg.out_dir) / name, machine.rank, []

        def cut():  # a checkpoint is written before its evaluation, so the evaluation of this step is repeated
            kept = [json.dumps(event) + '\n' for event in read_events(self.path)
                    if event['step'] < step or event['step'] == step and event['event'] == 'train']
            write_whole(self.path, ''.join(kept))

        machine.on_rank_0(cut)
        if machine.rank == 0 and name == 'metrics.jsonl' and (cfg.tensorboard or cfg.wandb):
            from extras.viewers import viewers
            self.viewers = viewers(cfg, step)

    def write(self, event, **values):
        if self.rank == 0:
            with open(self.path, 'a') as f:
                f.write(json.dumps(dict(event=event, **values)) + '\n')
            for show in self.viewers:
                show(event, values)


class Clock:
    """Where the time of a run goes: its speed since the last line of the log, and the time it still needs."""

    def __init__(self, seconds, step, tokens):
        self.start, self.line = time.perf_counter() - seconds, (step, tokens, time.perf_counter())
        self.parts, self.apart = {}, 0.0  # seconds of the latest of each part, and of all parts since the last line

    def seconds(self):
        return time.perf_counter() - self.start

    @contextlib.contextmanager
    def part(self, name):
        """Times what is not training: an evaluation, a collection of answers."""
        since = time.perf_counter()
        yield
        self.parts[name] = time.perf_counter() - since
        self.apart += self.parts[name]

    def pace(self, step, tokens, last_step, **ahead):
        """-> tokens trained a second, time left in words. ahead: how many parts of each name are still to come."""
        (old_step, old_tokens, since), self.line = self.line, (step, tokens, time.perf_counter())
        seconds, self.apart = self.line[2] - since - self.apart, 0.0
        left = (last_step - step) * seconds / (step - old_step)
        left += sum(count * self.parts.get(name, 0.0) for name, count in ahead.items())
        return (tokens - old_tokens) / seconds, str(timedelta(seconds=round(left)))


def in_words(numbers):
    return ', '.join(f'{name} {value:.4f}' for name, value in numbers.items())


def read_events(path):
    """The events of a metrics.jsonl, [] if there is none. Skips damaged lines, and a last line cut off by a kill."""
    events, lines = [], path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                print(f'warning: line {number} of {path} is damaged and is skipped', flush=True)
    return events


# Files ---------------------------------------------------------------------------------------------------------------


def first_line(error):
    return str(error).partition('\n')[0]


@contextlib.contextmanager
def replacing(path):
    """A file to write, which replaces `path` when it is complete: a kill at any moment leaves the old file."""
    temporary = path.with_name('.tmp' + path.suffix)  # overwrites the one of a killed process
    try:
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails
        raise Refusal(f'{path} could not be written ({first_line(error)}); is the disk full, or its folder '
                      'missing?') from None
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the rename survives a power cut, too
    os.close(folder)


def write_whole(path, text):
    with replacing(path) as f:
        f.write(text.encode())


def save_checkpoint(out_dir, state, name=None):
    """Writes `state` (tensors and primitives, with 'step') to out_dir/name, default ckpt_{step:08d}.pt; -> the path.

    Only the last two numbered checkpoints are kept.
    """
    path = Path(out_dir) / (name or f'ckpt_{state["step"]:08d}.pt')
    with replacing(path) as f:
        torch.save(state, f)
    for old in checkpoints(out_dir)[:-2]:
        old.unlink()
    return path


def checkpoints(folder):
    """The numbered checkpoints in `folder`, oldest first; copies under other names do not count."""
    return sorted(Path(folder).glob(f'ckpt_{"[0-9]" * 8}.pt'))


def load_checkpoint(where, name=None, make=''):
    """The state in the file `where`, or in the folder `where`: its latest valid ckpt_*.pt, or the file `name` in it.

    Only tensors and primitives are read (weights_only), onto the CPU. A damaged checkpoint is skipped with a warning.
    Raises Refusal if none is valid. make: the command to suggest if there is no config file of the folder's name.
    """
    where = Path(where)
    paths = [where] if where.is_file() else [where / name] if name else checkpoints(where)[::-1]
    if not paths or not paths[0].exists():
        config = Path(f'config/{where.name}.py')
        make = f'python {header(config)[1]} {config}' if config.is_file() else make
        raise Refusal(f'there is no checkpoint {name or "ckpt_*.pt"} in {where}; '
                      + (f'make one with: {make}' if make else 'name the folder of a run'))
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():  # torch.load itself checks no CRC
                    raise OSError(f'wrong checksum of {bad}')
            return torch.load(path, map_location='cpu', weights_only=True)
        except Exception as error:  # zipfile and the unpickler raise many types after a flipped bit
            print(f'warning: {path} is damaged ({type(error).__name__}: {first_line(error)[:80]}) and is skipped',
                  flush=True)
    raise Refusal(f'there is no valid checkpoint in {where}; use another run, or train it again with --overwrite=True')


# Other runs ----------------------------------------------------------------------------------------------------------


def load_weights(where, which='best', make=''):
    """The 'best' or the 'last' checkpoint of a finished or stopped run. Prints which one it is.

    The best one was evaluated after an update; if a run has none yet, its last one is used.
    """
    name = 'best.pt' if which == 'best' and (Path(where) / 'best.pt').exists() else None
    state = load_checkpoint(where, name, make)
    if os.environ.get('RANK', '0') == '0':
        which = '' if Path(where).is_file() else 'best ' if name else 'last '
        print(f'{where}: {which}checkpoint, step {state["step"]}', flush=True)
        if 'code' in state and state['code']['model.py'] != code()['model.py']:
            print(f'note: model.py has been edited since {where} was written; its weights may mean another model now')
    return state


def load_run(cfg, option, encoding):
    """`load_weights` of the run that cfg.<option> names. If there is none, the Refusal has a command that makes it."""
    name = getattr(cfg, option)
    where = Path(name or f'out/{option}')
    options = [f'--out_dir={shlex.quote(str(where))}', f'--split={cfg.split}',
               f'--dataset={cfg.dataset}' if cfg.dataset else f'--source={cfg.source}']
    make = f'python train.py {" ".join(options)}'
    if option == 'reward_model':
        options += ['--method=reward', f'--init_from={cfg.init_from}', f'--max_new_tokens={cfg.max_new_tokens}']
        make = f'python preference.py {" ".join(options)}'
    make = f'{make}, and use it with --{option}={where}'
    if not name:
        raise Refusal(f'{option} names no run; make one with: {make}')
    state = load_weights(where, make=make)
    if state['encoding'] != encoding.name:
        raise Refusal(f"{option}={where} was trained on {state['encoding']} tokens, but the data are in "
                      f'{encoding.name}; train it on data with the same --encoding')
    return state


def open_start(cfg, encoding):
    """What cfg.init_from names -> dict(model, model_config, encoding), its context cropped to cfg.block_size.

    The folder or checkpoint of a run, or a GPT-2 of Hugging Face: a folder, or gpt2, ..., gpt2-xl.
    """
    name = cfg.init_from
    if is_hugging_face(name):
        from extras import huggingface
        state = huggingface.open_gpt2(name, encoding)
    else:
        state = load_run(cfg, 'init_from', encoding)
        if 'model' not in state:
            raise Refusal(f'init_from={name} is a reward model and has no policy; name the folder of another run')
    kept = {key: state.get(key) for key in ('model', 'model_config', 'encoding', 'link_order')}
    return crop(kept, cfg.block_size, name)


def is_hugging_face(name):
    """Whether `name` is a GPT-2 on the Hub, or a folder with a config.json of transformers."""
    config = Path(name) / 'config.json'
    if config.is_file():
        return '"model_type"' in config.read_text()
    return name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl') and not Path(name).exists()


def crop(state, block_size, name):
    """A start with only its first block_size positions (0 = all). Texts that fit give the same output as before."""
    available = state['model_config']['block_size']
    if block_size > available:
        raise Refusal(f'block_size={block_size} is more than the {available} positions of {name}; use '
                      f'--block_size={available} or less')
    if block_size in (0, available):
        return state
    weights = dict(state['model'])
    weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:block_size].clone()
    return dict(state, model=weights, model_config=dict(state['model_config'], block_size=block_size))


# Updates -------------------------------------------------------------------------------------------------------------


def lr_factor(step, cfg):
    """Linear warm-up to 1, then a cosine to min_lr / learning_rate, if that is lower (Loshchilov & Hutter 2017)."""
    if step < cfg.warmup_iters:
        return (step + 1) / cfg.warmup_iters
    done = min((step - cfg.warmup_iters) / max(cfg.max_iters - cfg.warmup_iters, 1), 1.0)
    lowest = min(cfg.min_lr / cfg.learning_rate, 1.0) if cfg.learning_rate else 1.0
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def run_notes(cfg):
    """A sentence for each option whose effect may differ from what its value suggests."""
    if cfg.eval_split != 'val':
        yield f'evaluations, val_ce and best.pt use the {cfg.eval_split} split'
    if cfg.warmup_iters >= cfg.max_iters:
        yield f'the whole run ({cfg.max_iters} steps) is warm-up; use a --warmup_iters below {cfg.max_iters}'
    if cfg.min_lr > cfg.learning_rate:
        yield f'learning_rate={cfg.learning_rate} stays constant after warm-up, because min_lr={cfg.min_lr} is larger'


def decay_groups(modules, cfg):
    """Parameter groups for an optimizer: matrices decay, biases and LayerNorms do not."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [dict(params=[p for p in parameters if p.ndim >= 2], weight_decay=cfg.weight_decay),
            dict(params=[p for p in parameters if p.ndim < 2], weight_decay=0.0)]


class Updates:
    """Steps of any torch optimizers. Clips the gradient of each module, and skips a step if one is not finite.

    After DDP the gradients are the same on all ranks, and so are the decisions here. On CUDA, fused optimizers skip a
    step by themselves and the host reads its norm one step later; with float16 or other optimizers the host waits.
    """

    def __init__(self, optimizers, modules, cfg, machine):
        self.optimizers, self.modules, self.cfg, self.machine = optimizers, modules, cfg, machine
        self.rates = [[group['lr'] for group in optimizer.param_groups] for optimizer in optimizers]
        updated = {p for optimizer in optimizers for group in optimizer.param_groups for p in group['params']}
        if left := sum(p.requires_grad and p not in updated for module in modules for p in module.parameters()):
            raise Refusal(f'{left} trained tensors are in no optimizer; add them, or freeze them with requires_grad_')
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.skipped = self.skipped_in_a_row = 0
        self.norm = math.nan
        fused = all(getattr(optimizer, '_step_supports_amp_scaling', False) for optimizer in optimizers)
        self.ahead = machine.device.type == 'cuda' and fused and not self.scaler.is_enabled()
        self.unread = []  # of the latest steps: number, norms on the CPU or being copied to it, event of that copy

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip_and_step(self, step, save_state):
        """The update number `step`, counted from 1.

        If a norm is not finite, nothing is updated; MAX_SKIPPED_IN_A_ROW such steps save the state and end the run.
        """
        factor = lr_factor(step - 1, self.cfg)
        for optimizer, rates in zip(self.optimizers, self.rates):
            self.scaler.unscale_(optimizer)
            for group, rate in zip(optimizer.param_groups, rates):
                group['lr'] = rate * factor
        norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), self.cfg.grad_clip or math.inf)
                 for module in self.modules]
        norms = torch.stack([norms[0], sum(norms)])
        on_gpu = norms.device.type == 'cuda'
        self.unread.append((step, norms.to('cpu', non_blocking=on_gpu),
                            torch.cuda.current_stream().record_event() if on_gpu else None))
        self.read_norms(all_but=1 if self.ahead else 0)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            save_state()  # all parameters are still finite
            raise Refusal(f'{MAX_SKIPPED_IN_A_ROW} gradients in a row were not finite, up to step {step}; the '
                          f'parameters before them are saved in {self.cfg.out_dir}; try a smaller learning_rate')
        for optimizer in self.optimizers:
            if self.ahead:
                optimizer.found_inf = 1 - norms[1].isfinite().float()
            if self.ahead or not self.skipped_in_a_row:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()

    def read_norms(self, all_but=0):
        """Reads the norms of all but the latest `all_but` steps -> the first module's norm, before clipping."""
        while len(self.unread) > all_but:
            step, norms, arrived = self.unread.pop(0)
            if arrived is not None:
                arrived.synchronize()
            self.norm, total = norms.tolist()
            self.skipped_in_a_row = 0 if math.isfinite(total) else self.skipped_in_a_row + 1
            if self.skipped_in_a_row:
                self.skipped += 1
                self.machine.print(f'warning: the gradient norm of step {step} is {total}; its update is skipped')
        return self.norm

    def state_dict(self):
        self.read_norms()
        return dict(optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
                    scaler=self.scaler.state_dict(), skipped=self.skipped)

    def load_state_dict(self, state):
        for optimizer, saved in zip(self.optimizers, state['optimizers']):
            own = optimizer.state_dict()
            was, now = ([group['params'] for group in of['param_groups']] for of in (saved, own))
            if was != now:
                raise Refusal('cannot resume: the optimizer groups its parameters differently than before')
            optimizer.load_state_dict(dict(own, state=saved['state']))  # with this run's options
        if state['scaler']:  # only with float16
            self.scaler.load_state_dict(state['scaler'])
        self.skipped = state['skipped']
