"""The product with a dense weight: its tensors, their validation, and the reference by torch's own functions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.quant.kernels.decode_attention import append, appended
from lowbit.quant.kernels.problem import (
    ACTIVATIONS,
    Deferred,
    NextNorm,
    Problem,
    Rotary,
    place_of,
    reason_against_caches,
    reason_against_heads,
    reason_against_squares,
)
from lowbit.quant.kernels.reference import activate, begin_norm, divided


@dataclass(frozen=True)
class DenseCall:
    """y = activation(x W^T + bias) + residual.

    x           (m, k)  floating point
    weight      (n, k)  x's dtype, in the layout of torch.nn.Linear, which kernels for any m read
    bias        (n)     x's dtype, or None
    residual    (m, n)  x's dtype, or None
    activation  "silu_mul": silu(first n / 2 outputs) * the other outputs
    float32_out  True for y in float32
    dependent   launch without waiting for the previous kernel (programmatic dependent launch): the weight must not be
                written by that kernel
    deferred    the norm still to finish on x
    rotary      the outputs are heads of q, k and v; q is returned, k and v are stored
    next_norm   extra outputs that start the norm after y
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    float32_out: bool = False
    dependent: bool = False
    deferred: Deferred | None = None
    rotary: Rotary | None = None
    next_norm: NextNorm | None = None

    @property
    def y_shape(self) -> tuple[int, int]:
        n = self.weight.shape[0]
        if self.rotary is not None:
            return self.x.shape[0], n - 2 * self.rotary.kv_heads * self.rotary.head_dim
        return self.x.shape[0], n // 2 if self.activation == "silu_mul" else n

    @property
    def y_dtype(self) -> torch.dtype:
        return torch.float32 if self.float32_out else self.x.dtype

    def empty(self) -> Tensor:
        """Memory for y."""
        return self.x.new_empty(self.y_shape, dtype=self.y_dtype)

    def problem(self) -> Problem:
        """The Problem of this call, for the choice of a kernel. Queries the GPU's capability."""
        m, (n, k) = self.x.shape[0], self.weight.shape
        return Problem(m, n, k, 16, -1, self.x.dtype, *place_of(self.x.device))

    def check(self) -> None:
        """ValueError, with numbers, if the tensors do not fit together."""
        reason = reason_against_tensors(self)
        if reason:
            raise ValueError(f"x of shape {tuple(self.x.shape)} with a weight {tuple(self.weight.shape)}: {reason}")


def reason_against_tensors(call: DenseCall) -> str | None:
    """The first mismatch in shape, dtype, device or epilogue, or None."""
    x, w = call.x, call.weight
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        return f"x must have the shape (m, {w.shape[-1]})"
    m, n = x.shape[0], w.shape[0]
    if not x.is_floating_point():
        return f"x is {x.dtype}: floating point is needed"
    if call.activation not in ACTIVATIONS:
        return f"activation {call.activation!r} is none of {ACTIVATIONS}"
    if call.activation == "silu_mul" and (n % 2 or call.residual is not None or call.float32_out):
        return f"silu_mul halves an even number of outputs, not {n}, and takes no residual and no float32 output"
    halves = (("weight", w, (n, x.shape[1])), ("bias", call.bias, (n,)), ("residual", call.residual, (m, n)))
    for name, tensor, shape in halves:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype:
            return f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {x.dtype}"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    return reason_against_epilogue(call) or reason_against_squares(len(x), x.device, x.shape[1], call.deferred)


def reason_against_epilogue(call: DenseCall) -> str | None:
    """The reason why rotary and next norm do not fit the product, or None."""
    x, n, rotary, norm = call.x, call.weight.shape[0], call.rotary, call.next_norm
    gated = call.activation == "silu_mul"
    if norm is not None and (gated or rotary is not None or call.float32_out):
        return "silu_mul, rotary and float32 output leave no y for a next norm"
    if norm is not None:
        for name, tensor, shape in (("next_norm", norm.weight, (n,)), ("z", norm.z, (len(x), n))):
            if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
                found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                return f"{name} is {found}, not {shape} {x.dtype} beside x"
            if not tensor.is_contiguous():
                return f"{name} has strides {tensor.stride()}: it must be contiguous"
        return reason_against_squares(len(x), x.device, n, norm)
    if rotary is None:
        return None
    if call.activation != "none" or call.residual is not None or call.float32_out:
        return "rotary takes no activation, no residual and no float32 output"
    return reason_against_caches(x, x.dtype, rotary) or reason_against_heads(len(x), x.device, n, rotary)


def reference(call: DenseCall) -> Tensor:
    """y of `call` by torch's functions, with each step rounded to x's dtype."""
    x, w, residual = call.x, call.weight, call.residual
    if call.deferred is not None:
        x = divided(x, call.deferred)
    if residual is not None and call.bias is None and call.activation == "none":
        y = torch.addmm(residual, x, w.T)
    else:
        y = activate(functional.linear(x, w, call.bias), call.activation)
        y = y if residual is None else y + residual
    if call.rotary is not None:
        return append(appended(y, call.rotary))
    if call.next_norm is not None:
        begin_norm(y, call.next_norm)
    return y.to(call.y_dtype)
