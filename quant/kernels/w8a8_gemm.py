"""The product of int8 rows with an int8 weight by Hopper's warpgroup instructions, W read once: csrc/w8a8_gemm.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.kernels.extension import EXTENSION, reason_against_90a
from quant.kernels.problem import Problem, check_alignment
from quant.kernels.w8a8 import Int8Call

CHUNK_K = 128
ROWS = 64  # of W, that a warpgroup has
WARPGROUPS = (1, 2, 4)  # that multiply, in a block
CLUSTERS = (1, 2, 4, 8)
MOST_BLOCKS = 4  # on a multiprocessor
SOME_ROWS = 16  # of x: with more, x takes so much of a ring that it is better not halved
MOST_COLUMNS = 128  # rows of x that read W once
RING_BYTES = 222 << 10  # of a multiprocessor's shared memory, for all its blocks' rings
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How the work is cut.

    warpgroups  of a block that multiply: each has 64 rows of W
    cluster     blocks that share k and sum through each other's shared memory
    stages      chunks of 128 inputs that a block has asked for at most
    """

    warpgroups: int
    cluster: int
    stages: int


def reason_against(problem: Problem) -> str | None:
    """Why this kernel cannot take the problem, or None."""
    if problem.capability is None:
        return f"the tensors are on the {problem.device}"
    if problem.capability != (9, 0):
        return f"it is for sm_90, the GPU is sm_{problem.capability[0]}{problem.capability[1]}"
    return reason_against_90a()


def choose_launch(problem: Problem) -> Launch:
    """One rule for all shapes: rings that fill the multiprocessors, and room beside them for the next kernel's blocks.

    Blocks of one warpgroup, but two, which halve the reads of x, where they fill every multiprocessor several times or
    x has many rows. Few blocks share k until they take half of the multiprocessors, so that the next product, launched
    early, reads its own weight on the others: measured, that is worth more than the other half.
    """
    processors = max(problem.processors, 1)
    many = problem.m > MOST_COLUMNS // 2 or problem.n > (MOST_BLOCKS - 1) * ROWS * processors
    warpgroups = 2 if many else 1
    groups = -(-problem.n // (ROWS * warpgroups))
    chunks = -(-problem.k // CHUNK_K)
    room = processors if problem.m > MOST_COLUMNS // 2 else processors // 2
    cluster = max(c for c in CLUSTERS if c == 1 or (groups * c <= room and 4 * c <= chunks))
    blocks = groups * cluster
    beside = problem.m <= SOME_ROWS and 2 * blocks > processors  # the next kernel's blocks, on the same multiprocessors
    shared = -(-blocks // processors) if blocks > processors else 1 + beside
    columns = next(c for c in (8, 16, 32, 64, MOST_COLUMNS) if c >= min(problem.m, MOST_COLUMNS))
    stage_bytes = (ROWS * warpgroups + columns) * CHUNK_K
    ring_bytes = RING_BYTES // min(shared, MOST_BLOCKS // warpgroups)
    return Launch(warpgroups, cluster, min(ring_bytes // stage_bytes, -(-chunks // cluster)))


def run(call: Int8Call, problem: Problem, launch: Launch | None = None) -> Tensor:
    """y of `call`, which w8a8.check has passed. ValueError where a tensor is not aligned to 16 bytes."""
    assert EXTENSION is not None
    y = torch.empty(call.y_shape, dtype=call.dtype, device=call.x.device)
    chosen = launch or choose_launch(problem)
    cut = EXTENSION.W8a8GemmLaunch()
    cut.warpgroups, cut.cluster, cut.stages = chosen.warpgroups, chosen.cluster, chosen.stages
    cut.device, cut.output, cut.dependent = y.device.index, OUTPUTS.index(call.dtype), call.dependent
    with torch.cuda.device(y.device):
        EXTENSION.w8a8_gemm(args_of(call, y), cut, torch.cuda.current_stream().cuda_stream)
    return y


def args_of(call: Int8Call, y: Tensor) -> object:
    """csrc/w8a8_args.cuh's struct: addresses (0 for what is absent) and sizes."""
    assert EXTENSION is not None
    weight = call.weight
    tensors = {"x": call.x, "codes": weight.codes, "bias": call.bias, "residual": call.residual, "y": y}
    check_alignment(**{name: tensor for name, tensor in tensors.items() if tensor is not None})
    args = EXTENSION.W8a8Args()
    for name, tensor in (tensors | {"x_scales": call.x_scales, "scales": weight.scales}).items():
        setattr(args, name, 0 if tensor is None else tensor.data_ptr())
    args.m, args.k = call.x.shape
    args.n = weight.n
    return args
