"""The kernels, in the order in which they are tried."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.quant.kernels import (
    dense,
    dense_gemv,
    reference,
    w8a8,
    w8a8_cutlass,
    w8a8_gemm,
    wna16_dequantize,
    wna16_gemm,
    wna16_gemv,
)
from lowbit.quant.kernels.problem import Problem


@dataclass(frozen=True)
class Kernel:
    """A kernel for a kind of call: the reason why it cannot run a Problem (or None), and the function that runs it.

    defers  True if it finishes the norm before this product and (packed weights) starts the one after it, faster than a
            norm kernel
    """

    name: str
    reason_against: Callable[[Problem], str | None]
    run: Callable[[Any, Problem], Tensor]
    defers: bool = False


KERNELS = (
    Kernel("wna16_gemm", wna16_gemm.reason_against, wna16_gemm.run),
    Kernel("wna16_gemv", wna16_gemv.reason_against, wna16_gemv.run, defers=True),
    Kernel("wna16_dequantize", wna16_dequantize.reason_against, lambda call, problem: wna16_dequantize.run(call)),
    Kernel("reference", reference.reason_against, lambda call, problem: reference.run(call), defers=True),
)
# For x in int8.
INT8_KERNELS = (
    Kernel("w8a8_cutlass", w8a8_cutlass.reason_against, w8a8_cutlass.run),
    Kernel("w8a8_gemm", w8a8_gemm.reason_against, w8a8_gemm.run),
    Kernel("torch._int_mm", lambda problem: None, lambda call, problem: w8a8.reference(call)),
)
# For W in half precision, or in float32.
DENSE_KERNELS = (
    Kernel("dense_gemv", dense_gemv.reason_against, dense_gemv.run, defers=True),
    Kernel("torch", lambda problem: None, lambda call, problem: dense.reference(call)),
)


def kernels_for(problem: Problem) -> tuple[Kernel, ...]:
    """The candidate kernels for the problem, in the order in which they are tried."""
    if problem.bits == 16:
        return DENSE_KERNELS
    return INT8_KERNELS if problem.int8_inputs else KERNELS


def choose_kernel(problem: Problem) -> Kernel:
    """The first kernel without an objection to the problem. RuntimeError with all objections if there is none."""
    kernels = kernels_for(problem)
    for kernel in kernels:
        if kernel.reason_against(problem) is None:
            return kernel
    reasons = "\n".join(f"  {kernel.name}: {kernel.reason_against(problem)}" for kernel in kernels)
    raise RuntimeError(f"no kernel takes {problem}:\n{reasons}")


def defers(problem: Problem) -> bool:
    """True if fusing the neighbouring RMS norm beats a separate norm kernel. Always possible on a CPU."""
    return problem.capability is None or choose_kernel(problem).defers
