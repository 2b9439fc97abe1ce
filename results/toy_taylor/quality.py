"""Mean true quality of a toy run's samples on 256 held-out questions, at temperatures 1 and 0.5, beside the data's.

    python results/toy_taylor/quality.py out/toy_start out/toy_teacher
"""
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from losses import taylor_link  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from prepare_shp import SPLIT_SEED, TOY_POSTS, encoding, render  # noqa: E402
from runs import load_checkpoint  # noqa: E402
from toy_shp import quality, toy_rows  # noqa: E402

answers = {}
for row in toy_rows('validation', TOY_POSTS['validation'], SPLIT_SEED):
    answers.setdefault(row['history'], set()).update((row['human_ref_A'], row['human_ref_B']))
questions = sorted(answers)[:256]
scores = [[quality(question, answer) for answer in answers[question]] for question in questions]
print(f'the data: best answers {mean(map(max, scores)):.3f}, all answers {mean(sum(scores, [])):.3f}')
bytes_ = encoding('bytes')
prompts = [bytes_.encode_ordinary(render(question, '')[0]) for question in questions]
for folder in sys.argv[1:]:
    state = load_checkpoint(folder)
    model = GPT(GPTConfig(**state['model_config']))
    model.load_state_dict(state['model'])
    order = state.get('link_order', 0)
    uniform = torch.rand(len(prompts), 44, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.5):
        for name, n in (('p', 0), ('link', order))[:2 if order else 1]:
            samples = model.generate(prompts, 44, temperature, eot=bytes_.eot_token, uniform=uniform,
                                     transform=lambda log_p: taylor_link(log_p, n))
            texts = [bytes_.decode([id for id in sample if id != bytes_.eot_token]) for sample in samples]
            found = [quality(question, text) for question, text in zip(questions, texts)]
            print(f'{folder}, {name}, temperature {temperature}: {mean(found):.3f} +- '
                  f'{stdev(found) / len(found) ** 0.5:.3f} (standard error)')
