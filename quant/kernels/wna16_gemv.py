"""The product of few rows (m <= 64) with a 4- or 8-bit weight, prologue and epilogue fused: csrc/wna16_gemv.cu."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from lowbit.quant.kernels import panels
from lowbit.quant.kernels.extension import reason_against_device
from lowbit.quant.kernels.packed import CHUNK_K, TILE_ROWS
from lowbit.quant.kernels.problem import PackedCall, Problem
from lowbit.quant.kernels.wna16_args import launch_product, prepare

MAX_M, SOME_ROWS, FEW_ROWS = 64, 16, 8
STREAM_M = 16  # on Hopper, whose code for more rows is wna16_gemm's, of 4 and 8 bits
MAX_WARPS = 8  # per block
LONG_K = 64  # chunks
# Fitted to 29 launches of 9 shapes on one H100 at m = 1: 2.4 us + rounds x tiles x 35 ns x (4.2 + warps), within 3%
# (rms).
START = 4.2
ROOM = 16  # warps per multiprocessor, with up to 16 rows of x
# A warp's loop is bound by latency: of x, of the tensor instructions, and of its own weights. So with fast memory more
# warps are faster, although each has less in flight. A step of Llama-2-7B on an H200, 1 x 128: 1.334 ms, 1.454 with 16
# warps per multiprocessor; 8 x 128: 1.62 and 1.79.
# Where no two warps can share k among 24, 28 with 72 registers each come next: Llama-2-13B 2.284 ms (2.379 with 16),
# Llama-3-8B 1.453 (1.530). 32 with 64 registers took 2.333 and 1.488. 16 x 128: 2.485 and 2.510 with 16 warps.
# Where 28 save a round of a warp along k, they do so at up to 8 rows, which add up as one does: 1 x 128 0.4 to 0.9% of
# a step faster, 8 x 128 0.1 to 0.3% slower.
CROWD = 24  # warps per multiprocessor
CROWDS = (CROWD, 28)  # a block has at most half of them
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
    room       warps that a multiprocessor holds: ROOM, or one of CROWDS for one tile per warp and up to 8 rows of x; of
               4-bit integers CROWD for up to 16, too; with two tiles for one row only: see paired_cut. x may be in
               panels with CROWDS, and with PANEL_WAVES
    """

    row_tiles: int
    row_warps: int
    k_warps: int
    cluster: int
    room: int = ROOM


# Waves of blocks: 28672 x 8192 in fp8 takes 58.0 us on an H200, 62.7 with choose_cut's; 8 rows in nvfp4 40.1 and 41.8;
# in int4 34.7 and 33.1.
WAVES = GemvCut(1, 2, 3, 1, CROWD)
# 9 to 16 rows in panels where no two of CROWD can share k in one wave: a warp reads x once for two tiles. On an H200 it
# takes 21.2 us at 28672 x 4096, wna16_gemm 24.0, 28 warps of one tile 23.6; at 57344 x 8192 73.5, 86.0 and 84.8.
PANEL_WAVES = GemvCut(2, 2, 2, 1)
# One row of x with two tiles per warp, where no four warps can share k in one wave.
PAIRED_WAVES = GemvCut(2, 1, 6, 1, CROWD)


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    most = STREAM_M if problem.is_stream and problem.capability == (9, 0) else MAX_M
    if problem.m > most:
        return f"{problem.m} rows: it takes at most {most}"
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
    if problem.m <= 16 and (problem.is_stream or problem.is_float):
        return (1,)
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


@lru_cache(4096)
def crowded_cut(problem: Problem, most: int = CROWDS[-1]) -> GemvCut | None:
    """The launch for fast memory and few rows: as many warps along k as fit in one wave, in blocks of about 8 warps. Of
    rooms of up to `most` warps the one where a warp has the fewest chunks of k, the smallest if several have.

    If not even two fit, more than 8 rows in panels have PANEL_WAVES, integers of up to 4 bits none, and others WAVES.
    None, too, if k has a single chunk. One row of x with few bits or floats of 4 has paired_cut, if it can.
    """
    if paired := paired_cut(problem):
        return paired
    chunks, rooms = -(-problem.k // CHUNK_K), [room for room in rooms_of(problem) if room <= most]
    cuts = [cut for room in rooms for cut in cuts_of_room(problem, room)[:1]]
    if cuts:
        return min(cuts, key=lambda cut: -(-chunks // cut.k_warps))
    if rooms and problem.panels and problem.m > FEW_ROWS:
        return PANEL_WAVES if chunks >= PANEL_WAVES.k_warps else None
    return WAVES if rooms and chunks >= WAVES.k_warps and (problem.is_float or problem.bits > 4) else None


def paired_cut(problem: Problem) -> GemvCut | None:
    """The launch with two tiles per warp, for one row of x and integers of 2 or 3 bits or floats of 4. None where it
    would leave more than a third of a multiprocessor's warps out, and for 3 bits in float16, whose sums it rounds too
    coarsely: see docs/kernels/wna16_gemv.md."""
    is_fp4 = problem.is_float and problem.bits == 4
    is_few = problem.bits == 2 or (problem.bits == 3 and problem.dtype == torch.bfloat16)
    if problem.m > 1 or problem.panels or not (is_fp4 or is_few):
        return None
    groups, chunks = -(-problem.n // (2 * TILE_ROWS)), -(-problem.k // CHUNK_K)
    cuts = [cut for room in (CROWDS if is_fp4 else (CROWD,)) for cut in cuts_of_room(problem, room, 2)]
    cuts = [cut for cut in cuts if cut.k_warps >= 4]
    cut = min(cuts, key=lambda cut: -(-chunks // cut.k_warps), default=PAIRED_WAVES)
    if problem.k < CHUNK_K * cut.k_warps or 3 * groups * cut.k_warps < 2 * cut.room * problem.processors:
        return None
    return cut


def cuts_of_room(problem: Problem, room: int, row_tiles: int = 1) -> list[GemvCut]:
    """Launches of one wave with so many warps on a multiprocessor, and two or more of a block along k; the most first,
    those of smaller blocks last."""
    tiles, chunks = -(-problem.n // (TILE_ROWS * row_tiles)), -(-problem.k // CHUNK_K)
    cuts, smaller = [], is_four(problem) or (problem.bits == 4 and row_tiles == 2)
    for part, k_warps in product((1, 2) if smaller else (1,), range(min(room // 2, chunks), 1, -1)):
        row_warps = max(1, MAX_WARPS // k_warps // part)
        resident = room // (row_warps * k_warps)  # blocks of a multiprocessor
        if -(-tiles // row_warps) <= resident * problem.processors:
            cuts.append(GemvCut(row_tiles, row_warps, k_warps, 1, room))
    return cuts


def is_four(problem: Problem) -> bool:
    """True for integers of 4 bits."""
    return problem.bits == 4 and not problem.is_float


def rooms_of(problem: Problem) -> tuple[int, ...]:
    """The numbers of warps above ROOM that there is code for. More rows, more than CROWD, and blocks of half as many
    warps are measured for integers of 4 bits alone; more rows where they spill no registers."""
    if problem.m <= FEW_ROWS:
        return CROWDS if is_four(problem) else (CROWD,)
    return (CROWD,) if is_four(problem) and problem.m <= SOME_ROWS and problem.group_size not in (32, 64) else ()


def prefers_panels(problem: Problem) -> bool:
    """True if the product is fastest with its inputs in panels: of several rows, with fast memory. Always possible on a
    CPU."""
    if not 1 < problem.m <= panels.HEIGHTS[-1] or problem.k % CHUNK_K:
        return False
    if problem.capability is None:
        return True
    return problem.fast_memory and crowded_cut(replace(problem, panels=True)) is not None


def most_staged_bytes(capability: tuple[int, int] | None) -> int:
    """Shared memory for a norm (x, or its sums of squares): the rest of a block's, after 73 KB of partial sums."""
    if capability is None or capability < (9, 0):
        return (64 if capability == (8, 0) else 24) << 10
    return 96 << 10


def takes_panels(cut: GemvCut, problem: Problem) -> bool:
    """True if there is code for `cut` with x in panels."""
    return cut.room > ROOM or (cut == PANEL_WAVES and problem.m > FEW_ROWS and bool(rooms_of(problem)))


def run(call: PackedCall, problem: Problem, cut: GemvCut | None = None) -> Tensor:
    """y of `call`, which problem.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    if cut is None:
        cut = (crowded_cut(problem) if problem.fast_memory else None) or choose_cut(problem)
    if not takes_panels(cut, problem):
        call = replace(call, x=panels.rows_of(call.x))
    call = prepare(call, most_staged_bytes(problem.capability) * cut.cluster)
    y = call.empty()
    launch_product("wna16_gemv", call, y, dependent=call.dependent, **vars(cut))
    return y
