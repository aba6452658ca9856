"""The product of rows of x with a 4- or 8-bit weight on Hopper's warpgroup instructions: csrc/wna16_gemm.cu.

Up to 64 rows a block has all of them. More are cut into slabs of 128, which read W after one another, mostly from L2:
for as many rows as that beats writing the weight out dense.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import wna16_dequantize, wna16_gemv
from lowbit.quant.kernels.extension import EXTENSION, reason_against_90a
from lowbit.quant.kernels.packed import CHUNK_K, TILE_ROWS, groups_per_chunk, padded
from lowbit.quant.kernels.problem import Call, Problem
from lowbit.quant.kernels.wna16_args import args_of, prepare

ONE_SLAB_M, SLAB = 64, 128  # rows that one block has; of a slab, where there are more
FEW_M, SOME_M = 8, 16  # rows that wna16_gemv takes nearly always, and where W is small
SMALL_WEIGHT = 30 << 20  # bytes of codes
WARPGROUPS = (4, 3, 2)  # that multiply, in a block
SLAB_WARPGROUPS = (3, 2)  # where there are slabs: a fourth would leave the sums too few registers
ROWS = 4 * TILE_ROWS  # of W, that one of them has
# Clusters of 1, 2, ... 8 blocks that 132 multiprocessors hold at once, a block each: cudaOccupancyMaxActiveClusters
# on an H100. Another card's differ with its working multiprocessors; a wrong guess costs time alone.
CLUSTERS = (132, 66, 39, 30, 22, 17, 15, 15)
# What a chunk costs a block of w warpgroups is proportional to w + STEP, and meeting in a cluster to that of SETTLE
# chunks of one warpgroup for each block: fitted to nine shapes of one H100.
STEP, SETTLE = 2.0, 8.0
# Microseconds of a weight of 8 bits per channel with dependent launch, up to 16 rows of x: a launch, a unit of cost, a
# megabyte. Fitted to 17 shapes on one H100, within 2% (rms).
CHANNEL_US = (2.6, 0.0257, 0.293)
# With slabs, where every wave of blocks meets: STEP, SETTLE, then microseconds of a launch, and of a unit of cost by
# the weight's bits. Fitted to one H100: of 96 problems, 0.2% behind the best cut on average, 7% at most.
SLAB_STEP, SLAB_SETTLE = 1.0, 3.0
SLAB_LAUNCH_US, SLAB_UNIT_US = 3.0, {4: 0.35, 8: 0.41}


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    warpgroups  of a block that multiply: each has 64 rows of W
    cluster     blocks that share k and sum through each other's shared memory
    """

    warpgroups: int
    cluster: int


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot take the problem, or should not, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    if problem.capability != (9, 0):
        return f"it is for sm_90, the GPU is sm_{problem.capability[0]}{problem.capability[1]}"
    small = problem.n * problem.k * problem.bits // 8 < SMALL_WEIGHT
    if (problem.m <= FEW_M and not beats_gemv(problem)) or (FEW_M < problem.m <= SOME_M and small):
        size = f" of a weight below {SMALL_WEIGHT >> 20} MB" if problem.m > FEW_M else ""
        return f"{problem.m} rows{size}: wna16_gemv is faster"
    if problem.m > ONE_SLAB_M and slabs_us(problem) > wna16_dequantize.estimated_us(problem):
        return f"{problem.m} rows: wna16_dequantize is faster"
    return reason_against_90a()


def beats_gemv(problem: Problem) -> bool:
    """True if few rows too are faster here: of 8 bits per channel, where wna16_gemv's warps leave GPU time unused."""
    if problem.bits != 8 or problem.group_size != -1 or problem.norm:
        return False
    return estimated_us(problem) < wna16_gemv.estimated_us(problem)


def estimated_us(problem: Problem) -> float:
    """Microseconds that a weight of 8 bits per channel takes, for 1 to 16 rows of x."""
    launch, unit, megabyte = CHANNEL_US
    return launch + unit * cost_of(choose_launch(problem), problem) + megabyte * problem.n * problem.k / 1e6


def slabs_us(problem: Problem) -> float:
    """Microseconds that more than 64 rows of x take."""
    return SLAB_LAUNCH_US + SLAB_UNIT_US[problem.bits] * cost_of(choose_launch(problem), problem)


def warpgroups_for(m: int) -> tuple[int, ...]:
    """The numbers of multiplying warpgroups that there is code for."""
    return WARPGROUPS if m <= ONE_SLAB_M else SLAB_WARPGROUPS


@lru_cache(4096)
def choose_launch(problem: Problem) -> Launch:
    """One rule for all shapes: the cut that the fullest multiprocessor finishes first."""
    chunks = -(-problem.k // CHUNK_K)
    clusters = [c for c in range(1, len(CLUSTERS) + 1) if c == 1 or 2 * c <= chunks]
    cuts = [Launch(w, c) for w in warpgroups_for(problem.m) for c in clusters]
    return min(cuts, key=lambda launch: cost_of(launch, problem))


def cost_of(launch: Launch, problem: Problem) -> float:
    """Time in units of a chunk of one warpgroup: waves of blocks, chunks of a block, and the meeting at its end."""
    groups = padded(problem.n, launch.warpgroups * ROWS) // (launch.warpgroups * ROWS)
    at_once = max(1, CLUSTERS[launch.cluster - 1] * problem.processors // CLUSTERS[0])
    chunks = padded(padded(problem.k, CHUNK_K) // CHUNK_K, launch.cluster) // launch.cluster
    if problem.m <= ONE_SLAB_M:
        return -(-groups // at_once) * chunks * (launch.warpgroups + STEP) + (launch.cluster - 1) * SETTLE
    waves = -(-groups * -(-problem.m // SLAB) // at_once)
    return waves * (chunks * (launch.warpgroups + SLAB_STEP) + launch.cluster * SLAB_SETTLE)


def run(call: Call, problem: Problem, launch: Launch | None = None) -> Tensor:
    """y of `call`, which problem.check has passed. ValueError where a tensor is not aligned to 16 bytes."""
    assert EXTENSION is not None
    call = prepare(call, most_staged=0)
    y = torch.empty(call.y_shape, dtype=call.y_dtype, device=call.x.device)
    args = args_of(call, y)
    with torch.cuda.device(y.device):
        stream = torch.cuda.current_stream().cuda_stream
        cut = launch_of(launch or choose_launch(problem), call, y.device.index)
        EXTENSION.wna16_gemm(call.x.dtype == torch.bfloat16, call.weight.bits, args, cut, stream)
    return y


def launch_of(launch: Launch, call: Call, device: int) -> Any:
    """The kernel's launch: the cut, the device, and what the call says of groups and dependence."""
    assert EXTENSION is not None
    cut = EXTENSION.Wna16GemmLaunch()
    cut.warpgroups, cut.cluster = launch.warpgroups, launch.cluster
    cut.device, cut.groups_per_chunk, cut.dependent = device, groups_per_chunk(call.weight.group_size), call.dependent
    return cut
