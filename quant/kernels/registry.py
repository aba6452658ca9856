"""The kernels in the order in which they are tried."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quant.kernels import reference, wna16_dequantize, wna16_gemm, wna16_gemv
from quant.kernels.problem import Call, Problem


@dataclass(frozen=True)
class Kernel:
    """A way to compute a Call: a reason why it cannot take a Problem (None where it can), and the computation."""

    name: str
    reason_against: Callable[[Problem], str | None]
    run: Callable[[Call, Problem], Tensor]


KERNELS = (
    Kernel("wna16_gemm", wna16_gemm.reason_against, wna16_gemm.run),
    Kernel("wna16_gemv", wna16_gemv.reason_against, wna16_gemv.run),
    Kernel("wna16_dequantize", wna16_dequantize.reason_against, lambda call, problem: wna16_dequantize.run(call)),
    Kernel("reference", reference.reason_against, lambda call, problem: reference.run(call)),
)


def choose_kernel(problem: Problem) -> Kernel:
    """The first kernel with nothing against the problem. RuntimeError with all reasons where there is none."""
    for kernel in KERNELS:
        if kernel.reason_against(problem) is None:
            return kernel
    reasons = "\n".join(f"  {kernel.name}: {kernel.reason_against(problem)}" for kernel in KERNELS)
    raise RuntimeError(f"no kernel takes {problem}:\n{reasons}")
