"""What users hand in may come from anywhere: it gives a result or a refusal, and never anything else.

    python -m pytest tests/test_fuzz.py --hypothesis-profile=long       # 20,000 inputs a test in place of 100
"""
import json
import os
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepare_shp
from extras import schemas, teachers
from configurator import Refusal
from prepare_shp import END_OF_TEXT, Config, encoding, open_dataset
from toy_shp import toy_rows

ENCODING = encoding('bytes')
# what people's data hold: odd Unicode, special tokens, markup, escapes of terminals, half characters, blanks
NASTY = st.sampled_from(['', ' ', '\n', '\0', END_OF_TEXT, prepare_shp.SEPARATOR, '\nA:', '\u202e', '\ufeff', '\ud800',
                         '\x1b[2J', 'e\u0301', '\U0001f600', '\x85', '\u2028', '../..', 'x' * 300, 'NaN'])
TEXT = st.lists(st.one_of(NASTY, st.text(max_size=8)), max_size=4).map(''.join)
NUMBER = st.one_of(st.integers(-5, 5), st.integers(), st.floats(), st.booleans())
JSON = st.recursive(st.one_of(st.none(), NUMBER, TEXT), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=8)


@pytest.fixture(scope='module', autouse=True)
def work(folder):
    here = os.getcwd()
    os.chdir(folder)
    yield
    os.chdir(here)


TALK = st.lists(st.one_of(JSON, st.fixed_dictionaries(dict(
    role=st.one_of(st.sampled_from(['user', 'assistant', 'system']), TEXT), content=st.one_of(TEXT, JSON)))),
                max_size=4)
SCORED = st.one_of(JSON, st.lists(st.one_of(JSON, st.fixed_dictionaries({}, optional={
    'answer': st.one_of(TEXT, TALK), 'response': TEXT, 'rank': NUMBER, 'overall_score': st.one_of(NUMBER, JSON),
    'fine-grained_score': NUMBER}), st.fixed_dictionaries(dict(answer=TEXT, rank=st.integers(1, 3)))), max_size=5))
COLUMNS = st.dictionaries(st.sampled_from(schemas.COLUMNS), st.one_of(TEXT, st.sampled_from(
    ['prompt', 'instruction', 'answers', 'completions', 'chosen', 'rank', 'response'])), max_size=3)
ROWS = st.one_of(
    JSON,
    st.builds(lambda row, key, junk: {**row, key: junk}, st.sampled_from(list(toy_rows('train', 3, 0))),
              st.sampled_from(sorted(next(iter(toy_rows('train', 1, 0))))), st.one_of(TEXT, NUMBER, JSON)),
    st.fixed_dictionaries(dict(prompt=st.one_of(TEXT, JSON), responses=st.one_of(st.lists(TEXT, max_size=4), JSON)),
                          optional=dict(scores=st.one_of(st.lists(NUMBER, max_size=4), JSON))),
    st.fixed_dictionaries(dict(chosen=st.one_of(TEXT, TALK, JSON), rejected=st.one_of(TEXT, TALK, JSON)), optional=dict(
        prompt=st.one_of(TEXT, TALK, JSON), question=TEXT, score_chosen=st.one_of(NUMBER, JSON),
        score_rejected=NUMBER)),
    st.fixed_dictionaries({}, optional=dict(
        prompt=st.one_of(TEXT, TALK, TEXT.map('\n\nHuman: {}\n\nAssistant: '.format)),
        instruction=st.one_of(TEXT, JSON),
        responses=SCORED, completions=SCORED, answers=SCORED)))
LINES = st.one_of(ROWS.map(lambda row: json.dumps(row).encode()), st.binary(max_size=40), TEXT.map(
    lambda text: text.encode('utf-8', 'surrogatepass')), ROWS.map(lambda row: json.dumps(row).encode()[:-2]))


@given(LINES, COLUMNS)
def test_a_line_becomes_a_ranking_or_a_reason(line, columns):
    try:
        record, dropped = prepare_shp.read(prepare_shp.parsed(line), 'file:1', columns)
    except ValueError as error:
        assert type(error) is ValueError and str(error) and len(str(error)) < 400
        return
    assert len(record.answers) == len(record.scores) > 1 and all(map(str, dropped))
    assert all(a >= b for a, b in zip(record.scores, record.scores[1:]))
    for text in (record.prompt, *record.answers):
        assert text.strip() and '\0' not in text and text.encode()


CHOICE = st.fixed_dictionaries({}, optional=dict(text=st.one_of(TEXT, JSON), finish_reason=st.one_of(TEXT, JSON),
                                               message=st.one_of(JSON, st.builds(dict, content=TEXT))))
KEYS = dict(post_id=st.one_of(TEXT, JSON), prompt_id=TEXT, id=st.one_of(TEXT, JSON), custom_id=TEXT,
            prompt=st.one_of(TEXT, TALK, JSON), ended=st.one_of(st.booleans(), JSON), finish_reason=JSON)
COMPLETION = st.one_of(
    JSON,
    st.fixed_dictionaries({}, optional=dict(KEYS, completion=st.one_of(TEXT, JSON), text=st.one_of(TEXT, JSON),
                                            generated_text=st.one_of(TEXT, TALK, JSON))),
    st.fixed_dictionaries(dict(response=st.one_of(JSON, st.builds(dict, body=st.one_of(JSON, st.builds(
        dict, choices=st.one_of(JSON, st.lists(st.one_of(CHOICE, JSON), max_size=2))))))),
        optional=dict(KEYS, error=JSON)))


@given(st.lists(st.one_of(COMPLETION.map(lambda row: json.dumps(row).encode()), st.binary(max_size=30)), max_size=5))
def test_completions_from_anywhere(lines):
    """Ids of ordinary text, or a sentence that says which lines do not fit."""
    groups = open_dataset(Config(dataset='small', source='rows', encoding='bytes')).groups('val')
    sound = [json.dumps(dict(post_id=str(id), completion='so it is')).encode() for id in dict.fromkeys(groups.ids)]
    Path('fuzzed_teacher.jsonl').write_bytes(b'\n'.join([*sound, *(line.replace(b'\n', b'') for line in lines)]))
    cfg = types.SimpleNamespace(teacher='fuzzed_teacher.jsonl', max_new_tokens=20)
    try:
        teacher = teachers.open_teacher(cfg, ENCODING, groups)
    except Refusal as refusal:
        assert 'fuzzed_teacher.jsonl' in str(refusal)
        return
    for key in teacher.rows:
        ids = teacher.ids(key, key)
        assert 0 < len(ids) <= 20 and ENCODING.eot_token not in ids[:-1]
