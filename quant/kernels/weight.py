"""Weights in the kernels' form, of three kinds: packed, in codes of 8 bits for inputs in such codes, or dense.

The decode engine, vLLM and transformers hold a Linear. Only this module knows the kernels for its weight.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lowbit.quant.kernels import ops, panels, w4a8_gemm, wna16_gemv
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.packed import (
    HALF,
    TILE_ROWS,
    PackedWeight,
    prepack,
    prepack_rows,
    reason_against_kernel,
    reason_against_packing,
)
from lowbit.quant.kernels.problem import PART, PARTS, Deferred, PackedCall, Problem, Rotary, place_of
from lowbit.quant.kernels.reference import activate
from lowbit.quant.kernels.row_norm import ROUNDINGS, Rows
from lowbit.quant.kernels.row_scaled import RowScaled, row_scaled
from lowbit.quant.kernels.w8a8 import W8a8Call, W8a8Weight, multiplies_fp8, pack_w8a8
from lowbit.quant.kernels.w8a8 import reason_against_packing as reason_against_w8a8
from lowbit.quant.numbers import FP8, INT8
from lowbit.quant.numerics import input_rounding
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import FP8_BLOCK, FP8_GROUP, Side


@dataclass(frozen=True)
class Hints:
    """Launch hints about the neighbouring kernels. No result depends on them.

    dependent    launch without waiting for the previous kernel (programmatic dependent launch)
    next_weight  a tensor that the next product reads: its first bytes are prefetched
    """

    dependent: bool = False
    next_weight: Tensor | None = None


ALONE = Hints()


@dataclass(frozen=True)
class Epilogue:
    """y = activation(sums + bias) + residual, in x's dtype or float32; in panels only if the weight takes them."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    activation: str = "none"
    float32_out: bool = False
    y_panels: bool = False


class Weight(Protocol):
    """W (n, k), in the order of its kernels."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes read by a product."""

    @property
    def bulk(self) -> Tensor | None:
        """The tensor with most of these bytes, if it is contiguous; to be prefetched."""

    @property
    def rounds_inputs(self) -> bool:
        """True if `multiply` rounds the rows to codes, whose kernel applies their activation and norm too."""

    @property
    def in_rings(self) -> bool:
        """True if its kernel for few rows keeps a ring in shared memory: csrc/ring.cuh."""

    @property
    def begins_norms(self) -> bool:
        """True if `multiply_beginning` is supported."""

    def problem(self, m: int) -> Problem | None:
        """The Problem for m rows; None if no kernel can finish a deferred norm."""

    def takes_panels(self, m: int) -> bool:
        """True if the product of m rows best reads its inputs and writes its results in panels."""

    def fuses(self, activation: str) -> bool:
        """True if `multiply` can fuse this activation."""

    def turns(self, head_dim: int) -> bool:
        """True if `multiply_turning` supports heads of this width."""

    def multiply(self, rows: Rows, end: Epilogue, hints: Hints, deferred: Deferred | None = None) -> Tensor:
        """y of rows (m, k); `deferred` is the norm still to finish on them."""

    def multiply_beginning(
        self, rows: Rows, end: Epilogue, hints: Hints, norm_weight: Tensor, in_panels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, and the inputs of the product with rms_norm(y): see ops.linear_deferring."""

    def multiply_turning(
        self, rows: Rows, end: Epilogue, hints: Hints, rotary: Rotary, deferred: Deferred | None = None
    ) -> Tensor:
        """q (m, heads * head_dim), rotated; k and v are written to the cache: see problem.Rotary."""


class Fused(ABC):
    """A weight whose kernels finish and begin norms and turn heads, for inputs in half precision."""

    rounds_inputs = False
    in_rings = False

    @abstractmethod
    def call(self, rows: Rows, end: Epilogue, hints: Hints, deferred: Deferred | None = None) -> PackedCall | DenseCall:
        """The product as the operators take it."""

    def multiply(self, rows: Rows, end: Epilogue, hints: Hints, deferred: Deferred | None = None) -> Tensor:
        return ops.linear(self.call(rows, end, hints, deferred))

    def multiply_beginning(
        self, rows: Rows, end: Epilogue, hints: Hints, norm_weight: Tensor, in_panels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.linear_deferring(self.call(rows, end, hints), norm_weight, in_panels)

    def multiply_turning(
        self, rows: Rows, end: Epilogue, hints: Hints, rotary: Rotary, deferred: Deferred | None = None
    ) -> Tensor:
        return ops.linear(replace(self.call(rows, end, hints, deferred), rotary=rotary))


@dataclass(frozen=True)
class Packed(PackedWeight, Fused):
    """Codes of 2 to 8 bits in the kernels' order; inputs in half precision."""

    @property
    def bulk(self) -> Tensor:
        return self.words

    @property
    def begins_norms(self) -> bool:
        return self.n % (PART * PARTS) == 0

    def problem(self, m: int) -> Problem:
        sizes = (m, self.n, self.k, self.bits, self.group_size, self.dtype)
        problem = Problem(*sizes, *place_of(self.words.device), is_float=self.is_float)
        return replace(problem, panels=wna16_gemv.prefers_panels(problem))

    def takes_panels(self, m: int) -> bool:
        return m <= panels.HEIGHTS[-1] and self.problem(m).panels  # prompts build no Problem

    def fuses(self, activation: str) -> bool:
        if activation == "silu_mul":
            return self.pair_block == self.n
        return self.pair_block == TILE_ROWS and not activation.endswith("_mul")

    def turns(self, head_dim: int) -> bool:
        return self.pair_block == head_dim

    def call(self, rows: Rows, end: Epilogue, hints: Hints, deferred: Deferred | None = None) -> PackedCall:
        """The product as the operators take it."""
        if rows.rounding != INT8.name or not w4a8_gemm.prefers_codes(self, rows.shape[0]):
            return PackedCall(prepared(rows), self, **vars(end), **vars(hints), deferred=deferred)
        codes, scales = ops.quantize_rows(replace(rows, shuffled=True))
        # may always start early: it waits for the rounding kernel, which has waited for all previous work
        return PackedCall(codes, self, **vars(end), **vars(replace(hints, dependent=True)), x_scales=scales)


@dataclass(frozen=True)
class W8a8(W8a8Weight):
    """Codes of 8 bits, for inputs rounded to the same number."""

    rounds_inputs = in_rings = True

    @property
    def dtype(self) -> torch.dtype:
        return self.codes.dtype

    @property
    def bulk(self) -> Tensor:
        return self.codes

    def problem(self, m: int) -> Problem | None:
        return None

    @property
    def begins_norms(self) -> bool:
        return False

    def takes_panels(self, m: int) -> bool:
        return False

    def fuses(self, activation: str) -> bool:
        return activation == "none"

    def turns(self, head_dim: int) -> bool:
        return False

    def multiply(self, rows: Rows, end: Epilogue, hints: Hints, deferred: Deferred | None = None) -> Tensor:
        codes, scales = ops.quantize_rows(rows)
        # may always start early: it waits for the rounding kernel, which has waited for all previous work
        y = ops.w8a8_linear(W8a8Call(codes, scales, self, end.bias, end.residual, rows.x.dtype, dependent=True))
        return y.float() if end.float32_out else y

    def multiply_beginning(
        self, rows: Rows, end: Epilogue, hints: Hints, norm_weight: Tensor, in_panels: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Not supported."""
        raise NotImplementedError("begins_norms is False")

    def multiply_turning(
        self, rows: Rows, end: Epilogue, hints: Hints, rotary: Rotary, deferred: Deferred | None = None
    ) -> Tensor:
        """Not supported."""
        raise NotImplementedError("turns() is False")


@dataclass(frozen=True)
class Dense(Fused):
    """A matrix (n, k) in the activations' dtype, in the layout of torch.nn.Linear."""

    matrix: Tensor
    in_rings = True

    @property
    def n(self) -> int:
        return self.matrix.shape[0]

    @property
    def k(self) -> int:
        return self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    @property
    def bulk(self) -> Tensor | None:
        return self.matrix if self.matrix.is_contiguous() else None

    @property
    def begins_norms(self) -> bool:
        return self.n % (PART * PARTS) == 0

    def problem(self, m: int) -> Problem:
        return Problem(m, self.n, self.k, 16, -1, self.dtype, *place_of(self.matrix.device))

    def takes_panels(self, m: int) -> bool:
        return False

    def fuses(self, activation: str) -> bool:
        return activation == "silu_mul" or not activation.endswith("_mul")

    def turns(self, head_dim: int) -> bool:
        return self.n % head_dim == 0

    def call(self, rows: Rows, end: Epilogue, hints: Hints, deferred: Deferred | None = None) -> DenseCall:
        """The product as the operators take it."""
        tail = (end.bias, end.residual, end.activation, end.float32_out)
        return DenseCall(prepared(rows), self.matrix, *tail, hints.dependent, deferred)


def prepared(rows: Rows) -> Tensor:
    """The rows (m, k) in their own dtype, with norm and rounding applied."""
    return rows.x if rows.is_done else ops.normalize(rows)


@dataclass(frozen=True)
class RoundedInputs:
    """Rounding of inputs before the product to the grid of `side`, by `scale`, or, if that is None, by one scale per
    token."""

    side: Side
    scale: Tensor | None = None

    def of(self, rows: Rows) -> Rows:
        """The rows with this rounding added; by plain torch for a number type without a kernel."""
        number, grouped = self.side.number.name, self.side == FP8_GROUP
        if number not in ROUNDINGS or (self.side.group_size != -1 and not grouped):
            return Rows(input_rounding(self.side, self.scale)(prepared(rows)), dependent=rows.dependent)
        return replace(rows, rounding=number, input_scale=self.scale, grouped=grouped)


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias, with rounded inputs if the scheme says so, and the launch hints of its place."""

    weight: Weight
    bias: Tensor | None = None
    inputs: RoundedInputs | None = None
    hints: Hints = ALONE

    @property
    def nbytes(self) -> int:
        """Bytes read by a product."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rounded(self, rows: Rows) -> Rows:
        """The rows with the rounding of inputs added."""
        return rows if self.inputs is None else self.inputs.of(rows)

    def __call__(self, x: Tensor) -> Tensor:
        """y (..., n) of x (..., k)."""
        rows = self.rounded(Rows(x.reshape(-1, self.weight.k).contiguous(), dependent=self.hints.dependent))
        y = self.weight.multiply(rows, Epilogue(self.bias), self.hints)
        return y.view(*x.shape[:-1], self.weight.n)


def inputs_of(weight: QTensor | Tensor) -> RoundedInputs | None:
    """The rounding of inputs in the weight's scheme, or None."""
    if isinstance(weight, Tensor) or weight.scheme.inputs is None:
        return None
    return RoundedInputs(weight.scheme.inputs, weight.input_scale)


def takes_codes(weight: QTensor) -> bool:
    """True if the weight is multiplied with inputs in codes of its number: int8, and, if the device multiplies it, FP8
    by token, by tensor, or in blocks. Other inputs are rounded and stay in half precision."""
    inputs = weight.scheme.inputs
    if is_in_blocks(weight):
        return multiplies_fp8(weight.codes.device)
    if inputs is None or inputs.group_size != -1:
        return False
    return weight.scheme.number == INT8 or (weight.scheme.number == FP8 and multiplies_fp8(weight.codes.device))


def is_in_blocks(weight: QTensor) -> bool:
    """True for FP8 in blocks with inputs in FP8 in groups."""
    return weight.scheme.weights == FP8_BLOCK and weight.scheme.inputs == FP8_GROUP


def pack(weight: QTensor, dtype: torch.dtype, pair_block: int = TILE_ROWS) -> Weight:
    """`weight` in the kernels' form, on its device; dense if no kernel supports its kind. ValueError if it cannot be
    packed."""
    if reason_against_kernel(weight):
        return Dense(weight.dequantize(dtype))
    if takes_codes(weight):
        return W8a8(**vars(pack_w8a8(weight)))
    return Packed(**vars(prepack(weight, dtype, pair_block)))


def load_weight(weight: QTensor | RowScaled | Tensor, dtype: torch.dtype, pair_block: int = TILE_ROWS) -> Weight:
    """`weight` packed if the kernels support its kind and shape and `dtype` is half precision; otherwise dense
    in `dtype`."""
    if isinstance(weight, Tensor):
        return Dense(weight.to(dtype).contiguous())
    if isinstance(weight, QTensor):
        if dtype not in HALF or reason_against_kernel(weight):
            return Dense(weight.dequantize(dtype))
        if takes_codes(weight) and not reason_against_w8a8(*weight.shape, is_in_blocks(weight)):
            return pack(weight, dtype)
        weight = row_scaled(weight)
    sizes = *weight.shape, weight.group_size
    if dtype not in HALF or reason_against_packing(*sizes, TILE_ROWS):
        return Dense(weight.dequantize().to(dtype))
    block = TILE_ROWS if reason_against_packing(*sizes, pair_block) else pair_block
    return Packed(**vars(prepack_rows(weight, dtype, block)))


def activated(y: Tensor, activation: str) -> Tensor:
    """act(y), or act(first half) * second half, by torch in y's dtype: for products that do not fuse it."""
    if not activation.endswith("_mul"):
        return activate(y, activation)
    gate, up = y.chunk(2, -1)
    return activate(gate, activation.removesuffix("_mul")) * up


def with_tensors(weight: Weight, tensors: dict[str, Tensor | None]) -> Weight:
    """`weight` with its tensors replaced, by field name."""
    return replace(weight, **tensors)  # type: ignore[type-var]
