"""Runs in turns without work, before a request needs them: graphs are captured, and kernels of long prompts loaded.

A request that comes meanwhile waits. So each run is short, and none begins before RESTED seconds without work.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowbit.engine.capture import WARM_UP
from lowbit.engine.passes import SHARED_COUNTS, SHARED_LENGTHS, Reader
from lowbit.engine.prefill import CHUNK
from lowbit.engine.sampler import Constraints, features_of
from lowbit.engine.sampling import Sampling
from lowbit.quant.kernels.decode_attention import SHORT

REST_ROWS = 16  # of a step that reads the rest of a prompt
# Clients that ask one after another leave gaps of milliseconds. A capture began in each of them, and the next request
# waited for it: first tokens of Llama-2-7B came after 188 ms on an H200 instead of 9.
RESTED = 1.0
CHUNKS = (512, 1024, 2048, 4096, CHUNK)


@dataclass(frozen=True)
class Graph:
    """A decode step of `rows` rows within `length` positions. Without `sampling` it ends with logits: it reads the rest
    of a prompt, or comes before a choice by more than one kernel. Or, if `rows` is 0, a pass over `prompts` prompts of
    `length` tokens.

    loaded  True behind a step of as many rows and the same length: its kernels need no runs before the capture
    """

    length: int
    rows: int = 0
    sampling: Sampling | None = None
    prompts: int = 1
    loaded: bool = field(default=False, compare=False)  # the same graph, sooner captured

    @property
    def runs(self) -> int:
        """Until the graph is captured: a pass by its second run, a step after its warm-up."""
        return 1 if self.loaded else WARM_UP + 1 if self.rows else 2


@dataclass(frozen=True)
class Chunk:
    """The first layer of a chunk of `length` tokens. Its first run loads kernels, plans attention and allocates memory:
    46 ms for 4096 tokens of Llama-2-7B on an H200."""

    length: int


@dataclass(frozen=True)
class Choice:
    """A choice with every feature of sampling. Its first run loads their kernels."""


Run = Graph | Chunk | Choice


def expected(reader: Reader, usual: Sequence[Sampling]) -> deque[Run]:
    """The runs that requests need, the most likely ones first; none on a CPU. Chunks are last: a capture frees the
    memory that is kept for later.

    usual  samplings whose steps are captured whole, if one kernel chooses; a step that ends with logits serves all
           others
    """
    cache = reader.cache
    if reader.pool is None or not usual:
        return deque()
    powers = sorted({1 << (rows - 1).bit_length() for rows in range(1, cache.batch + 1)})
    reaches = sorted({min(SHORT, cache.context), cache.context})
    fused = [sampling for sampling in usual if fused_by(sampling)]
    kinds = [*((sampling, False) for sampling in fused), (None, bool(fused))]
    steps = [
        Graph(reach, rows, sampling, loaded=loaded)
        for rows in powers
        for reach in reaches
        for sampling, loaded in kinds
    ]
    rests = [Graph(reach, REST_ROWS) for reach in reaches if reader.lengths]
    alone = len(reaches) * len(kinds)
    passes = [Graph(length) for length in reader.lengths if length <= cache.context]
    lengths = [length for length in SHARED_LENGTHS if length <= reader.longest_shared]
    counts = [count for count in SHARED_COUNTS if count <= cache.batch]
    shared = [Graph(length, prompts=count) for length in lengths for count in counts]
    graphs = dict.fromkeys([*steps[:alone], *passes, *rests, *steps[alone:], *shared])
    chunks = [Chunk(length) for length in CHUNKS if length <= cache.context]
    return deque([Choice(), *(graph for graph in graphs for _ in range(graph.runs)), *chunks])


def fused_by(sampling: Sampling) -> bool:
    """True if one kernel chooses the tokens of requests with this sampling."""
    return features_of([Constraints(sampling, 0, (), ())]).fused
