r"""Teachers for distillation: a run of ours, a file of completions, or a causal LM of Hugging Face.

A teacher is a module with a method answers(run, groups, iteration) -> list: its answer to each group's prompt as token
ids, with end-of-text unless it was cut off, or None if it has no answer. Every prompt of train needs an answer.

A file has a completion for each prompt of train, as JSON lines in any of these formats, matched by id or by prompt:

    {"prompt_id": "a1", "completion": "Try vinegar."}            or "post_id", "id", "prompt" (with or without template)
    {"prompt": "Hi?\nA:\n", "text": "Try", "finish_reason": "length"}    vLLM; "length" is cut off, as is "ended": false
    {"prompt_id": "a1", "generated_text": "Hi?\nA:\nTry vinegar."}       transformers' pipeline; the prompt is removed
    {"custom_id": "a1", "response": {"body": {"choices": [{"message": {"content": "Try."}, "finish_reason": "stop"}]}}}

The pipeline does not mark answers that it cut off: add "ended": false yourself. The file may also have completions of
held-out prompts; evaluations report on those. This writes the prompts of train and val:

    python -m extras.teachers --dataset=mine --prompts=prompts.jsonl       lines of {"prompt_id", "prompt"}

vLLM completes them in Python, or as a batch of chats (neither has been run yet):

    rows = [json.loads(line) for line in open('prompts.jsonl')]
    answers = vllm.LLM('NAME').generate([row['prompt'] for row in rows], vllm.SamplingParams(max_tokens=100))
    for row, answer in zip(rows, answers):
        print(json.dumps(row | dict(text=answer.outputs[0].text, finish_reason=answer.outputs[0].finish_reason)))

    jq -c '{custom_id: .prompt_id, method: "POST", url: "/v1/chat/completions", body: {model: "NAME", max_tokens: 100,
        messages: [{role: "user", content: (.prompt | rtrimstr("\nA:\n"))}]}}' prompts.jsonl > requests.jsonl
    vllm run-batch -i requests.jsonl -o teacher.jsonl --model NAME

The iterations/*.jsonl of a run can be a teacher, too; take enough iterations, and one answer for each prompt:

    rows = [json.loads(line) for i in range(4) for line in open(f'out/run/iterations/{i:04d}.jsonl')]
    best = {row['prompt_id']: row for row in sorted(rows, key=lambda row: row.get('reward', 0))
            if row['generator'] != 'data'}.values()
"""
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import prepare_shp
from answers import in_batches, make_gpt, sample, text_of
from configurator import Refusal, run
from prepare_shp import SEPARATOR, checked_text, parsed, render
from extras.schemas import as_text, is_conversation
from runs import first_line, is_hugging_face, load_run, write_whole

IDS = 'custom_id', 'prompt_id', 'post_id', 'id'  # the columns of a line of completions
COMPLETIONS = 'completion', 'response', 'text', 'generated_text'
CUT_OFF = 'length', 'abort', 'content_filter'  # as a finish_reason


@dataclass(frozen=True)
class Config(prepare_shp.Config):
    prompts: str = 'prompts.jsonl'  # the file to write: {"prompt_id", "prompt"} for each prompt of train and val


def open_teacher(cfg, encoding, groups):
    """cfg.teacher -> a teacher for the prompts in `groups` (train's Groups). Raises Refusal with the reason."""
    where = Path(cfg.teacher)
    if not cfg.teacher:
        raise Refusal('distill needs a teacher; set --teacher to the folder of a run (python train.py '
                      'config/toy_teacher.py makes one), a FILE.jsonl of completions, or a Hugging Face causal LM')
    if where.suffix in ('.json', '.jsonl') or where.is_file() and where.suffix != '.pt':
        return WrittenTeacher(cfg, encoding, groups)
    if is_hugging_face(where) or (where.parts[:1] != ('out',) and not where.exists()):
        return HuggingFaceTeacher(cfg)
    return RunTeacher(cfg, encoding)


def ids_of(encoding, completion, ended, limit):
    """The ids of an answer, at most `limit` and at least one, with end-of-text if it ended within the limit."""
    ids = encoding.encode_ordinary(completion.strip())[:limit]
    if not ids or ended and len(ids) < limit:
        ids.append(encoding.eot_token)
    return ids


class RunTeacher(nn.Module):
    """The policy of another run; samples at temperature 1, like a self."""

    def __init__(self, cfg, encoding):
        super().__init__()
        state = load_run(cfg, 'teacher', encoding)
        if 'model' not in state:
            raise Refusal(f'teacher={cfg.teacher} is a reward model, which writes no answers; name another run')
        self.gpt = make_gpt(state)
        self.room = self.gpt.config.block_size - cfg.max_new_tokens
        if self.room < 1:
            raise Refusal(f'teacher={cfg.teacher} has a block of {self.gpt.config.block_size} tokens, no room for a '
                          f'prompt and max_new_tokens={cfg.max_new_tokens}; use a smaller --max_new_tokens')

    def answers(self, run, groups, iteration):
        return sample(run, self.gpt, [group.prompt[-self.room:] for group in groups], iteration, 2 ** 32)


def prompts_of(groups, encoding):
    """The rendered prompt of each of a split's groups."""
    return [encoding.decode(groups.piece(p).tolist()) for p in groups.prompts]


def own_id(prompt):
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def prompts_by_id(ids, prompts):
    """{id: prompt}: the data's ids that belong to a single prompt, and the own_id of each prompt."""
    pairs = set(zip(ids, prompts))
    count = Counter(id for id, _ in pairs)
    return {id: prompt for id, prompt in pairs if count[id] == 1} | {own_id(prompt): prompt for prompt in prompts}


class WrittenTeacher(nn.Module):
    """Completions from a file: one for each prompt of train, and for any held-out prompts."""

    def __init__(self, cfg, encoding, groups):
        super().__init__()
        self.encoding, self.limit = encoding, cfg.max_new_tokens
        self.rows = {}  # a rendered prompt, or an id that is not in train -> its line
        prompts = prompts_of(groups, encoding)
        of_id, problems, cut = prompts_by_id(groups.ids.tolist(), prompts), [], 0
        text = Path(cfg.teacher).read_bytes()
        for number, line in enumerate(text.removeprefix(b'\xef\xbb\xbf').splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = parsed(line)
                key = key_of(row, of_id)
                completion, _ = completion_of(row, key)
                if completion.strip() or row.get('ended') is not True:  # an answer may end at once
                    checked_text('completion', completion)
                if key in self.rows:
                    raise ValueError(f'a second completion of {key[:80]!r}; keep one, for example of one "generator"')
                self.rows[key] = row
                cut += self.ids(key, key)[-1] != encoding.eot_token
            except ValueError as error:
                problems.append(f'line {number}: {error}')
        known = set(prompts)
        missing, outside = sorted(known - self.rows.keys()), len(self.rows.keys() - known)
        if missing:
            problems.insert(0, f'it has no completion for {len(missing)} of {len(known)} prompts, for example id '
                               f'{own_id(missing[0])}, {missing[0][:80]!r}, and {outside} for other prompts')
        if problems:
            raise Refusal(f"teacher={cfg.teacher} does not fit train's prompts ({len(problems)} problems): "
                          f'{"; ".join(problems[:4])}. To write the prompts to complete, run: '
                          'python -m extras.teachers --dataset=NAME --prompts=FILE.jsonl')
        if os.environ.get('RANK', '0') == '0':
            print(f'{cfg.teacher}: {len(known)} completions of prompts of train and {outside} of others; {cut} do not '
                  f'end within max_new_tokens={self.limit}')
        # part of the state, so that a resume detects another file
        self.register_buffer('sha256', torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8))

    def ids(self, key, prompt):
        completion, ended = completion_of(self.rows[key], prompt)
        return ids_of(self.encoding, completion, ended, self.limit)

    def answers(self, run, groups, iteration):
        prompts = [self.encoding.decode(group.prompt) for group in groups]
        keys = {prompt: id for id, prompt in prompts_by_id([group.id for group in groups], prompts).items()
                if id in self.rows}
        keys |= {prompt: prompt for prompt in prompts if prompt in self.rows}
        return [self.ids(keys[prompt], prompt) if prompt in keys else None for prompt in prompts]


def key_of(row, of_id):
    """A line of completions -> the rendered prompt that it completes, or its id if it has only an id not in train.

    of_id: {id: prompt} of train. A prompt without its beginning, as in a run with a short block, is matched by its id.
    """
    ids = [row[column] for column in IDS if isinstance(row.get(column), str)]
    found = {of_id[id] for id in ids if id in of_id}
    if len(found) > 1:
        raise ValueError('its ids belong to two prompts of train')
    whole = next(iter(found), None)
    if row.get('prompt') is None and ids:
        return whole or ids[0]
    prompt = render(checked_text('prompt', row.get('prompt')).removesuffix(SEPARATOR), '')[0]
    if whole not in (None, prompt) and own_id(prompt) in of_id:
        raise ValueError('its id and its prompt belong to two prompts of train')
    return whole if whole and whole.endswith(prompt.lstrip('\ufffd')) else prompt


def completion_of(row, prompt):
    """A line of completions -> its text without the prompt, and whether it ended. Raises ValueError with the reason."""
    prompts = [text for text in (prompt, as_text(row.get('prompt'))) if isinstance(text, str) and text]
    if not isinstance(row.get('response'), str | None) or row.get('error') is not None:  # of a batch of requests
        try:
            (row,) = row['response']['body']['choices']
            row = dict(row, text=row['message']['content']) if 'message' in row else dict(row)
        except (KeyError, TypeError, ValueError):
            raise ValueError('its response does not have exactly one choice; repeat failed requests') from None
    found = [column for column in COMPLETIONS if row.get(column) is not None]
    if len(found) > 1:
        raise ValueError(f"it has {' and '.join(found)}; keep the one that is the answer")
    text = row[found[0]] if found else None
    if is_conversation(text):  # the pipeline's conversation, the answer last
        if text[-1]['role'] != 'assistant':
            raise ValueError('its conversation does not end with the assistant')
        text = text[-1]['content']
    if not isinstance(text, str):
        checked_text('completion', text)
    if found == ['generated_text']:
        text = next((text.removeprefix(prompt) for prompt in prompts if text.startswith(prompt)), text)
    ended = row.get('ended', row.get('finish_reason') not in CUT_OFF)
    if not isinstance(ended, bool):
        raise ValueError('its "ended" is neither true nor false')
    return text, ended


class HuggingFaceTeacher(nn.Module):
    """A causal LM with its own tokenizer: the rendered prompt and the answer are exchanged as text.

    Its samples, unlike ours, depend on the number of ranks: transformers draws them.
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
        except Exception as error:  # transformers, safetensors and tokenizers raise many types
            raise Refusal(f'teacher={name} could not be loaded by transformers ({type(error).__name__}: '
                          f'{first_line(error)})') from None
        if loaded['missing_keys']:  # transformers would initialise them at random
            raise Refusal(f"teacher={name} lacks the weight {sorted(loaded['missing_keys'])[0]}; copy the model again")
        self.lm = lm.eval().requires_grad_(False)
        if len(self.tokenizer) < 2 or self.tokenizer.eos_token is None:
            raise Refusal(f'teacher={name} has no tokenizer with an end-of-text token; save one next to the model')
        context = getattr(self.lm.config, 'max_position_embeddings', 1024)
        self.room = context - cfg.max_new_tokens
        if self.room < 1:
            raise Refusal(f'teacher={name} has a context of {context} tokens, no room for a prompt and max_new_tokens='
                          f'{cfg.max_new_tokens}; use a smaller --max_new_tokens')
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        ends = self.lm.generation_config.eos_token_id  # one, several or none
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @torch.no_grad()
    def answers(self, run, groups, iteration):
        cfg, machine = run.cfg, run.machine

        def generate(part):
            prompts = self.tokenizer([text_of(run, groups[i].prompt) for i in part], return_tensors='pt', padding=True,
                                     truncation=True, max_length=self.room)
            torch.manual_seed(int(np.random.default_rng((6, cfg.seed, iteration, part[0])).integers(2 ** 63)))
            new = self.lm.generate(**prompts.to(machine.device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                                   max_new_tokens=cfg.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id)
            answers = []
            for ids in new[:, prompts['input_ids'].shape[1]:].tolist():
                length = next((t for t, id in enumerate(ids) if id in self.ends), None)
                text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
                answers.append(ids_of(run.encoding, text, length is not None, cfg.max_new_tokens))
            return answers

        return in_batches(run, range(len(groups)), 'sampling the teacher', generate)


def main(cfg):
    """Writes the rendered prompts of train and val, each once, with an id that a completion can refer to."""
    data = prepare_shp.open_dataset(cfg)
    encoding = prepare_shp.encoding(data.meta['encoding'])
    prompts = dict.fromkeys(prompt for split in ('train', 'val') for prompt in prompts_of(data.groups(split), encoding))
    if Path(cfg.prompts).exists():
        raise Refusal(f'{cfg.prompts} exists; name another file with --prompts=FILE.jsonl')
    lines = [json.dumps(dict(prompt_id=own_id(prompt), prompt=prompt)) + '\n' for prompt in prompts]
    write_whole(Path(cfg.prompts), ''.join(lines))
    print(f'{cfg.prompts}: {len(lines)} prompts')


if __name__ == '__main__':
    run(main, Config)
