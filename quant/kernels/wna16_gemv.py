"""The product of few rows (m <= 64) with a 4- or 8-bit weight, prologue and epilogue fused: csrc/wna16_gemv.cu."""

from dataclasses import dataclass, replace
from functools import lru_cache

from torch import Tensor

from lowbit.quant.kernels.extension import reason_against_device
from lowbit.quant.kernels.packed import CHUNK_K, TILE_ROWS
from lowbit.quant.kernels.problem import PackedCall, Problem, has_fast_memory
from lowbit.quant.kernels.wna16_args import launch_product, prepare

MAX_M, FEW_ROWS = 64, 8
MAX_WARPS = 8  # per block
LONG_K = 64  # chunks
# Fitted to 29 launches of 9 shapes on one H100 at m = 1: 2.4 us + rounds x tiles x 35 ns x (4.2 + warps), within 3%
# (rms).
START = 4.2
ROOM = 16  # warps per multiprocessor, with up to 16 rows of x
# A launch that leaves more of the GPU's room free than this, and whose warps do not split k, is faster without overlap
# on a GPU with fast memory: the next kernel's blocks would fill the room, and their prefetch delays this kernel. On an
# H200, gate and up of Llama-2-7B leave 35%: 1.559 ms per step, 1.619 with overlap. Those of 13B and of Llama-3-8B,
# which leave 18 and 15%, would lose 2%.
MOST_FREE = 0.3
# Microseconds for a weight of 8 bits per channel with dependent launch, m = 1: per launch, per unit of cost, per
# megabyte. Fitted to 25 shapes on one H100, within 4% (rms).
CHANNEL_US = (1.7, 0.0301, 0.193)


@dataclass(frozen=True)
class GemvCut:
    """A launch configuration.

    row_tiles  tiles of 16 rows that a warp multiplies per read of x
    row_warps  warps of a block along n, a power of two
    k_warps    warps of a block that split k
    cluster    blocks that split k and sum through distributed shared memory
    """

    row_tiles: int
    row_warps: int
    k_warps: int
    cluster: int


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    if problem.m > MAX_M:
        return f"{problem.m} rows: it takes at most {MAX_M}"
    return reason_against_device(problem.capability)


@lru_cache(4096)
def choose_cut(problem: Problem) -> GemvCut:
    """The launch for any shape: among those with one wave of blocks, the one whose warps finish first."""
    return min(cuts_of(problem), key=lambda launch: cost_of(launch, problem))


def cuts_of(problem: Problem) -> list[GemvCut]:
    """Launches with a single wave of blocks.

    With 128 registers per thread 16 warps fit on a multiprocessor, with 255 (more than 16 rows of x) 8. Two blocks
    split k if k is long and there would be fewer blocks than multiprocessors.
    """
    tiles, chunks = -(-problem.n // TILE_ROWS), -(-problem.k // CHUNK_K)
    processors = max(problem.processors, 1)
    room = ROOM if problem.m <= 16 else ROOM // 2
    clusters_exist = problem.capability is not None and problem.capability >= (9, 0)
    cuts = []
    for row_tiles in row_tiles_of(problem, tiles, chunks):
        groups = -(-tiles // row_tiles)
        cluster = 2 if clusters_exist and problem.m > 8 and chunks >= LONG_K and groups <= processors else 1
        blocks = -(-groups * cluster // processors)  # on the fullest multiprocessor
        most = max(1, min(MAX_WARPS, room // blocks, chunks // cluster))
        cuts += [GemvCut(row_tiles, {1: 4, 2: 2}.get(warps, 1), warps, cluster) for warps in range(1, most + 1)]
    return cuts


def row_tiles_of(problem: Problem, tiles: int, chunks: int) -> tuple[int, ...]:
    """Possible tiles per warp. Two halve the reads of x, but overfill the ring with 8 bits or groups of 32."""
    if problem.m <= 8:
        return (1,) if problem.bits == 8 or problem.group_size == 32 else (1, 2)
    one_wave = tiles * MAX_WARPS <= 16 * problem.processors
    return (1,) if problem.m <= 16 and one_wave and chunks < LONG_K else (2,)


def cost_of(launch: GemvCut, problem: Problem) -> float:
    """The rounds of a warp times the cost of a tile: START, plus 1 for each warp on the multiprocessor."""
    groups = -(-problem.n // (TILE_ROWS * launch.row_tiles))
    rounds = -(-problem.k // (CHUNK_K * launch.k_warps * launch.cluster))
    warps = groups * launch.k_warps * launch.cluster / max(problem.processors, 1)
    return rounds * launch.row_tiles * (START + warps)


def estimated_us(problem: Problem) -> float:
    """Estimated microseconds for a weight of 8 bits per channel and 1 to 8 rows of x."""
    launch, unit, megabyte = CHANNEL_US
    return launch + unit * cost_of(choose_cut(problem), problem) + megabyte * problem.n * problem.k / 1e6


def leaves_room(launch: GemvCut, problem: Problem) -> bool:
    """True if a launch without overlap may be faster: 4 bits, few rows, a wide weight with too few blocks."""
    groups = -(-problem.n // (TILE_ROWS * launch.row_tiles * launch.row_warps))
    warps = groups * launch.row_warps * launch.cluster
    free = 1 - warps / (ROOM * max(problem.processors, 1))
    return problem.bits == 4 and problem.m <= FEW_ROWS and launch.k_warps == 1 and free > MOST_FREE


def widened(launch: GemvCut, problem: Problem) -> GemvCut:
    """`launch` with blocks twice as wide, for 5 to 8 rows, fast memory and two warps along k. The sums are the same.

    More warps then find x in L1. QKV of Llama-2-7B at batch 8 on an H200: 1.871 ms per step, 1.909 otherwise.
    """
    wide = problem.bits == 4 and FEW_ROWS // 2 < problem.m <= FEW_ROWS and launch.k_warps == 2
    return replace(launch, row_warps=2 * launch.row_warps) if wide else launch


def most_staged_bytes(capability: tuple[int, int] | None) -> int:
    """Shared memory for a norm (x, or its sums of squares): the rest of a block's, after 73 KB of partial sums."""
    if capability is None or capability < (9, 0):
        return (64 if capability == (8, 0) else 24) << 10
    return 96 << 10


def run(call: PackedCall, problem: Problem, cut: GemvCut | None = None) -> Tensor:
    """y of `call`, which problem.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    fast = has_fast_memory(call.x.device)
    if cut is None:
        cut = widened(choose_cut(problem), problem) if fast else choose_cut(problem)
    call = prepare(call, most_staged_bytes(problem.capability) * cut.cluster)
    y = call.empty()
    dependent = call.dependent and not (fast and leaves_room(cut, problem))
    launch_product("wna16_gemv", call, y, dependent=dependent, **vars(cut))
    return y
