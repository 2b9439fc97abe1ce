"""What lets a run survive: ranks and signals, the run's folder, checkpoints, resume, metrics, an update that is finite.

train.py and preference.py can be understood without it.
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
import zipfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import prepare_shp
from configurator import Refusal, at_least
from model import GPT, GPTConfig, ScalarHead

DEVICES = 'auto', 'cpu', 'cuda', 'mps'
DTYPES = 'auto', 'float32', 'bfloat16', 'float16'
MAX_SKIPPED_IN_A_ROW = 10  # non-finite gradients that end a run
RANK_TIMEOUT = 180         # seconds that ranks wait for each other; a dead one must not hold the run for torch's 1800
LOCK_TIMEOUT = 10          # seconds that a run waits for another one to leave its folder
PARENT = os.getppid()      # torchrun, where the run is one of its ranks
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # Ctrl-C, a scheduler, a terminal that has closed
SHAPE = 'n_layer', 'n_head', 'n_embd', 'bias', 'tie_weights'  # of a model, beside block_size and dropout
HUB = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'  # names that are fetched
WEIGHTS = 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'
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
            import plot  # needs matplotlib
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



def read_events(path):
    """Each line of a metrics.jsonl that can be read, and its event; none where there is no file.

    A damaged line is left out with a warning, and without one the last line, which is written while a run is killed.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            line = line.decode()
            event = json.loads(line)
            if not isinstance(event['step'], (int, float)) or not isinstance(event['event'], str):
                raise TypeError
        except (ValueError, TypeError, LookupError, RecursionError):
            if number < len(lines):
                print(f'warning: {path} is damaged in line {number}, which is left out', flush=True)
            continue
        yield line, event


# Checkpoints ---------------------------------------------------------------------------------------------------------


def save_checkpoint(out_dir, state, name=None, keep=2):
    """Writes `state` (tensors and primitives, with 'step') to out_dir/name, default ckpt_{step:08d}.pt, all or nothing.

    A temporary file in the same folder is written, synced, checked and renamed: a kill at any moment leaves the old
    files whole. Of the numbered checkpoints the last `keep` stay. Returns the path.
    """
    out_dir = Path(out_dir)
    path = out_dir / (name or f'ckpt_{state["step"]:08d}.pt')
    temporary = path.with_suffix(f'.tmp-{os.getpid()}')
    try:
        with open(temporary, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if problem := _damage(temporary):
            raise Refusal(f'{temporary} was not written correctly ({problem}); is the disk sound?')
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter torch's word for a write that failed
        raise Refusal(f'{path} could not be written ({first_line(error)}); is the disk full, or its folder '
                      'missing?') from None
    finally:
        for rest in out_dir.glob('*.tmp-*'):  # of this save, if it failed, and of one that was killed
            rest.unlink()
    folder = os.open(out_dir, os.O_RDONLY)
    os.fsync(folder)  # the rename too must survive a power cut
    os.close(folder)
    for old in checkpoints(out_dir)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder):
    """The numbered checkpoints in `folder`, oldest first; a copy under a name of one's own is none of them."""
    return sorted(path for path in Path(folder).glob('ckpt_*.pt') if path.stem.removeprefix('ckpt_').isdigit())


def load_checkpoint(where, name=None):
    """The state in the file `where`, or in the folder `where`: its latest valid ckpt_*.pt, or the file `name` in it.

    Only tensors and primitives are read (weights_only), onto the CPU. A damaged checkpoint is passed over with a
    warning. Refuses where there is none, or none that is valid.
    """
    where = Path(where)
    paths = [where] if where.is_file() else [where / name] if name else checkpoints(where)[::-1]
    if not paths or not paths[0].exists():
        raise Refusal(f'there is no checkpoint {name or "ckpt_*.pt"} in {where}; train one with --out_dir={where}')
    for path in paths:
        problem = _damage(path)
        if not problem:
            try:
                state = torch.load(path, map_location='cpu', weights_only=True)
                problem = _misfit(state)
            except MemoryError:  # of ours, not the file's
                raise
            except Exception as error:  # whatever the unpickler makes of it, the file is of no use
                problem = f'{type(error).__name__}: {first_line(error)}'
        if not problem:
            return state
        print(f'warning: {path} is damaged ({problem}); it is not used', flush=True)
    if len(paths) == 1:
        raise Refusal(f'{paths[0]} is no sound checkpoint; use another one, or make it again')
    raise Refusal(f'there is no valid checkpoint in {where}: all are damaged; train again with --overwrite=True')


def load_weights(where, name=None):
    """A checkpoint from `load_checkpoint` for another use than going on with its run: with its run's config, too."""
    state = load_checkpoint(where, name)
    if not all(isinstance(state.get(key), kind) for key, kind in (('config', dict), ('encoding', str))):
        raise Refusal(f'{where} does not say by which options it was trained; name the folder of a run')
    return state


def first_line(error):
    return str(error).partition('\n')[0]


def _damage(path):
    """What is wrong with the zip archive that torch.save made, or '': torch.load itself checks no CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            return f'wrong checksum of {bad}' if bad else ''
    except Exception as error:  # zipfile has half a dozen kinds for what a flipped bit can do
        return f'{type(error).__name__}: {error}'


def config_of(state, name):
    """The GPTConfig, as a dict, of a checkpoint's module: a critic has its reward model's shape, not the policy's."""
    return state['critic_config'] if name == 'critic' and 'critic_config' in state else state['model_config']


def _misfit(state):
    """Why what a sound archive holds is none of our checkpoints, or None."""
    if not isinstance(state, dict) or type(state.get('step')) is not int or state['step'] < 0:
        return 'it was not made by this program'
    modules = [name for name in ('model', 'reward_model', 'critic') if name in state]
    configs = 'model_config', *({'critic_config'} & state.keys())
    if modules and not all(isinstance(state.get(name), dict) for name in (*modules, *configs)):
        return 'it was not made by this program'
    for name in modules:
        config = config_of(state, name)
        if len(state[name]) < config['n_layer']:  # before so many layers are made for nothing
            return f'its {name} is not of its model_config'
        with torch.device('meta'):  # shapes without memory
            module = GPT(GPTConfig(**config))
            module = module if name == 'model' else ScalarHead(module)
        if {key: w.shape for key, w in state[name].items()} != {key: w.shape for key, w in module.state_dict().items()}:
            return f'its {name} is not of its model_config'
        if not all(w.is_floating_point() and w.isfinite().all() for w in state[name].values()):
            return f'its {name} has weights that are no finite numbers'


def load_run(cfg, option):
    """The weights of the run cfg.<option>: its best.pt, else its latest checkpoint. Refuses with the command for one.
    """
    folder = getattr(cfg, option)
    where = Path(folder or f'out/{option}')
    if where.is_file() or where.is_dir() and ((where / 'best.pt').exists() or checkpoints(where)):
        return load_weights(where, 'best.pt' if (where / 'best.pt').exists() else None)
    config, script = f'config/{where.name}.py', 'preference.py' if option == 'reward_model' else 'train.py'
    if Path(config).is_file():
        command = f'python {script} {config}'
    else:
        script += f' --method=reward --init_from={cfg.init_from}' if option == 'reward_model' else ''
        command = f'python {script} --out_dir={where}' + ''.join(
            f' --{name}={getattr(cfg, name)}' for name in ('dataset', 'source', 'encoding') if getattr(cfg, name))
    raise Refusal(f'{option}={folder or repr("")} holds no checkpoint; make one with: {command}, or name the folder of '
                  f'another run with --{option}=DIR')


def not_own_folder(cfg, *options):
    """Refuses where one of these options names the run's own folder, or a checkpoint in it."""
    for option in options:
        where = Path(getattr(cfg, option)).resolve()
        if getattr(cfg, option) and Path(cfg.out_dir).resolve() in (where, where.parent):
            raise Refusal(f'{option} and out_dir are both {cfg.out_dir}; choose another --out_dir')


def check_vocabulary(state, option, folder, encoding):
    if state['encoding'] != encoding.name or state['model_config']['vocab_size'] != encoding.n_vocab:
        raise Refusal(f"{option}={folder} speaks {state['encoding']}, but the data are in {encoding.name}; train it on "
                      'data of one --encoding')


# The start of a run --------------------------------------------------------------------------------------------------


def open_start(cfg, encoding):
    """What cfg.init_from names -> dict(model, model_config, encoding), its context cropped to cfg.block_size.

    A folder or checkpoint of a run of ours, a folder of Hugging Face with a GPT-2, or one of HUB. Refuses what is not
    there, speaks another encoding than the data's, or cannot be expressed by our GPT, and says which.
    """
    name, where = cfg.init_from, Path(cfg.init_from)
    if is_hugging_face(where) or name in HUB and not where.exists():
        from extras.huggingface import check_tokenizer, fetch, read_gpt2
        folder = where if where.exists() else fetch(name)
        state = read_gpt2(folder)
        check_vocabulary(state, 'init_from', name, encoding)
        check_tokenizer(folder, encoding)
    else:
        state = load_run(cfg, 'init_from')
        if 'model' not in state:
            raise Refusal(f'init_from={name} is a reward run and has no policy; name the folder of another run')
        check_vocabulary(state, 'init_from', name, encoding)
    return crop({key: state[key] for key in ('model', 'model_config', 'encoding')}, cfg.block_size, name)


def is_hugging_face(where):
    """Whether `where` is a folder that transformers has written, or one like it; our config.json has no such key."""
    if any((where / name).is_file() for name in WEIGHTS):
        return True
    try:
        return bool({'architectures', 'model_type'} & set(json.loads((where / 'config.json').read_text())))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def crop(state, block_size, name):
    """The first block_size (0 = all) positions of a start; what it says of a longer text does not change."""
    has = state['model_config']['block_size']
    if block_size > has:
        raise Refusal(f'block_size={block_size} is more than the {has} positions that {name} has learned; use '
                      f'--block_size={has} or less')
    if block_size in (0, has):
        return state
    weights = dict(state['model'])
    weights['transformer.wpe.weight'] = weights['transformer.wpe.weight'][:block_size].clone()
    return dict(state, model=weights, model_config=dict(state['model_config'], block_size=block_size))


# Updates -------------------------------------------------------------------------------------------------------------


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
