"""The command line, as a user types it: subprocesses for exit codes and streams, calls for values and their types."""
import io
import os
import random
import re
import shlex
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

import configurator
from configurator import configure, progress

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = '''"""Trains nothing."""
from __future__ import annotations
import json
from dataclasses import asdict, dataclass
from configurator import Refusal, run

@dataclass(frozen=True)
class Base:
    dataset: str = 'a#b'          # folder under data/

    def check(self):
        steps: int = 3  # not a field
        if self.dataset.startswith('/'):
            yield f"dataset='{self.dataset}' is no folder name"

@dataclass(frozen=True)
class Config(Base):
    learning_rate: float = 1e-3   # after warm-up
    n_layer: int = 2              # blocks
    resume: bool = False          # go on
    domains: tuple[str, ...] = (  # several
        'x', 'y')
    moments: tuple[float, ...] = ()
    top: int | None = None        # of all
    split: str = 'post'           # post or row
    then: str = ''                # how main ends

    def check(self):
        yield from super().check()
        if self.split not in ('post', 'row'):
            yield f"split='{self.split}' is not one of post, row"

def main(cfg):
    if cfg.then == 'refuse': raise Refusal('no such luck; try again')
    if cfg.then == 'value': raise ValueError('8 does not divide by 3; pick a multiple')
    if cfg.then == 'decode': b'\\xff'.decode()
    if cfg.then == 'bug': {}['missing']
    if cfg.then == 'interrupt': raise KeyboardInterrupt
    if cfg.then == 'memory': raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 12000000000000 bytes")
    if cfg.then == 'runtime': raise RuntimeError('another one')
    if cfg.then == 'flood':
        for i in range(100_000): print('many lines')
    print(json.dumps(asdict(cfg)))

if __name__ == '__main__':
    run(main, Config)
'''


@dataclass(frozen=True)
class Config:
    n: int = 1              # an int
    x: float = 0.5
    flag: bool = False
    name: str = 'a'         # with a # inside
    names: tuple[str, ...] = ()
    numbers: tuple[float, ...] = (1.0,)
    counts: tuple[int, ...] = ()
    top: int | None = None
    maybe: bool | None = None
    limit: float | None = 1.0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'config').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)
    return tmp_path


def command(folder, *args, python=(), **env):
    return subprocess.run([sys.executable, *python, 'script.py', *args], cwd=folder, text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), **env}, timeout=60)


def errors(result):
    """The sentences of a wrong option: exit code 2, nothing on stdout, no traceback."""
    assert result.returncode == 2, result
    assert result.stdout == ''
    assert 'Traceback' not in result.stderr and 'File "' not in result.stderr
    return result.stderr.splitlines()


def refused(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        configure(Config, list(argv))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ''
    return err.splitlines()


def write(path, text):
    path.write_text(text)
    return str(path)


# Values --------------------------------------------------------------------------------------------------------------


def random_values(rng):
    text = ''.join(rng.choice('ab =#"\'\\\n$-é,') for _ in range(rng.randrange(8)))
    word = ''.join(rng.choice('abc=.-_/') for _ in range(rng.randrange(1, 6)))
    x = rng.choice([rng.uniform(-1, 1), rng.gauss(0, 1) * 10 ** rng.randrange(-300, 300), 0.0, 5e-324])
    return dict(n=rng.randrange(-10 ** 18, 10 ** 18), x=x, flag=rng.random() < 0.5, name=text,
                names=(word,) * rng.randrange(4), numbers=(x, -x)[:rng.randrange(3)],
                counts=tuple(rng.randrange(9) for _ in range(rng.randrange(3))), top=rng.choice([None, 0, 7]),
                maybe=rng.choice([None, True, False]), limit=rng.choice([None, x]))


def test_every_value_survives_both_ways(tmp_path):
    """As str() writes it on a command line, and as repr() writes it in a file."""
    rng = random.Random(0)
    for _ in range(100):
        values = random_values(rng)
        flags = [f'--{k}={",".join(map(str, v)) if isinstance(v, tuple) else v}' for k, v in values.items()]
        assert configure(Config, flags) == Config(**values)
        path = tmp_path / 'values.py'
        path.write_text(''.join(f'{k} = {v!r}\n' for k, v in values.items()), encoding='utf-8')
        assert configure(Config, [str(path)]) == Config(**values)


@pytest.mark.parametrize('flag, value', [
    ('--n=10_000', 10000), ('--n=-3', -3), ('--x=1e-3', 1e-3), ('--x=3', 3.0), ('--flag=True', True),
    ('--flag=true', True), ('--flag=false', False), ('--name=', ''), ('--name=a=b', 'a=b'), ('--name=--x=1', '--x=1'),
    ('--name=None', 'None'), ('--names=a,b', ('a', 'b')), ('--names=a, b', ('a', 'b')), ('--names=', ()),
    ('--numbers=0,3', (0.0, 3.0)), ('--counts=4', (4,)), ('--top=None', None), ('--top=5', 5), ('--limit=None', None),
    ('--limit=2', 2.0)])
def test_flag(flag, value):
    key = flag[2:].split('=')[0]
    got = getattr(configure(Config, [flag]), key)
    assert got == value and type(got) is type(value) and repr(got) == repr(value)


@pytest.mark.parametrize('flag, wanted, hint', [
    ('--n=1.5', 'int', 'write digits'), ('--n=1e4', 'int', 'write digits'), ('--n=True', 'int', ''),
    ('--n=', 'int', ''), ('--n=None', 'int', ''), ('--x=fast', 'float', ''), ('--x=nan', 'float', 'finite'),
    ('--x=-inf', 'float', 'finite'), ('--x=1e999', 'float', 'finite'), ('--x=True', 'float', ''),
    ('--flag=1', 'bool', 'True or False'), ('--flag=yes', 'bool', 'True or False'), ('--flag=TRUE', 'bool', ''),
    ('--flag=', 'bool', ''), ('--names=a,,b', 'tuple[str, ...]', 'empty'), ('--names=a,', 'tuple[str, ...]', 'empty'),
    ('--numbers=1;2', 'tuple[float, ...]', ''), ('--counts=1,2.5', 'tuple[int, ...]', ''),
    ('--top=none', 'int or None', ''), ('--maybe=1', 'bool or None', '')])
def test_wrong_flag(capsys, flag, wanted, hint):
    key, text = flag[2:].split('=')
    line, = refused(capsys, flag)
    assert line.startswith(f'{key} must be {wanted}, not {text!r}') and hint in line


@pytest.mark.parametrize('line, value', [
    ('x = 3', 3.0), ('limit = 2', 2.0), ('numbers = [0, 3]', (0.0, 3.0)), ('names = ("a",)', ('a',)),
    ('top = None', None), ('n: int = 4', 4), ('_k = 3\nn = _k * 2', 6), ('import math\nx = math.e', 2.718281828459045)])
def test_file(folder, line, value):
    path = write(folder / 'a.py', line)
    got = getattr(configure(Config, [path]), re.findall(r'(\w+)(?:: int)? = ', line)[-1])
    assert got == value and repr(got) == repr(value)


@pytest.mark.parametrize('line, wanted, given', [
    ('n = True', 'int', 'True'), ('n = 1.0', 'int', '1.0'), ("n = '3'", 'int', "'3'"), ('n = None', 'int', 'None'),
    ('x = True', 'float', 'True'), ("x = float('nan')", 'float', 'nan'), ('flag = 1', 'bool', '1'),
    ('name = 3', 'str', '3'), ("names = ('a')", 'tuple[str, ...]', "'a'; write ('a',)"),
    ("numbers = (1, 'a')", 'tuple[float, ...]', "(1, 'a')"), ('top = False', 'int or None', 'False')])
def test_wrong_type_in_a_file(folder, capsys, line, wanted, given):
    key = line.split()[0]
    sentence, = refused(capsys, write(folder / 'a.py', line))
    assert sentence.startswith(f'{folder}/a.py: {key} must be {wanted}, not {given}')


def test_the_later_wins(folder):
    a, b = write(folder / 'a.py', 'n = 2\nx = 2.0'), write(folder / 'b.py', 'n = 3')
    assert configure(Config, [a, b]) == Config(n=3, x=2.0)
    assert configure(Config, [b, a]) == Config(n=2, x=2.0)
    assert configure(Config, ['--n=9', a]) == Config(n=2, x=2.0)
    assert configure(Config, [a, '--n=9', '--n=8']) == Config(n=8, x=2.0)
    assert configure(Config, [a, '--n=1', '--x=0.5']) == Config()
    assert configure(Config, []) == Config()  # and one call leaves nothing to the next
    with pytest.raises(FrozenInstanceError):
        configure(Config, []).n = 3


def test_argv_is_the_command_lines(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['script.py', '--n=7'])
    assert configure(Config).n == 7
    assert configure(Config, []).n == 1


def test_a_file_has_its_own_namespace(folder, capsys):
    """A file sees no other's names, sets none of the program's, and its helpers do not cross over."""
    a, b = write(folder / 'a.py', 'import os as helper\n_n = 5\nn = _n'), write(folder / 'b.py', 'x = n / 2')
    assert configure(Config, [a]) == Config(n=5)
    sentence, = refused(capsys, a, b)
    assert sentence == f"{b} failed in line 1: NameError: name 'n' is not defined"
    line, = refused(capsys, write(folder / 'c.py', 'def name_of(): pass'))
    assert line == f"{folder}/c.py: unknown option 'name_of', did you mean name or names?"


def test_positional_runs(folder):
    @dataclass(frozen=True)
    class Plot:
        runs: tuple[str, ...] = ()
        path: str = ''

    path = write(folder / 'a.py', "runs = ['c,d']")
    assert configure(Plot, ['out/a', '--path=p.png', 'out/b']) == Plot(('out/a', 'out/b'), 'p.png')
    assert configure(Plot, [path, 'e']) == Plot(('c,d', 'e'))
    assert configure(Plot, ['--runs=a,b']) == Plot(('a', 'b'))


def test_a_type_that_no_option_can_have():
    @dataclass(frozen=True)
    class Wrong:
        table: dict = None

    with pytest.raises(TypeError, match='dict'):
        configure(Wrong, ['--table=1'])


# Errors --------------------------------------------------------------------------------------------------------------


def test_typo(folder):
    assert errors(command(folder, '--learning_rte=1')) == ["unknown option 'learning_rte', did you mean learning_rate?"]
    assert errors(command(folder, '--zzz=1')) == ["unknown option 'zzz', --help lists them all"]


def test_all_errors_at_once(folder):
    write(folder / 'config/toy_t2.py', '')
    write(folder / 'a.py', 'n_layr = 3\nresume = 1\nsplit = "rows"')
    assert errors(command(folder, 'a.py', '--dataset=/etc', '--n_layer=x', '--lerning_rate=1', 'toy_t2.py')) == [
        "a.py: unknown option 'n_layr', did you mean n_layer?",
        'a.py: resume must be bool, not 1',
        "n_layer must be int, not 'x'; write digits, such as 10_000",
        "unknown option 'lerning_rate', did you mean learning_rate?",
        "there is no config file 'toy_t2.py', did you mean config/toy_t2.py?",
        "dataset='/etc' is no folder name",
        "split='rows' is not one of post, row"]


@pytest.mark.parametrize('args, sentence', [
    (['--learning_rate', '1e-3'], 'write --learning_rate=1e-3, with an equals sign and no space'),
    (['--dataset', 'a b'], "write --dataset='a b', with an equals sign and no space"),
    (['--n_layer', '-1'], 'write --n_layer=-1, with an equals sign and no space'),
    (['--resume'], '--resume needs a value: write --resume=True'),
    (['--resume', '--n_layer=3'], '--resume needs a value: write --resume=True'),
    (['--resume', 'a.py'], '--resume needs a value: write --resume=True'),
    (['--n_layer'], '--n_layer needs a value: write --n_layer=VALUE'),
    (['--learning_rte', '1'], "unknown option 'learning_rte', did you mean learning_rate?"),
    (['--=1'], "unknown option '', --help lists them all"),
    (['--'], "unknown option '', --help lists them all"),
    (['-n_layer=3'], "there is no config file '-n_layer=3', and a flag is written --key=value"),
    (['n_layer=3'], "there is no config file 'n_layer=3', and a flag is written --key=value"),
    (['config'], "there is no config file 'config', did you mean config/toy_t2.py?"),
    (['config/t2.py'], "there is no config file 'config/t2.py', did you mean config/toy_t2.py?"),
    (['t2_toy'], "there is no config file 't2_toy', --help lists them all")])
def test_malformed(folder, args, sentence):
    write(folder / 'config/toy_t2.py', '')
    write(folder / 'a.py', '')
    assert errors(command(folder, *args)) == [sentence]


@pytest.mark.parametrize('text, sentence', [
    ('n_layer = 3\n\n1 / 0', 'a.py failed in line 3: ZeroDivisionError: division by zero'),
    ('n_layer = (3', "a.py failed in line 1: SyntaxError: '(' was never closed (a.py, line 1)"),
    ('n_layer = 1\nexit(0)', 'a.py failed in line 2: SystemExit: 0'),
    ('import nowhere_at_all', "a.py failed in line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ('raise ValueError("two\\n lines")', 'a.py failed in line 1: ValueError: two lines')])
def test_a_file_that_raises(folder, text, sentence):
    """One sentence, and nothing of a half-run file counts."""
    write(folder / 'a.py', text)
    assert errors(command(folder, 'a.py', '--n_layer=4')) == [sentence]


def test_a_file_that_is_no_python(folder):
    (folder / 'a.py').write_bytes(bytes(range(256)))
    line, = errors(command(folder, 'a.py'))
    assert line.startswith('a.py failed')


def test_optimised_python_checks_the_same(folder):
    for args in ['--n_layer=1.5'], ['--split=rows'], ['--resume'], ['--learning_rte=1'], ['--dataset=/etc']:
        assert errors(command(folder, *args, python=['-O'])) == errors(command(folder, *args))
    assert command(folder, '--help', python=['-O']).stdout == command(folder, '--help').stdout


def test_other_ranks_are_silent(folder):
    for args, code in (['--learning_rte=1'], 2), (['a.py'], 2), (['--split=rows'], 2), (['--help'], 0):
        result = command(folder, *args, RANK='1')
        assert (result.returncode, result.stdout, result.stderr) == (code, '', '')
    assert command(folder, '--n_layer=3', RANK='1').stdout.count('\n') == 1  # main's own line
    assert command(folder, '--n_layer=3', RANK='0').stdout == command(folder, '--n_layer=3').stdout


# What is printed -----------------------------------------------------------------------------------------------------


def test_sources_of_the_changed_values(folder, capsys):
    write(folder / 'a.py', "n = 5\nx = 0.5\nname = 'b'")
    configure(Config, ['a.py', '--n=7', '--flag=False', '--names=p,q'])
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r'\s{2,}', line.strip()) for line in lines[1:]] == [
        ['n = 7', 'command line'], ["name = 'b'", 'a.py'], ["names = ('p', 'q')", 'command line']]
    configure(Config, [])
    assert capsys.readouterr() == ('', '')


def test_help(folder):
    write(folder / 'config/a.py', '#!/x\n# Two minutes, loss 1.2\n# more\nn = 1')
    write(folder / 'config/bare.py', 'n = 1')
    result = command(folder, '--zzz=1', '--help')  # help helps who is lost
    assert result.returncode == 0 and result.stderr == ''
    rows = [re.split(r'\s{2,}', line.strip()) for line in result.stdout.splitlines()]
    assert rows[0] == ['Trains nothing.']
    for row in (["--dataset='a#b'", 'str', 'folder under data/'], ['--learning_rate=0.001', 'float', 'after warm-up'],
                ['--resume=False', 'bool', 'go on'], ['--domains=x,y', 'tuple[str, ...]', 'several'],
                ["--moments=''", 'tuple[float, ...]'], ['--top=None', 'int or None', 'of all'],
                ['config/a.py', 'Two minutes, loss 1.2'], ['config/bare.py']):
        assert row in rows
    flags = [shlex.split(row[0])[0] for row in rows if row[0].startswith('--')]
    assert len(flags) == 9
    assert command(folder, *flags).stdout == command(folder).stdout  # a default can be typed as it is shown


def test_help_without_source(folder):
    """A class made by exec has none: help goes without comments."""
    text = 'from dataclasses import dataclass\nfrom configurator import configure\n@dataclass(frozen=True)\n' \
           'class Config:\n    n: int = 1  # lost\nconfigure(Config, ["--help"])'
    result = subprocess.run([sys.executable, '-c', text], env={**os.environ, 'PYTHONPATH': str(ROOT)}, cwd=folder,
                            text=True, capture_output=True, timeout=60)
    assert result.returncode == 0 and '--n=1  int' in result.stdout and result.stderr == ''


# How a run ends ------------------------------------------------------------------------------------------------------


def test_ends(folder):
    ok = command(folder, '--n_layer=3')
    assert ok.returncode == 0 and '"n_layer": 3' in ok.stdout and ok.stderr == ''
    refusal = command(folder, '--then=refuse')
    assert (refusal.returncode, refusal.stderr) == (1, 'error: no such luck; try again\n')
    assert command(folder, '--then=refuse', RANK='3').stderr == 'error on rank 3: no such luck; try again\n'
    value = command(folder, '--then=value')
    line = SCRIPT[:SCRIPT.index('raise ValueError')].count('\n') + 1
    assert value.returncode == 1
    assert value.stderr == f'error: 8 does not divide by 3; pick a multiple (script.py, line {line})\n'
    interrupt = command(folder, '--then=interrupt')
    assert (interrupt.returncode, interrupt.stderr) == (130, 'interrupted before anything was to be saved\n')
    memory = command(folder, '--then=memory')
    assert memory.returncode == 1 and memory.stderr.startswith('error: there is not enough memory; use a smaller model')


@pytest.mark.parametrize('then, name', [('bug', "KeyError: 'missing'"), ('decode', 'UnicodeDecodeError'),
                                        ('runtime', 'another one')])
def test_a_bug_keeps_its_traceback(folder, then, name):
    result = command(folder, f'--then={then}')
    assert result.returncode == 1 and 'Traceback' in result.stderr and name in result.stderr


@pytest.mark.parametrize('flag', ['--then=flood', '--then=', '--help'])
def test_a_closed_pipe_is_quiet(folder, flag):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': ''}  # buffered, or there is no last flush to fail
    process = subprocess.Popen([sys.executable, 'script.py', flag], cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=env)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(30) == 1


def test_progress_in_a_log_is_lines_and_in_a_terminal_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(configurator, 'LINE_SECONDS', 0)
    assert list(progress([1, 2, 3, 4], 'counting')) == [1, 2, 3, 4]
    said = capsys.readouterr()
    assert [line.split(',')[0] for line in said.out.splitlines()] == ['counting 25%', 'counting 50%', 'counting 75%']
    assert 'ETA 0:00:00' in said.out and not said.err
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    for _ in progress(range(4), 'counting'):
        time.sleep(0.3)
    assert not capsys.readouterr().out and 'counting' in terminal.getvalue() and '100%|' in terminal.getvalue()
    monkeypatch.setenv('RANK', '1')
    assert list(progress(range(4), 'counting', say=lambda _: None)) == [0, 1, 2, 3]
    assert not capsys.readouterr().out
