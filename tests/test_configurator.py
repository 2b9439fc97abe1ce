"""The command line, as a user types it. This file is also the script that the tests run."""
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

import configurator
from configurator import Refusal, configure, run

ROOT = Path(__file__).resolve().parents[1]
HOME = os.path.expanduser('~')
ENDS = dict(refuse=Refusal('no such luck; try again'), bug=KeyError(3),
            interrupt=KeyboardInterrupt(), disk=OSError(28, 'No space left on device', 'out/best.pt'))


@dataclass(frozen=True)
class Base:
    given = frozenset()
    resume: bool = False     # go on
    overwrite: bool = False
    stop_step: int = 0
    out_dir: str = 'out/run'
    source: str = 'hub'
    name: str = 'a#b'        # with a hash


@dataclass(frozen=True)
class Config(Base):
    n: int = 1
    x: float = 0.5           # a float
    flag: bool = False
    names: tuple[str, ...] = (  # several
        'x', 'y')
    numbers: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    top: int | None = None   # of all
    maybe: bool | None = None
    limit: float | None = 1.0
    source: str = 'toy'      # the script's own

    def check(self):
        if self.name == '/etc':
            yield f"name='{self.name}' is no name"
        if self.resume and 'x' in self.given and self.x > 1:
            yield 'x was set'


def main(cfg):
    if cfg.name in ENDS:
        raise ENDS[cfg.name]
    if cfg.name == 'flood':
        print('many lines\n' * 100_000)
    print(cfg)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / 'config').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('RANK', raising=False)


def command(*args, python=(), **env):
    return subprocess.run([sys.executable, *python, __file__, *args], text=True, capture_output=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), **env}, timeout=60)


def refused(capsys, *argv):
    """The sentences on stderr; exit code 2 and nothing on stdout."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        configure(Config, list(argv))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out
    return err.splitlines()


def write(path, text):
    Path(path).write_text(text, encoding='utf-8')
    return path


@pytest.mark.parametrize('text, values', [
    ('--n=10_000', dict(n=10000)), ('--n=-3', dict(n=-3)), ('--x=1e-3', dict(x=1e-3)), ('--x=3', dict(x=3.0)),
    ('--flag=True', dict(flag=True)), ('--flag=true', dict(flag=True)), ('--maybe=false', dict(maybe=False)),
    ('--name=', dict(name='')), ('--name=a=b', dict(name='a=b')), ('--name=--x=1', dict(name='--x=1')),
    ('--name=None', dict(name='None')), ('--names=a, b,', dict(names=('a', 'b'))),
    ('--names=', dict(names=())), ('--numbers=0,3', dict(numbers=(0.0, 3.0))), ('--counts=4', dict(counts=(4,))),
    ('--limit=None', dict(limit=None)), ('--limit=2', dict(limit=2.0)), ('--top=5', dict(top=5)),
    ('--name=~', dict(name=HOME)), ('--name=~a', dict(name='~a')), ('--names=a,~/b', dict(names=('a', f'{HOME}/b'))),
    ('limit = 2', dict(limit=2.0)), ('numbers = [0, 3]', dict(numbers=(0.0, 3.0))), ('n: int = 4', dict(n=4)),
    ('names = ("a,b",)', dict(names=('a,b',))), ('limit = None', dict(limit=None)),
    ('_k = 3\nn = _k * 2', dict(n=6)), ('import os as helper\nname = "~/x"', dict(name=f'{HOME}/x'))])
def test_value(text, values):
    assert repr(configure(Config, [text if text.startswith('--') else write('a.py', text)])) == repr(Config(**values))


@pytest.mark.parametrize('argument, words', [
    ('--n=1e4', "n must be int, not '1e4'"), ('--n=', "n must be int, not ''"),
    ('--x=fast', "x must be float, not 'fast'"), ('--x=nan', "x must be float, not 'nan'"),
    ('--x=1e999', "x must be float, not '1e999'"), ('--flag=1', "flag must be bool, not '1'; write True or False"),
    ('--counts=1,2.5', "counts must be tuple[int, ...], not '1,2.5'"), ('n = True', 'a.py: n must be int, not True'),
    ('flag = 1', 'a.py: flag must be bool, not 1; write True or False'), ('name = 3', 'a.py: name must be str, not 3'),
    ("names = ('a')", "a.py: names must be tuple[str, ...], not 'a'; write ('a',)"),
    ('top = False', 'a.py: top must be int | None, not False'),
    ('n = 3\n1 / 0', 'a.py failed: ZeroDivisionError: division by zero')])
def test_wrong_value(capsys, argument, words):
    assert refused(capsys, argument if argument.startswith('--') else write('a.py', argument)) == [words]


def test_the_later_wins_and_its_source_is_printed(capsys):
    a, b = write('a.py', 'n = 2\nx = 2.0'), write('b.py', 'n = 3')
    assert configure(Config, [a, b]) == Config(n=3, x=2.0)
    assert configure(Config, [b, '--n=9', a]) == Config(n=2, x=2.0)
    capsys.readouterr()
    assert configure(Config, [a, '--n=9', '--n=8']) == Config(n=8, x=2.0)
    assert [re.split(r'\s{2,}', line.strip()) for line in capsys.readouterr().out.splitlines()[1:]] == [
        ['n = 8', 'command line'], ['x = 2.0', 'a.py']]
    assert configure(Config, []) == Config()  # one call leaves nothing to the next
    assert capsys.readouterr() == ('', '')


def test_a_resume_reads_the_config_of_its_run(capsys):
    first = Config(n=7, x=3.0, names=('a', 'b'), top=4, overwrite=True, stop_step=5, out_dir='elsewhere')
    write('config.json', json.dumps(dict(asdict(first), an_older_option=1)))
    resumed = dict(resume=True, overwrite=False, stop_step=0, out_dir='.')
    cfg = configure(Config, ['--resume=True', '--out_dir=.'])
    assert cfg == replace(first, **resumed) and cfg.given == {'resume', 'out_dir'}
    # a config file's values count as given: they win
    cfg = configure(Config, [write('a.py', "resume, out_dir, names = True, '.', ('a', 'b')"), '--n=8', '--x=0.1'])
    assert cfg == replace(first, n=8, x=0.1, **resumed) and cfg.given == {'resume', 'out_dir', 'names', 'n', 'x'}
    assert refused(capsys, 'a.py', '--x=2') == ['x was set']
    write('config.json', '{"n": "many"}')
    assert refused(capsys, 'a.py') == ["config.json: n must be int, not 'many'"]
    # where there is nothing to resume
    assert configure(Config, ['--resume=True', '--n=1']).given == {'resume', 'n'} and Config().given == frozenset()


def test_all_errors_at_once():
    write('a.py', 'flg = 3\nresume = 1')
    write('my rows.jsonl', 'print("executed")')
    args = 'a.py', 'my rows.jsonl', '--name=/etc', '--n=x', '--limt=1', '--zzz=1', 'toy_t2.py', '--=1'
    result = command(*args)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.splitlines() == [
        "a.py: unknown option 'flg', did you mean flag?",
        'a.py: resume must be bool, not 1; write True or False',
        "there is no config file 'my rows.jsonl'; did you mean --source='my rows.jsonl' --dataset='my rows'?",
        "n must be int, not 'x'",
        "unknown option 'limt', did you mean limit?",
        "unknown option 'zzz', --help lists them all",
        "there is no config file 'toy_t2.py'; --help lists them, and a flag is written --key=value",
        "unknown option '', --help lists them all",
        "name='/etc' is no name"]
    assert command(*args, python=['-O']).stderr == result.stderr
    silent = command(*args, RANK='1')
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, '', '')


@pytest.mark.parametrize('args, written', [
    (['--n', '-1'], '--n=-1'), (['--n', '=', '8'], '--n=8'), (['--n=', '8'], '--n=8'), (['--flag', 'a.py'],
                                                                                        '--flag=VALUE')])
def test_spaces(capsys, args, written):
    write('a.py', '')
    assert refused(capsys, *args) == [f'a flag and its value must be one word: write {written}']


def test_a_config_of_another_script(capsys):
    assert refused(capsys, 'config/toy_t2.py') == ['config/toy_t2.py is a config of train.py; use that script']
    write('a.py', '# DPO.\n# torchrun --n=8 other.py config/a.py   after: this.py config/b.py\nn, beta = 2, 3')
    assert refused(capsys, 'a.py') == ['a.py is a config of other.py; use that script']
    write('a.py', f'# python {configurator.SCRIPT} config/a.py\nbeta = 1')
    assert refused(capsys, 'a.py') == ["a.py: unknown option 'beta', --help lists them all"]


def test_help():
    write('config/a.py', '#!/x\n# Two minutes, loss 1.2\n# more\n# python test_configurator.py config/a.py')
    write('config/b.py', '# Not for this script\n# python other.py config/b.py')
    write('config/bare.py', 'n = 1')
    result = command('--zzz=1', '--help')
    assert result.returncode == 0 and result.stderr == ''
    rows = [re.split(r'\s{2,}', line.strip()) for line in result.stdout.splitlines()]
    assert rows[-12:] == [
        ["--source=toy", 'str', "the script's own"], [''], ['Options (test_configurator.py):'],
        ['--resume=False', 'bool', 'go on'], ['--overwrite=False', 'bool'], ['--stop_step=0', 'int'],
        ['--out_dir=out/run', 'str'], ["--name='a#b'", 'str', 'with a hash'], [''],
        ['Config files:'], ['config/a.py', 'Two minutes, loss 1.2'], ['config/bare.py']]
    assert ['--names=x,y', 'tuple[str, ...]', 'several'] in rows and ['--top=None', 'int | None', 'of all'] in rows
    flags = [shlex.split(row[0])[0] for row in rows if row[0].startswith('--')]
    assert configure(Config, flags) == Config()  # a default can be typed as it is shown


def test_ends():
    ok = command('--n=3', '--name=caf\u00e9', PYTHONIOENCODING='ascii')  # a terminal that is not UTF-8
    assert ok.returncode == 0 and "n = 3" in ok.stdout and r"name='caf\xe9'" in ok.stdout and ok.stderr == ''
    refusal = command('--name=refuse', RANK='3')
    assert (refusal.returncode, refusal.stderr) == (1, 'error on rank 3: no such luck; try again\n')
    assert command('--name=disk').stderr == "error: [Errno 28] No space left on device: 'out/best.pt'\n"
    assert command('--name=interrupt').returncode == 130
    assert re.match('(?s)Traceback.*KeyError: 3', command('--name=bug').stderr)


@pytest.mark.parametrize('flag', ['--name=flood', '--name=', '--help'])
def test_a_closed_pipe_is_quiet(flag):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': ''}  # buffered, so that the last flush may fail
    process = subprocess.Popen([sys.executable, __file__, flag], env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(30) == 1


if __name__ == '__main__':
    run(main, Config)
