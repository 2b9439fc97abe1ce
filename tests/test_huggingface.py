"""In and out of Hugging Face: exported files against GPT-2's definition, round trips, tokenizers, refusals.

Where transformers is installed, against it too.
"""
import json
import math
import re
from dataclasses import asdict

import pytest
import tiktoken
import tiktoken_ext.openai_public
import torch

import answers
import model
import prepare_shp
import runs
import sample
import test_preference
import test_train
import train
from configurator import Refusal
from conftest import assert_same_run, metrics
from model import GPT, GPTConfig, ScalarHead
from runs import load_checkpoint, open_start

safetensors = pytest.importorskip('safetensors.torch')
from extras import huggingface  # noqa: E402, which needs it

pytestmark = pytest.mark.usefixtures('work')
BYTES = prepare_shp.encoding('bytes')
SHAPES = [(48, 1, 2, 16), (80, 3, 4, 32), (9, 2, 1, 24)]  # block_size, n_layer, n_head, n_embd
TEXT = ("Rusty kettle?  \n\n antidisestablishmentarianism \u00e9t\u00e9 \U0001f600 1234567 ...... it'll "
        '----- \u4e2d\u6587 xxxxxxxxxx \u00a0\x00\nA:\n')
WTE, FC = 'transformer.wte.weight', 'transformer.h.0.mlp.c_fc.weight'


def a_gpt(shape=SHAPES[0], bias=True, tie_weights=True, seed=0):
    """Every weight away from its start, so that none can be left out or mistaken for another."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(257, *shape, bias=bias, tie_weights=tie_weights)).eval()
    for p in gpt.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return gpt


def state_of(gpt, **more):
    state = dict(step=3, model=gpt.state_dict(), model_config=asdict(gpt.config), encoding='bytes', config={})
    return {**state, **more}


def exported(path, gpt=None, **more):
    huggingface.export(state_of(gpt or a_gpt(), **more), 'no_run', path)
    return path


def start_from(path, block_size=0):
    return open_start(train.Config(init_from=str(path), block_size=block_size), BYTES)


# Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape, bias, tie_weights', [(SHAPES[1], True, True), (SHAPES[2], False, False)])
def test_what_is_exported_is_gpt2_and_returns_bit_equal(tmp_path, shape, bias, tie_weights):
    """Over the real vocabulary; padding comes back as 0, and a model without biases with biases of 0."""
    gpt, idx = a_gpt(shape, bias, tie_weights), torch.randint(257, (1, shape[0]))
    out = exported(tmp_path / 'out', gpt)
    start, own = start_from(out), gpt.state_dict()
    assert start['encoding'] == 'bytes' and start['model_config'] == dict(asdict(gpt.config), bias=True)
    back = answers.make_gpt(start)
    for name, w in back.state_dict().items():
        if name in (WTE, 'lm_head.weight'):
            assert torch.equal(w[:257], own[name][:257]) and not w[257:].any()
        else:
            assert torch.equal(w, own[name]) if name in own else name.endswith('bias') and not w.any()
    assert torch.equal(back.logits(back(idx)), gpt.logits(gpt(idx))) or not bias
    weights = {name: w.double() for name, w in safetensors.load_file(out / 'model.safetensors').items()}
    defined = huggingface.gpt2_logits(weights, gpt.config, idx[0])
    assert torch.allclose(defined, gpt.double().logits(gpt(idx))[0, :, :257], rtol=0, atol=1e-10)
    assert ('lm_head.weight' in weights) == (not tie_weights) and weights[WTE].shape[0] == 257


def test_other_layouts_are_read_as_well(tmp_path):
    """Names without prefix and with masks, as in the Hub's gpt2; half precision; shards; pytorch_model.bin."""
    out = exported(tmp_path / 'out')
    sound, wanted = safetensors.load_file(out / 'model.safetensors'), start_from(out)['model']

    def folder_with(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_bytes((out / 'config.json').read_bytes())
        return tmp_path / name

    bare = {name.removeprefix('transformer.'): w for name, w in sound.items()}
    masks = {'h.0.attn.bias': torch.ones(1, 1, 48, 48), 'h.0.attn.masked_bias': torch.tensor([-1e4])}
    safetensors.save_file({**bare, **masks}, folder_with('bare') / 'model.safetensors')
    shards, names = folder_with('shards'), sorted(sound)
    for i, part in enumerate((names[:5], names[5:])):
        safetensors.save_file({name: sound[name] for name in part}, shards / f'model-{i}.safetensors')
    index = dict(weight_map={name: f'model-{int(i >= 5)}.safetensors' for i, name in enumerate(names)})
    (shards / 'model.safetensors.index.json').write_text(json.dumps(index))
    torch.save({name: w.half() for name, w in sound.items()}, folder_with('half') / 'pytorch_model.bin')
    for where in ('bare', 'shards', 'half'):
        given = start_from(tmp_path / where)['model']
        assert given.keys() == wanted.keys()
        for name, w in given.items():
            assert w.dtype == torch.float32
            assert torch.equal(w, wanted[name].half().float() if where == 'half' else wanted[name])


@pytest.mark.parametrize('read', ['sum', 'last'])
def test_the_card_of_a_reward_run_says_how_a_reward_is_read(tmp_path, read):
    """Its own last line, on hidden states of the trunk, gives what the run gave."""
    run, _ = test_preference.a_run(tmp_path, 'reward', reward_read=read)
    state = load_checkpoint('reward', 'best.pt')
    state = dict(state, config=dict(state['config'], reward_read=read))
    huggingface.export(state, 'reward', tmp_path / 'out')
    card = (tmp_path / 'out' / 'README.md').read_text()
    assert 'text-classification' in card and 'generate' not in card and "load_file('out/scalar_head" in card
    trunk, head = answers.make_gpt(start_from(tmp_path / 'out')), safetensors.load_file(
        tmp_path / 'out' / 'scalar_head.safetensors')
    groups = prepare_shp.pick_groups(run.groups['train'], 0, 0, 4)
    rewards = answers.rewards(run, answers.make_scorer(state), answers.make_batch(groups))
    for group, of_group in zip(groups, rewards):
        for answer, reward in zip(group.answers, of_group.tolist()):
            scope = dict(h=trunk(torch.tensor([group.prompt + answer]))[0], head=head, prompt_length=len(group.prompt))
            exec(re.search('^reward = .*$', card, re.MULTILINE)[0], scope)
            assert scope['reward'].item() == pytest.approx(reward, abs=1e-4)


def test_a_critic_leaves_beside_its_policy(tmp_path):
    policy, critic = a_gpt(), ScalarHead(a_gpt(SHAPES[1], seed=1))
    torch.nn.init.normal_(critic.head.weight)
    out = exported(tmp_path / 'out', policy, critic=critic.state_dict(), critic_config=asdict(critic.config))
    back, idx = answers.make_gpt(start_from(out / 'critic')), torch.randint(257, (1, 30))
    head = safetensors.load_file(out / 'critic' / 'scalar_head.safetensors')
    assert torch.equal(answers.make_gpt(start_from(out))(idx), policy(idx))
    assert torch.allclose(back(idx) @ head['weight'][0] + head['offset'], critic(idx)[0] + critic.offset)
    assert not (out / 'scalar_head.safetensors').exists() and "subfolder='critic'" in (out / 'README.md').read_text()


def test_the_card_tells_the_run_and_how_to_ask(tmp_path):
    sample.main(sample.Config(out_dir='start', checkpoint='last', export_hf=str(tmp_path / 'out')))
    card = (tmp_path / 'out' / 'README.md').read_text()
    for text in (f'"val_ce": {metrics("start", "eval")[-1]["val_ce"]}', '"cut": "examples"', 'at step 40',
                 "prompt = post.strip() + '\\nA:\\n'"):
        assert text in card
    options = json.loads((tmp_path / 'out' / 'generation_config.json').read_text())
    assert options | dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) == options  # as sample.py does


class Gated(model.Block):
    def __init__(self, config):
        super().__init__(config)
        self.gate = torch.nn.Parameter(torch.zeros(1))  # does nothing yet


@pytest.mark.parametrize('place, fork, words', [
    (model.GPT, dict(logits=lambda self, hidden: 0.1 * torch.tanh(10 * self.lm_head(hidden))), 'its logits on random'),
    (model, dict(Block=Gated), r'its weights \(transformer.h.0.gate\) differ')])
def test_a_forked_architecture_is_refused(tmp_path, monkeypatch, place, fork, words):
    for name, replacement in fork.items():
        monkeypatch.setattr(place, name, replacement)
    gpt = GPT(GPTConfig(257, *SHAPES[0], bias=False)).eval()  # as at the start of training
    scorer = state_of(gpt, reward_model=ScalarHead(gpt).state_dict())
    del scorer['model']
    for state in (state_of(gpt), scorer):
        with pytest.raises(Refusal, match=f'--export_hf writes GPT-2 only, and this model is not one: {words}'):
            huggingface.export(state, 'no_run', tmp_path / 'out')
    assert not list(tmp_path.iterdir())


# Runs that start from elsewhere -------------------------------------------------------------------------------------


def train_config(out, **changes):
    return test_train.config(out, **{**dict(init_from='foreign', block_size=32), **changes})


@pytest.fixture(scope='module')
def foreign(folder):
    return exported(folder / 'foreign', a_gpt((80, 2, 4, 32)))


def test_training_starts_from_it_and_resumes_without_it(tmp_path, foreign, monkeypatch):
    train.main(train_config(tmp_path / 'whole', dropout=0.1, learning_rate=0.0, min_lr=0.0, max_iters=1))
    state = load_checkpoint(tmp_path / 'whole')
    assert state['model_config'] == asdict(GPTConfig(257, 32, 2, 4, 32, dropout=0.1))
    for name, w in start_from(foreign)['model'].items():
        assert torch.equal(w[:32] if name == 'transformer.wpe.weight' else w, state['model'][name])
    train.main(train_config(tmp_path / 'whole', overwrite=True))
    train.main(train_config(tmp_path / 'cut', stop_step=5))
    monkeypatch.setattr(runs, 'open_start', None)  # the start may be gone by then
    train.main(train_config(tmp_path / 'cut', resume=True))
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut')
    with pytest.raises(Refusal, match='init_from is foreign in the checkpoint, start here'):
        train.main(train_config(tmp_path / 'cut', resume=True, init_from='start'))


def test_names_are_fetched_or_refused(tmp_path, monkeypatch):
    """By huggingface_hub, of which nothing but these two files is asked."""
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository != 'gpt2-large':
            raise ConnectionError('no network')
        return str(exported(tmp_path / 'cache'))

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    with pytest.raises(Refusal, match='block_size=49 is more than the 48 positions .* use --block_size=48 or less'):
        start_from(exported(tmp_path / 'out'), 49)
    with pytest.raises(Refusal, match='gpt2-medium could not be downloaded .ConnectionError: no network.*HF_HOME'):
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
        weights = safetensors.load_file(out / 'model.safetensors')
        change_weights(weights)
        (out / 'model.safetensors').unlink()
        torch.save(weights, out / 'pytorch_model.bin')
    return change


def swapped_tokens(out):
    text = (out / 'tokenizer.json').read_text()
    (out / 'tokenizer.json').write_text(text.replace('"a": 97', '"a": 98').replace('"b": 98', '"b": 97'))


@pytest.mark.parametrize('change, words', [
    (with_config(activation_function='relu'), "activation_function='relu' .* only 'gelu_new'"),
    (with_config(n_layer=2), 'lacks the weight transformer.h.1.attn.c_attn.bias; only GPT2LMHead'),
    (with_config(n_positions=40), r'wpe.weight has shape \(48, 16\), but config.json requires \(40, 16\)'),
    (with_weights(lambda w: w.update({'score.weight': torch.ones(2)})), 'has the additional weight transformer.sco'),
    (with_weights(lambda w: w.update({'lm_head.weight': w[WTE] + 1})), 'has a lm_head.weight of its own'),
    (with_weights(lambda w: w[FC].fill_(math.nan)), f'{FC} has values that are not finite'),
    (lambda out: (out / 'model.safetensors').write_text('junk'), 'model.safetensors cannot be read'),
    (lambda out: (out / 'config.json').write_text('{'), 'there is no checkpoint'),
    (swapped_tokens, "the tokenizer in .* is not the data's, bytes: 'a' is not its token 97")])
def test_what_is_no_start_is_refused_by_name(tmp_path, change, words):
    out = exported(tmp_path / 'out')
    change(out)
    with pytest.raises(Refusal, match=words):
        start_from(out)


def test_an_export_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    exported(tmp_path / 'out')
    with pytest.raises(Refusal, match='out exists; name a new folder'):
        exported(tmp_path / 'out')
    monkeypatch.setattr(huggingface, 'write_tokenizer', lambda *_: (tmp_path / 'missing' / 'x').write_text(''))
    with pytest.raises(Refusal, match='could not be written .*No such file'):
        exported(tmp_path / 'other')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_vocabulary_and_merges(tmp_path):
    """Of an encoding that is made of these pairs: tiktoken keeps only the order of the tokens."""
    text = 't h, th e, h e, _ the, x x, xx x, xx xx, b c, a b, a bc, bc bc, _ th, _ t, 1 2, 12 3'
    made = [[part.replace('_', ' ').encode() for part in pair.split()] for pair in text.split(', ')]
    ranks = {bytes([b]): b for b in range(256)} | {b''.join(pair): 256 + i for i, pair in enumerate(made)}
    encoding = tiktoken.Encoding('learned', pat_str=tiktoken_ext.openai_public.r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={prepare_shp.END_OF_TEXT: len(ranks)})
    huggingface.write_tokenizer(tmp_path, encoding, 64)
    written = json.loads((tmp_path / 'tokenizer.json').read_text(encoding='utf-8'))
    vocabulary, end = written['model']['vocab'], written['added_tokens'][0]
    assert (end['content'], end['id']) == (prepare_shp.END_OF_TEXT, 271) and len(vocabulary) == 272
    assert [vocabulary['a'], vocabulary['\u0120'], vocabulary['\u010a']] == [97, 32, 10]  # GPT-2's blank and newline
    assert [[vocabulary[part] for part in pair] for pair in written['model']['merges']] == [
        [encoding.encode_single_token(part) for part in pair] for pair in made]
    config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
    assert config['model_max_length'] == 64 and config['eos_token'] == prepare_shp.END_OF_TEXT


@pytest.mark.parametrize('bias, tie_weights', [(True, True), (False, False)])
def test_transformers_reads_what_we_write(tmp_path, bias, tie_weights):
    transformers = pytest.importorskip('transformers')
    gpt = a_gpt(SHAPES[1], bias, tie_weights)
    out = exported(tmp_path / 'out', gpt)
    lm = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    idx = torch.randint(257, (2, 80))
    with torch.no_grad():
        assert (lm.eval()(idx).logits - gpt.logits(gpt(idx))[..., :257]).abs().max() < 1e-5
    assert tokenizer(TEXT)['input_ids'] == BYTES.encode_ordinary(TEXT) and tokenizer.eos_token_id == 256
    assert tokenizer.decode(BYTES.encode_ordinary(TEXT)) == TEXT
    assert tokenizer(prepare_shp.END_OF_TEXT)['input_ids'] == [256]
    prompt = torch.tensor([BYTES.encode_ordinary('Rusty kettle?\nA:\n')])
    greedy = lm.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1]:].tolist()
    assert greedy == gpt.generate(prompt.tolist(), 20, temperature=0.0, eot=256)[0]
    assert (lm.generation_config.do_sample, lm.generation_config.top_k) == (True, 0)
