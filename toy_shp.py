"""The embedded default data: a tiny made-up Reddit in the schema of SHP (https://huggingface.co/datasets/stanfordnlp/SHP).

Somebody asks about a thing, its problem and the time left; others answer with a verb, the thing, a means and a time:

    Help, my kettle smells of fish and I have a day. Any tips?
    I would rub the kettle with lemon by tonight. Good luck!

Unlike on Reddit the true quality of every answer is known, of any text whatsoever: `quality`. Scores are this quality
plus noise. All comments have the same grammar and draw from the same words, so that neither their length nor their
letters tell the good from the bad: what is right depends on the question.
"""
import math
import random
import zlib
from itertools import combinations

# Each domain: things, and for each problem its verb and means. Whatever belongs to another problem or thing of the same
# domain is half as useful as DOMAIN_FIT says, whatever belongs to another domain of no use. So every word is right and
# wrong equally often.
DOMAINS = {
    'askkitchen': (('kettle', 'oven', 'pan', 'teapot'), (
        ('smells of fish', 'rub', 'with lemon'),
        ('is all sticky', 'soak', 'in hot water'),
        ('is full of lime', 'boil', 'in vinegar'),
        ('has turned black', 'scrub', 'with salt'))),
    'askgarden': (('rose', 'lawn', 'hedge', 'maple'), (
        ('looks thirsty', 'sprinkle', 'from below'),
        ('has pale leaves', 'mulch', 'with compost'),
        ('is full of lice', 'spray', 'with soap'),
        ('burns at noon', 'shade', 'with a sheet'))),
    'askbikes': (('chain', 'brake', 'wheel', 'saddle'), (
        ('squeaks a lot', 'grease', 'with wax'),
        ('rattles a lot', 'wrap', 'with tape'),
        ('slips in rain', 'sand', 'with a file'),
        ('is frozen stiff', 'thaw', 'over a candle'))),
    'askcats': (('tabby', 'kitten', 'moggy', 'calico'), (
        ('hides all day', 'lure', 'with tuna'),
        ('howls at night', 'cuddle', 'on the lap'),
        ('bites my toes', 'tease', 'with a feather'),
        ('claws the sofa', 'train', 'on a post')))}
HASTE = (('I have an hour', 'right now.'), ('I have a day', 'by tonight.'),  # the neighbours in time earn one half
         ('I have a week', 'by Friday.'), ('I can wait', 'some day.'))
HELLOS = 'My', 'So my', 'Help, my', 'Hm, my'
ASKS = 'Any tips?', 'What now?', 'Ideas?', 'Advice?', 'Why me?', 'Help!'
OPENERS = 'Just', 'I would', 'Please', 'Maybe', 'Always', 'You can'       # they and the closers carry no quality
CLOSERS = 'Good luck!', 'It works.', 'Trust me.', 'Enjoy!', 'Cheers.', 'Easy.'
DOMAIN_FIT, WISDOM, SAME_DOMAIN = 0.3, 1.3, 0.4
WEIGHTS = 0.30, 0.20, 0.34, 0.16                                          # of thing, verb, means, time
NOISE, HASTE_NOISE = 0.09, 0.25                                           # standard deviations, in units of quality


CURES = [cure for _, cures in DOMAINS.values() for cure in cures]
PROBLEMS = [problem for problem, _, _ in CURES]
SLOTS = ([thing for things, _ in DOMAINS.values() for thing in things], [verb for _, verb, _ in CURES],
         [means for _, _, means in CURES], [time for _, time in HASTE])   # what an answer chooses from
PARTS = [''], OPENERS, SLOTS[1], ['the'], SLOTS[0], SLOTS[2], SLOTS[3], CLOSERS, ['']
LEGAL = ({pair for part in PARTS for phrase in part for pair in zip(phrase.split(), phrase.split()[1:])}
         | {(a.split(' ')[-1], b.split(' ')[0]) for left, right in zip(PARTS, PARTS[1:]) for a in left for b in right})


def find(phrases, text):
    return next((i for i, phrase in enumerate(phrases) if f' {phrase} ' in text), None)


def understand(history):
    """A question -> indices (thing, problem, haste), None where the text does not say."""
    text = history.replace('.', ' ')
    return find(SLOTS[0], text), find(PROBLEMS, text), find([left for left, _ in HASTE], text)


def fits(asked):
    """How well each phrase of each slot fits a question: four lists, in the order of SLOTS."""
    thing, problem, haste = asked

    def near(size, right):  # things and problems come in blocks of four, one per domain
        return [1.0 if i == right else DOMAIN_FIT if i // 4 == right // 4 else 0.0 for i in range(size)]
    return (near(len(SLOTS[0]), thing), near(len(CURES), problem), near(len(CURES), problem),
            [max(0.0, 1 - abs(i - haste) / 2) for i in range(len(HASTE))])


def quality(history, answer):
    """True quality in [0, 1] of any answer text to a question: form^2 * sum over slots of weight * mean fit."""
    asked = understand(history)
    if None in asked:
        return 0.0
    words = ['', *answer.strip().split(' '), '']
    pairs = list(zip(words, words[1:]))
    form = len(LEGAL.intersection(pairs)) / len(pairs)
    padded, total = ' ' + ' '.join(words) + ' ', 0.0
    for weight, phrases, fit in zip(WEIGHTS, SLOTS, fits(asked)):
        counts = [padded.count(f' {phrase} ') for phrase in phrases]
        total += weight * sum(c * f for c, f in zip(counts, fit)) / max(1, sum(counts))
    return form ** 2 * total


def ask(rng, split):
    """A question of this split -> (history, domain, (thing, problem, haste))."""
    while True:
        d = rng.randrange(4)
        asked = thing, problem, haste = 4 * d + rng.randrange(4), 4 * d + rng.randrange(4), rng.randrange(len(HASTE))
        history = (f'{rng.choice(HELLOS)} {SLOTS[0][thing]} {PROBLEMS[problem]} and {HASTE[haste][0]}. '
                   f'{rng.choice(ASKS)}')
        if {0: 'validation', 1: 'test'}.get(zlib.crc32(history.encode()) % 8, 'train') == split:
            return history, list(DOMAINS)[d], asked


def reply(rng, asked):
    """One comment's text. The wiser its author, the more slots are well chosen; the others are guessed."""
    wisdom = rng.random() ** WISDOM
    def choose(phrases, fit):
        if rng.random() < wisdom:
            return phrases[fit.index(1.0)]
        return rng.choice([p for p, f in zip(phrases, fit) if f] if rng.random() < SAME_DOMAIN else phrases)
    thing, verb, means, time = map(choose, SLOTS, fits(asked))
    return f'{rng.choice(OPENERS)} {verb} the {thing} {means} {time} {rng.choice(CLOSERS)}'


def discuss(rng, post_id, history, asked):
    """2 to 8 comments on a post: list of (id, time, score, text), oldest first."""
    comments = []
    for text in dict.fromkeys(reply(rng, asked) for _ in range(rng.randint(2, 8))):
        merit = quality(history, text) + rng.gauss(0, NOISE)
        comments.append((merit + rng.gauss(0, HASTE_NOISE), 2 + int(math.exp(5 * merit)), text))
    time, written = rng.randint(1_500_000_000, 1_650_000_000), []
    for i, (_, score, text) in enumerate(sorted(comments)):  # good answers take longer: hence long chains of preferences
        time += rng.randint(20, 5000)
        written.append((f'{post_id}c{i}', time, score, text))
    return written


def toy_rows(split, n, seed):
    """The rows of n posts of a split ('train', 'validation', 'test'): dicts in SHP's schema, one per preference.

    As in SHP a comment is preferred to another where it was written no earlier and yet scored higher. Deterministic:
    the rows of fewer posts are the first rows of more. Raises ValueError for an unknown split.
    """
    if split not in ('train', 'validation', 'test'):
        raise ValueError(f"no split {split!r} in the toy data; take 'train', 'validation' or 'test'")
    rng = random.Random(f'{split} {seed}')  # a string is seeded by its sha512, the same in every process
    posts = 0
    while posts < n:
        post_id = f'{split}{posts}'
        history, domain, asked = ask(rng, split)
        upvote_ratio = rng.randint(70, 100) / 100
        pairs = [(late, early) for early, late in combinations(discuss(rng, post_id, history, asked), 2)
                 if late[2] > early[2]]
        posts += bool(pairs)  # a post on which nobody agrees has no rows and does not count
        for better, worse in pairs:
            label = rng.randrange(2)
            a, b = (better, worse) if label else (worse, better)
            yield {'post_id': post_id, 'domain': f'{domain}_{split}', 'upvote_ratio': upvote_ratio, 'history': history,
                   'c_root_id_A': a[0], 'c_root_id_B': b[0], 'created_at_utc_A': a[1], 'created_at_utc_B': b[1],
                   'score_A': a[2], 'score_B': b[2], 'human_ref_A': a[3], 'human_ref_B': b[3], 'labels': label,
                   'seconds_difference': float(better[1] - worse[1]), 'score_ratio': better[2] / worse[2]}
