"""Stacked weights of all experts of a layer, and the products of each row with the experts that it chose."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import (
    HALF,
    TILE_ROWS,
    PackedWeight,
    prepack_rows,
    reason_against_kernel,
    reason_against_packing,
)
from lowbit.quant.kernels.pairs import Chosen, added, products
from lowbit.quant.kernels.problem import Deferred
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.row_scaled import RowScaled, row_scaled
from lowbit.quant.kernels.weight import Hints, RoundedInputs, prepared
from lowbit.quant.kernels.wna16_experts import DownCall, Gate, UpCall, gated
from lowbit.quant.qtensor import QTensor

FEW_ROWS = 64  # of a mixture: more are multiplied with each expert's dense weight


class Stack(Protocol):
    """W (experts, n, k), in the order of its kernels."""

    @property
    def experts(self) -> int: ...

    @property
    def n(self) -> int:
        """Outputs of an expert."""

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""

    def multiply(self, x: Tensor, experts: Tensor) -> Tensor:
        """(pairs, n) float32: row i of x (pairs, k) with the expert experts[i]."""


@dataclass(frozen=True)
class PackedStack:
    """Codes of 2 to 8 bits in the kernels' order, expert after expert: `weight` has experts * n rows."""

    weight: PackedWeight
    experts: int

    @property
    def n(self) -> int:
        return self.weight.n // self.experts

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def multiply(self, x: Tensor, experts: Tensor) -> Tensor:
        return products(x, ops.dequantize(self.weight).unflatten(0, (self.experts, -1)), experts).float()


@dataclass(frozen=True)
class DenseStack:
    """A matrix (experts, n, k) in the activations' dtype."""

    matrix: Tensor

    @property
    def experts(self) -> int:
        return self.matrix.shape[0]

    @property
    def n(self) -> int:
        return self.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def multiply(self, x: Tensor, experts: Tensor) -> Tensor:
        return products(x, self.matrix, experts).float()


@dataclass(frozen=True)
class StackedLinear:
    """y = x W^T + bias of an expert, with rounded inputs if the scheme says so.

    bias  (experts, n) in the activations' dtype, or None
    """

    weight: Stack
    bias: Tensor | None = None
    inputs: RoundedInputs | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rounded(self, x: Tensor) -> Tensor:
        """x, rounded if the scheme says so."""
        return x if self.inputs is None else prepared(self.inputs.of(Rows(x.contiguous())))

    def multiply(self, x: Tensor, experts: Tensor) -> Tensor:
        """y (pairs, n) float32: row i of x (pairs, k), rounded before, with the expert experts[i]."""
        y = self.weight.multiply(x, experts)
        return y if self.bias is None else y + self.bias[experts].float()


@dataclass(frozen=True)
class Experts:
    """The experts of a layer: the sum over a row's experts of weight * down(gate(up(x))).

    gate  its rows are the first half of an expert's
    """

    up: StackedLinear
    down: StackedLinear
    gate: Gate

    @property
    def nbytes_of_each(self) -> int:
        """Bytes of one expert."""
        return (self.up.nbytes + self.down.nbytes) // self.up.weight.experts

    @property
    def weights(self) -> tuple[PackedWeight, PackedWeight] | None:
        """The packed weights of up and down, if one kernel multiplies each; None if not."""
        up, down = self.up.weight, self.down.weight
        if not isinstance(up, PackedStack) or not isinstance(down, PackedStack) or self.up.inputs or self.down.inputs:
            return None
        return (up.weight, down.weight) if up.weight.pair_block == up.n else None

    def begun(self, x: Tensor, chosen: Chosen, dependent: bool, deferred: Deferred | None) -> Tensor:
        """The inner of `ended`: x (m, hidden) through up and gate; `deferred`: the norm still to finish."""
        assert self.weights is not None
        up, down = self.weights
        call = UpCall(x, up, chosen, self.gate, self.up.bias, deferred, dependent, down.words)
        return ops.experts_up(call)

    def ended(self, inner: Tensor, chosen: Chosen, residual: Tensor | None, hints: Hints) -> DownCall:
        """The product that ends the layer: the sum (m, hidden), + residual if there is one."""
        assert self.weights is not None
        return DownCall(inner, self.weights[1], chosen, self.down.bias, residual, **vars(hints))

    def __call__(self, x: Tensor, chosen: Chosen, dependent: bool = False) -> Tensor:
        """The sum (m, hidden) for x (m, hidden), by the kernels if they take these weights and so many rows."""
        if self.weights is None or len(x) > FEW_ROWS:
            return self.in_parts(x, chosen, None)
        inner = self.begun(x.contiguous(), chosen, dependent, None)
        return ops.experts_down(self.ended(inner, chosen, None, Hints(dependent)))

    def in_parts(self, x: Tensor, chosen: Chosen, residual: Tensor | None) -> Tensor:
        """The sum (m, hidden) for x (m, hidden), + residual if there is one, by any weights: each expert's rows
        together."""
        flat = chosen.experts.flatten()
        sums = self.up.multiply(self.up.rounded(x).repeat_interleave(chosen.top, 0), flat)
        inner = gated(sums, self.gate).to(x.dtype)
        parts = self.down.multiply(self.down.rounded(inner), flat) * chosen.weights.flatten().unsqueeze(1)
        return added(parts.unflatten(0, tuple(chosen.experts.shape)), residual).to(x.dtype)


def load_stack(weight: QTensor | RowScaled | Tensor, experts: int, dtype: torch.dtype, paired: bool) -> Stack:
    """The stack of a weight (experts * n, k): packed if the kernels support its kind and shape and `dtype` is half
    precision; otherwise dense in `dtype`.

    paired  True: the halves of an expert's rows are gate and up
    """
    if isinstance(weight, Tensor):
        return DenseStack(weight.to(dtype).contiguous().unflatten(0, (experts, -1)))
    if isinstance(weight, QTensor):
        if dtype not in HALF or reason_against_kernel(weight):
            return DenseStack(weight.dequantize(dtype).unflatten(0, (experts, -1)))
        weight = row_scaled(weight)
    n, k = weight.shape[0] // experts, weight.shape[1]
    pair_block = n if paired else TILE_ROWS
    if dtype not in HALF or n % TILE_ROWS or reason_against_packing(n, k, weight.group_size, pair_block):
        return DenseStack(weight.dequantize().to(dtype).unflatten(0, (experts, -1)))
    return PackedStack(prepack_rows(weight, dtype, pair_block), experts)
