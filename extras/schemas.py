"""Rows of other schemas, and datasets of the Hub -> Rankings. prepare_shp.py imports this file only if it needs it.

The columns of a row determine its schema. Higher scores and lower ranks are better; ties express no preference.

    TRL, explicit                              prompt, chosen, rejected
    TRL, implicit                              chosen, rejected: two whole dialogues with the same beginning
    UltraFeedback                              instruction, completions: [{response, overall_score}, ...]
    its binarized form                         prompt, chosen, rejected, score_chosen, score_rejected
    Nectar                                     prompt, answers: [{answer, rank}, ...]
    ranked, with answers as objects            prompt, responses: [{answer, score or rank}, ...]

Any text may be a conversation, [{role, content}, ...]. Where names differ, --columns=OURS:THEIRS maps them.
"""
import re

from configurator import Refusal
from prepare_shp import SPLITS, Ranking, read_ranked, visible

HUB_NAME = 'hf:{0}(/{0})?(:{0})?'.format('[A-Za-z0-9][A-Za-z0-9_.-]*')  # owner/dataset:subset
# columns of a row; the first one that exists is used
PROMPTS, LISTS = ('prompt', 'instruction'), ('responses', 'chosen', 'rejected', 'completions', 'answers')
# columns of an answer; the one that most answers of a row have is used, the first of several
ANSWERS, SCORES = ('answer', 'response'), ('score', 'overall_score', 'fine-grained_score', 'rank')
# the names --columns may map: columns of a row, columns of its answers, splits
ROW_COLUMNS = 'prompt', 'responses', 'scores', 'chosen', 'rejected', 'score_chosen', 'score_rejected'
COLUMNS = (*ROW_COLUMNS, 'answer', 'score', 'rank', *SPLITS.values())
SPEAKERS = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}
TURN = re.compile(r'(?:\A\s*|\n\n)(Human|Assistant|System):')  # start of a turn in a dialogue that is one text


def check_source(cfg):
    """Yields a sentence for each error in cfg.source and cfg.columns, for Config.check."""
    if cfg.source.startswith('hf:') and not re.fullmatch(HUB_NAME, cfg.source):
        yield f"source='{cfg.source}' is not a dataset of the Hub; write hf:OWNER/NAME or hf:OWNER/NAME:SUBSET"
    for pair in cfg.columns:
        ours, _, theirs = pair.partition(':')
        if ours not in COLUMNS or not theirs:
            yield f"columns: '{pair}' is not OURS:THEIRS, with OURS one of {', '.join(COLUMNS)}"
        elif ours in SPLITS.values() and not (cfg.source == 'hub' or cfg.source.startswith('hf:')):
            yield f"columns: '{pair}' maps a split, which works for the Hub only; name the file {ours}.jsonl instead"


# Schemas -------------------------------------------------------------------------------------------------------------


def read_foreign(row, columns={}):
    """A row (dict) -> Ranking. columns: our name -> theirs. Raises ValueError with the reason if it is unusable."""
    for ours, theirs in columns.items():
        if ours in ROW_COLUMNS:
            if row.get(theirs) is None:
                raise ValueError(f'no column {theirs[:100]}, which --columns names')
            row = row | {ours: row[theirs]}
    prompt = next((row[name] for name in PROMPTS if row.get(name) is not None), None)
    found = next((name for name in LISTS if row.get(name) is not None), None)
    if found is None:
        raise ValueError(f"its columns {', '.join(map(repr, row))[:200]} are neither SHP's nor prompt + responses, "
                         'prompt + chosen + rejected, instruction + completions or prompt + answers; map them with '
                         '--columns=OURS:THEIRS')
    if found in ('chosen', 'rejected'):
        return _chosen(row, prompt)
    if found == 'responses' and not any(isinstance(response, dict) for response in row[found]):
        return read_ranked(row | dict(prompt=prompt))
    if found == 'answers' and isinstance(prompt, str):
        prompt = _unframed(prompt)
    return _scored(prompt, row[found], columns)


def _chosen(row, prompt):
    """TRL's pairs. If the answers are whole dialogues, the prompt is their common beginning."""
    pair, scores = [row.get('chosen'), row.get('rejected')], [row.get('score_chosen'), row.get('score_rejected')]
    texts, talks = all(isinstance(x, str) for x in pair), all(map(is_conversation, pair))
    if prompt is None and 'prompt' in row and not talks:
        raise ValueError('prompt is null')
    if prompt is None and any(row.get(name) for name in ('question', 'query', 'input')):
        raise ValueError('it has no prompt, but a column that may be the prompt; use --columns=prompt:NAME')
    if (texts or talks) and as_text(pair[0]).strip() == as_text(pair[1]).strip():
        raise ValueError('chosen and rejected are equal')
    if talks and not is_conversation(prompt) or texts and prompt is None:
        shared = next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), None)
        if shared is None:
            raise ValueError('one of chosen and rejected is the beginning of the other')
        cut = _last_turn(pair[0][:shared]) if texts else shared
        if cut:  # otherwise the prompt is that of the row, if any
            prompt, pair = _unframed(pair[0][:cut]) if texts else pair[0][:cut], [x[cut:] for x in pair]
    if any(is_conversation(x) and x[0]['role'] != 'assistant' for x in pair):
        raise ValueError('chosen and rejected part before the assistant answers')
    if scores == [None, None]:
        return Ranking('', prompt, pair)
    if scores[0] < scores[1]:
        raise ValueError('score_chosen is below score_rejected')
    return Ranking('', prompt, pair, scores)


def _scored(prompt, answers, columns):
    """[{text, score or rank}, ...] in any order -> Ranking."""
    answers = [answer if isinstance(answer, dict) else {} for answer in answers]

    def values(names):
        """-> our name of the column that most answers have, and its values."""
        names = [name for name in names if name in columns] or names  # columns mapped by --columns come first
        found = {name: [answer.get(columns.get(name, name)) for answer in answers] for name in names}
        best = min(found, key=lambda name: found[name].count(None))
        if found[best].count(None) == len(answers):
            wanted = ' or '.join(columns.get(name, name) for name in names)
            raise ValueError(f'no column {wanted[:100]} in its answers')
        return best, found[best]

    (_, texts), (name, scores) = values(ANSWERS), values(SCORES)
    if name == 'rank':  # 1 is the best
        scores = [-score if isinstance(score, (int, float)) else score for score in scores]
    return Ranking('', prompt, texts, scores)


# Dialogues -----------------------------------------------------------------------------------------------------------


def _last_turn(shared):
    """The index at which the answer begins in the common text of two dialogues: after its last "Assistant:".

    Texts that are not dialogues are split between two words, as in TRL: "The sky is blue.", "The sky is green.".
    """
    turns = list(TURN.finditer(shared))
    if turns and turns[-1][1] != 'Assistant':
        raise ValueError('chosen and rejected part before the assistant answers')
    return turns[-1].end() if turns else re.match(r'(.*\s)?', shared, re.DOTALL).end()


def _unframed(prompt):
    """A prompt without "Human: ... Assistant:" around it, since our template adds its own."""
    framed = re.fullmatch(r'\s*Human:\s*(.*)\n\nAssistant:\s*', prompt, re.DOTALL)
    return framed[1] if framed else prompt


def is_conversation(x):
    """Whether x is a list of messages, each with a role and a content as text."""
    return isinstance(x, list) and x != [] and all(
        isinstance(m, dict) and isinstance(m.get('role'), str) and isinstance(m.get('content'), str) for m in x)


def as_text(x):
    """A conversation -> its turns, separated by blank lines, all but the first after the speaker's name; else x itself.

    [user: a, assistant: b, user: c] -> 'a\\n\\nAssistant: b\\n\\nHuman: c'; a single message becomes its text.
    """
    if not is_conversation(x):
        return x
    first, *others = x
    return '\n\n'.join([first['content'], *(f"{SPEAKERS.get(m['role'], m['role'])}: {m['content']}" for m in others)])


# The Hub -------------------------------------------------------------------------------------------------------------


def from_hub(name, columns):
    """A dataset of the Hub, or a folder that `datasets` reads -> [(split, its name there, rows)]. Runs no code."""
    import datasets
    if int(datasets.__version__.partition('.')[0]) < 4:
        raise Refusal(f'datasets {datasets.__version__} may run code of a dataset: pip install -U datasets')
    dataset, _, subset = name.partition(':')
    try:
        found = datasets.load_dataset(dataset, *[subset] if subset else [])
    except Exception as error:  # the network, the Hub and an incomplete cache raise many types
        words = visible(' '.join(str(error).split()))[:300]
        raise Refusal(f'{name} could not be loaded from the Hub ({type(error).__name__}: {words}): use a local copy '
                      'with --source=DIR --dataset=NAME; if it is in a cache, set HF_HUB_OFFLINE=1, and HF_HOME to '
                      'that cache; --source=toy needs no network')
    named = dict(pair.split(':', 1) for pair in columns)
    wanted = {split: named.get(split, split) for split in SPLITS.values()}
    absent = [theirs for ours, theirs in wanted.items() if theirs not in found and (ours == 'train' or ours in named)]
    if absent:
        raise Refusal(f"{name} has no split {', '.join(absent)}, only {', '.join(found)}; map them with "
                      '--columns=train:THEIRS,test:THEIRS')
    return [(split, theirs, found[theirs]) for split, theirs in wanted.items() if theirs in found]
