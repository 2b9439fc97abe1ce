"""Whole answers under a model: their log-probabilities, rewards and samples, by past selves and by teachers too.

Letters: G prompts, K answers a prompt, A tokens an answer, T tokens of a packed row. A batch is a dict of tensors with
G in front: prepare_shp.group_batch's, and what (G, K) or (G, K, A) a method adds to it.
"""
import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import prepare_shp
from configurator import Refusal, progress
from losses import linear_token_log_prob, taylor_loss
from model import GPT, GPTConfig, ScalarHead
from runs import crop, load_checkpoint, not_own_folder, open_start, save_checkpoint

DATA, TEACHER = -1, -2   # who wrote an answer; t >= 0 is pi_t
MASK_ENTRIES = 2 ** 25  # of attention's masks, that a micro-batch may hold


@dataclass
class Run:
    """What the methods share: the run's modules by name, its data, and where it stands."""
    cfg: object             # preference.Config
    method: object          # preference.Method
    machine: object         # train.Machine
    groups: dict            # split -> prepare_shp.Groups
    encoding: object
    trained: dict           # name -> module; 'model' is the policy
    frozen: dict            # name -> module
    ddp: dict               # trained modules as the loss calls them
    stop: object            # train.StopSignal
    step: int = 0
    sampled_tokens: int = 0
    selves: dict = field(default_factory=dict)  # t -> sha256 of the weights of pi_t
    known: dict = field(default_factory=dict)   # what evaluations need again and again: made once

    @property
    def block_size(self):
        return next(iter(self.trained.values())).config.block_size

    def forward(self, name):
        """The trained module as updates call it, or where there is no gradient to share, itself."""
        return self.ddp[name] if torch.is_grad_enabled() else self.trained[name]


class Stopped(Exception):
    """A signal came during a collection or an evaluation; all ranks leave it together."""


# Rows of answers -----------------------------------------------------------------------------------------------------


def group_batch(picked, block_size, max_answer_length=0):
    """list of Group -> dict of padded int64 tensors, every field with G in front, best answers first:

        prompt (G, P), prompt_length (G,), answer (G, K, A), answer_length (G, K), 0 = no such answer, group (G,)

    A prompt and any of its answers fit into the block: an answer is cut to max_answer_length (0 = the block less one),
    without its end-of-text then, and a prompt that is too long for the longest answer loses its beginning.
    """
    limit = max_answer_length or block_size - 1
    answers = [[answer[:limit] for answer in group.answers] for group in picked]
    prompts = [group.prompt[-(block_size - max(map(len, of_group))):] for group, of_group in zip(picked, answers)]
    K, A = max(map(len, answers)), max(len(answer) for of_group in answers for answer in of_group)
    prompt = np.zeros((len(picked), max(map(len, prompts))), np.int64)
    answer, length = np.zeros((len(picked), K, A), np.int64), np.zeros((len(picked), K), np.int64)
    for g, (ids, of_group) in enumerate(zip(prompts, answers)):
        prompt[g, :len(ids)] = ids
        for k, ids in enumerate(of_group):
            answer[g, k, :len(ids)], length[g, k] = ids, len(ids)
    arrays = dict(prompt=prompt, prompt_length=np.array([len(ids) for ids in prompts]), answer=answer,
                  answer_length=length, group=np.array([group.number for group in picked]))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def answer_tokens(batch):
    """Which places of a group_batch's `answer` hold a token: (G, K, A) bool."""
    return torch.arange(batch['answer'].shape[2], device=batch['answer'].device) < batch['answer_length'][..., None]


class Packed(NamedTuple):
    """Groups as rows of tokens in which a prompt stands once for all its answers: P - 1 tokens of the prompt, then for
    each answer the prompt's last token and the answer's own. What GPT.forward takes, and where to read what it gives.
    """
    idx: torch.Tensor        # (G, T) int64
    targets: torch.Tensor    # (G, T) int64: the next token of the same answer, -1 where there is none
    positions: torch.Tensor  # (G, T) int64: of a token in its own text, prompt and one answer
    mask: torch.Tensor       # (G, 1, T, T) bool: a token sees the prompt and what stands before it in its answer
    place: torch.Tensor      # (G, K, A) int64: where in T each token of an answer is the target
    end: torch.Tensor        # (G, K) int64: where in T the answer's last token stands
    inside: torch.Tensor     # (G, K, A) bool: False = padding

    def tokens(self, x, after=0):
        """x (G, T) -> what it holds where each answer token is the target: (G, K, A), 0 in the padding.

        after=1: where the token itself stands, one place further on.
        """
        return x.gather(1, (self.place + after * self.inside).flatten(1)).view(self.place.shape).masked_fill(
            ~self.inside, 0.0)

    def ends(self, x):
        """x (G, T) -> what it holds at each answer's last token: (G, K), 0 where there is no answer."""
        return x.gather(1, self.end).masked_fill(~self.inside[..., 0], 0.0)


def pack(batch):
    """A group_batch -> Packed, on the batch's device."""
    prompt, stem, answer, length = batch['prompt'], batch['prompt_length'] - 1, batch['answer'], batch['answer_length']
    (G, K, A), P, device = answer.shape, prompt.shape[1], prompt.device
    size = length + (length > 0)                                # of an answer's stretch of the row
    first = stem[:, None] + size.cumsum(1) - size               # where it begins
    T = int((stem + size.sum(1)).max())                         # column T takes what is padding, and is cut off
    inside = answer_tokens(batch)
    place = first[..., None] + torch.arange(A, device=device)
    stretch = torch.arange(A + 1, device=device).expand(G, K, A + 1)
    there = torch.where(stretch < size[..., None], first[..., None] + stretch, T).flatten(1)
    in_prompt = torch.arange(P, device=device).expand(G, P)
    in_prompt_there = torch.where(in_prompt < stem[:, None], in_prompt, T)

    def fill(outside, of_prompt, of_answers):
        row = torch.full((G, T + 1), outside, device=device)
        return row.scatter_(1, in_prompt_there, of_prompt).scatter_(1, there, of_answers.flatten(1))[:, :T]

    last = prompt.gather(1, stem[:, None])[:, None].expand(G, K, 1)
    nothing = torch.full((G, K, A + 1), -1, device=device)
    idx = fill(0, prompt, torch.cat([last, answer], 2))
    targets = fill(-1, nothing[:, 0, :1].expand(G, P), torch.where(
        stretch < length[..., None], torch.cat([answer, nothing[..., :1]], 2), -1))
    positions = fill(0, in_prompt, stem[:, None, None] + stretch)
    text = fill(-1, torch.zeros_like(prompt), torch.arange(1, K + 1, device=device)[:, None].expand(G, K, A + 1))
    before = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask = before & ((text[:, :, None] == text[:, None]) | (text[:, None] == 0))
    return Packed(idx, targets, positions, mask[:, None], place.clamp(max=T - 1),
                  (first + length).clamp(max=T - 1), inside)



# Through a model ------------------------------------------------------------------------------------------------------


def micro_batch(run, batch, rows):
    """The groups `rows` of a batch on the device, trimmed to their own longest prompt, ranking and answer."""
    P = int(batch['prompt_length'][rows].max())
    K = int((batch['answer_length'][rows] > 0).sum(1).max())
    A = int(batch['answer_length'][rows].max())
    trimmed = {}
    for name, x in batch.items():  # (G,), (G, P) of the prompt, else (G, K) or (G, K, A)
        size = () if x.ndim == 1 else (P,) if name == 'prompt' else (K, A)[:x.ndim - 1]
        trimmed[name] = x[rows][(slice(None), *map(slice, size))].to(run.machine.device, non_blocking=True)
    return trimmed


def shares(run, batch, rows=None):
    """The groups `rows` (None: all) of a batch -> this rank's, in micro-batches: a list of tensors of row numbers.

    Sorted by length, so that they hold little padding. Of micro_groups, or where that is 0, of as many as keep the
    masks of attention below MASK_ENTRIES.
    """
    tokens = batch['prompt_length'] + (batch['answer_length'] + 1).sum(1)
    rows = torch.arange(len(tokens)) if rows is None else rows
    mine = rows[tokens[rows].argsort(stable=True)][run.machine.rank::run.machine.world_size]
    if not len(mine):
        return []
    return mine.split(run.cfg.micro_groups or max(1, MASK_ENTRIES // int(tokens[mine].max()) ** 2))


@torch.no_grad()
def for_all_groups(run, batch, function):
    """function(micro-batch) -> (g, K[, A]) over all groups of a batch, shared among the ranks.

    -> (G, K[, A]) on the CPU and the same on every rank, 0 where trimmed. Raises Stopped after a signal.
    """
    parts = []
    for rows in progress(shares(run, batch), 'scoring answers', run.machine.print):
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


def answer_token_log_prob(run, model, forward, batch):
    """log p of each token of each answer given its prompt: (G, K, A), 0 in the padding. forward: the model, or its DDP.
    """
    packed = pack(batch)
    with run.machine.autocast():
        return head_log_prob(model, packed, forward(packed.idx, positions=packed.positions, mask=packed.mask))


def head_log_prob(model, packed, hidden):
    """The head sees only answer tokens, a chunk of logits at a time."""
    log_p = linear_token_log_prob(hidden.flatten(0, 1), model.lm_head.weight, packed.targets.flatten(),
                                  model.config.vocab_size)
    return packed.tokens(log_p.view_as(packed.idx))


def answer_log_prob(log_p, token_order=0):
    """log pi(y|x) = sum_t log p_t over an answer's tokens, its end-of-text included: (G, K, A) -> (G, K), nats.

    token_order m: -sum_t T_m(p_t) in its place. m = 0 is the log-probability itself.
    """
    return (-taylor_loss(log_p, token_order) if token_order else log_p).sum(-1)


def log_prob_under(run, model, batch, token_order=0):
    """log pi(y|x) of all answers under a frozen model: (G, K), by the training path."""
    return for_all_groups(run, batch,
                          lambda micro: answer_log_prob(answer_token_log_prob(run, model, model, micro), token_order))


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


def token_values(run, critic, batch):
    """V before each token of each answer, (G, K, A)."""
    packed = pack(batch)
    with run.machine.autocast():
        scalar, offset, _ = critic(packed.idx, positions=packed.positions, mask=packed.mask)
    return packed.tokens(scalar + offset)


# Samples --------------------------------------------------------------------------------------------------------------


def sample(run, model, prompts, iteration, who):
    """One answer of `model` to each prompt at temperature 1: lists of ids -> lists of ids, the same on every rank.

    Shared among the ranks. Uniform numbers are a function of (seed, iteration, who, place), so that the number of ranks
    changes nothing but rounding. Raises Stopped after a signal.
    """
    cfg, eot = run.cfg, run.encoding.eot_token
    rng = np.random.default_rng((5, cfg.seed, iteration, who))
    uniform = torch.from_numpy(rng.random((len(prompts), cfg.max_new_tokens), np.float32))
    mine = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))[run.machine.rank::run.machine.world_size]
    answers = {}
    for first in progress(range(0, len(mine), cfg.sample_batch), 'sampling answers', run.machine.print):
        if run.stop.number:
            break
        rows = mine[first:first + cfg.sample_batch]
        with run.machine.autocast():
            new = model.generate([prompts[i] for i in rows], cfg.max_new_tokens, eot=eot, uniform=uniform[rows])
        answers.update(zip(rows, new))
    leave_together(run)
    return gather_answers(run, answers)


def gather_answers(run, answers):
    """{place: answer} of each rank -> the list of all."""
    every = {place: answer for share in run.machine.gather(answers) for place, answer in share.items()}
    return [every[place] for place in range(len(every))]


def shorten(run, groups):
    """Prompts lose their beginning, so that max_new_tokens fit behind them in the block."""
    room = run.block_size - run.cfg.max_new_tokens
    return [group._replace(prompt=group.prompt[-room:]) for group in groups]


def text_of(run, ids):
    return run.encoding.decode([id for id in ids if id != run.encoding.eot_token])


def post_of(run, prompt):
    """The post that a prompt was rendered from."""
    return text_of(run, prompt).removesuffix(prepare_shp.SEPARATOR)


# Other runs, the start and past selves --------------------------------------------------------------------------------


def load_pi_0(cfg, resuming, encoding):
    """pi_0: what init_from names, or, when a run is resumed, what it has kept of it."""
    not_own_folder(cfg, 'init_from', 'reward_model', 'teacher')
    if resuming:
        return crop(load_self(cfg.out_dir, 0), cfg.block_size, cfg.out_dir)
    return open_start(cfg, encoding)


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
    state = load_self(run.cfg.out_dir, t)
    if weights_hash(state['model']) != run.selves[t]:
        raise Refusal(f'{run.cfg.out_dir}/selves/{t:04d}.pt is not the pi_{t} of this run; start anew with '
                      '--overwrite=True')
    return make_gpt(state).to(run.machine.device)


def load_self(out_dir, t):
    path = Path(out_dir) / 'selves' / f'{t:04d}.pt'
    if not path.is_file():
        raise Refusal(f'{path}, the pi_{t} of this run, is missing; start anew with --overwrite=True')
    return load_checkpoint(path)
