"""What an evaluation of preferences reports: held-out rankings, fresh samples, cheap baselines.

Letters as in answers.py.
"""
import numpy as np
import torch
import torch.nn.functional as F

import toy_shp
from answers import (answers_of, cut_answers, cut_prompts, for_all, hidden_states, log_prob_under, make_batch, post_of,
                     rewards, sample, text_of, token_log_probs)
from losses import calibration_gaps, entropy, plackett_luce_loss
from prepare_shp import pick_groups, visible
from runs import read_events

EVAL_SEED = 0   # all runs evaluate the same held-out groups
EVAL = 2 ** 31  # the iteration number that seeds the samples of all evaluations
SHOWN = 4       # posts whose first and last samples are printed at the end
KEPT = 16       # samples per evaluation in samples.jsonl


class Evaluation:
    """evaluation(step) -> the metrics of an 'eval' line. What does not change from step to step is computed once.

    method: a preference.Method. Its policy answers held-out prompts; if it trains none, the start does.
    """

    def __init__(self, lab, method, samples_log):
        self.lab, self.method, self.start, self.samples_log = lab, method, method.start, samples_log
        self.policy, self.toy = method.trained.get('model') or method.start, lab.cfg.source == 'toy'
        held_out = lab.groups[lab.cfg.eval_split]
        groups, longest = pick_groups(held_out, EVAL_SEED, 0, len(held_out.prompts)), {}
        self.ranked = groups[:lab.cfg.eval_groups or None]
        self.held = make_batch(cut_answers(lab, self.ranked))
        for group in groups:  # the longest ranking of each distinct prompt
            before = longest.setdefault(tuple(group.prompt), group)
            if len(group.answers) > len(before.answers):
                longest[tuple(group.prompt)] = group
        self.asked = list(longest.values())[:lab.cfg.eval_samples]  # answered at each evaluation
        self.prompts = [group.prompt for group in cut_prompts(lab, self.asked)]
        self.posts = [post_of(lab, group.prompt) for group in self.asked]  # whole, for true quality

    def __call__(self, step):
        return self.rankings(step) | (self.samples(step) if self.asked else {})

    def rankings(self, step):
        lab, held, valid = self.lab, self.held, self.held['answer_length'] > 0
        if 'ref_log_p' not in held:
            of_start = log_prob_under(lab, self.start, held, lab.cfg.token_order)
            held |= dict(log_p=of_start['log_p'], ref_log_p=of_start['taylor'])
        found = for_all(lab, held, self.method.judge)
        score, log_p = found['score'], found.get('log_p', held['log_p'])  # a reward run has no policy but the start
        accuracy, margin, ece = pair_statistics(score, valid)
        metrics = dict(rank_accuracy=accuracy, margin=margin, rank_ece=ece,
                       rank_loss=plackett_luce_loss(score, 0, valid).mean().item(),
                       rank_accuracy_logp=pair_statistics(log_p, valid)[0], chosen_logp=log_p[:, 0].mean().item(),
                       rejected_logp=log_p.gather(1, valid.sum(1, keepdim=True) - 1).mean().item())
        return metrics | (self.baselines() if step == 0 else {})

    def samples(self, step):
        """Samples one answer to each held-out prompt: KL to the start, entropy, length, quality."""
        lab, eot = self.lab, self.lab.encoding.eot_token
        answers = sample(lab, self.policy, self.prompts, EVAL, 0)
        batch = make_batch([group._replace(prompt=prompt, answers=[answer])
                            for group, prompt, answer in zip(self.asked, self.prompts, answers)])
        own = for_all(lab, batch, self.log_p_and_entropy)
        log_p = start_log_p = own['log_p'][:, 0]
        if self.policy is not self.start:
            start_log_p = log_prob_under(lab, self.start, batch)['log_p'][:, 0]
        ended = torch.tensor([answer[-1] == eot for answer in answers])
        length = batch['answer_length'].sum(1) - ended.long()
        metrics = dict(kl=(log_p - start_log_p).mean().item(), entropy=own['entropy'].mean().item(),
                       answer_length=length.float().mean().item(), eot_rate=ended.float().mean().item())
        columns = dict(ended=ended, log_prob=log_p)
        if self.toy:
            columns['true_quality'] = self.qualities(batch, self.posts)[:, 0]
            metrics['true_quality'] = columns['true_quality'].double().mean().item()
            if step == 0:
                metrics |= self.quality_of_others()
        if self.method.scorer:
            columns['reward'] = rewards(lab, self.method.scorer, batch)[:, 0]
        metrics |= self.method.report(self, batch, columns.get('reward'))
        for i, (post, answer) in enumerate(zip(self.posts[:KEPT], answers)):
            self.samples_log.write('eval', step=step, prompt=post, completion=text_of(lab, answer),
                                   **{name: column[i].item() for name, column in columns.items()})
        return metrics

    def log_p_and_entropy(self, rows):
        """Of the policy's own samples: log pi(y|x) (G, K), and the entropy (M,) of the distribution of each token."""
        hidden = hidden_states(self.lab, self.policy, rows)
        with self.lab.machine.autocast():
            chunks = self.policy.log_prob_chunks(hidden.flatten(0, 1)[rows.place])
            of_token = torch.cat([entropy(log_p) for log_p in chunks])
        return dict(log_p=rows.per_answer(token_log_probs(self.lab, self.policy, hidden, rows)), entropy=of_token)

    def baselines(self):
        """Rank accuracy of cheap rankers that ignore the question and, on the toy data, of the true quality.

        length: the longer answer, or the shorter if that orders more of the training pairs; bag: a sum of weights of
        the answer's tokens, fitted to at most 4,000 training rankings by 100 steps of Adam.
        """
        lab, held = self.lab, self.held
        groups = lab.groups['train']
        train = make_batch(cut_answers(lab, pick_groups(groups, EVAL_SEED, 0, min(4000, len(groups.prompts)))))
        weight = torch.zeros(lab.encoding.n_vocab, 1, requires_grad=True)
        adam = torch.optim.Adam([weight], lr=0.02, weight_decay=2e-3)

        def bag(batch):
            length = batch['answer_length'].flatten()
            starts = length.cumsum(0) - length
            return F.embedding_bag(batch['answer'], weight, starts, mode='sum').view_as(batch['answer_length'])

        for _ in range(100):
            loss = plackett_luce_loss(bag(train), 0, train['answer_length'] > 0).mean()
            weight.grad, = torch.autograd.grad(loss, weight)
            adam.step()
        valid = held['answer_length'] > 0
        longer = pair_statistics(train['answer_length'].float(), train['answer_length'] > 0)[0] >= 0.5
        length = held['answer_length'].float() if longer else -held['answer_length'].float()
        found = dict(rank_accuracy_length=pair_statistics(length, valid)[0],
                     rank_accuracy_bag=pair_statistics(bag(held).detach(), valid)[0])
        if self.toy:
            posts = [post_of(lab, group.prompt) for group in self.ranked]
            found['rank_accuracy_truth'] = pair_statistics(self.qualities(held, posts), valid)[0]
        return found

    # true quality, known for the toy data

    def qualities(self, batch, posts):
        """toy_shp.quality of all answers, (G, K), 0 where there is no answer."""
        quality = torch.zeros(batch['answer_length'].shape)
        for g, (post, answers) in enumerate(zip(posts, answers_of(batch))):
            for k, answer in enumerate(answers):
                quality[g, k] = toy_shp.quality(post, text_of(self.lab, answer))
        return quality

    def quality_of_others(self):
        """The true quality of the data's best and of all the data's answers to these prompts, and of random letters."""
        data = make_batch(cut_answers(self.lab, self.asked))
        quality, valid = self.qualities(data, self.posts), data['answer_length'] > 0
        rng, letters = np.random.default_rng(0), list('abcdefghijklmnopqrstuvwxyz .')
        noise = [toy_shp.quality(post, ''.join(rng.choice(letters, 30))) for post in self.posts]
        return dict(true_quality_best=quality[:, 0].mean().item(), true_quality_data=quality[valid].mean().item(),
                    true_quality_random=float(np.mean(noise)))


def pair_statistics(scores, valid):
    """scores, valid (G, K), best first -> share of pairs in order (a tie is 1/2), mean difference, calibration error.

    The difference of scores is the log-odds that the first is preferred.
    """
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    both = valid[:, first] & valid[:, second]
    gap = (scores[:, first] - scores[:, second])[both].double()
    right = (gap > 0).double() + (gap == 0) / 2
    ece = calibration_gaps(gap.abs().sigmoid(), right, lowest=0.5).abs().sum().item() / len(gap)
    right = right.where(gap.isfinite(), torch.nan)  # a NaN must not be chosen as the best
    return right.mean().item(), gap.mean().item(), ece


def show_samples(out_dir):
    """Prints the samples of the first posts before and after training, from samples.jsonl."""
    lines = read_events(out_dir / 'samples.jsonl')
    before, after = ([line for line in lines if line['step'] == lines[i]['step']][:SHOWN] for i in (0, -1))
    for old, new in zip(before, after):
        print('-' * 40 + '\n' + visible(new['prompt']))
        for name, line in (('before', old), ('after', new)):
            scores = ', '.join(f'{key} {line[key]:.2f}' for key in ('reward', 'true_quality') if key in line)
            print(f'  {name:<7}{visible(line["completion"])}' + (f'  [{scores}]' if scores else '')
                  + ('' if line['ended'] else ' [cut]'))


# Metrics of single methods --------------------------------------------------------------------------------------------


def report_reward_model(evaluation, batch, reward):
    """Centres the reward model on samples of the start; on the toy also its correlation with the true quality.

    A ranking loss does not depend on the offset, and no optimizer updates it: it is set only here.
    """
    offset = evaluation.method.scorer.offset
    if reward.isfinite().all():
        offset -= reward.mean().to(offset.device)
    reward -= reward.mean()  # samples.jsonl has the centred rewards
    metrics = dict(reward_std=reward.std(correction=0).item())
    if evaluation.toy:
        both = torch.stack([reward, evaluation.qualities(batch, evaluation.posts)[:, 0]])
        metrics['reward_quality_correlation'] = torch.corrcoef(both)[0, 1].item()  # NaN if all rewards are equal
    return metrics


def report_teacher(evaluation, batch, teacher, scorer):
    """Whether the teacher's answers lie between the data's best and the policy's own, on held-out prompts.

    teacher: its answer to each of evaluation.asked, or None.
    """
    lab, own = evaluation.lab, answers_of(batch)
    rows = [i for i, answer in enumerate(teacher) if answer is not None]
    if not rows:
        return {}
    room = lab.cfg.max_new_tokens
    three = make_batch([evaluation.asked[i]._replace(prompt=evaluation.prompts[i], answers=[
        evaluation.asked[i].answers[0][:room], teacher[i], own[i][0]]) for i in rows])
    judges, metrics = {}, {}
    if scorer is not None:
        judges['reward'] = rewards(lab, scorer, three)
    if evaluation.toy:
        judges['quality'] = evaluation.qualities(three, [evaluation.posts[i] for i in rows])
    for name, r in judges.items():
        metrics |= {f'{name}_{who}': mean.item() for who, mean in zip(('data', 'teacher', 'self'), r.mean(0))}
        metrics[f'{name}_agrees'] = ((r[:, 0] >= r[:, 1]) & (r[:, 1] >= r[:, 2])).float().mean().item()
    return metrics
