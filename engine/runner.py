"""Runner: repeats a decode step for a fixed number of rows, directly or as a captured CUDA graph.

All inputs of a step are in the runner's tensors, so one graph serves every position and every request of the same kind.
The host may launch one step ahead: it waits only for the tokens, which the step itself writes to the host's memory.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.capture import WARM_UP, capture
from lowbit.engine.layers import captures
from lowbit.engine.passes import Reader
from lowbit.engine.sampler import Chosen, Sampler
from lowbit.engine.step import Step
from lowbit.quant.kernels.choose_tokens import Cursor, Mailbox

SENT = 8  # steps whose tokens are in a mailbox at a time


@dataclass(frozen=True)
class Written:
    """One step's result in host memory, valid after `ready`.

    chosen  the result; None: its tokens are in the runner's mailbox, as those of step `turn`
    """

    runner: "Runner"
    turn: int
    chosen: Chosen | None = None
    ready: torch.cuda.Event | None = None

    @property
    def running(self) -> bool:
        """True if the step still runs, which the host does not wait for."""
        return self.ready is not None and not self.ready.query()

    def wait(self) -> Chosen:
        """Wait for the result and return it."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.chosen or Chosen(self.runner.sent(self.turn))


class Runner:
    """Runs steps of `rows` tokens. With a sampler, a step writes the next step's tokens; without, it ends with logits.

    With masks a step has two parts, so that a mask may depend on the token before it: run(0) computes the logits while
    the caller makes the masks, run(1) chooses. With a `source` it has two as well, and the first one is the source's
    step: the graph of the model is captured once for all samplers, and that of a choice is short.

    reader   reads the prompts into the cache that the steps continue
    longest  upper bound on every sequence's length, at most the cache's context
    adjacent as in Step
    source   a runner without a sampler that computes the logits. Its inputs are this one's: place them before the steps
             of either
    plain    next steps that run without a graph
    warm_up  runs with which the capture begins
    """

    def __init__(
        self,
        reader: Reader,
        rows: int,
        longest: int,
        sampler: Sampler | None = None,
        adjacent: int = 1,
        source: "Runner | None" = None,
    ) -> None:
        self.reader, self.longest, self.sampler, self.adjacent = reader, longest, sampler, adjacent
        self.source = source
        decoder, cache = self.decoder, self.cache = reader.decoder, reader.cache
        self.inputs = torch.zeros(4, rows, dtype=torch.int64, device=decoder.weights.device)
        if source is not None:
            self.inputs = source.inputs
        self.tokens, self.positions, self.starts, self.slots = self.inputs
        # a finished row stays at its last position
        self.cursor = Cursor(self.positions, self.slots, cache.context - 1)
        self.result: Chosen | None = None
        self.logits: Tensor | None = None
        self.masked = sampler is not None and sampler.features.masked
        self.parts = (self.forward, self.choose) if self.masked or source is not None else (self.compute,)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.captures = captures(decoder.blocks, cache, rows, decoder.weights.dtype)
        self.plain, self.warm_up = 0, WARM_UP
        self.turn = 0  # steps so far
        self.mailbox: Mailbox | None = None
        if self.captures and sampler is not None and not sampler.features.logprobs:
            sent = torch.zeros(SENT, rows, dtype=torch.int64, pin_memory=True)
            self.mailbox = Mailbox(sent, torch.zeros_like(self.tokens))

    @property
    def ahead(self) -> int:
        """Steps launched before the first one's tokens are waited for."""
        return 1 if self.captures else 0

    @property
    def state(self) -> list[Tensor]:
        """The tensors that a step changes and that matter: cache entries that it writes are written again."""
        kept = [self.tokens, self.positions, self.slots] + ([] if self.sampler is None else self.sampler.state)
        return kept if self.mailbox is None else [*kept, self.mailbox.turns]

    def place(self, tokens: Sequence[int], positions: Sequence[int], starts: Sequence[int]) -> None:
        """Set the inputs of the next step."""
        slots = [start + position for start, position in zip(starts, positions, strict=True)]
        self.inputs.copy_(torch.tensor([list(tokens), list(positions), list(starts), slots]))

    def compute(self) -> None:
        """Run one step."""
        self.forward()
        self.choose()

    def forward(self) -> None:
        """Run the part of a step that computes the logits."""
        if self.source is not None:
            self.source.advance()
            self.logits = self.source.logits
            return
        turns = self.decoder.turns_at(self.positions, self.positions + 1)
        where = self.positions, turns, self.starts, self.slots
        step = Step(self.tokens, *where, longest=self.longest, adjacent=self.adjacent, alone=self.adjacent == 1)
        self.logits = self.decoder.logits(self.decoder.hidden(step, self.cache))

    def choose(self) -> None:
        """Run the part of a step that chooses the tokens, if there is a sampler."""
        if self.sampler is not None:
            assert self.logits is not None
            self.result = self.sampler(self.logits, self.tokens, self.cursor, self.mailbox)

    def advance(self) -> None:
        """Run one step."""
        for part in range(len(self.parts)):
            self.run(part)

    def run(self, part: int) -> None:
        """Run a part of a step, as a replayed graph if the GPU's kernels allow it."""
        last = part == len(self.parts) - 1
        self.turn += last
        if part < self.first or not self.may_capture:
            self.parts[part]()
            self.plain = max(self.plain - last, 0)
            return
        if not self.graphs:
            self.graphs = capture(self.parts[self.first :], self.state, self.warm_up)
        self.graphs[part - self.first].replay()

    @property
    def first(self) -> int:
        """The first part with a graph of this runner: that of the logits may be the source's."""
        return 0 if self.source is None else 1

    @property
    def may_capture(self) -> bool:
        """True if parts may run as graphs. Those that read the logits of a source begin once these lie where its graph
        writes them."""
        return self.captures and not self.plain and (self.source is None or bool(self.source.graphs))

    def spread(self) -> None:
        """Make the next steps the warm-up of a capture that is still to come: others wait less for each of them than
        for all at once."""
        if self.source is not None:
            self.source.spread()
        if self.captures and not self.graphs and self.warm_up:
            self.plain, self.warm_up = self.warm_up, 0

    def launch(self) -> Written:
        """Run one step, whose tokens go to the host."""
        self.advance()
        return self.written()

    def written(self) -> Written:
        """The last step's result: in the mailbox, or copied to the host from now on."""
        assert self.result is not None
        turn = self.turn - 1
        if not self.captures:
            # copied, since the next step overwrites the sampler's tensors
            copied = Chosen(self.result.tokens.clone(), self.result.logprobs, self.result.top)
            return Written(self, turn, copied)
        host = on_host(self.result) if self.mailbox is None else None
        ready = torch.cuda.Event()
        ready.record()
        return Written(self, turn, host, ready)

    def sent(self, turn: int) -> Tensor:
        """The tokens (rows) that step `turn`, which has run, wrote to the mailbox. RuntimeError if a later step
        overwrites them."""
        assert self.mailbox is not None
        if self.turn - turn > SENT:
            raise RuntimeError(f"step {turn} is read after {self.turn} steps: the mailbox holds the last {SENT}")
        return self.mailbox.tokens[turn % SENT].clone()

    def steps(self, most: int) -> Iterator[Chosen]:
        """The results of up to `most` steps, in order."""
        waiting: deque[Written] = deque()
        for _ in range(most):
            waiting.append(self.launch())
            if len(waiting) > self.ahead:
                yield waiting.popleft().wait()
        while waiting:
            yield waiting.popleft().wait()


def on_host(chosen: Chosen) -> Chosen:
    """A copy of `chosen`, which has log-probabilities, in pinned memory, valid once the stream reaches this point."""
    assert chosen.logprobs is not None
    assert chosen.top is not None
    tokens, logprobs, top = (part.to("cpu", non_blocking=True) for part in (chosen.tokens, chosen.logprobs, chosen.top))
    return Chosen(tokens, logprobs, top)
