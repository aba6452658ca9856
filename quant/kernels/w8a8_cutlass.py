"""The product of many int8 rows with an int8 weight by CUTLASS on Hopper: csrc/w8a8_cutlass.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.kernels import w8a8_gemm
from lowbit.quant.kernels.extension import launch
from lowbit.quant.kernels.problem import Problem
from lowbit.quant.kernels.w8a8 import W8a8Call

LEAST_M = 129  # with fewer rows, w8a8_gemm reads W only once
N_STEP = 8  # outputs per store
TILES = ((128, 128), (128, 256))  # rows of x and of W per tile, in the order of csrc/w8a8_cutlass.cu
# From a sweep of both tiles and four swizzles over four shapes, with 256 to 4096 rows, on one H100:
# docs/kernels/w8a8_cutlass.md.
MANY_ROWS = 512  # with more, the wide tile is faster: it reads less per product
NARROW_Y = 8192  # outputs: with fewer, swizzled tiles share more of their reads


@dataclass(frozen=True)
class CutlassCut:
    """A launch configuration: the index in TILES, and the swizzle (1, 2, 4 or 8 adjacent tiles of y in sequence)."""

    tile: int
    swizzle: int


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or should not, or None."""
    if reason := w8a8_gemm.reason_against(problem):
        return reason
    if problem.is_float:
        return "it is for int8"
    if problem.m < LEAST_M:
        return f"{problem.m} rows: w8a8_gemm is faster below {LEAST_M}"
    if problem.n % N_STEP:
        return f"{problem.n} outputs: it takes multiples of {N_STEP}"
    if problem.dtype == torch.float32:
        return "y in float32: it writes halves"
    return None


def choose_cut(problem: Problem) -> CutlassCut:
    """The launch for any shape."""
    if problem.m <= MANY_ROWS:
        return CutlassCut(tile=0, swizzle=1)
    return CutlassCut(tile=1, swizzle=8 if problem.n <= NARROW_Y else 1)


def run(call: W8a8Call, problem: Problem, cut: CutlassCut | None = None) -> Tensor:
    """y of `call`, which w8a8.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    y = call.empty()
    cut, args = cut or choose_cut(problem), w8a8_gemm.args_of(call, y)
    sizes = {"processors": problem.processors, "swizzle": cut.swizzle}
    launch("w8a8_cutlass", y.dtype, cut.tile, device=y.device, args=args, **sizes)
    return y
