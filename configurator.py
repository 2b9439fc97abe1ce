"""Command line -> one frozen Config. `configure` reads it, `run` is what the last line of every script calls.

    python train.py config/toy_t2.py --learning_rate=1e-3 --domains=askculinary,legaladvice

Arguments are config files and --key=value flags, in any order; the later wins. A config file is plain Python that
assigns options. It runs in a namespace of its own, and only declared options cross over; names that start with '_' and
modules stay private to it. Where Config has a field `runs: tuple[str, ...]`, arguments that are neither flags nor end
in .py are added to it: `python plot.py out/a out/b`.

The options are the fields of a frozen dataclass: int, float, str, bool, tuple[one of these, ...], or one of these or
None. A comment behind a field is its line in --help. If Config has a method `check`, the sentences it returns or yields
say what is wrong with the values, and are reported beside the other errors.
"""
import difflib
import inspect
import io
import math
import os
import re
import runpy
import shlex
import sys
import textwrap
import time
import tokenize
import traceback
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType, NoneType
from typing import get_args, get_origin, get_type_hints


HERE = Path(__file__).parent
LINE_SECONDS = 30  # between two lines about one long loop


class Refusal(Exception):
    """What we decline to do: a sentence that says what is wrong, where, and what to do about it."""


def configure(Config, argv=None):
    """argv (default: the command line's) -> a Config, its values of the declared types.

    Rank 0 prints the values that differ from the defaults, with their source. Exits with code 0 after --help, and with
    code 2 after an error: rank 0 prints all of them, one sentence a line, on stderr.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    rank_0 = os.environ.get('RANK', '0') == '0'
    if '--help' in argv or '-h' in argv:
        if rank_0:
            print(help_text(Config), flush=True)
        sys.exit(0)
    kinds, values, sources, errors = option_types(Config), {}, {}, []

    def assign(key, value, convert, source):
        where = '' if source == 'command line' else f'{source}: '
        if key not in kinds:
            errors.append(f'{where}unknown option {key!r}, {suggest(key, kinds)}')
            return
        try:
            values[key], sources[key] = convert(kinds[key], value), source
        except ValueError as hint:
            errors.append(f'{where}{key} must be {type_name(kinds[key])}, not {value!r}{hint}')

    while argv:
        arg = argv.pop(0)
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            spaced = not equals and argv and not argv[0].startswith('--') and not argv[0].endswith('.py')
            if spaced:
                text = argv.pop(0)  # or it would be reported once more, as a missing file
            if equals or key not in kinds:
                assign(key, text, from_text, 'command line')
            elif spaced:
                errors.append(f'write --{key}={shlex.quote(text)}, with an equals sign and no space')
            else:
                errors.append(f'--{key} needs a value: write --{key}={"True" if kinds[key] is bool else "VALUE"}')
        elif 'runs' in kinds and not arg.endswith('.py'):
            values['runs'], sources['runs'] = values.get('runs', ()) + (arg,), 'command line'
        elif not (path := config_path(arg)):
            flag = arg.startswith('-') or '=' in arg
            errors.append(f'there is no config file {arg!r}, ' + (
                'and a flag is written --key=value' if flag else suggest(arg, config_files(), 0.5)))
        else:
            try:
                assigned = runpy.run_path(path)
            except (Exception, SystemExit) as error:
                assigned = {}
                errors.append(failure(path, error))
            for key, value in assigned.items():
                if not key.startswith('_') and not isinstance(value, ModuleType):
                    assign(key, value, from_value, arg)

    cfg = replace(Config(), **values)
    if hasattr(cfg, 'check'):
        errors += cfg.check()  # here a value refused above is still at its default
    if errors:
        if rank_0:
            print(*errors, sep='\n', file=sys.stderr, flush=True)
        sys.exit(2)
    changed = [(f'{key} = {getattr(cfg, key)!r}', sources[key]) for key in kinds
               if getattr(cfg, key) != getattr(Config(), key)]
    if rank_0 and changed:
        print('options that differ from the defaults:', *columns(changed), sep='\n', flush=True)
    return cfg


def run(main, Config):
    """main(configure(Config)), its end as an exit code: a refusal is one line on stderr and code 1, Ctrl-C is 130.

    ValueError is how files that import torch only refuse. Its line tells the place too, for it may be a bug after all;
    any other exception is one, and keeps its traceback.
    """
    rank = os.environ.get('RANK', '0')
    prefix = 'error' if rank == '0' else f'error on rank {rank}'
    try:
        main(configure(Config))
        sys.stdout.flush()
    except Refusal as error:
        sys.exit(f'{prefix}: {error}')
    except ValueError as error:
        if type(error) is not ValueError:  # UnicodeDecodeError and the like
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(f'{prefix}: {error} ({Path(place.filename).name}, line {place.lineno})')
    except KeyboardInterrupt:
        print('interrupted before anything was to be saved', file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search('allocate memory|out of memory', str(error)):
            raise
        sys.exit(f'{prefix}: there is not enough memory; use a smaller model, block or micro-batch, or fewer threads '
                 f'({str(error).strip()[:200]})')
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
        sys.exit(1)
    except OSError as error:  # a full disk or a folder that cannot be written: the system's words name the file
        sys.exit(f'{prefix}: {error}')


def progress(items, what, say=print):
    """Goes through a sequence and tells when it will be done: a bar in a terminal, else a line every half a minute.

    A loop of less than a second tells nothing, and of several ranks only the first one speaks.
    """
    if os.environ.get('RANK', '0') == '0' and sys.stderr.isatty():
        from tqdm import tqdm  # comes with datasets
        yield from tqdm(items, what, leave=False, dynamic_ncols=True, delay=1)
        return
    start = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said > LINE_SECONDS and done < len(items):
            said = now
            eta = timedelta(seconds=round((now - start) * (len(items) / done - 1)))
            say(f'{what} {done / len(items):.0%}, ETA {eta}')


def at_least(cfg, low, *names):
    """Sentences for those of the named options that are below `low`; for a Config's `check`."""
    return [f'{name}={getattr(cfg, name)} is below {low}' for name in names if not getattr(cfg, name) >= low]


def at_most(cfg, high, *names):
    """The same for those that are above `high`."""
    return [f'{name}={getattr(cfg, name)} is above {high}' for name in names if not getattr(cfg, name) <= high]


# Values --------------------------------------------------------------------------------------------------------------


def option_types(Config):
    hints = get_type_hints(Config)  # the annotations of a module may be strings
    return {field.name: hints[field.name] for field in fields(Config)}


def type_name(kind):
    if get_origin(kind) is tuple:
        return f'tuple[{type_name(get_args(kind)[0])}, ...]'
    return ' or '.join(map(type_name, get_args(kind))) or kind.__name__.removesuffix('Type')


def not_none(kind):
    return next(arg for arg in get_args(kind) if arg is not NoneType)


def from_text(kind, text):
    """What --key=text says -> a value of type `kind`. Raises ValueError with a hint, perhaps an empty one."""
    if NoneType in get_args(kind):
        return None if text == 'None' else from_text(not_none(kind), text)
    if get_origin(kind) is tuple:
        items = [item.strip() for item in text.split(',')] if text else []
        if '' in items:
            raise ValueError('; an item between commas is empty')
        return tuple(from_text(get_args(kind)[0], item) for item in items)
    if kind is bool:
        if text not in ('True', 'true', 'False', 'false'):
            raise ValueError('; write True or False')
        return text in ('True', 'true')
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            raise ValueError('; write digits, such as 10_000' if kind is int else '') from None
        return from_value(kind, value)
    if kind is not str:
        raise TypeError(f'an option cannot be of type {kind}')
    return text


def from_value(kind, value):
    """The same for what a config file assigned; an int will do for a float, a list for a tuple."""
    if NoneType in get_args(kind):
        return None if value is None else from_value(not_none(kind), value)
    if get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f'; write ({value!r},)' if isinstance(value, get_args(kind)[0]) else '')
        return tuple(from_value(get_args(kind)[0], item) for item in value)
    if kind is float and type(value) is int and abs(value) < 2 ** 1023:
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise ValueError('')
    if kind is float and not math.isfinite(value):
        raise ValueError('; it must be finite')
    return value


# Words ---------------------------------------------------------------------------------------------------------------


def suggest(word, known, cutoff=0.6):
    near = difflib.get_close_matches(word, known, n=3, cutoff=cutoff)
    return f'did you mean {" or ".join(near)}?' if near else '--help lists them all'


def config_path(arg):
    """The config file that an argument names, from here or else from beside the scripts; None where there is none."""
    return next((path for path in (arg, os.path.join(HERE, arg)) if os.path.isfile(path)), None)


def config_files():
    where = Path() if Path('config').is_dir() else HERE
    return sorted(f'config/{path.name}' for path in (where / 'config').glob('*.py'))


def failure(path, error):
    """The exception that a config file raised, in one sentence; one of syntax carries its own line number."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    lines += [error.lineno] if getattr(error, 'filename', None) == path and hasattr(error, 'lineno') else []
    where = f' in line {lines[-1]}' if lines else ''
    return f'{path} failed{where}: {type(error).__name__}: {" ".join(str(error).split())}'


def columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  ' + '  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]


def comments(Config):
    """{field: the comment behind it}, bases first; a class whose source is not at hand has none."""
    found = {}
    for cls in reversed(Config.__mro__):
        line = []  # a logical line's tokens so far
        try:
            for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(inspect.getsource(cls))).readline):
                if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                    line = []
                elif token.type == tokenize.COMMENT and line[1:2] == [':']:
                    found[line[0]] = token.string.strip('# ')
                elif token.type not in (tokenize.COMMENT, tokenize.NL):
                    line.append(token.string)
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):
            continue
    return found


def help_text(Config):
    notes, default, options, files = comments(Config), Config(), [], []
    for key, kind in option_types(Config).items():
        value = getattr(default, key)
        text = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
        options.append((f'--{key}={shlex.quote(text)}', type_name(kind), notes.get(key, '')))
    for path in config_files():
        lines = Path(config_path(path)).read_text(encoding='utf-8', errors='replace').splitlines()
        files.append((path, next((line.strip('# ') for line in lines if line.startswith('# ')), '')))
    return '\n'.join([inspect.getdoc(sys.modules[Config.__module__]) or '', '',
                      'Arguments are config files and --key=value flags, the later wins. Options and their defaults:',
                      '', *columns(options), *(['', 'Config files:', ''] if files else []), *columns(files)])
