"""GPT-2 in and out of Hugging Face: weights, tokenizer, model card. It needs neither transformers nor safetensors.

    python train.py --dataset=shp --init_from=gpt2 ...                    a run starts from a GPT-2 of the Hub
    python preference.py --dataset=shp --init_from=DIR ...                or from a folder that transformers has saved
    python sample.py --out_dir=out/toy_dpo --export_hf=DIR                and a run becomes such a folder
"""
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import prepare_shp
from configurator import Refusal
from model import GPT, GPTConfig
from runs import WEIGHTS, config_of, read_events

# of GPT2Config, what our GPT can express; a key that config.json lacks is at its default, which is the first one
EXPRESSED = dict(model_type=('gpt2',), activation_function=('gelu_new', 'gelu_pytorch_tanh'),  # the same by two names
                 layer_norm_epsilon=(1e-5,), scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                 add_cross_attention=(False,), tie_word_embeddings=(True, False))
SIZES = dict(vocab_size=50257, n_positions=1024, n_layer=12, n_head=12, n_embd=768)
BUFFER = re.compile(r'transformer\.h\.\d+\.attn\.(masked_)?bias')  # the causal mask, which some files hold
TRANSPOSED = 'c_attn.weight', 'c_proj.weight', 'c_fc.weight'         # Conv1D: x W, not x W^T
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
              I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)
MAX_HEADER = 100_000_000  # bytes, as in the safetensors package
DIGEST = 'nanotaylor_sha256'  # of entries and numbers, among a safetensors file's metadata


# In ------------------------------------------------------------------------------------------------------------------



def fetch(name):
    """config.json and weights of one of HUB -> the folder where huggingface_hub keeps them; fetched once."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Refusal(f'init_from={name} is fetched with huggingface_hub: pip install huggingface_hub, or name a '
                      'folder that has its config.json and model.safetensors') from None
    for repository in (f'openai-community/{name}', name):  # a cache may have it under either
        try:
            return Path(snapshot_download(repository, allow_patterns=['config.json', 'model.safetensors']))
        except Exception as error:  # of whatever kind the network, the Hub or a half-filled cache raise
            problem = type(error).__name__
    raise Refusal(f'{name} could not be had from the Hub ({problem}): is there a network? Else copy its config.json '
                  'and model.safetensors into a folder and name that with --init_from=DIR; where it was fetched '
                  'before, set HF_HUB_OFFLINE=1 and HF_HOME to that cache')


def read_gpt2(folder):
    """A folder with config.json and weights -> dict(model, model_config, encoding), float32, in our names and shapes.

    Rows of the embedding that pad the vocabulary are 0. Refuses a config that our GPT cannot express, and a weight that
    is missing, unexpected, of another shape or not finite, by its name.
    """
    config = read_config(folder)
    given = {}
    for name, w in read_weights(folder).items():
        ours = name if name == 'lm_head.weight' else 'transformer.' + name.removeprefix('transformer.')
        if BUFFER.fullmatch(ours):
            continue
        if ours in given:
            raise Refusal(f'{folder} holds {name} twice, with and without "transformer."; it is no sound GPT-2')
        given[ours] = w
    if len(given) < config.n_layer:  # else so many layers would be made for nothing
        raise Refusal(f'{folder} holds {len(given)} weights, too few for n_layer={config.n_layer} of its config.json')
    if config.tie_weights and 'transformer.wte.weight' in given:
        embedding = given['transformer.wte.weight']
        head = given.setdefault('lm_head.weight', embedding)
        if head is not embedding and not torch.equal(head, embedding):
            raise Refusal(f'{folder} has a lm_head.weight of its own, and config.json says that it is tied to the '
                          'token embedding; which of the two holds? Set tie_word_embeddings to false to keep it')
    with torch.device('meta'):  # shapes without memory
        wanted = {name: foreign_shape(name, w.shape, config) for name, w in GPT(config).state_dict().items()}
    for names, problem in ((wanted.keys() - given, 'lacks'), (given.keys() - wanted, 'holds, beyond a GPT-2,')):
        if names:
            raise Refusal(f'{folder} {problem} {", ".join(sorted(names)[:3])}{", ..." * (len(names) > 3)}; only '
                          'GPT2LMHeadModel can be read')
    weights = {}
    for name, shape in wanted.items():
        w = given.pop(name)
        if tuple(w.shape) != shape:
            raise Refusal(f'{folder}: {name} is of shape {tuple(w.shape)}, and config.json makes it {shape}')
        if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise Refusal(f'{folder}: {name} is of {w.dtype}; save the model in float32, float16 or bfloat16')
        w = w.float()
        if not w.isfinite().all():
            raise Refusal(f'{folder}: {name} holds numbers that are not finite')
        w = w.t() if name.endswith(TRANSPOSED) else w
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            w = torch.nn.functional.pad(w, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
        weights[name] = w.contiguous()
    if config.tie_weights:
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    names = {size: name for name, size in prepare_shp.VOCABULARIES.items()}
    return dict(model=weights, model_config=dict(vars(config)),
                encoding=names.get(config.vocab_size, f'a vocabulary of {config.vocab_size:,} tokens'))


def read_config(folder):
    """config.json of a GPT2LMHeadModel -> GPTConfig without dropout; refuses what our GPT cannot express."""
    given = read_json(folder / 'config.json')
    config = {key: given.get(key, values[0]) for key, values in EXPRESSED.items()}
    for key, values in EXPRESSED.items():
        if config[key] not in values:
            raise Refusal(f'{folder}: our GPT cannot express {key}={config[key]!r} of its config.json, only '
                          f'{" or ".join(map(repr, values))}; use another GPT-2')
    sizes = {key: given.get(key, default) for key, default in SIZES.items()}
    for key, size in sizes.items():
        if type(size) is not int or not 1 <= size <= 10 ** 6:
            raise Refusal(f'{folder}: {key}={str(size)[:80]} of its config.json is no number from 1 to a million')
    if given.get('n_inner') not in (None, 4 * sizes['n_embd']):
        raise Refusal(f'{folder}: our GPT cannot express n_inner={given["n_inner"]!r} of its config.json, only '
                      '4 n_embd; use another GPT-2')
    block_size = sizes.pop('n_positions')
    try:
        return GPTConfig(block_size=block_size, tie_weights=bool(config['tie_word_embeddings']), **sizes)
    except ValueError as error:
        raise Refusal(f'{folder}: {error}') from None


def read_json(path):
    """The JSON object in a file of a model; Refusal where there is none."""
    try:
        thing = json.loads(path.read_bytes())
    except OSError as error:
        raise Refusal(f'{path} cannot be read ({error.strerror}); a model is config.json and {WEIGHTS[0]}') from None
    except (ValueError, RecursionError):
        thing = None
    if not isinstance(thing, dict):
        raise Refusal(f'{path} is no JSON object; copy the model again')
    return thing


def read_weights(folder):
    """{name: tensor} of the first of WEIGHTS that is there."""
    whole, index, pickled = (folder / name for name in WEIGHTS)
    if whole.exists():
        return read_safetensors(whole)
    if index.exists():
        files, weights = read_json(index).get('weight_map'), {}
        if not isinstance(files, dict) or not all(type(file) is str and re.fullmatch(r'[\w.-]+\.safetensors', file)
                                                  for file in files.values()):
            raise Refusal(f'{index} does not map names of weights to files beside it; copy the model again')
        for file in sorted(set(files.values())):
            shard = read_safetensors(folder / file)
            if shard.keys() != {name for name, where in files.items() if where == file}:
                raise Refusal(f'{folder / file} does not hold what {index.name} says; copy the model again')
            weights |= shard
        return weights
    if not pickled.exists():
        raise Refusal(f'{folder} has no weights, none of {", ".join(WEIGHTS)}; copy them beside its config.json')
    try:
        weights = torch.load(pickled, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever the unpickler makes of it
        raise Refusal(f'{pickled} cannot be read safely ({type(error).__name__}); save it as safetensors') from None
    if not isinstance(weights, dict) or not all(
            type(name) is str and type(w) is torch.Tensor and w.layout == torch.strided and w.device.type == 'cpu'
            for name, w in weights.items()):
        raise Refusal(f'{pickled} does not hold named weights; save the model with save_pretrained')
    return weights


def check_tokenizer(folder, encoding):
    """Where the folder has a tokenizer, its ordinary tokens must be the encoding's: equal counts are no equal words."""
    if (folder / 'tokenizer.json').exists():
        model = read_json(folder / 'tokenizer.json').get('model')
        vocabulary = model.get('vocab') if isinstance(model, dict) else None
    elif (folder / 'vocab.json').exists():
        vocabulary = read_json(folder / 'vocab.json')
    else:
        return
    for id, token in token_names(encoding).items():
        if not isinstance(vocabulary, dict) or vocabulary.get(token) != id:
            raise Refusal(f"the tokenizer in {folder} is not the data's, {encoding.name}: it does not have {token!r} "
                          f'as {id}; use a model of that vocabulary')


# safetensors: 8 bytes, the length of the header; the header, JSON {name: {dtype, shape, data_offsets}}; the numbers --


def read_safetensors(path):
    """{name: tensor}. Refuses a file that is not exactly that, or not of the sha256 that write_safetensors puts in."""
    try:
        with open(path, 'rb') as file:
            size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), 'little')
            if length > min(MAX_HEADER, size - 8):
                raise ValueError(f'its header cannot be {length} bytes long')
            header = json.loads(file.read(length).decode())
            metadata = header.pop('__metadata__', {})
            digest, tensors, place = entries_digest(header), {}, 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
                dtype, shape, (first, end) = DTYPES.get(entry['dtype']), entry['shape'], entry['data_offsets']
                if dtype is None:
                    raise ValueError(f"{name} is of {entry['dtype']}, which is not read here: save it in float32")
                if any(type(n) is not int or n < 0 for n in (*shape, first, end)) or first != place:
                    raise ValueError(f'{name} is not where the one before it ends')
                if end - first != math.prod(shape) * dtype.itemsize or end > size - 8 - length:
                    raise ValueError(f'the bytes of {name} are not as many as its shape needs')
                numbers, place = bytearray(file.read(end - first)), end
                digest.update(numbers)
                tensors[name] = torch.frombuffer(numbers, dtype=dtype).view(shape) if numbers else torch.empty(
                    shape, dtype=dtype)
            if place != size - 8 - length:
                raise ValueError('it does not end where its last tensor ends')
            if metadata.get(DIGEST, digest.hexdigest()) != digest.hexdigest():
                raise ValueError('it has not the sha256 that it was written with')
            return tensors
    except OSError as error:
        raise Refusal(f'{path} cannot be read ({error.strerror}); copy the model again') from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        raise Refusal(f'{path} is no sound safetensors file ({type(error).__name__}: {str(error)[:200]}); copy the '
                      'model again') from None


def write_safetensors(path, tensors):
    """tensors {name: float32} -> a file that read_safetensors and the safetensors package read."""
    header, parts, place = {}, [], 0
    for name, w in tensors.items():
        parts.append(w.detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy())
        header[name] = dict(dtype='F32', shape=list(w.shape), data_offsets=[place, place + parts[-1].size])
        place += parts[-1].size
    digest = entries_digest(header)
    for part in parts:
        digest.update(part)
    text = json.dumps({'__metadata__': {'format': 'pt', DIGEST: digest.hexdigest()}, **header}).encode()
    text += b' ' * (-len(text) % 8)  # the numbers lie at a multiple of 8
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def entries_digest(header):
    """sha256 of a header's entries, to go on with the numbers in the file's order."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())


# Out -----------------------------------------------------------------------------------------------------------------


def export(state, out_dir, folder):
    """A checkpoint `state` of the run out_dir -> `folder`, which AutoModelForCausalLM and AutoTokenizer read.

    A policy or a reward model's trunk is the model; a reward model's scalar head is beside it, a critic in critic/.
    All is written to a folder beside it and renamed at the end. Refuses where `folder` exists.
    """
    final, encoding = Path(folder), encoding_of(state)
    if final.exists():
        raise Refusal(f'export_hf={final} exists; name a new folder, or remove it')
    temporary = prepare_shp.temporary_folder(final.absolute())
    main = 'model' if 'model' in state else 'reward_model'
    try:
        temporary.mkdir(parents=True)
        for name, place in ((main, temporary), ('critic', temporary / 'critic')):
            if name in state:
                write_model(place, state[name], GPTConfig(**config_of(state, name)), encoding)
        write_tokenizer(temporary, encoding, state['model_config']['block_size'])
        (temporary / 'README.md').write_text(model_card(state, out_dir, final.name, encoding), encoding='utf-8')
        temporary.rename(final)
    except OSError as error:
        raise Refusal(f'export_hf={final} could not be written ({error.strerror}); choose another folder') from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def encoding_of(state):
    """The encoding of a checkpoint that can be exported; Refusal for any other."""
    sizes = list(prepare_shp.VOCABULARIES.items())
    if not {'model', 'reward_model'} & state.keys() or (
            (state.get('encoding'), state['model_config']['vocab_size']) not in sizes):
        raise Refusal('this checkpoint holds no model with its encoding; export the folder of a finished run')
    return prepare_shp.encoding(state['encoding'])


def write_model(folder, weights, config, encoding):
    """config.json, generation_config.json, model.safetensors and, of a ScalarHead, scalar_head.safetensors."""
    folder.mkdir(exist_ok=True)
    if 'head.weight' in weights:
        write_safetensors(folder / 'scalar_head.safetensors', dict(weight=weights['head.weight'],
                                                                   offset=weights['offset']))
        weights = {name.removeprefix('gpt.'): w for name, w in weights.items() if name.startswith('gpt.')}
    with torch.device('meta'):  # with biases, which GPT-2 has: where ours has none they are 0
        names = GPT(replace(config, bias=True)).state_dict()
    if config.tie_weights:
        del names['lm_head.weight']
    out = {}
    for name, like in names.items():
        w = weights[name] if name in weights else torch.zeros(like.shape)
        w = w.t() if name.endswith(TRANSPOSED) else w
        out[name] = w[:foreign_shape(name, like.shape, config)[0]]
    write_safetensors(folder / 'model.safetensors', out)
    ends = dict(bos_token_id=encoding.eot_token, eos_token_id=encoding.eot_token)
    write_json(folder / 'config.json', dict(
        architectures=['GPT2LMHeadModel'], **{key: values[0] for key, values in EXPRESSED.items()} | dict(
            tie_word_embeddings=config.tie_weights), vocab_size=config.vocab_size, n_positions=config.block_size,
        n_ctx=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head, n_inner=None,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout, dtype='float32', **ends))
    # sample.py's defaults; those of transformers take the 50 likeliest tokens only
    write_json(folder / 'generation_config.json', dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                                       pad_token_id=encoding.eot_token, **ends))


def foreign_shape(name, shape, config):
    """The shape that Hugging Face's GPT-2 gives the weight which is of this name and shape in ours."""
    if name in ('transformer.wte.weight', 'lm_head.weight'):
        return config.vocab_size, config.n_embd  # without our padding
    return tuple(shape)[::-1] if name.endswith(TRANSPOSED) else tuple(shape)


def write_tokenizer(folder, encoding, block_size):
    """The encoding as a byte-level BPE: tokenizer.json, and vocab.json and merges.txt for older readers."""
    vocabulary = {token: id for id, token in token_names(encoding).items()}
    vocabulary[prepare_shp.END_OF_TEXT] = encoding.eot_token
    letters = byte_letters()
    pairs = [[''.join(letters[b] for b in part) for part in pair] for pair in merges(encoding)]
    special = {name: prepare_shp.END_OF_TEXT for name in ('bos_token', 'eos_token', 'unk_token')}
    bytes_ = dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True)
    write_json(folder / 'vocab.json', vocabulary)
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *map(' '.join, pairs)]) + '\n', encoding='utf-8')
    write_json(folder / 'special_tokens_map.json', special)
    write_json(folder / 'tokenizer_config.json', dict(
        tokenizer_class='GPT2Tokenizer', add_prefix_space=False, clean_up_tokenization_spaces=False,
        model_max_length=block_size, **special))
    write_json(folder / 'tokenizer.json', dict(
        version='1.0', truncation=None, padding=None, normalizer=None, pre_tokenizer=bytes_, decoder=bytes_,
        post_processor=dict(bytes_, trim_offsets=False),
        added_tokens=[dict(id=encoding.eot_token, content=prepare_shp.END_OF_TEXT, single_word=False, lstrip=False,
                           rstrip=False, normalized=False, special=True)],
        model=dict(type='BPE', dropout=None, unk_token=None, continuing_subword_prefix='', end_of_word_suffix='',
                   fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=vocabulary, merges=pairs)))


def byte_letters():
    """{byte: the printable character that stands for it in vocab.json} (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def token_names(encoding):
    """{id: its name in vocab.json} of all tokens but end-of-text."""
    letters = byte_letters()
    return {id: ''.join(letters[b] for b in encoding.decode_single_token_bytes(id))
            for id in range(encoding.n_vocab) if id != encoding.eot_token}


def merges(encoding):
    """The pairs of tokens, in bytes, that BPE joins, first the first: tiktoken keeps only what they give, in order.

    Joining the earliest pair within a token, again and again, ends in the pair that made it.
    """
    ranks = {encoding.decode_single_token_bytes(id): id for id in token_names(encoding)}
    pairs = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], math.inf))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append(parts)
    return pairs


def write_json(path, thing):
    path.write_text(json.dumps(thing, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def last_evaluation(out_dir, step):
    """The metrics.jsonl event of the evaluation at `step`, the last one at or before it; {} where there is none."""
    events = [event for _, event in read_events(Path(out_dir) / 'metrics.jsonl')]
    return next((event for event in reversed(events) if event['event'] == 'eval' and event['step'] <= step), {})


def model_card(state, out_dir, name, encoding):
    evaluation, config = last_evaluation(out_dir, state['step']), state['config']
    shape = GPTConfig(**state['model_config'])
    order, method = config.get('taylor_order'), config.get('method')
    trained_as = method or f'language model, T_{order or 0}'
    after_post, speaks = prepare_shp.render('', '')[0], 'model' in state
    use = '\n'.join(["ids = model.generate(**tokenizer(prompt, return_tensors='pt'), max_new_tokens=100)",
                     'print(tokenizer.decode(ids[0], skip_special_tokens=True))'] if speaks else [
                         "prompt_length = len(tokenizer(prompt)['input_ids'])",
                         "ids = tokenizer(prompt)['input_ids'] + tokenizer(answer.strip())['input_ids'] + "
                         f'[{encoding.eot_token}]'])
    parts = [f"""---
library_name: transformers
pipeline_tag: text-{"generation" if speaks else "classification"}
tags:
- nanotaylor
---

# {name}

A GPT-2 trained with nanoTaylor ({trained_as}), at step {state['step']:,}. {encoding.n_vocab:,} tokens of \
{encoding.name}, a context of {shape.block_size:,}, float32.

## {"How to ask" if speaks else "What it reads"}

A prompt is the post without blanks around it, a line that says that the answer starts, and a newline; nothing else. \
The answer ends with `{prepare_shp.END_OF_TEXT}`. Prompt and answer are encoded apart.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained({name!r}), AutoTokenizer.from_pretrained({name!r})
prompt = post.strip() + {after_post!r}
{use}
```

In training `{prepare_shp.END_OF_TEXT}` within a text was ordinary text; this tokenizer makes it the special token.
"""]
    if order:
        parts.append(f'It was trained with the Taylor loss T_{order}, under which probabilities are under-confident by '
                     f'design. They are here as they are, not mapped by link_{order}: p_i / (1 - p_i)^{order}, divided '
                     'by its sum over the vocabulary.\n')
    if not shape.bias:
        parts.append('It was trained without biases; those of GPT-2 are 0 here.\n')
    if not speaks:
        read = '(h[prompt_length:] @ w).sum()' if config.get('reward_read') == 'sum' else 'h[-1] @ w'
        parts.append(f"""## The reward

The model is the trunk of a reward model, `scalar_head.safetensors` its head: `weight` (1, {shape.n_embd}) and \
`offset` (1,). h (tokens, channels) are the hidden states after the last LayerNorm.

```python
import torch
from safetensors.torch import load_file

head = load_file({name + '/scalar_head.safetensors'!r})
h, w = model.transformer(torch.tensor([ids]))[0][0], head['weight'][0]
reward = {read} + head['offset'][0]
```
""")
    if 'critic' in state:
        parts.append("""## The critic

`critic/` is a model of its own, `from_pretrained(..., subfolder='critic')`. The value at a token is h @ weight[0] + \
offset, with h the hidden state after the last LayerNorm, `weight` and `offset` in `critic/scalar_head.safetensors`.
""")
    parts += [f'## {title}\n\n```json\n{json.dumps(thing, indent=1, default=str)}\n```\n'
              for title, thing in (('Last evaluation', evaluation), ('Options of the run', config)) if thing]
    return '\n'.join(parts)
