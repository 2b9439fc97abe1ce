"""preference.py on small data: losses by brute force, each method's collection, exact resume, ranks, refusals."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import answers
import evaluate
import prepare_shp
import preference
import sample
import runs
import train
from configurator import Refusal
from conftest import succeed
from losses import taylor_loss
from model import ScalarHead
from runs import load_checkpoint, load_run, save_checkpoint
from answers import group_batch
from prepare_shp import pick_groups
from toy_shp import quality, toy_rows

ROOT = Path(__file__).parent.parent
SMALL = dict(dataset='small', source='rows', encoding='bytes', init_from='start', groups_per_iteration=8,
             groups_per_step=4, inner_epochs=2, iterations=3, max_new_tokens=20, eval_interval=4, log_interval=1,
             eval_groups=12, eval_samples=6, warmup_iters=2, learning_rate=1e-3, device='cpu', margin_stop=0.0)
METHODS = dict(dpo=dict(max_answers=3), spin=dict(opponents=2), distill=dict(teacher='teacher', reward_model='reward'),
               reward=dict(reward_read='sum', sft_weight=0.3),
               ppo=dict(reward_model='reward', answers_per_prompt=4, moment_order=3))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working directory with a small dataset, a start, a teacher and a reward model."""
    path = tmp_path_factory.mktemp('work')
    (path / 'rows').mkdir()
    for split, posts in dict(train=40, validation=12, test=6).items():
        lines = (json.dumps(row) for row in toy_rows(split, posts, 0))
        (path / 'rows' / f'{split}.json').write_text('\n'.join(lines) + '\n')
    here = os.getcwd()
    os.chdir(path)
    prepare_shp.prepare(prepare_shp.Config(dataset='small', source='rows', encoding='bytes'))
    for name, seed in (('start', 0), ('teacher', 1)):
        train.main(train.Config(dataset='small', source='rows', encoding='bytes', out_dir=name, seed=seed, device='cpu',
                                n_layer=1, n_head=2, n_embd=32, block_size=80, cut='examples', batch_size=16,
                                max_iters=40, learning_rate=1e-2, eval_interval=40, dropout=0.1))
    # of the test split the latest is the best, and so not the start
    preference.main(config('reward', method='reward', eval_split='test'))
    os.chdir(here)
    return path


@pytest.fixture(autouse=True)
def work(folder, monkeypatch):
    monkeypatch.chdir(folder)


def config(out_dir, method='dpo', **changes):
    return preference.Config(out_dir=str(out_dir), method=method, **{**SMALL, **METHODS.get(method, {}), **changes})


def metrics(out_dir, event):
    lines = [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]
    timing = {'seconds', 'tokens_per_second'}
    return [{k: v for k, v in line.items() if k not in timing} for line in lines if line['event'] == event]


def a_run(tmp_path, method, **changes):
    """A Run as main makes it, at step 0, for the functions that take one."""
    cfg = config(tmp_path / 'run', method, **changes)
    data = prepare_shp.open_dataset(cfg)
    encoding = prepare_shp.encoding('bytes')
    start = answers.load_pi_0(cfg, False, encoding)
    trained, frozen = preference.METHODS[method].build(cfg, start, encoding, data.groups('train'))
    (tmp_path / 'run' / 'selves').mkdir(parents=True)
    save_checkpoint(tmp_path / 'run' / 'selves', dict(start, step=0), '0000.pt')
    groups = {split: data.groups(split) for split in ('train', 'val', 'test')}
    run = answers.Run(cfg, preference.METHODS[method], runs.setup('cpu'), groups, encoding, trained, frozen,
                      dict(trained), runs.StopSignal(), selves={0: answers.weights_hash(start['model'])})
    return run, start


def whole_step_of(batch, iteration=0, update=0):
    return dict(iteration=iteration, update=update, groups=len(batch['group']),
                tokens=int(batch['answer_length'].sum()), best_tokens=int(batch['answer_length'][:, 0].sum()))


def on_device(run, batch):
    return preference.micro_batch(run, batch, torch.arange(len(batch['group'])))


def slow_log_p(model, prompt, answer):
    """Token log-probabilities of one answer behind its prompt, all by itself, from plain logits."""
    text = torch.tensor([prompt + answer])
    log_p = model.logits(model(text[:, :-1]))[0].log_softmax(-1)
    return log_p[len(prompt) - 1:].gather(1, text[0, len(prompt):, None])[:, 0]


def slow_reward(scorer, prompt, answer):
    scalar = scorer(torch.tensor([prompt + answer]))[0][0]
    return (scalar[-1] if scorer.read == 'last' else scalar[len(prompt):].sum()) + scorer.offset[0]


def texts(batch):
    """(g, k, prompt ids, answer ids) of every answer in a batch."""
    for g, (prompt, P) in enumerate(zip(batch['prompt'].tolist(), batch['prompt_length'].tolist())):
        for k, (answer, A) in enumerate(zip(batch['answer'][g].tolist(), batch['answer_length'][g].tolist())):
            if A:
                yield g, k, prompt[:P], answer[:A]


# Log-probabilities and scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('read', ['last', 'sum'])
def test_packed_rows_give_what_separate_texts_give(tmp_path, read):
    """Values and gradients of token log-probabilities and of rewards, in float64, with K and all lengths ragged."""
    run, _ = a_run(tmp_path, 'dpo')
    model = run.trained['model'].double()
    scorer = ScalarHead(model, read).double()
    scorer.offset.data += 0.3
    torch.nn.init.normal_(scorer.head.weight)
    batch = group_batch(pick_groups(run.groups['train'], 0, 0, 12), 80)
    micro = on_device(run, batch)
    log_p = answers.answer_token_log_prob(run, model, model, micro)
    reward, *_ = answers.packed_rewards(run, scorer, scorer, micro)
    upstream = torch.randn(log_p.shape, dtype=torch.float64)
    gradients, values = [], {}
    for fast in (True, False):
        scorer.zero_grad()
        total = 0.0
        if fast:
            total = (log_p * upstream).sum() + (reward * upstream[..., 0]).sum()
        else:
            for g, k, prompt, answer in texts(batch):
                slow = slow_log_p(model, prompt, answer)
                values[g, k] = slow.detach(), slow_reward(scorer, prompt, answer)
                total = total + (slow * upstream[g, k, :len(answer)]).sum() + values[g, k][1] * upstream[g, k, 0]
        total.backward()
        gradients.append([p.grad.clone() for p in scorer.parameters()])
    for (g, k), (slow, r) in values.items():
        assert torch.allclose(log_p[g, k, :len(slow)], slow, rtol=1e-10) and (log_p[g, k, len(slow):] == 0).all()
        assert torch.allclose(reward[g, k].double(), r, rtol=1e-6)
    for a, b in zip(*gradients):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert (batch['answer_length'] == 0).any() and (reward[batch['answer_length'] == 0] == 0).all()


def test_padding_gets_no_gradient_and_changes_nothing(tmp_path):
    run, _ = a_run(tmp_path, 'dpo')
    model = run.trained['model'].double()
    batch = group_batch(pick_groups(run.groups['train'], 0, 0, 6), 80)
    micro = on_device(run, batch)
    whole = answers.answer_token_log_prob(run, model, model, micro)
    for name in ('prompt', 'answer'):  # junk behind every text
        length = micro[f'{name}_length'][..., None]
        micro[name] = torch.where(torch.arange(micro[name].shape[-1]) < length, micro[name], 99)
    junk = answers.answer_token_log_prob(run, model, model, micro)
    assert torch.equal(whole, junk)


@pytest.mark.parametrize('rank_order', [0, 1, 2])
@pytest.mark.parametrize('token_order', [0, 1, 2])
def test_ranking_loss_by_brute_force(tmp_path, rank_order, token_order):
    """PL-DPO from its definition: sums over tokens, a fraction at each stage, T_n of it."""
    run, start = a_run(tmp_path, 'dpo', rank_order=rank_order, token_order=token_order, max_answers=0)
    model, reference = run.trained['model'], answers.make_gpt(start).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    model.double()
    picked = pick_groups(run.groups['train'], 0, 0, 6)
    batch = group_batch(picked, 80)
    ref = torch.zeros(batch['answer_length'].shape, dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for g, group in enumerate(picked):
            scores = []
            for k, answer in enumerate(group.answers):
                sums = []
                for m in (model, reference):
                    log_p = slow_log_p(m, group.prompt, answer)
                    sums.append((-taylor_loss(log_p, token_order)).sum() if token_order else log_p.sum())
                ref[g, k] = sums[1]
                scores.append(run.cfg.beta * (sums[0] - sums[1]))
            p = [torch.exp(s) / sum(torch.exp(x) for x in scores[k:]) for k, s in enumerate(scores)]
            losses.append(sum(-torch.log(x) - sum((1 - x) ** i / i for i in range(1, rank_order + 1)) for x in p))
    batch |= dict(ref_log_p=ref, generator=torch.full_like(batch['answer_length'], answers.DATA))
    loss, stats = preference.ranking_loss(run, on_device(run, batch), whole_step_of(batch))
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-9)
    chance = [sum(taylor_loss(torch.tensor(1 / m).log(), rank_order).item() for m in range(2, len(g.answers) + 1))
              for g in picked]
    assert stats['chance_loss'].item() == pytest.approx(sum(chance) / len(chance), rel=1e-5)
    if rank_order == 0:
        assert stats['chance_loss'].item() == pytest.approx(
            sum(math.lgamma(len(g.answers) + 1) for g in picked) / 6, rel=1e-5)


def test_two_answers_are_dpo_and_selfplay_with_given_pairs_is_dpo(tmp_path):
    """K = 2: -logsigmoid(beta (log-ratio - log-ratio)); a batch of SPIN's under dpo's loss is the same number."""
    run, _ = a_run(tmp_path, 'spin')
    batch, _ = preference.collect_self_play(run, 0)
    with torch.no_grad():
        for p in run.trained['model'].parameters():
            p += 0.02 * torch.randn_like(p)
    log_p = answers.log_prob_under(run, run.trained['model'], batch)
    ratio = log_p - batch['ref_log_p']
    dpo = -F.logsigmoid(run.cfg.beta * (ratio[:, 0] - ratio[:, 1])).mean()
    loss, stats = preference.ranking_loss(run, on_device(run, batch), whole_step_of(batch))
    assert loss.item() == pytest.approx(dpo.item(), rel=1e-5) and batch['answer'].shape[1] == 2
    margin = run.cfg.beta * (ratio[:, 0] - ratio[:, 1])
    assert stats['self_margin'].item() == pytest.approx(margin.mean().item(), rel=1e-4)
    assert stats['self_square'].item() == pytest.approx(margin.square().mean().item(), rel=1e-4)
    run.method = preference.METHODS['dpo']
    assert preference.ranking_loss(run, on_device(run, batch), whole_step_of(batch))[0].item() == loss.item()


@pytest.mark.parametrize('K', [2, 3, 5])
def test_pair_statistics_by_brute_force(K):
    torch.manual_seed(K)
    scores, valid = torch.randint(-3, 4, (30, K)).float(), torch.rand(30, K).cumsum(1) < 0.3 * K
    valid[:, :2] = True
    right, gaps, bins = [], [], {}
    for row, there in zip(scores.tolist(), valid.tolist()):
        for i, j in combinations(range(K), 2):
            if there[i] and there[j]:
                gap = row[i] - row[j]
                right.append(0.5 if gap == 0 else float(gap > 0))
                gaps.append(gap)
                confidence = 1 / (1 + math.exp(-abs(gap)))
                bins.setdefault(min(int((confidence - 0.5) * 30), 14), []).append(right[-1] - confidence)
    expected = sum(right) / len(right), sum(gaps) / len(gaps), sum(abs(sum(b)) for b in bins.values()) / len(gaps)
    assert evaluate.pair_statistics(scores, valid) == pytest.approx(expected, rel=1e-6)
    scores[0, 0] = torch.nan  # in an evaluation: a number for the log, not the end of the run
    assert math.isnan(evaluate.pair_statistics(scores, valid)[1])


def test_cheap_rankers_find_what_there_is_to_find(tmp_path):
    """Where the better answer is always longer, or always holds a letter, they say so."""
    run, _ = a_run(tmp_path, 'dpo', eval_groups=0)
    rng = np.random.default_rng(0)

    def groups_of(better, worse):
        pieces = [piece for _ in range(200) for piece in (rng.integers(97, 120, 9), better(), worse())]
        offsets = np.cumsum([0, *map(len, pieces)])
        places = np.arange(600)
        return prepare_shp.Groups(np.concatenate(pieces), offsets, places[::3],
                                  places[places % 3 > 0], np.arange(0, 401, 2), None, ['id'] * 200)

    def some(low, high, letters=(97, 120)):
        return lambda: rng.integers(*letters, rng.integers(low, high))

    for better, worse, expected in ((some(10, 20), some(10, 20), (0.5, 0.5)), (some(6, 9), some(10, 20), (1.0, None)),
                                    (some(10, 20, (100, 130)), some(10, 20), (0.5, 1.0))):
        run.groups['train'], run.groups['val'] = groups_of(better, worse), groups_of(better, worse)
        found = evaluate.baselines(run, group_batch(evaluate.held_out(run), 80))
        for name, accuracy in zip(('rank_accuracy_length', 'rank_accuracy_bag'), expected):
            assert accuracy is None or found[name] == pytest.approx(accuracy, abs=0.12)


# Collections --------------------------------------------------------------------------------------------------------


def test_generator_reference_and_template_are_one_and_the_same(tmp_path):
    """SPIN's samples come from pi_t, after the very prompt that render makes, and pi_t is the reference."""
    run, _ = a_run(tmp_path, 'spin')
    batch, _ = preference.collect_self_play(run, 0)
    rows = {row['post_id']: row['history'] for row in toy_rows('train', 40, 0)}
    policy, ended = run.trained['model'], 0
    for g, k, prompt, answer in texts(batch):
        id = str(run.groups['train'].ids[batch['group'][g]])
        assert prompt == run.encoding.encode_ordinary(prepare_shp.render(rows[id], '')[0])
        assert batch['generator'][g, k] == (answers.DATA, 0)[k] and len(answer) <= 20
        with torch.no_grad():
            log_p = slow_log_p(policy, prompt, answer).sum().item()
        assert batch['ref_log_p'][g, k].item() == pytest.approx(log_p, rel=1e-5)
        ended += answer[-1] == run.encoding.eot_token
        if k == 1:
            assert batch['log_p'][g, 1].item() == pytest.approx(batch['ref_log_p'][g, 1].item(), rel=1e-6)
            # the cached path of generation takes the same tokens as the plain one, from the same uniform numbers
            uniform = torch.from_numpy(np.random.default_rng((5, 0, 0, 0)).random((8, 20), 'float32'))
            assert policy.generate([prompt], 20, eot=256, uniform=uniform[g:g + 1]) == [answer]
        else:
            best = run.groups['train'].piece(run.groups['train'].answers[run.groups['train'].first[batch['group'][g]]])
            assert answer == best.tolist()[:20]  # cut like a sample, so that length does not tell who wrote it
    assert 0 < ended < 16


def test_league_ranks_past_selves_below_the_latest(tmp_path):
    run, start = a_run(tmp_path, 'spin')
    preference.collect_self_play(run, 0)
    for t in (1, 2):
        with torch.no_grad():
            for p in run.trained['model'].parameters():
                p += 0.05 * torch.randn_like(p)
        batch, _ = preference.collect_self_play(run, t)
        assert batch['generator'][0].tolist() == [answers.DATA, t, t - 1]
    assert run.selves[0] == answers.weights_hash(start['model']) != run.selves[1] != run.selves[2]
    past = answers.past_self(run, 1)
    for g, k, prompt, answer in texts(batch):
        model = {0: None, 1: run.trained['model'], 2: past}[k]
        if model is not None:
            with torch.no_grad():  # each answer's log-probability is under who wrote it
                log_p = slow_log_p(model, prompt, answer).sum().item()
            assert batch['log_p'][g, k].item() == pytest.approx(log_p, rel=1e-5)
    run.selves[1] = '0' * 64
    with pytest.raises(Refusal, match='0001.pt is not the pi_1 of this run'):
        answers.past_self(run, 1)


def test_iterations_on_disk_tell_everything(tmp_path):
    out = tmp_path / 'run'
    preference.main(config(out, 'spin'))
    lines = [json.loads(line) for line in (out / 'iterations' / '0002.jsonl').read_text().splitlines()]
    manifest = json.loads((out / 'iterations' / '0002.json').read_text())
    assert [line['generator'] for line in lines] == ['data', 'self-2', 'self-1'] * 8
    assert [line['rank'] for line in lines] == [0, 1, 2] * 8 and all(line['iteration'] == 2 for line in lines)
    assert all(('log_prob' in line) == (line['generator'] != 'data') for line in lines)
    assert [line['prompt_id'] for line in lines[::3]] == manifest['prompt_ids'] and manifest['seed'] == 0
    assert manifest['generators'].keys() == {'data', 'self-1', 'self-2'}
    past = load_checkpoint(out / 'selves', '0001.pt')['model']
    assert manifest['generators']['self-1'] == answers.weights_hash(past)
    rows = {row['post_id']: row['history'] for row in toy_rows('train', 40, 0)}
    assert all(line['prompt'] == rows[line['prompt_id']] for line in lines)


def test_the_method_in_the_readme(tmp_path, monkeypatch):
    """Its code as it stands: log 2 at first, and dpo's run where no ranking has a third answer."""
    text = (ROOT / 'README.md').read_text()
    code = re.search(r'```python\n(def collect_extremes.*?)```', text, re.DOTALL)[1]
    monkeypatch.setattr(preference, 'METHODS', dict(preference.METHODS))
    exec(code, vars(preference))
    monkeypatch.delitem(vars(preference), 'collect_extremes')
    preference.main(config(tmp_path / 'all', 'extremes', iterations=1, sft_weight=0.0))
    first = metrics(tmp_path / 'all', 'train')[0]
    assert first['loss'] == pytest.approx(math.log(2), abs=1e-5) and first['chance_loss'] == pytest.approx(math.log(2))

    lines, pick = {}, prepare_shp.pick_groups
    monkeypatch.setattr(preference, 'pick_groups', lambda *args: [
        group._replace(answers=group.answers[:2]) for group in pick(*args)])
    for method in ('extremes', 'dpo'):
        preference.main(config(tmp_path / method, method, iterations=1, max_answers=0))
        lines[method] = metrics(tmp_path / method, 'train')
    assert lines['extremes'] == lines['dpo']


# PPO ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [{}, dict(moment_order=2, renormalize_over='batch')])
def test_first_minibatch_of_ppo(tmp_path, changes):
    """Ratio 1, KL 0, value 0, and each prompt's returns average 0, in float32, to 1e-4."""
    run, _ = a_run(tmp_path, 'ppo', answers_per_prompt=6, **changes)
    batch, facts = preference.collect_rollouts(run, 0)
    loss, stats = preference.ppo_loss(run, on_device(run, batch), whole_step_of(batch))
    micro = on_device(run, batch)
    log_p = answers.answer_token_log_prob(run, run.trained['model'], run.trained['model'], micro)
    assert ((log_p - micro['old_log_p']).exp() - 1).abs().max() < 1e-4
    assert stats['ratio_first'].item() == pytest.approx(1, abs=1e-5) and abs(facts['train_kl']) < 1e-4
    assert stats['clip_fraction'] == 0 and abs(stats['update_kl']) < 1e-6 and (batch['value'] == 0).all()
    inside = torch.arange(batch['answer'].shape[2]) < batch['answer_length'][..., None]
    whitened = batch['advantage'][inside]
    assert whitened.mean().abs() < 1e-5 and whitened.std() == pytest.approx(1, rel=1e-2)
    last = batch['returns'].gather(2, batch['answer_length'][..., None] - 1)[..., 0]
    mean = last.mean(1) if run.cfg.renormalize_over == 'prompt' else last.mean()
    assert mean.abs().max() < 1e-4 and last.square().mean() == pytest.approx(1, abs=0.4)
    # the raw reward: the reward model's, less the penalty where an answer did not end
    scorer = run.frozen['reward_model']
    for g, k, prompt, answer in texts(batch):
        with torch.no_grad():
            r = slow_reward(scorer, prompt, answer).item() - (answer[-1] != 256)
        assert batch['reward'][g, k].item() == pytest.approx(r, abs=1e-5)


def test_advantages_are_gae_of_the_penalised_rewards(tmp_path):
    """By hand, with a policy that has left its start and a critic that says something."""
    run, start = a_run(tmp_path, 'ppo', beta=0.3, gamma=0.9, gae_lambda=0.8)
    with torch.no_grad():
        for p in [*run.trained['model'].parameters(), *run.trained['critic'].parameters()]:
            p += 0.05 * torch.randn_like(p)
    batch, _ = preference.collect_rollouts(run, 1)
    policy, critic, reference = run.trained['model'], run.trained['critic'], answers.make_gpt(start)
    renormalized = preference.renormalize_reward(batch['reward'], 3).reward
    returns = []
    with torch.no_grad():
        for g, k, prompt, answer in texts(batch):
            ratio = slow_log_p(policy, prompt, answer) - slow_log_p(reference, prompt, answer)
            value = (critic(torch.tensor([prompt + answer]))[0][0, len(prompt) - 1:-1] + critic.offset).tolist()
            reward = (-0.3 * ratio).tolist()
            reward[-1] += renormalized[g, k].item()
            after = 0.0
            for t in reversed(range(len(answer))):
                delta = reward[t] + 0.9 * (value[t + 1] if t + 1 < len(answer) else 0.0) - value[t]
                after = delta + 0.9 * 0.8 * after
                returns.append((batch['returns'][g, k, t].item(), after + value[t]))
    got, expected = zip(*returns)
    assert got == pytest.approx(expected, abs=1e-4)


def test_a_bandit_is_solved(tmp_path, monkeypatch):
    """One token, a reward for one of them, beta = 0: its probability goes above 0.95."""
    monkeypatch.setattr(preference, 'rewards', lambda run, scorer, batch: (batch['answer'][..., 0] == ord('S')).float())
    cfg = config(tmp_path / 'run', 'ppo', beta=0.0, max_new_tokens=1, missing_eot_penalty=0.0, iterations=25,
                 answers_per_prompt=32, moment_order=2, learning_rate=3e-3, min_lr=3e-3, eval_interval=1000,
                 kl_stop=0.0)
    preference.main(cfg)
    ask = torch.tensor([prepare_shp.encoding('bytes').encode_ordinary(prepare_shp.render('Rusty pan, why me?', '')[0])])
    before, after = (answers.make_gpt(load_checkpoint(where, 'best.pt')) for where in ('start', tmp_path / 'run'))
    with torch.no_grad():
        before, after = (m.logits(m(ask))[0, -1].softmax(-1)[ord('S')].item() for m in (before, after))
    assert before < 0.5 and after > 0.95


def test_all_of_policy_and_critic_move_and_the_reward_model_does_not(tmp_path):
    preference.main(config(tmp_path / 'run', 'ppo'))
    first, last = load_checkpoint('reward', 'best.pt')['reward_model'], load_checkpoint(tmp_path / 'run', 'best.pt')
    start = load_checkpoint('start', 'best.pt')['model']
    for name, w in last['critic'].items():
        before = first[name] if name.startswith('gpt.') else torch.zeros_like(w)
        assert 'lm_head' in name or not torch.equal(w, before), name
    assert all(not torch.equal(w, start[name]) for name, w in last['model'].items())
    assert 'reward_model' not in last


def test_kl_stop_ends_an_iteration(tmp_path, capsys):
    preference.main(config(tmp_path / 'run', 'ppo', kl_stop=1e-9, learning_rate=1e-2, warmup_iters=0, inner_epochs=3))
    lines = metrics(tmp_path / 'run', 'train')
    # the first update of an iteration finds the ratios at 1, the second one does not
    assert [(line['iteration'], line['step']) for line in lines] == [(0, 1), (0, 6), (1, 7), (1, 12), (2, 13), (2, 18)]
    assert [line['step'] for line in metrics(tmp_path / 'run', 'eval')] == [0, 6, 12, 18]
    assert capsys.readouterr().out.count('above kl_stop') == 3
    cfg = config(tmp_path / 'run', 'ppo', kl_stop=1e-9, learning_rate=1e-2, warmup_iters=0, inner_epochs=3, max_iters=8)
    preference.main(replace(cfg, out_dir=str(tmp_path / 'short')))
    preference.main(replace(cfg, out_dir=str(tmp_path / 'short'), resume=True))  # it did not run past its end
    assert load_checkpoint(tmp_path / 'short')['step'] == 8


# The loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('method', METHODS)
def test_files_metrics_and_the_first_loss(tmp_path, method, capsys):
    out = tmp_path / 'run'
    preference.main(config(out, method))
    printed = capsys.readouterr().out
    names = {p.name for p in out.iterdir()}
    assert names == {'best.pt', 'ckpt_00000008.pt', 'ckpt_00000012.pt', 'config.json', 'metrics.jsonl', 'iterations',
                     'preference.png', 'samples.jsonl', 'selves'}
    lines, evals = metrics(out, 'train'), metrics(out, 'eval')
    assert [line['step'] for line in lines] == list(range(1, 13)) and [line['step'] for line in evals] == [0, 4, 8, 12]
    assert {'iteration', 'loss', 'grad_norm', 'lr', 'tokens', 'sampled_tokens'} <= set(lines[0])
    assert {'rank_accuracy', 'rank_accuracy_logp', 'margin', 'chosen_logp', 'rejected_logp', 'kl', 'entropy',
            'answer_length', 'eot_rate', 'rank_accuracy_length', 'rank_accuracy_bag'} <= set(evals[0])
    if method == 'ppo':
        assert {'train_reward', 'renormalized_residual', 'exact_groups', 'clip_fraction', 'value_loss',
                'explained_variance', 'ratio_first'} <= set(lines[0]) and 'reward' in evals[0]
        assert lines[0]['ratio_first'] == pytest.approx(1, abs=1e-4)
    else:  # equal scores: log K!
        assert lines[0]['loss'] == pytest.approx(lines[0]['chance_loss'], abs=1e-4)
        assert 'first update: loss' in printed
    if method == 'distill':
        assert {'reward_data', 'reward_teacher', 'reward_self', 'reward_agrees'} <= set(evals[0])
        assert lines[0]['loss'] == pytest.approx(math.log(6), abs=1e-4)
    assert evals[0]['rank_accuracy'] == 0.5 and abs(evals[0]['kl']) < 1e-4
    assert evals[-1]['margin'] != 0 and (evals[-1]['kl'] > 0) == (method != 'reward')
    assert '  before ' in printed and '  after  ' in printed
    steps = [json.loads(line)['step'] for line in (out / 'samples.jsonl').read_text().splitlines()]
    assert steps == [0] * 6 + [4] * 6 + [8] * 6 + [12] * 6
    talk = sample.Config(out_dir=str(out), prompt='Rusty pan, why me?', max_new_tokens=5, device='cpu')
    if method == 'reward':
        with pytest.raises(Refusal, match='is a reward run: it judges answers and writes none'):
            sample.main(talk)
    else:
        sample.main(talk)
        assert 'Rusty pan, why me?' in capsys.readouterr().out


def assert_same_run(a, b):
    for event in ('train', 'eval'):
        assert metrics(a, event) == metrics(b, event)
    assert (a / 'samples.jsonl').read_bytes() == (b / 'samples.jsonl').read_bytes()
    for path in (a / 'iterations').glob('*.jsonl'):
        assert path.read_bytes() == (b / 'iterations' / path.name).read_bytes()
    a, b = load_checkpoint(a), load_checkpoint(b)
    assert a.keys() == b.keys() and a['step'] == b['step'] and a['selves'] == b['selves']
    for part in ('model', 'critic', 'reward_model'):
        for name, w in a.get(part, {}).items():
            assert torch.equal(w, b[part][name]), name
    for mine, other in zip(a['optimizer']['state'].values(), b['optimizer']['state'].values()):
        assert all(torch.equal(mine[k], other[k]) for k in mine)


@pytest.mark.parametrize('method', METHODS)
def test_resume_is_bit_exact(tmp_path, method):
    """Stopped inside an iteration, at its end, and at a checkpoint of the schedule: the same run as uninterrupted."""
    cfg = config(tmp_path / 'whole', method, micro_groups=3)
    preference.main(cfg)
    out = tmp_path / 'stopped'
    for stop in (3, 4, 8, 10):
        preference.main(replace(cfg, out_dir=str(out), stop_step=stop, resume=stop > 3))
        assert load_checkpoint(out)['step'] == stop
    preference.main(replace(cfg, out_dir=str(out), resume=True))
    assert_same_run(tmp_path / 'whole', out)


def command(out_dir, method, *more, ranks=1, **changes):
    options = [f'--{k}={v}' for k, v in {**SMALL, **METHODS[method], **changes, 'out_dir': out_dir,
                                        'method': method}.items()]
    launch = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', '--standalone'] if ranks > 1 else []
    return [sys.executable, *launch, str(ROOT / 'preference.py'), *options, *more]


@pytest.mark.parametrize('method', ['spin', 'ppo', *(pytest.param(name, marks=pytest.mark.soak) for name in METHODS
                                                     if name not in ('spin', 'ppo'))])
def test_two_ranks_equal_one(tmp_path, method):
    """The same losses and evaluations with 2 gloo ranks, which hand over to one process and take over again."""
    options = dict(groups_per_iteration=10, groups_per_step=5, micro_groups=2)
    preference.main(config(tmp_path / 'one', method, **options))
    two = tmp_path / 'two'
    succeed(command(two, method, '--stop_step=3', ranks=2, **options))
    preference.main(config(two, method, resume=True, stop_step=5, **options))
    succeed(command(two, method, '--resume=True', ranks=2, **options))
    for event in ('train', 'eval'):
        one, two = metrics(tmp_path / 'one', event), metrics(tmp_path / 'two', event)
        assert [line['step'] for line in one] == [line['step'] for line in two]
        for a, b in zip(one, two):
            assert a.keys() == b.keys()
            for key in a.keys() - {'event'}:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3 if key != 'lr' else 0), key
    for i in range(3):
        a, b = ((tmp_path / name / 'iterations' / f'{i:04d}.json').read_text() for name in ('one', 'two'))
        assert json.loads(a)['prompt_ids'] == json.loads(b)['prompt_ids']


@pytest.mark.parametrize('where, call, interval', [('sample', 1, 4), ('sample', 3, 4), ('sample', 3, 100),
                                                   ('evaluate', 3, 4), ('ranking_loss', 3, 100)])
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path, monkeypatch, where, call, interval):
    """SIGTERM in a collection, the first too, in an evaluation and in an update; with and without checkpoints between.
    """
    cfg = config(tmp_path / 'whole', 'spin', eval_interval=interval)
    preference.main(cfg)
    sound, calls = getattr(preference, where), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return sound(*args)

    out = tmp_path / 'stopped'
    with monkeypatch.context() as patch:
        patch.setattr(preference, where, interrupted)
        if where == 'ranking_loss':
            patch.setitem(preference.METHODS, 'spin', preference.METHODS['spin']._replace(loss=interrupted))
        with pytest.raises(SystemExit) as end:
            preference.main(replace(cfg, out_dir=str(out)))
    assert end.value.code == 143 and load_checkpoint(out)['step'] < 12
    preference.main(replace(cfg, out_dir=str(out), resume=True))
    assert_same_run(tmp_path / 'whole', out)


def test_more_ranks_than_groups(tmp_path):
    """A rank that has nothing to judge waits for the one that has."""
    done = subprocess.run(command(tmp_path / 'run', 'dpo', ranks=2, eval_groups=1, eval_samples=1, iterations=1),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_collection_that_was_touched_is_refused(tmp_path):
    cfg, out = config(tmp_path / 'run', 'spin'), tmp_path / 'run'
    preference.main(replace(cfg, stop_step=6))
    path = out / 'iterations' / '0001.pt'
    whole = path.read_bytes()
    for damage in (whole[:-7], whole[:5000] + b'?' + whole[5001:], b''):
        path.write_bytes(damage)
        with pytest.raises(Refusal, match='0001.pt is missing or not the one that the checkpoint was trained on'):
            preference.main(replace(cfg, resume=True))
    path.write_bytes(whole)
    preference.main(replace(cfg, resume=True))


def test_selfplay_ends_within_the_noise_and_not_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preference, 'MARGIN_GROUPS', 8)  # two iterations' later halves
    idle = config(tmp_path / 'run', 'spin', learning_rate=0.0, min_lr=0.0, margin_stop=2.0, warmup_iters=0)
    preference.main(idle)
    assert 'self-play ends after iteration 1' in capsys.readouterr().out
    assert load_checkpoint(tmp_path / 'run')['step'] == 8 and metrics(tmp_path / 'run', 'eval')[-1]['step'] == 8
    preference.main(replace(idle, resume=True))
    assert load_checkpoint(tmp_path / 'run')['step'] == 8  # and stays ended
    told = config(tmp_path / 'told', 'spin', learning_rate=1e-2, margin_stop=2.0, warmup_iters=0,
                  groups_per_iteration=16, groups_per_step=2, stop_step=17)
    preference.main(told)  # a hardly trained start is told from data at once, and self-play goes on
    found, = [line for line in metrics(tmp_path / 'told', 'train') if 'self_margin_mean' in line]
    assert found['step'] == 16 and found['self_margin_mean'] > 2 * found['self_margin_error'] > 0
    assert load_checkpoint(tmp_path / 'told')['step'] == 17


def test_mean_and_error():
    x = torch.randn(50, dtype=torch.float64)
    mean, error = preference.mean_and_error(50, x.sum().item(), x.square().sum().item())
    assert (mean, error) == pytest.approx((x.mean().item(), x.std(correction=0).item() / 50 ** 0.5))


@torch.no_grad()
def test_evaluation_by_brute_force(tmp_path, monkeypatch):
    """One held-out answer and one sample at a time, with all logits at once; on the toy's own questions."""
    run, start = a_run(tmp_path, 'dpo', max_answers=0)
    run.step, run.cfg = 1, replace(run.cfg, source='toy')
    for p in run.trained['model'].parameters():
        p += 0.03 * torch.randn_like(p)
    policy, reference = run.trained['model'], answers.make_gpt(start)
    log = types.SimpleNamespace(lines=[], write=lambda event, **line: log.lines.append(line))
    got = evaluate.evaluate(run, log)
    pairs, logps, chosen, rejected = [], [], [], []
    for group in evaluate.held_out(run):
        log_p = [slow_log_p(policy, group.prompt, a).sum().item() for a in group.answers]
        ref = [slow_log_p(reference, group.prompt, a).sum().item() for a in group.answers]
        score = [0.1 * (a - b) for a, b in zip(log_p, ref)]
        pairs += [a - b for a, b in combinations(score, 2)]
        logps += [a > b for a, b in combinations(log_p, 2)]
        chosen.append(log_p[0])
        rejected.append(log_p[-1])
    mean = lambda values: sum(values) / len(values)
    expected = dict(rank_accuracy=mean([gap > 0 for gap in pairs]), margin=mean(pairs), rank_accuracy_logp=mean(logps),
                    chosen_logp=mean(chosen), rejected_logp=mean(rejected))
    groups = answers.shorten(run, evaluate.held_out_posts(run))
    uniform = torch.from_numpy(np.random.default_rng((5, 0, evaluate.EVAL, 0)).random((6, 20), 'float32'))
    drawn = policy.generate([group.prompt for group in groups], 20, eot=256, uniform=uniform)
    kl, entropy = [], []
    for group, answer in zip(groups, drawn):
        kl.append((slow_log_p(policy, group.prompt, answer) - slow_log_p(reference, group.prompt, answer)).sum().item())
        logits = policy.logits(policy(torch.tensor([group.prompt + answer[:-1]])))
        log_p = logits[0, len(group.prompt) - 1:].log_softmax(-1)
        entropy += (-(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)).tolist()
    posts = [answers.post_of(run, group.prompt) for group in groups]
    expected |= dict(kl=mean(kl), entropy=mean(entropy), eot_rate=mean([answer[-1] == 256 for answer in drawn]),
                     answer_length=mean([len(answer) - (answer[-1] == 256) for answer in drawn]), true_quality=mean(
                         [quality(post, answers.text_of(run, answer)) for post, answer in zip(posts, drawn)]))
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert [line['prompt'] for line in log.lines] == posts and len(set(posts)) == 6


def test_reward_run_is_centred_and_loads_into_ppo(tmp_path):
    run, _ = a_run(tmp_path, 'ppo', eval_split='test')  # the fixture's
    groups = answers.shorten(run, evaluate.held_out_posts(run))
    start = answers.make_gpt(load_checkpoint('start', 'best.pt'))
    drawn = answers.sample(run, start, [group.prompt for group in groups], evaluate.EVAL, 0)
    batch = group_batch([group._replace(answers=[answer]) for group, answer in zip(groups, drawn)], 80)
    assert answers.rewards(run, run.frozen['reward_model'], batch).mean().abs() < 1e-5
    saved = load_checkpoint('reward', 'best.pt')['reward_model']
    for name, w in run.frozen['reward_model'].state_dict().items():
        assert torch.equal(w, saved[name])
    for name, w in run.trained['critic'].gpt.state_dict().items():
        frozen = run.frozen['reward_model'].gpt.state_dict()[name]
        assert torch.equal(w, saved[f'gpt.{name}']) and w.data_ptr() != frozen.data_ptr()
    assert (run.trained['critic'].head.weight == 0).all()


def test_untied_heads_train_too(tmp_path):
    """A reward model never uses its language head; under DDP that must not hang or fail."""
    train.main(train.Config(dataset='small', source='rows', encoding='bytes', out_dir=str(tmp_path / 'start'),
                            n_layer=1, n_head=2, n_embd=16, block_size=80, max_iters=2, tie_weights=False,
                            device='cpu'))
    subprocess.run(command(tmp_path / 'run', 'reward', ranks=2, init_from=tmp_path / 'start', iterations=1), check=True,
                   capture_output=True)


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes, words', [
    (dict(init_from='out/toy_start'), 'init_from=out/toy_start holds no checkpoint; make one with: python train.py'),
    (dict(init_from='reward'), 'init_from=reward is a reward run and has no policy'),
    (dict(method='ppo', reward_model=''), "reward_model='' holds no checkpoint; make one with: python preference.py"),
    (dict(method='ppo', reward_model='start'), 'reward_model=start is no reward run'),
    (dict(method='distill', teacher=''), 'distill needs a teacher'),
    (dict(method='distill', teacher='out/nobody'), 'teacher=out/nobody holds no checkpoint'),
    (dict(method='distill', teacher='typo.jsonl'), 'teacher=typo.jsonl cannot be read .No such file'),
    (dict(method='distill', teacher='reward'), 'teacher=reward is a reward run'),
    *((dict(method=method, **{option: f'foreign_{of}'}), f'{option}=foreign_{of} speaks gpt2, but the data are in bytes')
      for method, option, of in (('dpo', 'init_from', 'start'), ('distill', 'teacher', 'start'),
                                 ('ppo', 'reward_model', 'reward'))),
    (dict(method='distill', reward_model='short'), 'reward_model=short reads 40 tokens, and the policy writes'),
    (dict(max_new_tokens=80), 'max_new_tokens=80 leave no room for a prompt'),
    (dict(dataset='nowhere'), 'data/nowhere is missing'),
    (dict(groups_per_iteration=0, groups_per_step=1000), 'rankings, fewer than groups_per_step=1000')])
def test_refusals_are_sentences_and_cost_nothing(tmp_path, changes, words):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'ckpt_00000001.pt').write_bytes(b'an earlier run')
    if changes.get('reward_model') == 'short' and not Path('short').exists():
        start = load_checkpoint('reward', 'best.pt')
        Path('short').mkdir()
        weights = dict(start['reward_model'])
        weights['gpt.transformer.wpe.weight'] = weights['gpt.transformer.wpe.weight'][:40].clone()
        save_checkpoint('short', dict(start, reward_model=weights, model_config=dict(
            start['model_config'], block_size=40)), 'best.pt')
    for name in changes.values():
        if str(name).startswith('foreign_') and not Path(name).exists():
            Path(name).mkdir()
            state = load_checkpoint(name.removeprefix('foreign_'), 'best.pt')
            save_checkpoint(name, dict(state, encoding='gpt2'), 'best.pt')
    with pytest.raises(Refusal, match=words):
        preference.main(config(tmp_path / 'run', overwrite=True, **changes))
    assert [path.read_bytes() for path in (tmp_path / 'run').iterdir()] == [b'an earlier run']


def test_commands_in_refusals_name_the_config(tmp_path, monkeypatch):
    """Where a config of that name is at hand, it is the remedy."""
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'toy_start.py').write_text('')
    (tmp_path / 'config' / 'toy_reward.py').write_text('')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match='make one with: python train.py config/toy_start.py'):
        load_run(preference.Config(), 'init_from')
    with pytest.raises(Refusal, match='make one with: python preference.py config/toy_reward.py'):
        load_run(preference.Config(reward_model='out/toy_reward'), 'reward_model')
    with pytest.raises(Refusal, match='with: python train.py --out_dir=out/mine --dataset=x --source=hub, or'):
        load_run(preference.Config(init_from='out/mine', dataset='x'), 'init_from')


def test_a_critic_may_be_larger_than_its_policy(tmp_path, capsys):
    """It is a copy of the reward model, which may read more tokens; the run can be loaded and resumed all the same."""
    changes = dict(block_size=60, iterations=2)
    preference.main(config(tmp_path / 'whole', 'ppo', **changes))
    preference.main(config(tmp_path / 'cut', 'ppo', stop_step=3, **changes))
    preference.main(config(tmp_path / 'cut', 'ppo', resume=True, **changes))
    assert 'resumed at step 3 (exact)' in capsys.readouterr().out
    assert_same_run(tmp_path / 'whole', tmp_path / 'cut')
    state = load_checkpoint(tmp_path / 'whole', 'best.pt')
    assert (state['model_config']['block_size'], state['critic_config']['block_size']) == (60, 80)


def test_resume_of_another_run_is_refused(tmp_path):
    out = tmp_path / 'run'
    preference.main(config(out, stop_step=1))
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with pytest.raises(Refusal, match='another run: method dpo there, spin here'):
        preference.main(config(out, 'spin', resume=True))
    with pytest.raises(Refusal, match='groups_per_step 4 there, 2 here; ask for the same'):
        preference.main(config(out, resume=True, groups_per_step=2))
    with pytest.raises(Refusal, match='is not empty; add --resume=True'):
        preference.main(config(out))
    for option, where in (('init_from', 'start'), ('reward_model', 'reward'), ('teacher', 'teacher')):
        with pytest.raises(Refusal, match=f'{option} and out_dir are both'):
            preference.main(config(where, 'distill', overwrite=True))
    with pytest.raises(Refusal, match='init_from and out_dir are both'):
        preference.main(config('start', init_from='start/best.pt', overwrite=True))
    with pytest.raises(Refusal, match='another run: method dpo there, none here'):
        train.main(train.Config(dataset='small', source='rows', encoding='bytes', out_dir=str(out), resume=True,
                                n_layer=1, n_embd=32, block_size=80, device='cpu'))
    assert before == {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def test_resume_with_another_teacher_or_reward_model_is_refused(tmp_path):
    for name, seed in (('first', 0), ('second', 1)):
        preference.main(config(tmp_path / name, 'reward', iterations=1, seed=seed, eval_split='test'))
    for method in ('ppo', 'distill'):
        cfg = config(tmp_path / method, method, stop_step=1, reward_model=str(tmp_path / 'first'))
        preference.main(cfg)
        with pytest.raises(Refusal, match='cannot resume, its reward_model is another one now'):
            preference.main(replace(cfg, resume=True, reward_model=str(tmp_path / 'second')))
    with pytest.raises(Refusal, match='cannot resume, its teacher is another one now'):
        preference.main(replace(cfg, resume=True, teacher='start'))


def test_logged_log_probabilities_are_plain(tmp_path):
    """token_order changes the loss, not what iterations/ tells of an answer."""
    run, _ = a_run(tmp_path, 'spin', token_order=2)
    batch, _ = preference.collect_self_play(run, 0)
    with torch.no_grad():
        for g, k, prompt, answer in texts(batch):
            if k == 1:
                log_p = slow_log_p(run.trained['model'], prompt, answer)
                assert batch['log_p'][g, 1].item() == pytest.approx(log_p.sum().item(), rel=1e-5)
                assert batch['ref_log_p'][g, 1].item() == pytest.approx(-taylor_loss(log_p, 2).sum().item(), rel=1e-4)


@pytest.mark.parametrize('options, words', [
    (['--method=pdo'], "method='pdo' is not one of dpo, spin, distill, reward, ppo"),
    (['--moment_order=4'], 'kurtosis >= skewness^2 + 1'),
    (['--groups_per_iteration=10', '--groups_per_step=4'], 'is no multiple of groups_per_step=4'),
    (['--gamma=1.5'], 'gamma=1.5 is above 1'), (['--moment_order=3', '--answers_per_prompt=3'], 'use 4 or more'),
    (['--max_answers=1'], 'leaves nothing to rank'), (['--opponent=2'], 'did you mean opponents?')])
def test_wrong_options_exit_with_2_and_a_sentence(options, words):
    done = subprocess.run([sys.executable, str(ROOT / 'preference.py'), *options], capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and 'Traceback' not in done.stderr
