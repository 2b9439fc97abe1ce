"""Samples answers to a post from a checkpoint, or exports it for Hugging Face.

    python sample.py --out_dir=out/toy_t2 --prompt="Rusty kettle since May, any tips?"
    python sample.py --out_dir=out/toy_t2 --export_hf=toy_t2_hf
"""
import codecs
from dataclasses import dataclass
from pathlib import Path

import torch

import prepare_shp
from configurator import Options, Refusal, run
from losses import taylor_link
from model import GPT, GPTConfig
from prepare_shp import visible
from runs import DEVICES, DTYPES, load_weights, setup


@dataclass(frozen=True)
class Config(Options):
    out_dir: str = 'out/toy_t2'   # the run's folder
    checkpoint: str = 'best'      # best: best.pt of the run; last: its latest checkpoint
    export_hf: str = ''           # write the model to this new folder, for transformers
    prompt: str = ''              # the post to answer
    prompt_file: str = ''         # UTF-8 file with one post per line, in place of prompt
    num_samples: int = 1          # answers per post
    max_new_tokens: int = 200     # maximum length of an answer; it ends earlier at end-of-text or if the block is full
    temperature: float = 1.0      # sampling temperature; 0 = always the likeliest token
    top_k: int = 0                # sample from the k likeliest tokens; 0 = all
    link: bool = False            # sample from link_n(p), which undoes the under-confidence of T_n
    seed: int = 0                 # seed of the samples
    device: str = 'auto'          # cpu, cuda or mps; auto = the best available
    dtype: str = 'auto'           # dtype of matrix products: float32, bfloat16 or float16; auto = the best available

    choices = dict(checkpoint=('best', 'last'), device=DEVICES, dtype=DTYPES)
    lowest = dict(num_samples=1, max_new_tokens=1)

    def check(self):
        yield from super().check()
        if self.export_hf and self.link:
            yield 'link has no effect on export_hf, which writes the model; leave it out'
        if [self.prompt, self.prompt_file, self.export_hf].count('') != 2:
            yield ('set exactly one of --prompt="..." (a post), --prompt_file=FILE (a file of posts) and '
                   '--export_hf=DIR (a folder to write)')


def main(cfg):
    state = load_weights(cfg.out_dir, cfg.checkpoint)
    if cfg.export_hf:
        from extras import huggingface
        huggingface.export(state, cfg.out_dir, cfg.export_hf)
        print(f'wrote {cfg.export_hf}')
        return
    machine = setup(cfg.device, cfg.dtype)
    if 'model' not in state:
        raise Refusal(f'{cfg.out_dir} is a reward model, which writes no answers; name another run')
    model = GPT(GPTConfig(**state['model_config'])).to(machine.device)
    model.load_state_dict(state['model'])
    order = state.get('link_order', state['config'].get('taylor_order', 0))
    if cfg.link and not order:
        raise Refusal(f'{cfg.out_dir} was not trained with T_n, n >= 1, so its probabilities have no link; leave out '
                      '--link')
    if cfg.link:
        print(f'sampling from link_{order}(p)')
    encoding = prepare_shp.encoding(state['encoding'])
    prompts = [cfg.prompt]
    if cfg.prompt_file:
        prompts = filter(str.strip, Path(cfg.prompt_file).read_text(encoding='utf-8-sig').split('\n'))
    transform = (lambda log_p: taylor_link(log_p, order)) if cfg.link else None
    generator = torch.Generator().manual_seed(cfg.seed)
    block_size = model.config.block_size
    room = block_size - min(cfg.max_new_tokens, block_size // 4)  # for the post; answers get up to a quarter
    for prompt in prompts:
        rendered = prepare_shp.render(prompt, '')[0]
        ids = encoding.encode_ordinary(rendered)
        if len(ids) > room:
            print(f'the post has {len(ids)} tokens; its first {len(ids) - room} are dropped, to leave room for an '
                  f'answer in the block of {block_size}')
            ids = ids[-room:]
        for _ in range(cfg.num_samples):
            print('-' * 40 + '\n' + visible(rendered), end='', flush=True)
            decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character may span tokens

            def stream(_, id):
                if id != encoding.eot_token:
                    print(visible(decoder.decode(encoding.decode_single_token_bytes(id))), end='', flush=True)

            with machine.autocast():
                answer, = model.generate([ids], cfg.max_new_tokens, cfg.temperature, cfg.top_k, encoding.eot_token,
                                         torch.rand(1, cfg.max_new_tokens, generator=generator), transform, stream)
            print(visible(decoder.decode(b'', True)) + ('' if answer[-1] == encoding.eot_token else ' [cut]'))


if __name__ == '__main__':
    run(main, Config)
