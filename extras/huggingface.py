"""Import and export of GPT-2 for Hugging Face: weights, tokenizer, model card. Needs safetensors, not transformers.

    python preference.py --dataset=mine --init_from=gpt2 --block_size=512
    python sample.py --out_dir=out/mine_dpo --export_hf=DIR

Import: gpt2, gpt2-medium, gpt2-large or gpt2-xl, downloaded once by huggingface_hub, or a folder with config.json and
model.safetensors (whole or in shards) or pytorch_model.bin. The start's shape overrides the options; its context is
cropped to block_size. Its vocabulary must be the data's. A resumed run does not need the start again.

Export: a new folder for AutoModelForCausalLM and AutoTokenizer, in float32, with a model card. A reward model is
written as its trunk, with the head in scalar_head.safetensors; a PPO run as its policy, with the value function in
critic/. Missing biases are written as 0. Two things are lost: link_n is not part of the weights, and <|endoftext|>
within a text, which is ordinary text here, is the special token there.
"""
import json
import math
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

import prepare_shp
from configurator import Refusal
from model import GPT, GPTConfig
from runs import first_line, read_events

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ImportError:
    raise Refusal('Hugging Face folders need the package safetensors: pip install safetensors') from None

WEIGHTS = 'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'
# the values of GPT2Config that our GPT supports; the first is the default if config.json lacks the key
EXPRESSED = dict(model_type=('gpt2',), activation_function=('gelu_new', 'gelu_pytorch_tanh'),  # the same by two names
                 layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                 add_cross_attention=(False,), tie_word_embeddings=(True, False))
SIZES = dict(vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768)
MASK = re.compile(r'transformer\.h\.\d+\.attn\.(masked_)?bias')  # the causal mask, which some files contain
WTE, HEAD = 'transformer.wte.weight', 'lm_head.weight'           # in our GPT padded to a multiple of 64 rows
CONV1D = 'c_attn.weight', 'c_proj.weight', 'c_fc.weight'         # x W + b, so W is the transpose of our Linear's
TOLERANCE = 1e-4  # relative, of float32 logits


# GPT-2, as Hugging Face stores it -------------------------------------------------------------------------------------


def gpt2_shapes(config):
    """{name: shape} of the weights of GPT2LMHeadModel."""
    C = config.n_embd
    block = {'ln_1': (C,), 'attn.c_attn': (C, 3 * C), 'attn.c_proj': (C, C),
             'ln_2': (C,), 'mlp.c_fc': (C, 4 * C), 'mlp.c_proj': (4 * C, C)}
    modules = {f'h.{n}.{name}': shape for n in range(config.n_layer) for name, shape in block.items()}
    shapes = {WTE: (config.vocab_size, C), 'transformer.wpe.weight': (config.block_size, C)}
    for name, shape in (modules | {'ln_f': (C,)}).items():
        shapes |= {f'transformer.{name}.weight': shape, f'transformer.{name}.bias': shape[-1:]}
    return shapes if config.tie_weights else shapes | {HEAD: (config.vocab_size, C)}


def gpt2_logits(w, config, idx):
    """Logits (T, V) of a text idx (T,) from weights w with Hugging Face's names, written out (Radford et al. 2019)."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], eps=1e-5)

    def conv1d(x, name):
        return x @ w[f'{name}.weight'] + w[f'{name}.bias']

    T = len(idx)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = w[WTE][idx] + w['transformer.wpe.weight'][:T]
    for h in (f'transformer.h.{n}' for n in range(config.n_layer)):
        qkv = conv1d(norm(x, f'{h}.ln_1'), f'{h}.attn.c_attn')
        q, k, v = qkv.view(T, 3, config.n_head, -1).permute(1, 2, 0, 3)  # each (n_head, T, C / n_head)
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(later, -torch.inf).softmax(-1)
        x = x + conv1d((attention @ v).transpose(0, 1).reshape(T, -1), f'{h}.attn.c_proj')
        u = conv1d(norm(x, f'{h}.ln_2'), f'{h}.mlp.c_fc')
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + conv1d(u, f'{h}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ w.get(HEAD, w[WTE]).T


# Import --------------------------------------------------------------------------------------------------------------


def open_gpt2(where, encoding):
    """A folder or a name of the Hub -> dict(model, model_config, encoding), float32, in our names and shapes.

    Raises Refusal for another vocabulary than the data's, for a config that our GPT does not support, and for a weight
    that is missing, unexpected, of another shape or not finite.
    """
    folder = Path(where) if Path(where).exists() else fetch(where)
    config, given, weights = read_config(folder), {}, {}
    if config.vocab_size != encoding.n_vocab:
        raise Refusal(f'init_from={where} has a vocabulary of {config.vocab_size:,} tokens, but the data are in '
                      f"{encoding.name}; prepare the data with the model's --encoding")
    check_tokenizer(folder, encoding)
    for name, w in read_weights(folder).items():
        name = name if name == HEAD else 'transformer.' + name.removeprefix('transformer.')
        if not MASK.fullmatch(name):
            given[name] = w
    wanted = gpt2_shapes(config)
    if config.tie_weights and WTE in given and not torch.equal(given.pop(HEAD, given[WTE]), given[WTE]):
        raise Refusal(f'{folder} has a {HEAD} of its own, but its config.json ties it to the token embedding; set '
                      'tie_word_embeddings to false there to keep it')
    for name in sorted(wanted.keys() ^ given.keys()):
        problem = 'lacks the weight' if name in wanted else 'has the additional weight'
        raise Refusal(f'{folder} {problem} {name}; only GPT2LMHeadModel can be read')
    for name, shape in wanted.items():
        w = given.pop(name).float()
        if w.shape != shape:
            raise Refusal(f'{folder}: {name} has shape {tuple(w.shape)}, but config.json requires {shape}')
        if not w.isfinite().all():
            raise Refusal(f'{folder}: {name} has values that are not finite; copy the model again')
        if name in (WTE, HEAD):
            w = F.pad(w, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
        weights[name] = w.t().contiguous() if name.endswith(CONV1D) else w
    weights.setdefault(HEAD, weights[WTE])
    return dict(model=weights, model_config=dict(vars(config)), encoding=encoding.name)


def fetch(name):
    """Downloads config.json and weights of a GPT-2 of the Hub -> the folder where huggingface_hub keeps them."""
    for repository in (f'openai-community/{name}', name):  # a cache may have it under either name
        try:
            from huggingface_hub import snapshot_download
            return Path(snapshot_download(repository, allow_patterns=['config.json', 'model.safetensors']))
        except Exception as error:  # the network, the Hub and an incomplete cache raise many types
            problem = f'{type(error).__name__}: {first_line(error)}'
    raise Refusal(f'{name} could not be downloaded ({problem}); pip install huggingface_hub, check the network, set '
                  'HF_HOME to a cache that has it, or name a folder with its config.json and model.safetensors')


def read_config(folder):
    """config.json of a GPT2LMHeadModel -> GPTConfig without dropout. Raises Refusal for what is not supported."""
    given = read_json(folder / 'config.json')
    sizes = {key: given.get(key, default) for key, default in SIZES.items()}
    for key, values in (EXPRESSED | dict(n_inner=(None, 4 * sizes['n_embd']))).items():
        if given.get(key, values[0]) not in values:
            raise Refusal(f'{folder}: {key}={given[key]!r} in config.json is not supported, only '
                          f'{" or ".join(map(repr, values))}; use another GPT-2')
    block_size = sizes.pop('n_positions')
    return GPTConfig(block_size=block_size, tie_weights=given.get('tie_word_embeddings', True), **sizes)


def read_json(path):
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise Refusal(f'{path} cannot be read ({first_line(error)}); copy the model again') from None


def read_weights(folder):
    """{name: tensor} of the first of WEIGHTS that exists."""
    whole, index, pickled = (folder / name for name in WEIGHTS)
    files, weights = [whole if whole.exists() else pickled], {}
    if index.exists() and not whole.exists():
        files = [folder / file for file in set(read_json(index)['weight_map'].values())]
    for file in files:
        try:
            weights |= load_file(file) if file != pickled else torch.load(file, map_location='cpu', weights_only=True)
        except Exception as error:  # safetensors and the unpickler raise many types for a missing or damaged file
            raise Refusal(f'{file} cannot be read ({first_line(error)}); copy the model again, its config.json and one '
                          f'of {", ".join(WEIGHTS)}') from None
    return weights


def check_tokenizer(folder, encoding):
    """If the folder has a tokenizer, checks that its ordinary tokens are those of the encoding."""
    if (folder / 'tokenizer.json').exists():
        found = read_json(folder / 'tokenizer.json')['model']['vocab']
    elif (folder / 'vocab.json').exists():
        found = read_json(folder / 'vocab.json')
    else:
        return
    for token, id in vocabulary(encoding).items():
        if found.get(token) != id:
            raise Refusal(f"the tokenizer in {folder} is not the data's, {encoding.name}: {token!r} is not its token "
                          f'{id}; use a model with the vocabulary of the data')


# Export --------------------------------------------------------------------------------------------------------------


def export(state, out_dir, folder):
    """Writes a checkpoint `state` of the run out_dir to a new `folder`, for AutoModelForCausalLM and AutoTokenizer.

    It is written elsewhere and renamed. Raises Refusal if `folder` exists, or if the model is not a GPT-2.
    """
    final = Path(folder)
    if final.exists():
        raise Refusal(f'export_hf={final} exists; name a new folder, or remove it')
    encoding, temporary = prepare_shp.encoding(state['encoding']), prepare_shp.temporary_folder(final.absolute())
    weights = state['model' if 'model' in state else 'reward_model']
    try:
        temporary.mkdir(parents=True)
        write_model(temporary, weights, GPTConfig(**state['model_config']), encoding)
        if 'critic' in state:
            write_model(temporary / 'critic', state['critic'], GPTConfig(**state['critic_config']), encoding)
        write_tokenizer(temporary, encoding, state['model_config']['block_size'])
        (temporary / 'README.md').write_text(model_card(state, out_dir, final.name, encoding), encoding='utf-8')
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        raise Refusal(f'export_hf={final} could not be written ({first_line(error)}); choose another folder') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_gpt2(weights, config):
    """Weights of our GPT -> of GPT2LMHeadModel. Raises Refusal if these have other names or give other logits."""
    refusal = '--export_hf writes GPT-2 only, and this model is not one: {} differ; use it with sample.py'
    wanted = gpt2_shapes(config)
    theirs = {name: torch.zeros(shape) for name, shape in wanted.items() if name.endswith('.bias')}
    for name, w in weights.items():
        if name in (WTE, HEAD):
            w = w[:config.vocab_size]
        if name != HEAD or not config.tie_weights:
            theirs[name] = w.t().contiguous() if name.endswith(CONV1D) else w
    differing = {name: tuple(w.shape) for name, w in theirs.items()}.items() ^ wanted.items()
    if differing:
        raise Refusal(refusal.format(f'its weights ({min(differing)[0]})'))
    gpt = GPT(config).eval()
    gpt.load_state_dict(weights)
    idx = torch.randint(config.vocab_size, (min(config.block_size, 1024),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, logits = gpt.logits(gpt(idx[None]))[0, :, :config.vocab_size], gpt2_logits(theirs, config, idx)
    if not (ours - logits).norm() <= TOLERANCE * logits.norm():
        raise Refusal(refusal.format('its logits on random tokens'))
    return theirs


def write_model(folder, weights, config, encoding):
    """Writes config.json, generation_config.json, model.safetensors and, for a ScalarHead, scalar_head.safetensors."""
    folder.mkdir(exist_ok=True)
    if 'head.weight' in weights:
        head = dict(weight=weights['head.weight'], offset=weights['offset'])
        save_file(head, folder / 'scalar_head.safetensors', metadata=dict(format='pt'))
        weights = {name.removeprefix('gpt.'): w for name, w in weights.items() if name not in ('head.weight', 'offset')}
    save_file(to_gpt2(weights, config), folder / 'model.safetensors', metadata=dict(format='pt'))
    ends = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'), encoding.eot_token)
    write_json(folder / 'config.json', dict(
        architectures=['GPT2LMHeadModel'], model_type='gpt2', activation_function='gelu_new', dtype='float32',
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, tie_word_embeddings=config.tie_weights, resid_pdrop=config.dropout,
        embd_pdrop=config.dropout, attn_pdrop=config.dropout, **ends))
    # sample.py's defaults; transformers would sample from the 50 likeliest tokens only
    write_json(folder / 'generation_config.json', dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ends))


def write_json(path, thing):
    path.write_text(json.dumps(thing, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def write_tokenizer(folder, encoding, block_size):
    """Writes the encoding as a byte-level BPE."""
    end, tokens = prepare_shp.END_OF_TEXT, vocabulary(encoding)
    bytes_ = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
    write_json(folder / 'tokenizer.json', dict(
        version='1.0', pre_tokenizer=bytes_, decoder=bytes_,
        added_tokens=[dict(id=encoding.eot_token, content=end, special=True, single_word=False, lstrip=False,
                           rstrip=False, normalized=False)],
        model=dict(type='BPE', vocab=tokens | {end: encoding.eot_token}, merges=list(merges(tokens)))))
    write_json(folder / 'tokenizer_config.json', dict(
        tokenizer_class='GPT2Tokenizer', bos_token=end, eos_token=end, unk_token=end, add_prefix_space=False,
        clean_up_tokenization_spaces=False, model_max_length=block_size))


def vocabulary(encoding):
    """{token: id} without end-of-text, in order. Each byte is a printable character, as in GPT-2's encoder.py."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return {''.join(character[b] for b in encoding.decode_single_token_bytes(id)): id
            for id in range(encoding.n_vocab) if id != encoding.eot_token}


def merges(tokens):
    """The pairs of tokens that BPE merges, in order. tiktoken stores only the merged tokens.

    Merging the earliest pair within a token repeatedly leaves the last pair that gave the token.
    """
    for token in tokens:
        parts = list(token)
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: tokens.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts


GENERATE = """ids = model.generate(**tokenizer(prompt, return_tensors='pt'), max_new_tokens=100)
print(tokenizer.decode(ids[0], skip_special_tokens=True))"""
SCORE = """import safetensors.torch, torch
prompt_length = len(tokenizer(prompt)['input_ids'])
ids = tokenizer(prompt)['input_ids'] + tokenizer(answer.strip())['input_ids'] + [tokenizer.eos_token_id]
h = model.transformer(torch.tensor([ids]))[0][0]  # hidden states after the last LayerNorm
head = safetensors.torch.load_file('{}/scalar_head.safetensors')
reward = {} @ head['weight'][0] + head['offset'][0]"""


def model_card(state, out_dir, name, encoding):
    config, shape, end = state['config'], GPTConfig(**state['model_config']), prepare_shp.END_OF_TEXT
    order, task, use = config.get('taylor_order', 0), 'text-generation', GENERATE
    if 'model' not in state:
        task = 'text-classification'
        use = SCORE.format(name, 'h[prompt_length:].sum(0)' if config.get('reward_read') == 'sum' else 'h[-1]')
    notes = [note for applies, note in (
        (order, f'The Taylor loss T_{order} makes probabilities under-confident by design. They are not mapped by '
                f'link_{order}: p_i / (1 - p_i)^{order}, divided by its sum over the vocabulary.'),
        (not shape.bias, 'It was trained without biases; those of GPT-2 are 0 here.'),
        ('critic' in state, "The value function is in `critic/`, for from_pretrained(..., subfolder='critic'): "
                            'h @ weight[0] + offset, with both from its scalar_head.safetensors.')) if applies]
    evaluations = [event for event in read_events(Path(out_dir) / 'metrics.jsonl')
                   if event['event'] == 'eval' and event['step'] <= state['step']]
    return f"""---
library_name: transformers
pipeline_tag: {task}
---

# {name}

A GPT-2 trained with nanoTaylor ({config.get('method') or f'language model, T_{order}'}), at step {state['step']:,}. \
{encoding.n_vocab:,} tokens of {encoding.name}, a context of {shape.block_size:,}, float32. {' '.join(notes)}

A prompt is the stripped post, and a line that starts the answer. An answer ends with `{end}`. Prompt \
and answer are encoded separately. In training `{end}` within a text was ordinary text; here it is the special token.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained({name!r}), AutoTokenizer.from_pretrained({name!r})
prompt = post.strip() + {prepare_shp.SEPARATOR!r}
{use}
```

```json
{json.dumps(dict(last_evaluation=evaluations[-1:], options=config), indent=1, default=str)}
```
"""
