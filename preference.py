"""Trains a model on preferences: one loop, five methods. Read `main`, then a method.

    python preference.py config/toy_dpo.py                        # Plackett-Luce DPO over K ranked answers
    python preference.py config/toy_spin.py                       # self-play against one or several past selves
    python preference.py config/toy_distill.py                    # data > teacher > self
    python preference.py config/toy_reward.py                     # a reward model
    python preference.py config/toy_ppo.py                        # PPO with a renormalised reward
    torchrun --nproc_per_node=8 preference.py config/spin_shp.py  # any of them, on 8 GPUs

Letters and the keys of a batch: see answers.py. pi_0 is the start, pi_t the policy at the beginning of iteration t.
"""
import contextlib
import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

import prepare_shp
import runs
from answers import (DATA, TEACHER, Lab, Stopped, answer_log_prob, answer_rewards, answers_of, cut_answers, cut_prompts,
                     for_all, hidden_states, load_self, log_prob_under, make_batch, make_gpt, make_scorer,
                     micro_batches, pack, post_of, rewards, sample, save_self, select, text_of, token_log_probs,
                     usable_rankings, weights_hash)
from configurator import Refusal, run
from evaluate import EVAL, Evaluation, report_reward_model, report_teacher, show_samples
from losses import (gae, implicit_reward, plackett_luce_loss, ppo_policy_loss, ppo_value_loss,
                    renormalize_reward, taylor_loss)
from model import ScalarHead

MARGIN_GROUPS = 512  # prompts needed to compare the margin of data over self with its standard error


@dataclass(frozen=True)
class Config(runs.RunConfig):
    """Method and training."""
    out_dir: str = 'out/preference'    # folder of checkpoints, metrics.jsonl, samples.jsonl, iterations/ and the plot
    method: str = 'dpo'                # dpo, spin, distill, reward or ppo
    init_from: str = 'out/toy_start'   # start: folder of a run or of a Hugging Face GPT-2, or gpt2, ..., gpt2-xl
    block_size: int = 0                # crop the start's context to this many tokens; 0 = do not crop
    max_iters: int = 0                 # maximum number of updates; 0 = those of all iterations
    iterations: int = 1                # collections of answers, each followed by updates on them
    groups_per_iteration: int = 0      # prompts per collection, over all ranks; 0 = all of train, in memory
    inner_epochs: int = 1              # passes over each collection
    groups_per_step: int = 32          # prompts per update, over all ranks
    micro_groups: int = 0              # prompts per micro-batch and rank; 0 = as many as fill answers.MICRO_TOKENS
    max_new_tokens: int = 128          # maximum length of a sampled answer; a prompt gets the rest of the block
    sample_batch: int = 64             # answers sampled at a time, per rank
    beta: float = 0.1                  # dpo, spin, distill, ppo: strength of the KL to the reference
    max_answers: int = 0               # dpo, reward: answers per ranking, a random subset of longer ones; 0 = all
    rank_order: int = 0                # dpo, spin, distill, reward: n of T_n on the stages of a ranking
    token_order: int = 0               # dpo, spin, distill, ppo: m of -T_m(p), used in place of log p; 0 = log p
    sft_weight: float = 0.0            # dpo, spin, distill, reward: weight of the best answers' cross-entropy per token
    sft_order: int = 0                 # dpo, spin, distill, reward: n of T_n in the language loss; 0 = cross-entropy
    opponents: int = 1                 # spin: number of past selves that write answers, the latest first
    league: str = 'tied'               # spin: tied = data above every self; ordered = later selves above earlier ones
    anchor_first: bool = False         # spin: pi_0 is one of the opponents, the others are the latest selves
    margin_stop: float = 2.0           # spin, distill: end if data lead self by fewer standard errors; 0 = no limit
    teacher: str = ''                  # distill: folder of a run, JSON lines of completions, or a Hugging Face model
    reward_read: str = 'last'          # reward: last = the scalar at an answer's last token; sum = over its tokens
    reward_model: str = ''             # ppo, and for metrics of distill: folder of a reward run
    answers_per_prompt: int = 8        # ppo: samples per prompt, over which rewards are renormalised
    moment_order: int = 2              # ppo: n of the renormalised reward, 2 or 3
    monotone: bool = True              # ppo: a renormalised reward keeps the order of the answers
    renormalize_over: str = 'prompt'   # ppo: prompt, or batch for all answers of an iteration at once
    missing_eot_penalty: float = 1.0   # ppo: subtracted from the reward of an answer without end-of-text
    gamma: float = 1.0                 # ppo: discount factor
    gae_lambda: float = 0.95           # ppo: lambda of GAE
    clip_range: float = 0.2            # ppo: clip range of probability ratios and of values
    kl_stop: float = 0.1               # ppo: KL(pi_t || pi), nats per token, that ends an iteration; 0 = no limit
    eval_groups: int = 1000            # held-out rankings to evaluate; 0 = all
    eval_samples: int = 256            # held-out prompts to sample answers to; 0 = none
    learning_rate: float = 1e-5        # peak learning rate, after the warm-up
    min_lr: float = 1e-6               # learning rate at the end of the cosine; learning_rate or more = constant
    warmup_iters: int = 20             # steps of linear warm-up
    weight_decay: float = 0.0          # weight decay of matrices; biases and LayerNorms do not decay
    compile: bool | None = False       # torch.compile the updates; the length of rows differs from step to step

    choices = dict(renormalize_over=('prompt', 'batch'), reward_read=('last', 'sum'), league=('tied', 'ordered'),
                   moment_order=(2, 3))
    lowest = dict(iterations=1, inner_epochs=1, groups_per_step=1, max_new_tokens=1, sample_batch=1, opponents=1,
                  answers_per_prompt=2)

    def check(self):
        yield from super().check()
        if self.method not in METHODS:
            yield f"method='{self.method}' is not one of {', '.join(METHODS)}"
        if self.max_answers == 1:
            yield 'max_answers=1 leaves nothing to rank; use 2 or more, or 0 for all'
        if not self.beta and issubclass(METHODS.get(self.method, Method), (DPO, SPIN)):
            yield f'beta=0 makes all scores of method={self.method} equal, so nothing is learned; use a larger beta'
        changed = {option for option in self.given if getattr(self, option) != getattr(type(self)(), option)}
        for option, idle, need in (('sft_order', not self.sft_weight, 'sft_weight'),
                                   ('league', self.opponents == 1, 'two or more opponents'),
                                   ('monotone', self.moment_order == 2, 'moment_order=3')):
            if option in changed and idle:
                yield f'{option} has no effect without {need}; leave it out'
        if self.anchor_first and self.opponents < 2:
            yield 'anchor_first=True needs --opponents=2 or more: a single opponent would always be pi_0'
        if self.moment_order == 3 and self.renormalize_over == 'prompt' and self.answers_per_prompt < 4:
            yield (f'moment_order=3 has no solution for answers_per_prompt={self.answers_per_prompt}: the skewness of '
                   'K numbers is at most (K-2)/sqrt(K-1); use 4 or more')
        if self.groups_per_step >= 1 and self.groups_per_iteration % self.groups_per_step:
            yield (f'groups_per_iteration={self.groups_per_iteration} must be a multiple of groups_per_step='
                   f'{self.groups_per_step}')
        if self.method in METHODS:
            others = {option: name for name, method in METHODS.items() for option in method.options}
            for option in sorted(changed & others.keys() - set(METHODS[self.method].options)):
                yield f'{option} has no effect with method={self.method}; leave it out'


# The loop ------------------------------------------------------------------------------------------------------------


def main(cfg):
    machine = runs.setup(cfg.device, cfg.dtype, cfg.compile)
    machine.on_rank_0(lambda: prepare_shp.open_dataset(cfg))  # makes the toy data if they are missing
    data = prepare_shp.open_dataset(cfg)
    lab = open_lab(cfg, machine, data)
    options, cfg, per_iteration = cfg, lab.cfg, updates_per_iteration(lab)
    method = METHODS[cfg.method](lab)
    modules = list(method.trained.values())
    for module in (*modules, *method.frozen.values()):
        module.to(machine.device)
    optimizers = [torch.optim.AdamW(runs.decay_groups(modules, cfg), lr=cfg.learning_rate, fused=True)]
    updates = runs.Updates(optimizers, modules, cfg, machine)
    for name, module in method.trained.items():
        module = torch.compile(module, dynamic=True) if machine.compile else module
        if machine.world_size > 1:
            module = DistributedDataParallel(module, gradient_as_bucket_view=True)
        method.wrapped[name] = module

    described = runs.describe(cfg, machine, modules[0].config, data, optimizers, **what_stays(lab, method))
    described |= {f'{name}_config': vars(module.config) for name, module in method.trained.items()}
    step, tokens, sampled_tokens, best, evaluated, ended, facts, seconds = 0, 0, 0, -math.inf, -1, False, {}, 0.0
    with runs.open_run(cfg, machine) as state, lab.stop as stop:
        if state is not None:
            machine.print(f'resumed at step {state["step"]} ({runs.check_resume(state, described)})')
            for name, module in method.trained.items():
                module.load_state_dict(state[name])
            updates.load_state_dict(state)
            step, tokens, sampled_tokens, best, evaluated, ended, facts, method.state = state['loop']
            seconds = state['seconds']
            if step % per_iteration:                          # otherwise the loop collects a new one
                batch = read_iteration(lab, step // per_iteration)
            state.clear()
        # max_iters as given: a resume with more iterations has more updates
        machine.on_rank_0(lambda: runs.start_files(replace(cfg, max_iters=options.max_iters), step))
        machine.on_rank_0(lambda: start_folders(lab, step))
        metrics, samples_log = runs.Metrics(cfg, machine, step), runs.Metrics(cfg, machine, step, 'samples.jsonl')
        evaluation = Evaluation(lab, method, samples_log)
        machine.print(f'{cfg.method}: ' +
                      ', '.join(f'{name} of {sum(p.numel() for p in module.parameters()):,} parameters'
                                for name, module in {**method.trained, **method.frozen}.items()) +
                      f'\n{cfg.iterations} iteration(s) of {iteration_size(lab):,} prompts, each with '
                      f'{per_iteration} updates on {cfg.groups_per_step} prompts: {cfg.max_iters:,} updates')
        clock, saved_step = runs.Clock(seconds, step, tokens), step or None

        def save(name=None, **more):
            state = dict(described, step=step, tokens=tokens, **more,
                         **{name: module.state_dict() for name, module in method.trained.items()})
            machine.on_rank_0(lambda: runs.save_checkpoint(cfg.out_dir, state, name))  # all wait until it is written

        def save_state(due=False):
            # an evaluation that is due is repeated by a resume, as is that of step 0, which is cut from metrics.jsonl
            last_evaluated = -1 if due or not step else evaluated
            loop = step, tokens, sampled_tokens, best, last_evaluated, ended, facts, method.state
            save(loop=loop, seconds=clock.seconds(), **updates.state_dict())

        with contextlib.suppress(Stopped):                    # a signal during a collection or an evaluation
            while True:
                done = ended or step >= cfg.max_iters
                # a method may skip steps, and with them a multiple of eval_interval
                if done or step // cfg.eval_interval > evaluated // cfg.eval_interval:
                    if step and step != saved_step:
                        save_state(due=True)
                        saved_step = step
                    with clock.part('evaluation'):
                        result, evaluated = evaluation(step), step
                    metrics.write('eval', step=step, iteration=step // per_iteration, tokens=tokens,
                                  sampled_tokens=sampled_tokens, seconds=clock.seconds(), **result)
                    machine.print(f'step {step} evaluation: {runs.in_words(result)}')
                    # step 0 is never the best; nothing is selected on the test split: there best.pt is the latest
                    value = result[method.best] if method.best and cfg.eval_split != 'test' else step
                    if step and value >= best:                # the latest of equals
                        best = value
                        save('best.pt')
                if done or cfg.stop_step and step >= cfg.stop_step:
                    break

                iteration, update = divmod(step, per_iteration)
                if update == 0:
                    with clock.part('collection'):
                        batch, facts = method.collect(iteration, step)
                        machine.on_rank_0(lambda: write_iteration(lab, iteration, step, batch))
                    new_tokens = facts.pop('new_tokens', 0)
                    sampled_tokens += new_tokens
                    machine.print(f'iteration {iteration}: {len(batch["group"]):,} prompts and {new_tokens:,} sampled '
                                  f'tokens, collected in {clock.parts["collection"]:.1f} s')
                picked = step_prompts(lab, batch, iteration, update)
                length = batch['answer_length'][picked]
                counts = dict(iteration=iteration, update=update, last=update + 1 == per_iteration, step=step + 1,
                              groups=len(picked), tokens=int(length.sum()), best_tokens=int(length[:, 0].sum()))
                runs.seed_everything(cfg.seed, step + 1, machine.rank)
                stats = accumulate(method, updates, batch, picked, counts)
                lr = cfg.learning_rate * runs.lr_factor(step, cfg)
                updates.clip_and_step(step + 1, save_state)
                step, tokens = step + 1, tokens + counts['tokens']
                last = counts['last'] or step == cfg.max_iters
                stopped, = machine.sum([stop.number])
                if update == 0 or last or step % cfg.log_interval == 0 or method.after_update:
                    stats = dict(zip(stats, machine.sum(torch.stack(list(stats.values())).tolist())))
                facts |= {name: value for name, value in stats.items() if name.endswith('_first')}
                if step == 1:
                    machine.print(f'first update: {runs.in_words(stats)}')
                verdict = method.after_update and method.after_update(counts, stats)
                ended = verdict == 'end'
                if verdict == 'next':                         # without the rest of this iteration's updates
                    step, last = min((iteration + 1) * per_iteration, cfg.max_iters), True

                if step % cfg.log_interval == 0 or last:
                    numbers, grad_norm = {**facts, **stats}, updates.read_norms()
                    speed, left = clock.pace(
                        step, tokens, cfg.max_iters,
                        evaluation=math.ceil(cfg.max_iters / cfg.eval_interval) - evaluated // cfg.eval_interval,
                        collection=math.ceil(cfg.max_iters / per_iteration) - iteration - 1)
                    metrics.write('train', step=step, tokens=tokens, sampled_tokens=sampled_tokens,
                                  seconds=clock.seconds(), iteration=iteration, grad_norm=grad_norm, lr=lr,
                                  tokens_per_second=speed, skipped=updates.skipped, **numbers)
                    machine.print(f'step {step}/{cfg.max_iters} {step / cfg.max_iters:.0%} {runs.in_words(numbers)}, '
                                  f'norm {grad_norm:.2f}, {speed / 1000:.1f}k tok/s, ETA {left}')
                if stopped:
                    break
        if step != saved_step:
            save_state()
        done = ended or step >= cfg.max_iters
        if machine.rank == 0 and done and evaluated == step:  # not so after a signal in the last update
            show_samples(Path(cfg.out_dir))
        runs.finish(cfg, machine, stop, step, done, clock.seconds())


def accumulate(method, updates, batch, picked, counts):
    """Accumulates the gradient of a step over this rank's micro-batches -> the sums of their stats."""
    lab, totals = method.lab, {}
    parts = micro_batches(lab, batch, picked)
    for i, part in enumerate(parts):
        with contextlib.ExitStack() as stack:
            if lab.machine.world_size > 1 and i + 1 < len(parts):  # DDP averages once per step
                for module in method.wrapped.values():
                    stack.enter_context(module.no_sync())
            loss, stats = method.loss(pack(select(batch, part), lab.machine.device), counts)
            updates.backward(loss * lab.machine.world_size)  # undoes DDP's average over ranks
        for name, value in stats.items():
            totals[name] = totals.get(name, 0.0) + value.detach()
    return totals


def open_lab(cfg, machine, data):
    """-> Lab. Raises Refusal if options do not fit, before an earlier run is overwritten."""
    if cfg.groups_per_step < machine.world_size:
        raise Refusal(f'groups_per_step={cfg.groups_per_step} is less than the number of ranks, {machine.world_size}; '
                      f'use --groups_per_step={machine.world_size} or more')
    encoding = prepare_shp.encoding(data.meta['encoding'])
    if cfg.resume and runs.checkpoints(cfg.out_dir):
        start = runs.crop(runs.load_checkpoint(Path(cfg.out_dir) / 'selves' / '0000.pt'), cfg.block_size, cfg.out_dir)
    else:
        start = runs.open_start(cfg, encoding)
    block_size, cfg = start['model_config']['block_size'], replace(cfg, source=data.meta['source'],
                                                                   columns=tuple(data.meta['columns']))
    if cfg.max_new_tokens >= block_size:
        raise Refusal(f'max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt in the block of {block_size} '
                      f'tokens of {cfg.init_from}; use --max_new_tokens={block_size // 2} or less')
    lab = Lab(cfg, machine, encoding, {}, block_size, runs.StopSignal(), start)
    for split in dict.fromkeys(['train', cfg.eval_split]):
        lab.groups[split], words = usable_rankings(lab, data.groups(split))
        if words:
            machine.print(f'note: rankings of {split}, with a block of {block_size} tokens and max_new_tokens='
                          f'{cfg.max_new_tokens}: {words}; a larger block or a smaller max_new_tokens cuts less')
    if start.get('link_order'):
        machine.print(f'note: {cfg.init_from} was trained with T_{start["link_order"]}: its probabilities are '
                      'under-confident by design, and answers are sampled from them without the link')
    total = cfg.iterations * updates_per_iteration(lab)
    if cfg.max_iters > total:
        machine.print(f'note: max_iters={cfg.max_iters} is more than the {total} updates of all iterations')
    cfg = replace(cfg, max_iters=min(cfg.max_iters or total, total))
    if cfg.max_iters < 20:
        machine.print(f'note: only {cfg.max_iters} update(s) in total; for more, use a smaller groups_per_step or more '
                      'iterations or inner_epochs')
    for note in runs.run_notes(cfg):
        machine.print(f'note: {note}')
    return lab._replace(cfg=cfg)


def what_stays(lab, method):
    """What must not change in a resume, besides the model and the data."""
    names = 'method', 'groups_per_iteration', 'groups_per_step', 'inner_epochs', 'token_order', 'opponents'
    return dict({name: getattr(lab.cfg, name) for name in names}, start=weights_hash(lab.start['model'])[:12],
                **{name: weights_hash(module.state_dict())[:12] for name, module in method.frozen.items()})


def start_folders(lab, step):
    """Makes iterations/ and selves/. A new run saves pi_0."""
    for name in 'iterations', 'selves':
        (Path(lab.cfg.out_dir) / name).mkdir(exist_ok=True)
    if step == 0:
        runs.save_checkpoint(Path(lab.cfg.out_dir) / 'selves', dict(lab.start, step=0), '0000.pt')


# Methods -------------------------------------------------------------------------------------------------------------


class Method:
    """The interface of a method to the loop. By default the data's rankings train a policy by its implicit reward.

    The loss is sum_k T_n(p_k) over the stages of each ranking, averaged over the prompts of a step. sft_weight adds the
    best answers' cross-entropy per token, sft_order makes it T_n (Pang et al. 2024; for rewards Yang et al. 2024).
    To add a method, write a subclass and list it in METHODS.
    """
    options = ()        # options of Config that this method uses and some others do not
    best = ''           # the metric that selects best.pt; '' = the latest is the best
    top = None          # number of stages of a ranking in the loss; None = all
    scorer = None       # a ScalarHead that scores the samples of an evaluation
    state = None        # what a resume restores besides the modules: numbers, tensors and lists of them
    after_update = None  # or (counts, stats) -> 'next' iteration, 'end' of the run, or None; a GPU waits for the stats

    def __init__(self, lab):
        """Makes the modules, by name: the trained ones, which the loop updates and saves, and the frozen ones."""
        self.lab = lab
        self.start = make_gpt(lab.start).requires_grad_(False).to(lab.machine.device)  # pi_0
        self.trained, self.frozen = dict(model=make_gpt(lab.start)), {}
        self.wrapped = {}  # the trained modules for updates, compiled and under DDP

    def rankings(self, iteration):
        """The data's rankings for an iteration, cut to the block: a list of prepare_shp.Group."""
        lab, cfg = self.lab, self.lab.cfg
        return cut_answers(lab, prepare_shp.pick_groups(lab.groups['train'], cfg.seed, iteration, iteration_size(lab),
                                                        cfg.max_answers))

    def collect(self, iteration, step):
        """The answers of an iteration -> a batch (answers.py lists its keys), and numbers for the log."""
        batch = make_batch(self.rankings(iteration))
        found = log_prob_under(self.lab, self.start, batch, self.lab.cfg.token_order)
        return dict(batch, ref_log_p=found['taylor']), {}

    def score(self, rows):
        """s = beta (log pi(y|x) - log pi_ref(y|x)), (G, K), and log p of each answer token, (M,)."""
        cfg = self.lab.cfg
        hidden = hidden_states(self.lab, self.forward('model'), rows)
        log_p = token_log_probs(self.lab, self.trained['model'], hidden, rows)
        own = answer_log_prob(rows, log_p, cfg.token_order)
        return implicit_reward(own, rows.batch['ref_log_p'], cfg.beta), log_p

    def judge(self, rows):
        """Held-out rankings -> dict(score (G, K), and log_p (G, K) where `score` gives it)."""
        score, log_p = self.score(rows)
        return dict(score=score) if log_p is None else dict(score=score, log_p=rows.per_answer(log_p))

    def loss(self, rows, counts):
        """Rows of a micro-batch -> loss, stats: sums over its prompts, divided by the counts of the whole step.

        counts: groups, tokens and best_tokens (of the best answers) over all ranks; step, iteration, update (its
        number within the iteration) and last (whether it is the iteration's last update).
        """
        cfg, valid, G = self.lab.cfg, rows.valid(), counts['groups']
        score, log_p = self.score(rows)
        loss = plackett_luce_loss(score, cfg.rank_order, valid, self.top).sum() / G
        chance = plackett_luce_loss(torch.zeros_like(score), cfg.rank_order, valid, self.top).sum() / G
        worst = score.gather(1, valid.sum(1, keepdim=True) - 1)
        stats = dict(loss=loss, chance_loss=chance, train_margin=(score[:, :1] - worst).sum() / G,
                     **self.statistics(score, rows, counts))
        if cfg.sft_weight:
            sft = taylor_loss(log_p, cfg.sft_order).masked_fill(rows.owner % valid.shape[1] != 0, 0.0)
            stats['sft_loss'] = sft.sum() / counts['best_tokens']
            loss = loss + cfg.sft_weight * stats['sft_loss']
        return loss, stats

    def statistics(self, score, rows, counts):
        """Additional stats of `loss`, from the scores (G, K)."""
        return {}

    def report(self, evaluation, batch, reward):
        """Additional metrics, from fresh samples and their rewards by `scorer`, (G,) or None."""
        return {}

    def forward(self, name):
        """A trained module; compiled and under DDP if gradients are enabled."""
        return self.wrapped[name] if torch.is_grad_enabled() else self.trained[name]


class DPO(Method):
    """The data's rankings; the reference is the start."""
    options = 'beta', 'max_answers', 'rank_order', 'token_order', 'sft_weight', 'sft_order'
    best = 'rank_accuracy'


class RewardModel(Method):
    """The data's rankings, scored by a scalar head; there is no reference."""
    options = 'reward_read', 'max_answers', 'rank_order', 'sft_weight', 'sft_order'
    best = 'rank_accuracy'

    def __init__(self, lab):
        super().__init__(lab)
        self.scorer = ScalarHead(self.trained['model'], lab.cfg.reward_read)
        self.scorer.offset.requires_grad_(False)  # report_reward_model centres it
        if lab.cfg.sft_weight:  # the language loss uses the language head
            self.scorer.gpt.lm_head.requires_grad_(True)
        self.trained = dict(reward_model=self.scorer)

    def collect(self, iteration, step):
        return make_batch(self.rankings(iteration)), {}

    def score(self, rows):
        """s = r, (G, K), and log p of the tokens by the trunk's language head, (M,), or None if it is not needed."""
        reward, hidden = answer_rewards(self.lab, self.scorer, self.forward('reward_model'), rows)
        sft = self.lab.cfg.sft_weight and torch.is_grad_enabled()
        return reward, token_log_probs(self.lab, self.scorer.gpt, hidden, rows) if sft else None

    def report(self, evaluation, batch, reward):
        return report_reward_model(evaluation, batch, reward)


class SPIN(Method):
    """data > pi_t, or data > {pi_t, pi_{t-1}, ...} with more opponents; the reference is pi_t (Chen et al. 2024)."""
    options = ('beta', 'rank_order', 'token_order', 'sft_weight', 'sft_order', 'opponents', 'league', 'anchor_first',
               'margin_stop')

    def __init__(self, lab):
        super().__init__(lab)
        self.top = 1 if lab.cfg.league == 'tied' else None
        self.state = [0, 0.0, 0.0]  # of the margin of data over self: prompts, sum, sum of squares
        seen = iteration_size(lab) // lab.cfg.groups_per_step // 2 * lab.cfg.groups_per_step * lab.cfg.iterations
        if lab.cfg.margin_stop and seen < MARGIN_GROUPS:
            lab.machine.print(f'note: margin_stop has no effect: it compares the prompts of the second half of each '
                              f'first pass, here {seen:,} in all, and needs {MARGIN_GROUPS}')
        groups, limit = lab.groups['train'], lab.cfg.max_new_tokens
        if cut := (np.diff(groups.offsets)[groups.answers[groups.first[:-1]]] > limit).sum():
            lab.machine.print(f'note: {cut:,} of {len(groups.prompts):,} best answers are cut after '
                              f'max_new_tokens={limit} tokens, like samples')

    def opponents(self, iteration):
        selves = [t for t in range(iteration, iteration - self.lab.cfg.opponents, -1) if t >= 0]
        return [*selves[:-1], 0] if self.lab.cfg.anchor_first and len(selves) > 1 else selves

    def written(self, groups, iteration):
        """Answers of other writers, ranked between those of the data and of the selves: {writer: answers}."""
        return {}

    def collect(self, iteration, step):
        """Data answers are cut like sampled ones, so that neither length nor ending shows who wrote an answer."""
        lab, cfg, policy = self.lab, self.lab.cfg, self.trained['model']
        selves = self.opponents(iteration)
        if iteration and cfg.opponents > 1:
            save_self(lab, iteration, policy, step)
        whole = prepare_shp.pick_groups(lab.groups['train'], cfg.seed, iteration, iteration_size(lab))
        groups = cut_prompts(lab, whole)
        # writer -> its answers to all prompts, the best writer first
        ranked = {DATA: [group.answers[0] for group in whole], **self.written(whole, iteration)}
        log_p, sampled = {}, 0
        for t in selves:
            model = policy if t == iteration else load_self(lab, t)
            ranked[t] = sample(lab, model, [group.prompt for group in groups], iteration, t)
            sampled += sum(map(len, ranked[t]))
            if t != iteration:
                own = make_batch([group._replace(answers=[answer]) for group, answer in zip(groups, ranked[t])])
                log_p[t] = log_prob_under(lab, model, own)['log_p'][:, 0]
        batch = make_batch([group._replace(answers=[answer[:cfg.max_new_tokens] for answer in answers])
                            for group, *answers in zip(groups, *ranked.values())], list(ranked))
        found = log_prob_under(lab, policy, batch, cfg.token_order)
        log_p[iteration] = found['log_p'][:, list(ranked).index(iteration)]
        batch['log_p'] = torch.stack([log_p.get(who, torch.zeros(len(groups))) for who in ranked], 1)
        return dict(batch, ref_log_p=found['taylor']), dict(new_tokens=sampled)

    def statistics(self, score, rows, counts):
        """The margin of the data over the answers of pi_t, and its square."""
        own = rows.batch['generator'] == counts['iteration']
        margin = score[:, 0] - score.masked_fill(~own, 0.0).sum(1)
        return dict(self_margin=margin.sum() / counts['groups'], self_square=margin.square().sum() / counts['groups'])

    def after_update(self, counts, stats):
        """Ends self-play if the margin of data over self, over at least MARGIN_GROUPS prompts, is within its noise.
        """
        cfg = self.lab.cfg
        # second half of the first pass: prompts not trained on yet, and a policy that has moved away from pi_t
        size, n = iteration_size(self.lab), cfg.groups_per_step
        if size / 2 <= counts['update'] * n < size and counts['step'] > cfg.warmup_iters:
            self.state = [a + n * b for a, b in zip(self.state, (1, stats['self_margin'], stats['self_square']))]
        count, total, squares = self.state
        if not counts['last'] or count < MARGIN_GROUPS:
            return None
        mean, self.state = total / count, [0, 0.0, 0.0]
        error = math.sqrt(max(squares / count - mean ** 2, 0.0) / count)
        stats |= dict(self_margin_mean=mean, self_margin_error=error)
        if not cfg.margin_stop or mean > cfg.margin_stop * error:
            return None
        self.lab.machine.print(f'self-play ends after iteration {counts["iteration"]}: the margin of data over self is '
                               f'{mean:.4f} +- {error:.4f}, within the noise (last loss {stats["loss"]:.4f}, '
                               f'at chance {stats["chance_loss"]:.4f})')
        return 'end'


class Distillation(SPIN):
    """data > teacher > pi_t; the reference is pi_t."""
    options = ('beta', 'rank_order', 'token_order', 'sft_weight', 'sft_order', 'teacher', 'reward_model', 'margin_stop')

    def __init__(self, lab):
        super().__init__(lab)
        self.top, self.held_out_answers = None, None
        from extras.teachers import open_teacher
        self.frozen = dict(teacher=open_teacher(lab.cfg, lab.encoding, lab.groups['train']))
        if lab.cfg.reward_model:
            self.scorer = self.frozen['reward_model'] = frozen_reward_model(lab)

    def written(self, groups, iteration):
        return {TEACHER: self.frozen['teacher'].answers(self.lab, groups, iteration)}

    def report(self, evaluation, batch, reward):
        if self.held_out_answers is None:
            self.held_out_answers = self.frozen['teacher'].answers(self.lab, evaluation.asked, EVAL)
            if missing := self.held_out_answers.count(None):
                asked = len(evaluation.asked)
                self.lab.machine.print(f'note: the teacher has answers to {asked - missing} of {asked} held-out '
                                       'prompts')
        return report_teacher(evaluation, batch, self.held_out_answers, self.scorer)


class PPO(Method):
    """pi_t's samples, K per prompt; advantages come from their renormalised rewards (Schulman et al. 2017)."""
    options = ('beta', 'token_order', 'reward_model', 'answers_per_prompt', 'moment_order', 'monotone',
               'renormalize_over', 'missing_eot_penalty', 'gamma', 'gae_lambda', 'clip_range', 'kl_stop')

    def __init__(self, lab):
        super().__init__(lab)
        self.scorer = frozen_reward_model(lab)
        self.frozen = dict(reward_model=self.scorer)
        # the critic starts from the reward model's trunk, with value 0: rewards average zero for every prompt
        self.trained['critic'] = ScalarHead(copy.deepcopy(self.scorer.gpt).requires_grad_(True))

    def token_values(self, forward, rows):
        """V before each answer token, (M,)."""
        scalar, offset, _ = hidden_states(self.lab, forward, rows)
        return scalar.flatten()[rows.place] + offset

    def collect(self, iteration, step):
        """Token t of an answer gets the reward -beta (log pi - log pi_0), the last one R as well. Advantages are
        whitened over all tokens. Log-probabilities come from the training path, so that the first ratios are 1.
        """
        lab, cfg, policy, K = self.lab, self.lab.cfg, self.trained['model'], self.lab.cfg.answers_per_prompt
        whole = prepare_shp.pick_groups(lab.groups['train'], cfg.seed, iteration, iteration_size(lab))
        groups = cut_prompts(lab, whole)
        answers = sample(lab, policy, [group.prompt for group in groups for _ in range(K)], iteration, iteration)
        batch = make_batch([group._replace(answers=answers[i * K:(i + 1) * K]) for i, group in enumerate(groups)],
                           iteration)
        length = batch['answer_length'].flatten()

        def of_tokens(rows):
            old, ref = (token_log_probs(lab, gpt, hidden_states(lab, gpt, rows), rows)
                        for gpt in (policy, self.start))
            return dict(old=old, ref=ref, value=self.token_values(self.trained['critic'], rows),
                        log_p=rows.per_answer(old))

        found = for_all(lab, batch, of_tokens)
        ended = torch.tensor([answer[-1] == lab.encoding.eot_token for answer in answers]).view(len(groups), K)
        raw = rewards(lab, self.scorer, batch) - cfg.missing_eot_penalty * (~ended).float()
        renormalized = renormalize_reward(raw if cfg.renormalize_over == 'prompt' else raw.view(1, -1),
                                          cfg.moment_order, cfg.monotone)

        log_ratio = found['old'] - found['ref']
        reward = -cfg.beta * log_ratio
        reward[length.cumsum(0) - 1] += renormalized.reward.flatten()  # at the last token of each answer
        padded = [pad_sequence(x.split(length.tolist()), batch_first=True) for x in (reward, found['value'])]
        inside = torch.arange(length.max()) < length[:, None]
        advantage = gae(*padded, inside, cfg.gamma, cfg.gae_lambda)[inside]
        returns = advantage + found['value']
        std = advantage.std(correction=0)
        facts = dict(train_reward=raw.mean(), train_kl=log_ratio.sum() / len(answers),
                     renormalized_residual=renormalized.residual.mean(), exact_groups=renormalized.exact.float().mean(),
                     explained_variance=1 - std ** 2 / returns.var(correction=0).clamp(min=1e-12))
        batch |= dict(log_p=found['log_p'], reward=raw, old_log_p=found['old'], value=found['value'], returns=returns,
                      advantage=(advantage - advantage.mean()) / (std + 1e-8))
        return batch, dict({name: fact.item() for name, fact in facts.items()}, new_tokens=len(reward))

    def loss(self, rows, counts):
        """Clipped policy and value losses, averaged over the step's answer tokens. The KL is part of the reward.

        With token_order m, -T_m(p) replaces log p in the ratio; update_kl and ratio_first use the true log p.
        """
        cfg, batch, M = self.lab.cfg, rows.batch, counts['tokens']
        hidden = hidden_states(self.lab, self.forward('model'), rows)
        log_p, old_log_p = token_log_probs(self.lab, self.trained['model'], hidden, rows), batch['old_log_p']
        new, old = log_p, old_log_p
        if cfg.token_order:
            new, old = (-taylor_loss(x, cfg.token_order) for x in (log_p, old_log_p))
        policy_loss = ppo_policy_loss(new, old, batch['advantage'], cfg.clip_range).sum() / M
        value = self.token_values(self.forward('critic'), rows)
        value_loss = ppo_value_loss(value, batch['value'], batch['returns'], cfg.clip_range).sum() / M
        with torch.no_grad():
            log_ratio = log_p - old_log_p
            stats = dict(loss=policy_loss, value_loss=value_loss,
                         clip_fraction=(((new - old).exp() - 1).abs() > cfg.clip_range).sum() / M,
                         update_kl=(log_ratio.expm1() - log_ratio).sum() / M)  # of KL(pi_t || pi), Schulman's k3
            if counts['update'] == 0:
                stats['ratio_first'] = log_ratio.exp().sum() / M
        return policy_loss + value_loss, stats  # two separate modules: the sum needs no weights

    def report(self, evaluation, batch, reward):
        return dict(reward=reward.mean().item())

    def after_update(self, counts, stats):
        if self.lab.cfg.kl_stop and stats['update_kl'] > self.lab.cfg.kl_stop and not counts['last']:
            self.lab.machine.print(f'step {counts["step"]}: KL(pi_t || pi) = {stats["update_kl"]:.3f}, above kl_stop; '
                                   'this iteration ends')
            return 'next'


METHODS = dict(dpo=DPO, spin=SPIN, distill=Distillation, reward=RewardModel, ppo=PPO)
__doc__ += '\nMethods:\n' + ''.join(  # for --help
    f'\n    {name:<10} {(method.__doc__ or name).splitlines()[0]}\n{"":<15}options: {", ".join(method.options)}'
    for name, method in METHODS.items())


def frozen_reward_model(lab):
    cfg, state = lab.cfg, runs.load_run(lab.cfg, 'reward_model', lab.encoding)
    if 'reward_model' not in state:
        raise Refusal(f'reward_model={cfg.reward_model} is not a reward model; name a run of method=reward')
    scorer, block = make_scorer(state).requires_grad_(False), state['model_config']['block_size']
    if not scorer.head.weight.any():
        raise Refusal(f'reward_model={cfg.reward_model} is untrained: every reward is 0; continue its training with '
                      '--resume=True')
    if block < lab.block_size:
        raise Refusal(f"reward_model={cfg.reward_model} has a block of {block} tokens, smaller than the policy's "
                      f'{lab.block_size}; train one from a start with a block of that size')
    return scorer


# Iterations ----------------------------------------------------------------------------------------------------------


def iteration_size(lab):
    """Prompts per iteration: groups_per_iteration, or, if it is 0, the whole updates in one pass over the data."""
    cfg, rankings = lab.cfg, len(lab.groups['train'].prompts)
    if not rankings:
        raise Refusal(f'no ranking has two answers that differ within the block of {lab.block_size} tokens; use a '
                      'start with a larger block')
    count = cfg.groups_per_iteration or rankings // cfg.groups_per_step * cfg.groups_per_step
    if not count:
        raise Refusal(f'the data hold {rankings} rankings, fewer than groups_per_step={cfg.groups_per_step}; use a '
                      'smaller --groups_per_step, or prepare more data')
    return count


def updates_per_iteration(lab):
    return lab.cfg.inner_epochs * (iteration_size(lab) // lab.cfg.groups_per_step)


def step_prompts(lab, batch, iteration, update):
    """The prompts of an update: a part of a permutation that is a function of (seed, iteration, epoch)."""
    count, size = len(batch['group']), lab.cfg.groups_per_step
    epoch, part = divmod(update, count // size)
    order = np.random.default_rng((4, lab.cfg.seed, iteration, epoch)).permutation(count)
    return torch.from_numpy(order[part * size:(part + 1) * size])


def write_iteration(lab, iteration, step, batch):
    """Writes iterations/<i>.pt, for a resume, and, if answers were sampled, <i>.jsonl, for people."""
    out = Path(lab.cfg.out_dir)
    steps = [int(path.stem.removeprefix('ckpt_')) for path in runs.checkpoints(out)]
    oldest = min(steps, default=0) // updates_per_iteration(lab)  # the oldest iteration that a resume may need
    path = runs.save_checkpoint(out / 'iterations', dict(step=step, batch=batch), f'{iteration:04d}.pt')
    for folder, first, last in (('iterations', 0, oldest), ('selves', 1, oldest - lab.cfg.opponents + 1)):
        for old in (out / folder).glob('*.pt'):
            if old.stem.isdigit() and first <= int(old.stem) < last:
                old.unlink()
    if 'log_p' not in batch:
        return
    lines, prompts = [], batch['prompt'].split(batch['prompt_length'].tolist())
    for g, (prompt, answers) in enumerate(zip(prompts, answers_of(batch))):
        for k, answer in enumerate(answers):
            t = batch['generator'][g, k].item()
            line = dict(prompt=post_of(lab, prompt.tolist()), completion=text_of(lab, answer),
                        ended=answer[-1] == lab.encoding.eot_token, iteration=iteration,
                        generator={DATA: 'data', TEACHER: 'teacher'}.get(t, f'self-{t}'),
                        prompt_id=str(lab.groups['train'].ids[batch['group'][g]]))
            line |= dict(reward=batch['reward'][g, k].item()) if 'reward' in batch else dict(rank=k)
            line |= dict(log_prob=batch['log_p'][g, k].item()) if t >= 0 else {}
            lines.append(json.dumps(line) + '\n')
    runs.write_whole(path.with_suffix('.jsonl'), ''.join(lines))


def read_iteration(lab, iteration):
    path = Path(lab.cfg.out_dir) / 'iterations' / f'{iteration:04d}.pt'
    if not path.is_file():
        raise Refusal(f'{path} is missing, and its answers cannot be sampled again; start again with --overwrite=True')
    return runs.load_checkpoint(path)['batch']


if __name__ == '__main__':
    run(main, Config)
