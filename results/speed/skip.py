"""What skip_below gains while a model learns its texts by heart, and how far its gradient is from the exact one.

    python prepare_shp.py --source=DIR --dataset=reddit300 --split=row --max_rows=300
    python results/speed/skip.py reddit300 bfloat16       # -> skip_bfloat16.jsonl and skip_bfloat16.png

The source's model with 64 channels trains exactly (skip_below 0), 2,000 steps of 20 texts, on T_0, T_1 and T_2. Every
100 steps forward and backward passes of the step at hand are timed for each skip_below in turn, five times.
"""
import json
import sys
import time
from pathlib import Path
from statistics import median

import matplotlib
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import plot  # noqa: E402
import prepare_shp  # noqa: E402
from losses import linear_taylor_loss, linear_token_log_prob  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import Config, Updates, setup  # noqa: E402

SHARES = 0.0, 1e-3, 1e-2, 1e-1
STEPS, EVERY, TURNS = 2000, 100, 5


def train(documents, vocab_size, n, machine):
    torch.manual_seed(0)
    cfg = Config(max_iters=STEPS, learning_rate=3e-3, min_lr=3e-4, warmup_iters=50, grad_clip=10.0, weight_decay=0.0)
    gpt = GPT(GPTConfig(vocab_size, 128, 1, 8, 64))
    updates = Updates([gpt], cfg, machine)
    for step in range(STEPS):
        x, y = prepare_shp.lm_batch(documents, 'examples', 128, 0, step, 20)

        def passes(share):
            with machine.autocast():
                sums = linear_taylor_loss(gpt(x).flatten(0, 1), gpt.lm_head.weight, y.flatten(), n, vocab_size, share)
            updates.backward(sums.loss / sums.count)
            return sums

        if step % EVERY == EVERY - 1:
            seconds, gradients = {share: [] for share in SHARES}, {}
            for _ in range(TURNS):
                for share in SHARES:
                    gpt.zero_grad(set_to_none=True)
                    start = time.perf_counter()
                    sums = passes(share)
                    seconds[share].append(time.perf_counter() - start)
                    gradients[share] = torch.cat([p.grad.flatten() for p in gpt.parameters()])
            gpt.zero_grad(set_to_none=True)
            exact = gradients[0.0]
            with torch.no_grad(), machine.autocast():
                log_p = linear_token_log_prob(gpt(x).flatten(0, 1), gpt.lm_head.weight, y.flatten(), vocab_size)
            q_n = (-torch.expm1(log_p[y.flatten() >= 0])) ** n
            yield dict(n=n, step=step + 1, ce=(sums.ce / sums.count).item(), weight=(sums.weight / sums.count).item(),
                       ms={share: 1e3 * median(times) for share, times in seconds.items()},
                       gain={share: median(a / b for a, b in zip(seconds[0.0], times))
                             for share, times in seconds.items()},
                       known={share: (q_n < share * q_n.max()).float().mean().item() for share in SHARES},
                       deviation={share: ((g - exact).norm() / exact.norm()).item() for share, g in gradients.items()})
        passes(0.0)
        updates.step(step + 1, None)


def picture(lines, path):
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(10, 3.2), dpi=150, layout='constrained')
        axes = figure.subplots(1, 3)
        for ax, n in zip(axes, (0, 1, 2)):
            of_n = [line for line in lines if line['n'] == n]
            for colour, share in zip(plot.COLOURS, SHARES):
                ax.plot([line['step'] for line in of_n], [line['ms'][share] for line in of_n], color=colour,
                        label=f'skip_below={share:g}')
            right = ax.twinx()
            right.plot([line['step'] for line in of_n], [line['weight'] for line in of_n], ':', color=plot.COLOURS[-1])
            right.set(ylim=(0, 1.05), ylabel='mean weight q^n (dotted)' if n == 2 else '')
            right.grid(False)
            ax.set(title=f'T_{n}', xlabel='step', ylabel='ms, forward and backward' if n == 0 else '', ylim=(0, None))
        axes[0].legend(fontsize=7, loc='lower left')
        figure.savefig(path)


def main(dataset='reddit300', dtype='bfloat16'):
    machine = setup('cpu', dtype)
    meta = json.loads(Path('data', dataset, 'meta.json').read_text())
    documents = prepare_shp.Dataset(Path('data', dataset), meta, '').documents('train')
    lines, folder = [], ROOT / 'results/speed'
    for n in (2, 1, 0):
        for line in train(documents, meta['vocab_size'], n, machine):
            lines.append(line)
            print(f"T_{n} step {line['step']} ce {line['ce']:.3f} weight {line['weight']:.3f} " + ', '.join(
                f"{share:g}: {line['ms'][share]:.0f} ms, {line['gain'][share]:.2f}x, "
                f"{line['known'][share]:.0%} known, {line['deviation'][share]:.1e}"
                for share in SHARES), flush=True)
    (folder / f'skip_{dtype}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    picture(lines, folder / f'skip_{dtype}.png')


if __name__ == '__main__':
    main(*sys.argv[1:])
