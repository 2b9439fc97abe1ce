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
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
import plot
import prepare_shp
import toy_shp
from configurator import Refusal, at_least
from losses import (gae, implicit_reward, linear_token_log_prob, masked_mean, plackett_luce_loss, ppo_policy_loss,
                    ppo_value_loss, renormalize_reward, taylor_loss)
from model import GPT, GPTConfig, ScalarHead, load_checkpoint, save_checkpoint
from prepare_shp import group_batch, pack, pick_groups, visible
from train import (ECE_BINS, LOGIT_ROWS, Metrics, RunConfig, StopSignal, Updates, check_resume, lr_at, open_run,
                   peak_memory, setup, start_files, write_whole)

DATA, TEACHER = -1, -2  # who wrote an answer; t >= 0 is pi_t
EVAL_SEED = 0           # which held-out groups are judged is the same in all runs
EVAL = 2 ** 31          # the iteration whose random numbers all evaluations share
SHOWN = 4               # posts whose samples are printed before and after
MARGIN_GROUPS = 512     # groups over which the lead of data over self is judged against its noise
KEPT = 16               # samples of an evaluation that samples.jsonl keeps


@dataclass(frozen=True)
class Config(RunConfig):
    out_dir: str = 'out/preference'    # checkpoints, metrics.jsonl, samples.jsonl, iterations/ and the plot go here
    method: str = 'dpo'                # dpo, spin, distill, reward or ppo
    init_from: str = 'out/toy_start'   # the start: folder of a train.py or preference.py run
    beta: float = 0.1                  # strength of the KL to the reference
    max_iters: int = 0                 # updates at most; 0 = those of all iterations
    iterations: int = 1                # collections of answers, each followed by updates on them
    groups_per_iteration: int = 0      # prompts collected at a time, over all ranks; 0 = all of train
    inner_epochs: int = 1              # passes over a collection
    groups_per_step: int = 32          # prompts an update, over all ranks
    micro_groups: int = 0              # prompts at a time, per rank, as memory allows; 0 = the rank's whole share
    max_answers: int = 0               # dpo, reward: answers per ranking, at random from a longer one; 0 = all
    rank_order: int = 0                # n of T_n on the stages of a ranking; 0 = plain Plackett-Luce
    token_order: int = 0               # m of -T_m in place of the tokens' log p, policy and reference alike; 0 = log p
    sft_weight: float = 0.0            # of the best answer's cross-entropy beside the ranking loss
    max_new_tokens: int = 128          # of a sampled answer
    sample_batch: int = 64             # answers sampled at a time, per rank
    opponents: int = 1                 # spin: past selves that answer, the latest first
    margin_stop: float = 2.0           # end self-play at a data-over-self margin below this many standard errors; 0 = never
    teacher: str = ''                  # distill: folder of a run, JSON lines of completions, or a Hugging Face causal LM
    reward_read: str = 'last'          # reward: the scalar at an answer's last token; sum: over its tokens
    reward_model: str = ''             # ppo, and for distill's report: folder of a reward run
    answers_per_prompt: int = 8        # ppo: samples that a reward is renormalised over
    moment_order: int = 2              # ppo: n of the renormalised reward, 2 or 3
    moments: tuple[float, ...] = ()    # ppo: explicit targets (m3,) or (m3, m4) instead
    monotone: bool = True              # ppo: a renormalised reward keeps the order of the answers
    renormalize_over: str = 'prompt'   # ppo: prompt, or batch for all answers of an iteration at once
    missing_eot_penalty: float = 1.0   # ppo: off the reward of an answer that did not end, before renormalising
    gamma: float = 1.0                 # ppo: discount
    gae_lambda: float = 0.95           # ppo: of the advantages
    clip_range: float = 0.2            # ppo: of probability ratios and of values
    kl_stop: float = 0.1               # ppo: KL from the sampling policy, nats a token, that ends an iteration; 0 = none
    eval_groups: int = 1000            # held-out rankings that are judged; 0 = all
    eval_samples: int = 256            # held-out prompts that are answered; 0 = none
    compile: bool | None = False       # torch.compile the model; rows differ in length from step to step

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
        yield from at_least(self, 0, 'max_iters', 'beta', 'groups_per_iteration', 'micro_groups', 'max_answers', 'rank_order',
                            'token_order', 'sft_weight', 'margin_stop', 'missing_eot_penalty', 'gamma', 'gae_lambda', 'clip_range',
                            'kl_stop', 'eval_groups', 'eval_samples')
        if self.max_answers == 1:
            yield 'max_answers=1 leaves nothing to rank; use 2 or more, or 0 for all'
        if self.groups_per_step >= 1 and self.groups_per_iteration % self.groups_per_step:
            yield (f'groups_per_iteration={self.groups_per_iteration} is no multiple of groups_per_step='
                   f'{self.groups_per_step}')
        try:
            renormalize_reward(torch.zeros(1, 2), self.moment_order, self.monotone, self.moments or None)
        except ValueError as error:
            yield f'moment_order, moments: {error}'


@dataclass
class Run:
    """What the methods share: the run's modules by name, its data, and where it stands."""
    cfg: Config
    machine: NamedTuple
    groups: dict            # split -> prepare_shp.Groups
    encoding: object
    trained: dict           # name -> module; 'model' is the policy
    frozen: dict            # name -> module
    ddp: dict               # trained modules as the loss calls them
    stop: StopSignal
    step: int = 0
    sampled_tokens: int = 0
    selves: dict = field(default_factory=dict)  # t -> sha256 of the weights of pi_t
    known: dict = field(default_factory=dict)   # what evaluations need again and again: made once

    @property
    def block_size(self):
        return next(iter(self.trained.values())).config.block_size

    def forward(self, name):
        """The trained module under its DDP wrapper where gradients are to be shared."""
        return self.ddp[name] if torch.is_grad_enabled() else self.trained[name]


class Stopped(Exception):
    """A signal came during a collection or an evaluation; all ranks leave it together."""


# Answers as tensors --------------------------------------------------------------------------------------------------


def micro_batch(run, batch, rows):
    """The groups `rows` of a batch on the device, trimmed to their own longest prompt, ranking and answer."""
    P = int(batch['prompt_length'][rows].max())
    K = int((batch['answer_length'][rows] > 0).sum(1).max())
    A = int(batch['answer_length'][rows].max())
    trimmed = {name: x[rows] for name, x in batch.items()}
    for name, x in trimmed.items():  # (G,), (G, P) of the prompt, else (G, K) or (G, K, A)
        trimmed[name] = x[:, :P] if name == 'prompt' else x[:, :K, :A] if x.ndim == 3 else x[:, :K] if x.ndim == 2 else x
    return {name: x.to(run.machine.device, non_blocking=True) for name, x in trimmed.items()}


def by_length(batch, rows=None):
    """Row numbers sorted by the tokens they pack, so that micro-batches hold little padding."""
    tokens = batch['prompt_length'] + batch['answer_length'].sum(1)
    rows = torch.arange(len(tokens)) if rows is None else rows
    return rows[tokens[rows].argsort(stable=True)]


@torch.no_grad()
def for_all_groups(run, batch, function):
    """function(micro-batch) -> (g, K[, A]) over all groups of a batch, shared among the ranks.

    -> (G, K[, A]) on the CPU and the same on every rank, 0 where trimmed. Raises Stopped after a signal.
    """
    parts = []
    for rows in by_length(batch)[run.machine.rank::run.machine.world_size].split(run.cfg.micro_groups or 64):
        if run.stop.number:
            break
        parts.append((rows, function(micro_batch(run, batch, rows)).float().cpu()))
    leave_together(run)
    parts = sum(run.machine.gather(parts), [])
    result = torch.zeros(batch['answer'].shape[:parts[0][1].ndim])
    for rows, part in parts:
        result[(rows, *map(slice, part.shape[1:]))] = part
    return result


def leave_together(run):
    if any(run.machine.sum(run.stop.flags())):
        raise Stopped


def token_log_prob(run, model, forward, batch):
    """log p of each token of each answer given its prompt, (G, K, A), 0 in the padding. `forward`: model, or its DDP."""
    packed = pack(batch)
    with run.machine.autocast():
        return head_log_prob(model, packed, forward(packed.idx, positions=packed.positions, mask=packed.mask))


def head_log_prob(model, packed, hidden):
    """The head sees only answer tokens, and no (tokens, vocabulary) tensor is held."""
    log_p = linear_token_log_prob(hidden.flatten(0, 1), model.lm_head.weight, packed.targets.flatten(),
                                  model.config.vocab_size)
    return packed.tokens(log_p.view_as(packed.idx))


def answer_log_prob(log_p, token_order=0):
    """log pi(y|x) = sum_t log p_t over an answer's tokens, its end-of-text included: (G, K, A) -> (G, K), nats.

    token_order m: -sum_t T_m(p_t) in its place. m = 0 is the log-probability itself.
    """
    return (-taylor_loss(log_p, token_order) if token_order else log_p).sum(-1)


def log_prob_under(run, model, batch):
    """log pi(y|x) of all answers under a frozen model, with the run's token_order: (G, K), by the training path."""
    return for_all_groups(run, batch, lambda micro: answer_log_prob(token_log_prob(run, model, model, micro),
                                                                    run.cfg.token_order))


def rewards(run, scorer, batch):
    """r of all answers under a ScalarHead: (G, K), 0 where there is no answer."""
    return for_all_groups(run, batch, lambda micro: packed_rewards(run, scorer, scorer, micro)[0])


def packed_rewards(run, scorer, forward, batch):
    """-> r (G, K), and the hidden states it was read from, with their Packed."""
    packed = pack(batch)
    with run.machine.autocast():
        scalar, offset, hidden = forward(packed.idx, positions=packed.positions, mask=packed.mask)
    reward = packed.ends(scalar) if scorer.read == 'last' else packed.tokens(scalar, after=1).sum(-1)
    return (reward + offset).masked_fill(batch['answer_length'] == 0, 0.0), packed, hidden


def sample(run, model, prompts, iteration, who):
    """One answer of `model` to each prompt at temperature 1: lists of ids -> lists of ids, the same on every rank.

    Shared among the ranks. Uniform numbers are a function of (seed, iteration, who, place), so that the number of ranks
    changes nothing but rounding. Raises Stopped after a signal.
    """
    cfg, eot = run.cfg, run.encoding.eot_token
    uniform = np.random.default_rng((5, cfg.seed, iteration, who)).random((len(prompts), cfg.max_new_tokens), np.float32)
    uniform = torch.from_numpy(uniform)
    mine = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[run.machine.rank::run.machine.world_size]
    answers, said = {}, time.perf_counter()
    for first in range(0, len(mine), cfg.sample_batch):
        if run.stop.number:
            break
        rows = mine[first:first + cfg.sample_batch]
        with run.machine.autocast():
            new = model.generate([prompts[i] for i in rows], cfg.max_new_tokens, eot=eot, uniform=uniform[rows])
        answers.update(zip(rows, new))
        if time.perf_counter() - said > 30:
            said = time.perf_counter()
            run.machine.print(f'sampled {len(answers):,} of {len(mine):,} answers')
    leave_together(run)
    for others in run.machine.gather(answers):
        answers.update(others)
    return [answers[i] for i in range(len(prompts))]


def shorten(run, groups):
    """Prompts lose their beginning, so that max_new_tokens fit behind them in the block."""
    room = run.block_size - run.cfg.max_new_tokens
    return [group._replace(prompt=group.prompt[-room:]) for group in groups]


def text_of(run, ids):
    return run.encoding.decode([id for id in ids if id != run.encoding.eot_token])


def post_of(run, prompt):
    """The post that a prompt was rendered from."""
    return text_of(run, prompt).removesuffix(prepare_shp.SEPARATOR)


# The start and past selves -------------------------------------------------------------------------------------------


def load_run(folder, option):
    """The weights of another run: its best.pt, else its latest checkpoint. Refuses with the command that makes it."""
    where = Path(folder)
    if where.is_dir() and (where / 'best.pt').exists():
        return load_checkpoint(where, 'best.pt')
    if where.is_file() or list(where.glob('ckpt_*.pt')):
        return load_checkpoint(where)
    config, script = f'config/{where.name}.py', 'preference.py' if option == 'reward_model' else 'train.py'
    command = f'python {script} {config}' if Path(config).is_file() else f'python {script} --out_dir={folder}'
    raise Refusal(f'{option}={folder or repr("")} holds no checkpoint; make one with: {command}, or name the folder of '
                  f'another run with --{option}=DIR')


def make_gpt(state, key='model'):
    """A GPT from a checkpoint, dropout off: log-probabilities of the policy and of its reference must be comparable."""
    gpt = GPT(GPTConfig(**dict(state['model_config'], dropout=0.0)))
    gpt.load_state_dict(state[key])
    return gpt.eval()


def make_scorer(state):
    scorer = ScalarHead(GPT(GPTConfig(**dict(state['model_config'], dropout=0.0))), state['config']['reward_read'])
    scorer.load_state_dict(state['reward_model'])
    return scorer.eval()


def load_start(cfg, resuming, encoding):
    """pi_0: the run init_from, or, when a run is resumed, what it has kept of it."""
    if resuming:
        return load_checkpoint(Path(cfg.out_dir) / 'selves', '0000.pt')
    if Path(cfg.init_from).resolve() == Path(cfg.out_dir).resolve():
        raise Refusal(f'init_from and out_dir are both {cfg.out_dir}; choose another --out_dir')
    state = load_run(cfg.init_from, 'init_from')
    if 'model' not in state:
        raise Refusal(f'init_from={cfg.init_from} is a reward run and has no policy; name the folder of another run')
    check_vocabulary(state, 'init_from', cfg.init_from, encoding)
    return {key: state[key] for key in ('model', 'model_config', 'encoding')}


def weights_hash(weights):
    digest = hashlib.sha256()
    for name, w in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(w.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_vocabulary(state, option, folder, encoding):
    if state['encoding'] != encoding.name or state['model_config']['vocab_size'] != encoding.n_vocab:
        raise Refusal(f"{option}={folder} speaks {state['encoding']}, but the data are in {encoding.name}; train it on "
                      'data of one --encoding')


def note_self(run, t, keep=False):
    """Remembers the policy as it is now, pi_t, by its hash; keep: in selves/ too, for later iterations to play against.
    """
    policy, folder = run.trained['model'], Path(run.cfg.out_dir) / 'selves'
    run.selves[t] = weights_hash(policy.state_dict())
    if keep:
        state = dict(step=run.step, model_config=asdict(policy.config), model=policy.state_dict())
        run.machine.on_rank_0(lambda: save_checkpoint(folder, state, f'{t:04d}.pt'))


def past_self(run, t):
    """pi_t from selves/, frozen; refuses one that is not what the checkpoint says."""
    folder = Path(run.cfg.out_dir) / 'selves'
    state = load_checkpoint(folder, f'{t:04d}.pt')
    if weights_hash(state['model']) != run.selves[t]:
        raise Refusal(f'{folder}/{t:04d}.pt is not the pi_{t} of this run; start anew with --overwrite=True')
    return make_gpt(state).to(run.machine.device)


# build: (modules to train, modules kept frozen), by name --------------------------------------------------------------


def build_policy(cfg, start, encoding):
    # no reference among the frozen: its log-probabilities are computed once, when answers are collected
    return dict(model=make_gpt(start)), {}


def build_student(cfg, start, encoding):
    return dict(model=make_gpt(start)), judge(cfg, encoding) if cfg.reward_model else {}


def build_reward(cfg, start, encoding):
    scorer = ScalarHead(make_gpt(start), cfg.reward_read)
    return dict(reward_model=scorer), {}


def build_actor_critic(cfg, start, encoding):
    frozen = judge(cfg, encoding)
    # Rewards that average zero for every prompt: the critic knows what the reward model reads, and says 0 at first
    critic = ScalarHead(copy.deepcopy(frozen['reward_model'].gpt))
    return dict(model=make_gpt(start), critic=critic), frozen


def judge(cfg, encoding):
    state = load_run(cfg.reward_model, 'reward_model')
    if 'reward_model' not in state:
        raise Refusal(f'reward_model={cfg.reward_model} is no reward run; make one with: '
                      'python preference.py config/toy_reward.py')
    check_vocabulary(state, 'reward_model', cfg.reward_model, encoding)
    return dict(reward_model=make_scorer(state).requires_grad_(False))


# collect: an iteration's batch and facts about it ----------------------------------------------------------------------


def collect_rankings(run, iteration):
    """The data's rankings. No reference here: a reward model needs none."""
    picked = pick_groups(run.groups['train'], run.cfg.seed, iteration, groups_per_iteration(run), run.cfg.max_answers)
    batch = group_batch(picked, run.block_size)
    return dict(batch, generator=torch.full_like(batch['answer_length'], DATA)), {}


def collect_rankings_and_reference(run, iteration):
    batch, facts = collect_rankings(run, iteration)
    return dict(batch, ref_log_p=log_prob_under(run, past_self(run, 0), batch)), facts


def collect_self_play(run, iteration):
    """data > pi_t > pi_{t-1} > ... > pi_{t-H+1}; the reference is pi_t itself."""
    selves = range(iteration, max(iteration - run.cfg.opponents, -1), -1)
    return collect_league(run, iteration, {}, selves)


def collect_distillation(run, iteration):
    """data > teacher > pi_t; the reference is pi_t."""
    return collect_league(run, iteration, {TEACHER: teacher_answers}, [iteration])


def collect_league(run, iteration, teachers, selves):
    """Each prompt's best answer of the data above those of `teachers`, above samples of `selves`, in that order.

    A data answer is cut where a sampled one would be, so that neither length nor ending tells who wrote it.
    """
    cfg, policy = run.cfg, run.trained['model']
    if iteration:
        note_self(run, iteration, keep=cfg.opponents > 1)
    picked = shorten(run, pick_groups(run.groups['train'], cfg.seed, iteration, groups_per_iteration(run)))
    ranked = {DATA: [group.answers[0] for group in picked]}
    for who, ask in teachers.items():
        ranked[who] = ask(run, picked, iteration)
    log_p = torch.zeros(len(picked), 1 + len(teachers) + len(selves))
    for t in selves:
        model = policy if t == iteration else past_self(run, t)
        answers = sample(run, model, [group.prompt for group in picked], iteration, t)
        run.sampled_tokens += sum(map(len, answers))
        own = group_batch([group._replace(answers=[answer]) for group, answer in zip(picked, answers)], run.block_size)
        log_p[:, len(ranked)] = log_prob_under(run, model, own)[:, 0]
        ranked[t] = answers
    picked = [group._replace(answers=list(answers)) for group, *answers in zip(picked, *ranked.values())]
    batch = group_batch(picked, run.block_size, cfg.max_new_tokens)
    generator = torch.tensor(list(ranked)).expand(len(picked), -1).contiguous()
    batch |= dict(generator=generator, log_p=log_p, ref_log_p=log_prob_under(run, policy, batch))
    return batch, {}


def collect_rollouts(run, iteration):
    """K samples of pi_t to each prompt, scored, renormalised, and turned into advantages.

    Token t of an answer earns -beta (log pi - log pi_0), the last one R too. Log-probabilities are those of the
    training path, so that the first update sees ratios of 1.
    """
    cfg, policy, critic = run.cfg, run.trained['model'], run.trained['critic']
    note_self(run, iteration)
    picked = shorten(run, pick_groups(run.groups['train'], cfg.seed, iteration, groups_per_iteration(run)))
    K = cfg.answers_per_prompt
    answers = sample(run, policy, [group.prompt for group in picked for _ in range(K)], iteration, iteration)
    run.sampled_tokens += sum(map(len, answers))
    batch = group_batch([group._replace(answers=answers[i * K:(i + 1) * K]) for i, group in enumerate(picked)],
                        run.block_size)
    length, start = batch['answer_length'], past_self(run, 0)
    inside = torch.arange(batch['answer'].shape[2]) < length[..., None]
    old_log_p = for_all_groups(run, batch, lambda micro: token_log_prob(run, policy, policy, micro))
    start_log_p = for_all_groups(run, batch, lambda micro: token_log_prob(run, start, start, micro))
    value = for_all_groups(run, batch, lambda micro: token_values(run, critic, micro))
    raw = rewards(run, run.frozen['reward_model'], batch)
    last = batch['answer'].gather(2, length[..., None] - 1)[..., 0]
    raw -= cfg.missing_eot_penalty * (last != run.encoding.eot_token)
    over = raw if cfg.renormalize_over == 'prompt' else raw.view(1, -1)
    renormalized = renormalize_reward(over, cfg.moment_order, cfg.monotone, cfg.moments or None)

    log_ratio = old_log_p - start_log_p
    reward = -cfg.beta * log_ratio
    reward.scatter_add_(2, length[..., None] - 1, renormalized.reward.view_as(raw)[..., None])
    advantage = gae(*(x.flatten(0, 1) for x in (reward, value, inside)), cfg.gamma, cfg.gae_lambda).view_as(reward)
    returns = advantage + value
    mean = masked_mean(advantage, inside)
    std = masked_mean((advantage - mean) ** 2, inside).sqrt()
    unexplained = masked_mean((returns - value - mean) ** 2, inside)
    spread = masked_mean((returns - masked_mean(returns, inside)) ** 2, inside)
    batch |= dict(generator=torch.full_like(length, iteration), log_p=old_log_p.sum(-1), reward=raw,
                  old_log_p=old_log_p, value=value, returns=returns, advantage=(advantage - mean) / (std + 1e-8))
    facts = dict(train_reward=raw.mean(), train_kl=log_ratio.sum(-1).mean(),
                 renormalized_residual=renormalized.residual.mean(), exact_groups=renormalized.exact.float().mean(),
                 explained_variance=1 - unexplained / spread.clamp(min=1e-12))
    return batch, {name: fact.item() for name, fact in facts.items()}


def groups_per_iteration(run):
    """cfg's number, or as many whole updates as one pass over the data fills."""
    count = run.cfg.groups_per_iteration or len(run.groups['train'].prompts) // run.cfg.groups_per_step * \
        run.cfg.groups_per_step
    if not count:
        raise Refusal(f"the data hold {len(run.groups['train'].prompts)} rankings, fewer than groups_per_step="
                      f'{run.cfg.groups_per_step}; use a smaller --groups_per_step, or prepare more data')
    return count


# Teachers ------------------------------------------------------------------------------------------------------------


def teacher_answers(run, picked, iteration):
    """The teacher's answer to each group's prompt, as ids of our encoding, closed by end-of-text where it ended.

    The teacher is a run's folder, a file of completions, or else whatever transformers makes of the name.
    """
    where = Path(run.cfg.teacher)
    if not run.cfg.teacher:
        raise Refusal('distill needs a teacher: --teacher=DIR of a run (python train.py config/toy_teacher.py makes '
                      'one), FILE.jsonl of completions, or the name of a Hugging Face causal LM')
    if where.is_file() and where.suffix in ('.json', '.jsonl'):
        return written_answers(run, where, picked)
    if (where / 'config.json').exists() and 'architectures' in json.loads((where / 'config.json').read_text()):
        return hugging_face_answers(run, picked, iteration)
    if where.exists() or where.parts[0] == 'out':
        state = load_run(where, 'teacher')
        check_vocabulary(state, 'teacher', where, run.encoding)
        prompts = [group.prompt[-(state['model_config']['block_size'] - run.cfg.max_new_tokens):] for group in picked]
        return sample(run, make_gpt(state).to(run.machine.device), prompts, iteration, 2 ** 32)
    return hugging_face_answers(run, picked, iteration)


def ids_of(run, completion, ended=True):
    ids = run.encoding.encode_ordinary(completion.strip())[:run.cfg.max_new_tokens]
    return ids + [run.encoding.eot_token] if ended and len(ids) < run.cfg.max_new_tokens else ids


def written_answers(run, path, picked):
    """Completions made elsewhere: JSON lines of {"prompt" or "post_id", "completion"}; "ended": false = cut off."""
    rows, problems = {}, {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            key = row['post_id'] if 'post_id' in row else prepare_shp.render(
                row['prompt'].removesuffix(prepare_shp.SEPARATOR), '')[0]
            if not isinstance(key, str) or not row['completion'].strip():
                raise ValueError
            if key in rows:
                problems.setdefault('of a prompt that has one already', number)
            rows[key] = ids_of(run, row['completion'], row.get('ended', True))
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.setdefault('not {"prompt" or "post_id", "completion"} with text in them', number)
    if problems:
        raise Refusal(f'{path}: ' + ', '.join(f'line {number} is {what}' for what, number in problems.items()))
    found = [rows.get(group.id, rows.get(text_of(run, group.prompt))) for group in picked]
    if missing := sum(answer is None for answer in found):
        raise Refusal(f'{path} has no completion for {missing} of {len(found)} prompts, for example '
                      f'{post_of(run, picked[found.index(None)].prompt)[:80]!r}; write one for each')
    return found


def hugging_face_answers(run, picked, iteration):
    """A causal LM of transformers, in its own tokens: our rendered prompt goes in as text, its answer comes out so."""
    name, cfg, machine = run.cfg.teacher, run.cfg, run.machine
    try:
        import transformers
    except ImportError:
        raise Refusal(f'teacher={name} is no folder of a run and no file, and a Hugging Face model needs '
                      'transformers: pip install transformers') from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side='left')
        model = transformers.AutoModelForCausalLM.from_pretrained(name).to(machine.device).eval()
    except (OSError, ValueError) as error:
        raise Refusal(f'teacher={name} could not be loaded by transformers: {str(error).splitlines()[0]}') from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers = {}
    rows = list(range(len(picked)))[machine.rank::machine.world_size]
    for first in range(0, len(rows), cfg.sample_batch):
        part = rows[first:first + cfg.sample_batch]
        prompts = tokenizer([text_of(run, picked[i].prompt) for i in part], return_tensors='pt', padding=True)
        torch.manual_seed(int(np.random.default_rng((6, cfg.seed, iteration, part[0])).integers(2 ** 63)))
        with torch.no_grad():
            out = model.generate(**prompts.to(machine.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                 max_new_tokens=cfg.max_new_tokens, pad_token_id=tokenizer.pad_token_id)
        for i, ids in zip(part, out[:, prompts['input_ids'].shape[1]:].tolist()):
            ended = tokenizer.eos_token_id in ids
            ids = ids[:ids.index(tokenizer.eos_token_id)] if ended else ids
            answers[i] = ids_of(run, tokenizer.decode(ids, skip_special_tokens=True), ended) or [run.encoding.eot_token]
        if run.stop.number:
            break
    leave_together(run)
    for others in machine.gather(answers):
        answers.update(others)
    return [answers[i] for i in range(len(picked))]


# score and loss ------------------------------------------------------------------------------------------------------


def implicit_score(run, batch):
    """s = beta (log pi(y|x) - log pi_ref(y|x)), (G, K), and the policy's log p of the tokens, (G, K, A)."""
    log_p = token_log_prob(run, run.trained['model'], run.forward('model'), batch)
    own = answer_log_prob(log_p, run.cfg.token_order)
    return implicit_reward(own, batch['ref_log_p'], run.cfg.beta), log_p


def reward_score(run, batch):
    """s = r, (G, K), and log p of the tokens by the trunk's own language head, (G, K, A), None where nobody needs it."""
    scorer = run.trained['reward_model']
    reward, packed, hidden = packed_rewards(run, scorer, run.forward('reward_model'), batch)
    with run.machine.autocast():
        return reward, head_log_prob(scorer.gpt, packed, hidden) if run.cfg.sft_weight else None


def ranking_loss(run, batch, share):
    """sum_k T_n(p_k) over the stages of each ranking, averaged over the step's groups: dpo, spin, distill, reward.

    sft_weight adds the best answers' cross-entropy a token (Pang et al. 2024; for rewards Yang et al. 2024).
    """
    score, log_p = METHODS[run.cfg.method].score(run, batch)
    valid = batch['answer_length'] > 0
    loss = plackett_luce_loss(score, run.cfg.rank_order, valid).sum() / share['groups']
    worst = score.gather(1, valid.sum(1, keepdim=True) - 1)
    chance = plackett_luce_loss(torch.zeros_like(score), run.cfg.rank_order, valid).sum() / share['groups']  # log K!
    stats = dict(loss=loss, chance_loss=chance, train_margin=(score[:, :1] - worst).sum() / share['groups'])
    own = batch['generator'] == share['iteration']
    if own.any():  # self-play: how well data are told from what pi_t wrote
        margin = score[:, 0].double() - score[own].double()
        stats |= dict(self_margin=margin.sum() / share['groups'], self_square=margin.square().sum() / share['groups'])
    if run.cfg.sft_weight:
        stats['sft_loss'] = -log_p[:, 0].sum() / share['best_tokens']
        loss = loss + run.cfg.sft_weight * stats['sft_loss']
    return loss, stats


def token_values(run, critic, batch):
    """V before each token of each answer, (G, K, A)."""
    packed = pack(batch)
    with run.machine.autocast():
        scalar, offset, _ = critic(packed.idx, positions=packed.positions, mask=packed.mask)
    return packed.tokens(scalar + offset)


def ppo_loss(run, batch, share):
    """Clipped policy and value losses, averaged over the step's answer tokens. No KL here: it is part of the reward."""
    cfg, inside = run.cfg, torch.arange(batch['answer'].shape[2], device=run.machine.device) < batch['answer_length'][..., None]
    log_p = token_log_prob(run, run.trained['model'], run.forward('model'), batch)
    value = token_values(run, run.forward('critic'), batch)

    def mean(x):
        return x.masked_fill(~inside, 0.0).sum() / share['tokens']

    policy_loss = mean(ppo_policy_loss(log_p, batch['old_log_p'], batch['advantage'], cfg.clip_range))
    value_loss = mean(ppo_value_loss(value, batch['value'], batch['returns'], cfg.clip_range))
    with torch.no_grad():
        log_ratio = log_p - batch['old_log_p']
        stats = dict(loss=policy_loss, value_loss=value_loss,
                     clip_fraction=mean(((log_ratio.exp() - 1).abs() > cfg.clip_range).float()),
                     update_kl=mean(log_ratio.expm1() - log_ratio))  # >= 0 and unbiased, Schulman's k3
        if share['update'] == 0:
            stats['ratio_first'] = mean(log_ratio.exp())
    # two modules with a gradient each: the sum needs no weights
    return policy_loss + value_loss, stats


# report: what a method adds to an evaluation --------------------------------------------------------------------------


def report_nothing(run, samples, posts):
    return {}


def report_reward(run, samples, posts):
    """Centres the reward model on samples of the start, and says how it agrees with the true quality of toy answers."""
    scorer = run.trained['reward_model']
    reward = rewards(run, scorer, samples)[:, 0]
    with torch.no_grad():
        scorer.offset -= reward.mean().to(scorer.offset.device)  # a ranking loss never moves it
    metrics = dict(reward_std=reward.std().item())
    if is_toy(run):
        metrics['reward_quality_correlation'] = torch.corrcoef(torch.stack([reward, qualities(run, samples, posts)[:, 0]]))[
            0, 1].item()
    return metrics


def report_policy_reward(run, samples, posts):
    return dict(reward=rewards(run, run.frozen['reward_model'], samples)[:, 0].mean().item())


def report_between(run, samples, posts):
    """Do the teacher's answers lie between the data's best and the student's own, on held-out prompts?"""
    held = shorten(run, held_out_posts(run))
    if 'teacher' not in run.known:
        try:
            run.known['teacher'] = teacher_answers(run, held, EVAL)
        except Refusal as error:  # a file of completions need not hold the held-out prompts
            run.machine.print(f'note: no report on the teacher, {error}')
            run.known['teacher'] = None
    if run.known['teacher'] is None:
        return {}
    metrics, answers = {}, dict(data=[group.answers[0] for group in held], teacher=run.known['teacher'])
    own = [answer[:length] for answer, length in zip(samples['answer'][:, 0].tolist(), samples['answer_length'][:, 0])]
    batch = group_batch([group._replace(answers=list(three)) for group, *three in zip(held, *answers.values(), own)],
                        run.block_size, run.cfg.max_new_tokens)
    judges = {}
    if 'reward_model' in run.frozen:
        judges['reward'] = rewards(run, run.frozen['reward_model'], batch)
    if is_toy(run):
        judges['quality'] = qualities(run, batch, posts)
    for judge, r in judges.items():
        metrics |= {f'{judge}_{who}': mean.item() for who, mean in zip(('data', 'teacher', 'self'), r.mean(0))}
        metrics[f'{judge}_agrees'] = ((r[:, 0] >= r[:, 1]) & (r[:, 1] >= r[:, 2])).float().mean().item()
    return metrics


# A method is a row: what is trained and kept frozen, who writes the answers, the loss, what ranks held-out answers, what
# an evaluation adds, and the metric by which best.pt is chosen ('' = the latest is the best)
class Method(NamedTuple):
    build: Callable    # (cfg, start, encoding) -> (modules to train, modules kept frozen)
    collect: Callable  # (run, iteration) -> (batch, facts): tensors with G in front; numbers for the log
    loss: Callable     # (run, micro-batch, share) -> (loss, stats), sums over the micro-batch over what the step holds
    score: Callable    # (run, micro-batch) -> scores (G, K), log p (G, K, A)
    report: Callable   # (run, samples, posts) -> metrics
    best: str


METHODS = dict(
    dpo=Method(build_policy, collect_rankings_and_reference, ranking_loss, implicit_score, report_nothing,
               'rank_accuracy'),
    spin=Method(build_policy, collect_self_play, ranking_loss, implicit_score, report_nothing, ''),
    distill=Method(build_student, collect_distillation, ranking_loss, implicit_score, report_between, ''),
    reward=Method(build_reward, collect_rankings, ranking_loss, reward_score, report_reward, 'rank_accuracy'),
    ppo=Method(build_actor_critic, collect_rollouts, ppo_loss, implicit_score, report_policy_reward, ''))


# Evaluation ----------------------------------------------------------------------------------------------------------


def is_toy(run):
    return run.cfg.source == 'toy'


def qualities(run, batch, posts):
    """toy_shp.quality of all answers, (G, K)."""
    return torch.tensor([[toy_shp.quality(post, text_of(run, answer[:length])) for answer, length in zip(*group)]
                         for post, *group in zip(posts, batch['answer'].tolist(), batch['answer_length'].tolist())])


def held_out(run):
    groups = run.groups[run.cfg.eval_split]
    return pick_groups(groups, EVAL_SEED, 0, min(run.cfg.eval_groups or len(groups.prompts), len(groups.prompts)))


def held_out_posts(run):
    """One group for each of the first eval_samples distinct held-out prompts."""
    groups = run.groups[run.cfg.eval_split]
    every = pick_groups(groups, EVAL_SEED, 0, len(groups.prompts))
    return list({tuple(group.prompt): group for group in reversed(every)}.values())[::-1][:run.cfg.eval_samples]


def pair_statistics(scores, valid):
    """scores, valid (G, K), best first -> share of pairs in order (ties one half), mean difference, calibration error.

    The difference of scores is the log-odds that the first is preferred; ECE over equal bins of the confidence.
    """
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    both = valid[:, first] & valid[:, second]
    gap = (scores[:, first] - scores[:, second])[both].double()
    right = (gap > 0).double() + (gap == 0) / 2
    confidence = gap.abs().sigmoid()
    bin = ((confidence - 0.5) * 2 * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    error = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bin, right - confidence)
    return right.mean().item(), gap.mean().item(), error.abs().sum().item() / len(gap)


def baselines(run, held):
    """How many held-out pairs cheap rankers order that never read the question, and on the toy data the truth itself.

    length: the longer answer, or the shorter if that orders more of the training pairs; bag: the sum of a weight for
    each of the answer's tokens, fitted to at most 4,000 training rankings by maximum likelihood.
    """
    train = group_batch(pick_groups(run.groups['train'], EVAL_SEED, 0, min(4000, len(run.groups['train'].prompts))),
                        run.block_size)
    weight = torch.zeros(run.encoding.n_vocab, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.02)

    def bag(batch):
        inside = torch.arange(batch['answer'].shape[2]) < batch['answer_length'][..., None]
        return (weight[batch['answer']] * inside).sum(-1)

    for _ in range(100):
        with torch.enable_grad():
            loss = plackett_luce_loss(bag(train), 0, train['answer_length'] > 0).mean() + 1e-3 * weight.square().sum()
        weight.grad, = torch.autograd.grad(loss, weight)
        adam.step()
    valid = held['answer_length'] > 0
    longer_is_better = pair_statistics(train['answer_length'].float(), train['answer_length'] > 0)[1] >= 0
    found = dict(rank_accuracy_length=pair_statistics(held['answer_length'] * (1.0 if longer_is_better else -1.0), valid)[0],
                 rank_accuracy_bag=pair_statistics(bag(held).detach(), valid)[0])
    if is_toy(run):
        posts = [post_of(run, ids[:n]) for ids, n in zip(held['prompt'].tolist(), held['prompt_length'])]
        found['rank_accuracy_truth'] = pair_statistics(qualities(run, held, posts), valid)[0]
    return found


@torch.no_grad()
def evaluate(run, samples_log):
    """-> the metrics of an 'eval' line: held-out rankings, and fresh samples beside pi_0. Raises Stopped."""
    method, policy, start = METHODS[run.cfg.method], run.trained.get('model'), past_self(run, 0)
    if 'held' not in run.known:
        held = group_batch(held_out(run), run.block_size)
        run.known['held'] = dict(held, ref_log_p=log_prob_under(run, start, held))
    held = run.known['held']
    valid = held['answer_length'] > 0
    score = for_all_groups(run, held, lambda micro: method.score(run, micro)[0])
    speaker = policy or start
    log_p = for_all_groups(run, held, lambda micro: token_log_prob(run, speaker, speaker, micro)).sum(-1)
    metrics = dict(zip(('rank_accuracy', 'margin', 'rank_ece'), pair_statistics(score, valid)),
                   rank_loss=plackett_luce_loss(score, 0, valid).mean().item(),
                   rank_accuracy_logp=pair_statistics(log_p, valid)[0], chosen_logp=log_p[:, 0].mean().item(),
                   rejected_logp=log_p.gather(1, valid.sum(1, keepdim=True) - 1).mean().item())
    if run.step == 0:
        metrics |= baselines(run, held)

    if run.cfg.eval_samples:
        groups = shorten(run, held_out_posts(run))
        posts = [post_of(run, group.prompt) for group in groups]
        answers = sample(run, speaker, [group.prompt for group in groups], EVAL, 0)
        samples = group_batch([group._replace(answers=[answer]) for group, answer in zip(groups, answers)],
                              run.block_size)
        own = for_all_groups(run, samples, lambda micro: token_log_prob(run, speaker, speaker, micro)).sum(-1)[:, 0]
        entropy = for_all_groups(run, samples, lambda micro: token_entropy(run, speaker, micro)).sum()
        started = for_all_groups(run, samples, lambda micro: token_log_prob(run, start, start, micro)).sum(-1)[:, 0]
        ended = torch.tensor([answer[-1] == run.encoding.eot_token for answer in answers])
        length = samples['answer_length'].sum(1)
        metrics |= dict(kl=(own - started).mean().item(), entropy=(entropy / length.sum()).item(),
                        answer_length=(length - ended.long()).float().mean().item(),
                        eot_rate=ended.float().mean().item())
        columns = dict(log_prob=own.tolist())
        if is_toy(run):
            columns['true_quality'] = qualities(run, samples, posts)[:, 0].tolist()
            metrics['true_quality'] = float(np.mean(columns['true_quality']))
            if run.step == 0:
                metrics |= quality_of_others(run, groups, posts)
        metrics |= method.report(run, samples, posts)
        scorer = run.trained.get('reward_model') or run.frozen.get('reward_model')
        if scorer:
            columns['reward'] = rewards(run, scorer, samples)[:, 0].tolist()
        for i, (post, answer) in enumerate(zip(posts[:KEPT], answers)):
            samples_log.write('eval', step=run.step, prompt=post, completion=text_of(run, answer),
                              ended=bool(ended[i]), **{name: column[i] for name, column in columns.items()})
    return metrics


def token_entropy(run, model, batch):
    """Entropy in nats of the distribution that each answer token was drawn from: (G, K, A)."""
    packed = pack(batch)
    with run.machine.autocast():
        hidden = model(packed.idx, positions=packed.positions, mask=packed.mask).flatten(0, 1)
        entropy = [torch.special.entr(model.logits(rows).softmax(-1)).sum(-1) for rows in hidden.split(LOGIT_ROWS)]
    return packed.tokens(torch.cat(entropy).view_as(packed.idx))


def quality_of_others(run, groups, posts):
    """The true quality of the data's best and of all the data's answers to these prompts, and of random letters."""
    data = group_batch(groups, run.block_size)
    quality, valid = qualities(run, data, posts), data['answer_length'] > 0
    letters = np.random.default_rng(0)
    noise = [toy_shp.quality(post, ''.join(letters.choice(list('abcdefghijklmnopqrstuvwxyz .'), 30))) for post in posts]
    return dict(true_quality_best=quality[:, 0].mean().item(), true_quality_data=quality[valid].mean().item(),
                true_quality_random=float(np.mean(noise)))


# Collections on disk -------------------------------------------------------------------------------------------------


def write_iteration(run, iteration, batch, facts):
    """iterations/<i>.pt (exact), .json (manifest) and, where answers were sampled, .jsonl; -> sha256 of the first."""
    folder, oldest = Path(run.cfg.out_dir) / 'iterations', oldest_iteration(run)
    path = save_checkpoint(folder, dict(step=run.step, batch=batch), f'{iteration:04d}.pt')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for old in folder.glob('*.pt'):  # no checkpoint can ask for it any more
        if int(old.stem) < oldest:
            old.unlink()
    for old in (folder.parent / 'selves').glob('*.pt'):
        if 0 < int(old.stem) <= oldest - run.cfg.opponents:
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
    steps = [int(path.stem.removeprefix('ckpt_')) for path in Path(run.cfg.out_dir).glob('ckpt_*.pt')]
    return min(steps, default=0) // steps_per_iteration(run)


def read_iteration(run, iteration, digest):
    path = Path(run.cfg.out_dir) / 'iterations' / f'{iteration:04d}.pt'
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise Refusal(f'{path} is missing or not the one that the checkpoint was trained on; its answers cannot be '
                      'sampled again: start anew with --overwrite=True')
    state = load_checkpoint(path)
    return state['batch']


def steps_per_iteration(run):
    return run.cfg.inner_epochs * (groups_per_iteration(run) // run.cfg.groups_per_step)


def step_rows(run, batch, update):
    """The groups of an iteration's update: a part of a permutation that is a function of (seed, iteration, epoch)."""
    count, size = len(batch['group']), run.cfg.groups_per_step
    epoch, part = divmod(update, count // size)
    order = np.random.default_rng((4, run.cfg.seed, run.step // steps_per_iteration(run), epoch)).permutation(count)
    return torch.from_numpy(order[part * size:(part + 1) * size])


# The loop ------------------------------------------------------------------------------------------------------------


def main(cfg):
    method, machine = METHODS[cfg.method], setup(cfg.device, cfg.dtype, cfg.compile)
    if cfg.groups_per_step < machine.world_size:
        raise Refusal(f'groups_per_step={cfg.groups_per_step} prompts do not go round {machine.world_size} ranks; '
                      f'use --groups_per_step={machine.world_size} or more')
    machine.on_rank_0(lambda: prepare_shp.open_dataset(cfg))  # makes the toy data where it is missing
    data = prepare_shp.open_dataset(cfg)
    encoding, out = prepare_shp.encoding(data.meta['encoding']), Path(cfg.out_dir)
    resuming = cfg.resume and list(out.glob('ckpt_*.pt'))
    start = load_start(cfg, resuming, encoding)
    trained, frozen = method.build(cfg, start, encoding)
    for module in (*trained.values(), *frozen.values()):
        module.to(machine.device)
    model_config = next(iter(trained.values())).config
    run = Run(cfg, machine, {split: data.groups(split) for split in {'train', cfg.eval_split}}, encoding, trained,
              frozen, {}, StopSignal(), selves={0: weights_hash(start['model'])})
    if cfg.max_new_tokens >= run.block_size:
        raise Refusal(f'max_new_tokens={cfg.max_new_tokens} leave no room for a prompt in the block of '
                      f'{run.block_size} tokens of {cfg.init_from}; use fewer')
    held_out(run)  # what is too little is refused here, before an earlier run is overwritten
    per_iteration = steps_per_iteration(run)
    cfg = run.cfg = replace(cfg, max_iters=min(cfg.max_iters or math.inf, cfg.iterations * per_iteration))

    updates = Updates(list(trained.values()), cfg, machine)
    described = dict(method=cfg.method, model_config=asdict(model_config), config=asdict(cfg),
                     fingerprint=data.fingerprint, encoding=encoding.name,
                     machine=dict(ranks=machine.world_size, device=machine.device.type, dtype=str(machine.dtype),
                                  compile=machine.compile, torch=str(torch.__version__)))
    tokens, seconds, best, evaluated, ended, margin, batch, facts = 0, 0.0, -math.inf, -1, False, [0, 0.0, 0.0], None, {}
    state = open_run(cfg, machine)
    if state is not None:
        machine.print(f'resumed at step {state["step"]} ({check_resume(state, described)})')
        for name, module in trained.items():
            module.load_state_dict(state[name])
        updates.load_state_dict(state)
        tokens, seconds, best, evaluated, ended, margin, facts = (
            state[k] for k in ('tokens', 'seconds', 'best', 'evaluated', 'ended', 'margin', 'facts'))
        run.step, run.sampled_tokens, run.selves = (state[k] for k in ('step', 'sampled_tokens', 'selves'))
        if run.step % per_iteration:
            digest = state['batch_sha256']
            batch = read_iteration(run, run.step // per_iteration, digest)
        del state
    machine.on_rank_0(lambda: start_files(cfg, run.step))
    if run.step == 0:
        machine.on_rank_0(lambda: [(out / name).mkdir(exist_ok=True) for name in ('iterations', 'selves')])
        machine.on_rank_0(lambda: save_checkpoint(out / 'selves', dict(start, step=0), '0000.pt'))
    metrics, samples_log = Metrics(cfg, machine, run.step), Metrics(cfg, machine, run.step, 'samples.jsonl')
    run.ddp = {name: torch.compile(module, dynamic=True) if machine.compile else module
               for name, module in trained.items()}
    if machine.world_size > 1:
        run.ddp = {name: DistributedDataParallel(module, gradient_as_bucket_view=True)
                   for name, module in run.ddp.items()}
    machine.print(f'{cfg.method}: ' + ', '.join(f'{name} of {sum(p.numel() for p in module.parameters()):,} parameters'
                                               for name, module in {**trained, **frozen}.items()) + '\n'
                  f"{cfg.iterations} iteration(s) of {groups_per_iteration(run):,} prompts, {per_iteration} updates each "
                  f"of {cfg.groups_per_step} prompts: {cfg.max_iters:,} updates")

    def weights():
        return dict(described, step=run.step, tokens=tokens,
                    **{name: module.state_dict() for name, module in trained.items()})

    def save_state():
        state = dict(weights(), seconds=time.perf_counter() - began, best=best, evaluated=evaluated, ended=ended,
                     margin=margin, facts=facts, sampled_tokens=run.sampled_tokens, selves=run.selves,
                     batch_sha256=digest if run.step % per_iteration else '', **updates.state_dict())
        machine.on_rank_0(lambda: save_checkpoint(cfg.out_dir, state))  # nobody goes on before the file is whole

    began, saved_step = time.perf_counter() - seconds, run.step if run.step else None
    mark = tokens + run.sampled_tokens, time.perf_counter()
    with run.stop as stop, contextlib.suppress(Stopped):
        while True:
            last = ended or run.step >= cfg.max_iters
            if last and evaluated < run.step or run.step // cfg.eval_interval != evaluated // cfg.eval_interval:
                if run.step and run.step != saved_step:
                    save_state()
                    saved_step = run.step
                result = evaluate(run, samples_log)
                evaluated = run.step
                metrics.write('eval', step=run.step, tokens=tokens, sampled_tokens=run.sampled_tokens,
                              seconds=time.perf_counter() - began, iteration=run.step // per_iteration, **result)
                machine.print(f'step {run.step} evaluation: ' + ', '.join(f'{k} {v:.4f}' for k, v in result.items()))
                value = result[method.best] if method.best else run.step
                if value > best:
                    best = value
                    machine.on_rank_0(lambda: save_checkpoint(cfg.out_dir, weights(), 'best.pt'))
            if last or cfg.stop_step and run.step >= cfg.stop_step:
                break

            iteration, update = divmod(run.step, per_iteration)
            if update == 0:
                before, since = run.sampled_tokens, time.perf_counter()
                batch, facts = method.collect(run, iteration)
                digest = machine.on_rank_0(lambda: write_iteration(run, iteration, batch, facts))
                machine.print(f'iteration {iteration}: {len(batch["group"]):,} prompts collected in '
                              f'{time.perf_counter() - since:.1f} s, {run.sampled_tokens - before:,} tokens sampled')

            rows = step_rows(run, batch, update)
            share = dict(iteration=iteration, update=update, groups=len(rows),
                         tokens=int(batch['answer_length'][rows].sum()),  # of the whole step: all ranks have the batch
                         best_tokens=int(batch['answer_length'][rows, 0].sum()))
            mine = by_length(batch, rows)[machine.rank::machine.world_size]
            parts, totals = mine.split(cfg.micro_groups or len(mine)), {}
            for i, part in enumerate(parts):
                with contextlib.ExitStack() as stack:
                    if machine.world_size > 1 and i + 1 < len(parts):  # gradients travel once a step
                        for module in run.ddp.values():
                            stack.enter_context(module.no_sync())
                    loss, stats = method.loss(run, micro_batch(run, batch, part), share)
                    updates.backward(loss * machine.world_size)  # DDP averages over ranks; the step's mean is wanted
                for name, value in stats.items():
                    totals[name] = totals.get(name, 0.0) + value.detach()
            run.step += 1
            grad_norm = updates.step(run.step, save_state)
            tokens += share['tokens']
            *sums, interrupted, terminated = machine.sum([float(x) for x in totals.values()] + stop.flags())
            stats = dict(zip(totals, sums))
            facts |= {name: value for name, value in stats.items() if name.endswith('_first')}
            if run.step == 1:
                machine.print('first update: ' + ', '.join(f'{k} {v:.6f}' for k, v in stats.items()))
            if 'self_margin' in stats and run.step * 2 > (2 * iteration + 1) * per_iteration:
                margin = [a + share['groups'] * b for a, b in zip(margin, (1, stats['self_margin'], stats['self_square']))]
            if cfg.kl_stop and stats.get('update_kl', 0.0) > cfg.kl_stop and run.step % per_iteration:
                machine.print(f'step {run.step}: KL {stats["update_kl"]:.3f} from the sampling policy, above kl_stop; '
                              'on with the next iteration')
                run.step = (iteration + 1) * per_iteration
            if run.step % per_iteration == 0 and margin[0] >= MARGIN_GROUPS:
                mean, square = margin[1] / margin[0], margin[2] / margin[0]
                error, margin = math.sqrt(max(square - mean ** 2, 0.0) / margin[0]), [0, 0.0, 0.0]
                facts |= dict(self_margin_mean=mean, self_margin_error=error)
                if mean <= cfg.margin_stop * error and cfg.margin_stop:
                    ended = True
                    machine.print(f'self-play ends after iteration {iteration}: data are ahead of self by {mean:.4f} '
                                  f'+- {error:.4f}, within the noise')

            if run.step % cfg.log_interval == 0 or run.step % per_iteration == 0:
                now, done = time.perf_counter(), tokens + run.sampled_tokens
                speed, mark = (done - mark[0]) / (now - mark[1]), (done, now)
                eta = (cfg.max_iters - run.step) * (now - began) / run.step
                metrics.write('train', step=run.step, tokens=tokens, sampled_tokens=run.sampled_tokens,
                              seconds=now - began, iteration=iteration, grad_norm=grad_norm,
                              lr=lr_at(run.step - 1, cfg), tokens_per_second=speed, skipped=updates.skipped,
                              **{**facts, **stats})
                machine.print(f'step {run.step}/{cfg.max_iters} {run.step / cfg.max_iters:.0%} ' + ' '.join(
                    f'{k} {v:.4f}' for k, v in {**facts, **stats}.items()) + f' norm {grad_norm:.2f} '
                    f'{speed / 1000:.1f}k tok/s ETA {timedelta(seconds=round(eta))}')
            if interrupted or terminated:
                break
    if run.step != saved_step:
        save_state()
    signals = machine.sum(stop.flags())

    if any(signals):
        machine.print(f'stopped after step {run.step}, saved {cfg.out_dir}; continue with --resume=True')
        sys.exit(128 + (signal.SIGINT if signals[0] else signal.SIGTERM))
    if not ended and run.step < cfg.max_iters:
        machine.print(f'stopped after step {run.step}, saved {cfg.out_dir}; continue with --resume=True')
        return
    if machine.rank == 0:
        show_samples(out)
        try:
            picture = plot.plot([cfg.out_dir], out / 'preference.png')
        except Refusal as error:
            picture = f'no picture ({error})'  # a missing matplotlib is no reason to fail a finished run
        print(f'{time.perf_counter() - began:.0f} s, peak memory {peak_memory(machine) / 2 ** 20:,.0f} MiB\n'
              f'saved {cfg.out_dir} and {picture}', flush=True)


def show_samples(out):
    """The first posts' samples before and after, from samples.jsonl."""
    path = out / 'samples.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = sorted({line['step'] for line in lines})
    if not steps:
        return
    before, after = ([line for line in lines if line['step'] == step][:SHOWN] for step in (steps[0], steps[-1]))
    for old, new in zip(before, after):
        print('-' * 40 + '\n' + visible(new['prompt']))
        for name, line in (('before', old), ('after', new)):
            scores = ', '.join(f'{k} {line[k]:.2f}' for k in ('reward', 'true_quality') if k in line)
            print(f'  {name:<7}' + visible(line['completion']) + (f'  [{scores}]' if scores else '')
                  + ('' if line['ended'] else ' [cut]'))


if __name__ == '__main__':
    configurator.run(main, Config)
