"""Command line -> one frozen Config. `configure` parses it; the last line of every script calls `run`.

    python prepare_shp.py --max_rows=1000 --domains=askculinary,legaladvice

Arguments are config files (*.py) and --key=value flags; later ones win. A config file is Python that assigns options;
names that start with '_' and modules are ignored. If Config has a field `runs`, other arguments are added to it.
Config is a frozen dataclass. A field is a str, int, float or bool (the last three may be `| None`), or a tuple of one
of these types. The comment after a field is its line in --help. The method `check` yields one sentence per error.
"""
import ast
import difflib
import inspect
import json
import os
import re
import runpy
import shlex
import sys
import time
from collections import ChainMap
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

HERE = Path(__file__).parent
SCRIPT = Path(sys.argv[0]).name
LINE_SECONDS = 10  # between two progress lines of a loop
NOT_RESUMED = 'out_dir', 'resume', 'overwrite', 'stop_step'  # options of one launch, which a resume does not inherit


class Refusal(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do."""


class Options:
    """Base of a script's Config. A class may set the `lowest` value of a number (default: 0) and `choices`."""
    lowest, choices = {}, {}
    given = frozenset()  # the options that were set by flags and config files

    def check(self):
        """Yields a sentence for each invalid value."""
        lowest, choices = (ChainMap(*(vars(cls).get(what, {}) for cls in type(self).__mro__))
                           for what in ('lowest', 'choices'))
        for name in get_type_hints(type(self)):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and value < lowest.get(name, 0):
                yield f'{name}={value} must be {lowest.get(name, 0)} or more'
            if name in choices and value not in choices[name]:
                yield f"{name}={value!r} is not one of {', '.join(map(str, filter(None, choices[name])))}"


def configure(Config, argv=None):
    """argv (default: the command line's) -> a Config. Exits with code 0 after --help, with code 2 after errors.

    With resume=True, options that are not set come from out_dir/config.json, if any. `cfg.given` is the frozenset of
    those set by flags and config files; it is not a field, and dataclasses.replace drops it. Only rank 0 prints.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    say = print if os.environ.get('RANK', '0') == '0' else lambda *args, **kwargs: None
    if '--help' in argv or '-h' in argv:
        say(help_text(Config), flush=True)
        sys.exit(0)
    kinds, values, sources, errors = get_type_hints(Config), {}, {}, []

    def assign(key, value, source=''):
        where = f'{source}: ' if source else ''
        try:
            values[key] = convert(kinds[key], value if source else parse(kinds[key], value))
            sources[key] = source or 'command line'
        except KeyError:
            near = ' or '.join(difflib.get_close_matches(key, kinds))
            hint = f'did you mean {near}?' if near else '--help lists them all'
            errors.append(f'{where}unknown option {key!r}, {hint}')
        except ValueError as hint:
            errors.append(f'{where}{key} must be {inspect.formatannotation(kinds[key])}, not {value!r}{hint}')

    while argv:
        arg = argv.pop(0)
        path = next((str(path) for path in (Path(arg), HERE / arg) if path.suffix == '.py' and path.is_file()), None)
        if arg.startswith('--'):
            key, _, text = arg[2:].partition('=')
            while not text and argv and not argv[0].startswith('--') and not argv[0].endswith('.py'):
                text = argv.pop(0).removeprefix('=')  # --key = value
            if key not in kinds or arg == f'--{key}={text}':
                assign(key, text)
            else:
                errors.append(f'a flag and its value must be one word: write --{key}={text or "VALUE"}')
        elif 'runs' in kinds and not arg.endswith('.py'):
            values['runs'], sources['runs'] = values.get('runs', ()) + (arg,), 'command line'
        elif path:
            try:
                assigned = runpy.run_path(path)
            except Exception as error:
                errors.append(f'{arg} failed: {type(error).__name__}: {error}')
                continue
            keys = [key for key in assigned if key[0] != '_' and not inspect.ismodule(assigned[key])]
            if header(path)[1] != SCRIPT and not set(keys) <= set(kinds):
                errors.append(f'{arg} is a config of {header(path)[1]}; use that script')
                keys = []
            for key in keys:
                assign(key, assigned[key], arg)
        else:
            hint = '--help lists them, and a flag is written --key=value'
            if 'source' in kinds and os.path.exists(arg):
                hint = f'did you mean --source={shlex.quote(arg)} --dataset={shlex.quote(Path(arg).stem)}?'
            errors.append(f'there is no config file {arg!r}; {hint}')

    given, cfg = frozenset(values), Config(**values)
    if getattr(cfg, 'resume', False) and (path := Path(cfg.out_dir, 'config.json')).is_file():
        before = json.loads(path.read_text(encoding='utf-8'))
        if (script := before.get('script')) not in (None, Path(inspect.getfile(Config)).name):
            say(f'{cfg.out_dir} is a run of {script}; run: python {script} --resume=True --out_dir={cfg.out_dir}',
                file=sys.stderr, flush=True)
            sys.exit(2)
        for key in (kinds.keys() & before.keys()) - given - set(NOT_RESUMED):
            assign(key, before[key], str(path))
        cfg = Config(**values)
    elif getattr(cfg, 'resume', False) and given <= set(NOT_RESUMED):
        errors.append(f'there is no run to resume in {cfg.out_dir}; name its folder with --out_dir=DIR')
    object.__setattr__(cfg, 'given', given)
    errors += cfg.check()  # values rejected above are at their defaults
    if errors:
        say(*errors, sep='\n', file=sys.stderr, flush=True)
        sys.exit(2)
    rows = [f'  {f"{key} = {getattr(cfg, key)!r}":<40} {sources[key]}' for key in kinds
            if getattr(cfg, key) != getattr(Config(), key)]
    if rows:
        say('options that differ from the defaults:', *rows, sep='\n', flush=True)
    return cfg


def run(main, Config):
    """Calls main(configure(Config)). A Refusal prints one line on stderr and exits with code 1, Ctrl-C with 130."""
    prefix = f'error on rank {os.environ["RANK"]}' if 'RANK' in os.environ else 'error'
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors='backslashreplace')  # so that a terminal without UTF-8 cannot end a run
    try:
        main(configure(Config))
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the training loop, which saves and exits by itself
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output, such as head, has exited
        os._exit(1)  # without Python's final flush, which would print an error
    except (Refusal, OSError) as error:  # OSError: a full disk or a missing permission
        sys.exit(f'{prefix}: {error}')


def progress(items, what, say=print):
    """Yields the items of a sequence. Every LINE_SECONDS prints the share done and the ETA at the recent speed."""
    last_time, last_done = time.monotonic(), 0
    for done, item in enumerate(items, 1):
        yield item
        seconds = time.monotonic() - last_time
        if seconds > LINE_SECONDS and done < len(items):
            left = (len(items) - done) * seconds / (done - last_done)
            say(f'{what} {done / len(items):.0%}, ETA {left / 60:.1f} min')
            last_time, last_done = time.monotonic(), done


def parse(kind, text):
    """The text of a flag --key=text -> the value that a config file would assign; the text if it is not a literal."""
    if get_origin(kind) is tuple:
        return [parse(get_args(kind)[0], item.strip()) for item in text.split(',') if item.strip()]
    try:
        return text if kind is str else ast.literal_eval({'true': 'True', 'false': 'False'}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def convert(kind, value):
    """Converts a value to `kind`: an int to float, a list to a tuple. Raises ValueError with a hint."""
    args = get_args(kind)
    if type(None) in args:
        return None if value is None else convert(args[0], value)
    if args:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f'; write ({value!r},)')
        return tuple(convert(args[0], item) for item in value)
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind or kind is float and not abs(value) < float('inf'):
        raise ValueError('; write True or False' if kind is bool else '')
    return os.path.expanduser(value) if kind is str and f'{value}/'.startswith('~/') else value


def header(path):
    """First comment of a config file, and the script in its command, as in `# python train.py config/toy_t2.py`."""
    text = Path(path).read_text(encoding='utf-8', errors='replace')
    about, script = re.search('^# (.*)', text, re.M), re.search(r'^#.*?(\w+\.py) config/', text, re.M)
    return about[1] if about else '', script[1] if script else SCRIPT


def help_text(Config):
    """The script's docstring, its options grouped by the class that declares them, and its config files."""
    kinds, default, lines = get_type_hints(Config), Config(), [inspect.getdoc(sys.modules[Config.__module__])]
    for cls in [cls for cls in Config.__mro__ if inspect.get_annotations(cls)]:
        about = 'Options' if cls.__doc__.startswith(f'{cls.__name__}(') else cls.__doc__.splitlines()[0].rstrip('.')
        lines += ['', f'{about} ({Path(inspect.getfile(cls)).name}):']
        notes = dict(re.findall(r'^ +(\w+): .*# (.*)', inspect.getsource(cls), re.M))
        for key in [key for key in inspect.get_annotations(cls) if key in kinds]:  # the others are overridden
            value, kind = getattr(default, key), inspect.formatannotation(kinds.pop(key))
            text = ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
            lines.append(f'  {f"--{key}={shlex.quote(text)}":<31} {kind:<17} {notes.get(key, "")}')
    paths = sorted(Path().glob('config/*.py')) or sorted(HERE.glob('config/*.py'))
    found = [(f'config/{path.name}', *header(path)) for path in paths]
    found = [f'  {name:<28} {about}' for name, about, script in found if script == SCRIPT]
    lines += ['', 'Config files:', *found] if found else []
    return '\n'.join(map(str.rstrip, lines))
