"""The transformer, its key-value cache and generation.

A GPT-2: pre-LayerNorm blocks, tanh-GELU, learned positions (Radford et al. 2019). `forward` returns hidden states and
`logits` is separate, so that training can fuse head and loss (losses.linear_loss).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

GRAPHED = 'cuda',  # where generate replays a captured step (extras/graphs.py) instead of the loop below
LOGITS = dict(cpu=2 ** 21, mps=2 ** 24, cuda=2 ** 27)  # per chunk of an evaluation; few on a CPU, to fit its cache


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int   # of the tokenizer; the embedding has padding
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0
    bias: bool = True
    tie_weights: bool = True

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}; '
                             f'pick a multiple of {self.n_head}')

    @property
    def padded_vocab_size(self):  # a multiple of 64 keeps the head's matrix products fast
        return -(-self.vocab_size // 64) * 64


class KVCache:
    """Keys and values of the tokens seen so far, in place: (n_layer, B, n_head, T, C / n_head). Rows may be ragged."""

    def __init__(self, config, batch_size, max_tokens, device, dtype):
        shape = config.n_layer, batch_size, config.n_head, max_tokens, config.n_embd // config.n_head
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch_size, dtype=torch.long, device=device)  # tokens of each row
        self.longest = 0                                                        # their maximum, known without a sync
        self.batch = torch.arange(batch_size, device=device)[:, None]

    def write(self, layer, k, v, positions):
        """Stores k, v (B, n_head, T, D) at positions (B, T) -> all keys and values up to the longest row."""
        self.k[layer][self.batch, :, positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][self.batch, :, positions] = v.transpose(1, 2).to(self.v.dtype)
        return self.k[layer, :, :, :self.longest].to(k.dtype), self.v[layer, :, :, :self.longest].to(v.dtype)

    def keep_rows(self, rows):
        self.k, self.v, self.length = self.k[:, rows], self.v[:, rows], self.length[rows]
        self.batch = self.batch[:len(rows)]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask, layer, positions, cache):
        B, T, C = x.shape
        q, k, v = (h.view(B, T, self.n_head, -1).transpose(1, 2) for h in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.write(layer, k, v, positions)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias),
                                      c_proj=nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask, layer, positions, cache):
        x = x + self.drop(self.attn(self.ln_1(x), mask, layer, positions, cache))
        return x + self.drop(self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate='tanh')))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:  # as in GPT-2: the deeper the model, the smaller the residual branches
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)

    def forward(self, idx, cache=None, positions=None, mask=None):
        """Token ids idx (B, T) -> hidden states (B, T, C) after the last LayerNorm.

        With a cache, the tokens follow those in the cache. Without one, positions (B, T) and mask (B, 1, T, T), True
        where a query attends to a key, allow several texts in a row (answers.pack); the default is one causal text
        per row. Raises ValueError if a text exceeds block_size, unless positions are given.
        """
        T, longest = idx.shape[1], idx.shape[1] + (cache.longest if cache else 0)
        if positions is None:
            if longest > self.config.block_size:
                raise ValueError(f'{longest} tokens do not fit into block_size={self.config.block_size}; '
                                 'shorten the text')
            positions = torch.arange(T, device=idx.device)
        if cache is not None:
            positions = positions + cache.length[:, None]
            cache.longest = longest
            mask = (torch.arange(longest, device=idx.device) <= positions[..., None])[:, None]
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, layer, positions, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def logits(self, hidden):
        """hidden (..., C) -> logits (..., V), at least float32, over the padded vocabulary; the padding is -inf."""
        logits = self.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits[..., self.config.vocab_size:] = -torch.inf
        return logits

    def log_prob_chunks(self, hidden):
        """Yields the log-probabilities (R, V) of hidden (N, C), one chunk of rows after another, for evaluations."""
        for rows in hidden.split(max(1, LOGITS[hidden.device.type] // self.config.vocab_size)):
            yield self.logits(rows).log_softmax(-1)

    @torch.no_grad()  # not inference_mode, in which autocast casts the weights again at every token
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, eot=None, uniform=None,
                 transform=None, on_token=None):
        """Continues each prompt, a list of token ids; their lengths may differ. Returns the lists of new ids.

        A row ends with the id `eot` (included), after max_new_tokens, or when the block is full. The t-th token of row
        b is drawn with the uniform number uniform[b, t], (B, max_new_tokens), by default from torch.rand: a row's
        sample does not depend on the other rows.
        temperature 0 takes the likeliest token; top_k 0 keeps all. transform: log-probabilities -> log-probabilities,
        applied before both (see losses.taylor_link). on_token(row, id) is called with each new token.
        Raises ValueError for an empty prompt, or one that leaves no room in the block.
        """
        for b, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.config.block_size:
                raise ValueError(f'prompt {b} has {len(prompt)} tokens; from 1 to {self.config.block_size - 1} fit '
                                 f'into block_size={self.config.block_size} with room for an answer')
        if not prompts:
            return []
        device, was_training = self.lm_head.weight.device, self.training
        self.eval()
        uniform = (torch.rand(len(prompts), max_new_tokens) if uniform is None else uniform).to(device)
        length = torch.tensor([len(p) for p in prompts], device=device)
        idx = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(device)
        max_tokens = min(idx.shape[1] + max_new_tokens, self.config.block_size)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        cache = KVCache(self.config, len(prompts), max_tokens, device, dtype)
        answers = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # prompts whose answers have not ended, in batch order
        hidden = self(idx, cache=cache)[torch.arange(len(prompts), device=device), length - 1]
        cache.length = length             # padding follows, which each row's new tokens overwrite
        if device.type in GRAPHED and transform is None and on_token is None:
            from extras import graphs
            answers = graphs.decode(self, prompts, cache, hidden, uniform, max_new_tokens, temperature, top_k, eot)
            self.train(was_training)
            return answers
        for t in range(max_new_tokens):
            logits = self.logits(hidden)
            if transform is not None:
                logits = transform(logits.log_softmax(-1))
            token = sample_token(logits, uniform[rows, t], temperature, top_k)
            for b, id in zip(rows, token.tolist()):
                answers[b].append(id)
                if on_token is not None:
                    on_token(b, id)
            running = [i for i, b in enumerate(rows) if answers[b][-1] != eot
                       and len(prompts[b]) + len(answers[b]) < self.config.block_size]
            if not running or t + 1 == max_new_tokens:
                break
            if len(running) < len(rows):
                cache.keep_rows(running)
                token, rows = token[running], [rows[i] for i in running]
                cache.longest = max(len(prompts[b]) + len(answers[b]) for b in rows) - 1
            hidden = self(token[:, None], cache=cache)[:, -1]
        self.train(was_training)
        return answers

    def flops_per_token(self, T):
        """FLOPs of training per token: 6 per weight of a product, 12 C T per layer for attention (PaLM, app. B)."""
        c = self.config
        return 6 * (12 * c.n_layer * c.n_embd ** 2 + c.padded_vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T


class ScalarHead(nn.Module):
    """A GPT with a scalar output at every token, for values and rewards. It starts at 0.

    read: a reward is the scalar at an answer's 'last' token, or the 'sum' over the answer's tokens. `offset` is added
    once to a reward, and to every value.
    """

    def __init__(self, gpt, read='last'):
        super().__init__()
        self.gpt, self.config, self.read = gpt, gpt.config, read
        self.head = nn.Linear(gpt.config.n_embd, 1, bias=False)
        self.offset = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.head.weight)
        if not gpt.config.tie_weights:  # the language head is not used, but DDP waits for every parameter's gradient
            gpt.lm_head.weight.requires_grad_(False)

    def forward(self, idx, positions=None, mask=None):
        """idx (B, T) -> scalars (B, T), at least float32, offset (1,), hidden states (B, T, C). Arguments as in GPT."""
        hidden = self.gpt(idx, positions=positions, mask=mask)
        scalar = self.head(hidden)[..., 0]
        return scalar.to(torch.promote_types(scalar.dtype, torch.float32)), self.offset.clone(), hidden


def sample_token(logits, uniform, temperature=1.0, top_k=0):
    """Inverse-CDF sampling: logits (B, V), uniform (B,) in [0, 1) -> ids (B,). An id with logit -inf is never drawn."""
    if temperature < 1e-9:  # the likeliest token; smaller numbers would overflow
        return logits.argmax(-1)
    logits = logits if temperature == 1 else logits / temperature
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    # in two steps, first a block of ids, then an id in it: a cumulative sum over all ids would cost as much as the head
    p = logits.softmax(-1)
    if p.shape[-1] % 64:
        p = F.pad(p, (0, -p.shape[-1] % 64))
    p = p.unflatten(-1, (-1, 64))
    block, uniform = _draw(p.sum(-1), uniform)
    id, _ = _draw(p[torch.arange(len(p), device=p.device), block], uniform)
    return block * 64 + id


def _draw(p, u):
    """p (B, M) >= 0, u (B,) in [0, 1) -> i (B,), drawn from p / sum(p), and the position of u within p_i, in [0, 1)."""
    cdf = p.cumsum(-1)
    u = u[:, None] * cdf[:, -1:]
    i = torch.searchsorted(cdf, u, right=True).clamp(max=p.shape[-1] - 1)
    i = torch.where(p.gather(1, i) > 0, i, p.argmax(-1, keepdim=True))  # rounding may select an entry of 0
    within = (u - F.pad(cdf, (1, 0)).gather(1, i)) / p.gather(1, i)
    return i[:, 0], within[:, 0].clamp(0, 1 - 2 ** -24)
