"""The product of rows in int8 with a weight of 4 bits by Hopper's warpgroup instructions: csrc/w4a8_gemm.cu."""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from lowbit.quant.kernels import ring
from lowbit.quant.kernels.extension import launch, reason_against_90a
from lowbit.quant.kernels.packed import CHUNK_K, PackedWeight, groups_per_chunk
from lowbit.quant.kernels.problem import PackedCall, Problem, check_alignment, place_of
from lowbit.quant.kernels.ring import RingCut
from lowbit.quant.kernels.wna16_args import args_of
from lowbit.quant.kernels.wna16_gemm import CLUSTERS

WARPGROUPS = (1, 2)  # multiplying warpgroups per block
COLUMNS = (8, 16, 32, 64)  # rows of x per block, padded; more rows come in slabs of 64
# Rows of x for which it is chosen. With fewer wna16_gemv is faster, with more cuBLAS, both by x in half precision.
FEW_ROWS, MOST_ROWS = 9, 1024
PROCESSOR_BYTES, BLOCK_BYTES = 228 << 10, 1 << 10  # shared memory of a multiprocessor; of each block, by the driver
# Blocks of one and of two warpgroups whose registers fit on a multiprocessor, by columns.
RESIDENT = {8: (4, 2), 16: (4, 2), 32: (4, 2), 64: (3, 2)}
SPLITS, LEAST_CHUNKS = (2, 3, 4, 5, 6, 8), 6  # blocks of a cluster, chunks of each


@dataclass(frozen=True)
class Cost:
    """Microseconds of a launch, but for what all take.

    chunk    128 inputs of a block
    blocks   what a further block on the multiprocessor adds to a chunk, of one warpgroup and of two
    cluster  of the blocks that split k
    member   each of them but the first
    """

    chunk: float
    blocks: tuple[float, float]
    cluster: float
    member: float


# By columns, fitted to 11 shapes on an H200, up to 256 rows of x: the cut it picks takes 0.7% (64 columns) to 2% more
# than the best, at most 8%.
COSTS = {
    8: Cost(0.25, (0.056, 0.076), 2.5, 0.78),
    16: Cost(0.25, (0.056, 0.076), 2.5, 0.78),
    32: Cost(0.25, (0.01, 0.02), 3.4, 0.35),
    64: Cost(0.139, (0.017, 0.065), 1.55, 0.416),
}


def takes(weight: PackedWeight) -> bool:
    """True if rows in int8 are multiplied with `weight`: of int4, by Hopper's kernel, and in float32 on a CPU."""
    capability = place_of(weight.words.device)[1]
    device = capability is None or (capability == (9, 0) and reason_against_90a() is None)
    return device and weight.bits == 4 and not weight.is_float and weight.zeros is None and weight.group_size != 16


def prefers_codes(weight: PackedWeight, m: int) -> bool:
    """True if m rows, which are to be rounded to int8, are best multiplied as codes. torch.compile traces that way for
    all m: it does not know m."""
    return takes(weight) and (torch.compiler.is_compiling() or FEW_ROWS <= m <= MOST_ROWS)


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or should not, or None."""
    if problem.m > MOST_ROWS:
        return f"{problem.m} rows: half precision is faster above {MOST_ROWS}"
    return ring.reason_against_gpu(problem)


def reason_against_halves(problem: Problem) -> str | None:
    """The reason why x is not expanded to half precision, or None."""
    return "the tensors are on the cpu" if problem.capability is None else None


def columns_of(m: int) -> int:
    """Rows of x per block, padded."""
    return next(c for c in COLUMNS if c >= min(m, COLUMNS[-1]))


def stage_bytes(warpgroups: int, problem: Problem) -> int:
    """Shared memory of a chunk: codes, rows of x, scales, barriers."""
    codes, scales = ring.ROWS * CHUNK_K // 2, ring.ROWS * 2 * groups_per_chunk(problem.group_size)
    return warpgroups * (codes + scales) + columns_of(problem.m) * CHUNK_K + 16


def shared_bytes(cut: RingCut, problem: Problem) -> int:
    """A block's shared memory: stages, at least as many as its sums need, scales of x, room to align."""
    columns = columns_of(problem.m)
    ring_bytes = cut.warpgroups * ring.ROWS * CHUNK_K // 2 + columns * CHUNK_K
    least = max(2, -(-(cut.warpgroups * ring.ROWS + 4) * columns * 4 // ring_bytes))
    return max(cut.stages, least) * stage_bytes(cut.warpgroups, problem) + 4 * columns + 256 + 1024


def stages_of(warpgroups: int, blocks: int, problem: Problem) -> int:
    """Stages of a ring if so many blocks are on a multiprocessor."""
    room = PROCESSOR_BYTES // blocks - BLOCK_BYTES - 4 * columns_of(problem.m) - 256 - 1024
    return max(2, room // stage_bytes(warpgroups, problem))


@lru_cache(4096)
def choose_cut(problem: Problem) -> RingCut:
    """The launch for any shape: the one with the least cost."""
    chunks = -(-problem.k // CHUNK_K)
    splits = (1, *(c for c in SPLITS if LEAST_CHUNKS * c <= chunks))
    warpgroups, cluster = min(product(WARPGROUPS, splits), key=lambda cut: cost_of(cut[0], cut[1], problem))
    stages = stages_of(warpgroups, blocks_beside(warpgroups, cluster, problem), problem)
    return RingCut(warpgroups, cluster, min(stages, -(-chunks // cluster)))


def waves_of(warpgroups: int, cluster: int, problem: Problem) -> float:
    """Clusters of a launch, in units of what fits with one block on each multiprocessor."""
    clusters = -(-problem.n // (ring.ROWS * warpgroups)) * -(-problem.m // COLUMNS[-1])
    return clusters / max(CLUSTERS[cluster - 1] * problem.processors // CLUSTERS[0], 1)


def blocks_beside(warpgroups: int, cluster: int, problem: Problem) -> int:
    """Blocks on a multiprocessor: as many as one wave needs, at most those whose registers fit."""
    most = RESIDENT[columns_of(problem.m)][warpgroups - 1]
    return min(most, math.ceil(waves_of(warpgroups, cluster, problem)))


def cost_of(warpgroups: int, cluster: int, problem: Problem) -> float:
    """The cost of a launch; infinite for clusters in several waves. A last wave that is not full takes less than a
    whole one, and more than its share."""
    cost, needed = COSTS[columns_of(problem.m)], waves_of(warpgroups, cluster, problem)
    most = RESIDENT[columns_of(problem.m)][warpgroups - 1]
    if cluster > 1 and needed > most:
        return math.inf
    waves, beside = max(needed / most, 1.0), min(max(needed, 1.0), most)
    chunks = (waves + math.ceil(waves)) / 2 * math.ceil(problem.k / CHUNK_K / cluster)
    joined = cost.cluster + cost.member * (cluster - 1) if cluster > 1 else 0.0
    return chunks * (cost.chunk + beside * cost.blocks[warpgroups - 1]) + joined


def run(call: PackedCall, problem: Problem, cut: RingCut | None = None) -> Tensor:
    """y of `call`, which problem.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    y, weight = call.empty(), call.weight
    check_alignment(x=call.x, words=weight.words, scales=weight.scales)
    launch(
        "w4a8_gemm",
        call.dtype,
        device=y.device,
        args={"product": args_of(call, y), "x_scales": call.x_scales},
        groups_per_chunk=weight.scale_groups,
        dependent=call.dependent,
        **vars(cut or choose_cut(problem)),
    )
    return y
