"""Runs a model on prompts and answers: rows of tokens, log-probabilities, rewards, samples, past selves.

Letters: G prompts, K answers per prompt, M answer tokens in all, B rows of T tokens. A batch is a dict of tensors:

    prompt (sum of prompt_length,)    ids of all prompts, one after the other
    prompt_length (G,)
    answer (M,)                       ids of all answers, prompt by prompt, best first; with end-of-text unless cut
    answer_length (G, K)              0 = no such answer
    group (G,)                        number of the prompt's ranking in the data
    generator (G, K)                  who wrote the answer: DATA, TEACHER, or t for pi_t
    log_p (G, K)                      spin, distill, ppo: log pi(y|x) under the self that wrote y; 0 for other writers
    ref_log_p (G, K)                  dpo, spin, distill: log pi_ref(y|x), or its replacement under token_order
    reward (G, K)                     ppo: the reward model's, less missing_eot_penalty, before it is renormalised
    old_log_p, value, returns, advantage (M,)    ppo: of each answer token

A tensor has one row per prompt or one per token, so memory is proportional to the number of tokens.
"""
import hashlib
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import prepare_shp
from configurator import progress
from losses import linear_token_log_prob, taylor_loss, to_device
from model import GPT, GPTConfig, ScalarHead
from runs import Machine, RunConfig, StopSignal, load_checkpoint, save_checkpoint

DATA, TEACHER = -1, -2  # who wrote an answer; t >= 0 is pi_t
ROW_TOKENS = 2048  # a longer row is split before the next answer: masks grow with the square of the length
MICRO_TOKENS = dict(cpu=2 ** 12, cuda=2 ** 15, mps=2 ** 15)  # of a micro-batch: more than a CPU's cache holds is slower


class Lab(NamedTuple):
    """What does not change during a run, and what most functions here need."""
    cfg: RunConfig            # preference.Config
    machine: Machine
    encoding: tiktoken.Encoding
    groups: dict              # split -> prepare_shp.Groups
    block_size: int           # of the policy
    stop: StopSignal
    start: dict               # the start's checkpoint: model, model_config


class Stopped(Exception):
    """A signal arrived during a collection or an evaluation; all ranks leave it together."""


# Rows of answers -----------------------------------------------------------------------------------------------------


def cut_prompts(lab, groups):
    """list of Group -> the same, prompts cut to their last block_size - max_new_tokens tokens."""
    room = lab.block_size - lab.cfg.max_new_tokens
    return [group._replace(prompt=group.prompt[-room:]) for group in groups]


def cut_answers(lab, groups):
    """Cuts each of the data's answers to the rest of the block after its prompt; a cut answer has no end-of-text."""
    return [group._replace(answers=[answer[:lab.block_size - len(group.prompt)] for answer in group.answers])
            for group in cut_prompts(lab, groups)]


def usable_rankings(lab, groups):
    """Drops answers that equal a better one after the cut, then rankings that keep one answer.

    prepare_shp.Groups -> Groups, and a phrase on what was cut and dropped ('' if nothing was).
    """
    room, length, counts = lab.block_size - lab.cfg.max_new_tokens, np.diff(groups.offsets).tolist(), Counter()
    rows, kept, first = [], [], [0]  # rankings and answers to keep, by number
    for g, prompt in enumerate(groups.prompts):
        rest, distinct = lab.block_size - min(length[prompt], room), {}
        counts['prompts lose their beginning'] += length[prompt] > room
        for a in range(groups.first[g], groups.first[g + 1]):
            distinct.setdefault(groups.piece(groups.answers[a])[:rest].tobytes(), a)
            counts['answers are cut'] += length[groups.answers[a]] > rest
        if len(distinct) == 1:
            counts['rankings keep only one answer and are dropped'] += 1
            continue
        counts['cut answers equal a better one and are dropped'] += a + 1 - groups.first[g] - len(distinct)
        rows.append(g)
        kept += distinct.values()
        first.append(len(kept))
    usable = groups._replace(prompts=groups.prompts[rows], ids=groups.ids[rows], answers=groups.answers[kept],
                             scores=groups.scores[kept], first=np.array(first))
    return usable, ', '.join(f'{n:,} {what}' for what, n in counts.items() if n)


def make_batch(groups, generator=DATA):
    """A list of Group, cut to the block -> a batch. generator: one for all, or one for each answer of a group."""
    K = max(len(group.answers) for group in groups)
    length = [[len(answer) for answer in group.answers] + [0] * (K - len(group.answers)) for group in groups]
    return dict(prompt=torch.tensor([id for group in groups for id in group.prompt]),
                prompt_length=torch.tensor([len(group.prompt) for group in groups]),
                answer=torch.tensor([id for group in groups for answer in group.answers for id in answer]),
                answer_length=torch.tensor(length), group=torch.tensor([group.number for group in groups]),
                generator=torch.tensor(generator).expand(len(groups), K).contiguous())


def token_rows(batch, rows):
    """Which of a batch's answer tokens belong to the prompts `rows`: (m,), in the order of these prompts."""
    ends = batch['answer_length'].sum(1).cumsum(0)
    starts = ends - batch['answer_length'].sum(1)
    return torch.cat([torch.arange(starts[g], ends[g]) for g in rows])


def select(batch, rows):
    """The prompts `rows` of a batch, with their answers, as a batch."""
    prompts, tokens = batch['prompt'].split(batch['prompt_length'].tolist()), token_rows(batch, rows)
    chosen = {name: x[rows if len(x) == len(batch['group']) else tokens] for name, x in batch.items()
              if name != 'prompt'}
    return dict(chosen, prompt=torch.cat([prompts[g] for g in rows]))


def answers_of(batch):
    """The answers of a batch as lists of ids: G lists of up to K."""
    ids = iter(batch['answer'].tolist())
    return [[list(islice(ids, length)) for length in lengths if length] for lengths in batch['answer_length'].tolist()]


class Rows(NamedTuple):
    """A batch packed into rows: a prompt once, then its answers, each of which attends to the prompt and itself.

    A row has one prompt. If its answers fill more than ROW_TOKENS, it gets several rows.
    """
    idx: torch.Tensor        # (B, T)
    positions: torch.Tensor  # (B, T): of a token in its own text, prompt and one answer
    mask: torch.Tensor       # (B, 1, T, T) bool: the tokens that a token attends to
    place: torch.Tensor      # (M,): index in the flattened rows where each answer token is predicted
    owner: torch.Tensor      # (M,): which of the G * K answers it belongs to
    end: torch.Tensor        # (G, K): index in the flattened rows of an answer's last token
    batch: dict              # the batch, on the device

    def per_answer(self, x):
        """x (M,) -> its sums over the tokens of each answer: (G, K)."""
        length = self.batch['answer_length']
        return x.new_zeros(length.numel()).index_add(0, self.owner, x).view_as(length)

    def valid(self):
        return self.batch['answer_length'] > 0


def pack(batch, device='cpu'):
    """A batch -> Rows. A row: the prompt without its last token, then, for each answer, that token and the answer."""
    rows, row, column, owner = [], [], [], []  # the last three for each answer token
    length, ids = batch['answer_length'], iter(batch['prompt'].tolist())
    for g, (P, answers) in enumerate(zip(batch['prompt_length'].tolist(), answers_of(batch))):
        *before, last = islice(ids, P)
        for k, answer in enumerate(answers):
            n = len(answer)
            if k == 0 or len(rows[-1][0]) + n >= ROW_TOKENS:
                rows.append((before[:], list(range(P - 1)), [-1] * (P - 1)))
            idx, positions, text = rows[-1]
            row += [len(rows) - 1] * n
            column += range(len(idx), len(idx) + n)
            owner += [g * length.shape[1] + k] * n
            idx += [last, *answer]
            positions += range(P - 1, P + n)
            text += [k] * (n + 1)
    T = max(len(idx) for idx, _, _ in rows)
    idx, positions, text = (to_device(torch.from_numpy(np.array([x + [fill] * (T - len(x)) for x in part])), device)
                            for part, fill in zip(zip(*rows), (0, 0, -2)))
    mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask = mask & ((text[:, :, None] == text[:, None]) | (text[:, None] == -1))
    place, owner = T * torch.tensor(row) + torch.tensor(column), torch.tensor(owner)
    end = torch.zeros(length.numel(), dtype=torch.long).scatter_reduce(0, owner, place + 1, 'amax').view_as(length)
    place, owner, end = (to_device(x, device) for x in (place, owner, end))
    return Rows(idx, positions, mask[:, None], place, owner, end,
                {name: to_device(x, device) for name, x in batch.items()})


def micro_batches(lab, batch, rows=None):
    """The prompts `rows` (None: all) -> this rank's share in micro-batches: a list of tensors of row numbers.

    Sorted by length, to reduce padding. A micro-batch has micro_groups prompts or, if that is 0, as many as fill
    MICRO_TOKENS.
    """
    answers = batch['answer_length']
    tokens = batch['prompt_length'] + (answers + (answers > 0)).sum(1)  # a row repeats the prompt's last token
    rows = torch.arange(len(tokens)) if rows is None else rows
    mine = rows[tokens[rows].argsort(stable=True)][lab.machine.rank::lab.machine.world_size]
    if not len(mine):
        return []
    if lab.cfg.micro_groups:
        return mine.split(lab.cfg.micro_groups)
    parts, first = [], 0
    for i, length in enumerate(tokens[mine].tolist()):  # all rows of a part are padded to its last
        if i > first and (i + 1 - first) * length > MICRO_TOKENS[lab.machine.device.type]:
            parts.append(mine[first:i])
            first = i
    return [*parts, mine[first:]]


# Through a model -----------------------------------------------------------------------------------------------------


def spread(lab, parts, what, function):
    """Calls function(part) on this rank's parts -> [(part, result)] of all ranks. Raises Stopped after a signal."""
    found = []
    for part in progress(parts, what, lab.machine.print):
        if lab.stop.number:
            break
        found.append((part, function(part)))
    if lab.machine.sum([lab.stop.number])[0]:
        raise Stopped
    return sum(lab.machine.gather(found), [])


@torch.no_grad()
def for_all(lab, batch, function):
    """Calls function(Rows) -> dict of tensors (g, K) or (m,) on all prompts of a batch, divided among the ranks.

    -> dict of (G, K) or (M,) on the CPU, the same on every rank.
    """
    def of_part(rows):
        return {name: x.float().cpu() for name, x in function(pack(select(batch, rows), lab.machine.device)).items()}

    result = {}
    for rows, found in spread(lab, micro_batches(lab, batch), 'scoring answers', of_part):
        for name, x in found.items():
            per_answer = x.ndim == 2
            shape = batch['answer_length' if per_answer else 'answer'].shape
            result.setdefault(name, torch.zeros(shape))[rows if per_answer else token_rows(batch, rows)] = x
    return result


def hidden_states(lab, forward, rows):
    """The output of a model for Rows: (B, T, C), or the tuple of a ScalarHead."""
    with lab.machine.autocast():
        return forward(rows.idx, positions=rows.positions, mask=rows.mask)


def token_log_probs(lab, model, hidden, rows):
    """log p of each answer token, (M,). The head runs on answer tokens only, one chunk of logits at a time."""
    with lab.machine.autocast():
        return linear_token_log_prob(hidden.flatten(0, 1).index_select(0, rows.place), model.lm_head.weight,
                                     rows.batch['answer'], model.config.vocab_size)


def answer_log_prob(rows, log_p, token_order):
    """-sum_t T_m(p_t) over an answer's tokens, m = token_order: (M,) -> (G, K), nats. m = 0 is log pi(y|x)."""
    return rows.per_answer(-taylor_loss(log_p, token_order))


def log_prob_under(lab, model, batch, token_order=0):
    """All answers under a frozen model: dict(log_p, taylor = -sum T_m(p), m = token_order), (G, K) each."""
    def function(rows):
        log_p = token_log_probs(lab, model, hidden_states(lab, model, rows), rows)
        return dict(log_p=rows.per_answer(log_p), taylor=answer_log_prob(rows, log_p, token_order))
    return for_all(lab, batch, function)


def rewards(lab, scorer, batch):
    """r of all answers under a ScalarHead: (G, K), 0 where there is no answer."""
    return for_all(lab, batch, lambda rows: dict(r=answer_rewards(lab, scorer, scorer, rows)[0]))['r']


def answer_rewards(lab, scorer, forward, rows):
    """-> r (G, K), and the hidden states that it was computed from. forward: the ScalarHead, or its DDP."""
    scalar, offset, hidden = hidden_states(lab, forward, rows)
    scalar = scalar.flatten()
    # a token is predicted at `place`; its own position is `place` + 1
    r = scalar[rows.end] if scorer.read == 'last' else rows.per_answer(scalar[rows.place + 1])
    return (r + offset).masked_fill(~rows.valid(), 0.0), hidden


# Samples -------------------------------------------------------------------------------------------------------------


def sample(lab, model, prompts, iteration, who):
    """One answer of `model` to each prompt at temperature 1: lists of ids -> lists of ids, the same on every rank.

    Uniform numbers are a function of (seed, iteration, who, place): the number of ranks changes only the rounding.
    """
    cfg = lab.cfg
    rng = np.random.default_rng((5, cfg.seed, iteration, who))
    uniform = torch.from_numpy(rng.random((len(prompts), cfg.max_new_tokens), np.float32))

    def generate(rows):
        with lab.machine.autocast():
            return model.generate([prompts[i] for i in rows], cfg.max_new_tokens, eot=lab.encoding.eot_token,
                                  uniform=uniform[rows])

    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return in_batches(lab, by_length, 'sampling answers', generate)


def in_batches(lab, places, what, generate):
    """Calls generate(places) -> answers on all places, sample_batch at a time, on all ranks -> all answers."""
    mine, size = places[lab.machine.rank::lab.machine.world_size], lab.cfg.sample_batch
    parts = [mine[i:i + size] for i in range(0, len(mine), size)]
    answers = {i: answer for part, new in spread(lab, parts, what, generate) for i, answer in zip(part, new)}
    return [answers[i] for i in range(len(places))]


def text_of(lab, ids):
    return lab.encoding.decode([id for id in ids if id != lab.encoding.eot_token])


def post_of(lab, prompt):
    """The post that a prompt was rendered from."""
    return text_of(lab, prompt).removesuffix(prepare_shp.SEPARATOR)


# Models and past selves ----------------------------------------------------------------------------------------------


def make_gpt(state):
    """A GPT from a checkpoint, dropout off: log-probabilities of the policy and of its reference must be comparable."""
    gpt = GPT(GPTConfig(**dict(state['model_config'], dropout=0.0)))
    gpt.load_state_dict(state['model'])
    return gpt.eval()


def make_scorer(state):
    gpt = GPT(GPTConfig(**dict(state['model_config'], dropout=0.0)))
    scorer = ScalarHead(gpt, state['config'].get('reward_read', 'last'))
    scorer.load_state_dict(state['reward_model'])
    return scorer.eval()


def weights_hash(weights):
    digest = hashlib.sha256()
    for name, w in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(w.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_self(lab, t, policy, step):
    """Saves the policy as pi_t in selves/, an opponent in later iterations."""
    state = dict(step=step, model_config=asdict(policy.config), model=policy.state_dict())
    lab.machine.on_rank_0(lambda: save_checkpoint(Path(lab.cfg.out_dir) / 'selves', state, f'{t:04d}.pt'))


def load_self(lab, t):
    return make_gpt(load_checkpoint(Path(lab.cfg.out_dir) / 'selves' / f'{t:04d}.pt')).to(lab.machine.device)
