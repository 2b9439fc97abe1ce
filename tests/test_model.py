"""The transformer against itself, cached against uncached; checkpoints are whole or not there."""
import os
import pickle
import sys

import pytest
import torch

from configurator import Refusal
from extras import graphs
from model import GPT, GPTConfig, KVCache, sample_token
from runs import load_checkpoint, save_checkpoint

CONFIG = GPTConfig(vocab_size=61, block_size=32, n_layer=2, n_head=2, n_embd=16)


def small(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**CONFIG.__dict__, **changes})).eval()
    for p in model.parameters():  # far from the start, so that every part matters
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_forward_by_hand():
    """One layer written out in plain matrix algebra, as in the GPT-2 paper."""
    model, idx = small(n_layer=1, tie_weights=False).double(), torch.randint(61, (3, 7))
    t, block = model.transformer, model.transformer.h[0]
    x = t.wte.weight[idx] + t.wpe.weight[:7]

    def norm(x, ln):
        std = (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return (x - x.mean(-1, keepdim=True)) / std * ln.weight + ln.bias

    q, k, v = (norm(x, block.ln_1) @ block.attn.c_attn.weight.T + block.attn.c_attn.bias).split(16, -1)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        score = q[..., h] @ k[..., h].transpose(1, 2) / 8 ** .5
        heads.append(score.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).softmax(-1) @ v[..., h])
    x = x + torch.cat(heads, -1) @ block.attn.c_proj.weight.T + block.attn.c_proj.bias
    y = norm(x, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** .5 * (y + 0.044715 * y ** 3)))
    x = x + y @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias
    torch.testing.assert_close(model(idx), norm(x, t.ln_f))


def test_shapes_that_do_not_fit():
    assert CONFIG.padded_vocab_size == 64 and GPTConfig(50257, 8, 1, 1, 8).padded_vocab_size == 50304
    with pytest.raises(ValueError, match='n_embd=100 is not divisible by n_head=8; pick a multiple of 8'):
        GPTConfig(61, 8, 1, 8, 100)
    with pytest.raises(ValueError, match='33 tokens do not fit into block_size=32'):
        small()(torch.zeros(1, 33, dtype=torch.long))


def test_padding_has_probability_zero():
    model = small()
    model.transformer.wte.weight.data[61:] = 9.0
    hidden = model(torch.randint(61, (2, 5)))
    p = model.logits(hidden).softmax(-1)
    assert p[..., 61:].eq(0).all()
    torch.testing.assert_close(torch.cat(list(model.log_prob_chunks(hidden[0]))).exp(), p[0])


def test_cached_equals_uncached_for_ragged_rows():
    model = small()
    rows = [torch.randint(61, (n,)) for n in (3, 9, 5)]
    cache = KVCache(model.config, 3, 20, 'cpu', torch.float32)
    prompt = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = model(prompt, cache=cache)
    cache.length = torch.tensor([3, 9, 5])
    for b, row in enumerate(rows):
        torch.testing.assert_close(hidden[b, :len(row)], model(row[None])[0], rtol=1e-4, atol=1e-5)
    for token in torch.randint(61, (6, 3, 1)):
        hidden = model(token, cache=cache)[:, -1]
        rows = [torch.cat([row, t]) for row, t in zip(rows, token)]
        for b, row in enumerate(rows):
            torch.testing.assert_close(hidden[b], model(row[None])[0, -1], rtol=1e-4, atol=1e-5)


def slow_generate(model, prompt, max_new_tokens, uniform, eot, temperature=1.0, top_k=0):
    """One row, no cache: the definition of what generate returns."""
    answer = []
    while len(answer) < max_new_tokens and len(prompt) + len(answer) < model.config.block_size:
        logits = model.logits(model(torch.tensor([prompt + answer]))[:, -1])
        answer.append(sample_token(logits, uniform[len(answer)][None], temperature, top_k).item())
        if answer[-1] == eot:
            break
    return answer


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, {'top_k': 5}, {'temperature': 0.0}, {'temperature': 0.5}])
@pytest.mark.parametrize('look', [0, 16, 3])  # 0: the loop of model.py; else the step that CUDA graphs are made of
def test_generation_of_a_ragged_batch_equals_one_row_at_a_time(options, look, monkeypatch):
    monkeypatch.setattr(sys.modules['model'], 'GRAPHED', ('cpu',) if look else ())
    monkeypatch.setattr(graphs, 'LOOK', look)
    model, sizes, step = small(), [], graphs.Decoder.step
    monkeypatch.setattr(graphs.Decoder, 'step', lambda *args: (sizes.append(args[-1]), step(*args)))
    prompts = [torch.randint(61, (n,)).tolist() for n in (1, 4, 11, 28, 7, 31)]
    uniform = torch.rand(len(prompts), 25, generator=torch.Generator().manual_seed(3))
    answers = model.generate(prompts, 25, eot=7, uniform=uniform, **options)
    assert answers == [slow_generate(model, p, 25, u, 7, **options) for p, u in zip(prompts, uniform)]
    assert options or len({len(a) for a in answers}) > 2  # rows did end at different times
    if look:
        assert sizes[0] == 8 > sizes[-1] or options  # rows were dropped
        assert answers == model.generate(prompts, 25, eot=7, uniform=uniform, **options)  # in buffers already used


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_graphs_draw_what_the_loop_draws(monkeypatch):
    """But for a draw at the edge between two tokens, which rounding may move; the weights are those of the moment."""
    model, prompts = small(block_size=96).cuda(), [torch.randint(61, (n % 30 + 1,)).tolist() for n in range(64)]
    uniform = torch.rand(64, 60)
    for _ in range(2):
        answers = []
        for devices in ((), ('cuda',), ('cuda',)):
            monkeypatch.setattr(sys.modules['model'], 'GRAPHED', devices)
            answers.append(model.generate(prompts, 60, eot=7, uniform=uniform))
        assert sum(a != b for a, b in zip(*answers[:2])) <= 2 and answers[1] == answers[2]
        with torch.autocast('cuda', dtype=torch.bfloat16):
            assert sum(a[0] == b[0] for a, b in zip(answers[0], model.generate(prompts, 60, 1.0, 0, 7, uniform))) > 50
        with torch.no_grad():
            model.lm_head.weight.mul_(0.7)


def test_generation_is_seeded_streamed_and_refuses_what_cannot_be():
    model, seen = small().train(), []
    run = [model.generate([[1, 2], [3]], 8, uniform=torch.rand(2, 8, generator=torch.Generator().manual_seed(s)),
                          on_token=lambda b, id: seen.append((b, id))) for s in (0, 0, 1)]
    assert run[0] == run[1] != run[2] and model.training
    assert [[id for b, id in seen[:16] if b == row] for row in (0, 1)] == run[0]
    assert model.generate([], 5) == []
    for bad in ([], [1] * 32):
        with pytest.raises(ValueError, match='block_size=32 with room for an answer'):
            model.generate([[1], bad], 5)


def test_sampling_follows_the_distribution_and_never_leaves_it():
    logits = torch.randn(1, 300)  # more than one block of 64, one of them empty
    logits[:, 7] = logits[:, 64:128] = logits[:, 270:] = -torch.inf
    p = logits.softmax(-1)[0]
    ids = sample_token(logits.expand(200_000, -1), torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    frequency = ids.bincount(minlength=300) / 200_000
    assert frequency[p == 0].eq(0).all()
    chi_squared = (200_000 * (frequency - p) ** 2 / p).nan_to_num(0).sum()
    assert chi_squared < 310  # 204 degrees of freedom: beyond 310 once in 400,000
    edge = torch.tensor([0.0, 1 - 2 ** -24])
    one_id = torch.full((1, 200), -torch.inf).index_fill(1, torch.tensor([130]), 0.0)
    for extreme in (torch.tensor([[-torch.inf, 0.0, -torch.inf]]), torch.tensor([[-40.0, 0.0, -torch.inf]]), one_id):
        extreme = extreme.expand(2, -1)
        assert extreme.gather(1, sample_token(extreme, edge)[:, None]).isfinite().all()


def state(step):
    return dict(step=step, w=torch.full((2000,), float(step)))


def test_a_damaged_latest_checkpoint_is_passed_over(tmp_path, capsys):
    save_checkpoint(tmp_path, state(1))
    whole = save_checkpoint(tmp_path, state(2)).read_bytes()
    path = tmp_path / 'ckpt_00000002.pt'
    for damaged in (b'', whole[:1], whole[:len(whole) // 2], whole[:-1], b'hello'):
        path.write_bytes(damaged)
        assert load_checkpoint(tmp_path)['step'] == 1
        assert 'damaged' in capsys.readouterr().out
    for place in range(0, len(whole), 61):  # a flipped bit is found, or it changed nothing that is read
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = load_checkpoint(tmp_path)
        assert found['step'] == 1 or torch.equal(found['w'], state(2)['w']), place
    path.unlink()
    path.mkdir()
    assert load_checkpoint(tmp_path)['step'] == 1
    (tmp_path / 'ckpt_00000001.pt').write_bytes(b'')
    with pytest.raises(Refusal, match='no valid checkpoint'):
        load_checkpoint(tmp_path)
    with pytest.raises(Refusal, match='no checkpoint'):
        load_checkpoint(tmp_path / 'nowhere')


class Payload:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'ckpt_00000001.pt'
    for write in (lambda: torch.save(dict(step=1, weights=Payload()), path),
                  lambda: path.write_bytes(pickle.dumps(Payload()))):
        write()
        with pytest.raises(Refusal):
            load_checkpoint(tmp_path)
        assert not os.path.exists('ran')
