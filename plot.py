"""Plots the metrics.jsonl of one or several runs: raw and smoothed curves, labelled by the options that differ.

    python plot.py out/toy_t0 out/toy_t1 out/toy_t2
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure  # not pyplot, which would look for a screen
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from configurator import NOT_RESUMED, Options, Refusal, run
from runs import read_events, replacing

SMOOTHING = 0.99  # of the moving average, for curves of 2500 points or more
FEW_POINTS = 50   # a curve with fewer points has markers; one with fewer than 4 times as many is not smoothed
COLOURS = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#444444'  # Okabe & Ito: colour-blind safe
NAMELESS = *NOT_RESUMED, 'log_interval', 'taylor_order'  # not used in labels; the last is part of the loss's name


class Panel(NamedTuple):
    title: str
    unit: str
    metrics: dict         # name: (line style, meaning)
    baselines: dict = {}  # name of a metric of step 0, drawn as a horizontal line: label
    limits: tuple = None  # of the y axis; (0, None) = from 0
    over: str = ''        # the metric of the x axis; '' = tokens or steps


TRAIN = [
    Panel('Training cross-entropy', 'nats per token', {'train_ce': ('-', 'p')}),
    Panel('Validation cross-entropy', 'nats per token', {
        'val_ce': ('-', 'p'), 'val_ce_link': ('--', 'link(p)'), 'val_ce_leaked': (':', 'p, on leaked texts'),
        'val_ce_clean': ('-.', 'p, on the other texts')}),
    Panel('Validation at a fitted temperature', 'nats per token', {
        'val_ce_t': ('-', 'p'), 'val_ce_link_t': ('--', 'link(p)')})]
PREFERENCE = [
    Panel('Held-out pairs in order', 'share', {'rank_accuracy': ('-', '')}, limits=(0.4, 1.05), baselines=dict(
        rank_accuracy_length='length', rank_accuracy_bag='bag of tokens', rank_accuracy_truth='the truth')),
    Panel('Log-probability of answers', 'nats', {'chosen_logp': ('-', 'chosen'), 'rejected_logp': (':', 'rejected')}),
    Panel('Margin of a pair', 'nats', {'margin': ('-', '')}),
    Panel('True quality', 'mean over samples', {'true_quality': ('-', '')}, limits=(0, 1), baselines=dict(
        true_quality_best="the data's best", true_quality_data='all data', true_quality_random='random letters')),
    Panel('True quality over distance', 'mean over samples', {'true_quality': ('-', '')}, limits=(0, 1), over='kl'),
    Panel('Distance from the start', '√KL, √(nats per answer)', {'kl': ('-', '')}),
    Panel('Reward', 'mean over samples', {'reward': ('-', '')}),
    Panel('Entropy', 'nats per token', {'entropy': ('-', '')}, limits=(0, None)),
    Panel('Length of answers', 'tokens', {'answer_length': ('-', '')}, limits=(0, None)),
    Panel('Answers that end', 'share', {'eot_rate': ('-', '')}, limits=(0, 1.03)),
    Panel('Ranking or policy loss', '', {'loss': ('-', '')})]
STYLE = {'font.size': 9, 'axes.titlesize': 10, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left',
         'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#888888', 'axes.grid': True,
         'axes.labelcolor': '#555555', 'xtick.color': '#555555', 'ytick.color': '#555555', 'grid.color': '#e8e8e8',
         'grid.linewidth': 0.6, 'legend.frameon': False}


@dataclass(frozen=True)
class Config(Options):
    runs: tuple[str, ...] = ()  # folders of the runs, which need no flag: python plot.py out/a out/b
    path: str = ''              # .png, .pdf or .svg; '' = plot.png, for a single run its loss.png or preference.png

    def check(self):
        yield from super().check()
        if not self.runs:
            yield 'no runs are given; name their folders: python plot.py out/toy_t0 out/toy_t2'


def read_metrics(out_dir):
    """The lines of out_dir/metrics.jsonl as a list of dicts. Raises Refusal if there are none."""
    events = read_events(Path(out_dir) / 'metrics.jsonl')
    if not events:
        raise Refusal(f'{out_dir}/metrics.jsonl has no metrics; name the folder of a run that has started')
    return events


def series(events, x, y):
    """The points (x, y) of a metric in order, without those that are not finite. Of kl it is the square root, which
    is proportional to distance (Gao et al. 2023); the estimate may be negative, which gives 0."""
    points = [(event.get(x), event.get(y)) for event in events]
    points = [p for p in points if all(isinstance(v, (int, float)) and math.isfinite(v) for v in p)]
    return [tuple(math.sqrt(max(v, 0.0)) if name == 'kl' else v for name, v in zip((x, y), p)) for p in points]


def moving_average(values, beta):
    """m_t = beta m_{t-1} + (1 - beta) x_t, divided by 1 - beta^t as in Adam (Kingma & Ba 2015): without this bias
    correction the curve would start near 0."""
    m, smooth = 0.0, []
    for t, x in enumerate(values, 1):
        m = beta * m + (1 - beta) * x
        smooth.append(m / (1 - beta ** t))
    return smooth


def labels(out_dirs):
    """A name for each run: the options that differ, if they are short and unique, else the folder."""
    folders = [str(out_dir).replace('$', r'\$') for out_dir in out_dirs]
    try:
        configs = [json.loads((Path(out_dir) / 'config.json').read_text()) for out_dir in out_dirs]
    except (OSError, ValueError):
        return folders
    keys = dict.fromkeys(['loss', *(key for config in configs for key in config)])
    differ = [key for key in keys if key not in NAMELESS and len({repr(config.get(key)) for config in configs}) > 1]
    names = [', '.join(f'{key}={config[key]}'.replace('$', r'\$') for key in differ if key in config)
             for config in configs]
    names = [re.sub(r'loss=taylor_loss\(n=(\d+)\)', r'$T_{\1}$', name) for name in names]
    return names if len(set(names)) == len(names) and all(0 < len(name) <= 60 for name in names) else folders


def draw(ax, curves):
    """Draws curves [(points, colour, line)]: thin raw lines and their moving averages; short curves without average.

    The average spans at most 1/25 of the longest curve: over 100 points, a beta of 0.99 would end far above them.
    """
    longest = max(len(points) for points, _, _ in curves)
    beta = min(SMOOTHING, 1 - 25 / longest) if longest >= 4 * FEW_POINTS else 0
    for points, colour, line in curves:
        x, y = zip(*points)
        if beta:
            ax.plot(x, y, line, color=colour, linewidth=0.8, alpha=0.3)
            ax.plot(x, moving_average(y, beta), line, color=colour, linewidth=1.7)
        else:
            ax.plot(x, y, line, color=colour, linewidth=1.4, marker='o' if longest < FEW_POINTS else '', markersize=3.5,
                    markerfacecolor=colour if line == '-' else 'white')
    if beta:
        ax.set_title(f'moving average {beta:.2f}', loc='right', fontsize=8, fontweight='normal', color='#888888')


def plot(out_dirs, path=''):
    """Draws runs into one picture -> its path ('': as in Config). Raises Refusal if a run has no metrics."""
    if len(out_dirs) > len(COLOURS):
        raise Refusal(f'{len(out_dirs)} runs are too many to tell apart in one picture; plot at most {len(COLOURS)}')
    runs = [read_metrics(out_dir) for out_dir in out_dirs]
    kinds = {any('rank_accuracy' in event for event in events) for events in runs}
    names = ', '.join(map(str, out_dirs))
    if len(kinds) > 1:
        raise Refusal(f'only some of {names} are preference runs; plot preference runs and training runs separately')
    preference, = kinds
    x = 'step' if preference else 'tokens'
    panels, meanings = [], {}
    for panel in PREFERENCE if preference else TRAIN:
        curves = []
        for metric, (line, meaning) in panel.metrics.items():
            for events, colour in zip(runs, COLOURS):
                points = series(events, panel.over or x, metric)
                if points:
                    curves.append((points, colour, line))
                    meanings[meaning] = line
        if curves:
            panels.append((panel, curves))
    if not panels:
        raise Refusal(f'the metrics of {names} have no curve to draw yet; let the run continue')

    keys = [dict(color=colour, linewidth=2, label=label) for colour, label in zip(COLOURS, labels(out_dirs))]
    if len(meanings) > 1:
        keys += [dict(color='#888888', linestyle=line, label=meaning) for meaning, line in meanings.items() if meaning]
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    room, widths = 52 * columns, [len(key['label']) + 7 for key in keys]  # in characters, for the legend's columns
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 3.1 * rows + 0.4), dpi=160, layout='constrained')
        for place, (panel, curves) in enumerate(panels, 1):
            ax = figure.add_subplot(rows, columns, place)
            draw(ax, curves)
            ax.set(title=panel.title, ylabel=panel.unit,
                   xlabel='√KL to the start' if panel.over else x if x == 'tokens' else 'steps')
            levels = {}  # baselines of equal height share a line
            for metric, label in panel.baselines.items():
                for _, y in series(runs[0], 'step', metric)[:1]:
                    levels.setdefault(round(y, 2), []).append(label)
            for y, names in levels.items():
                ax.axhline(y, color='#888888', linewidth=1, linestyle=(0, (1, 2)))
                ax.annotate(', '.join(names), (1, y), xycoords=('axes fraction', 'data'), ha='right', va='bottom',
                            fontsize=7, color='#888888')
            if not panel.over:
                ax.xaxis.set_major_formatter(EngFormatter(sep=''))
            if panel.limits:
                ax.set_ylim(panel.limits[0], panel.limits[1] or 1.1 * ax.dataLim.y1)
                continue
            compared = [point for other, curves in panels for points, _, _ in curves for point in points
                        if other.title.split()[0] == panel.title.split()[0]]  # such panels share a scale
            ax.update_datalim(compared)
            values = [y for _, y in compared]
            if panel.unit == 'nats per token' and max(values) > 4 * min(values) > 0:  # keeps the end legible
                ax.set_yscale('log')
                ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), minor_locator=NullLocator(),
                             major_formatter='{x:g}')
        figure.legend(handles=[Line2D([], [], **key) for key in keys], loc='outside lower center',
                      ncols=len(keys) if sum(widths) <= room else max(1, room // max(widths)))
        path = Path(path or ('plot.png' if len(runs) > 1 else
                             Path(out_dirs[0]) / ('preference.png' if preference else 'loss.png')))
        with replacing(path) as f:
            figure.savefig(f, format=path.suffix[1:])
    return path


def main(cfg):
    print(f'saved {plot(cfg.runs, cfg.path)}')


if __name__ == '__main__':
    run(main, Config)
