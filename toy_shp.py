"""The embedded default data: a tiny synthetic Reddit in the schema of SHP (huggingface.co/datasets/stanfordnlp/SHP).

Somebody has trouble with a thing, and others give advice:

    Rusty kettle since May, any tips?
    Polish the kettle with oil.

Unlike on Reddit, the true `quality` of any text is known. Scores are this quality plus noise. Good and bad answers have
the same grammar and words, so that length and letters do not distinguish them: what is right depends on the question.
"""
import math
import random
from itertools import combinations

# Each domain: its things, and for each trouble a verb and a means. The verb and means of the next trouble (the first
# follows the last) are half right. So every word is right, half right and wrong equally often.
DOMAINS = {
    'askkitchen': ('kettle oven pan teapot grill ladle bowl fridge', (
        ('Smelly', 'Rub', 'with lemon.'), ('Burnt', 'Scrub', 'with salt.'), ('Limy', 'Boil', 'in vinegar.'),
        ('Greasy', 'Degrease', 'with soda.'), ('Rusty', 'Polish', 'with oil.'), ('Clogged', 'Flush', 'in hot water.'))),
    'askgarden': ('rose lawn hedge tulip maple bean carrot pear', (
        ('Thirsty', 'Water', 'from below.'), ('Pale', 'Mulch', 'with compost.'), ('Eaten', 'Guard', 'under a net.'),
        ('Naked', 'Tuck', 'in straw.'), ('Overgrown', 'Cut', 'with shears.'), ('Yellow', 'Nourish', 'with tea.'))),
    'askbikes': ('chain brake wheel saddle pedal lamp gear horn', (
        ('Dirty', 'Hose', 'in the yard.'), ('Frozen', 'Unfreeze', 'over a candle.'), ('Jammed', 'Loosen', 'with wax.'),
        ('Wobbly', 'Adjust', 'with a key.'), ('Kinked', 'Iron', 'on a stone.'), ('Uneven', 'Yank', 'with a rope.'))),
    'askcats': ('tabby kitten moggy siamese persian calico burmese ragdoll', (
        ('Hungry', 'Entice', 'with tuna.'), ('Afraid', 'Occupy', 'with a feather.'),
        ('Messy', 'Vacuum', 'after a bath.'), ('Itchy', 'Quiet', 'on the lap.'), ('Vocal', 'Kiss', 'at dawn.'),
        ('Zany', 'Join', 'on a post.')))}
WHENS = '', ' again', ' since May', ' all week', ' at night', ' for years'
ASKS = 'help!', 'any tips?', 'what now?', 'ideas?', 'advice?', 'why me?', 'please!', 'who knows?'
WEIGHTS = 6, 7, 7                # of thing, verb and means
NOISE, TIME_NOISE = 0.15, 0.25   # standard deviations of a score and of a comment's place in time, in units of quality
GAP = 0.04                       # minimum difference in quality between comments of one post
REMAINDERS = {'train': range(2, 8), 'validation': [0], 'test': [1]}  # (thing + trouble) % 8 of each split's questions

THINGS = [(domain, thing) for domain, (things, _) in DOMAINS.items() for thing in things.split()]
CURES = [(domain, *cure) for domain, (_, cures) in DOMAINS.items() for cure in cures]
SLOTS = [thing for _, thing in THINGS], [verb for _, _, verb, _ in CURES], [means for _, _, _, means in CURES]
PARTS = [''], SLOTS[1], ['the'], SLOTS[0], SLOTS[2], ['']  # of an answer, in this order; '' is its start and its end
LEGAL = ({pair for means in SLOTS[2] for pair in zip(means.split(), means.split()[1:])}
         | {(a.split(' ')[-1], b.split(' ')[0]) for left, right in zip(PARTS, PARTS[1:]) for a in left for b in right})


def understand(history):
    """A question -> (index of its thing, index of its trouble), None for an unknown one."""
    trouble, thing = [*history.split(), '', ''][:2]
    return (next((i for i, name in enumerate(SLOTS[0]) if name == thing.rstrip(',')), None),
            next((i for i, (_, name, _, _) in enumerate(CURES) if name == trouble), None))


def fits(thing, trouble):
    """How well each phrase of each slot fits a question: lists of 0, 1/2 and 1 for things, verbs and means."""
    after = trouble + 1 if (trouble + 1) % 6 else trouble - 5  # six troubles a domain
    cure = [1.0 if i == trouble else 0.5 if i == after else 0.0 for i in range(len(CURES))]
    return [float(i == thing) for i in range(len(THINGS))], cure, cure


def quality(history, answer):
    """True quality in [0, 1] of any answer text to a question: form^2 * weighted mean over slots of the mean fit.

    form: distinct legal pairs of neighbouring words over all pairs, which penalises misspelt, unfinished and repeated
    text. Mean fit: over all phrases of the slot in the answer, so that listing many scores no more than guessing.
    The quality of any answer to an unknown question is 0.
    """
    asked = understand(history)
    if None in asked:
        return 0.0
    words = ['', *answer.strip().split(' '), '']
    pairs = list(zip(words, words[1:]))
    form = len(LEGAL.intersection(pairs)) / len(pairs)
    padded, total = ' '.join(words), 0.0
    for weight, phrases, fit in zip(WEIGHTS, SLOTS, fits(*asked)):
        counts = [padded.count(f' {phrase} ') for phrase in phrases]
        total += weight * sum(c * f for c, f in zip(counts, fit)) / max(1, sum(counts))
    return form ** 2 * total / sum(WEIGHTS)


def ask(rng, split):
    """A question -> (history, thing, trouble). Held-out posts combine things and troubles in ways not in train."""
    while True:
        trouble = rng.randrange(len(CURES))
        thing = rng.choice([i for i, (domain, _) in enumerate(THINGS) if domain == CURES[trouble][0]])
        if (thing + trouble) % 8 in REMAINDERS[split]:
            return f'{CURES[trouble][1]} {SLOTS[0][thing]}{rng.choice(WHENS)}, {rng.choice(ASKS)}', thing, trouble


def reply(rng, thing, trouble):
    """The text of a comment. A wiser author chooses more parts correctly; the rest is guessed, sometimes off topic."""
    wisdom = rng.random() ** 1.3

    def among(names, domain):
        return rng.choice([i for i, name in enumerate(names) if name[0] == domain])
    domain = CURES[trouble][0] if rng.random() < 0.7 + 0.3 * wisdom else rng.choice(list(DOMAINS))
    at_home = domain == CURES[trouble][0]
    verb = trouble if at_home and rng.random() < wisdom else among(CURES, domain)
    means = verb if rng.random() < 0.75 else among(CURES, domain)
    object = thing if at_home and rng.random() < wisdom else among(THINGS, domain)
    return f'{SLOTS[1][verb]} the {SLOTS[0][object]} {SLOTS[2][means]}'


def discuss(rng, post_id, history, asked):
    """2 to 8 comments on a post, all of different quality: list of (id, time, score, text), oldest first."""
    merits = {}
    for text in (reply(rng, *asked) for _ in range(rng.randint(3, 16))):
        merit = quality(history, text)
        if len(merits) < 8 and all(abs(merit - other) > GAP for other in merits.values()):
            merits[text] = merit
    comments = []
    for text, merit in merits.items():
        merit += rng.gauss(0, NOISE)
        comments.append((merit + rng.gauss(0, TIME_NOISE), 2 + int(math.exp(5 * merit)), text))
    time, written = rng.randint(1_500_000_000, 1_650_000_000), []
    for i, (_, score, text) in enumerate(sorted(comments)):  # good answers come later, which gives long chains
        time += rng.randint(20, 5000)
        written.append((f'{post_id}c{i}', time, score, text))
    return written


def toy_rows(split, n, seed):
    """The rows of n posts of a split ('train', 'validation', 'test'): dicts in SHP's schema, one per preference.

    As in SHP, a comment is preferred to another if it was written no earlier but scored higher. The rows of fewer
    posts are the first rows of more.
    """
    rng = random.Random(f'{split} {seed}')  # a string is seeded by its sha512, the same in every process
    posts = 0
    while posts < n:
        post_id = f'{split}{posts}'
        history, *asked = ask(rng, split)
        domain = CURES[asked[1]][0]
        upvote_ratio = rng.randint(70, 100) / 100
        pairs = [(late, early) for early, late in combinations(discuss(rng, post_id, history, asked), 2)
                 if late[2] > early[2]]
        if pairs:  # a post without a preference has no rows and does not count
            posts += 1
        for better, worse in pairs:
            label = rng.randrange(2)
            a, b = (better, worse) if label else (worse, better)
            yield {'post_id': post_id, 'domain': f'{domain}_{split}', 'upvote_ratio': upvote_ratio, 'history': history,
                   'c_root_id_A': a[0], 'c_root_id_B': b[0], 'created_at_utc_A': a[1], 'created_at_utc_B': b[1],
                   'score_A': a[2], 'score_B': b[2], 'human_ref_A': a[3], 'human_ref_B': b[3], 'labels': label,
                   'seconds_difference': float(better[1] - worse[1]), 'score_ratio': better[2] / worse[2]}
