"""The product of up to 64 rows of x with a 4- or 8-bit weight by Hopper's warpgroup instructions:
csrc/wna16_gemm.cu."""

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from lowbit.quant.kernels import wna16_gemv
from lowbit.quant.kernels.extension import reason_against_90a
from lowbit.quant.kernels.packed import CHUNK_K, TILE_ROWS, padded
from lowbit.quant.kernels.problem import PackedCall, Problem
from lowbit.quant.kernels.wna16_args import launch_product, prepare

MOST_M = 64
FEW_M, SOME_M = 8, 16  # rows for which wna16_gemv is nearly always faster, or faster for a small W
SMALL_WEIGHT = 30 << 20  # bytes of codes
WARPGROUPS = (4, 3, 2)  # multiplying warpgroups per block
ROWS = 4 * TILE_ROWS  # of W per warpgroup
# Clusters of 1, 2, ... 8 blocks that fit on 132 multiprocessors at once, with one block each:
# cudaOccupancyMaxActiveClusters on an H100. Other cards differ with their working multiprocessors; a wrong guess only
# costs time.
CLUSTERS = (132, 66, 39, 30, 22, 17, 15, 15)
# Cost model: a chunk costs a block of w warpgroups w + STEP, and the reduction in a cluster costs SETTLE chunks of one
# warpgroup per block. Fitted to nine shapes on one H100.
STEP, SETTLE = 2.0, 8.0
# Microseconds for a weight of 8 bits per channel with dependent launch and up to 16 rows of x: per launch, per unit of
# cost, per megabyte. Fitted to 17 shapes on one H100, within 2% (rms).
CHANNEL_US = (2.6, 0.0257, 0.293)


@dataclass(frozen=True)
class GemmCut:
    """A launch configuration.

    warpgroups  multiplying warpgroups per block, with 64 rows of W each
    cluster     blocks that split k and sum through distributed shared memory
    """

    warpgroups: int
    cluster: int


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or should not, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    if problem.is_stream:
        return f"{problem.bits} bits: it takes 4 and 8"
    if problem.capability != (9, 0):
        return f"it is for sm_90, the GPU is sm_{problem.capability[0]}{problem.capability[1]}"
    if problem.m > MOST_M:
        return f"{problem.m} rows: it takes at most {MOST_M}"
    small = problem.n * problem.k * problem.bits // 8 < SMALL_WEIGHT
    if (problem.m <= FEW_M and not beats_gemv(problem)) or (FEW_M < problem.m <= SOME_M and small):
        size = f" of a weight below {SMALL_WEIGHT >> 20} MB" if problem.m > FEW_M else ""
        return f"{problem.m} rows{size}: wna16_gemv is faster"
    if problem.panels and wna16_gemv.prefers_panels(problem):
        return f"{problem.m} rows in panels: wna16_gemv is faster"
    return reason_against_90a()


def beats_gemv(problem: Problem) -> bool:
    """True if this kernel is faster even for few rows: at 8 bits per channel, where wna16_gemv's warps leave the GPU
    partly idle; not where 24 of them fit on a multiprocessor (fast memory)."""
    if problem.bits != 8 or problem.group_size != -1 or problem.norm or problem.fast_memory:
        return False
    return estimated_us(problem) < wna16_gemv.estimated_us(problem)


def estimated_us(problem: Problem) -> float:
    """Estimated microseconds for a weight of 8 bits per channel and 1 to 16 rows of x."""
    launch, unit, megabyte = CHANNEL_US
    return launch + unit * cost_of(choose_cut(problem), problem) + megabyte * problem.n * problem.k / 1e6


@lru_cache(4096)
def choose_cut(problem: Problem) -> GemmCut:
    """The launch for any shape: the one with the least cost on the fullest multiprocessor."""
    chunks = -(-problem.k // CHUNK_K)
    clusters = [c for c in range(1, len(CLUSTERS) + 1) if c == 1 or 2 * c <= chunks]
    cuts = [GemmCut(w, c) for w in WARPGROUPS for c in clusters]
    return min(cuts, key=lambda launch: cost_of(launch, problem))


def cost_of(launch: GemmCut, problem: Problem) -> float:
    """Cost in units of a chunk of one warpgroup: waves of blocks, chunks per block, and the final reduction."""
    groups = padded(problem.n, launch.warpgroups * ROWS) // (launch.warpgroups * ROWS)
    at_once = max(1, CLUSTERS[launch.cluster - 1] * problem.processors // CLUSTERS[0])
    chunks = padded(padded(problem.k, CHUNK_K) // CHUNK_K, launch.cluster) // launch.cluster
    return -(-groups // at_once) * chunks * (launch.warpgroups + STEP) + (launch.cluster - 1) * SETTLE


def run(call: PackedCall, problem: Problem, cut: GemmCut | None = None) -> Tensor:
    """y of `call`, which problem.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    call = prepare(call, most_staged=0)
    y = call.empty()
    launch_product("wna16_gemm", call, y, dependent=call.dependent, **vars(cut or choose_cut(problem)))
    return y
