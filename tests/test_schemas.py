"""Schemas of rows and the Hub: what becomes of each shape, that no preference is made up, and the refusals."""
import json
from pathlib import Path

import datasets
import pytest

import prepare_shp
from configurator import Refusal
from conftest import write_rows
from extras import schemas
from prepare_shp import Config, open_dataset, prepare, render
from test_prepare_shp import local, ranked_texts, work  # noqa: F401, work: a fixture


def talk(*turns):
    return [dict(role=('user', 'assistant')[i % 2], content=turn) for i, turn in enumerate(turns)]


def read(row, **columns):
    """-> (prompt, answers best first)"""
    ranking, dropped = prepare_shp.read(row, 'f:1', columns)
    assert ranking.id == 'f:1' and not dropped and list(ranking.scores) == sorted(ranking.scores, reverse=True)
    return ranking.prompt, list(ranking.answers)


ASKED, YES, NO = talk('Hi?'), [dict(role='assistant', content='yes')], [dict(role='assistant', content='no')]
ULTRA = dict(instruction='Hi?', source='x', completions=[
    dict(model='a', response='no', overall_score=2.0, **{'fine-grained_score': 4.5}),
    dict(model='b', response='yes', overall_score=8, **{'fine-grained_score': 3.0})])
NECTAR = dict(prompt='\n\nHuman: Hi?\n\nAssistant: ', turns=1, answers=[
    dict(answer='no', model='a', rank=2.0), dict(answer='yes', model='b', rank=1.0)])
SCHEMAS = {
    'ranked, scores': dict(prompt='Hi?', responses=['yes', 'no'], scores=[3, -2.5]),
    'explicit': dict(prompt='Hi?', chosen='yes', rejected='no'),
    'explicit talk': dict(prompt=ASKED, chosen=YES, rejected=NO),
    'explicit, answers as talk': dict(prompt='Hi?', chosen=YES, rejected=NO),
    'implicit': dict(chosen='Hi? yes', rejected='Hi? no'),
    'implicit dialogue': dict(chosen='\n\nHuman: Hi?\n\nAssistant: yes', rejected='\n\nHuman: Hi?\n\nAssistant: no'),
    'implicit talk': dict(chosen=ASKED + YES, rejected=ASKED + NO),
    'implicit talk beside its prompt': dict(prompt='Hi?', prompt_id='x', chosen=ASKED + YES, rejected=ASKED + NO,
                                            score_chosen=8.0, score_rejected=5.0),
    'UltraFeedback': ULTRA,
    'UltraFeedback, its fine-grained score': dict(prompt='Hi?', completions=[
        {'response': 'no', 'overall_score': None, 'fine-grained_score': 1.5},
        {'response': 'yes', 'overall_score': 8.0, 'fine-grained_score': 3.0}]),
    'Nectar': NECTAR,
    'responses with scores of their own': dict(prompt='Hi?', responses=[dict(answer='no', score=1),
                                                                       dict(answer='yes', score=2)]),
}


@pytest.mark.parametrize('name', SCHEMAS)
def test_every_schema_gives_the_same_ranking(name):
    prompt, answers = read(SCHEMAS[name])
    assert (prompt.strip(), [text.strip() for text in answers]) == ('Hi?', ['yes', 'no'])


def test_columns_of_other_names():
    assert read(ULTRA, score='fine-grained_score')[1] == ['no', 'yes']  # the other score says the opposite
    mine = dict(question='Hi?', replies=[dict(body='no', place=2), dict(body='yes', place=1)])
    assert read(mine, prompt='question', responses='replies', answer='body', rank='place') == ('Hi?', ['yes', 'no'])
    assert read(dict(q='Hi?', good='yes', bad='no'), prompt='q', chosen='good', rejected='bad')[1] == ['yes', 'no']
    answers = [dict(answer='worse', score=9, place=2), dict(answer='better', score=1, place=1)]
    assert read(dict(prompt='q', answers=answers), rank='place')[1] == ['better', 'worse']


def test_conversations_of_several_turns():
    several = talk('a', 'b', 'c')
    assert schemas.as_text(several) == 'a\n\nAssistant: b\n\nHuman: c' and schemas.as_text('a') == 'a'
    for line in (dict(prompt=several, chosen=YES, rejected=NO), dict(chosen=several + YES, rejected=several + NO),
                 dict(prompt='\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ', answers=NECTAR['answers'])):
        assert read(line) == ('a\n\nAssistant: b\n\nHuman: c', ['yes', 'no'])
    assert read(dict(chosen=talk('a', 'b', 'c', 'd'), rejected=talk('a', 'e', 'f', 'g'))) == (
        'a', ['b\n\nHuman: c\n\nAssistant: d', 'e\n\nHuman: f\n\nAssistant: g'])
    system = [dict(role='system', content='Be kind.')]
    assert read(dict(prompt=system + ASKED, chosen=YES, rejected=NO))[0] == 'Be kind.\n\nHuman: Hi?'


@pytest.mark.parametrize('chosen, rejected, expected', [
    ('Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: Yes, it is', 'Human: a\n\nAssistant: b\n\nHuman: c'
     '\n\nAssistant: Yes, it may', ('a\n\nAssistant: b\n\nHuman: c', ['Yes, it is', 'Yes, it may'])),
    ('Human: a\n\nAssistant: b1\n\nHuman: c', 'Human: a\n\nAssistant: b2\n\nHuman: d',
     ('a', ['b1\n\nHuman: c', 'b2\n\nHuman: d'])),
    ('The sky is blue.', 'The sky is black.', ('The sky is', ['blue.', 'black.'])),
    ('Human: a\n\nAssistant: b\n\nHuman: c', 'Human: a\n\nAssistant: b\n\nHuman: d', 'part before the assistant'),
    ('Human: a\n\nAssistant: b', 'Human: a\n\nAssistant: b ', 'equal'),
    ('Human: a\n\nAssistant: b', 'Human: a\n\nAssistant: b, c', 'beginning of the other'),
    ('Human: a\n\nAssistant: b', 'Human: a\n\nAssistant:\n', 'an answer is empty'),
    ('Sure', 'Sorry', 'prompt is missing'),
    (ASKED + YES, ASKED, 'beginning of the other')])
def test_implicit_prompts_end_at_the_last_turn_of_both(chosen, rejected, expected):
    line = dict(chosen=chosen, rejected=rejected)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(line)
    else:
        prompt, answers = read(line)
        assert (prompt.strip(), [answer.strip() for answer in answers]) == expected


def test_rows_of_ties_alone_are_counted():
    tied = dict(prompt='q', answers=[dict(answer='a', rank=1), dict(answer='b', rank=1)])
    drawn = dict(prompt='q', chosen='a', rejected='b', score_chosen=5, score_rejected=5)
    good = [dict(prompt=f'{i}', chosen='yes', rejected='no') for i in range(40)]
    meta, _ = local([tied, drawn] + good, max_bad_fraction=0.0)
    assert meta['rows']['train'] == {'read': 42, 'kept': 40, 'all answers tied': 2}


BAD = {
    'prompt is null': dict(prompt=None, chosen='I think yes', rejected='I think no'),
    'it has no prompt, but a column that may be': dict(question='Hi?', chosen='I think yes', rejected='I think no'),
    'an answer is not text': dict(prompt='Hi?', chosen=[dict(role='assistant', content=None)], rejected=NO),
    'chosen and rejected part before the assistant answers': dict(
        chosen=[dict(role='system', content='s')] + ASKED + YES,
        rejected=[dict(role='system', content='s')] + talk('Ho?') + NO),
    'score_chosen is below score_rejected': dict(prompt='Hi?', chosen='a', rejected='b', score_chosen=1,
                                                 score_rejected=2),
    'no column answer or response in its answers': dict(prompt='Hi?', answers=[dict(text='a', rank=1)] * 2),
    'no column score or overall_score or fine-grained_score or rank in its answers':
        dict(prompt='Hi?', answers=[dict(answer='a'), dict(answer='b')]),
    'no column promt': dict(chosen='I say yes', rejected='I say no'),
    'no column rating': dict(prompt='q', responses=['a', 'b']),
    'fine_grained_score in its answers': ULTRA,
}
COLUMNS = {'no column promt': dict(prompt='promt'), 'no column rating': dict(scores='rating'),
           'fine_grained_score in its answers': dict(score='fine_grained_score')}


@pytest.mark.parametrize('reason', BAD)
def test_what_does_not_fit_is_refused(reason):
    """A column that is mapped and not there is no other one."""
    with pytest.raises(ValueError, match=reason):
        prepare_shp.read(BAD[reason], 'f:1', COLUMNS.get(reason, {}))


def test_prompts_that_are_rendered_alike_stay_on_one_side():
    lines = [dict(prompt=f'p{i}{blank}', chosen=f'yes{blank}!', rejected='no')
             for i in range(40) for blank in ('', ' ')]
    _, data = local(lines)
    of_split = [{prompt for prompt, *_ in ranked_texts(data.groups(split))} for split in ('train', 'val', 'test')]
    assert sum(map(len, of_split)) == len(set.union(*of_split)) == 40 and all(of_split)


def test_options():
    for name in ('hf:stanfordnlp/SHP', 'hf:imdb', 'hf:a/b:c-d_1.0'):
        assert not list(Config(source=name, dataset='d', columns=('prompt:a', 'train:b:c')).check())
    for name in ('hf:', 'hf:../x', 'hf:a/b/c', 'hf:a b', 'hf:https://x.y'):
        assert 'is not a dataset of the Hub' in list(Config(source=name, dataset='d').check())[0]
    for pair in ('prompt', 'prompt:', 'promt:x', ':x'):
        assert 'is not OURS:THEIRS' in list(Config(columns=(pair,)).check())[0]
    assert 'maps a split, which works for the Hub only; name the file train.jsonl' in list(
        Config(source='rows.jsonl', dataset='d', columns=('train:x',)).check())[0]


def test_ids_of_files_of_one_name_differ():
    lines = [dict(prompt=f'q{i}', chosen='yes', rejected='no') for i in range(40)]
    write_rows('DIR/a/train.json', lines[:20])
    write_rows('DIR/b/train.json', lines[20:])
    prepare(Config(dataset='d', source='DIR', encoding='bytes'))
    groups = open_dataset(Config(dataset='d')).groups('train')
    assert len(set(groups.ids)) == len(groups.ids) and 'a/train.json:1' in groups.ids


def test_the_hubs_splits_and_columns(monkeypatch):
    def rows(split, n):
        return [dict(text=f'{split} {i}', prompt_id='x', chosen=talk(f'{split} {i}', 'yes'),
                     rejected=talk(f'{split} {i}', 'no'), score_chosen=9.0, score_rejected=1.0) for i in range(n)]

    def load_dataset(*args):
        assert args == ('owner/name', 'prefs')
        splits = dict(train_prefs=rows('a', 30), train_sft=rows('b', 3), test_prefs=rows('c', 4))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    cfg = Config(dataset='d', source='hf:owner/name:prefs', encoding='bytes')
    with pytest.raises(Refusal, match='has no split train, only train_prefs, train_sft, test_prefs; map them'):
        prepare(cfg)
    with pytest.raises(Refusal, match='has no split dev, only'):
        prepare(Config(**vars(cfg) | dict(columns=('train:train_prefs', 'validation:dev'))))
    meta = prepare(Config(**vars(cfg) | dict(columns=('train:train_prefs', 'test:test_prefs'))))
    assert meta['rows'] == {'train': {'read': 30, 'kept': 30}, 'test': {'read': 4, 'kept': 4}}
    assert meta['columns'] == ['train:train_prefs', 'test:test_prefs']
    assert 'validation cut from train' in meta['rule'] and meta['splits']['test']['posts'] == 4
    assert open_dataset(cfg).meta == json.loads(json.dumps(meta))  # a run need not know the columns


def test_what_the_hub_raises_is_a_sentence(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError('no\nroute \x1b[2J')

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    with pytest.raises(Refusal, match=r'stanfordnlp/SHP could not be .*ConnectionError: no route \\x1b\[2J.*--source='):
        prepare(Config(dataset='d', source='hub', encoding='bytes'))
    monkeypatch.setattr(datasets, '__version__', '3.6.0')
    with pytest.raises(Refusal, match='datasets 3.6.0 may run code of a dataset'):
        prepare(Config(dataset='d', source='hf:a/b', encoding='bytes'))
    assert not Path('data').exists()


def test_a_local_dataset_really_opened(monkeypatch, work):  # noqa: F811
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(work / 'cache'))
    Path('saved').mkdir()
    rows = [dict(NECTAR, prompt=f'\n\nHuman: q{i}\n\nAssistant: ') for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet('saved/train.parquet')
    cfg = Config(dataset='d', source='hf:saved', encoding='bytes')
    meta, data = prepare(cfg), open_dataset(cfg)
    assert meta['source'] == 'hf:saved' and meta['rows'] == {'train': {'read': 40, 'kept': 40}}
    assert 'validation and test cut from train' in meta['rule'] and data.groups('train').ids[0].startswith('train:')
    groups = sum((ranked_texts(data.groups(split)) for split in ('train', 'val', 'test')), [])
    assert sorted(prompt for prompt, _, _ in groups) == sorted(render(f'q{i}', '')[0] for i in range(40))
    assert all(answers == ['yes', 'no'] for _, answers, _ in groups)
