"""Prefill of short prompts as CUDA graphs: each prompt is padded to one of a few lengths.

A short prompt is bound by the host, which launches a few hundred kernels for it. Padding at the end does not change a
causal prompt, so one graph per length serves all prompts, in every sequence of the cache. The first prompt of a length
runs without a graph, as the warm-up of a capture; the second is captured. Both compute the same rows, so results do not
depend on earlier prompts.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit.engine.cache import Cache
from lowbit.engine.capture import captured
from lowbit.engine.decoder import Decoder
from lowbit.engine.prefill import read_prompt
from lowbit.engine.step import Step

LENGTHS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)


class Pass:
    """The pass over prompts of up to `rows` tokens, each a sequence from its first position on.

    pool  memory pool shared by all captured passes. One runs at a time, and its results are copied out; None on a CPU
    """

    def __init__(self, decoder: Decoder, cache: Cache, rows: int, pool: torch.cuda._POOL_HANDLE | None) -> None:
        self.decoder, self.cache, self.pool = decoder, cache, pool
        device = decoder.weights.device
        self.places = torch.arange(rows, device=device)
        tokens, turns, starts, slots = (torch.zeros_like(self.places) for _ in range(4))
        self.step = Step(tokens, self.places, turns, starts, slots, prefix=slots)
        self.hidden: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, sequence: int, tokens: Sequence[int]) -> Tensor:
        """Hidden states (len(tokens), hidden). The cache's sequence then holds the tokens, followed by padding."""
        self.place(sequence, tokens)
        if self.pool is not None and self.hidden is not None and self.graph is None:
            self.capture()
        if self.graph is None:
            self.hidden = self.decoder.hidden(self.step, self.cache).h
        else:
            self.graph.replay()
        assert self.hidden is not None
        return self.hidden[: len(tokens)].clone()

    def place(self, sequence: int, tokens: Sequence[int]) -> None:
        """Set the inputs of the pass. The last token also serves as padding; any token would do."""
        step, padding = self.step, len(self.places) - len(tokens)
        step.tokens.copy_(torch.tensor([*tokens, *[tokens[-1]] * padding]))
        step.turns.copy_(self.decoder.turns_at(self.places, len(tokens)))
        torch.add(self.places, self.cache.start(sequence), out=step.slots)

    def capture(self) -> None:
        """Capture the pass into a graph, without computing anything."""
        graph = torch.cuda.CUDAGraph()
        with captured(graph, self.pool):
            hidden = self.decoder.hidden(self.step, self.cache).h
        self.hidden, self.graph = hidden, graph


class Reader:
    """Reads prompts into a cache.

    lengths  padded lengths of short prompts; none on a CPU, where padding saves nothing, and none with experts, whose
             numbers of rows the host reads
    """

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self.decoder, self.cache = decoder, cache
        on_gpu = decoder.weights.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        mixed = any(layer.mixture is not None for layer in decoder.architecture.layers)
        self.lengths = LENGTHS if on_gpu and not mixed else ()
        self.passes: dict[int, Pass] = {}

    def read(self, sequence: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Hidden states (rows, hidden) of a prompt, chunk by chunk. The prompt becomes the cache's `sequence`."""
        rows = next((length for length in self.lengths if len(tokens) <= length <= self.cache.context), None)
        if rows is None:
            yield from read_prompt(self.decoder, self.cache, sequence, tokens)
            return
        if rows not in self.passes:
            self.passes[rows] = Pass(self.decoder, self.cache, rows, self.pool)
        try:
            hidden = self.passes[rows](sequence, tokens)
        except torch.OutOfMemoryError:  # smaller chunks may fit
            yield from read_prompt(self.decoder, self.cache, sequence, tokens)
        else:
            yield hidden

    def last_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (len(prompts), vocabulary) after each prompt's last token; prompt b becomes sequence b."""
        rows = []
        for sequence, prompt in enumerate(prompts):
            *_, last = self.read(sequence, prompt)
            rows.append(last[-1:])
        return self.decoder.logits(torch.cat(rows))
