"""Teaches a trained model preferences: one loop, five methods. Read METHODS, then `main`.

    python preference.py config/toy_dpo.py                        # Plackett-Luce DPO over K ranked answers
    python preference.py config/toy_spin.py                       # self-play against one or several past selves
    python preference.py config/toy_distill.py                    # data > teacher > self
    python preference.py config/toy_reward.py                     # a reward model
    python preference.py config/toy_ppo.py                        # PPO with a renormalised reward
    torchrun --nproc_per_node=8 preference.py config/spin_shp.py  # any of them, on 8 GPUs

Letters: G prompts, K answers a prompt, A tokens an answer, T tokens of a packed row. pi_0 is the start, pi_t the policy
when iteration t begins.
"""
import contextlib
import copy
import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
import prepare_shp
from answers import (DATA, TEACHER, Run, Stopped, answer_log_prob, answer_token_log_prob, answer_tokens,
                     for_all_groups, group_batch, head_log_prob,
                     load_pi_0, log_prob_under, make_gpt, make_scorer, micro_batch, note_self, packed_rewards,
                     past_self, post_of, rewards, sample, shares, shorten, text_of, token_values, weights_hash)
from configurator import Refusal, at_least, at_most
from evaluate import (evaluate, held_out, report_between, report_nothing, report_policy_reward, report_reward,
                   show_samples)
from losses import (gae, implicit_reward, masked_mean, plackett_luce_loss, ppo_policy_loss, ppo_value_loss,
                    renormalize_reward)
from extras.teachers import open_teacher
from model import ScalarHead
from prepare_shp import pick_groups
from runs import (NUMBERED, Metrics, RunConfig, StopSignal, Updates, check_resume, check_vocabulary, checkpoints,
                  describe, entries, finish, load_checkpoint, load_run, lr_at, open_run, restoring, save_checkpoint,
                  setup, start_files, write_whole)

MARGIN_GROUPS = 512  # groups over which the lead of data over self is judged against its noise


@dataclass(frozen=True)
class Config(RunConfig):
    out_dir: str = 'out/preference'    # checkpoints, metrics.jsonl, samples.jsonl, iterations/ and the plot go here
    method: str = 'dpo'                # dpo, spin, distill, reward or ppo
    init_from: str = 'out/toy_start'   # the start: folder of a run or of a Hugging Face GPT-2, or gpt2, ..., gpt2-xl
    block_size: int = 0                # crop the start's context to so many tokens; 0 = as it is
    beta: float = 0.1                  # strength of the KL to the reference
    max_iters: int = 0                 # updates at most; 0 = those of all iterations
    iterations: int = 1                # collections of answers, each followed by updates on them
    groups_per_iteration: int = 0      # prompts collected at a time, over all ranks; 0 = all of train, held in memory
    inner_epochs: int = 1              # passes over a collection
    groups_per_step: int = 32          # prompts an update, over all ranks
    micro_groups: int = 0              # prompts at a time, per rank; 0 = as many as keep attention's masks small
    max_answers: int = 0               # dpo, reward: answers per ranking, at random from a longer one; 0 = all
    rank_order: int = 0                # n of T_n on the stages of a ranking; 0 = plain Plackett-Luce
    token_order: int = 0               # m of -T_m in place of the tokens' log p, policy and reference alike; 0 = log p
    sft_weight: float = 0.0            # of the best answer's cross-entropy beside the ranking loss
    max_new_tokens: int = 128          # of a sampled answer
    sample_batch: int = 64             # answers sampled at a time, per rank
    opponents: int = 1                 # spin: past selves that answer, the latest first
    margin_stop: float = 2.0           # end self-play where data lead self by fewer standard errors; 0 = never
    teacher: str = ''                  # distill: folder of a run, JSON lines of completions, or a Hugging Face model
    reward_read: str = 'last'          # reward: the scalar at an answer's last token; sum: over its tokens
    reward_model: str = ''             # ppo, and for distill's report: folder of a reward run
    answers_per_prompt: int = 8        # ppo: samples that a reward is renormalised over
    moment_order: int = 2              # ppo: n of the renormalised reward, 2 or 3
    monotone: bool = True              # ppo: a renormalised reward keeps the order of the answers
    renormalize_over: str = 'prompt'   # ppo: prompt, or batch for all answers of an iteration at once
    missing_eot_penalty: float = 1.0   # ppo: off the reward of an answer that did not end, before renormalising
    gamma: float = 1.0                 # ppo: discount
    gae_lambda: float = 0.95           # ppo: of the advantages
    clip_range: float = 0.2            # ppo: of probability ratios and of values
    kl_stop: float = 0.1               # ppo: KL to the sampling policy, nats a token, that ends an iteration; 0 = none
    eval_groups: int = 1000            # held-out rankings that are judged; 0 = all
    eval_samples: int = 256            # held-out prompts that are answered; 0 = none
    learning_rate: float = 1e-5        # after warm-up
    min_lr: float = 1e-6               # at the cosine's end; equal to learning_rate = constant
    warmup_iters: int = 20             # steps of linear warm-up
    weight_decay: float = 0.0          # AdamW's, on matrices only
    compile: bool | None = False       # torch.compile the updates; rows differ in length from step to step

    def check(self):
        yield from super().check()
        if self.method not in METHODS:
            yield f"method='{self.method}' is not one of {', '.join(METHODS)}"
        if self.renormalize_over not in ('prompt', 'batch'):
            yield f"renormalize_over='{self.renormalize_over}' is not one of prompt, batch"
        if self.reward_read not in ('last', 'sum'):
            yield f"reward_read='{self.reward_read}' is not one of last, sum"
        yield from at_least(self, 1, 'iterations', 'inner_epochs', 'groups_per_step', 'max_new_tokens', 'sample_batch',
                            'opponents')
        yield from at_least(self, 2, 'answers_per_prompt')
        yield from at_least(self, 0, 'block_size', 'max_iters', 'beta', 'groups_per_iteration', 'micro_groups',
                            'max_answers', 'rank_order', 'token_order', 'sft_weight', 'margin_stop',
                            'missing_eot_penalty', 'gamma', 'gae_lambda', 'clip_range', 'kl_stop', 'eval_groups',
                            'eval_samples')
        yield from at_most(self, 1, 'gamma', 'gae_lambda')
        yield from at_most(self, 10 ** 9, 'max_iters', 'iterations')
        yield from at_most(self, 1000, 'rank_order', 'token_order')
        if self.moment_order == 3 and self.renormalize_over == 'prompt':
            if self.answers_per_prompt < 4:
                yield (f'moment_order=3 has no solution for answers_per_prompt={self.answers_per_prompt}: the skewness '
                       'of K numbers is at most (K-2)/sqrt(K-1); use 4 or more')
        if self.max_answers == 1:
            yield 'max_answers=1 leaves nothing to rank; use 2 or more, or 0 for all'
        if self.groups_per_step >= 1 and self.groups_per_iteration % self.groups_per_step:
            yield (f'groups_per_iteration={self.groups_per_iteration} is no multiple of groups_per_step='
                   f'{self.groups_per_step}')
        try:
            renormalize_reward(torch.zeros(1, 2), self.moment_order, self.monotone)
        except ValueError as error:
            yield f'moment_order: {error}'


# build: modules to train and modules kept frozen, by name -------------------------------------------------------------


def build_policy(cfg, start, encoding, groups):
    # no reference among the frozen: its log-probabilities are computed once, when answers are collected
    return dict(model=make_gpt(start)), {}


def build_student(cfg, start, encoding, groups):
    judge = frozen_reward_model(cfg, start, encoding) if cfg.reward_model else {}
    return dict(model=make_gpt(start)), dict(judge, teacher=open_teacher(cfg, encoding, groups))


def build_reward(cfg, start, encoding, groups):
    scorer = ScalarHead(make_gpt(start), cfg.reward_read)
    scorer.offset.requires_grad_(False)  # evaluate.report_reward centres it
    return dict(reward_model=scorer), {}


def build_actor_critic(cfg, start, encoding, groups):
    frozen = frozen_reward_model(cfg, start, encoding)
    # rewards average zero for every prompt: the critic knows what the reward model reads, and says 0 at first
    critic = ScalarHead(copy.deepcopy(frozen['reward_model'].gpt).requires_grad_(True))
    return dict(model=make_gpt(start), critic=critic), frozen


def frozen_reward_model(cfg, start, encoding):
    state = load_run(cfg, 'reward_model')
    if 'reward_model' not in state:
        raise Refusal(f'reward_model={cfg.reward_model} is no reward run; make one with: '
                      'python preference.py config/toy_reward.py')
    check_vocabulary(state, 'reward_model', cfg.reward_model, encoding)
    block, needed = state['model_config']['block_size'], start['model_config']['block_size']
    if block < needed:
        raise Refusal(f'reward_model={cfg.reward_model} reads {block} tokens, and the policy writes up to {needed}; '
                      'train one from a start with as large a block')
    return dict(reward_model=make_scorer(state).requires_grad_(False))


# collect: an iteration's batch, and facts for the log -----------------------------------------------------------------


def collect_rankings(run, iteration):
    """The data's rankings. No reference here: a reward model needs none."""
    picked = pick_groups(run.groups['train'], run.cfg.seed, iteration, iteration_size(run), run.cfg.max_answers)
    batch = group_batch(picked, run.block_size)
    return dict(batch, generator=torch.full_like(batch['answer_length'], DATA)), {}


def collect_rankings_and_reference(run, iteration):
    batch, facts = collect_rankings(run, iteration)
    return dict(batch, ref_log_p=log_prob_under(run, past_self(run, 0), batch, run.cfg.token_order)), facts


def collect_self_play(run, iteration):
    """data > pi_t > pi_{t-1} > ... > pi_{t-H+1}; the reference is pi_t itself."""
    selves = range(iteration, max(iteration - run.cfg.opponents, -1), -1)
    return collect_league(run, iteration, {}, selves)


def collect_distillation(run, iteration):
    """data > teacher > pi_t; the reference is pi_t."""
    return collect_league(run, iteration, {TEACHER: run.frozen['teacher']}, [iteration])


def collect_league(run, iteration, teachers, selves):
    """Each ranking's best answer of the data above those of `teachers`, above samples of `selves`, in that order.

    A data answer is cut where a sampled one would be, so that neither length nor ending tells who wrote it.
    """
    cfg, policy = run.cfg, run.trained['model']
    if iteration:
        note_self(run, iteration, keep=cfg.opponents > 1 and not teachers)
    whole = pick_groups(run.groups['train'], cfg.seed, iteration, iteration_size(run))
    picked = shorten(run, whole)
    ranked = {DATA: [group.answers[0] for group in whole]}
    for who, teacher in teachers.items():
        ranked[who] = teacher.answers(run, whole, iteration)
    log_p, sampled = torch.zeros(len(picked), 1 + len(teachers) + len(selves)), 0
    for t in selves:
        model = policy if t == iteration else past_self(run, t)
        answers = sample(run, model, [group.prompt for group in picked], iteration, t)
        sampled += sum(map(len, answers))
        own = group_batch([group._replace(answers=[answer]) for group, answer in zip(picked, answers)], run.block_size)
        log_p[:, len(ranked)] = log_prob_under(run, model, own)[:, 0]
        ranked[t] = answers
    picked = [group._replace(answers=list(answers)) for group, *answers in zip(picked, *ranked.values())]
    batch = group_batch(picked, run.block_size, cfg.max_new_tokens)
    generator = torch.tensor(list(ranked)).expand(len(picked), -1).contiguous()
    batch |= dict(generator=generator, log_p=log_p, ref_log_p=log_prob_under(run, policy, batch, cfg.token_order))
    return batch, dict(new_tokens=sampled)


def collect_rollouts(run, iteration):
    """K samples of pi_t to each prompt, scored, renormalised, and turned into advantages.

    Token t of an answer earns -beta (log pi - log pi_0), the last one R too. Advantages are whitened over all tokens of
    the collection. Log-probabilities are those of the training path, so that the first update sees ratios of 1.
    """
    cfg, policy, critic = run.cfg, run.trained['model'], run.trained['critic']
    note_self(run, iteration)
    picked = shorten(run, pick_groups(run.groups['train'], cfg.seed, iteration, iteration_size(run)))
    K = cfg.answers_per_prompt
    answers = sample(run, policy, [group.prompt for group in picked for _ in range(K)], iteration, iteration)
    batch = group_batch([group._replace(answers=answers[i * K:(i + 1) * K]) for i, group in enumerate(picked)],
                        run.block_size)
    length, start = batch['answer_length'], past_self(run, 0)
    inside = answer_tokens(batch)
    old_log_p = for_all_groups(run, batch, lambda micro: answer_token_log_prob(run, policy, policy, micro))
    start_log_p = for_all_groups(run, batch, lambda micro: answer_token_log_prob(run, start, start, micro))
    value = for_all_groups(run, batch, lambda micro: token_values(run, critic, micro))
    raw = rewards(run, run.frozen['reward_model'], batch)
    last = batch['answer'].gather(2, length[..., None] - 1)[..., 0]
    raw -= cfg.missing_eot_penalty * (last != run.encoding.eot_token)
    over = raw if cfg.renormalize_over == 'prompt' else raw.view(1, -1)
    renormalized = renormalize_reward(over, cfg.moment_order, cfg.monotone)

    log_ratio = old_log_p - start_log_p
    reward = -cfg.beta * log_ratio
    reward.scatter_add_(2, length[..., None] - 1, renormalized.reward.view_as(raw)[..., None])
    advantage = gae(*(x.flatten(0, 1) for x in (reward, value, inside)), cfg.gamma, cfg.gae_lambda).view_as(reward)
    returns = advantage + value
    mean = masked_mean(advantage, inside)
    std = masked_mean((advantage - mean) ** 2, inside).sqrt()
    spread = masked_mean((returns - masked_mean(returns, inside)) ** 2, inside)
    batch |= dict(generator=torch.full_like(length, iteration), log_p=old_log_p.sum(-1), reward=raw,
                  old_log_p=old_log_p, value=value, returns=returns, advantage=(advantage - mean) / (std + 1e-8))
    facts = dict(train_reward=raw.mean(), train_kl=log_ratio.sum(-1).mean(),
                 renormalized_residual=renormalized.residual.mean(), exact_groups=renormalized.exact.float().mean(),
                 explained_variance=1 - std ** 2 / spread.clamp(min=1e-12))
    return batch, dict({name: fact.item() for name, fact in facts.items()}, new_tokens=sum(map(len, answers)))


def iteration_size(run):
    """cfg's number, or as many whole updates as one pass over the data fills."""
    count = run.cfg.groups_per_iteration or len(run.groups['train'].prompts) // run.cfg.groups_per_step * \
        run.cfg.groups_per_step
    if not count:
        raise Refusal(f"the data hold {len(run.groups['train'].prompts)} rankings, fewer than groups_per_step="
                      f'{run.cfg.groups_per_step}; use a smaller --groups_per_step, or prepare more data')
    return count


# score and loss -------------------------------------------------------------------------------------------------------


def implicit_score(run, batch):
    """s = beta (log pi(y|x) - log pi_ref(y|x)), (G, K), and the policy's log p of the tokens, (G, K, A)."""
    log_p = answer_token_log_prob(run, run.trained['model'], run.forward('model'), batch)
    own = answer_log_prob(log_p, run.cfg.token_order)
    return implicit_reward(own, batch['ref_log_p'], run.cfg.beta), log_p


def reward_score(run, batch):
    """s = r, (G, K), and log p of the tokens by the trunk's language head, (G, K, A), None where nobody needs it."""
    scorer = run.trained['reward_model']
    reward, packed, hidden = packed_rewards(run, scorer, run.forward('reward_model'), batch)
    with run.machine.autocast():
        return reward, head_log_prob(scorer.gpt, packed, hidden) if run.cfg.sft_weight else None


def ranking_loss(run, batch, whole_step):
    """sum_k T_n(p_k) over the stages of each ranking, averaged over the step's groups: dpo, spin, distill, reward.

    sft_weight adds the best answers' cross-entropy a token (Pang et al. 2024; for rewards Yang et al. 2024).
    """
    score, log_p = run.method.score(run, batch)
    valid = batch['answer_length'] > 0
    loss = plackett_luce_loss(score, run.cfg.rank_order, valid).sum() / whole_step['groups']
    worst = score.gather(1, valid.sum(1, keepdim=True) - 1)
    chance = plackett_luce_loss(torch.zeros_like(score), run.cfg.rank_order, valid).sum() / whole_step['groups']
    stats = dict(loss=loss, chance_loss=chance, train_margin=(score[:, :1] - worst).sum() / whole_step['groups'])
    own = batch['generator'] == whole_step['iteration']
    if own.any():  # self-play: how well data are told from what pi_t wrote
        margin = score[:, 0] - score[own]
        stats |= dict(self_margin=margin.sum() / whole_step['groups'],
                      self_square=margin.square().sum() / whole_step['groups'])
    if run.cfg.sft_weight:
        stats['sft_loss'] = -log_p[:, 0].sum() / whole_step['best_tokens']
        loss = loss + run.cfg.sft_weight * stats['sft_loss']
    return loss, stats


def ppo_loss(run, batch, whole_step):
    """Clipped policy and value losses, averaged over the step's answer tokens. No KL here: it is part of the reward."""
    cfg, inside = run.cfg, answer_tokens(batch)
    log_p = answer_token_log_prob(run, run.trained['model'], run.forward('model'), batch)
    value = token_values(run, run.forward('critic'), batch)

    def mean(x):
        return x.masked_fill(~inside, 0.0).sum() / whole_step['tokens']

    policy_loss = mean(ppo_policy_loss(log_p, batch['old_log_p'], batch['advantage'], cfg.clip_range))
    value_loss = mean(ppo_value_loss(value, batch['value'], batch['returns'], cfg.clip_range))
    with torch.no_grad():
        log_ratio = log_p - batch['old_log_p']
        stats = dict(loss=policy_loss, value_loss=value_loss,
                     clip_fraction=mean(((log_ratio.exp() - 1).abs() > cfg.clip_range).float()),
                     update_kl=mean(log_ratio.expm1() - log_ratio))  # >= 0 and unbiased, Schulman's k3
        if whole_step['update'] == 0:
            stats['ratio_first'] = mean(log_ratio.exp())
    # two modules with a gradient each: the sum needs no weights
    return policy_loss + value_loss, stats


class Method(NamedTuple):
    """A row of METHODS. The loop below names no method; what only some of them bring, it finds by its name."""
    build: Callable    # (cfg, start, encoding, train's groups) -> (modules to train, modules kept frozen)
    collect: Callable  # (run, iteration) -> (batch, facts): tensors with G in front; numbers for the log
    loss: Callable     # (run, micro-batch, whole_step) -> (loss, stats), sums over the former over counts of the latter
    score: Callable    # (run, micro-batch) -> scores (G, K), log p (G, K, A)
    report: Callable   # (run, samples, posts, their rewards) -> what it adds to an evaluation
    best: str          # the metric by which best.pt is chosen; '' = the latest is the best


METHODS = dict(
    dpo=Method(build_policy, collect_rankings_and_reference, ranking_loss, implicit_score, report_nothing,
               'rank_accuracy'),
    spin=Method(build_policy, collect_self_play, ranking_loss, implicit_score, report_nothing, ''),
    distill=Method(build_student, collect_distillation, ranking_loss, implicit_score, report_between, ''),
    reward=Method(build_reward, collect_rankings, ranking_loss, reward_score, report_reward, 'rank_accuracy'),
    ppo=Method(build_actor_critic, collect_rollouts, ppo_loss, implicit_score, report_policy_reward, ''))


# Collections on disk --------------------------------------------------------------------------------------------------


def write_iteration(run, iteration, batch, facts):
    """iterations/<i>.pt (exact), .json (manifest) and, where answers were sampled, .jsonl; -> sha256 of the first."""
    folder, oldest = Path(run.cfg.out_dir) / 'iterations', oldest_iteration(run)
    path = save_checkpoint(folder, dict(step=run.step, batch=batch), f'{iteration:04d}.pt')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for old in folder.glob('*.pt'):  # no checkpoint can ask for it any more
        if old.stem.isdigit() and int(old.stem) < oldest:
            old.unlink()
    for old in (folder.parent / 'selves').glob('*.pt'):
        if old.stem.isdigit() and 0 < int(old.stem) <= oldest - run.cfg.opponents:
            old.unlink()
    names = {DATA: 'data', TEACHER: 'teacher'}
    generators = {names.get(t, f'self-{t}'): run.selves.get(t) for t in batch['generator'].unique().tolist()}
    ids = run.groups['train'].ids
    prompt_ids = [str(ids[g]) for g in batch['group']]
    if 'log_p' in batch:
        lines = []
        for g, id in enumerate(prompt_ids):
            prompt = post_of(run, batch['prompt'][g, :batch['prompt_length'][g]].tolist())
            for k, t in enumerate(batch['generator'][g].tolist()):
                answer = batch['answer'][g, k, :batch['answer_length'][g, k]].tolist()
                line = dict(prompt=prompt, completion=text_of(run, answer), ended=answer[-1] == run.encoding.eot_token,
                            rank=k if 'reward' not in batch else None, generator=names.get(t, f'self-{t}'),
                            iteration=iteration, prompt_id=id, log_prob=batch['log_p'][g, k].item() if t >= 0 else None,
                            reward=batch['reward'][g, k].item() if 'reward' in batch else None)
                lines.append(json.dumps({key: x for key, x in line.items() if x is not None}) + '\n')
        write_whole(folder / f'{iteration:04d}.jsonl', ''.join(lines))
    write_whole(folder / f'{iteration:04d}.json', json.dumps(dict(
        iteration=iteration, method=run.cfg.method, seed=run.cfg.seed, step=run.step, batch_sha256=digest,
        generators=generators, start=run.selves[0], facts=facts, prompt_ids=prompt_ids), indent=1))
    return digest


def oldest_iteration(run):
    steps = [int(path.stem.removeprefix('ckpt_')) for path in checkpoints(run.cfg.out_dir)]
    return min(steps, default=0) // steps_per_iteration(run)


def read_iteration(run, iteration, digest):
    path = Path(run.cfg.out_dir) / 'iterations' / f'{iteration:04d}.pt'
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise Refusal(f'{path} is missing or not the one that the checkpoint was trained on; its answers cannot be '
                      'sampled again: start anew with --overwrite=True')
    return load_checkpoint(path)['batch']


def steps_per_iteration(run):
    return run.cfg.inner_epochs * (iteration_size(run) // run.cfg.groups_per_step)


def step_rows(run, batch, update):
    """The groups of an iteration's update: a part of a permutation that is a function of (seed, iteration, epoch)."""
    count, size = len(batch['group']), run.cfg.groups_per_step
    epoch, part = divmod(update, count // size)
    order = np.random.default_rng((4, run.cfg.seed, run.step // steps_per_iteration(run), epoch)).permutation(count)
    return torch.from_numpy(order[part * size:(part + 1) * size])


# The loop -------------------------------------------------------------------------------------------------------------


def main(cfg):
    method, machine = METHODS[cfg.method], setup(cfg.device, cfg.dtype, cfg.compile)
    if cfg.groups_per_step < machine.world_size:
        raise Refusal(f'groups_per_step={cfg.groups_per_step} prompts do not go round {machine.world_size} ranks; '
                      f'use --groups_per_step={machine.world_size} or more')
    machine.on_rank_0(lambda: prepare_shp.open_dataset(cfg))  # makes the toy data where it is missing
    data = prepare_shp.open_dataset(cfg)
    cfg = replace(cfg, source=data.meta['source'], columns=tuple(data.meta['columns']))  # what a run need not name
    encoding, out = prepare_shp.encoding(data.meta['encoding']), Path(cfg.out_dir)
    resuming = cfg.resume and checkpoints(out)
    start = load_pi_0(cfg, resuming, encoding)
    groups = {split: data.groups(split) for split in {'train', cfg.eval_split}}
    trained, frozen = method.build(cfg, start, encoding, groups['train'])
    for module in (*trained.values(), *frozen.values()):
        module.to(machine.device)
    model_config = next(iter(trained.values())).config
    run = Run(cfg, method, machine, groups, encoding, trained, frozen, {}, StopSignal(),
              selves={0: weights_hash(start['model'])})
    if cfg.max_new_tokens >= run.block_size:
        raise Refusal(f'max_new_tokens={cfg.max_new_tokens} leave no room for a prompt in the block of '
                      f'{run.block_size} tokens of {cfg.init_from}; use fewer')
    held_out(run)  # what is too little is refused here, before an earlier run is overwritten
    room, lengths = run.block_size - cfg.max_new_tokens, groups['train'].prompt_lengths()
    if long := int((lengths > room).sum()):
        machine.print(f'note: {long:,} of {len(lengths):,} prompts lose their beginning, for the block of '
                      f'{run.block_size} tokens has {room} of them beside max_new_tokens')
    per_iteration = steps_per_iteration(run)
    cfg = run.cfg = replace(cfg, max_iters=min(cfg.max_iters or math.inf, cfg.iterations * per_iteration))

    updates = Updates(list(trained.values()), cfg, machine)
    described = dict(describe(cfg, machine, model_config, data),
                     **{f'{name}_config': asdict(module.config) for name, module in list(trained.items())[1:]},
                     frozen={name: weights_hash(module.state_dict()) for name, module in frozen.items()})
    tokens, seconds, best, evaluated, ended, lead, batch, facts = 0, 0.0, -math.inf, -1, False, [0, 0.0, 0.0], None, {}
    with open_run(cfg, machine) as state, run.stop as stop:
        if state is not None:
            with restoring(cfg):
                machine.print(f'resumed at step {state["step"]} ({check_resume(state, described)})')
                for name, module in trained.items():
                    module.load_state_dict(state[name])
                updates.load_state_dict(state)
                tokens, seconds, best, evaluated, ended, lead, facts, digest = entries(
                    state, tokens=0, seconds=0.0, best=0.0, evaluated=0, ended=False, lead=lead, facts={'': 0.0},
                    batch_sha256='')
                run.step, run.sampled_tokens, run.selves = entries(state, step=0, sampled_tokens=0, selves={0: ''})
                past_self(run, 0)  # refuses another one
            if run.step % per_iteration:
                batch = read_iteration(run, run.step // per_iteration, digest)
            del state
        machine.on_rank_0(lambda: start_files(cfg, run.step))
        machine.on_rank_0(lambda: start_folders(run, start))
        metrics, samples_log = Metrics(cfg, machine, run.step), Metrics(cfg, machine, run.step, 'samples.jsonl')
        run.ddp = {name: torch.compile(module, dynamic=True) if machine.compile else module
                   for name, module in trained.items()}
        if machine.world_size > 1:
            run.ddp = {name: DistributedDataParallel(module, gradient_as_bucket_view=True)
                       for name, module in run.ddp.items()}
        machine.print(f'{cfg.method}: ' +
                      ', '.join(f'{name} of {sum(p.numel() for p in module.parameters()):,} parameters'
                                for name, module in {**trained, **frozen}.items()) +
                      f'\n{cfg.iterations} iteration(s) of {iteration_size(run):,} prompts, each with '
                      f'{per_iteration} updates on {cfg.groups_per_step} prompts: {cfg.max_iters:,} updates')

        def weights():
            return dict(described, step=run.step, tokens=tokens,
                        **{name: module.state_dict() for name, module in trained.items()})

        def save_state():
            # a resume at step 0 evaluates again, for it cuts metrics.jsonl there
            state = dict(weights(), seconds=time.perf_counter() - began, best=best,
                         evaluated=evaluated if run.step else -1, ended=ended,
                         lead=lead, facts=facts, sampled_tokens=run.sampled_tokens, selves=run.selves,
                         batch_sha256=digest if run.step % per_iteration else '', **updates.state_dict())
            machine.on_rank_0(lambda: save_checkpoint(cfg.out_dir, state))  # nobody goes on before the file is whole

        def save_if_best(result):
            nonlocal best
            # the test split chooses nothing
            value = result[method.best] if method.best and cfg.eval_split != 'test' else run.step
            if value > best:
                best = value
                save_checkpoint(cfg.out_dir, weights(), 'best.pt')

        began, saved_step = time.perf_counter() - seconds, run.step if run.step else None
        mark = tokens + run.sampled_tokens, time.perf_counter()
        with contextlib.suppress(Stopped):
            while True:
                done = ended or run.step >= cfg.max_iters
                if done and evaluated < run.step or run.step // cfg.eval_interval > evaluated // cfg.eval_interval:
                    if run.step and run.step != saved_step:
                        save_state()
                        saved_step = run.step
                    result = evaluate(run, samples_log)
                    evaluated = run.step
                    metrics.write('eval', step=run.step, tokens=tokens, sampled_tokens=run.sampled_tokens,
                                  seconds=time.perf_counter() - began, iteration=run.step // per_iteration, **result)
                    machine.print(f'step {run.step} evaluation: {in_words(result)}')
                    machine.on_rank_0(lambda: save_if_best(result))
                    mark = tokens + run.sampled_tokens, time.perf_counter()
                if done or cfg.stop_step and run.step >= cfg.stop_step:
                    break

                iteration, update = divmod(run.step, per_iteration)
                if update == 0:
                    since = time.perf_counter()
                    batch, facts = method.collect(run, iteration)
                    new_tokens = facts.pop('new_tokens', 0)
                    run.sampled_tokens += new_tokens
                    digest = machine.on_rank_0(lambda: write_iteration(run, iteration, batch, facts))
                    machine.print(f'iteration {iteration}: {len(batch["group"]):,} prompts and '
                                  f'{new_tokens:,} sampled tokens, collected in '
                                  f'{time.perf_counter() - since:.1f} s')
                rows = step_rows(run, batch, update)
                whole_step = dict(iteration=iteration, update=update, groups=len(rows),
                                  tokens=int(batch['answer_length'][rows].sum()),
                                  best_tokens=int(batch['answer_length'][rows, 0].sum()))
                stats = accumulate(run, updates, batch, rows, whole_step)
                lr, grad_norm = lr_at(run.step, cfg), updates.step(run.step + 1, save_state)
                run.step += 1
                tokens += whole_step['tokens']
                sums = machine.sum(torch.stack(list(stats.values())).tolist() + stop.flags())
                stats, signals = dict(zip(stats, sums)), sums[len(stats):]
                facts |= {name: value for name, value in stats.items() if name.endswith('_first')}
                if run.step == 1:
                    machine.print(f'first update: {in_words(stats)}')

                if stats.get('update_kl', 0.0) > (cfg.kl_stop or math.inf) and run.step % per_iteration:
                    machine.print(f'step {run.step}: KL to the sampling policy {stats["update_kl"]:.3f}, above '
                                  'kl_stop; on with the next iteration')
                    run.step = min((iteration + 1) * per_iteration, cfg.max_iters)
                per_pass = per_iteration // cfg.inner_epochs
                # groups that were not trained on yet, by a policy that has had time to leave pi_t
                if 'self_margin' in stats and per_pass <= 2 * update < 2 * per_pass and run.step > cfg.warmup_iters:
                    lead = [a + len(rows) * b for a, b in zip(lead, (1, stats['self_margin'], stats['self_square']))]
                if run.step % per_iteration == 0 and lead[0] >= MARGIN_GROUPS:
                    mean, error = mean_and_error(*lead)
                    facts |= dict(self_margin_mean=mean, self_margin_error=error)
                    lead, ended = [0, 0.0, 0.0], cfg.margin_stop > 0 and mean <= cfg.margin_stop * error
                    if ended:
                        machine.print(f'self-play ends after iteration {iteration}: data lead self by {mean:.4f} +- '
                                      f'{error:.4f}, within the noise (the last loss is {stats["loss"]:.4f}, that of '
                                      f'chance {stats["chance_loss"]:.4f})')

                if run.step % cfg.log_interval == 0 or run.step % per_iteration == 0:
                    now, total = time.perf_counter(), tokens + run.sampled_tokens
                    speed, mark = (total - mark[0]) / (now - mark[1]), (total, now)
                    eta = (cfg.max_iters - run.step) * (now - began) / run.step
                    metrics.write('train', step=run.step, tokens=tokens, sampled_tokens=run.sampled_tokens,
                                  seconds=now - began, iteration=iteration, grad_norm=grad_norm,
                                  lr=lr, tokens_per_second=speed, skipped=updates.skipped,
                                  **{**facts, **stats})
                    machine.print(f'step {run.step}/{cfg.max_iters} {run.step / cfg.max_iters:.0%} '
                                  f'{in_words({**facts, **stats})}, norm {grad_norm:.2f}, {speed / 1000:.1f}k tok/s, '
                                  f'ETA {timedelta(seconds=round(eta))}')
                if any(signals):
                    break
        if run.step != saved_step:
            save_state()
        done = ended or run.step >= cfg.max_iters
        if machine.rank == 0 and done:
            show_samples(out)
        finish(cfg, machine, stop, run.step, done, time.perf_counter() - began)


def start_folders(run, start):
    """iterations/ and selves/, on rank 0; a new run finds them empty and keeps pi_0."""
    iterations, selves = (Path(run.cfg.out_dir) / name for name in ('iterations', 'selves'))
    for folder in (iterations, selves):
        folder.mkdir(exist_ok=True)
    if run.step == 0:
        kept = save_checkpoint(selves, dict(start, step=0), '0000.pt')
        for path in (*iterations.glob(NUMBERED), *selves.glob(NUMBERED)):
            if path != kept:
                path.unlink()


def accumulate(run, updates, batch, rows, whole_step):
    """The gradient of a step's groups, this rank's share of them in micro-batches -> the sums of their stats."""
    parts, totals = shares(run, batch, rows), {}
    for i, part in enumerate(parts):
        with contextlib.ExitStack() as stack:
            if run.machine.world_size > 1 and i + 1 < len(parts):  # gradients travel once a step
                for module in run.ddp.values():
                    stack.enter_context(module.no_sync())
            loss, stats = run.method.loss(run, micro_batch(run, batch, part), whole_step)
            updates.backward(loss * run.machine.world_size)  # DDP averages over ranks; the mean of the step is wanted
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + value.detach()
    return totals


def mean_and_error(count, total, squares):
    """Mean and standard error of `count` numbers with this sum and this sum of squares."""
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean ** 2, 0.0) / count)


def in_words(numbers):
    return ', '.join(f'{name} {value:.4f}' for name, value in numbers.items())


if __name__ == '__main__':
    configurator.run(main, Config)
