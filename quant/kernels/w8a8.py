"""The product of rows and a weight in 8 bits, both int8 or both FP8: its tensors, their validation, its reference."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowbit.quant.kernels.extension import reason_against_90a
from lowbit.quant.kernels.problem import Problem, place_of
from lowbit.quant.kernels.row_norm import GROUP
from lowbit.quant.numbers import FP8, INT8, Number
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import FP8_BLOCK

K_STEP = 16  # inputs per read of the copy engine and CUTLASS
MOST_K = (1 << 17) - K_STEP  # inputs: 2^17 products of -128 and -128 overflow int32
LEAST_ROWS, N_STEP = 17, 8  # of cuBLAS's int8 product
# Of its FP8 product. 22016 x 4096 takes it 38.5 us at 64 rows on an H200, w8a8_gemm 25.2; 33.9 and 38.5 at 128.
LEAST_SCALED, SCALED_STEP = 65, 16
# Inputs up to which torch's product may keep its sums in the tensor cores if y is bfloat16. Its error is then 1.3 times
# that of y's rounding at 4096 inputs, 1.8 times at 11008; its time 0.78 to 0.92 with 1024 rows or more (H200).
MOST_FAST_K = 1 << 13
MOST_BLOCK_K = 1 << 15  # inputs of a weight in blocks
BLOCK_STEP = 4  # groups of inputs that cuBLAS reads the scales of together: rows of scales are padded to it
NUMBERS = {torch.int8: INT8, torch.float8_e4m3fn: FP8}  # of codes
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class W8a8Weight:
    """A weight in its plain order, which all kernels read for any number of rows.

    codes   (n, k)  int8 or float8_e4m3fn, contiguous, aligned to 16 bytes
    scales  (n)     float32; of FP8 in blocks of 128 x 128 (n / 128, k / 128), both rounded up, the second to a multiple
                    of BLOCK_STEP
    """

    codes: Tensor
    scales: Tensor

    @property
    def number(self) -> Number:
        """The codes' number, and that of the inputs."""
        return NUMBERS[self.codes.dtype]

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def in_blocks(self) -> bool:
        """True if GROUP x GROUP codes share a scale, and so do GROUP inputs."""
        return self.scales.ndim == 2

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + 4 * self.scales.numel()


@dataclass(frozen=True)
class W8a8Call:
    """y = (x W^T) * x_scales * scales + bias + residual, with everything after the sums in float32.

    Sums of int8 are exact, in int32. Those of FP8 are rounded as the tensor cores round them, which keep about 14 bits;
    every 128 inputs they are added up in float32, in blocks times their scales. With many rows, keeps_sums is the
    exception.

    x          (m, k)  of the weight's dtype, contiguous
    x_scales   (m)     float32: the value of a code of 1 in each row; for a weight in blocks (k / GROUP, m)
    bias       (n)     of y's dtype, or None
    residual   (m, n)  of y's dtype, or None
    dtype      of y: float16 or bfloat16, or float32 without bias and residual
    dependent  launch without waiting for the previous kernel (programmatic dependent launch), which must write neither
               the weight nor the bias
    """

    x: Tensor
    x_scales: Tensor
    weight: W8a8Weight
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
        floats, group = self.x.dtype.is_floating_point, GROUP if self.weight.in_blocks else -1
        return Problem(m, n, k, 8, group, self.dtype, *place_of(self.x.device), code_inputs=True, is_float=floats)

    def check(self) -> None:
        """ValueError, with numbers, if the tensors do not fit together."""
        reason = reason_against_tensors(self)
        if reason:
            shapes = tuple(self.x.shape), tuple(self.weight.codes.shape)
            raise ValueError(f"rows {shapes[0]} in codes with a weight {shapes[1]}: {reason}")


def multiplies_fp8(device: torch.device) -> bool:
    """True if FP8 is multiplied with FP8 on `device`: by Hopper's kernels, and in float32 on a CPU."""
    capability = place_of(device)[1]
    return capability is None or (capability == (9, 0) and reason_against_90a() is None)


def reason_against_packing(n: int, k: int, in_blocks: bool = False) -> str | None:
    """The reason why a weight of this shape cannot be packed, or None."""
    step = GROUP if in_blocks else K_STEP
    if k % step:
        return f"{k} inputs: the kernels of 8-bit inputs take multiples of {step}"
    if in_blocks and k > MOST_BLOCK_K:
        return f"{k} inputs: beyond {MOST_BLOCK_K} the scales of blocks may not fit in shared memory"
    return f"{k} inputs: beyond {MOST_K} a sum may not fit in int32" if k > MOST_K else None


def block_sides(n: int, k: int) -> tuple[int, int]:
    """The shape of the scales of a weight in blocks (n, k)."""
    groups = k // GROUP
    return -(-n // GROUP), groups + -groups % BLOCK_STEP


def pack_w8a8(weight: QTensor) -> W8a8Weight:
    """`weight` in the kernels' form, on its device: int8 or FP8 with one scale per row, or FP8 in blocks.

    ValueError for another scheme, for k not a multiple of 16, or for k above MOST_K. QTensor has already rejected
    scales that are zero, negative or not finite. The codes are unchanged.
    """
    n, k = weight.shape
    scheme, in_blocks = weight.scheme, weight.scheme.weights == FP8_BLOCK
    reason = reason_against_packing(n, k, in_blocks)
    if scheme.number not in NUMBERS.values() or (scheme.group_size != -1 and not in_blocks):
        reason = f"products of 8-bit inputs take int8 or fp8 and one scale per channel, not {scheme.weights_only}"
    if reason:
        raise ValueError(f"a {scheme} weight of shape ({n}, {k}) cannot be multiplied with 8-bit inputs: {reason}")
    scales = weight.scales.float()
    scales = torch.nn.functional.pad(scales, (0, -k // GROUP % BLOCK_STEP)) if in_blocks else scales.reshape(-1)
    return W8a8Weight(weight.codes.contiguous(), scales.contiguous())


def reason_against_tensors(call: W8a8Call) -> str | None:
    """The first mismatch in shape, dtype, device or contiguity, or None."""
    x, w = call.x, call.weight
    if x.ndim != 2 or w.codes.ndim != 2 or x.shape[1] != w.k:
        return f"x must have the shape (m, {w.codes.shape[-1]})"
    if call.dtype not in DTYPES:
        return f"y in {call.dtype} is none of {DTYPES}"
    if call.dtype == torch.float32 and (call.bias is not None or call.residual is not None):
        return "y in float32 takes no bias and no residual"
    if reason := reason_against_packing(w.n, w.k, w.in_blocks):
        return reason
    kind = w.codes.dtype if w.codes.dtype in NUMBERS else torch.int8
    if w.in_blocks and kind == torch.int8:
        return "codes in blocks are of FP8"
    wanted = (
        ("x", x, tuple(x.shape), kind),
        ("x_scales", call.x_scales, (w.k // GROUP, x.shape[0]) if w.in_blocks else (x.shape[0],), torch.float32),
        ("codes", w.codes, (w.n, w.k), kind),
        ("scales", w.scales, block_sides(w.n, w.k) if w.in_blocks else (w.n,), torch.float32),
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


def finish(call: W8a8Call, sums: Tensor) -> Tensor:
    """y from the sums (m, n), which have their scales already if the weight is in blocks."""
    y = sums.float()
    if not call.weight.in_blocks:
        y = y * (call.x_scales.unsqueeze(1) * call.weight.scales)
    if call.bias is not None:
        y = y + call.bias.float()
    if call.residual is not None:
        y = y + call.residual.float()
    return y.to(call.dtype)


def reference(call: W8a8Call) -> Tensor:
    """y of `call` by torch: of FP8 in float32; of int8 by its integer product, cuBLAS's on a GPU: it needs 17 rows or
    more, and n in steps of 8."""
    m, n = call.y_shape
    x, codes = call.x, call.weight.codes
    if call.weight.in_blocks:
        return finish(call, in_values(x, call.x_scales.T) @ in_values(codes, call.weight.scales, GROUP).T)
    if x.dtype.is_floating_point:
        return finish(call, x.float() @ codes.float().T)
    if x.is_cuda:
        x = torch.nn.functional.pad(x, (0, 0, 0, max(0, LEAST_ROWS - m)))
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -n % N_STEP))
    return finish(call, torch._int_mm(x, codes.T)[:m, :n])


def in_values(codes: Tensor, scales: Tensor, rows: int = 1) -> Tensor:
    """codes (m, k) times scales, each of `rows` rows and GROUP inputs, float64."""
    wide = scales.repeat_interleave(rows, 0).repeat_interleave(GROUP, 1)
    return codes.double() * wide[: codes.shape[0], : codes.shape[1]]


def reason_against_int_mm(problem: Problem) -> str | None:
    """The reason why torch's integer product cannot run the problem, or None."""
    return "it is for int8" if problem.is_float else None


def reason_against_scaled(problem: Problem) -> str | None:
    """The reason why torch's FP8 product cannot run the problem, or should not, or None."""
    if not problem.is_float:
        return "it is for FP8"
    if problem.capability != (9, 0):
        return "it is used on sm_90 alone"
    if problem.m < LEAST_SCALED:
        return f"{problem.m} rows: w8a8_gemm is faster below {LEAST_SCALED}"
    if problem.n % SCALED_STEP:
        return f"{problem.n} outputs: it takes multiples of {SCALED_STEP}"
    return "y in float32: it writes halves" if problem.dtype == torch.float32 else None


def scaled(call: W8a8Call) -> Tensor:
    """y of `call` by torch's FP8 product, with sums in float32 unless keeps_sums(call)."""
    w = call.weight
    if w.in_blocks:
        y = scaled_blocks(call)
        y = y if call.bias is None else y.add_(call.bias)
    else:
        x_scales, scales = call.x_scales.unsqueeze(1), w.scales.unsqueeze(0)
        multiply = partial(torch._scaled_mm, out_dtype=call.dtype, use_fast_accum=keeps_sums(call))
        y = multiply(call.x, w.codes.T, x_scales, scales, call.bias)
    return y if call.residual is None else y.add_(call.residual)


def keeps_sums(call: W8a8Call) -> bool:
    """True if sums of all inputs stay in the tensor cores, with about 14 bits: y's own rounding hides their error."""
    return call.dtype == torch.bfloat16 and call.weight.k <= MOST_FAST_K


def scaled_blocks(call: W8a8Call) -> Tensor:
    """y of `call` without bias and residual, for a weight in blocks; rows are padded to a multiple of BLOCK_STEP."""
    m, room = len(call.x), -len(call.x) % BLOCK_STEP
    x, x_scales = call.x, call.x_scales
    if room:
        x = torch.nn.functional.pad(x.view(torch.int8), (0, 0, 0, room)).view(x.dtype)
        x_scales = torch.nn.functional.pad(x_scales, (0, room))
    blocks = torch.nn.functional.ScalingType
    recipes = (blocks.BlockWise1x128, call.weight.scales.T, blocks.BlockWise128x128)
    return torch.nn.functional.scaled_mm(x, call.weight.codes.T, x_scales.T, *recipes, output_dtype=call.dtype)[:m]
