"""Generation with CUDA graphs: model.generate imports this file on CUDA. A decoding step launches hundreds of small
kernels; a graph launches them all at once. For that, shapes and addresses must not change from step to step:

* attention reads the whole cache, with a mask that `GPT.forward` makes from the rows' lengths;
* LOOK steps run before the host reads their tokens; a row that ends earlier continues, and its extra ids are dropped;
* the remaining rows then move to the front, and the graph for the next smaller power of two of rows is used.
"""
import copy
import itertools
import weakref

import torch

from model import KVCache, sample_token

LOOK = 16
decoders = weakref.WeakKeyDictionary()  # model -> its latest Decoder, with its graphs


def decode(model, prompts, cache, hidden, uniform, max_new_tokens, temperature, top_k, eot):
    """The rest of GPT.generate, given the prompts' cache and the hidden (B, C) of their last tokens -> answers."""
    answers, rows = [[] for _ in prompts], list(range(len(prompts)))
    batch, length = 1 << (len(rows) - 1).bit_length(), cache.k.shape[3]
    length = min(-(-length // 64) * 64, model.config.block_size)
    key = length, cache.k.dtype, temperature, top_k, *(p.data_ptr() for p in model.parameters())
    decoder = decoders.get(model)
    if decoder is None or decoder.key != key or len(decoder.token) < batch:
        decoders.pop(model, None)  # frees its memory first
        decoder = decoders[model] = Decoder(key, model.config, batch, length, hidden.device, cache.k.dtype)
    token = sample_token(model.logits(hidden), uniform[:, 0], temperature, top_k)
    decoder.fill(rows, token, cache)
    columns = token[:, None]
    for t in itertools.count(1, LOOK):
        running = []
        for i, (b, ids) in enumerate(zip(rows, columns.tolist())):
            answer, room = answers[b], min(max_new_tokens, model.config.block_size - len(prompts[b]))
            if answer[-1:] != [eot]:
                ids = ids[:room - len(answer)]
                answer += ids[:ids.index(eot) + 1] if eot in ids else ids
            if answer[-1] != eot and len(answer) < room:
                running.append(i)
        if not running:
            return answers
        if len(running) <= batch // 2:
            batch, rows = 1 << (len(running) - 1).bit_length(), [rows[i] for i in running]
            decoder.fill(running, decoder.token, decoder.cache)
        columns = decoder.run(model, batch, uniform[rows, t:t + LOOK])[:len(rows)]


class Decoder:
    """The buffers of a step, and a graph of it for each number of rows; these are the first rows of the buffers."""

    def __init__(self, key, config, batch, length, device, dtype):
        self.key, self.graphs, (self.temperature, self.top_k) = key, {}, key[2:4]
        self.cache = KVCache(config, batch, length, device, dtype)
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        self.uniform = torch.zeros(batch, LOOK, device=device)
        self.tokens = torch.zeros(batch, LOOK, dtype=torch.long, device=device)
        self.t = torch.zeros(1, 1, dtype=torch.long, device=device)  # column of the two above

    def fill(self, rows, token, cache):
        """Copies rows of a cache, each with its next token, to the first rows here."""
        n, T = len(rows), cache.k.shape[3]
        for mine, theirs in ((self.cache.k[:, :n, :, :T], cache.k), (self.cache.v[:, :n, :, :T], cache.v)):
            mine.copy_(theirs[:, rows])
        self.cache.length[:n], self.token[:n] = cache.length[rows], token[rows]

    def run(self, model, batch, uniform):
        """Runs a step of the first `batch` rows for each column of uniform (n, up to LOOK) -> tokens."""
        self.uniform[:len(uniform), :uniform.shape[1]] = uniform
        self.t.zero_()
        for _ in range(uniform.shape[1]):
            self.replay(model, batch)
        return self.tokens[:batch, :uniform.shape[1]]

    def step(self, model, batch):
        cache, length = copy.copy(self.cache), self.cache.k.shape[3]
        cache.k, cache.v = cache.k[:, :batch], cache.v[:, :batch]
        cache.length, cache.batch, cache.longest = cache.length[:batch], cache.batch[:batch], length - 1
        at, token = self.t.expand(batch, 1), self.token[:batch]
        hidden = model(token[:, None], cache=cache)[:, -1]
        cache.length.clamp_(max=length - 1)  # of rows that have ended
        uniform = self.uniform[:batch].gather(1, at)[:, 0]
        token.copy_(sample_token(model.logits(hidden), uniform, self.temperature, self.top_k))
        self.tokens[:batch].scatter_(1, at, token[:, None])
        self.t += 1

    def replay(self, model, batch):
        if self.token.device.type != 'cuda':  # the same step, for tests
            return self.step(model, batch)
        if batch not in self.graphs:
            self.graphs[batch] = self.capture(model, batch)
        self.graphs[batch].replay()

    def capture(self, model, batch):
        state, graph = [self.token, self.t, self.cache.length], torch.cuda.CUDAGraph()
        before, stream = [x.clone() for x in state], torch.cuda.Stream()
        # weights are cast at each step: a cast cached by autocast would keep the weights of this call
        with torch.autocast('cuda', dtype=torch.get_autocast_dtype('cuda'), cache_enabled=False,
                            enabled=torch.is_autocast_enabled('cuda')):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries allocate memory at first use, which must not happen in a graph
                self.step(model, batch)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, capture_error_mode='thread_local'):
                self.step(model, batch)
        for x, value in zip(state, before):
            x.copy_(value)
        return graph
