"""Drafts by heads that continue the model's features: the drafter of one workspace, with keys and values of its own.

A text of n tokens has n - 1 pairs for a head: token i + 1 with the feature of position i. Pairs of certain tokens come
from the model; the head proposes a token behind the last one, pairs it with its own feature, and goes on.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Architecture
from lowbit.engine.cache import Cache, CacheKind, make_cache
from lowbit.engine.capture import capture
from lowbit.engine.drafts.drafter import Proposal
from lowbit.engine.drafts.widths import ROWS, wide
from lowbit.engine.layers import Block, captures
from lowbit.engine.products import Hidden, Norm, Product
from lowbit.engine.step import Step
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.choose_tokens import ChoiceCall
from lowbit.quant.kernels.row_norm import Rows

MOST = ROWS - 1  # tokens of a proposal
SPARE = 4 * ROWS  # positions behind the longest text: a step's last rows, and a drafter's own, may be there
CHUNK = 2048  # pairs of a prompt in one pass
KIND, CHANCE = 0, 0.7


@dataclass(frozen=True)
class Model:
    """The model that a drafter drafts for.

    positions  of the longest text, and SPARE more
    """

    architecture: Architecture
    embedding: Tensor
    positions: int
    head: Product


class Head(Protocol):
    """A head: its weights and its forward pass, immutable.

    taps  layers of the model whose outputs it reads
    most  longest draft
    """

    @property
    def architecture(self) -> Architecture: ...

    @property
    def taps(self) -> tuple[int, ...]: ...

    @property
    def most(self) -> int: ...

    @property
    def blocks(self) -> tuple[Block, ...]: ...

    def planned(self) -> "Head":
        """A copy for a GPU, whose launches are planned as in layers.planned."""

    def read(self, taken: Tensor, step: Step, cache: Cache) -> None:
        """Write keys and values of pairs: the step's tokens, with outputs (m, taps * hidden) of the model's layers."""

    def draft(self, taken: Tensor, step: Step, last: Tensor, most: int, cache: Cache) -> Tensor:
        """Tokens (n, most) behind rows `last` (n) of the pairs, which are read as by `read`. Nothing waits for the
        device."""


class Continued(ABC):
    """A Head of one layer that goes on with its own features.

    targets  (n) int64: the model's token for each of the head's
    """

    block: Block
    embedding: Tensor
    head: Product
    targets: Tensor

    @abstractmethod
    def features(self, taken: Tensor) -> Tensor:
        """The features (m, hidden) of outputs (m, taps * hidden) of the model's layers."""

    @abstractmethod
    def forward(self, features: Tensor, step: Step, cache: Cache) -> Hidden:
        """The features (m, hidden) of the next positions. Writes the rows' keys and values to the cache."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """See Head."""
        return (self.block,)

    def read(self, taken: Tensor, step: Step, cache: Cache) -> None:
        """See Head."""
        self.forward(self.features(taken), step, cache)

    def draft(self, taken: Tensor, step: Step, last: Tensor, most: int, cache: Cache) -> Tensor:
        """See Head: one token after another."""
        features = Hidden(self.forward(self.features(taken), step, cache).h.index_select(0, last))
        starts = step.starts.index_select(0, last)
        places = step.positions.index_select(0, last) + torch.arange(1, most, device=last.device).unsqueeze(1)
        tokens = [self.likeliest(features)]
        for at, slots in zip(places, starts + places, strict=True):
            following = Step(tokens[-1], at, at, starts, slots, longest=step.longest, alone=True)
            features = self.forward(features.h, following, cache)
            tokens.append(self.likeliest(features))
        return torch.stack(tokens, 1)

    def likeliest(self, features: Hidden) -> Tensor:
        """The model's tokens (m) that are likeliest behind features (m, hidden)."""
        return self.targets.index_select(0, largest(self.head(features)))

    def normed_pairs(self, norms: tuple[Norm, Norm], features: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The step's embeddings and the features (m, hidden), each normed by its own of `norms`."""
        embedded = functional.embedding(step.tokens, self.embedding)
        known, seen = (
            ops.normalize(norm.of(Rows(rows.contiguous())))
            for norm, rows in zip(norms, (embedded, features), strict=True)
        )
        return known, seen


def largest(scores: Tensor) -> Tensor:
    """The index (m) of the largest score in each of the rows (m, n) float32."""
    found = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    ops.choose(ChoiceCall(scores, found, torch.empty_like(found), dependent=True))  # the numbers written do not matter
    return found


@dataclass
class Pairs:
    """The pairs of a sequence: `count` are in the cache, and some wait."""

    count: int
    tokens: list[int]
    taken: Tensor | None


class Heads:
    """The drafter: see drafter.Drafter."""

    def __init__(self, head: Head, batch: int, context: int, like: Tensor) -> None:
        """Room for `batch` sequences of `context` positions, in the dtype and on the device of `like`."""
        self.head, self.taps, self.most = head, head.taps, head.most
        self.usual: Proposal | None = Proposal((0,) * head.most, KIND, CHANCE)
        self.cache = make_cache(head.architecture, batch, context + SPARE, CacheKind(), like)
        self.pairs: dict[int, Pairs] = {}
        self.drafts: dict[tuple[int, int, int], Draft] = {}
        self.captured, self.steady = captures(head.blocks, self.cache, ROWS, like.dtype), True
        self.like = like[:0, :0]

    def begin(self, sequence: int, tokens: Sequence[int]) -> None:
        """See Drafter. The first token has no pair."""
        self.pairs[sequence] = Pairs(0, [], None)

    def extend(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """See Drafter."""
        assert features is not None
        pairs = self.pairs[sequence]
        pairs.tokens += tokens
        pairs.taken = features if pairs.taken is None else torch.cat([pairs.taken, features])
        while len(pairs.tokens) > ROWS:
            self.read(sequence, pairs, min(CHUNK, len(pairs.tokens) - 1))

    def end(self, sequence: int) -> None:
        """See Drafter."""
        self.pairs.pop(sequence, None)

    def follow(self, sequence: int, count: int) -> None:
        """Note that a step has read so many pairs of a sequence."""
        self.pairs[sequence].count = count

    def read(self, sequence: int, pairs: Pairs, count: int) -> None:
        """Read the first `count` pairs that wait, as one part of a prompt."""
        assert pairs.taken is not None
        device, cache, first = pairs.taken.device, self.cache, pairs.count
        tokens = torch.tensor(pairs.tokens[:count], device=device)
        positions = torch.arange(first, first + count, device=device)
        starts = torch.full_like(positions, cache.start(sequence))
        prefix = cache.prefix(sequence, first + count)
        step = Step(tokens, positions, positions, starts, starts + positions, prefix=prefix)
        self.head.read(pairs.taken[:count], step, cache)
        self.drop(pairs, count)

    def drop(self, pairs: Pairs, count: int) -> None:
        """Note that the first `count` pairs that wait are in the cache."""
        assert pairs.taken is not None
        pairs.count, pairs.tokens, pairs.taken = pairs.count + count, pairs.tokens[count:], pairs.taken[count:]

    def propose(self, sequences: Sequence[int], most: int) -> list[Proposal]:
        """See Drafter. Reads all pairs that wait."""
        waiting = [self.pairs[sequence] for sequence in sequences]
        counts = [len(pairs.tokens) for pairs in waiting]
        # each shape has its own graph, and eight rows cost little more than one; without graphs each row costs
        width = ROWS if self.captured else wide(max(counts))
        shape = len(sequences), width, most
        self.steady = shape in self.drafts
        if not self.steady:
            self.drafts[shape] = Draft(self.head, self.cache, shape, self.like)
        tokens = self.drafts[shape]([self.cache.start(sequence) for sequence in sequences], waiting)
        for pairs, count in zip(waiting, counts, strict=True):
            self.drop(pairs, count)
        return [Proposal(tuple(row), KIND, CHANCE) for row in tokens]


class Draft:
    """Drafts of one shape, on a GPU a CUDA graph: (sequences, pairs of each that are read, tokens to propose)."""

    def __init__(self, head: Head, cache: Cache, shape: tuple[int, int, int], like: Tensor) -> None:
        self.head, self.cache, (sequences, self.width, self.most) = head, cache, shape
        rows, device = sequences * self.width, like.device
        self.inputs = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.last = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.taken = like.new_zeros(rows, 0)
        self.tokens = torch.empty(0)
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.captures = captures(head.blocks, cache, rows, like.dtype)

    def __call__(self, starts: Sequence[int], waiting: Sequence[Pairs]) -> list[list[int]]:
        """The tokens of each sequence, behind the pairs that wait. Rows beyond them have any token."""
        tokens, positions, begins, last, taken = list[int](), list[int](), list[int](), list[int](), list[Tensor]()
        for start, pairs in zip(starts, waiting, strict=True):
            assert pairs.taken is not None
            spare = self.width - len(pairs.tokens)
            last.append(len(tokens) + len(pairs.tokens) - 1)
            tokens += pairs.tokens + [0] * spare
            positions += range(pairs.count, pairs.count + self.width)
            begins += [start] * self.width
            taken += [pairs.taken, pairs.taken[-1:].expand(spare, -1)]
        self.inputs.copy_(torch.tensor([tokens, positions, begins]))
        self.last.copy_(torch.tensor(last))
        found = torch.cat(taken)
        if self.taken.shape != found.shape:
            self.taken = torch.empty_like(found)
        self.taken.copy_(found)
        self.run()
        rows: list[list[int]] = self.tokens.tolist()
        return rows

    def run(self) -> None:
        """Compute the tokens."""
        if not self.captures:
            self.compute()
            return
        if not self.graphs:
            self.graphs = capture((self.compute,), ())
        self.graphs[0].replay()

    def compute(self) -> None:
        """Compute the tokens from the inputs."""
        tokens, positions, starts = self.inputs
        longest = self.cache.context
        step = Step(tokens, positions, positions, starts, starts + positions, longest=longest, adjacent=self.width)
        self.tokens = self.head.draft(self.taken, step, self.last, self.most, self.cache)
