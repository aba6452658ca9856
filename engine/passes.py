"""Prefill of short prompts as CUDA graphs: each prompt is padded to one of a few lengths. Several very short ones can
share a pass.

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
SHARED_LENGTHS, SHARED_COUNTS = (64, 128, 256), (2, 4)  # of shared passes


class Pass:
    """The pass over prompts of up to `rows` tokens, each a sequence from its first position on.

    prompts  that share it
    pool     memory pool shared by all captured passes. One runs at a time, and its results are copied out; None on a
             CPU
    end      True: of each prompt the last row alone is returned
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: Cache,
        rows: int,
        prompts: int,
        pool: torch.cuda._POOL_HANDLE | None,
        end: bool = False,
    ) -> None:
        self.decoder, self.cache, self.rows, self.prompts, self.pool = decoder, cache, rows, prompts, pool
        self.end = end
        device = decoder.weights.device
        self.places = torch.arange(rows, device=device).repeat(prompts)
        tokens, turns, starts, slots = (torch.zeros_like(self.places) for _ in range(4))
        # of a single sequence the slots are known, and nothing is gathered
        prefix = slots if cache.batch > 1 else slice(0, rows)
        self.before = torch.arange(prompts, device=device) * rows - 1  # the row before each prompt
        wanted = torch.zeros_like(self.before) if end and not decoder.taps_last else None
        self.step = Step(tokens, self.places, turns, starts, slots, prefix=prefix, prompts=prompts, wanted=wanted)
        self.hidden: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, given: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Hidden states (len(tokens), hidden) of each (sequence, tokens), of which there are at most `prompts`; with
        `end` (1, hidden). The cache's sequences then hold the tokens, followed by padding."""
        self.place(given)
        if self.pool is not None and self.hidden is not None and self.graph is None:
            self.capture()
        if self.graph is None:
            self.hidden = self.decoder.hidden(self.step, self.cache).h
        else:
            self.graph.replay()
        assert self.hidden is not None
        parts = self.hidden.split(len(self.hidden) // self.prompts)
        begin = -1 if self.end else 0
        return [part[: len(tokens)][begin:].clone() for part, (_, tokens) in zip(parts, given, strict=False)]

    def place(self, given: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Set the inputs of the pass. A prompt's last token also serves as padding; any token would do. The last prompt
        is repeated where there are fewer: it writes the same again."""
        step, filled = self.step, [*given, *[given[-1]] * (self.prompts - len(given))]
        padded = [[*tokens, *[tokens[-1]] * (self.rows - len(tokens))] for _, tokens in filled]
        facts = [[self.cache.start(sequence), len(tokens)] for sequence, tokens in filled]
        step.tokens.copy_(torch.tensor(padded).flatten())
        each = torch.tensor(facts).to(self.places.device)
        starts, lengths = each.repeat_interleave(self.rows, 0).unbind(1)
        step.turns.copy_(self.decoder.turns_at(self.places, lengths))
        step.starts.copy_(starts)
        torch.add(self.places, starts, out=step.slots)
        if step.wanted is not None:
            torch.add(self.before, each[:, 1], out=step.wanted)

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
        self.ends: dict[int, Pass] = {}
        self.shared: dict[tuple[int, int], Pass] = {}

    def read(self, sequence: int, tokens: Sequence[int], end: bool = False) -> Iterator[Tensor]:
        """Hidden states (rows, hidden) of a prompt, chunk by chunk, with `end` those of the last row at the end. The
        prompt becomes the cache's `sequence`."""
        rows = next((length for length in self.lengths if len(tokens) <= length <= self.cache.context), None)
        passes = self.ends if end else self.passes
        if rows is None:
            yield from read_prompt(self.decoder, self.cache, sequence, tokens, end=end)
            return
        if rows not in passes:
            passes[rows] = Pass(self.decoder, self.cache, rows, 1, self.pool, end)
        try:
            [hidden] = passes[rows]([(sequence, tokens)])
        except torch.OutOfMemoryError:  # smaller chunks may fit
            yield from read_prompt(self.decoder, self.cache, sequence, tokens, end=end)
        else:
            yield hidden

    def read_together(self, given: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Hidden states (1, hidden) of the last row of each (sequence, tokens): at most SHARED_COUNTS[-1] prompts, none
        longer than `longest_shared`. Each becomes its sequence of the cache."""
        longest = max(len(tokens) for _, tokens in given)
        rows = next(length for length in SHARED_LENGTHS if longest <= length)
        count = next(count for count in SHARED_COUNTS if len(given) <= count)
        if (rows, count) not in self.shared:
            self.shared[rows, count] = Pass(self.decoder, self.cache, rows, count, self.pool, True)
        try:
            return self.shared[rows, count](given)
        except torch.OutOfMemoryError:
            return [[*self.read(*each, end=True)][-1][-1:] for each in given]

    @property
    def longest_shared(self) -> int:
        """The most tokens of a prompt that shares a pass; 0 where none do."""
        fitting = [length for length in SHARED_LENGTHS if length <= self.cache.context]
        return max(fitting, default=0) if self.lengths and self.cache.batch > 1 else 0

    def last_logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (len(prompts), vocabulary) after each prompt's last token; prompt b becomes sequence b."""
        rows = []
        for sequence, prompt in enumerate(prompts):
            *_, last = self.read(sequence, prompt, end=True)
            rows.append(last[-1:])
        return self.decoder.logits(torch.cat(rows))
