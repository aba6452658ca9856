"""One decode step for a fixed number of rows, again and again: plainly, or as a captured CUDA graph.

Everything a step needs to know stands in the runner's tensors, so one graph serves every position and every request of
the same kind. The host may run one step ahead: what it waits for is only the read-back of the tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.cache import Cache
from lowbit.engine.decoder import Decoder
from lowbit.engine.sampler import Chosen, Sampler
from lowbit.engine.step import Step
from lowbit.quant.kernels.choose_tokens import Cursor
from lowbit.quant.kernels.decode_attention import reason_against

WARM_UP = 2  # steps before a capture: they load kernels and let libraries take their workspaces


@dataclass(frozen=True)
class Written:
    """One step's result on the host, once `ready` has passed: tokens (rows); logprobs and top as in Chosen."""

    chosen: Chosen
    ready: torch.cuda.Event | None

    def wait(self) -> Chosen:
        """The result, when it has arrived."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.chosen


class Runner:
    """`rows` tokens a step. With a sampler, a step writes the next step's tokens; without, it ends with logits.

    longest  positions that no sequence comes beyond, at most the cache's
    """

    def __init__(self, decoder: Decoder, cache: Cache, rows: int, longest: int, sampler: Sampler | None = None) -> None:
        self.decoder, self.cache, self.longest, self.sampler = decoder, cache, longest, sampler
        device = decoder.weights.device
        self.tokens, self.positions, self.starts, self.slots = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(4)
        )
        # a row that is finished waits at its last position
        self.cursor = Cursor(self.positions, self.slots, cache.context - 1)
        self.result: Chosen | None = None
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        # what the attention kernel does not take runs as plain torch, whose shapes follow the positions
        heads = torch.empty(0, dtype=decoder.weights.dtype, device=device)
        self.captures = reason_against(heads, cache.layers[0]) is None

    @property
    def ahead(self) -> int:
        """Steps that are launched before the first one's tokens are waited for."""
        return 1 if self.captures else 0

    def place(self, tokens: Sequence[int], positions: Sequence[int], starts: Sequence[int]) -> None:
        """What the next step computes."""
        for into, values in ((self.tokens, tokens), (self.positions, positions), (self.starts, starts)):
            into.copy_(torch.tensor(list(values), dtype=torch.int64))
        torch.add(self.starts, self.positions, out=self.slots)

    def compute(self) -> None:
        """One step."""
        turns = self.decoder.turns_at(self.positions, self.positions + 1)
        step = Step(self.tokens, self.positions, turns, self.starts, self.slots, self.longest)
        self.logits = self.decoder.logits(self.decoder.hidden(step, self.cache))
        if self.sampler is not None:
            self.result = self.sampler(self.logits, self.tokens, self.cursor)

    def advance(self) -> None:
        """One step, as a replayed graph where a GPU's kernels take it."""
        if not self.captures:
            self.compute()
            return
        if self.graph is None:
            self.capture()
        assert self.graph is not None
        self.graph.replay()

    def capture(self) -> None:
        """Records the step. The tensors it advances are put back; what it wrote to the cache is written again."""
        kept = [self.tokens, self.positions, self.slots] + ([] if self.sampler is None else self.sampler.state)
        before = [tensor.clone() for tensor in kept]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        self.graph = graph
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)

    def launch(self) -> Written:
        """One step, and its tokens on their way to the host."""
        self.advance()
        assert self.result is not None
        if not self.captures:
            # the sampler's tensors are written again by the next step
            return Written(Chosen(self.result.tokens.clone(), self.result.logprobs, self.result.top), None)
        host = on_host(self.result)
        ready = torch.cuda.Event()
        ready.record()
        return Written(host, ready)

    def steps(self, most: int) -> Iterator[Chosen]:
        """Up to `most` steps' results in order."""
        waiting: deque[Written] = deque()
        for _ in range(most):
            waiting.append(self.launch())
            if len(waiting) > self.ahead:
                yield waiting.popleft().wait()
        while waiting:
            yield waiting.popleft().wait()


def on_host(chosen: Chosen) -> Chosen:
    """`chosen` in pinned memory, once the stream has come so far."""
    if chosen.logprobs is None or chosen.top is None:
        return Chosen(chosen.tokens.to("cpu", non_blocking=True))
    tokens, logprobs, top = (part.to("cpu", non_blocking=True) for part in (chosen.tokens, chosen.logprobs, chosen.top))
    return Chosen(tokens, logprobs, top)
