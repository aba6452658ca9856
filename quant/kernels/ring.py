"""Launches of the kernels that stream W through a ring of boxes: csrc/ring.cuh, for int8 and for dense weights."""

from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from lowbit.quant.kernels.extension import reason_against_90a
from lowbit.quant.kernels.problem import Problem, Rotary

CHUNK_BYTES = 128  # of a row per stage
ROWS = 64  # of W per warpgroup
CLUSTERS = (1, 2, 4, 8)
COLUMNS = (8, 16, 32, 64, 128)  # rows of x per pass over W, padded
MOST_BLOCKS = 4  # per multiprocessor
SOME_ROWS = 16  # rows of x: with more, x takes so much of a ring that the ring is better not halved
# With fast memory, rings are a third of it, and k is split until a multiprocessor has three blocks: the next kernel's
# blocks begin beside them. Llama-2-7B on an H200, 1 x 128: bfloat16 3.573 ms per step, otherwise 3.684; W8A8 2.176 and
# 2.226. Rows of more than 80 chunks are faster with whole rings (3.662 and 3.575), unless their blocks leave more than
# a quarter of the multiprocessors idle: Llama-2-13B in float16 7.046 ms per step, otherwise 8.080; 8 x 128 7.667 and
# 7.870.
THIRDS, SHORT_CHUNKS, BUSY = 3, 80, 0.75
# Rows of so few chunks are not split where each multiprocessor has a block, and rings are a half where none has three:
# W8A8 2.134 ms, otherwise 2.170.
FEW_CHUNKS = 32
RING_BYTES = 222 << 10  # shared memory of a multiprocessor for the rings of all its blocks


@dataclass(frozen=True)
class RingCut:
    """A launch configuration.

    warpgroups  multiplying warpgroups per block, with 64 rows of W each
    cluster     blocks that split k and sum through distributed shared memory
    stages      chunks of 128 bytes per row in flight per block
    """

    warpgroups: int
    cluster: int
    stages: int


def reason_against_gpu(problem: Problem) -> str | None:
    """The reason why such kernels cannot run on the problem's device, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    if problem.capability != (9, 0):
        return f"it is for sm_90, the GPU is sm_{problem.capability[0]}{problem.capability[1]}"
    return reason_against_90a()


def heads_of(rotary: Rotary | None, n: int) -> dict[str, Any]:
    """The fields of a kernel's struct for outputs that are heads, of a weight with n rows."""
    kv_heads = 0 if rotary is None else rotary.kv_heads
    return {
        **{field.name: getattr(rotary, field.name, None) for field in fields(Rotary)},
        "q_heads": 0 if rotary is None else n // rotary.head_dim - 2 * kv_heads,
        "kv_heads": kv_heads,
        "pair_block": n if rotary is None else rotary.head_dim,
    }


def choose_cut(m: int, n: int, row_bytes: int, processors: int, room: int, fast_memory: bool = False) -> RingCut:
    """The launch for any shape: rings that fill the multiprocessors, with room left for the next kernel's blocks.

    Blocks have one warpgroup. They have two, which halves the reads of x, if blocks fill every multiprocessor several
    times or x has many rows. With few blocks, k is split over clusters until there are `room` blocks.
    """
    processors = max(processors, 1)
    many = m > COLUMNS[-1] // 2 or n > (MOST_BLOCKS - 1) * ROWS * processors
    warpgroups = 2 if many else 1
    groups = -(-n // (ROWS * warpgroups))
    chunks = -(-row_bytes // CHUNK_BYTES)
    cluster, most = (splits_of(groups, chunks, blocks) for blocks in (room, THIRDS * processors))
    blocks = groups * cluster
    halves = chunks <= FEW_CHUNKS and processors <= groups <= 2 * processors
    idle = blocks < BUSY * processors and most > cluster
    if fast_memory and m <= SOME_ROWS and not many and not halves and (chunks <= SHORT_CHUNKS or idle):
        return RingCut(1, most, min(stages_of(m, 1, THIRDS), -(-chunks // most)))
    # the next kernel's blocks, on the same multiprocessors
    beside = m <= SOME_ROWS and cluster == 1 and 2 * blocks > processors
    shared = -(-blocks // processors) if blocks > processors else 1 + beside
    stages = stages_of(m, warpgroups, min(shared, MOST_BLOCKS // warpgroups))
    return RingCut(warpgroups, cluster, min(stages, -(-chunks // cluster)))


def splits_of(groups: int, chunks: int, blocks: int) -> int:
    """The most blocks that share k, if there are at most so many in all, with four chunks each."""
    return max(c for c in CLUSTERS if c == 1 or (groups * c <= blocks and 4 * c <= chunks))


def stages_of(m: int, warpgroups: int, shared: int) -> int:
    """Stages of a ring if `shared` blocks are on a multiprocessor."""
    columns = next(c for c in COLUMNS if c >= min(m, COLUMNS[-1]))
    return RING_BYTES // shared // ((ROWS * warpgroups + columns) * CHUNK_BYTES)


def cuts_of(m: int, n: int, row_bytes: int, processors: int) -> list[RingCut]:
    """Launches worth timing against choose_cut's: every number of blocks per multiprocessor, every cluster size."""
    chunks = -(-row_bytes // CHUNK_BYTES)
    cuts: dict[RingCut, None] = {}
    for warpgroups, cluster, shared in product((1, 2), CLUSTERS, range(1, MOST_BLOCKS + 1)):
        blocks = -(-n // (ROWS * warpgroups)) * cluster
        if shared * warpgroups <= MOST_BLOCKS and (
            cluster == 1 or (4 * cluster <= chunks and blocks <= 4 * processors)
        ):
            stages = min(stages_of(m, warpgroups, shared), -(-chunks // cluster))
            cuts[RingCut(warpgroups, cluster, stages)] = None
    return list(cuts)
