"""How a preference run is judged: by held-out rankings, by fresh samples, and beside rankers that are cheap.

Letters: G prompts, K answers a prompt, A tokens an answer.
"""
import json

import numpy as np
import torch

import toy_shp
from answers import (answer_tokens, for_all_groups, group_batch, log_prob_under, pack, past_self, post_of, rewards,
                     sample, shorten, text_of)
from losses import plackett_luce_loss
from model import logit_rows
from prepare_shp import pick_groups, visible
from train import ECE_BINS

EVAL_SEED = 0   # which held-out groups are judged is the same in all runs
EVAL = 2 ** 31  # the iteration whose random numbers all evaluations share
SHOWN = 4       # posts whose samples are printed before and after
KEPT = 16       # samples of an evaluation that samples.jsonl keeps


@torch.no_grad()
def evaluate(run, samples_log):
    """-> the metrics of an 'eval' line: held-out rankings, and fresh samples beside pi_0. Raises Stopped."""
    policy, start = run.trained.get('model'), past_self(run, 0)
    if 'held' not in run.known:
        held = group_batch(held_out(run), run.block_size)
        run.known['held'] = dict(held, ref_log_p=log_prob_under(run, start, held, run.cfg.token_order))
    held = run.known['held']
    valid = held['answer_length'] > 0
    score = for_all_groups(run, held, lambda micro: run.method.score(run, micro)[0])
    speaker = policy or start
    log_p = log_prob_under(run, speaker, held)
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
        own = log_prob_under(run, speaker, samples)[:, 0]
        entropy = for_all_groups(run, samples, lambda micro: token_entropy(run, speaker, micro)).sum()
        started = log_prob_under(run, start, samples)[:, 0]
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
        scorer = run.trained.get('reward_model') or run.frozen.get('reward_model')
        reward = rewards(run, scorer, samples)[:, 0] if scorer else None
        metrics |= run.method.report(run, samples, posts, reward)
        if scorer:
            columns['reward'] = reward.tolist()
        for i, (post, answer) in enumerate(zip(posts[:KEPT], answers)):
            samples_log.write('eval', step=run.step, prompt=post, completion=text_of(run, answer),
                              ended=bool(ended[i]), **{name: column[i] for name, column in columns.items()})
    return metrics


def held_out(run):
    groups = run.groups[run.cfg.eval_split]
    return pick_groups(groups, EVAL_SEED, 0, min(run.cfg.eval_groups or len(groups.prompts), len(groups.prompts)))


def held_out_posts(run):
    """The longest ranking of each of the first eval_samples distinct held-out prompts."""
    groups, longest = run.groups[run.cfg.eval_split], {}
    for group in pick_groups(groups, EVAL_SEED, 0, len(groups.prompts)):
        known = longest.setdefault(tuple(group.prompt), group)
        if len(group.answers) > len(known.answers):
            longest[tuple(group.prompt)] = group
    return list(longest.values())[:run.cfg.eval_samples]


def pair_statistics(scores, valid):
    """scores, valid (G, K), best first -> share of pairs in order (ties one half), mean difference, calibration error.

    The difference of scores is the log-odds that the first is preferred; ECE over equal bins of the confidence.
    """
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    both = valid[:, first] & valid[:, second]
    gap = (scores[:, first] - scores[:, second])[both].double()
    right = (gap > 0).double() + (gap == 0) / 2
    confidence = gap.abs().sigmoid()
    bin = ((confidence.nan_to_num(0.5) - 0.5) * 2 * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    error = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bin, right - confidence)
    right = right.where(gap.isfinite(), torch.nan)  # a NaN must not be chosen as the best
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
        return (weight[batch['answer']] * answer_tokens(batch)).sum(-1)

    for _ in range(100):
        with torch.enable_grad():
            loss = plackett_luce_loss(bag(train), 0, train['answer_length'] > 0).mean() + 1e-3 * weight.square().sum()
        weight.grad, = torch.autograd.grad(loss, weight)
        adam.step()
    valid = held['answer_length'] > 0
    sign = 1.0 if pair_statistics(train['answer_length'].float(), train['answer_length'] > 0)[1] >= 0 else -1.0
    found = dict(rank_accuracy_length=pair_statistics(sign * held['answer_length'], valid)[0],
                 rank_accuracy_bag=pair_statistics(bag(held).detach(), valid)[0])
    if is_toy(run):
        posts = [post_of(run, ids[:n]) for ids, n in zip(held['prompt'].tolist(), held['prompt_length'])]
        found['rank_accuracy_truth'] = pair_statistics(qualities(run, held, posts), valid)[0]
    return found


def token_entropy(run, model, batch):
    """Entropy in nats of the distribution that each answer token was drawn from: (G, K, A)."""
    packed = pack(batch)
    drawn, entropy = packed.targets >= 0, torch.zeros(packed.idx.shape, device=packed.idx.device)
    with run.machine.autocast():
        hidden = model(packed.idx, positions=packed.positions, mask=packed.mask)[drawn]
        entropy[drawn] = torch.cat([torch.special.entr(model.logits(rows).softmax(-1)).sum(-1).float()
                                    for rows in hidden.split(logit_rows(model))])
    return packed.tokens(entropy)


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


# The toy data know the truth ------------------------------------------------------------------------------------------


def is_toy(run):
    return run.cfg.source == 'toy'


def qualities(run, batch, posts):
    """toy_shp.quality of all answers, (G, K)."""
    return torch.tensor([[toy_shp.quality(post, text_of(run, answer[:length])) for answer, length in zip(*group)]
                         for post, *group in zip(posts, batch['answer'].tolist(), batch['answer_length'].tolist())])


def quality_of_others(run, groups, posts):
    """The true quality of the data's best and of all the data's answers to these prompts, and of random letters."""
    data = group_batch(groups, run.block_size)
    quality, valid = qualities(run, data, posts), data['answer_length'] > 0
    letters = np.random.default_rng(0)
    noise = [toy_shp.quality(post, ''.join(letters.choice(list('abcdefghijklmnopqrstuvwxyz .'), 30))) for post in posts]
    return dict(true_quality_best=quality[:, 0].mean().item(), true_quality_data=quality[valid].mean().item(),
                true_quality_random=float(np.mean(noise)))


# What a method adds to an evaluation ----------------------------------------------------------------------------------


def report_nothing(run, samples, posts, reward):
    return {}


def report_reward(run, samples, posts, reward):
    """Centres the reward model on samples of the start, and says how it agrees with the true quality of toy answers.

    A ranking loss does not see the offset, and no optimizer moves it: it is set here alone.
    """
    offset = run.trained['reward_model'].offset
    if reward.isfinite().all():
        offset -= reward.mean().to(offset.device)
    reward -= reward.mean()  # the samples are shown with what the centred model says
    metrics = dict(reward_std=reward.std(correction=0).item())
    if is_toy(run):
        both = torch.stack([reward, qualities(run, samples, posts)[:, 0]])
        if (both.std(1, correction=0) > 0).all():
            metrics['reward_quality_correlation'] = torch.corrcoef(both)[0, 1].item()
    return metrics


def report_policy_reward(run, samples, posts, reward):
    return dict(reward=reward.mean().item())


def report_between(run, samples, posts, reward):
    """Do the teacher's answers lie between the data's best and the student's own, on held-out prompts?"""
    whole = held_out_posts(run)
    if 'teacher' not in run.known:
        taught = run.known['teacher'] = run.frozen['teacher'].answers(run, whole, EVAL)
        if None in taught:  # a file of completions need not have the held-out prompts
            run.machine.print(f'note: the teacher has answers to {len(whole) - taught.count(None)} of {len(whole)} '
                              'held-out prompts; what evaluations say of it is about those')
    own = [answer[:length] for answer, length in zip(samples['answer'][:, 0].tolist(), samples['answer_length'][:, 0])]
    rows = [i for i, answer in enumerate(run.known['teacher']) if answer is not None]
    if not rows:
        return {}
    held, metrics = shorten(run, whole), {}
    batch = group_batch([held[i]._replace(answers=[held[i].answers[0], run.known['teacher'][i], own[i]]) for i in rows],
                        run.block_size, run.cfg.max_new_tokens)
    judges = {}
    if 'reward_model' in run.frozen:
        judges['reward'] = rewards(run, run.frozen['reward_model'], batch)
    if is_toy(run):
        judges['quality'] = qualities(run, batch, [posts[i] for i in rows])
    for judge, r in judges.items():
        metrics |= {f'{judge}_{who}': mean.item() for who, mean in zip(('data', 'teacher', 'self'), r.mean(0))}
        metrics[f'{judge}_agrees'] = ((r[:, 0] >= r[:, 1]) & (r[:, 1] >= r[:, 2])).float().mean().item()
    return metrics
