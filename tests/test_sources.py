"""Schemas of rows, files and the Hub: what becomes of each shape, that no preference is made up, and the refusals."""
import json
import random
from itertools import combinations
from pathlib import Path

import datasets
import pytest

import sources
from configurator import Refusal
from prepare_shp import Config, open_dataset, prepare, rankings, render
from test_prepare_shp import document, local, ranked_texts, texts, work, write  # noqa: F401, work: a fixture


def talk(*turns):
    return [dict(role=('user', 'assistant')[i % 2], content=turn) for i, turn in enumerate(turns)]


def read(row, **columns):
    """-> (prompt, [[answers best first] of each ranking])"""
    found = rankings(sources.shp_rows(row, 'f:1', columns))
    assert len({r.history for r in found}) == 1 and {r.post_id for r in found} == {'f:1'}
    return found[0].history, [list(r.answers) for r in found]


ASKED, YES, NO = talk('Hi?'), [dict(role='assistant', content='yes')], [dict(role='assistant', content='no')]
ULTRA = dict(instruction='Hi?', source='x', completions=[
    dict(model='a', response='no', overall_score=2.0, **{'fine-grained_score': 4.5}),
    dict(model='b', response='yes', overall_score=8, **{'fine-grained_score': 3.0})])
NECTAR = dict(prompt='\n\nHuman: Hi?\n\nAssistant: ', turns=1, answers=[
    dict(answer='no', model='a', rank=2.0), dict(answer='yes', model='b', rank=1.0)])
SCHEMAS = {
    'ranked': dict(prompt='Hi?', responses=['yes', 'no']),
    'ranked, scores': dict(prompt='Hi?', responses=['yes', 'no'], scores=[3, -2.5]),
    'explicit': dict(prompt='Hi?', chosen='yes', rejected='no'),
    'explicit talk': dict(prompt=ASKED, chosen=YES, rejected=NO),
    'explicit talk, answers as texts': dict(prompt=ASKED, chosen='yes', rejected='no'),
    'explicit, answers as talk': dict(prompt='Hi?', chosen=YES, rejected=NO),
    'implicit': dict(chosen='Hi? yes', rejected='Hi? no'),
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
def test_every_schema_says_the_same(name):
    prompt, ranked = read(SCHEMAS[name])
    assert (prompt.strip(), [[text.strip() for text in texts] for texts in ranked]) == ('Hi?', [['yes', 'no']])


def test_columns_of_other_names():
    assert read(ULTRA, score='fine-grained_score')[1] == [['no', 'yes']]  # the other score says the opposite
    mine = dict(question='Hi?', replies=[dict(body='no', place=2), dict(body='yes', place=1)])
    assert read(mine, prompt='question', responses='replies', answer='body', rank='place') == ('Hi?', [['yes', 'no']])
    assert read(dict(q='Hi?', good='yes', bad='no'), prompt='q', chosen='good', rejected='bad')[1] == [['yes', 'no']]
    assert read(dict(prompt='Hi?', responses=[dict(answer='a', rank=3), dict(answer='b', rank=1)], score='x'),
                score='rank')[1] == [['a', 'b']]  # said to be a score: higher is better


def test_conversations_of_several_turns():
    several = talk('a', 'b', 'c')
    assert sources.said(several) == 'a\n\nAssistant: b\n\nHuman: c' and sources.said('a') == 'a'
    for line in (dict(prompt=several, chosen=YES, rejected=NO), dict(chosen=several + YES, rejected=several + NO),
                 dict(prompt='\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ', answers=NECTAR['answers'])):
        assert read(line) == ('a\n\nAssistant: b\n\nHuman: c', [['yes', 'no']])
    assert read(dict(chosen=talk('a', 'b', 'c', 'd'), rejected=talk('a', 'e', 'f', 'g'))) == (
        'a', [['b\n\nHuman: c\n\nAssistant: d', 'e\n\nHuman: f\n\nAssistant: g']])
    system = [dict(role='system', content='Be kind.')]
    assert read(dict(prompt=system + ASKED, chosen=YES, rejected=NO))[0] == 'Be kind.\n\nHuman: Hi?'


@pytest.mark.parametrize('seed', range(40))
def test_ties_are_no_preference(seed):
    """Every strict preference once, none between equals, whatever the order of the answers."""
    rng = random.Random(seed)
    worth = {f'answer {k}': rng.randrange(3) for k in range(rng.randrange(2, 8))}
    by = rng.choice(['rank', 'overall_score'])
    answers = [dict(answer=text, **{by: 9 - n if by == 'rank' else n}) for text, n in worth.items()]
    line = dict(prompt='q', answers=answers) if by == 'rank' else dict(instruction='q', completions=answers)
    found = rankings(sources.shp_rows(line, 'f:1'))
    said = [pair for ranking in found for pair in combinations(ranking.answers, 2)]
    assert set(said) == {(a, b) for a in worth for b in worth if worth[a] > worth[b]} and len(set(said)) == len(said)
    if found:
        assert len(found[0].answers) == len(set(worth.values()))


def test_rows_of_ties_alone_are_counted():
    tied = dict(prompt='q', answers=[dict(answer='a', rank=1), dict(answer='b', rank=1)])
    drawn = dict(prompt='q', chosen='a', rejected='b', score_chosen=5, score_rejected=5)
    good = [dict(prompt=f'{i}', chosen='yes', rejected='no') for i in range(40)]
    meta, _ = local([tied, drawn] + good, max_bad_fraction=0.0)
    assert meta['rows']['train'] == {'read': 42, 'kept': 40, 'all answers tied': 2}


def test_the_text_to_learn_is_the_best_answer():
    lines = [dict(prompt=f'q{i}', answers=[dict(answer=f'{text} {i}', rank=rank) for text, rank in
                                           (('worst', 3), ('best', 1), ('as good', 1), ('middling', 2))])
             for i in range(40)]
    _, data = local(lines)
    documents = sum((texts(data.documents(split)) for split in ('train', 'val', 'test')), [])
    assert sorted(documents) == sorted(document(f'q{i}', f'best {i}') for i in range(40))
    groups = ranked_texts(data.groups('val'))
    assert [len(answers) for _, answers, _ in groups] == [3, 2, 2] * (len(groups) // 3)
    assert groups[0][2] == [-1, -2, -3]


BAD = {
    'prompt is missing or null': dict(chosen='yes', rejected='no'),
    'prompt is null': dict(prompt=None, chosen='I think yes', rejected='I think no'),
    'scores rise from one response': dict(prompt='Hi?', responses=['a', 'b'], scores=[1, 2]),
    'it has no prompt, and a column that may be it': dict(question='Hi?', chosen='I think yes', rejected='I think no'),
    'a response is not text': dict(prompt='Hi?', chosen=[dict(role='assistant', content=None)], rejected=NO),
    'chosen or rejected does not begin with the assistant': dict(
        chosen=[dict(role='system', content='s')] + ASKED + YES,
        rejected=[dict(role='system', content='s')] + talk('Ho?') + NO),
    'score_chosen is below score_rejected': dict(prompt='Hi?', chosen='a', rejected='b', score_chosen=1,
                                                 score_rejected=2),
    'score_rejected is not a finite number': dict(prompt='Hi?', chosen='a', rejected='b', score_chosen=1),
    'its answers are not a list of two or more': dict(instruction='Hi?', completions=[]),
    'an answer is no object with a text and a score or rank': dict(prompt='Hi?', answers=['a', 'b']),
    'no column score or overall_score or fine-grained_score or rank in all its answers':
        dict(prompt='Hi?', answers=[dict(answer='a', model='m', rank=1), dict(answer='b', model='m')]),
    'no column answer or response in all its answers': dict(
        prompt='Hi?', answers=[dict(text='a', rank=1), dict(text='b', rank=2)]),
    'rank is not a finite number': dict(prompt='Hi?', answers=[dict(answer='a', rank='1'), dict(answer='b', rank=2)]),
    'scores is not a list as long as responses': dict(prompt='Hi?', responses=['a', 'b'], scores=dict(a=1)),
    "its columns are neither SHP's nor prompt": dict(question='Hi?', reply='yes'),
}


@pytest.mark.parametrize('reason', BAD)
def test_what_does_not_fit_is_refused_with_the_columns_seen(reason):
    with pytest.raises(ValueError, match=reason):
        sources.shp_rows(BAD[reason], 'f:1')
    with pytest.raises(Refusal) as refusal:
        local([BAD[reason]])
    assert 'the columns of line 1: ' + ', '.join(map(repr, BAD[reason])) in str(refusal.value)
    assert '--columns=' in str(refusal.value) and '1 of 1 rows' in str(refusal.value)
    if 'answers' in BAD[reason] and isinstance(BAD[reason]['answers'][0], dict):
        assert "; of its first answer: " + ', '.join(map(repr, BAD[reason]['answers'][0])) in str(refusal.value)


@pytest.mark.parametrize('columns, row, lost', [
    (dict(score='fine_grained_score'), dict(prompt='q', answers=[
        {'answer': a, 'overall_score': s, 'fine-grained_score': -s} for a, s in (('a', 1), ('b', 2))]),
     'fine_grained_score in all its answers'),
    (dict(prompt='promt'), dict(chosen='I say yes', rejected='I say no'), 'no column promt'),
    (dict(prompt='question'), dict(instruction='be kind', completions=[]), 'no column question'),
    (dict(scores='rating'), dict(prompt='q', responses=['a', 'b']), 'no column rating'),
    (dict(score_chosen='sC'), dict(prompt='q', chosen='a', rejected='b'), 'no column sC')])
def test_a_mapped_column_that_is_not_there_is_no_other(columns, row, lost):
    with pytest.raises(ValueError, match=lost):
        sources.shp_rows(row, 'f:1', columns)


def test_a_mapped_rank_counts_before_a_score_that_is_there():
    answers = [dict(answer='worse', score=9, place=2), dict(answer='better', score=1, place=1)]
    (pair,) = sources.shp_rows(dict(prompt='q', answers=answers), 'f:1', dict(rank='place'))
    assert sources.pair_of(pair)[0].text == 'better'


def test_ties_within_scores_are_no_preference():
    rows = sources.shp_rows(dict(prompt='q', responses=['a', 'b', 'c'], scores=[9, 5, 5]), 'f:1')
    assert [[comment.text for comment in sources.pair_of(row)] for row in rows] == [['a', 'b'], ['a', 'c']]


def test_prompts_that_are_rendered_alike_stay_on_one_side():
    lines = [dict(prompt=f'p{i}{blank}', chosen=f'yes{blank}!', rejected='no') for i in range(40) for blank in ('', ' ')]
    meta, _ = local(lines)
    of_split = {split: {prompt for prompt, *_ in ranked_texts(local(lines)[1].groups(split))}
                for split in ('train', 'val', 'test')}
    assert sum(map(len, of_split.values())) == len(set.union(*of_split.values())) == 40


def test_options():
    good = ['hf:stanfordnlp/SHP', 'hf:imdb', 'hf:a/b:c-d_1.0']
    for name in good:
        assert not list(Config(source=name, dataset='d', columns=('prompt:a', 'train:b:c')).check())
    for name in ('hf:', 'hf:../x', 'hf:/etc', 'hf:a/../b', 'hf:a/b/c', 'hf:a b', 'hf:a\n', 'hf:a,b', 'hf:https://x.y'):
        assert 'names no dataset of the Hub' in list(Config(source=name, dataset='d').check())[0]
    for pair in ('prompt', 'prompt:', 'promt:x', ':x'):
        assert 'is not OURS:THEIRS' in list(Config(columns=(pair,)).check())[0]
    assert 'maps a split, which datasets of the Hub have; name the file train.jsonl' in list(
        Config(source='rows.jsonl', dataset='d', columns=('train:x',)).check())[0]
    assert '--dataset=NAME' in list(Config(source='hf:a/b').check())[0]


def test_ids_of_files_of_one_name_differ():
    lines = [dict(prompt=f'q{i}', chosen='yes', rejected='no') for i in range(40)]
    write('DIR/a/train.json', lines[:20])
    write('DIR/b/train.json', lines[20:])
    prepare(Config(dataset='d', source='DIR', encoding='bytes'))
    groups = open_dataset(Config(dataset='d')).groups('train')
    assert len(set(groups.ids)) == len(groups.ids) and 'a/train.json:1' in groups.ids


# The Hub -------------------------------------------------------------------------------------------------------------


def hub(monkeypatch, splits, wanted=('owner/name',)):
    def load_dataset(*args, **options):
        assert args == wanted and not options
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)


def test_a_dataset_of_the_hub(monkeypatch):
    rows = [dict(ULTRA, instruction=f'q{i}') for i in range(40)]
    hub(monkeypatch, dict(train=rows))
    cfg = Config(dataset='d', source='hf:owner/name', encoding='bytes')
    meta = prepare(cfg)
    assert meta['rows'] == {'train': {'read': 40, 'kept': 40}} and 'validation and test cut from train' in meta['rule']
    assert meta['source'] == 'hf:owner/name'
    groups = open_dataset(cfg).groups('train')
    assert str(groups.ids[0]).startswith('train:') and ranked_texts(groups)[0][1:] == (['yes', 'no'], [8, 2])


def test_the_hubs_splits_and_columns(monkeypatch):
    def rows(split, n):
        return [dict(text=f'{split} {i}', prompt_id='x', chosen=talk(f'{split} {i}', 'yes'),
                     rejected=talk(f'{split} {i}', 'no'), score_chosen=9.0, score_rejected=1.0) for i in range(n)]

    hub(monkeypatch, dict(train_prefs=rows('a', 30), train_sft=rows('b', 3), test_prefs=rows('c', 4)),
        ('owner/name', 'prefs'))
    cfg = Config(dataset='d', source='hf:owner/name:prefs', encoding='bytes')
    with pytest.raises(Refusal, match='has no split train, but train_prefs, train_sft, test_prefs; say which'):
        prepare(cfg)
    with pytest.raises(Refusal, match='has no split dev, but'):
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
    for source, name in (('hub', 'stanfordnlp/SHP'), ('hf:a/b', 'a/b')):
        with pytest.raises(Refusal, match=rf'{name} could not be had .*ConnectionError: no route \[2J.*--source=DIR'):
            prepare(Config(dataset='d', source=source, encoding='bytes'))
    monkeypatch.setattr(datasets, '__version__', '3.6.0')
    with pytest.raises(Refusal, match='datasets 3.6.0 may run what a dataset brings'):
        prepare(Config(dataset='d', source='hf:a/b', encoding='bytes'))
    assert not Path('data').exists()


@pytest.mark.parametrize('kind', ['parquet', 'json'])
@pytest.mark.parametrize('rows', [[dict(NECTAR, prompt=f'\n\nHuman: q{i}\n\nAssistant: ') for i in range(40)],
                                  [dict(chosen=talk(f'q{i}', 'yes'), rejected=talk(f'q{i}', 'no')) for i in range(40)]])
def test_a_local_dataset_really_opened(kind, rows, monkeypatch, work):  # noqa: F811
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(work / 'cache'))
    Path('saved').mkdir()
    saved = datasets.Dataset.from_list(rows)
    (saved.to_parquet if kind == 'parquet' else saved.to_json)(f'saved/train.{kind}')
    cfg = Config(dataset='d', source='hf:saved', encoding='bytes')
    prepare(cfg)
    groups = sum((ranked_texts(open_dataset(cfg).groups(split)) for split in ('train', 'val', 'test')), [])
    assert sorted(prompt for prompt, _, _ in groups) == sorted(render(f'q{i}', '')[0] for i in range(40))
    assert all(answers == ['yes', 'no'] for _, answers, _ in groups)
