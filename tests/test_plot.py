"""Pictures of runs: the moving average against its definition, what is drawn against the metrics, faulty files."""
import json
import math
import os
import random

import pytest

from configurator import Refusal, configure
from plot import COLOURS, Config, labels, main, moving_average, plot, read_metrics

mpl_image = pytest.importorskip('matplotlib.image')


def write_run(folder, events, **config):
    folder.mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(event) + '\n' for event in events))
    (folder / 'config.json').write_text(json.dumps(dict(config, out_dir=str(folder))))
    return folder


def train_events(level=1.0):
    for step in range(1, 101):
        ce = level + 4 * math.exp(-step / 9)
        yield dict(event='train', step=step, tokens=4096 * step, seconds=step, train_loss=ce, train_ce=ce)
        if step % 20 == 0:
            yield dict(event='eval', step=step, tokens=4096 * step, seconds=step, val_ce=ce)


def preference_events(**more):
    for step in range(5):
        yield dict(event='train', step=step, tokens=9 * step, seconds=step, iteration=step, loss=0.7, lr=1e-4)
        yield dict(event='eval', step=step, tokens=9 * step, seconds=step, rank_accuracy=0.5 + 0.1 * step, **more)


def pixels(path, colour):
    """How many pixels of a picture have this colour."""
    rgb = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(mpl_image.imread(path)[..., :3] - rgb).max(-1) < 0.01).sum())


def test_moving_average_is_the_weighted_mean():
    """Bias correction makes m_t the mean of x_1 ... x_t with weights beta^(t - i): no pull towards 0."""
    rng = random.Random(0)
    values = [rng.gauss(3, 1) for _ in range(300)]
    for beta in 0.0, 0.5, 0.99:
        for t, m in enumerate(moving_average(values, beta), 1):
            weights = [beta ** (t - i) for i in range(1, t + 1)]
            assert math.isclose(m, sum(w * x for w, x in zip(weights, values)) / sum(weights), rel_tol=1e-9)


def test_labels_are_the_options_that_differ(tmp_path):
    a, b, c, focal, long = [write_run(tmp_path / name, [], seed=0, **config) for name, config in dict(
        a=dict(loss='taylor_loss(n=0)', taylor_order=0, n_embd=128, resume=True),
        b=dict(loss='taylor_loss(n=2)', taylor_order=2, n_embd=128),
        c=dict(loss='taylor_loss(n=2)', taylor_order=2, n_embd=64),
        focal=dict(loss='focal(gamma=2)', taylor_order=0, n_embd=128),
        **{'long$': dict(loss='x' * 99, n_embd=64)}).items()]
    assert labels([a, b]) == ['$T_{0}$', '$T_{2}$']
    assert labels([a, b, c]) == ['$T_{0}$, n_embd=128', '$T_{2}$, n_embd=128', '$T_{2}$, n_embd=64']
    assert labels([b, focal]) == ['$T_{2}$', 'loss=focal(gamma=2)']
    assert labels([b]) == [str(b)] and labels([c, c]) == [str(c), str(c)]  # nothing to differ in
    assert labels([c, long]) == [str(c), str(long).replace('$', r'\$')]  # too long for a legend; $ is not mathematics


def test_one_curve_a_run(tmp_path, capsys):
    """As typed. Every run's colour is there and no other's, and nothing is left beside the picture."""
    runs = [write_run(tmp_path / f't{n}', train_events(level=1 + n), taylor_order=n) for n in range(3)]
    path = tmp_path / 'three.png'
    main(configure(Config, [*map(str, runs), f'--path={path}']))
    assert capsys.readouterr().out.endswith(f'saved {path}\n')
    assert sorted(os.listdir(tmp_path)) == ['t0', 't1', 't2', 'three.png']
    assert [pixels(path, colour) > 500 for colour in COLOURS] == [True] * 3 + [False] * 4
    alone = plot([runs[1]])
    assert alone == runs[1] / 'loss.png' and pixels(alone, COLOURS[0]) > 500 and pixels(alone, COLOURS[1]) == 0


def test_preference_run(tmp_path, monkeypatch):
    """A panel for each metric present; the KL as its square root, where an estimate of 0 may be below it."""
    few = plot([write_run(tmp_path / 'dpo', preference_events())])
    many = plot([write_run(tmp_path / 'ppo', preference_events(kl=1.0, entropy=1.0, margin=0.5, reward=2.0))])
    assert few == tmp_path / 'dpo/preference.png' and mpl_image.imread(many).shape > mpl_image.imread(few).shape
    drawn = []
    monkeypatch.setattr('plot.draw', lambda ax, curves: drawn.extend(points for points, _, _ in curves))
    plot([write_run(tmp_path / 'kl', [dict(event='eval', step=i, rank_accuracy=0.5, kl=kl)
                                      for i, kl in enumerate((-0.01, 4.0, 9.0))])])
    assert [(0, 0.0), (1, 2.0), (2, 3.0)] in drawn


def test_a_broken_line_is_left_out(tmp_path, capsys):
    """In silence where it is the last, for a run that is killed leaves such a line."""
    run = write_run(tmp_path / 'a', train_events())
    sound = (run / 'metrics.jsonl').read_bytes()
    for end in (b'{"event": "train", "st', b'\0' * 40):
        (run / 'metrics.jsonl').write_bytes(sound + end)
        assert read_metrics(run) == list(train_events()) and not capsys.readouterr().out
    (run / 'metrics.jsonl').write_bytes(b'{"event": "train", "st\n' + sound)
    assert read_metrics(run) == list(train_events()) and 'line 1 of' in capsys.readouterr().out


def test_refusals_leave_the_old_picture(tmp_path):
    a, p = write_run(tmp_path / 'a', train_events()), write_run(tmp_path / 'p', preference_events())
    empty = write_run(tmp_path / 'empty', [])
    nothing = write_run(tmp_path / 'nothing', [dict(event='train', step=1, tokens=1, train_ce=math.nan)])
    old = plot([a]).read_bytes()
    assert 'no runs are given; name their folders' in ''.join(Config().check())
    for runs, path, words in (([a, tmp_path / 'gone'], '', 'gone/metrics.jsonl has no metrics; name the folder'),
                              ([empty], '', 'has no metrics'), ([nothing], '', 'no curve to draw'),
                              ([a, p], '', 'training runs separately'), ([a] * 8, '', '8 runs are too many'),
                              ([a], tmp_path / 'no/x.png', 'no/x.png could not be written')):
        with pytest.raises(Refusal, match=words):
            plot(runs, path)
    assert (a / 'loss.png').read_bytes() == old
