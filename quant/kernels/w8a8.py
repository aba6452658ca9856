"""The product of int8 rows with an int8 weight: its tensors, their validation, and the reference in plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.kernels.problem import Problem, place_of
from lowbit.quant.qtensor import QTensor

K_STEP = 16  # inputs per read of the copy engine and CUTLASS
MOST_K = (1 << 17) - K_STEP  # inputs: 2^17 products of -128 and -128 overflow int32
LEAST_ROWS, N_STEP = 17, 8  # of cuBLAS's int8 product
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Int8Weight:
    """A weight with one scale per row, in its plain order, which all kernels read for any number of rows.

    codes   (n, k)  int8, contiguous, aligned to 16 bytes
    scales  (n)     float32
    """

    codes: Tensor
    scales: Tensor

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()


@dataclass(frozen=True)
class Int8Call:
    """y = (x W^T) * x_scales * scales + bias + residual, with exact sums in int32 and everything after them in float32.

    x          (m, k)  int8, contiguous
    x_scales   (m)     float32: the value of a code of 1 in each row
    bias       (n)     of y's dtype, or None
    residual   (m, n)  of y's dtype, or None
    dtype      of y: float16 or bfloat16, or float32 without bias and residual
    dependent  launch without waiting for the previous kernel (programmatic dependent launch), which must write neither
               the weight nor the bias
    """

    x: Tensor
    x_scales: Tensor
    weight: Int8Weight
    bias: Tensor | None = None
    residual: Tensor | None = None
    dtype: torch.dtype = torch.float16
    dependent: bool = False

    @property
    def y_shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.weight.n

    @property
    def y_dtype(self) -> torch.dtype:
        return self.dtype

    def empty(self) -> Tensor:
        """Memory for y."""
        return self.x.new_empty(self.y_shape, dtype=self.dtype)

    def problem(self) -> Problem:
        """The Problem of this call, for the choice of a kernel. Queries the GPU's capability."""
        (m, n), k = self.y_shape, self.weight.k
        return Problem(m, n, k, 8, -1, self.dtype, *place_of(self.x.device), int8_inputs=True)

    def check(self) -> None:
        """ValueError, with numbers, if the tensors do not fit together."""
        reason = reason_against_tensors(self)
        if reason:
            shapes = tuple(self.x.shape), tuple(self.weight.codes.shape)
            raise ValueError(f"int8 rows {shapes[0]} with a weight {shapes[1]}: {reason}")


def reason_against_packing(n: int, k: int) -> str | None:
    """The reason why a weight of this shape cannot be packed, or None."""
    if k % K_STEP:
        return f"{k} inputs: the int8 kernels take multiples of {K_STEP}"
    return f"{k} inputs: beyond {MOST_K} a sum may not fit in int32" if k > MOST_K else None


def pack_int8(weight: QTensor) -> Int8Weight:
    """`weight` in the kernels' form, on its device: symmetric, 8 bits, one scale per row.

    ValueError for another scheme, for k not a multiple of 16, or for k above MOST_K. QTensor has already rejected
    scales that are zero, negative or not finite. The codes are unchanged.
    """
    n, k = weight.shape
    scheme = weight.scheme
    reason = reason_against_packing(n, k)
    if scheme.bits != 8 or not scheme.symmetric or scheme.group_size != -1:
        reason = f"int8 products take symmetric 8-bit codes and one scale per channel, not {scheme.weights_only}"
    if reason:
        raise ValueError(f"a {scheme} weight of shape ({n}, {k}) cannot be multiplied in int8: {reason}")
    return Int8Weight(weight.codes.contiguous(), weight.scales.reshape(-1).float().contiguous())


def reason_against_tensors(call: Int8Call) -> str | None:
    """The first mismatch in shape, dtype, device or contiguity, or None."""
    x, w = call.x, call.weight
    if x.ndim != 2 or w.codes.ndim != 2 or x.shape[1] != w.k:
        return f"x must have the shape (m, {w.codes.shape[-1]})"
    if call.dtype not in DTYPES:
        return f"y in {call.dtype} is none of {DTYPES}"
    if call.dtype == torch.float32 and (call.bias is not None or call.residual is not None):
        return "y in float32 takes no bias and no residual"
    if reason := reason_against_packing(w.n, w.k):
        return reason
    wanted = (
        ("x", x, tuple(x.shape), torch.int8),
        ("x_scales", call.x_scales, (x.shape[0],), torch.float32),
        ("codes", w.codes, (w.n, w.k), torch.int8),
        ("scales", w.scales, (w.n,), torch.float32),
        ("bias", call.bias, (w.n,), call.dtype),
        ("residual", call.residual, call.y_shape, call.dtype),
    )
    for name, tensor, shape, dtype in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}: it must be contiguous"
    return None


def finish(call: Int8Call, sums: Tensor) -> Tensor:
    """y from the integer sums (m, n)."""
    y = sums.float() * (call.x_scales.unsqueeze(1) * call.weight.scales)
    if call.bias is not None:
        y = y + call.bias.float()
    if call.residual is not None:
        y = y + call.residual.float()
    return y.to(call.dtype)


def reference(call: Int8Call) -> Tensor:
    """y of `call` by torch's integer product: cuBLAS on a GPU, which needs at least 17 rows, and n in steps of 8."""
    m, n = call.y_shape
    x, codes = call.x, call.weight.codes
    if x.is_cuda:
        x = torch.nn.functional.pad(x, (0, 0, 0, max(0, LEAST_ROWS - m)))
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -n % N_STEP))
    return finish(call, torch._int_mm(x, codes.T)[:m, :n])
