"""The kernels, in the order in which they are tried."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit.quant.kernels import (
    dense,
    dense_gemv,
    panels,
    reference,
    w4a8_gemm,
    w8a8,
    w8a8_cutlass,
    w8a8_gemm,
    wna16_dequantize,
    wna16_gemm,
    wna16_gemv,
    wna16_prefill,
)
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.problem import PackedCall, Problem
from lowbit.quant.kernels.w8a8 import W8a8Call


@dataclass(frozen=True)
class Kernel:
    """A kernel for a kind of call: the reason why it cannot run a Problem (or None), and the function that runs it.

    choose_cut  the launch for a problem, if there is a choice
    defers         True if it finishes the norm before this product and (packed weights) starts the one after it, faster
                   than a norm kernel
    """

    name: str
    reason_against: Callable[[Problem], str | None]
    run: Callable[[Any, Problem], Tensor]
    choose_cut: Callable[[Problem], object] | None = None
    defers: bool = False


def with_whole_rows(run: Callable[[Any, Problem], Tensor]) -> Callable[[PackedCall, Problem], Tensor]:
    """`run` for calls with half-applied norms, of which the deferred one is finished before it and the next one begun
    after it, and for panels."""

    def running(call: PackedCall, problem: Problem) -> Tensor:
        y = run(reference.whole(call), problem)
        if call.next_norm is not None:
            reference.begin_norm(y, call.next_norm)
        return panels.panels_of(y) if call.y_panels else y

    return running


def run_in_halves(call: PackedCall, problem: Problem) -> Tensor:
    """y of `call`, whose x is in codes, by the kernels for x in half precision."""
    return compute(reference.in_halves(call))


KERNELS = (
    Kernel("wna16_gemm", wna16_gemm.reason_against, with_whole_rows(wna16_gemm.run), wna16_gemm.choose_cut),
    Kernel("wna16_prefill", wna16_prefill.reason_against, with_whole_rows(wna16_prefill.run), wna16_prefill.choose_cut),
    Kernel("wna16_gemv", wna16_gemv.reason_against, wna16_gemv.run, wna16_gemv.choose_cut, defers=True),
    Kernel("wna16_dequantize", wna16_dequantize.reason_against, with_whole_rows(wna16_dequantize.run)),
    Kernel("reference", reference.reason_against, lambda call, problem: reference.run(call), defers=True),
)
# For x in codes of 8 bits.
W8A8_KERNELS = (
    Kernel("w8a8_cutlass", w8a8_cutlass.reason_against, w8a8_cutlass.run, w8a8_cutlass.choose_cut),
    Kernel("torch._scaled_mm", w8a8.reason_against_scaled, lambda call, problem: w8a8.scaled(call)),
    Kernel("w8a8_gemm", w8a8_gemm.reason_against, w8a8_gemm.run, w8a8_gemm.choose_cut),
    Kernel("torch._int_mm", w8a8.reason_against_int_mm, lambda call, problem: w8a8.reference(call)),
    Kernel("reference", lambda problem: None, lambda call, problem: w8a8.reference(call)),
)
# For x in int8 and W in 4 bits.
W4A8_KERNELS = (
    Kernel("w4a8_gemm", w4a8_gemm.reason_against, with_whole_rows(w4a8_gemm.run), w4a8_gemm.choose_cut),
    Kernel("in halves", w4a8_gemm.reason_against_halves, run_in_halves),
    Kernel("reference", lambda problem: None, lambda call, problem: reference.run(call)),
)
# For W in half precision, or in float32.
DENSE_KERNELS = (
    Kernel("dense_gemv", dense_gemv.reason_against, dense_gemv.run, dense_gemv.choose_cut, defers=True),
    Kernel("torch", lambda problem: None, lambda call, problem: dense.reference(call)),
)


def kernels_for(problem: Problem) -> tuple[Kernel, ...]:
    """The candidate kernels for the problem, in the order in which they are tried."""
    if problem.bits == 16:
        return DENSE_KERNELS
    if problem.code_inputs:
        return W8A8_KERNELS if problem.bits == 8 else W4A8_KERNELS
    return KERNELS


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


def compute(call: PackedCall | W8a8Call | DenseCall) -> Tensor:
    """y of `call` by the first kernel that takes it. ValueError if the tensors do not fit together."""
    call.check()
    if 0 in call.y_shape:
        return call.empty()
    problem = call.problem()
    return choose_kernel(problem).run(call, problem)
