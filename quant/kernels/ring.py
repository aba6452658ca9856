"""How the products are cut that read W through rings of boxes: csrc/ring.cuh, for int8 and for dense weights."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from lowbit.quant.kernels.extension import EXTENSION, reason_against_90a
from lowbit.quant.kernels.problem import Problem

CHUNK_BYTES = 128  # of a row
ROWS = 64  # of W, that a warpgroup has
CLUSTERS = (1, 2, 4, 8)
COLUMNS = (8, 16, 32, 64, 128)  # rows of x that read W once, padded
MOST_BLOCKS = 4  # on a multiprocessor
SOME_ROWS = 16  # of x: with more, x takes so much of a ring that it is better not halved
RING_BYTES = 222 << 10  # of a multiprocessor's shared memory, for all its blocks' rings


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    warpgroups  of a block that multiply: each has 64 rows of W
    cluster     blocks that share k and sum through each other's shared memory
    stages      chunks of 128 bytes a row that a block has asked for at most
    """

    warpgroups: int
    cluster: int
    stages: int


def reason_against_gpu(problem: Problem) -> str | None:
    """The reason why no such kernel runs where the problem is, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    if problem.capability != (9, 0):
        return f"it is for sm_90, the GPU is sm_{problem.capability[0]}{problem.capability[1]}"
    return reason_against_90a()


def choose_launch(m: int, n: int, row_bytes: int, processors: int, room: int) -> Launch:
    """One rule for all shapes: rings that fill the multiprocessors, and room beside them for the next kernel's blocks.

    Blocks of one warpgroup, but two, which halve the reads of x, where they fill every multiprocessor several times or
    x has many rows. Few blocks share k until there are `room` of them.
    """
    processors = max(processors, 1)
    many = m > COLUMNS[-1] // 2 or n > (MOST_BLOCKS - 1) * ROWS * processors
    warpgroups = 2 if many else 1
    groups = -(-n // (ROWS * warpgroups))
    chunks = -(-row_bytes // CHUNK_BYTES)
    cluster = max(c for c in CLUSTERS if c == 1 or (groups * c <= room and 4 * c <= chunks))
    blocks = groups * cluster
    # the next kernel's blocks, on the same multiprocessors
    beside = m <= SOME_ROWS and cluster == 1 and 2 * blocks > processors
    shared = -(-blocks // processors) if blocks > processors else 1 + beside
    stages = stages_of(m, warpgroups, min(shared, MOST_BLOCKS // warpgroups))
    return Launch(warpgroups, cluster, min(stages, -(-chunks // cluster)))


def stages_of(m: int, warpgroups: int, shared: int) -> int:
    """Stages of a ring where `shared` blocks are on a multiprocessor."""
    columns = next(c for c in COLUMNS if c >= min(m, COLUMNS[-1]))
    return RING_BYTES // shared // ((ROWS * warpgroups + columns) * CHUNK_BYTES)


def cuts_of(m: int, n: int, row_bytes: int, processors: int) -> list[Launch]:
    """Cuts that are worth timing against choose_launch's: every number of blocks on a multiprocessor, every cluster."""
    chunks = -(-row_bytes // CHUNK_BYTES)
    cuts: dict[Launch, None] = {}
    for warpgroups, cluster, shared in product((1, 2), CLUSTERS, range(1, MOST_BLOCKS + 1)):
        blocks = -(-n // (ROWS * warpgroups)) * cluster
        if shared * warpgroups <= MOST_BLOCKS and (
            cluster == 1 or (4 * cluster <= chunks and blocks <= 4 * processors)
        ):
            stages = min(stages_of(m, warpgroups, shared), -(-chunks // cluster))
            cuts[Launch(warpgroups, cluster, stages)] = None
    return list(cuts)


def launch_of(launch: Launch, device: int, dependent: bool) -> Any:
    """csrc/ring_launch.cuh's struct."""
    assert EXTENSION is not None
    cut = EXTENSION.RingLaunch()
    for name, value in vars(launch).items():
        setattr(cut, name, value)
    cut.device, cut.dependent = device, dependent
    return cut
