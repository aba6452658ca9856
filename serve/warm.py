"""Graphs that are captured in turns without work, before a request needs them: no stream goes on during a capture."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.engine.passes import SHARED_COUNTS, SHARED_LENGTHS, Reader
from lowbit.engine.sampling import Sampling
from lowbit.quant.kernels.decode_attention import SHORT

REST_ROWS = 16  # of a step that reads the rest of a prompt


@dataclass(frozen=True)
class Graph:
    """A decode step of `rows` rows within `length` positions; without `sampling` it reads the rest of a prompt. Or, if
    `rows` is 0, a pass over `prompts` prompts of `length` tokens."""

    length: int
    rows: int = 0
    sampling: Sampling | None = None
    prompts: int = 1


def expected(reader: Reader, usual: Sequence[Sampling]) -> deque[Graph]:
    """The graphs that requests with the `usual` samplings need, the most likely ones first; none on a CPU."""
    cache = reader.cache
    if not reader.lengths or not usual:
        return deque()
    powers = sorted({1 << (rows - 1).bit_length() for rows in range(1, cache.batch + 1)})
    reaches = sorted({min(SHORT, cache.context), cache.context})
    steps = [Graph(reach, rows, sampling) for rows in powers for reach in reaches for sampling in usual]
    rests = [Graph(reach, REST_ROWS) for reach in reaches]
    alone = len(reaches) * len(usual)
    passes = [Graph(length) for length in reader.lengths if length <= cache.context]
    lengths = [length for length in SHARED_LENGTHS if length <= reader.longest_shared]
    counts = [count for count in SHARED_COUNTS if count <= cache.batch]
    shared = [Graph(length, prompts=count) for length in lengths for count in counts]
    return deque([*steps[:alone], *passes, *rests, *steps[alone:], *shared])
