"""In and out of Hugging Face: exported files against a GPT-2 by hand, round trips, tokenizers, refusals, damage.

Where transformers is installed, against it too.
"""
import json
import math
import re
import struct
import subprocess
import types
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

import answers
from extras import huggingface
import prepare_shp
import preference
import sample
import test_preference
import test_train
import train
from configurator import Refusal
from extras.huggingface import export, read_safetensors, write_safetensors
from model import GPT, GPTConfig, ScalarHead
from runs import load_checkpoint, open_start, save_checkpoint
from toy_shp import toy_rows

folder = test_preference.folder  # a working directory with data, a start, a teacher and a reward model
BYTES = prepare_shp.encoding('bytes')
SHAPES = [(48, 1, 2, 16), (80, 3, 4, 32), (9, 2, 1, 24)]  # block_size, n_layer, n_head, n_embd
KINDS = [(True, True), (True, False), (False, True), (False, False)]  # bias, tie_weights


@pytest.fixture(autouse=True)
def work(folder, monkeypatch):
    monkeypatch.chdir(folder)


def a_gpt(shape=SHAPES[0], bias=True, tie_weights=True, seed=0, vocab_size=257):
    """Every weight away from its start, so that none can be left out or mistaken for another."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size, *shape, bias=bias, tie_weights=tie_weights)).eval()
    for p in gpt.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return gpt


def state_of(gpt, **more):
    state = dict(step=3, model=gpt.state_dict(), model_config=asdict(gpt.config), encoding='bytes', config={})
    return {**state, **more}


def exported(path, gpt=None, **more):
    export(state_of(gpt or a_gpt(), **more), 'no_run', path)
    return path


def start_from(path, block_size=0, encoding=BYTES):
    return open_start(types.SimpleNamespace(init_from=str(path), block_size=block_size), encoding)


def slow_gpt2(folder, idx):
    """Logits (T, V) of one text by GPT-2's definition from the files alone, float64, a query at a time."""
    c = json.loads((folder / 'config.json').read_text())
    w = {name: x.double() for name, x in read_safetensors(folder / 'model.safetensors').items()}

    def norm(x, name):
        spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * w[name + '.weight'] + w[name + '.bias']

    def conv1d(x, name):
        return x @ w[name + '.weight'] + w[name + '.bias']

    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:len(idx)]
    size = c['n_embd'] // c['n_head']
    for n in range(c['n_layer']):
        h = f'transformer.h.{n}'
        q, k, v = conv1d(norm(x, h + '.ln_1'), h + '.attn.c_attn').split(c['n_embd'], -1)
        y = torch.zeros_like(x)
        for t in range(len(idx)):
            for head in range(c['n_head']):
                s = slice(head * size, (head + 1) * size)
                y[t, s] = (k[:t + 1, s] @ q[t, s] / math.sqrt(size)).softmax(0) @ v[:t + 1, s]
        x = x + conv1d(y, h + '.attn.c_proj')
        u = conv1d(norm(x, h + '.ln_2'), h + '.mlp.c_fc')
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        x = x + conv1d(u, h + '.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ w.get('lm_head.weight', w['transformer.wte.weight']).T


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('bias, tie_weights', KINDS)
def test_what_is_exported_is_gpt2(tmp_path, shape, bias, tie_weights):
    gpt = a_gpt(shape, bias, tie_weights)
    out = exported(tmp_path / 'out', gpt)
    idx = torch.randint(257, (shape[0],))
    logits = gpt.double().logits(gpt(idx[None]))[0]
    assert torch.allclose(slow_gpt2(out, idx), logits[:, :257], rtol=0, atol=1e-10)
    weights = read_safetensors(out / 'model.safetensors')
    assert ('lm_head.weight' in weights) == (not tie_weights) and weights['transformer.wte.weight'].shape[0] == 257


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('bias, tie_weights', KINDS)
def test_round_trip_is_bit_equal(tmp_path, shape, bias, tie_weights):
    """Over the real vocabulary; padding comes back as 0, and a model without biases with biases of 0."""
    gpt = a_gpt(shape, bias, tie_weights)
    start = start_from(exported(tmp_path / 'out', gpt))
    assert start['encoding'] == 'bytes'
    assert start['model_config'] == dict(asdict(gpt.config), bias=True)
    back = answers.make_gpt(start)
    own = gpt.state_dict()
    for name, w in back.state_dict().items():
        if name in ('transformer.wte.weight', 'lm_head.weight'):
            assert torch.equal(w[:257], own[name][:257]) and not w[257:].any()
        else:
            assert torch.equal(w, own[name]) if name in own else name.endswith('bias') and not w.any()
    idx = torch.randint(257, (2, shape[0]))
    assert torch.equal(back.logits(back(idx)), gpt.logits(gpt(idx))) or not bias


def test_other_layouts_are_read_as_well(tmp_path):
    """Names without prefix and with masks, as in the Hub's gpt2; half precision; shards; pytorch_model.bin."""
    gpt = a_gpt()
    out = exported(tmp_path / 'out', gpt)
    sound, config = read_safetensors(out / 'model.safetensors'), (out / 'config.json').read_bytes()

    def copy(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_bytes(config)
        return tmp_path / name

    bare = {name.removeprefix('transformer.'): w for name, w in sound.items()}
    masks = {'h.0.attn.bias': torch.ones(1, 1, 48, 48), 'h.0.attn.masked_bias': torch.tensor([-1e4])}
    write_safetensors(copy('bare') / 'model.safetensors', {**bare, **masks})
    masks['h.0.attn.bias'] = masks['h.0.attn.bias'].byte()
    torch.save({**bare, **masks}, copy('bin') / 'pytorch_model.bin')
    shards, names = copy('shards'), sorted(sound)
    for i, part in enumerate((names[:5], names[5:])):
        write_safetensors(shards / f'model-{i}.safetensors', {name: sound[name] for name in part})
    index = dict(weight_map={name: f'model-{int(i >= 5)}.safetensors' for i, name in enumerate(names)})
    (shards / 'model.safetensors.index.json').write_text(json.dumps(index))
    wanted = start_from(out)['model']
    for where in ('bare', 'bin', 'shards'):
        given = start_from(tmp_path / where)['model']
        assert given.keys() == wanted.keys() and all(torch.equal(w, wanted[name]) for name, w in given.items())
    for dtype in (torch.float16, torch.bfloat16):
        half = copy(str(dtype))
        torch.save({name: w.to(dtype) for name, w in sound.items()}, half / 'pytorch_model.bin')
        for name, w in start_from(half)['model'].items():
            assert w.dtype == torch.float32 and torch.equal(w, wanted[name].to(dtype).float())


def test_a_cropped_start_says_the_same(tmp_path):
    gpt = a_gpt()
    out = exported(tmp_path / 'out', gpt)
    short = answers.make_gpt(start_from(out, 20))
    idx = torch.randint(257, (3, 20))
    assert short.config.block_size == 20 and torch.equal(short(idx), gpt(idx))
    assert start_from(out, 48)['model_config']['block_size'] == 48
    with pytest.raises(Refusal, match='block_size=49 is more than the 48 positions .* use --block_size=48 or less'):
        start_from(out, 49)


def test_a_scalar_head_leaves_beside_its_trunk(tmp_path, capsys):
    """A reward run: the trunk is the model; weight, offset and h give the reward."""
    sample.main(sample.Config(out_dir='reward', export_hf=str(tmp_path / 'out')))
    assert f'wrote {tmp_path}/out: reward, best checkpoint' in capsys.readouterr().out
    scorer, head = answers.make_scorer(load_checkpoint('reward', 'best.pt')), read_safetensors(
        tmp_path / 'out' / 'scalar_head.safetensors')
    trunk = answers.make_gpt(start_from(tmp_path / 'out'))
    idx = torch.randint(257, (1, 30))
    scalar, offset, _ = scorer(idx)
    assert head.keys() == {'weight', 'offset'} and head['weight'].any()
    assert torch.allclose(trunk(idx)[0] @ head['weight'][0] + head['offset'][0], scalar[0] + offset)


@pytest.mark.parametrize('read', ['sum', 'last'])
def test_the_card_of_a_reward_run_says_how_a_reward_is_read(tmp_path, read):
    """Its own last line, on hidden states of the trunk, gives what the run gave."""
    run, _ = test_preference.a_run(tmp_path, 'reward', reward_read=read)
    state = load_checkpoint('reward', 'best.pt')
    state = dict(state, config=dict(state['config'], reward_read=read))
    export(state, 'reward', tmp_path / 'out')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'text-classification' in card and 'generate' not in card and "head = load_file('out/scalar_head" in card
    trunk, head = answers.make_gpt(start_from(tmp_path / 'out')), read_safetensors(
        tmp_path / 'out' / 'scalar_head.safetensors')
    groups = prepare_shp.pick_groups(run.groups['train'], 0, 0, 4)
    rewards = answers.rewards(run, answers.make_scorer(state), answers.group_batch(groups, 80))
    for group, of_group in zip(groups, rewards):
        for answer, reward in zip(group.answers, of_group.tolist()):
            scope = dict(h=trunk(torch.tensor([group.prompt + answer]))[0], w=head['weight'][0], head=head,
                         prompt_length=len(group.prompt))
            exec(re.search('^reward = .*$', card, re.MULTILINE)[0], scope)
            assert scope['reward'].item() == pytest.approx(reward, abs=1e-4)


def test_a_critic_leaves_beside_its_policy(tmp_path):
    policy, critic = a_gpt(), ScalarHead(a_gpt(SHAPES[1], seed=1))
    torch.nn.init.normal_(critic.head.weight)
    out = exported(tmp_path / 'out', policy, critic=critic.state_dict(), critic_config=asdict(critic.config))
    back, idx = answers.make_gpt(start_from(out / 'critic')), torch.randint(257, (1, 30))
    head = read_safetensors(out / 'critic' / 'scalar_head.safetensors')
    assert torch.equal(answers.make_gpt(start_from(out))(idx), policy(idx))
    assert torch.allclose(back(idx) @ head['weight'][0] + head['offset'], critic(idx)[0] + critic.offset)
    assert not (out / 'scalar_head.safetensors').exists() and "subfolder='critic'" in (out / 'README.md').read_text()


def test_the_card_tells_the_run_and_how_to_ask(tmp_path):
    sample.main(sample.Config(out_dir='start', checkpoint='last', export_hf=str(tmp_path / 'out')))
    card = (tmp_path / 'out' / 'README.md').read_text()
    last = test_train.metrics('start', 'eval')[-1]
    assert f'"val_ce": {last["val_ce"]}' in card and 'pipeline_tag: text-generation' in card and '"cut": "examples"' in card and 'at step 40' in card
    assert "prompt = post.strip() + '\\nA:\\n'" in card and 'Taylor loss' not in card and 'without biases' not in card
    export(state_of(a_gpt(bias=False), config=dict(taylor_order=2)), 'no_run', tmp_path / 'other')
    card = (tmp_path / 'other' / 'README.md').read_text()
    assert 'Taylor loss T_2' in card and 'without biases' in card and 'Last evaluation' not in card


def test_the_card_tells_the_evaluation_of_its_own_step(tmp_path):
    lines = [dict(event='eval', step=step, val_ce=step / 100) for step in (0, 40, 80)]
    text = [json.dumps(line) for line in lines]
    text.insert(1, text[1][:9])  # damaged
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(text) + '\n')
    assert [huggingface.last_evaluation(tmp_path, step) for step in (0, 39, 40, 100)] == [
        lines[0], lines[0], lines[1], lines[2]]
    assert huggingface.last_evaluation(tmp_path / 'nowhere', 40) == {}


def test_it_samples_as_sample_py_does(tmp_path):
    told = json.loads((exported(tmp_path / 'out', a_gpt()) / 'generation_config.json').read_text())
    ours = sample.Config(prompt='x')
    assert told['do_sample'] and {key: told[key] for key in ('temperature', 'top_k')} == dict(
        temperature=ours.temperature, top_k=ours.top_k) and told['top_p'] == 1.0


def test_what_a_killed_export_left_is_cleared(tmp_path):
    process = subprocess.Popen(['true'])
    process.wait()
    (tmp_path / f'.out.tmp-{process.pid}').mkdir()
    exported(tmp_path / 'out', a_gpt())
    assert [path.name for path in tmp_path.iterdir()] == ['out']


# Runs that start from elsewhere -------------------------------------------------------------------------------------


STILL = dict(learning_rate=0.0, min_lr=0.0, weight_decay=0.0, max_iters=1)  # a run that changes no weight


def train_config(out, **changes):
    return test_train.config(out, **{**dict(init_from='foreign', block_size=32), **changes})


@pytest.fixture(scope='module')
def foreign(folder):
    return exported(folder / 'foreign', a_gpt((80, 2, 4, 32)))


def test_training_starts_from_it_and_resumes_without_it(tmp_path, foreign, capsys, monkeypatch):
    train.main(train_config(tmp_path / 'whole', dropout=0.1, **STILL))
    assert 'start foreign, whose shape holds, whatever the options say: n_layer=2, n_head=4' in capsys.readouterr().out
    state = load_checkpoint(tmp_path / 'whole')
    assert state['model_config'] == asdict(GPTConfig(257, 32, 2, 4, 32, dropout=0.1))
    assert state['config']['n_layer'] == 2 and state['config']['init_from'] == 'foreign'
    assert all(torch.equal(w, state['model'][name]) for name, w in start_from(foreign, 32)['model'].items())
    train.main(train_config(tmp_path / 'whole', overwrite=True))
    train.main(train_config(tmp_path / 'cut', stop_step=5))
    with monkeypatch.context() as patch:  # the start may be gone by then
        patch.setattr(train, 'open_start', None)
        train.main(train_config(tmp_path / 'cut', resume=True))
        assert 'resumed at step 5 (exact)' in capsys.readouterr().out
        with pytest.raises(Refusal, match='another model: block_size: 32 there, 16 here'):
            train.main(train_config(tmp_path / 'cut', resume=True, block_size=16))
        with pytest.raises(Refusal, match='init_from foreign there, none here'):
            train.main(train_config(tmp_path / 'cut', resume=True, init_from='', n_layer=2, n_head=4, n_embd=32))
        with pytest.raises(Refusal, match='init_from foreign there, start here'):
            train.main(train_config(tmp_path / 'cut', resume=True, init_from='start'))
    test_train.assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_training_starts_from_a_run_of_ours(tmp_path, capsys):
    train.main(train_config(tmp_path / 'run', init_from='start', **STILL))
    state, start = load_checkpoint(tmp_path / 'run'), load_checkpoint('start', 'best.pt')
    assert state['model_config'] == dict(start['model_config'], block_size=32, dropout=0.0)
    assert torch.equal(state['model']['transformer.wpe.weight'], start['model']['transformer.wpe.weight'][:32])
    before = sorted(path.name for path in Path('start').iterdir())
    for where in ('start', 'start/best.pt'):
        with pytest.raises(Refusal, match='init_from and out_dir are both start'):
            train.main(train_config('start', init_from=where, overwrite=True))
    with pytest.raises(Refusal, match='reward is a reward run and has no policy'):
        train.main(train_config(tmp_path / 'run', init_from='reward', overwrite=True))
    with pytest.raises(Refusal, match='block_size=100 is more than the 80 positions that start has learned'):
        train.main(train_config(tmp_path / 'run', init_from='start', block_size=100, overwrite=True))
    assert before == sorted(path.name for path in Path('start').iterdir()) and list((tmp_path / 'run').glob('ckpt_*'))


def test_a_checkpoint_from_before_init_from_is_resumed(tmp_path, capsys):
    train.main(test_train.config(tmp_path / 'run', stop_step=5))
    state = load_checkpoint(tmp_path / 'run')
    del state['config']['init_from']
    save_checkpoint(tmp_path / 'run', state)
    train.main(test_train.config(tmp_path / 'run', resume=True))
    assert 'resumed at step 5 (exact)' in capsys.readouterr().out


def test_preferences_start_from_it_cropped(tmp_path, foreign, capsys):
    changes = dict(init_from='foreign', block_size=60, iterations=2, max_new_tokens=20)
    preference.main(test_preference.config(tmp_path / 'whole', 'spin', **changes))
    assert load_checkpoint(tmp_path / 'whole')['model_config']['block_size'] == 60
    start = start_from(foreign, 60)['model']
    kept = load_checkpoint(tmp_path / 'whole' / 'selves' / '0000.pt')['model']
    assert all(torch.equal(w, start[name]) for name, w in kept.items())
    preference.main(test_preference.config(tmp_path / 'cut', 'spin', stop_step=3, **changes))
    with pytest.raises(Refusal, match='another model: block_size: 60 there, 50 here'):
        preference.main(test_preference.config(tmp_path / 'cut', 'spin', resume=True, **dict(changes, block_size=50)))
    preference.main(test_preference.config(tmp_path / 'cut', 'spin', resume=True, **changes))
    test_preference.assert_same_run(tmp_path / 'whole', tmp_path / 'cut')


def test_names_are_fetched_or_refused(tmp_path, monkeypatch):
    """By huggingface_hub, of which nothing but these two files is asked."""
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository != 'gpt2-large':
            raise ConnectionError('no network')
        return str(exported(tmp_path / 'cache'))

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    with pytest.raises(Refusal, match='gpt2-medium could not be had from the Hub .ConnectionError.: is there a netw'):
        start_from('gpt2-medium')
    assert start_from('gpt2-large', 20)['model_config']['block_size'] == 20
    assert asked[-2:] == [(name, ['config.json', 'model.safetensors']) for name in ('openai-community/gpt2-large',
                                                                                   'gpt2-large')]


# Refusals -----------------------------------------------------------------------------------------------------------


def with_config(**changes):
    def change(out):
        config = json.loads((out / 'config.json').read_text())
        (out / 'config.json').write_text(json.dumps({**config, **changes}))
    return change


def with_weights(change_weights):
    def change(out):
        weights = read_safetensors(out / 'model.safetensors')
        change_weights(weights)
        (out / 'model.safetensors').unlink()
        torch.save(weights, out / 'pytorch_model.bin')
    return change


def with_file(name, content):
    def change(out):
        (out / 'model.safetensors').unlink()
        (out / name).write_text(content)
    return change


def of_300_tokens(out):
    with_config(vocab_size=300)(out)
    with_weights(lambda w: w.update({WTE: torch.ones(300, 16)}))(out)


def swapped_tokens(out):
    tokenizer = json.loads((out / 'tokenizer.json').read_text())
    vocabulary = tokenizer['model']['vocab']
    vocabulary['a'], vocabulary['b'] = vocabulary['b'], vocabulary['a']
    (out / 'tokenizer.json').write_text(json.dumps(tokenizer))


WTE, FC = 'transformer.wte.weight', 'transformer.h.0.mlp.c_fc.weight'


@pytest.mark.parametrize('change, words', [
    (with_config(model_type='llama'), "our GPT cannot express model_type='llama'"),
    (with_config(activation_function='relu'), "cannot express activation_function='relu' .* only 'gelu_new'"),
    (with_config(layer_norm_epsilon=1e-6), 'cannot express layer_norm_epsilon=1e-06'),
    (with_config(scale_attn_weights=False), 'cannot express scale_attn_weights=False'),
    (with_config(scale_attn_by_inverse_layer_idx=True), 'cannot express scale_attn_by_inverse_layer_idx=True'),
    (with_config(add_cross_attention=True), 'cannot express add_cross_attention=True'),
    (with_config(n_inner=32), 'cannot express n_inner=32'),
    (with_config(n_layer=0), 'n_layer=0 of its config.json is no number'),
    (with_config(n_embd='16'), 'n_embd=16 of its config.json is no number'),
    (with_config(n_layer=10 ** 6), 'holds 16 weights, too few for n_layer=1000000'),
    (with_config(n_layer=2), r'lacks transformer.h.1.attn.c_attn.bias, .*, \.\.\.; only GPT2LMHeadModel'),
    (with_config(n_head=3), 'n_embd=16 does not divide by n_head=3'),
    (with_config(n_positions=40), r'wpe.weight is of shape \(48, 16\), and config.json makes it \(40, 16\)'),
    (with_config(n_embd=32), r'of shape \(.*16.*\), and config.json makes it'),
    (with_config(tie_word_embeddings=False), 'lacks lm_head.weight;'),
    (with_config(vocab_size=50257), r'wte.weight is of shape \(257, 16\), and config.json makes it \(50257, 16\)'),
    (of_300_tokens, 'init_from=.*out speaks a vocabulary of 300 tokens, but the data are in bytes'),
    (with_weights(lambda w: w.pop(FC)), f'lacks {FC};'),
    (with_weights(lambda w: w.update({'score.weight': torch.ones(2)})), 'holds, beyond a GPT-2, transformer.score.w'),
    (with_weights(lambda w: w.update({'wte.weight': w[WTE]})), 'holds wte.weight twice'),
    (with_weights(lambda w: w.update({'lm_head.weight': w[WTE] + 1})), 'has a lm_head.weight of its own'),
    (with_weights(lambda w: w.update({FC: w[FC].T})), rf'{FC} is of shape \(64, 16\)'),
    (with_weights(lambda w: w.update({FC: w[FC].double()})), f'{FC} is of torch.float64; save the model in float32'),
    (with_weights(lambda w: w[FC].fill_(math.nan)), f'{FC} holds numbers that are not finite'),
    (with_weights(lambda w: w.update({3: 'x'})), 'does not hold named weights'),
    (with_file('pytorch_model.bin', 'junk'), 'pytorch_model.bin cannot be read safely'),
    (with_file('other', ''), 'has no weights, none of model.safetensors'),
    (with_file('model.safetensors', 'junk'), 'is no sound safetensors file'),
    (with_file('model.safetensors.index.json', '[]'), 'is no JSON object'),
    (with_file('model.safetensors.index.json', '{}'), 'does not map names of weights to files beside it'),
    (with_file('model.safetensors.index.json', '{"weight_map": {"a": "../model.safetensors"}}'), 'does not map names'),
    (with_file('model.safetensors.index.json', '{"weight_map": {"a": "b.safetensors"}}'), 'cannot be read .No such'),
    (lambda out: (out / 'config.json').write_text('{'), 'config.json is no JSON object'),
    (lambda out: (out / 'config.json').unlink(), 'config.json cannot be read .No such file'),
    (swapped_tokens, "the tokenizer in .* is not the data's, bytes: it does not have 'a' as 97")])
def test_what_is_no_start_is_refused_by_name(tmp_path, change, words):
    out = exported(tmp_path / 'out')
    change(out)
    with pytest.raises(Refusal, match=words):
        start_from(out)


def test_a_start_of_other_words_is_refused(tmp_path):
    out = exported(tmp_path / 'out')
    with pytest.raises(Refusal, match='init_from=.*out speaks bytes, but the data are in gpt2'):
        start_from(out, encoding=types.SimpleNamespace(name='gpt2', n_vocab=50257))


def test_a_shard_must_hold_what_the_index_says(tmp_path):
    out = exported(tmp_path / 'out')
    (out / 'model.safetensors').rename(out / 'a.safetensors')
    (out / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map={WTE: 'a.safetensors'})))
    with pytest.raises(Refusal, match='a.safetensors does not hold what model.safetensors.index.json says'):
        start_from(out)


def test_an_export_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / 'out').mkdir()
    with pytest.raises(Refusal, match='out exists; name a new folder'):
        exported(tmp_path / 'out')
    monkeypatch.setattr(huggingface, 'write_tokenizer', lambda *_: (tmp_path / 'missing' / 'x').write_text(''))
    with pytest.raises(Refusal, match='could not be written .No such file'):
        exported(tmp_path / 'other')
    for change in (dict(encoding='bites'), dict(encoding='gpt2'), dict(encoding=[])):
        with pytest.raises(Refusal, match='holds no model with its encoding'):
            exported(tmp_path / 'other', **change)
    assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('options', [{}, dict(prompt='x', export_hf='y'), dict(prompt='x', prompt_file='y')])
def test_a_prompt_or_a_folder(options):
    assert 'one of the three' in list(sample.Config(**options).check())[0]


# safetensors --------------------------------------------------------------------------------------------------------


TENSORS = dict(a=torch.arange(6.0).view(2, 3), b=torch.tensor(7.0), c=torch.randn(5), d=torch.ones(1, 2, 3))


def raw(header, numbers=b'', length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header) if length is None else length) + header + numbers


def entry(dtype='F32', shape=(2,), offsets=(0, 8)):
    return dict(dtype=dtype, shape=shape, data_offsets=offsets)


@pytest.mark.parametrize('content', [
    b'', b'1234567', raw(b'', length=2 ** 63), raw({}, length=10 ** 9), raw(b'[]'), raw(b'{"a": 1}'),
    raw(b'[' * 10 ** 5), raw(b'\xff\xff'), raw(dict(a=entry()), b'8' * 7), raw(dict(a=entry()), b'8' * 9),
    raw(dict(a=entry('F33')), b'8' * 8), raw(dict(a=entry(['F32'])), b'8' * 8),
    raw(dict(a=entry(shape=[-2])), b'8' * 8), raw(dict(a=entry(shape=[2.0])), b'8' * 8),
    raw(dict(a=entry(shape=[True, 2])), b'8' * 8), raw(dict(a=entry(offsets=[0])), b'8' * 8),
    raw(dict(a=entry(offsets=[8, 16])), b'8' * 16), raw(dict(a=entry(), b=entry()), b'8' * 8),
    raw(dict(a=entry(), b=entry(offsets=[4, 12])), b'8' * 12), raw(dict(a=entry(shape=[10 ** 30])), b'8' * 8),
    raw(dict(a=entry(shape=[2 ** 62, 8])), b'8' * 8), raw(dict(a=entry(), __metadata__=dict(nanotaylor_sha256='0')), b'8' * 8),
    raw(dict(a=entry(), __metadata__=[]), b'8' * 8), raw(dict(a=entry('F8_E4M3', [8], [0, 8])), b'8' * 8)])
def test_hostile_files_are_refused(tmp_path, content):
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(Refusal, match='x.safetensors is no sound safetensors file'):
        read_safetensors(tmp_path / 'x.safetensors')


def test_a_small_file_byte_by_byte(tmp_path):
    header = dict(b=entry('BF16', [1], [8, 10]), a=entry(), __metadata__=dict(format='pt'))
    (tmp_path / 'x').write_bytes(raw(header, struct.pack('<ffH', 1.5, -2.0, 0x3fc0)))
    read = read_safetensors(tmp_path / 'x')
    assert read['a'].tolist() == [1.5, -2.0] and read['b'].tolist() == [1.5] and read['b'].dtype == torch.bfloat16


@given(st.binary(max_size=20), st.randoms(use_true_random=False))
def test_bytes_changed_anywhere(junk, rng):
    """What was written or a sentence: the sha256 covers names, shapes and numbers."""
    write_safetensors('whole.safetensors', TENSORS)
    whole = Path('whole.safetensors').read_bytes()
    place = rng.randrange(len(whole))
    Path('changed.safetensors').write_bytes(whole[:place] + junk + whole[place + rng.choice([len(junk), 0, 1, 7]):])
    try:
        read = read_safetensors('changed.safetensors')
    except Refusal as refusal:
        assert 'changed.safetensors is no sound' in str(refusal)
        return
    assert read.keys() == TENSORS.keys() and all(torch.equal(w, TENSORS[name]) for name, w in read.items())


# Tokenizers ---------------------------------------------------------------------------------------------------------


def slow_bpe(folder, words):
    """The ids of words by vocab.json and merges.txt as GPT-2 defines them: join the earliest pair, wherever it is."""
    vocabulary = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
    lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')[1:-1]
    order = {tuple(line.split(' ')): i for i, line in enumerate(lines)}
    letters = huggingface.byte_letters()
    for word in words:
        parts = [letters[b] for b in word.encode()]
        while True:
            pairs = [pair for pair in zip(parts, parts[1:]) if pair in order]
            if not pairs:
                break
            a, b = min(pairs, key=order.get)
            i = 0
            while i < len(parts) - 1:
                if parts[i:i + 2] == [a, b]:
                    parts[i:i + 2] = [a + b]
                i += 1
        yield [vocabulary[part] for part in parts]


WORDS = ['Rusty', ' kettle', '\n', 'A', ':', ' antidisestablishmentarianism', '\u00e9t\u00e9', ' \U0001f600', '1234567',
         ' ........', '    ', "'ll", '-' * 70, '\u4e2d\u6587', ' supercalifragilistic', 'x' * 30, '\u00a0', '\x00']


def test_bytes_leave_as_bytes(tmp_path):
    out = exported(tmp_path / 'out')
    assert list(slow_bpe(out, WORDS)) == [BYTES.encode_ordinary(word) for word in WORDS]
    assert (out / 'merges.txt').read_text() == '#version: 0.2\n' and json.loads((out / 'vocab.json').read_text())[
        '<|endoftext|>'] == 256
    tokenizer = json.loads((out / 'tokenizer.json').read_text())
    assert len(tokenizer['model']['vocab']) == 257 and tokenizer['added_tokens'][0]['id'] == 256
    assert json.loads((out / 'tokenizer_config.json').read_text())['model_max_length'] == 48


def test_merges_are_recovered(tmp_path):
    """A byte-pair encoding, learned here: of the pairs that made its tokens tiktoken keeps only the order."""
    text = ' '.join(row['history'] + row['human_ref_A'] for row in toy_rows('train', 40, 0)).encode()
    words = Counter(re.findall(rb' ?[^ ]+', text))
    parts, made = {word: [word[i:i + 1] for i in range(len(word))] for word in words}, []
    for _ in range(300):
        counts = Counter()
        for word, n in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                counts[pair] += n
        made.append(max(counts, key=lambda pair: (counts[pair], pair)))
        for of_word in parts.values():
            i = 0
            while i < len(of_word) - 1:
                if tuple(of_word[i:i + 2]) == made[-1]:
                    of_word[i:i + 2] = [b''.join(made[-1])]
                i += 1
    ranks = {bytes([b]): b for b in range(256)} | {b''.join(pair): 256 + i for i, pair in enumerate(made)}
    learned = tiktoken.Encoding('learned', pat_str=r' ?[^ ]+| +', mergeable_ranks=ranks,
                                special_tokens={prepare_shp.END_OF_TEXT: len(ranks)})
    assert [tuple(pair) for pair in huggingface.merges(learned)] == made
    huggingface.write_tokenizer(tmp_path, learned, 64)
    some = WORDS + [word.decode() for word in words]
    for word, ids in zip(some, slow_bpe(tmp_path, some)):
        assert ids == learned._encode_single_piece(word), word


# The real thing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('bias, tie_weights', KINDS)
def test_transformers_reads_what_we_write(tmp_path, bias, tie_weights):
    transformers = pytest.importorskip('transformers')
    gpt = a_gpt(SHAPES[1], bias, tie_weights)
    out = exported(tmp_path / 'out', gpt)
    lm = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    idx = torch.randint(257, (2, 80))
    with torch.no_grad():
        assert (lm.eval()(idx).logits - gpt.logits(gpt(idx))[..., :257]).abs().max() < 1e-5
    text = prepare_shp.render(' '.join(WORDS), 'answer')[0]
    assert tokenizer(text)['input_ids'] == BYTES.encode_ordinary(text) and tokenizer.eos_token_id == 256
    assert tokenizer.decode(BYTES.encode_ordinary(text)) == text
    prompt = torch.tensor([BYTES.encode_ordinary('Rusty kettle?\nA:\n')])
    greedy = lm.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1]:].tolist()
    assert greedy == gpt.generate(prompt.tolist(), 20, temperature=0.0, eot=256)[0]


@pytest.mark.parametrize('shape, tie, dtype, shard', [
    (SHAPES[0], True, torch.float32, '5GB'), (SHAPES[1], True, torch.float32, '50KB'),
    (SHAPES[2], False, torch.float32, '5GB'), (SHAPES[1], True, torch.bfloat16, '5GB')])
def test_we_read_what_transformers_writes(tmp_path, shape, tie, dtype, shard):
    transformers, safetensors = pytest.importorskip('transformers'), pytest.importorskip('safetensors.torch')
    torch.manual_seed(0)
    sizes = dict(zip(('n_positions', 'n_layer', 'n_head', 'n_embd'), shape))
    lm = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=257, tie_word_embeddings=tie, **sizes)).eval()
    for p in lm.parameters():
        p.data += 0.1 * torch.randn_like(p)
    lm.to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    gpt, idx = answers.make_gpt(start_from(tmp_path)), torch.randint(257, (2, shape[0]))
    with torch.no_grad():
        assert (lm.float()(idx).logits - gpt.logits(gpt(idx))[..., :257]).abs().max() < 1e-5
    for path in tmp_path.glob('*.safetensors'):
        theirs, ours = safetensors.load_file(path), read_safetensors(path)
        assert theirs.keys() == ours.keys() and all(torch.equal(w, ours[name]) for name, w in theirs.items())
    write_safetensors(tmp_path / 'ours', TENSORS)
    theirs = safetensors.load_file(tmp_path / 'ours')
    assert theirs.keys() == TENSORS.keys() and all(torch.equal(w, TENSORS[name]) for name, w in theirs.items())
