"""The product of rows in int8 or FP8 with a weight of the same number by Hopper's warpgroup instructions, W read once:
csrc/w8a8_gemm.cu."""

from typing import Any

from torch import Tensor

from lowbit.quant.kernels import ring
from lowbit.quant.kernels.extension import launch
from lowbit.quant.kernels.problem import Problem, check_alignment
from lowbit.quant.kernels.ring import RingCut
from lowbit.quant.kernels.w8a8 import W8a8Call

WARPGROUPS = (1, 2, 4)  # multiplying warpgroups per block


def reason_against(problem: Problem) -> str | None:
    """The reason why this kernel cannot run the problem, or None."""
    return ring.reason_against_gpu(problem)


def choose_cut(problem: Problem) -> RingCut:
    """The launch for `problem`. With up to 64 rows of x, half of the GPU is left to the next product, which is launched
    early and reads its own weight there: measured faster on an H100 than using all of it. Where memory is fast, half of
    the multiprocessors cannot read at its rate: Llama-2-7B on an H200, 1 x 128, 2.242 ms a step, else 2.403."""
    all_of_it = problem.fast_memory or problem.m > ring.COLUMNS[-1] // 2
    room = problem.processors if all_of_it else problem.processors // 2
    return ring.choose_cut(problem.m, problem.n, problem.k, problem.processors, room, problem.fast_memory)


def run(call: W8a8Call, problem: Problem, cut: RingCut | None = None) -> Tensor:
    """y of `call`, which w8a8.check has passed. ValueError if a tensor is not aligned to 16 bytes."""
    y = call.empty()
    cut = cut or choose_cut(problem)
    launch(
        "w8a8_gemm",
        call.x.dtype,
        y.dtype,
        device=y.device,
        args=args_of(call, y),
        dependent=call.dependent,
        **vars(cut),
    )
    return y


def args_of(call: W8a8Call, y: Tensor) -> dict[str, Any]:
    """csrc/w8a8_args.cuh's struct."""
    (m, k), weight = call.x.shape, call.weight
    tensors = {"x": call.x, "codes": weight.codes, "bias": call.bias, "residual": call.residual, "y": y}
    check_alignment(**tensors)
    sides = {"scales": weight.scales, "block_pitch": weight.scales.shape[1] if weight.in_blocks else 0}
    return tensors | {"x_scales": call.x_scales, "m": m, "n": weight.n, "k": k} | sides
