"""The toy data: SHP's schema and rule, a quality that explains the scores, and no cheap way to a high one."""
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from toy_shp import ASKS, CURES, DOMAINS, SLOTS, THINGS, WHENS, quality, toy_rows, understand

COLUMNS = {'post_id': str, 'domain': str, 'upvote_ratio': float, 'history': str, 'c_root_id_A': str, 'c_root_id_B': str,
           'created_at_utc_A': int, 'created_at_utc_B': int, 'score_A': int, 'score_B': int, 'human_ref_A': str,
           'human_ref_B': str, 'labels': int, 'seconds_difference': float, 'score_ratio': float}


@pytest.fixture(scope='module')
def rows():
    return {split: list(toy_rows(split, n, 1)) for split, n in dict(train=1500, validation=300, test=300).items()}


def texts(row):
    """(preferred, other)"""
    return (row['human_ref_A'], row['human_ref_B']) if row['labels'] else (row['human_ref_B'], row['human_ref_A'])


def accuracy(margins):
    return np.mean((margins > 0) + 0.5 * (margins == 0))


def mean_quality(rows, answer):
    """Of what `answer` writes to each held-out question."""
    histories = sorted({row['history'] for row in rows})
    return np.mean([quality(history, answer(history)) for history in histories])


def test_schema_and_the_rule_of_shp(rows):
    for split, found in rows.items():
        for row in found:
            assert {key: type(value) for key, value in row.items()} == COLUMNS
            assert row['domain'] in [f'{domain}_{split}' for domain in DOMAINS]
            better, worse = ('A', 'B') if row['labels'] == 1 else ('B', 'A')
            assert row[f'score_{better}'] > row[f'score_{worse}'] >= 2
            wait = row[f'created_at_utc_{better}'] - row[f'created_at_utc_{worse}']
            assert wait >= 0 and row['seconds_difference'] == wait
            assert row['score_ratio'] == row[f'score_{better}'] / row[f'score_{worse}']
            assert max(len(row[key].encode()) for key in ('history', 'human_ref_A', 'human_ref_B')) <= 64
        assert 0.45 < np.mean([row['labels'] for row in found]) < 0.55


def test_deterministic_in_every_process():
    program = 'from toy_shp import toy_rows; print(list(toy_rows("train", 20, 7)))'
    out = [subprocess.run([sys.executable, '-c', program], env={'PYTHONHASHSEED': seed}, capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, check=True).stdout for seed in ('1', '2')]
    assert out[0] == out[1] == f'{list(toy_rows("train", 20, 7))}\n'
    assert list(toy_rows('train', 20, 8)) != list(toy_rows('train', 20, 7))


def test_held_out_questions_are_new(rows):
    histories = [{row['history'] for row in rows[split]} for split in ('train', 'validation', 'test')]
    asked = [{understand(history) for history in found} for found in histories]
    for found in (histories, asked):  # not even the thing and the trouble have met before
        assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    assert len({thing for thing, _ in asked[0]}) == 32 and len({trouble for _, trouble in asked[0]}) == 24


def test_quality_of_the_parts():
    history = 'Rusty kettle since May, any tips?'
    assert quality(history, 'Polish the kettle with oil.') == quality(history, ' Polish the kettle with oil. ') == 1
    graded = ['Polish the kettle with oil.', 'Polish the oven with oil.', 'Polish the oven in hot water.',
              'Flush the oven in hot water.', 'Flush the oven with soda.', 'Scrub the oven with soda.',
              'Mulch the lawn with tea.', '']
    found = [quality(history, answer) for answer in graded]
    assert found == sorted(found, reverse=True) and found[-1] == found[-2] == 0 and len(set(found)) == 6
    for worse in ('Polish the kettle with oi', 'polish the kettle with oil.', 'Polish the kettle with oil. ' * 2,
                  'Well, polish the kettle with oil.', '\0 \ud800 <|endoftext|>'):
        assert 0 <= quality(history, worse) < 0.8
    assert quality('Why is the sky blue?', graded[0]) == 0
    for domain, (things, cures) in DOMAINS.items():  # the best answer to every question is known
        for thing, (trouble, verb, means), when, ask in product(things.split(), cures, WHENS[:2], ASKS[:2]):
            assert quality(f'{trouble} {thing}{when}, {ask}', f'{verb} the {thing} {means}') == 1


def test_quality_tells_the_better_answer_and_neither_length_nor_letters_do(rows):
    def counts(text):
        return np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=128)

    margins = [quality(row['history'], a) - quality(row['history'], b)
               for row in rows['validation'] for a, b in [texts(row)]]
    assert 0.88 < accuracy(np.array(margins)) < 0.95  # the scores are quality and noise: the ceiling of every ranker
    length = accuracy(np.array([len(a) - len(b) for a, b in map(texts, rows['validation'])]))
    assert max(length, 1 - length) < 0.60
    train, held_out = (np.array([counts(a) - counts(b) for a, b in map(texts, rows[split])], float)
                       for split in ('train', 'validation'))
    w = np.zeros(128)
    for _ in range(500):  # logistic regression on the pairs
        w += 0.05 * train.T @ (1 / (1 + np.exp(train @ w))) / len(train)
    assert accuracy(held_out @ w) < 0.75


def test_tricks_earn_less_than_the_average_answer(rows):
    held_out = rows['validation']
    answers = {(row['history'], text) for row in held_out for text in texts(row)}
    average = np.mean([quality(*pair) for pair in answers])
    assert 0.4 < average < 0.6

    def every_good_answer(history):
        return ' '.join(f'{verb} the {SLOTS[0][understand(history)[0]]} {means}' for _, _, verb, means in CURES)

    for trick in (lambda h: h, lambda h: '', every_good_answer, lambda h: ' '.join(sum(SLOTS, [])),
                  lambda h: f'Polish the {h.split()[1].strip(",")} with oil. ' * 5):
        assert mean_quality(held_out, trick) < average / 2
    constant = max(mean_quality(held_out[::20], lambda h: f'{verb} the {thing} {means}')
                   for _, thing in THINGS for _, _, verb, means in CURES)
    assert constant < average / 2
