"""Who may teach in distillation: a run of ours, a file of completions, or a causal LM of Hugging Face.

A teacher is a module with a method answers(run, groups, iteration): its answer to each group's prompt, as ids of our
encoding, closed by end-of-text where it ended.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from answers import gather_answers, leave_together, make_gpt, sample, text_of
from configurator import Refusal
from huggingface import is_hugging_face
from model import check_vocabulary, load_run
from prepare_shp import SEPARATOR, checked_text, render


def open_teacher(cfg, encoding, groups):
    """cfg.teacher -> a teacher of the prompts in `groups` (train's Groups). Refuses what cannot be, with the reason."""
    where = Path(cfg.teacher)
    if not cfg.teacher:
        raise Refusal('distill needs a teacher: --teacher=DIR of a run (python train.py config/toy_teacher.py makes '
                      'one), FILE.jsonl of completions, or the name of a Hugging Face causal LM')
    if where.suffix in ('.json', '.jsonl') or where.is_file() and where.suffix != '.pt':
        return WrittenTeacher(cfg, encoding, groups)
    if is_hugging_face(where) or where.parts[0] != 'out' and not where.exists():
        return HuggingFaceTeacher(cfg)
    return RunTeacher(cfg, encoding)


def ids_of(encoding, completion, ended, limit):
    ids = encoding.encode_ordinary(completion.strip())[:limit]
    return ids + [encoding.eot_token] if ended and len(ids) < limit or not ids else ids


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


class WrittenTeacher(nn.Module):
    """Completions made elsewhere: JSON lines of {"prompt" or "post_id", "completion"}; "ended": false = cut off."""

    def __init__(self, cfg, encoding, groups):
        super().__init__()
        self.path, self.completions, problems = cfg.teacher, {}, {}
        try:
            text = Path(cfg.teacher).read_bytes()
        except OSError as error:
            raise Refusal(f'teacher={cfg.teacher} cannot be read ({error.strerror}); name a file of '
                          'completions') from None
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = row.get('post_id', row.get('prompt_id'))
                if key is None:
                    key = render(checked_text('prompt', row.get('prompt')).removesuffix(SEPARATOR), '')[0]
                completion, ended = checked_text('completion', row.get('completion')), row.get('ended', True)
                if not isinstance(key, str) or not isinstance(ended, bool):
                    raise ValueError('post_id is not text or ended is neither true nor false')
                if key in self.completions:
                    raise ValueError('its prompt has a completion already')
                self.completions[key] = ids_of(encoding, completion, ended, cfg.max_new_tokens)
            except AttributeError:
                problems.setdefault('it is not a JSON object', number)
            except RecursionError:
                problems.setdefault('it is not JSON', number)
            except ValueError as error:
                problems.setdefault('it is not JSON' if isinstance(error, json.JSONDecodeError) else str(error), number)
        if problems:
            raise Refusal(f'{cfg.teacher} does not hold lines of {{"prompt" or "post_id", "completion"}}: ' + '; '.join(
                f'line {number}: {what}' for what, number in problems.items()))
        self.find([(id, encoding.decode(groups.piece(p).tolist())) for id, p in zip(groups.ids, groups.prompts)])
        # in the state, so that a resume notices another file
        self.register_buffer('sha256', torch.tensor(list(hashlib.sha256(text).digest()), dtype=torch.uint8))

    def answers(self, run, groups, iteration):
        return self.find([(group.id, text_of(run, group.prompt)) for group in groups])

    def find(self, prompts):
        """[(post's id, rendered prompt)] -> their completions; refuses where one is missing."""
        found = [self.completions.get(id, self.completions.get(prompt)) for id, prompt in prompts]
        if missing := sum(answer is None for answer in found):
            id, prompt = prompts[found.index(None)]
            raise Refusal(f'{self.path} has no completion for {missing} of {len(found)} prompts, for example post '
                          f'{id}, {prompt.removesuffix(SEPARATOR)[:80]!r}; write one for each')
        return found


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
            self.lm = transformers.AutoModelForCausalLM.from_pretrained(name).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise Refusal(f'teacher={name} could not be loaded by transformers: {str(error).splitlines()[0]}') from None
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
        for first in range(0, len(rows), cfg.sample_batch):
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
