"""Pictures of runs: the moving average against its definition, what is drawn against the metrics, faulty files."""
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import Refusal
from plot import COLOURS, draw, labels, moving_average, plot, read_metrics, series

ROOT = Path(__file__).resolve().parents[1]
mpl_image = pytest.importorskip('matplotlib.image')


def write_run(folder, events, **config):
    folder.mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(event) + '\n' for event in events))
    (folder / 'config.json').write_text(json.dumps(dict(config, out_dir=str(folder))))
    return folder


def train_events(points=100, level=1.0, link=0.0):
    yield dict(event='eval', step=0, tokens=0, seconds=0.1, val_ce=5.5, val_ce_link=5.5 - link)
    for step in range(1, points + 1):
        ce = level + 4 * math.exp(-step / 9)
        yield dict(event='train', step=step, tokens=4096 * step, seconds=step, train_loss=ce, train_ce=ce)
        if step % 20 == 0:
            yield dict(event='eval', step=step, tokens=4096 * step, seconds=step, val_ce=ce, val_ce_link=ce - link)


def preference_events(gain=0.1, **more):
    for step in range(5):
        yield dict(event='train', step=step, tokens=9 * step, seconds=step, iteration=step, loss=0.7, lr=1e-4)
        yield dict(event='eval', step=step, tokens=9 * step, seconds=step, rank_accuracy=0.5 + gain * step, **more)


def pixels(path, colour):
    """How many pixels of a picture have this colour."""
    rgb = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(mpl_image.imread(path)[..., :3] - rgb).max(-1) < 0.01).sum())


def command(folder, *args):
    return subprocess.run([sys.executable, ROOT / 'plot.py', *map(str, args)], cwd=folder, text=True, timeout=60,
                          capture_output=True, env={k: v for k, v in os.environ.items() if k != 'RANK'})


# Numbers -------------------------------------------------------------------------------------------------------------


def test_moving_average_is_the_weighted_mean():
    """Bias correction makes m_t the mean of x_1 ... x_t with weights beta^(t - i): no pull towards 0."""
    rng = random.Random(0)
    values = [rng.gauss(3, 1) for _ in range(300)]
    for beta in 0.0, 0.5, 0.99:
        for t, m in enumerate(moving_average(values, beta), 1):
            weights = [beta ** (t - i) for i in range(1, t + 1)]
            assert math.isclose(m, sum(w * x for w, x in zip(weights, values)) / sum(weights), rel_tol=1e-9)
    assert moving_average([2.5] * 50, 0.99) == pytest.approx([2.5] * 50)
    assert moving_average([], 0.99) == []


@pytest.mark.parametrize('points, beta', [(49, None), (50, 0.5), (100, 0.75), (1000, 0.975), (5000, 0.99)])
def test_smoothing_fits_the_length_of_a_curve(points, beta):
    """Raw values and x are drawn untouched; the average spans 1/25 of them, 0.99 at most; few have none."""
    from matplotlib.figure import Figure
    ax, curve = Figure().subplots(), [(10 * i, math.exp(-i / 50)) for i in range(points)]
    draw(ax, [(curve, COLOURS[0], '-')])
    raw, *smooth = ax.lines
    assert list(raw.get_xdata()) == [x for x, _ in curve] and list(raw.get_ydata()) == [y for _, y in curve]
    if beta is None:
        assert not smooth and raw.get_marker() == 'o'
    else:
        assert list(smooth[0].get_xdata()) == [x for x, _ in curve]
        assert list(smooth[0].get_ydata()) == pytest.approx(moving_average([y for _, y in curve], beta))


def test_series_leaves_out_what_is_no_number():
    events = [dict(tokens=1, a=2.0), dict(tokens=2, a=math.nan), dict(tokens=3, a=None), dict(tokens=4), dict(a=1.0),
              dict(tokens=5, a=math.inf), dict(tokens=6, a=3)]
    assert series(events, 'tokens', 'a') == [(1, 2.0), (6, 3)]


# Names ---------------------------------------------------------------------------------------------------------------


def test_labels(tmp_path):
    a = write_run(tmp_path / 'a', [], taylor_order=0, n_embd=128, seed=0, resume=True)
    b = write_run(tmp_path / 'b', [], taylor_order=2, n_embd=128, seed=0)
    c = write_run(tmp_path / 'c', [], taylor_order=2, n_embd=64, seed=0)
    d = write_run(tmp_path / 'd$', [], taylor_order=2, n_embd=64, seed=0, source='x' * 99)
    assert labels([a, b]) == ['$T_{0}$', '$T_{2}$']
    assert labels([a, b, c]) == ['$T_{0}$, n_embd=128', '$T_{2}$, n_embd=128', '$T_{2}$, n_embd=64']
    assert labels([b]) == [str(b)]  # nothing to differ from
    assert labels([c, c]) == [str(c), str(c)]
    assert labels([c, d]) == [str(c), str(d).replace('$', r'\$')]  # too long for a legend, and $ is not mathematics
    (a / 'config.json').unlink()
    assert labels([a, b]) == [str(a), str(b)]


# Pictures ------------------------------------------------------------------------------------------------------------


def test_one_curve_a_run(tmp_path):
    """Every run's colour is there and no other's, and nothing is left beside the picture."""
    runs = [write_run(tmp_path / f't{n}', train_events(level=1 + n), taylor_order=n) for n in range(3)]
    path = plot(runs, tmp_path / 'three.png')
    assert path == tmp_path / 'three.png' and sorted(os.listdir(tmp_path)) == ['t0', 't1', 't2', 'three.png']
    assert [pixels(path, colour) > 500 for colour in COLOURS] == [True] * 3 + [False] * 4
    alone = plot([runs[1]])
    assert alone == runs[1] / 'loss.png' and pixels(alone, COLOURS[0]) > 500 and pixels(alone, COLOURS[1]) == 0


def test_link_is_drawn_where_it_differs(tmp_path):
    same = plot([write_run(tmp_path / 'a', train_events())], tmp_path / 'a.png')
    apart = plot([write_run(tmp_path / 'b', train_events(link=0.5))], tmp_path / 'b.png')
    assert pixels(apart, COLOURS[0]) > pixels(same, COLOURS[0]) + 200
    assert pixels(same, '#888888') < pixels(apart, '#888888')  # its key in the legend


def test_preference_run(tmp_path):
    """A panel for each metric present: the picture grows with them."""
    few = plot([write_run(tmp_path / 'dpo', preference_events(), method='dpo')])
    many = plot([write_run(tmp_path / 'ppo', preference_events(0.05, kl=1.0, entropy=1.0, margin=0.5, reward=2.0))])
    assert few == tmp_path / 'dpo/preference.png'
    assert mpl_image.imread(many).shape > mpl_image.imread(few).shape
    both = plot([tmp_path / 'dpo', tmp_path / 'ppo'], tmp_path / 'both.png')
    assert pixels(both, COLOURS[0]) > 500 and pixels(both, COLOURS[1]) > 500


def test_kl_is_drawn_as_its_square_root(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('plot.draw', lambda ax, curves: (drawn.extend(curves), draw(ax, curves)))
    events = [dict(event='eval', step=i, tokens=0, seconds=0, rank_accuracy=0.5, kl=kl) for i, kl in
              enumerate((-0.01, 4.0, 9.0))]  # an estimate of 0 may be below it
    plot([write_run(tmp_path / 'run', events)])
    assert [(0, 0.0), (1, 2.0), (2, 3.0)] in [points for points, _, _ in drawn]


def test_plot_leaves_matplotlib_alone(tmp_path):
    """train.py plots at its end, perhaps inside somebody's notebook: no screen, no pyplot, no changed settings."""
    write_run(tmp_path / 'a', train_events())
    text = ('import sys, plot\nassert "matplotlib" not in sys.modules\nimport matplotlib\n'
            'before = dict(matplotlib.rcParams)\nplot.plot(["a"])\n'
            'assert "matplotlib.pyplot" not in sys.modules and dict(matplotlib.rcParams) == before')
    subprocess.run([sys.executable, '-c', text], cwd=tmp_path, check=True, timeout=60,
                   env={**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'TkAgg'})


def test_command(tmp_path):
    write_run(tmp_path / 'a', train_events(), taylor_order=0)
    write_run(tmp_path / 'b', train_events(), taylor_order=2)
    result = command(tmp_path, 'a', 'b')
    assert result.returncode == 0 and result.stdout.endswith('saved plot.png\n') and result.stderr == ''
    assert command(tmp_path, 'a', '--path=x.png', 'b').stdout.endswith('saved x.png\n')
    assert (tmp_path / 'plot.png').read_bytes() == (tmp_path / 'x.png').read_bytes()


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('end', [b'{"event": "train", "st', b'{"event": "train"\xc3', b'\0' * 40, b'7'])
def test_a_broken_last_line_is_left_out(tmp_path, capsys, end):
    run = write_run(tmp_path / 'a', train_events())
    whole, = [read_metrics(run)]
    with open(run / 'metrics.jsonl', 'ab') as f:
        f.write(end)
    assert read_metrics(run) == whole == list(train_events())
    assert not capsys.readouterr().out  # a run that is killed leaves such a line


def test_refusals(tmp_path, capsys):
    a, p = write_run(tmp_path / 'a', train_events()), write_run(tmp_path / 'p', preference_events())
    with pytest.raises(Refusal, match='gone/metrics.jsonl cannot be read .*name the folder of a run'):
        plot([a, tmp_path / 'gone'], tmp_path / 'x.png')
    with pytest.raises(Refusal, match='holds no metrics yet'):
        plot([write_run(tmp_path / 'empty', [])])
    with pytest.raises(Refusal, match='hold nothing to draw'):
        plot([write_run(tmp_path / 'nothing', [dict(event='train', step=1, tokens=1, train_ce=math.nan)])])
    with pytest.raises(Refusal, match='plot them apart'):
        plot([a, p], tmp_path / 'x.png')
    with pytest.raises(Refusal, match='8 runs are too many'):
        plot([a] * 8, tmp_path / 'x.png')
    with pytest.raises(Refusal, match='no/x.png cannot be written'):
        plot([a], tmp_path / 'no/x.png')
    lines = (a / 'metrics.jsonl').read_text().splitlines()
    (a / 'metrics.jsonl').write_text('\n'.join([lines[0], lines[1][:20], lines[2]]))
    assert not (tmp_path / 'x.png').exists()
    plot([a], tmp_path / 'x.png')  # all but that line
    assert 'metrics.jsonl is damaged in line 2, which is left out' in capsys.readouterr().out


def test_a_failed_write_keeps_the_old_picture(tmp_path):
    run = write_run(tmp_path / 'a', train_events())
    old = plot([run]).read_bytes()
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(event) + '\n' for event in train_events(level=2.0)))
    (run / '.loss.png.tmp').mkdir()  # in the way of the temporary file
    with pytest.raises(Refusal, match='cannot be written'):
        plot([run])
    assert (run / 'loss.png').read_bytes() == old


def test_exit_codes(tmp_path):
    nothing, pdf, gone = command(tmp_path), command(tmp_path, 'a', '--path=x.pdf'), command(tmp_path, 'gone')
    assert nothing.returncode == 2 and nothing.stderr.startswith('there is nothing to plot; name the folders')
    assert pdf.returncode == 2 and pdf.stderr == "path='x.pdf' is no PNG; let it end in .png\n"
    assert gone.returncode == 1 and gone.stderr.startswith('error: gone/metrics.jsonl cannot be read')
