"""Teachers: a run, a Hugging Face model, and files of completions as tools write them."""
import json
import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import answers
import evaluate
import preference
from configurator import Refusal
from conftest import write_rows
from extras import teachers
from prepare_shp import SEPARATOR, Group, pick_groups
from runs import load_checkpoint
from test_preference import a_run, config, texts

pytestmark = pytest.mark.usefixtures('work')
EOT = 256


def open_teacher(run, path):
    return teachers.open_teacher(replace(run.cfg, teacher=str(path)), run.encoding, run.groups['train'])


def ask(run, path, groups):
    return open_teacher(run, path).answers(run, groups, 0)


def distinct(run, split):
    """A Group for each distinct prompt of a split."""
    groups = run.groups[split]
    prompts = {tuple(groups.piece(p).tolist()): g for g, p in enumerate(groups.prompts)}
    return [Group(g, str(groups.ids[g]), list(prompt), []) for prompt, g in prompts.items()]


def post(group):
    return bytes(group.prompt).decode().removesuffix(SEPARATOR)


def answer_to(group):
    """A completion that names its prompt, below 20 bytes."""
    return f'to {teachers.own_id(post(group))}'


def named(group):
    return [*answer_to(group).encode()] + [EOT]


def test_a_run_teaches_by_its_samples(tmp_path):
    run, method = a_run(tmp_path, 'distill')
    batch, _ = method.collect(0, 0)
    assert batch['generator'][0].tolist() == [answers.DATA, answers.TEACHER, 0]
    picked = pick_groups(run.groups['train'], 0, 0, 8)
    uniform = torch.from_numpy(np.random.default_rng((5, 0, 0, 2 ** 32)).random((8, 20), 'float32'))
    teacher = answers.make_gpt(load_checkpoint('teacher', 'best.pt'))
    expected = teacher.generate([group.prompt for group in picked], 20, eot=EOT, uniform=uniform)
    assert [answer for _, k, _, answer in texts(batch) if k == 1] == expected


class Tokenizer:
    """Of another vocabulary: one id a character, 0 ends."""
    pad_token, eos_token, eos_token_id = None, 'end', 0

    def __len__(self):
        return 256

    def __call__(self, prompts, return_tensors, padding, truncation, max_length):
        assert max_length == 80  # of 100, less 20 for the answer
        self.pad_token_id = 0
        assert self.pad_token == 'end' and all(prompt.endswith(SEPARATOR) for prompt in prompts)
        rows = [[0] * (99 - len(prompt)) + [ord(c) for c in prompt] for prompt in prompts]
        return Batch(input_ids=torch.tensor(rows))

    def decode(self, ids, skip_special_tokens):
        return ''.join(map(chr, ids))


class Batch(dict):
    def to(self, device):
        return self


class LM(torch.nn.Module):
    config = types.SimpleNamespace(max_position_embeddings=100)
    generation_config = types.SimpleNamespace(eos_token_id=[0, 7])  # either ends an answer

    def generate(self, input_ids, max_new_tokens, do_sample, temperature, top_k, top_p, pad_token_id):
        assert (do_sample, temperature, top_k, top_p, max_new_tokens) == (True, 1.0, 0, 1.0, 20)
        new = torch.tensor([[ord('o'), ord('k'), 0, 0]] * len(input_ids))
        new[0, 2:] = ord('!')
        new[1, 2:] = torch.tensor([7, ord('!')])
        return torch.cat([input_ids, new], 1)


def test_a_hugging_face_model_teaches_in_text(tmp_path, monkeypatch):
    run, _ = a_run(tmp_path, 'distill')
    picked, missing = pick_groups(run.groups['train'], 0, 0, 8), set()
    monkeypatch.setitem(sys.modules, 'transformers', types.SimpleNamespace(
        AutoTokenizer=types.SimpleNamespace(from_pretrained=lambda name, padding_side, truncation_side: Tokenizer()),
        AutoModelForCausalLM=types.SimpleNamespace(from_pretrained=lambda name, output_loading_info: (
            LM(), dict(missing_keys=missing)))))
    assert ask(run, 'somebody/small', picked) == [[*b'ok!!'], *[[*b'ok', EOT]] * 7]
    missing.add('h.1.ln_1.weight')
    with pytest.raises(Refusal, match='lacks the weight h.1.ln_1.weight'):
        ask(run, 'somebody/small', picked)
    missing.clear()
    monkeypatch.setattr(LM.config, 'max_position_embeddings', 20)
    with pytest.raises(Refusal, match='has a context of 20 tokens, no room'):
        ask(run, 'somebody/small', picked)


def shapes(prompt, id, answer):
    """The lines in which tools write that `answer`, cut off, follows the rendered prompt of a post."""
    text, cut = prompt.removesuffix(SEPARATOR), dict(finish_reason='length')
    question, reply = dict(role='user', content=text), dict(role='assistant', content=answer)

    def body(**choice):
        return dict(id='batch-1', custom_id=id, response=dict(status_code=200, body=dict(choices=[choice | cut])))

    return {
        'ours': dict(prompt=text, completion=answer, ended=False),
        'vLLM': dict(prompt=prompt, text=answer, **cut),
        'by id': dict(prompt_id=id, text=answer, **cut),
        'a response': dict(prompt_id=id, response=answer, **cut),
        'an id of its own': dict(id='cmpl-1', prompt=prompt, text=answer, **cut),
        'pipeline': dict(prompt=prompt, generated_text=prompt + answer, **cut),
        'pipeline, by id': dict(id=id, generated_text=prompt + answer, **cut),
        'pipeline, of the post alone': dict(prompt=text, generated_text=text + answer, **cut),
        'pipeline, return_full_text=False': dict(prompt=prompt, generated_text=answer, **cut),
        'pipeline, chat': dict(prompt_id=id, prompt=[question], generated_text=[question, reply], **cut),
        'batch, completions': body(index=0, text=answer),
        'batch, chat': body(index=0, message=reply)}


@pytest.mark.parametrize('shape', shapes('p', 'i', 'a'))
def test_completions_as_tools_write_them(tmp_path, shape, capsys):
    """From the prompts that extras.teachers writes, through a tool, to the answers to each split's prompts."""
    run, _ = a_run(tmp_path, 'distill')
    cfg = teachers.Config(dataset='small', source='rows', encoding='bytes', prompts=str(tmp_path / 'p.jsonl'))
    teachers.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / 'p.jsonl').read_text().splitlines()]
    assert f'{len(rows)} prompts' in capsys.readouterr().out
    groups = distinct(run, 'train') + distinct(run, 'val')
    assert {row['prompt'] for row in rows} == {bytes(group.prompt).decode() for group in groups}
    id_of = {row['prompt']: row['prompt_id'] for row in rows}
    if shape in ('by id', 'batch, chat'):  # that of the post does as well
        id_of = {bytes(group.prompt).decode(): group.id for group in groups}
    lines = [shapes(prompt, id, f'on {teachers.own_id(prompt)}')[shape] for prompt, id in id_of.items()]
    path = write_rows(tmp_path / 'a.jsonl', lines)
    for split in ('train', 'val'):
        groups = distinct(run, split)[::-1]
        wanted = [f'on {teachers.own_id(bytes(group.prompt).decode())}'.encode() for group in groups]
        assert [bytes(ids) for ids in ask(run, path, groups)] == wanted
    assert f'{len(lines)} do not end within max_new_tokens=20' in capsys.readouterr().out
    with pytest.raises(Refusal, match='p.jsonl exists; name another file'):
        teachers.main(cfg)


@pytest.mark.parametrize('answered', [0, 5])
def test_held_out_prompts_get_their_own_answers_or_none(tmp_path, answered, capsys, monkeypatch):
    """With more held-out prompts than train has: an answer belongs to its prompt, and the report is on those alone."""
    run, method = a_run(tmp_path, 'distill', eval_samples=30)
    run.groups.update(train=run.groups['val'], val=run.groups['train'])
    train, held = distinct(run, 'train'), distinct(run, 'val')
    assert len(held) > len(train)
    known = held[:answered]
    rows = [dict(prompt=post(group), completion=answer_to(group)) for group in train + known]
    teacher = open_teacher(run, write_rows(tmp_path / 'a.jsonl', rows))
    assert teacher.answers(run, train, 0) == [named(group) for group in train]
    assert teacher.answers(run, held, 0) == [named(group) for group in known] + [None] * (len(held) - len(known))

    batches, method.frozen['teacher'], method.scorer = [], teacher, True
    monkeypatch.setattr(evaluate, 'rewards', lambda run, scorer, batch: (
        batches.append(batch) or batch['answer_length'].float()))
    evaluation = evaluate.Evaluation(run, method, None)
    whole = evaluation.asked
    own = answers.make_batch([group._replace(answers=[[*b'own', EOT]]) for group in whole])
    reports = [method.report(evaluation, own, None) for _ in range(2)]
    asked = [group for group in whole if post(group) in map(post, known)]
    note = f'the teacher has answers to {len(asked)} of {len(whole)} held-out prompts'
    assert capsys.readouterr().out.count(note) == 1
    assert bool(reports[0]) == bool(asked) and reports[0] == reports[1] and (asked or not known)
    for batch in batches:
        assert [of_group[1] for of_group in answers.answers_of(batch)] == [named(group) for group in asked]
        assert (batch['answer_length'][:, 2] == 4).all()


@pytest.mark.parametrize('lines, words', [
    (['', '{"prompt": "a"}'], 'line 2: completion is missing or null'),
    (['[1]', 'rubbish'], 'line 1: not a JSON object; .*; line 2: not JSON'),
    (['{"post_id": "a", "completion": "x", "ended": "no"}'], 'line 1: .* "ended" is neither true nor false'),
    (['{"post_id": "stranger", "completion": "x"}'],
     r'no completion for (.*) of \1 prompts, for example id .*, and 1 for other prompts. To write the prompts'),
    (['{"prompt": "a", "completion": "x"}'] * 3, r"line 3: a second completion of 'a\\nA:\\n'; keep one, for ex"),
    (['{"prompt_id": "a", "text": "a post", "generated_text": "x"}'], 'it has text and generated_text; keep the one'),
    (['{"prompt_id": "a", "generated_text": [{"role": "user", "content": "x"}]}'], 'does not end with the assistant'),
    (['{"custom_id": "a", "response": null, "error": "out of memory"}'] * 4,
     r'\(5 problems\): .* line 1: its response does not have exactly one choice; rep'),
    ([], 'has no completion')])
def test_completions_that_do_not_fit_are_refused(tmp_path, lines, words):
    path = tmp_path / 'written.jsonl'
    path.write_text('\n'.join(lines))
    with pytest.raises(Refusal, match=words):
        preference.main(config(tmp_path / 'run', 'distill', teacher=str(path)))
    assert not (tmp_path / 'run').exists()


def test_an_id_and_a_prompt_must_be_of_one(tmp_path):
    """A prompt that lost its beginning joins by its id; a held-out prompt keeps its answer, whatever its id."""
    run, _ = a_run(tmp_path, 'distill')
    train, held = distinct(run, 'train'), distinct(run, 'val')[0]
    rows = [dict(prompt_id=group.id, prompt=post(group)[5:], completion=answer_to(group)) for group in train]
    rows.append(dict(prompt_id=train[3].id, prompt=post(held), completion=answer_to(held)))
    path, asked = write_rows(tmp_path / 'a.jsonl', rows), [*train, held]
    assert ask(run, path, asked) == [named(group) for group in asked]
    for changes, words in ((dict(prompt=post(train[0])), 'line 2: its id and its prompt belong to two prompts'),
                           (dict(post_id=train[0].id), 'line 2: its ids belong to two prompts of train')):
        with pytest.raises(Refusal, match=words):
            ask(run, write_rows(tmp_path / 'b.jsonl', [row | changes for row in rows]), train)


def test_an_iteration_teaches(tmp_path):
    """What one run sampled, another learns from: one answer a prompt."""
    run, _ = a_run(tmp_path, 'spin', opponents=1)
    picked = [group._replace(answers=[[*b'fine', EOT]] * 2) for group in distinct(run, 'train')]
    batch = answers.make_batch(picked, [answers.DATA, 0])
    preference.write_iteration(run, 0, 0, dict(batch, log_p=torch.zeros(len(picked), 2)))
    path = tmp_path / 'run' / 'iterations' / '0000.jsonl'
    with pytest.raises(Refusal, match=re.escape(f'({len(picked)} problems)') + ': line 2: a second completion of'):
        ask(run, path, picked)
    rows = [json.loads(line) for line in path.read_text().splitlines() if '"generator": "self-0"' in line]
    assert ask(run, write_rows(tmp_path / 'one.jsonl', rows), picked) == [[*b'fine', EOT]] * len(picked)
    rows = [row | dict(completion='') for row in rows]  # answers that end at once
    assert ask(run, write_rows(tmp_path / 'two.jsonl', rows), picked) == [[EOT]] * len(picked)
