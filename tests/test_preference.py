"""preference.py on small data: losses by brute force, each method's collection, exact resume, ranks, refusals."""
import copy
import inspect
import json
import math
import os
import re
import signal
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import answers
import evaluate
import prepare_shp
import preference
import runs
from answers import DATA, TEACHER, cut_answers, make_batch, micro_batches, pack, select, token_rows
from configurator import Refusal
from conftest import METHODS, SMALL, assert_same_run, metrics, succeed, typed
from losses import ppo_policy_loss, renormalize_reward, taylor_loss
from model import ScalarHead
from prepare_shp import Group, pick_groups
from runs import load_checkpoint, save_checkpoint
from toy_shp import quality, toy_rows

pytestmark = pytest.mark.usefixtures('work')
EOT = 256


def config(out_dir, method='dpo', **changes):
    return preference.Config(out_dir=str(out_dir), method=method, **{**SMALL, **METHODS.get(method, {}), **changes})


def command(out_dir, method, *more, ranks=1, **changes):
    options = {**SMALL, **METHODS[method], **changes, 'out_dir': out_dir, 'method': method}
    return typed('preference.py', *more, ranks=ranks, **options)


def whole(method, **changes):
    """The folder of an uninterrupted run, made once."""
    out = Path('_'.join(['whole', method, *changes]))
    if not out.exists():
        preference.main(config(out, method, **changes))
    return out


def a_run(tmp_path, method, **changes):
    """Lab and method as main makes them, at step 0, for the functions that take one."""
    cfg = config(tmp_path / 'run', method, **changes)
    data = prepare_shp.open_dataset(cfg)
    lab = preference.open_lab(cfg, runs.setup('cpu'), data)
    lab = lab._replace(groups={split: data.groups(split) for split in ('train', 'val', 'test')} | lab.groups)
    made = preference.METHODS[method](lab)
    made.wrapped = made.trained
    (tmp_path / 'run').mkdir()
    preference.start_folders(lab, 0)
    return lab, made


def the_start():
    return answers.make_gpt(load_checkpoint('start', 'best.pt'))


def an_evaluation(lab, method, policy):
    log = SimpleNamespace(lines=[], write=lambda event, **line: log.lines.append(line))
    found = evaluate.Evaluation(lab, method, log)
    found.policy = policy
    return found


@torch.no_grad()
def shake(*modules, scale=0.02):
    for module in modules:
        for p in module.parameters():
            p += scale * torch.randn_like(p)


def a_batch(lab, count):
    return make_batch(cut_answers(lab, pick_groups(lab.groups['train'], 0, 0, count)))


def counts_of(batch):
    return dict(iteration=0, update=0, groups=len(batch['group']), tokens=int(batch['answer_length'].sum()),
                best_tokens=int(batch['answer_length'][:, 0].sum()))


def as_data(*rankings):
    """(prompt, answers) of some rankings, as lists of ids -> prepare_shp.Groups."""
    pieces = [piece for prompt, ranked in rankings for piece in (prompt, *ranked)]
    first = np.cumsum([0, *(len(ranked) for _, ranked in rankings)])
    prompts = first[:-1] + np.arange(len(rankings))
    return prepare_shp.Groups(np.concatenate(pieces).astype(np.uint16), np.cumsum([0, *map(len, pieces)]), prompts,
                              np.setdiff1d(np.arange(len(pieces)), prompts), first, np.arange(first[-1], dtype=float),
                              np.array([f'post{g}' for g in range(len(rankings))]))


def texts(batch):
    """(g, k, prompt ids, answer ids) of every answer in a batch."""
    prompts, tokens = batch['prompt'].tolist(), batch['answer'].tolist()
    for g, (P, lengths) in enumerate(zip(batch['prompt_length'].tolist(), batch['answer_length'].tolist())):
        prompt, prompts = prompts[:P], prompts[P:]
        for k, A in enumerate(lengths):
            if A:
                yield g, k, prompt, tokens[:A]
                tokens = tokens[A:]


def fast_log_p(lab, model, rows):
    return answers.token_log_probs(lab, model, answers.hidden_states(lab, model, rows), rows)


def slow_log_p(model, prompt, answer):
    """Token log-probabilities of one answer behind its prompt, all by itself, from plain logits."""
    text = torch.tensor([prompt + answer])
    log_p = model.logits(model(text[:, :-1]))[0].log_softmax(-1)
    return log_p[len(prompt) - 1:].gather(1, text[0, len(prompt):, None])[:, 0]


def slow_reward(scorer, prompt, answer):
    scalar = scorer(torch.tensor([prompt + answer]))[0][0]
    return (scalar[-1] if scorer.read == 'last' else scalar[len(prompt):].sum()) + scorer.offset[0]


def test_cheap_rankers_find_what_there_is_to_find(tmp_path):
    """Three pairs of four are won by the shorter answer, though losers are shorter on average; id 98 always wins."""
    lab, method = a_run(tmp_path, 'dpo', eval_groups=0)
    pairs = [([97] * 5, [[98] * 9, [99] * 10])] * 3 + [([97] * 5, [[98] * 20, [99] * 2])]
    lab.groups.update(train=as_data(*pairs), val=as_data(*pairs))
    found = an_evaluation(lab, method, None).baselines()
    assert found['rank_accuracy_length'] == 0.75 and found['rank_accuracy_bag'] == 1.0


@pytest.mark.parametrize('read, row_tokens', [('last', 2048), ('sum', 100), ('last', 1)])
def test_packed_rows_give_what_separate_texts_give(tmp_path, monkeypatch, read, row_tokens):
    """Values and gradients in float64, all lengths ragged; neither padding nor the order of prompts changes them.

    Nor whether a prompt's answers are in one row, in several, or each in its own.
    """
    monkeypatch.setattr(answers, 'ROW_TOKENS', row_tokens)
    lab, method = a_run(tmp_path, 'dpo', micro_groups=5)
    model, batch = method.trained['model'].double(), a_batch(lab, 12)
    scorer = ScalarHead(model, read).double().requires_grad_()  # the language head too, which it freezes
    shake(scorer, scale=0.1)
    rows, valid = pack(batch), batch['answer_length'] > 0
    log_p, (reward, _) = fast_log_p(lab, model, rows), answers.answer_rewards(lab, scorer, scorer, rows)
    slow = torch.cat([slow_log_p(model, prompt, answer) for *_, prompt, answer in texts(batch)])
    slow_r = torch.stack([slow_reward(scorer, prompt, answer) for *_, prompt, answer in texts(batch)])
    assert torch.allclose(log_p, slow, rtol=1e-10) and torch.allclose(reward[valid], slow_r, rtol=1e-6)
    assert not valid.all() and (reward[~valid] == 0).all()
    upstream, of_r = torch.randn_like(log_p), torch.randn_like(slow_r)
    gradients = [torch.autograd.grad((p * upstream).sum() + (r * of_r).sum(), list(scorer.parameters()))
                 for p, r in ((log_p, reward[valid]), (slow, slow_r))]
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert len(rows.idx) == 12 if row_tokens == 2048 else 12 < len(rows.idx) <= valid.sum()
    junk = rows._replace(idx=rows.idx.masked_fill(rows.idx == 0, 99))  # no text has a token 0: that is padding
    assert (rows.idx == 0).any() and torch.equal(log_p, fast_log_p(lab, model, junk))
    parts = micro_batches(lab, batch)
    assert [len(part) for part in parts] == [5, 5, 2] and sorted(torch.cat(parts).tolist()) == list(range(12))
    for part in parts:
        some = fast_log_p(lab, model, pack(select(batch, part)))
        assert torch.allclose(some, slow[token_rows(batch, part)], rtol=1e-10)


def test_a_long_answer_takes_nothing_from_the_others(tmp_path, capsys):
    """Block 80, 20 new tokens: a prompt keeps its last 60, each answer gets what is left, without its end if cut.

    Of answers that this makes equal the better stays; rankings left with one are dropped; all of it is counted.
    """
    lab, method = a_run(tmp_path, 'dpo')
    long, short, a, b = list(range(70)), list(range(30)), [1] * 50, [2] * 50
    cut = cut_answers(lab, [Group(0, '', long, [[1, EOT], [2] * 100]), Group(1, '', short, [b + b, [4] * 49 + [EOT]])])
    assert cut == [Group(0, '', long[-60:], [[1, EOT], [2] * 20]), Group(1, '', short, [b, [4] * 49 + [EOT]])]
    data = as_data((long, [a + [5, EOT], a + [6, EOT], [3, EOT]]), (short, [a + [EOT], a + [5, EOT], b, a]),
                   (long, [a + [5, EOT], a + [6, EOT]]), (short, [[3, EOT], [4, EOT]]))
    usable, words = answers.usable_rankings(lab, data)
    assert words == ('2 prompts lose their beginning, 6 answers are cut, 3 cut answers equal a better one and are '
                     'dropped, 1 rankings keep only one answer and are dropped')
    assert usable.scores.tolist() == [0, 2, 3, 5, 9, 10] and usable.ids.tolist() == ['post0', 'post1', 'post3']
    assert usable.first.tolist() == [0, 2, 4, 6] and answers.usable_rankings(lab, usable)[1].startswith('1 prompts')
    made = SimpleNamespace(groups=lambda split: data, meta=prepare_shp.open_dataset(lab.cfg).meta)
    lab.groups['val'] = preference.open_lab(lab.cfg, lab.machine, made).groups['val']
    printed = capsys.readouterr().out
    for split in ('train', 'val'):
        assert f'note: rankings of {split}, with a block of 80 tokens and max_new_tokens=20: {words}' in printed
    held = an_evaluation(lab, method, None).held
    assert sorted(held['answer_length'].tolist()) == [[2, 2], [20, 2], [50, 50]]
    assert sorted(held['prompt_length'].tolist()) == [30, 30, 60]


@pytest.mark.parametrize('rank_order, token_order', [(0, 0), (1, 2), (2, 1)])
def test_ranking_loss_by_brute_force(tmp_path, rank_order, token_order):
    """From its definition: sums over tokens, a fraction at each stage, T_n of it; all stages, or the first alone.

    As if the policy had written the second answers, which the data's lead by self_margin.
    """
    lab, method = a_run(tmp_path, 'spin', rank_order=rank_order, token_order=token_order)
    model, reference, batch = method.trained['model'].double(), the_start().double(), a_batch(lab, 6)
    batch['generator'][:, 1] = 0
    shake(model)
    ref, scores = torch.zeros(batch['answer_length'].shape, dtype=torch.float64), [[] for _ in range(6)]
    with torch.no_grad():
        for g, k, prompt, answer in texts(batch):
            own, ref[g, k] = (-taylor_loss(slow_log_p(m, prompt, answer), token_order).sum()
                              for m in (model, reference))
            scores[g].append(lab.cfg.beta * (own - ref[g, k]).item())

    def mean_loss(scores):
        losses = [[math.exp(x) / sum(map(math.exp, s[k:])) for k, x in enumerate(s)][:method.top] for s in scores]
        return sum(-math.log(p) - sum((1 - p) ** i / i for i in range(1, rank_order + 1)) for p in sum(losses, [])) / 6

    for method.top in (None, 1):
        loss, stats = method.loss(pack(dict(batch, ref_log_p=ref)), counts_of(batch))
        assert loss.item() == pytest.approx(mean_loss(scores), rel=1e-9)
        assert stats['chance_loss'].item() == pytest.approx(mean_loss([[0.0] * len(s) for s in scores]), rel=1e-6)
    margin = np.array([s[0] - s[1] for s in scores])
    assert [stats[name].item() for name in ('self_margin', 'self_square')] == pytest.approx(
        [margin.mean(), (margin ** 2).mean()], rel=1e-9)


@pytest.mark.parametrize('K', [2, 3, 5])
def test_pair_statistics_by_brute_force(K):
    torch.manual_seed(K)
    scores, valid = torch.randint(-3, 4, (30, K)).float(), torch.rand(30, K).cumsum(1) < 0.3 * K
    valid[:, :2] = True
    gap = torch.tensor([row[i] - row[j] for row, there in zip(scores.tolist(), valid.tolist())
                        for i, j in combinations(range(K), 2) if there[i] and there[j]])
    right, confidence = (gap.sign() + 1) / 2, gap.abs().sigmoid()
    bins = ((confidence - 0.5) * 30).long().clamp(max=14)
    ece = sum((right - confidence)[bins == b].sum().abs().item() for b in range(15)) / len(gap)
    assert evaluate.pair_statistics(scores, valid) == pytest.approx((right.mean().item(), gap.mean().item(), ece))
    scores[0, 0] = math.nan
    assert all(map(math.isnan, evaluate.pair_statistics(scores, valid)))


@torch.no_grad()
def test_generator_reference_and_template_are_one_and_the_same(tmp_path):
    """Samples come from pi_t or earlier selves, after the very prompt that render makes; pi_t is the reference.

    token_order changes the reference of the loss, not the log-probabilities that are logged, each under who wrote it.
    """
    lab, method = a_run(tmp_path, 'spin', token_order=2)
    rows, data = {row['post_id']: row['history'] for row in toy_rows('train', 40, 0)}, lab.groups['train']
    selves, ended = {}, 0
    for t in range(3):
        batch, facts = method.collect(t, 0)
        selves[t] = copy.deepcopy(method.trained['model'])
        for g, k, prompt, answer in texts(batch):
            number, who = batch['group'][g], (DATA, t, t - 1)[k]
            assert prompt == lab.encoding.encode_ordinary(prepare_shp.render(rows[str(data.ids[number])], '')[0])
            ref = -taylor_loss(slow_log_p(selves[t], prompt, answer), 2).sum().item()
            own = slow_log_p(selves[who], prompt, answer).sum().item() if k else 0.0
            assert [batch[name][g, k].item() for name in ('generator', 'ref_log_p', 'log_p')] == pytest.approx(
                [who, ref, own], rel=1e-4)
            ended += answer[-1] == EOT
            if k == 0:  # cut like a sample, so that length does not tell who wrote it
                assert answer == data.piece(data.answers[data.first[number]]).tolist()[:20]
            else:       # the cached path of generation takes the tokens of the plain one, from the same numbers
                uniform = torch.from_numpy(np.random.default_rng((5, 0, t, who)).random((8, 20), 'float32'))
                assert selves[who].generate([prompt], 20, eot=EOT, uniform=uniform[g:g + 1]) == [answer]
        assert facts['new_tokens'] == batch['answer_length'][:, 1:].sum()
        shake(method.trained['model'], scale=0.05)
    assert 0 < ended < batch['answer_length'].numel()


@pytest.mark.parametrize('options, expected', [
    (dict(opponents=1), [[0], [1], [2], [3]]), (dict(opponents=2), [[0], [1, 0], [2, 1], [3, 2]]),
    (dict(opponents=2, anchor_first=True), [[0], [1, 0], [2, 0], [3, 0]]),
    (dict(opponents=3, league='ordered'), [[0], [1, 0], [2, 1, 0], [3, 2, 1]]),
    (dict(opponents=3, anchor_first=True), [[0], [1, 0], [2, 1, 0], [3, 2, 0]])])
def test_who_plays_in_which_iteration(tmp_path, options, expected):
    """Tied: the data's answer above every self. Ordered: later selves above earlier ones, too."""
    _, method = a_run(tmp_path, 'spin', **options)
    assert [method.opponents(t) for t in range(4)] == expected
    assert method.top == (None if 'league' in options else 1)


def test_iterations_on_disk_tell_everything():
    out = whole('spin', micro_groups=3) / 'iterations'
    lines = [json.loads(line) for line in (out / '0002.jsonl').read_text().splitlines()]
    batch = load_checkpoint(out, '0002.pt')['batch']
    assert [(line['generator'], line['rank']) for line in lines] == [('data', 0), ('self-2', 1), ('self-1', 2)] * 8
    assert all(('log_prob' in line) == (line['rank'] > 0) and line['iteration'] == 2 for line in lines)
    rows, encoding = {row['post_id']: row['history'] for row in toy_rows('train', 40, 0)}, prepare_shp.encoding('bytes')
    for line, (*_, answer) in zip(lines, texts(batch), strict=True):
        assert line['prompt'] == rows[line['prompt_id']]
        assert line['completion'] == encoding.decode([id for id in answer if id != EOT])


@pytest.mark.parametrize('changes', [{}, dict(moment_order=2, renormalize_over='batch')])
def test_first_minibatch_of_ppo(tmp_path, changes):
    """Ratio 1, KL 0, value 0, each prompt's returns average 0; the gradient is that of -A q^m log p for token_order m,
    for m = 0 PPO's bit for bit. Raw rewards lack 1 where an answer did not end. KL and first ratio: of the true log p.
    """
    lab, method = a_run(tmp_path, 'ppo', answers_per_prompt=6, **changes)
    batch, facts = method.collect(0, 0)
    model, rows, counts, A = method.trained['model'], pack(batch), counts_of(batch), batch['advantage']
    assert abs(facts['train_kl']) < 1e-4 and (batch['value'] == 0).all()
    assert A.mean().abs() < 1e-5 and A.std() == pytest.approx(1, rel=1e-2)
    last = batch['returns'][batch['answer_length'].flatten().cumsum(0) - 1].view(8, 6)
    mean = last.mean(1) if lab.cfg.renormalize_over == 'prompt' else last.mean()
    assert mean.abs().max() < 1e-4 and last.square().mean() == pytest.approx(1, abs=0.4)
    for g, k, prompt, answer in texts(batch):
        r = slow_reward(method.scorer, prompt, answer).item() - (answer[-1] != EOT)
        assert batch['reward'][g, k].item() == pytest.approx(r, abs=1e-5)

    def gradient(loss):
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten() for g in grads]) * counts['tokens']

    for m in range(4):
        method.lab = lab._replace(cfg=replace(lab.cfg, token_order=m))
        log_p, (_, stats) = fast_log_p(lab, model, rows), method.loss(rows, counts)
        assert [stats[x].item() for x in ('ratio_first', 'clip_fraction', 'update_kl')] == pytest.approx(
            [1, 0, 0], abs=1e-5)
        found = gradient(stats['loss'])
        expected = gradient(-(A * (-log_p.detach().expm1()) ** m * log_p).sum() / counts['tokens'])
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        if m == 0:
            ppo = ppo_policy_loss(fast_log_p(lab, model, rows), batch['old_log_p'], A, 0.2).sum()
            assert torch.equal(found, gradient(ppo / counts['tokens']))
    shake(model, scale=0.05)
    _, stats = method.loss(rows, counts)
    log_p, old = fast_log_p(lab, model, rows).detach(), batch['old_log_p']
    log_ratio, ratio = log_p - old, (taylor_loss(old, 3) - taylor_loss(log_p, 3)).exp()
    clipped = ((ratio - 1).abs() > 0.2).float().mean().item()
    assert stats['clip_fraction'].item() == pytest.approx(clipped) and 0 < clipped < 1
    assert stats['update_kl'].item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)


def test_advantages_are_gae_of_the_penalised_rewards(tmp_path):
    """By hand, with a policy that has left its start and a critic that gives other values than 0."""
    _, method = a_run(tmp_path, 'ppo', beta=0.3, gamma=0.9, gae_lambda=0.8)
    policy, critic, reference = method.trained['model'], method.trained['critic'], the_start()
    shake(policy, critic, scale=0.05)
    batch, _ = method.collect(1, 0)
    renormalized, returns = renormalize_reward(batch['reward'], 3).reward, []
    for g, k, prompt, answer in texts(batch):
        value = (critic(torch.tensor([prompt + answer]))[0][0, len(prompt) - 1:-1] + critic.offset).tolist()
        reward = -0.3 * (slow_log_p(policy, prompt, answer) - slow_log_p(reference, prompt, answer))
        reward[-1] += renormalized[g, k]
        after, backwards = 0.0, []
        for r, v, v_next in list(zip(reward.tolist(), value, [*value[1:], 0.0]))[::-1]:
            after = r + 0.9 * v_next - v + 0.9 * 0.8 * after
            backwards.append(after + v)
        returns += backwards[::-1]
    assert batch['returns'].tolist() == pytest.approx(returns, abs=1e-4)
    a = batch['returns'] - batch['value']
    assert torch.allclose(batch['advantage'], (a - a.mean()) / a.std(correction=0), atol=1e-5)


def test_a_bandit_is_solved(tmp_path, monkeypatch):
    """One token, a reward for one of them, beta = 0: its probability goes above 0.95."""
    monkeypatch.setattr(preference, 'rewards', lambda lab, scorer, batch: (
        batch['answer'] == ord('S')).float().view_as(batch['answer_length']))
    preference.main(config(tmp_path / 'run', 'ppo', beta=0.0, max_new_tokens=1, missing_eot_penalty=0.0, iterations=25,
                           answers_per_prompt=32, moment_order=2, learning_rate=3e-3, min_lr=3e-3, eval_interval=1000,
                           kl_stop=0.0))
    ask = torch.tensor([prepare_shp.encoding('bytes').encode_ordinary(prepare_shp.render('Rusty pan, why me?', '')[0])])
    models = the_start(), answers.make_gpt(load_checkpoint(tmp_path / 'run', 'best.pt'))
    before, after = (m.logits(m(ask))[0, -1].softmax(-1)[ord('S')].item() for m in models)
    assert before < 0.5 and after > 0.95


def test_a_reward_model_trains_the_language_head_for_its_language_loss(tmp_path):
    weights = the_start().state_dict()
    lab, _ = a_run(tmp_path, 'reward')
    start = dict(model=weights, model_config=dict(lab.start['model_config'], tie_weights=False))
    for sft_weight in (0.0, 0.3):
        method = preference.RewardModel(lab._replace(start=start, cfg=replace(lab.cfg, sft_weight=sft_weight)))
        assert method.scorer.gpt.lm_head.weight.requires_grad == (sft_weight > 0)


def test_policy_and_critic_move_and_the_reward_model_is_as_it_was_saved(tmp_path):
    """The critic is a copy of the reward model, which may read more tokens than the policy."""
    first, start = load_checkpoint('reward', 'best.pt')['reward_model'], the_start().state_dict()
    last = load_checkpoint(whole('ppo', **CHANGES['ppo']), 'best.pt')
    assert (last['model_config']['block_size'], last['critic_config']['block_size']) == (60, 80)
    assert all(not torch.equal(w, start[name][:len(w)]) for name, w in last['model'].items())
    lab, method = a_run(tmp_path, 'ppo', eval_split='test')  # that of the reward run, which is centred there
    assert all(torch.equal(w, first[name]) for name, w in method.scorer.state_dict().items())
    critic = method.trained['critic']
    assert all(torch.equal(w, first[f'gpt.{name}']) for name, w in critic.gpt.state_dict().items())
    assert critic.gpt is not method.scorer.gpt and (critic.head.weight == 0).all()
    prompts = an_evaluation(lab, method, None).prompts
    drawn = answers.sample(lab, the_start(), prompts, evaluate.EVAL, 0)
    batch = make_batch([Group(0, '', prompt, [answer]) for prompt, answer in zip(prompts, drawn)])
    assert answers.rewards(lab, method.scorer, batch).mean().abs() < 1e-5


def test_kl_stop_ends_an_iteration(tmp_path, capsys):
    """The first update of an iteration finds the ratios at 1, the second one does not; max_iters holds all the same."""
    cfg = config(tmp_path, 'ppo', kl_stop=1e-9, learning_rate=1e-2, warmup_iters=0, inner_epochs=3, max_iters=14)
    preference.main(cfg)
    printed, lines = capsys.readouterr().out, metrics(tmp_path, 'train')
    assert '  before ' in printed and '  after  ' in printed
    assert [(line['iteration'], line['step']) for line in lines] == [(0, 1), (0, 6), (1, 7), (1, 12), (2, 13), (2, 14)]
    assert [line['step'] for line in metrics(tmp_path, 'eval')] == [0, 6, 12, 14]
    preference.main(replace(cfg, resume=True))
    assert load_checkpoint(tmp_path)['step'] == 14


CHANGES = dict.fromkeys(METHODS, dict(micro_groups=3)) | dict(ppo=dict(micro_groups=3, block_size=60))
PPO_METRICS = set('train_reward renormalized_residual exact_groups clip_fraction value_loss explained_variance'.split())


@pytest.mark.parametrize('method', METHODS)
def test_files_metrics_and_the_first_loss(method):
    out = whole(method, **CHANGES[method])
    assert {p.name for p in out.iterdir()} == {
        'best.pt', 'ckpt_00000008.pt', 'ckpt_00000012.pt', 'config.json', 'metrics.jsonl', 'iterations',
        'preference.png', 'samples.jsonl', 'selves'}
    assert json.loads((out / 'config.json').read_text())['max_iters'] == 0  # a resume may add iterations
    lines, evals = metrics(out, 'train'), metrics(out, 'eval')
    assert [line['step'] for line in lines] == list(range(1, 13)) and [line['step'] for line in evals] == [0, 4, 8, 12]
    assert {'iteration', 'loss', 'grad_norm', 'lr', 'tokens', 'sampled_tokens'} <= set(lines[0])
    assert {'rank_accuracy', 'rank_accuracy_logp', 'margin', 'chosen_logp', 'rejected_logp', 'kl', 'entropy',
            'answer_length', 'eot_rate', 'rank_accuracy_length', 'rank_accuracy_bag'} <= set(evals[0])
    if method == 'ppo':
        assert PPO_METRICS <= set(lines[0]) and 'reward' in evals[0]
    else:  # equal scores: log K! on average
        wanted = dict(spin=math.log(2), distill=math.log(6)).get(method, lines[0]['chance_loss'])
        assert lines[0]['loss'] == pytest.approx(wanted, abs=1e-4)
    if method == 'distill':
        assert {'reward_data', 'reward_teacher', 'reward_self', 'reward_agrees'} <= set(evals[0])
        batch = load_checkpoint(out / 'iterations', '0002.pt')['batch']
        assert batch['generator'].tolist() == [[DATA, TEACHER, 2]] * 8
    assert evals[0]['rank_accuracy'] == 0.5 and abs(evals[0]['kl']) < 1e-4
    assert evals[-1]['margin'] != 0 and (evals[-1]['kl'] > 0) == (method != 'reward')
    samples = (out / 'samples.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in samples] == [0] * 6 + [4] * 6 + [8] * 6 + [12] * 6


@pytest.mark.parametrize('method', METHODS)
def test_resume_is_bit_exact(tmp_path, method):
    """Stopped at the end of an iteration, which has a checkpoint, and inside one: the same run as uninterrupted."""
    changes, b = CHANGES[method], tmp_path / 'stopped'
    a = whole(method, **changes)
    for stop in (4, 10, 0):
        preference.main(config(b, method, stop_step=stop, resume=stop != 4, **changes))
        assert load_checkpoint(b)['step'] == (stop or 12)
    assert_same_run(a, b)


@pytest.mark.parametrize('method', ['ppo', *(pytest.param(name, marks=pytest.mark.soak) for name in METHODS
                                             if name != 'ppo')])
def test_two_ranks_equal_one(tmp_path, method):
    """The same losses and evaluations with 2 gloo ranks, which take over from one process and hand back.

    A critic never uses the language head of its untied start, and one rank has no sample to evaluate: no rank hangs.
    """
    options = dict(groups_per_iteration=10, groups_per_step=5, micro_groups=2, eval_samples=1)
    one, two = tmp_path / '1', tmp_path / '2'
    preference.main(config(one, method, **options))
    preference.main(config(two, method, stop_step=2, **options))
    succeed(command(two, method, '--resume=True', '--stop_step=10', ranks=2, **options))
    preference.main(config(two, method, resume=True, **options))
    for a, b in zip(*(metrics(out, 'train') + metrics(out, 'eval') for out in (one, two)), strict=True):
        assert (a.pop('event'), a.pop('step'), a.keys()) == (b.pop('event'), b.pop('step'), b.keys())
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3 if key != 'lr' else 0), key


@pytest.mark.parametrize('where, name, call', [(preference, 'sample', 1), (evaluate.Evaluation, 'rankings', 3)])
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path, monkeypatch, where, name, call):
    """SIGTERM in the first collection and in an evaluation."""
    cfg, sound, calls = config(tmp_path, 'spin', micro_groups=3), getattr(where, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return sound(*args)

    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(SystemExit) as end:
        preference.main(cfg)
    assert end.value.code == 143 and load_checkpoint(tmp_path)['step'] < 12
    preference.main(replace(cfg, resume=True))
    assert_same_run(whole('spin', micro_groups=3), tmp_path)


def test_selfplay_ends_within_the_noise_and_not_before(tmp_path, monkeypatch):
    """A policy that does not move ends it; one that learns does not, for data are far above a hardly trained start."""
    monkeypatch.setattr(preference, 'MARGIN_GROUPS', 8)  # two iterations' later halves
    idle = config(tmp_path / 'idle', 'spin', learning_rate=0.0, min_lr=0.0, margin_stop=2.0, warmup_iters=0)
    for cfg in (idle, replace(idle, resume=True)):
        preference.main(cfg)
        assert load_checkpoint(tmp_path / 'idle')['step'] == metrics(tmp_path / 'idle', 'eval')[-1]['step'] == 8
    preference.main(config(tmp_path / 'clear', 'spin', learning_rate=1e-2, margin_stop=2.0, warmup_iters=0,
                           groups_per_iteration=16, groups_per_step=2, stop_step=17))
    found, = [line for line in metrics(tmp_path / 'clear', 'train') if 'self_margin_mean' in line]
    assert found['step'] == 16 and found['self_margin_mean'] > 2 * found['self_margin_error'] > 0
    assert load_checkpoint(tmp_path / 'clear')['step'] == 17


@torch.no_grad()
def test_evaluation_by_brute_force(tmp_path):
    """One held-out answer and one sample at a time, with all logits at once; on the toy's own questions.

    A forward pass for rankings, one for samples, under the policy and under the start; its rankings once in a run.
    """
    lab, method = a_run(tmp_path, 'dpo', max_answers=0)
    lab = method.lab = lab._replace(cfg=replace(lab.cfg, source='toy'))
    policy, reference = method.trained['model'], the_start()
    shake(policy, scale=0.03)
    evaluation, calls = an_evaluation(lab, method, policy), []
    for gpt in (policy, method.start):
        gpt.register_forward_hook(lambda gpt, x, options, _: calls.append(gpt) if 'positions' in options else None,
                                  with_kwargs=True)
    got, again, valid = evaluation(1), evaluation(2), evaluation.held['answer_length'] > 0
    assert got == again and (calls.count(policy), calls.count(method.start)) == (4, 3)
    log_p, ref = torch.zeros(2, *valid.shape)
    for g, k, prompt, answer in texts(evaluation.held):
        log_p[g, k], ref[g, k] = (slow_log_p(m, prompt, answer).sum() for m in (policy, reference))
    accuracy, margin, ece = evaluate.pair_statistics(0.1 * (log_p - ref), valid)
    worst = log_p[torch.arange(12), valid.sum(1) - 1]
    expected = dict(rank_accuracy=accuracy, margin=margin, rank_ece=ece, chosen_logp=log_p[:, 0].mean().item(),
                    rank_accuracy_logp=evaluate.pair_statistics(log_p, valid)[0], rejected_logp=worst.mean().item())
    uniform = torch.from_numpy(np.random.default_rng((5, 0, evaluate.EVAL, 0)).random((6, 20), 'float32'))
    drawn = policy.generate(evaluation.prompts, 20, eot=EOT, uniform=uniform)
    posts, kl, entropy = [answers.post_of(lab, prompt) for prompt in evaluation.prompts], 0.0, []
    for prompt, answer in zip(evaluation.prompts, drawn):
        kl += (slow_log_p(policy, prompt, answer) - slow_log_p(reference, prompt, answer)).sum().item() / 6
        logits = policy.logits(policy(torch.tensor([prompt + answer[:-1]])))[0, len(prompt) - 1:]
        entropy += torch.special.entr(logits.softmax(-1)).sum(-1).tolist()
    expected |= dict(kl=kl, entropy=np.mean(entropy), eot_rate=np.mean([answer[-1] == EOT for answer in drawn]),
                     answer_length=np.mean([len([id for id in answer if id != EOT]) for answer in drawn]),
                     true_quality=np.mean([quality(p, answers.text_of(lab, a)) for p, a in zip(posts, drawn)]))
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert [line['prompt'] for line in evaluation.samples_log.lines] == posts * 2 and len(set(posts)) == 6


def test_a_run_stopped_before_its_first_evaluation_gives_its_last_checkpoint(tmp_path):
    preference.main(config(tmp_path / 'stopped', 'reward', stop_step=2))
    assert not (tmp_path / 'stopped' / 'best.pt').exists()  # step 0, whose rewards are 0, is never the best
    _, method = a_run(tmp_path, 'ppo', reward_model=str(tmp_path / 'stopped'))
    last = load_checkpoint(tmp_path / 'stopped')
    assert last['step'] == 2 and torch.equal(method.scorer.head.weight, last['reward_model']['head.weight'])


def altered(name, source, **changes):
    """A folder with the best checkpoint of a run, some of its entries or weights changed."""
    state = load_checkpoint(source, 'best.pt')
    for part in (state, state.get('model', {}), state.get('reward_model', {})):
        part.update({key: new(part[key]) for key, new in changes.items() if key in part})
    name.mkdir(parents=True)
    save_checkpoint(name, state, 'best.pt')
    return str(name)


@pytest.mark.parametrize('changes, words', [
    (dict(init_from='reward'), 'init_from=reward is a reward model and has no policy'),
    (dict(init_from=dict(source='start', encoding=lambda _: 'gpt2')), 'trained on gpt2 tokens'),
    (dict(method='ppo', reward_model='start'), 'reward_model=start is not a reward model'),
    (dict(method='ppo', reward_model={'source': 'reward', 'head.weight': torch.zeros_like}), 'is untrained'),
    (dict(method='distill', reward_model={
        'source': 'reward', 'model_config': lambda old: dict(old, block_size=40),
        'gpt.transformer.wpe.weight': lambda w: w[:40].clone()}), 'a block of 40 tokens, smaller than the policy.s 80'),
    (dict(groups_per_iteration=0, groups_per_step=1000), 'rankings, fewer than groups_per_step=1000')])
def test_refusals_are_sentences_and_cost_nothing(tmp_path, changes, words):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'ckpt_00000001.pt').write_bytes(b'an earlier run')
    changes = {key: altered(tmp_path / 'altered', **x) if isinstance(x, dict) else x for key, x in changes.items()}
    with pytest.raises(Refusal, match=words):
        preference.main(config(tmp_path / 'run', overwrite=True, **changes))
    assert [path.read_bytes() for path in (tmp_path / 'run').iterdir()] == [b'an earlier run']


@pytest.mark.parametrize('method, option, part', [('ppo', 'reward_model', 'offset'),
                                                  ('distill', 'teacher', 'lm_head.weight')])
def test_resume_of_another_run_is_refused(tmp_path, method, option, part):
    """Or with another reward model, another teacher, or a collection that is not the run's; and nothing is changed."""
    out = tmp_path / 'run'
    preference.main(config(out, method, stop_step=1))
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    other = altered(tmp_path / 'other', METHODS[method][option], **{part: lambda w: w + 1})
    for changes, words in ((dict(method='spin'), f'method is {method} in the checkpoint, spin here'),
                           (dict(groups_per_step=2), 'groups_per_step is 4 in the checkpoint, 2 here'),
                           ({option: other}, f'cannot resume.* {option} is'), ({}, 'no valid checkpoint in')):
        if not changes:
            (out / 'iterations' / '0000.pt').write_bytes((out / 'iterations' / '0000.pt').read_bytes()[:-7])
        with pytest.raises(Refusal, match=words):
            preference.main(config(out, **{'method': method, 'resume': True, **changes}))
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_options_that_do_not_fit_are_refused():
    """Those of other methods, too, if asked for and not the default; the help names the methods that read an option."""
    for changes, words in ((dict(method='pdo'), "method='pdo' is not one of dpo, spin, distill, reward, ppo"),
                           (dict(max_answers=1), 'leaves nothing to rank'), (dict(moment_order=4), 'not one of 2, 3'),
                           (dict(groups_per_iteration=10, groups_per_step=4), 'a multiple of groups_per_step=4'),
                           (dict(moment_order=3, answers_per_prompt=3), 'use 4 or more'),
                           (dict(anchor_first=True), 'needs --opponents=2 or more'), (dict(league='x'), 'not one of')):
        assert words in ' '.join(preference.Config(**changes).check())
    assert list(config('run', overwrite=True, init_from='run/best.pt').check()) == [
        'overwrite would delete init_from=run/best.pt; choose another --out_dir']
    cfg = config('run', 'ppo', margin_stop=1.0, beta=0.2, sft_weight=0.5)
    object.__setattr__(cfg, 'given', frozenset({'margin_stop', 'beta', 'opponents'}))
    assert list(cfg.check()) == ['margin_stop has no effect with method=ppo; leave it out']
    help = dict(re.findall(r'^    (\w+): .*?# ([^:\n]*):', inspect.getsource(preference.Config), re.MULTILINE))
    for option in {option for method in preference.METHODS.values() for option in method.options}:
        assert preference.METHODS.keys() & set(re.findall(r'\w+', help[option])) == {
            name for name, method in preference.METHODS.items() if option in method.options}
