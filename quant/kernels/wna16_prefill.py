"""The product of a prompt's rows with a weight of 4 or 8 bits by Hopper's warpgroup instructions:
csrc/wna16_prefill.cu."""

import secrets
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil

import torch
from torch import Tensor

from lowbit.quant.kernels import ring
from lowbit.quant.kernels.packed import CHUNK_K
from lowbit.quant.kernels.problem import PackedCall, Problem
from lowbit.quant.kernels.wna16_args import launch_product, prepare
from lowbit.quant.kernels.wna16_gemm import MOST_M

ROWS = 256  # of W in a part: of a cluster of two blocks
COLUMNS = (256, 192, 128)  # of x in a part
MANY_M = 4096  # with more, cuBLAS saves what a copy costs: 8192 rows take 0.96 to 1.0 of our time (H200)
MOST_SHARERS = 4  # clusters for each part, if there are few
# Microseconds of a chunk of 128 inputs of a part, by its columns; of each part's beginning and end; of sums that
# clusters share, and of each cluster that shares a part. Fitted on an H200; of 42 problems of 6 shapes with 96 to 2048
# rows, the cut it picks takes 0.7% more than the best on average, 7% at most.
CHUNK_US = {256: 1.3, 192: 1.08, 128: 0.83}
PART_US, SHARE_US, SHARER_US = 2.8, 0.8, 2.2


@dataclass(frozen=True)
class PrefillCut:
    """A launch configuration.

    columns   rows of x in a part
    clusters  of two blocks
    whole     parts that one cluster takes each, at most; all clusters share the others
    """

    columns: int
    clusters: int
    whole: int


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or should not, or None."""
    if problem.is_stream:
        return f"{problem.bits} bits: it takes 4 and 8"
    if problem.m <= MOST_M:
        return f"{problem.m} rows: it is for more than {MOST_M}"
    if problem.m > MANY_M:
        return f"{problem.m} rows: wna16_dequantize is faster"
    return ring.reason_against_gpu(problem)


def parts_of(columns: int, problem: Problem) -> int:
    """Parts of the product."""
    return -(-problem.n // ROWS) * -(-problem.m // columns)


def cuts_of(problem: Problem) -> list[PrefillCut]:
    """Every cut that may be the best: all parts whole, or those of the last waves shared."""
    cuts: dict[PrefillCut, None] = {}
    most = max(problem.processors // 2, 1)
    for columns, sharers, waves in product(COLUMNS, range(MOST_SHARERS + 1), (0, 1, 2)):
        parts = parts_of(columns, problem)
        clusters = min(sharers * parts, most) if sharers else most
        whole = max(parts // clusters - waves, 0) * clusters if waves else parts
        cuts[PrefillCut(columns, min(clusters, parts) if whole == parts else clusters, whole)] = None
    return list(cuts)


@lru_cache(4096)
def choose_cut(problem: Problem) -> PrefillCut:
    """The launch for any shape: the one with the least cost."""
    return min(cuts_of(problem), key=lambda cut: cost_of(cut, problem))


def cost_of(cut: PrefillCut, problem: Problem) -> float:
    """Estimated microseconds of a launch."""
    chunks, parts = -(-problem.k // CHUNK_K), parts_of(cut.columns, problem)
    rounds, shared = ceil(cut.whole / cut.clusters), (parts - cut.whole) * chunks / cut.clusters
    us = CHUNK_US[cut.columns] * (rounds * chunks + shared) + PART_US * rounds
    return us + PART_US + SHARE_US + SHARER_US * ceil(chunks / shared) if shared else us


def run(call: PackedCall, problem: Problem, cut: PrefillCut | None = None) -> Tensor:
    """y of `call`, which problem.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    call, cut = prepare(call, most_staged=0), cut or choose_cut(problem)
    y, partial, marks = call.empty(), None, None
    if cut.whole < parts_of(cut.columns, problem):
        partial = y.new_empty(cut.clusters, ROWS, cut.columns, dtype=torch.float32)
        marks = y.new_empty(cut.clusters, 4, dtype=torch.int64)
    shared = {"partial": partial, "marks": marks, "mark": secrets.randbits(63)}
    launch_product("wna16_prefill", call, y, dependent=call.dependent, **vars(cut), **shared)
    return y
