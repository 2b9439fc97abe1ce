"""Who may teach in distillation: a run of ours, a file of completions, or a causal LM of Hugging Face.

    python -m extras.teachers --dataset=mine --prompts=FILE.jsonl      train's prompts, for a teacher elsewhere to complete

A teacher is a module with a method answers(run, groups, iteration): its answer to each group's prompt, as ids of our
encoding, closed by end-of-text where it ended.
"""
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import prepare_shp
from answers import gather_answers, leave_together, make_gpt, sample, text_of
from configurator import Refusal, progress, run
from prepare_shp import SEPARATOR, render
from extras.schemas import as_text, checked_text, is_conversation, parsed
from runs import check_vocabulary, first_line, is_hugging_face, load_run, write_whole

# in a line of completions, the first there is: whose prompt's it is, where train knows it, and what was said
IDS = 'custom_id', 'prompt_id', 'post_id', 'id'
COMPLETIONS = 'completion', 'response', 'text', 'generated_text'
CUT_OFF = 'length', 'abort', 'content_filter'  # as a finish_reason


@dataclass(frozen=True)
class Config(prepare_shp.Config):
    prompts: str = 'prompts.jsonl'  # the file to write: {"prompt_id", "prompt"} for each distinct prompt of train


def open_teacher(cfg, encoding, groups):
    """cfg.teacher -> a teacher of the prompts in `groups` (train's Groups). Refuses what cannot be, with the reason."""
    where = Path(cfg.teacher)
    if not cfg.teacher:
        raise Refusal('distill needs a teacher: --teacher=DIR of a run (python train.py config/toy_teacher.py makes '
                      'one), FILE.jsonl of completions, or the name of a Hugging Face causal LM')
    if where.suffix in ('.json', '.jsonl') or where.is_file() and where.suffix != '.pt':
        return WrittenTeacher(cfg, encoding, groups)
    if is_hugging_face(where) or (where.parts[:1] != ('out',) and not where.exists()):
        return HuggingFaceTeacher(cfg)
    return RunTeacher(cfg, encoding)


def ids_of(encoding, completion, ended, limit):
    """An answer's ids, at most `limit`, closed by end-of-text where it ended within that; at least one id."""
    ids = encoding.encode_ordinary(completion.strip())[:limit]
    closes = (ended and len(ids) < limit) or not ids
    return ids + [encoding.eot_token] * closes


class RunTeacher(nn.Module):
    """The policy of another run; samples at temperature 1, as a self does."""

    def __init__(self, cfg, encoding):
        super().__init__()
        state = load_run(cfg, 'teacher')
        if 'model' not in state:
            raise Refusal(f'teacher={cfg.teacher} is a reward run, which writes no answers; name another')
        check_vocabulary(state, 'teacher', cfg.teacher, encoding)
        self.gpt = make_gpt(state)
        self.room = self.gpt.config.block_size - cfg.max_new_tokens
        if self.room < 1:
            raise Refusal(f'teacher={cfg.teacher} has a block of {self.gpt.config.block_size} tokens, no room for a '
                          f'prompt and max_new_tokens={cfg.max_new_tokens}; use fewer')

    def answers(self, run, groups, iteration):
        return sample(run, self.gpt, [group.prompt[-self.room:] for group in groups], iteration, 2 ** 32)


def prompts_of(groups, encoding):
    """The rendered prompt of each group, and the ids that stand for one prompt alone: {id: prompt}.

    An id is the post's or, for posts of several prompts, the prompt's own: a part of its sha256.
    """
    prompts = [encoding.decode(groups.piece(p).tolist()) for p in groups.prompts]
    of_id = {}
    for id, prompt in zip(groups.ids.tolist(), prompts):
        of_id.setdefault(id, set()).add(prompt)
    own = {hashlib.sha256(prompt.encode()).hexdigest()[:16]: prompt for prompt in dict.fromkeys(prompts)}
    return prompts, {id: min(those) for id, those in of_id.items() if len(those) == 1} | own


class WrittenTeacher(nn.Module):
    """Completions made elsewhere, one for each distinct prompt of train: JSON lines, the prompt by its id or its text,

        {"prompt_id" | "post_id" | "id" | "prompt", "completion" | "text" | "generated_text"}
        {"custom_id", "response": {"body": {"choices": [{"text" | "message": {"content"}, "finish_reason"}]}}}

    the second OpenAI's batch output, as vLLM writes it. "ended": false or a finish_reason of "length": it was cut off.
    A generated_text loses the prompt where it begins with it, as transformers' pipeline lets it.
    """

    def __init__(self, cfg, encoding, groups):
        super().__init__()
        self.path, self.completions, problems, strangers, again = cfg.teacher, {}, {}, [], []
        self.prompts, self.of_id = prompts_of(groups, encoding)
        self.known, generators = set(self.prompts), set()
        try:
            text = Path(cfg.teacher).read_bytes()
        except OSError as error:
            raise Refusal(f'teacher={cfg.teacher} cannot be read ({error.strerror}); name a file of '
                          'completions') from None
        for number, line in enumerate(text.removeprefix(b'\xef\xbb\xbf').splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = parsed(line)
                completion, ended = completion_of(row)
                prompt, named = self.prompt_of(row)
                if prompt in self.known and 'generated_text' in row:
                    completion = without(completion, prompt, as_text(row.get('prompt')))
                if completion.strip() or row.get('ended') is not True:  # a run of ours may end an answer at once
                    checked_text('completion', completion)
            except ValueError as error:
                reason = str(error)
                problems.setdefault('it is ' * reason.startswith('not ') + reason, []).append(number)
                continue
            if prompt not in self.known:
                strangers.append(f'line {number}, {named[:80]!r}')
            elif prompt in self.completions:
                again.append(f'line {number}, {named[:80]!r}')
                generators.add('generator' in row)
            else:
                self.completions[prompt] = ids_of(encoding, completion, ended, cfg.max_new_tokens)
        if problems:
            reasons = '; '.join(f'line {lines[0]}: {what}' + f' (and {len(lines) - 1} more)' * (len(lines) > 1)
                                for what, lines in problems.items())
            raise Refusal(f'{self.path} does not hold lines of {{"prompt" or "prompt_id", "completion"}}: {reasons}')
        cut = sum(len(ids) == cfg.max_new_tokens and ids[-1] != encoding.eot_token for ids in self.completions.values())
        if cut and os.environ.get('RANK', '0') == '0':
            print(f'note: {cut} of {len(self.completions)} completions do not end within max_new_tokens='
                  f'{cfg.max_new_tokens}')
        complaints, missing = [], [i for i, prompt in enumerate(self.prompts) if prompt not in self.completions]
        if missing:
            id, prompt = groups.ids[missing[0]], self.prompts[missing[0]].removesuffix(SEPARATOR)
            lacking = len(self.known) - len(self.completions)
            complaints.append(f'it has no completion for {lacking} of {len(self.known)} '
                              f'prompts, for example post {id}, {prompt[:80]!r}')
        if strangers:
            complaints.append(f'{len(strangers)} lines are of no prompt of train, for example {strangers[0]}')
        if again:
            complaints.append(f'{len(again)} lines are of a prompt that has a completion already, for example '
                              f'{again[0]}; keep one for each' + ', say of one "generator"' * any(generators))
        if complaints:
            raise Refusal(f"{self.path} does not fit train's prompts: {'; '.join(complaints)}. The prompts to complete "
                          'are written by: python -m extras.teachers --dataset=NAME --prompts=FILE.jsonl')
        # in the state, so that a resume notices another file
        self.register_buffer('sha256', torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8))

    def prompt_of(self, row):
        """-> the rendered prompt that a line is about, by an id that train knows or else by its text; and its name."""
        ids = [row[key] for key in IDS if isinstance(row.get(key), str)]
        known = {self.of_id[id]: id for id in reversed(ids) if id in self.of_id}
        if len(known) > 1:
            raise ValueError('its ids are of two prompts of train')
        id = next(iter(known.values()), None)
        text = as_text(row.get('prompt'))
        if text is None and ids:
            return self.of_id.get(id), id or ids[0]
        prompt = render(checked_text('prompt', text).removesuffix(SEPARATOR), '')[0]
        if id is None:
            return prompt, text
        if prompt in self.known and prompt != self.of_id[id]:
            raise ValueError('its id and its prompt are of two prompts of train')
        return self.of_id[id], id

    def answers(self, run, groups, iteration):
        return [self.completions[self.prompts[group.number]] for group in groups]


def completion_of(row):
    """A line of completions -> its text, and whether it ended. ValueError: the reason why there is none."""
    if not isinstance(row.get('response'), str | None) or row.get('error') is not None:  # of a batch of requests
        try:
            (row,) = row['response']['body']['choices']
            row = dict(row, text=row['message']['content']) if 'message' in row else dict(row)
        except (KeyError, TypeError, ValueError):
            raise ValueError('its response does not hold one choice; ask again where the request failed') from None
    found = [key for key in COMPLETIONS if row.get(key) is not None]
    if len(found) > 1:
        raise ValueError(f"it has {' and '.join(found)}; keep the one that is the answer")
    text = row[found[0]] if found else None
    if is_conversation(text):  # the pipeline's conversation, the answer last
        if text[-1]['role'] != 'assistant':
            raise ValueError('its conversation does not end with the assistant')
        text = text[-1]['content']
    if not isinstance(text, str):
        checked_text('completion', text)
    ended = row.get('ended', row.get('finish_reason') not in CUT_OFF)
    if not isinstance(ended, bool):
        raise ValueError('its ended is neither true nor false')
    return text, ended


def without(text, *prompts):
    """text less the first of the prompts that it begins with."""
    return next((text.removeprefix(p) for p in prompts if isinstance(p, str) and p and text.startswith(p)), text)


class HuggingFaceTeacher(nn.Module):
    """In its own tokens: our rendered prompt goes in as text, its answer comes out as text.

    Its samples depend on the number of ranks, unlike ours: transformers draws them.
    """

    def __init__(self, cfg):
        super().__init__()
        name = cfg.teacher
        try:
            import transformers
        except ImportError:
            raise Refusal(f'teacher={name} is neither the folder of a run nor a file of JSON lines, and a Hugging Face '
                          'model needs transformers: pip install transformers') from None
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, padding_side='left',
                                                                        truncation_side='left')
            lm, loaded = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
        except Exception as error:  # of whatever kind transformers, safetensors and the tokenizers raise
            raise Refusal(f'teacher={name} could not be loaded by transformers ({type(error).__name__}: '
                          f'{first_line(error)})') from None
        if loaded['missing_keys']:  # transformers would make them up
            raise Refusal(f"teacher={name} lacks the weight {sorted(loaded['missing_keys'])[0]}; copy the model again")
        self.lm = lm.eval().requires_grad_(False)
        if len(self.tokenizer) < 2 or self.tokenizer.eos_token is None:
            raise Refusal(f'teacher={name} has no tokenizer with an end of text; save it beside the model')
        context = getattr(self.lm.config, 'max_position_embeddings', 1024)
        self.room = context - cfg.max_new_tokens
        if self.room < 1:
            raise Refusal(f'teacher={name} has a context of {context} tokens, no room for a prompt and max_new_tokens='
                          f'{cfg.max_new_tokens}; use fewer')
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        ends = self.lm.generation_config.eos_token_id  # one, several or none
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @torch.no_grad()
    def answers(self, run, groups, iteration):
        cfg, machine, answers = run.cfg, run.machine, {}
        rows = list(range(len(groups)))[machine.rank::machine.world_size]
        for first in progress(range(0, len(rows), cfg.sample_batch), 'sampling the teacher', machine.print):
            if run.stop.number:
                break
            part = rows[first:first + cfg.sample_batch]
            prompts = self.tokenizer([text_of(run, groups[i].prompt) for i in part], return_tensors='pt', padding=True,
                                     truncation=True, max_length=self.room)
            torch.manual_seed(int(np.random.default_rng((6, cfg.seed, iteration, part[0])).integers(2 ** 63)))
            new = self.lm.generate(**prompts.to(machine.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                   max_new_tokens=cfg.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id)
            for i, ids in zip(part, new[:, prompts['input_ids'].shape[1]:].tolist()):
                length = next((t for t, id in enumerate(ids) if id in self.ends), None)
                text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
                answers[i] = ids_of(run.encoding, text, length is not None, cfg.max_new_tokens)
        leave_together(run)
        return gather_answers(run, answers)


def main(cfg):
    """Writes train's prompts, rendered, each once, with an id to join its completion by."""
    data = prepare_shp.open_dataset(cfg)
    prompts, of_id = prompts_of(data.groups('train'), prepare_shp.encoding(data.meta['encoding']))
    if Path(cfg.prompts).exists():
        raise Refusal(f'{cfg.prompts} exists; name another file with --prompts=FILE.jsonl')
    id_of = {prompt: id for id, prompt in reversed(of_id.items())}
    lines = [json.dumps(dict(prompt_id=id_of.get(prompt), prompt=prompt)) + '\n' for prompt in dict.fromkeys(prompts)]
    write_whole(Path(cfg.prompts), ''.join(lines))
    print(f'{cfg.prompts}: {len(lines)} prompts')


if __name__ == '__main__':
    run(main, Config)
