"""Where rows come from and what they may look like: whatever its schema, a line becomes SHP rows, or a reason why not.

A row is known by its columns (SCHEMAS). The best come first in `responses`; elsewhere the order is that of the scores
(higher is better) or ranks (1 is the best), and equal ones say nothing: no preference between them is ever made up.

    SHP's own                                  history, human_ref_A, human_ref_B, labels, score_A, score_B, ...
    ranked                                     prompt, responses: [best, ..., worst], scores: [9, ..., 1] or none
    TRL's, explicit                            prompt, chosen, rejected
    TRL's, implicit                            chosen, rejected: whole texts or conversations, which begin alike
    UltraFeedback's                            instruction, completions: [{response, overall_score}, ...]
    its binarized form                         prompt, chosen, rejected, score_chosen, score_rejected
    Nectar's                                   prompt, answers: [{answer, rank}, ...]

Any text may be a conversation, [{role, content}, ...], which `said` renders.
"""
import json
import os
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import Refusal
from toy_shp import toy_rows

SPLIT_SEED = 20240  # of splits and of the toy's rows: they are part of the data, not of a run
HELD_OUT = 0.05     # of the prompts, for each of val and test where the source has none
ROW_TRAIN = 0.8     # of the rows, under split='row'
TOY_POSTS = {'train': 4000, 'validation': 400, 'test': 400}
MAX_TEXT = 2 ** 18  # characters; Reddit's longest post has 40,000, and tiktoken panics on 2^20 blanks in a row
MAX_ID = 64         # characters of a post_id; Reddit's have 6
SPLITS = {'train': 'train', 'val': 'validation', 'test': 'test'}  # our names: SHP's
HUB_NAME = 'hf:{0}(/{0})?(:{0})?'.format('[A-Za-z0-9][A-Za-z0-9_.-]*')  # owner/dataset:subset
# the names --columns may map: of columns, of what an answer's own columns are called, and of splits
COLUMNS = ('prompt', 'responses', 'scores', 'chosen', 'rejected', 'score_chosen', 'score_rejected', 'answer', 'score',
           'rank', *SPLITS.values())
PROMPTS = 'prompt', 'instruction'                                  # the first that a row has
ANSWERS = 'answer', 'response'                                     # the first that all answers of a row have
SCORES = 'score', 'overall_score', 'fine-grained_score', 'rank'    # the same
SPEAKERS = {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}


def check_source(cfg):
    """Sentences for what is wrong with cfg.source and cfg.columns, for a Config's `check`."""
    if cfg.source.startswith('hf:') and not re.fullmatch(HUB_NAME, cfg.source):
        yield f"source='{cfg.source}' names no dataset of the Hub; write hf:OWNER/NAME or hf:OWNER/NAME:SUBSET"
    for pair in cfg.columns:
        ours, _, theirs = pair.partition(':')
        if ours not in COLUMNS or not theirs:
            yield f"columns: '{pair}' is not OURS:THEIRS, with OURS one of {', '.join(COLUMNS)}"
        elif ours in SPLITS.values() and not (cfg.source == 'hub' or cfg.source.startswith('hf:')):
            yield f"columns: '{pair}' maps a split, which datasets of the Hub have; name the file {ours}.jsonl instead"


# SHP rows ------------------------------------------------------------------------------------------------------------


class Comment(NamedTuple):
    score: float
    time: float
    id: str
    text: str

    def beats(self, other, ratio=0.0):
        """SHP's relation, which is transitive: written not earlier, and yet scored strictly higher.

        `ratio` times as high, too, where the other's score is positive; to other scores a ratio means nothing.
        """
        return (self.time >= other.time and self.score > other.score
                and (other.score <= 0 or self.score >= ratio * other.score))


def pair_of(row):
    """A row's two comments, the preferred one first."""
    a, b = (Comment(row[f'score_{x}'], row[f'created_at_utc_{x}'], row[f'c_root_id_{x}'], row[f'human_ref_{x}'])
            for x in 'AB')
    return (a, b) if row['labels'] == 1 else (b, a)


def shp_rows(row, where, columns={}):
    """A row of any schema -> the SHP rows it amounts to, best pair first; none where all its answers are tied.

    columns: our name -> theirs. `where` becomes the post_id where the row has none of its own. ValueError: the reason.
    """
    row = row | {ours: row.get(theirs) for ours, theirs in columns.items()}
    for names, read in SCHEMAS:
        if any(row.get(name) is not None for name in names):
            if lost := [theirs for ours, theirs in columns.items() if ours in MAPPED[read] and row[ours] is None]:
                raise ValueError(f"no column {', '.join(lost)[:100]}, which --columns names")
            return read(row, where, columns)
    raise ValueError("its columns are neither SHP's nor prompt + responses, prompt + chosen + rejected, instruction + "
                     'completions or prompt + answers')


def _shp(row, where, columns):
    texts = 'post_id', 'domain', 'history', 'c_root_id_A', 'c_root_id_B', 'human_ref_A', 'human_ref_B'
    numbers = 'score_A', 'score_B', 'created_at_utc_A', 'created_at_utc_B'
    row = dict(labels=row.get('labels'), **{key: checked_text(key, row.get(key)) for key in texts},
               **{key: _number(key, row.get(key)) for key in numbers})
    row['domain'] = re.sub('_(train|validation|test)$', '', row['domain'])
    if len(row['post_id']) > MAX_ID:
        raise ValueError(f'post_id is longer than {MAX_ID} characters')
    if row['labels'] not in (0, 1):
        raise ValueError('labels is neither 0 nor 1')
    winner, loser = pair_of(row)
    if not winner.beats(loser):
        raise ValueError('label contradicts scores or times')
    return [row]


def _responses(row, where, columns):
    """Best first, as texts; or in any order, each with a score or rank of its own."""
    prompt, texts, scores = _prompt(row), row['responses'], row.get('scores')
    if isinstance(texts, list) and any(isinstance(text, dict) for text in texts):
        return _scored(prompt, texts, where, columns)
    if scores is not None and not (isinstance(scores, list) and isinstance(texts, list) and len(scores) == len(texts)):
        raise ValueError('scores is not a list as long as responses')
    rows = _ranked(prompt, texts, scores, where)
    if scores and any(a < b for a, b in zip(scores, scores[1:])):
        raise ValueError('scores rise from one response to the next')
    return rows


def _chosen(row, where, columns):
    """TRL's pairs. As in its maybe_extract_prompt, where there is no prompt, or a text before two conversations, the
    prompt is what both answers begin with: messages, or characters.
    """
    prompt, pair, scores = _prompt(row), [row.get('chosen'), row.get('rejected')], None
    if prompt is None and 'prompt' in row and not all(map(is_talk, pair)):
        raise ValueError('prompt is null')
    if prompt is None and any(row.get(name) for name in ('question', 'query', 'input')):
        raise ValueError('it has no prompt, and a column that may be it; say which with --columns=prompt:NAME')
    if all(map(is_talk, pair)) and not is_talk(prompt) or prompt is None and all(isinstance(x, str) for x in pair):
        shorter = min(map(len, pair))
        common = next((i for i in range(shorter) if pair[0][i] != pair[1][i]), max(0, shorter - 1))
        if common:  # else the prompt is what the row gives, if anything
            prompt, pair = pair[0][:common], [x[common:] for x in pair]
    if any(is_talk(x) and x[0]['role'] in ('user', 'system') for x in pair):
        raise ValueError('chosen or rejected does not begin with the assistant where the two part')
    if row.get('score_chosen') is not None or row.get('score_rejected') is not None:
        scores = [_number(key, row.get(key)) for key in ('score_chosen', 'score_rejected')]
        if scores[0] < scores[1]:
            raise ValueError('score_chosen is below score_rejected')
    return _ranked(prompt, pair, scores, where)


def _completions(row, where, columns):
    return _scored(_prompt(row), row['completions'], where, columns)


def _answers(row, where, columns):
    """Nectar's: the frame around its prompts, "\\n\\nHuman: ... \\n\\nAssistant: ", goes, for our template says it."""
    prompt = _prompt(row)
    if isinstance(prompt, str) and (framed := re.fullmatch(r'\s*Human: (.*)\n\nAssistant:\s*', prompt, re.DOTALL)):
        prompt = framed[1]
    return _scored(prompt, row['answers'], where, columns)


# columns any of which tells a schema, and who reads its rows
SCHEMAS = ((('responses',), _responses), (('chosen', 'rejected'), _chosen), (('completions',), _completions),
           (('answers',), _answers), (('history', 'human_ref_A', 'labels'), _shp))
# what else of a row --columns may map, and then must be there
MAPPED = {_responses: ('prompt', 'scores'), _chosen: ('prompt', 'score_chosen', 'score_rejected'),
          _completions: ('prompt',), _answers: ('prompt',), _shp: ()}


def _prompt(row):
    return next((row[name] for name in PROMPTS if row.get(name) is not None), None)


def _scored(prompt, answers, where, columns):
    """[{text, score or rank}, ...] in any order."""
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError('its answers are not a list of two or more')
    if not all(isinstance(answer, dict) for answer in answers):
        raise ValueError('an answer is no object with a text and a score or rank')

    def column(names):
        """The first of our names whose column all answers have, of those that --columns maps if it maps any."""
        names = [name for name in names if name in columns] or names
        here = [name for name in names if all(answer.get(columns.get(name, name)) is not None for answer in answers)]
        if not here:
            asked = ' or '.join(columns.get(name, name) for name in names)
            raise ValueError(f'no column {asked[:100]} in all its answers')
        return here[0]

    text, score = column(ANSWERS), column(SCORES)
    sign = -1 if score == 'rank' else 1  # 1 is the best rank
    text, score = columns.get(text, text), columns.get(score, score)
    return _ranked(prompt, [answer[text] for answer in answers],
                   [sign * _number(score, answer[score]) for answer in answers], where)


def _ranked(prompt, texts, scores, where):
    """Answers (best first where scores is None) -> a row for each pair that is not tied.

    What comes of ties is `rankings`' affair: a chain with one answer of each tie, and pairs for the others.
    """
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError('responses is not a list of two or more')
    # without scores: 0, -1, ..., to which no ratio applies
    comments = [Comment(_number('a score', score), 0, str(k), checked_text('a response', said(text)))
                for k, (score, text) in enumerate(zip(scores or range(0, -len(texts), -1), texts))]
    history = checked_text('prompt', said(prompt))
    return [dict(post_id=where, domain='', history=history, labels=1, score_A=a.score, score_B=b.score,
                 created_at_utc_A=a.time, created_at_utc_B=b.time, c_root_id_A=a.id, c_root_id_B=b.id,
                 human_ref_A=a.text, human_ref_B=b.text)
            for a, b in combinations(sorted(comments, key=lambda c: -c.score), 2) if a.beats(b)]


def is_talk(x):
    """Whether x is a conversation: a list of messages, each with a role and a content that are texts."""
    return isinstance(x, list) and x != [] and all(
        isinstance(m, dict) and isinstance(m.get('role'), str) and isinstance(m.get('content'), str) for m in x)


def said(x):
    """A conversation -> its turns, a blank line between them, each but the first led by who speaks; else x itself.

    [user: a, assistant: b, user: c] -> 'a\\n\\nAssistant: b\\n\\nHuman: c', and so one message is its text.
    """
    if not is_talk(x):
        return x
    first, *others = x
    return '\n\n'.join([first['content'], *(f"{SPEAKERS.get(m['role'], m['role'])}: {m['content']}" for m in others)])


def checked_text(key, text):
    """`text` itself if it is fit to be trained on; else ValueError, which calls it `key` and gives the reason."""
    reason = ('is missing or null' if text is None else 'is not text' if not isinstance(text, str) else
              f'is longer than {MAX_TEXT} characters' if len(text) > MAX_TEXT else 'is empty' if not text.strip() else
              'holds a NUL or half a surrogate pair' if re.search('[\0\ud800-\udfff]', text) else '')
    if reason:
        raise ValueError(f'{key} {reason}')
    return text


def _number(key, number):
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not -2 ** 53 < number < 2 ** 53:
        raise ValueError(f'{key} is not a finite number')  # NaN fails both comparisons
    return number


# Files and the Hub ---------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    name: str        # for people
    short: str       # for post_ids: short:line
    lines: object    # JSON in bytes, or dicts


def _sources(cfg):
    """{'train': [Source, ...], 'validation': ..., 'test': ...}; train is always there."""
    if cfg.source == 'toy':
        return {split: [Source(f'toy {split}', split, toy_rows(split, n, SPLIT_SEED))]
                for split, n in TOY_POSTS.items()}
    if cfg.source == 'hub' or cfg.source.startswith('hf:'):
        return _from_hub(cfg.source.removeprefix('hf:') if cfg.source != 'hub' else 'stanfordnlp/SHP', _columns(cfg))
    files, folder = {'train': cfg.source.split(',')}, Path(cfg.source)
    if folder.is_dir():
        files = {split: sorted(str(path) for pattern in ('.json', '.jsonl') for where in ('', '*/')
                               for path in folder.glob(where + split + pattern)) for split in SPLITS.values()}
        if not files['train']:
            raise Refusal(f'{cfg.source} has neither train.json[l] nor <domain>/train.json[l]')
        both = [path for paths in files.values() for path in paths if path + 'l' in paths]
        if both:
            raise Refusal(f'{both[0]} and {both[0]}l would count twice; remove one of them')
        others = {str(path) for pattern in ('*.json', '*.jsonl', '*/*.json', '*/*.jsonl')
                  for path in folder.glob(pattern)} - {path for paths in files.values() for path in paths}
        if others:
            print(f'note: not read, for only {", ".join(files)}.json[l] are: {", ".join(sorted(others)[:5])}'
                  + ', ...' * (len(others) > 5))
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for paths in files.values() for path in paths])
    return {split: [Source(path, os.path.relpath(path, root), _lines(path)) for path in paths]
            for split, paths in files.items() if paths}


def _from_hub(name, columns):
    """A dataset of the Hub, or a folder that `datasets` reads (parquet, JSON lines). No code of theirs is run."""
    dataset, _, subset = name.partition(':')
    try:
        import datasets
        if int(datasets.__version__.partition('.')[0]) < 4:
            raise Refusal(f'datasets {datasets.__version__} may run what a dataset brings: pip install -U datasets')
        found = datasets.load_dataset(dataset, *[subset] * bool(subset))
    except Refusal:
        raise
    except Exception as error:  # of whatever kind the network, the Hub or a half-filled cache raise
        words = ''.join(filter(str.isprintable, ' '.join(str(error).split())))[:300]
        raise Refusal(f'{name} could not be had from the Hub ({type(error).__name__}: {words}): take a local copy with '
                      '--source=DIR --dataset=NAME; where it was downloaded before, set HF_HUB_OFFLINE=1 and HF_HOME '
                      'to that cache; --source=toy needs no network')
    wanted = {split: columns.get(split, split) for split in SPLITS.values()}
    absent = [theirs for ours, theirs in wanted.items() if theirs not in found and (ours == 'train' or ours in columns)]
    if absent:
        raise Refusal(f"{name} has no split {', '.join(absent)}, but {', '.join(found)}; say which is which with "
                      '--columns=train:THEIRS,test:THEIRS')
    return {split: [Source(f'{name} {theirs}', theirs, found[theirs])] for split, theirs in wanted.items()
            if theirs in found}


def _lines(path):
    if Path(path).is_char_device():
        raise Refusal(f'{path} is a device; name a file of JSON lines')
    try:
        with open(path, 'rb') as file:
            for number, line in enumerate(file):
                if number == 0 and line.startswith((b'\xff\xfe', b'\xfe\xff')):
                    raise Refusal(f'{path} is UTF-16; save it as JSON lines in UTF-8')
                yield line.removeprefix(b'\xef\xbb\xbf') if number == 0 else line
    except OSError as error:
        raise Refusal(f'{path} cannot be read: {error.strerror}')


def parsed(line):
    """A line, JSON in bytes or a dict -> a dict. ValueError with the reason if it is neither."""
    if isinstance(line, bytes):
        try:
            line = json.loads(line.decode())
        except UnicodeDecodeError:
            raise ValueError('not UTF-8')
        except (ValueError, RecursionError):
            raise ValueError('not JSON')
    if isinstance(line, list):
        raise ValueError('not a JSON object but an array; write one object a line')
    if not isinstance(line, dict):
        raise ValueError('not a JSON object')
    return line


def columns_of(row):
    """The names of a row's columns, and of those in the first answer where answers are objects."""
    inner = next((x[0] for x in row.values() if isinstance(x, list) and x and isinstance(x[0], dict)), {})
    names = ', '.join(map(repr, row))[:300]
    return names + f"; of its first answer: {', '.join(map(repr, inner))[:100]}" * bool(inner and 'role' not in inner)


def _columns(cfg):
    """{our name: theirs} of --columns."""
    return dict(pair.split(':', 1) for pair in cfg.columns)


def _read(source, cfg, share):
    """One file's lines -> (records, Counter); a record is the SHP rows of a line. `share` keeps equal texts once."""
    records, count, bad, example, seen = [], Counter(), Counter(), '', ''
    columns = {ours: theirs for ours, theirs in _columns(cfg).items() if ours not in SPLITS.values()}
    for number, line in enumerate(source.lines, 1):
        if isinstance(line, bytes) and not line.strip():
            continue
        count['read'] += 1
        try:
            row = {}
            row = parsed(line)
            rows = shp_rows(row, f'{source.short}:{number}', columns)
        except ValueError as error:
            bad[str(error)] += 1
            example = example or f'line {number}: {error}'
            if row and not seen:
                seen = (f'; the columns of line {number}: {columns_of(row)}; where yours have other names, map them '
                        'with --columns=OURS:THEIRS')
            continue
        domain = rows[0]['domain'] if rows else ''
        wide = [row for row in rows if Comment.beats(*pair_of(row), cfg.min_score_ratio)]
        if cfg.domains and domain not in cfg.domains:
            count[f'of domain {domain or "unknown"}'] += 1
        elif not rows:
            count['all answers tied'] += 1
        elif not wide:
            count['below min_score_ratio'] += 1
        else:
            records.append([{key: share.setdefault(x, x) if isinstance(x, str) else x for key, x in row.items()}
                            for row in wide])
    if sum(bad.values()) > cfg.max_bad_fraction * count['read']:
        raise Refusal(f'{source.name}: {sum(bad.values())} of {count["read"]} rows are unusable, more than '
                      f'max_bad_fraction={cfg.max_bad_fraction} allows; {example}; in all: {counted(bad)}{seen}')
    count['kept'] = len(records)
    return records, count + bad


def records_of(cfg):
    """-> ({'train' | 'val' | 'test': records}, {SHP's split: Counter of its rows}, the rule of the split in words)."""
    records, counts, share, rule = {}, {}, {}, "the source's own splits"
    for split, files in _sources(cfg).items():
        read = [_read(source, cfg, share) for source in files]
        records[split] = [record for file, _ in read for record in file]
        counts[split] = sum((count for _, count in read), Counter())
    train = sorted(records['train'], key=lambda record: record[0]['domain'])
    unknown = set(cfg.domains) - {record[0]['domain'] for record in train}
    if not train or unknown:
        of_domain = ' of domain ' * bool(unknown) + ', '.join(sorted(unknown))
        raise Refusal(f"{cfg.source} has no usable train row{of_domain}: {counted(counts['train'])}")
    needed = ('test',) if cfg.split == 'row' else ('validation', 'test')
    missing = [split for split in needed if split not in records]
    if missing:
        prompts = list(dict.fromkeys(record[0]['history'].strip() for record in train))  # as `render` has them
        order = np.random.default_rng(SPLIT_SEED).permutation(len(prompts))
        size = max(1, round(HELD_OUT * len(prompts)))
        split_of = {prompts[j]: split for i, split in enumerate(missing) for j in order[i * size:(i + 1) * size]}
        for split in missing:
            records[split] = [record for record in train if split_of.get(record[0]['history'].strip()) == split]
        train = [record for record in train if record[0]['history'].strip() not in split_of]
        rule = f"{' and '.join(missing)} cut from train by prompt, {HELD_OUT:.0%} of the prompts each"
        if not train:
            raise Refusal(f'{cfg.source} has {len(prompts)} prompts, too few to hold some out; give it more, or a '
                          'folder with train.jsonl, validation.jsonl and test.jsonl')
    if 0 < cfg.max_rows < len(train):
        beyond = len(train) - cfg.max_rows
        counts['train'] += Counter({'beyond max_rows': beyond, 'kept': -beyond})
        train = train[:cfg.max_rows]
    if cfg.split == 'row':
        order, cut = np.random.default_rng(SPLIT_SEED).permutation(len(train)), round(ROW_TRAIN * len(train))
        train, records['validation'] = [train[i] for i in order[:cut]], [train[i] for i in order[cut:]]
        rule = f'{ROW_TRAIN:.0%} of the train rows at random, the rest is val, so that posts leak; test: {rule}'
    return {'train': train, 'val': records['validation'], 'test': records['test']}, counts, rule


def counted(counter, what=''):
    return ', '.join(f'{n} {what}{key}' for key, n in counter.items()) or 'none'
