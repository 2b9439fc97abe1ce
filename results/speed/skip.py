"""What skip_below gains over a training run, and what it changes: runs of train.py -> skip.png and a table.

    python results/speed/skip.py out/skip_2_0 out/skip_2_1e-3 ...
"""
import json
import sys
from pathlib import Path
from statistics import median

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import plot  # noqa: E402


def main(folders):
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(9, 3.4), dpi=150, layout='constrained')
        speed, ce = figure.subplots(1, 2)
        print('| loss | skip_below | tokens/s, first tenth | last tenth | ratio | train_ce, last tenth | val_ce | '
              'val_ce_link | mean weight q^n at the end |\n|---|---|---|---|---|---|---|---|---|')
        for colour, folder in zip(plot.COLOURS, folders):
            config = json.loads((Path(folder) / 'config.json').read_text())
            events = plot.read_metrics(folder)
            train = [event for event in events if event['event'] == 'train']
            name = f"T_{config['taylor_order']}, skip_below={config['skip_below']:g}"
            steps, rates = ([event[key] for event in train] for key in ('step', 'tokens_per_second'))
            smooth = [median(rates[max(0, i - 4):i + 5]) for i in range(len(rates))]
            speed.plot(steps, [1e-3 * rate for rate in smooth], color=colour, label=name)
            ce.semilogy(steps, [event['train_ce'] for event in train], color=colour, label=name, linewidth=0.8)
            tenth = len(train) // 10
            first, last = median(rates[:tenth]), median(rates[-tenth:])
            val = [event for event in events if event['event'] == 'eval'][-1]
            print(f"| T_{config['taylor_order']} | {config['skip_below']:g} | {first:,.0f} | {last:,.0f} | "
                  f"{last / first:.2f} | {median(e['train_ce'] for e in train[-tenth:]):.4f} | {val['val_ce']:.3f} | "
                  f"{val['val_ce_link']:.3f} | {train[-1]['taylor_weight']:.4f} |")
        speed.set(title='Speed over training', xlabel='step', ylabel='thousand tokens a second')
        ce.set(title='Training cross-entropy', xlabel='step', ylabel='nats per token')
        speed.legend(fontsize=7)
        figure.savefig(ROOT / 'results/speed/skip.png')


if __name__ == '__main__':
    main(sys.argv[1:])
