"""Stacked weights of all experts of a layer, and the products of each row with the experts that it chose."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbit.quant.kernels.packed import (
    HALF,
    TILE_ROWS,
    PackedWeight,
    dequantize_packed,
    prepack_rows,
    reason_against_kernel,
    reason_against_packing,
)
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.row_scaled import RowScaled, row_scaled
from lowbit.quant.kernels.weight import RoundedInputs, activated, prepared
from lowbit.quant.qtensor import QTensor

FEW_PAIRS = 256  # pairs of a row and an expert; with more, each expert's rows are multiplied together


@dataclass(frozen=True)
class Chosen:
    """The experts of every row.

    experts  (m, top) int32
    weights  (m, top) float32
    """

    experts: Tensor
    weights: Tensor


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
        return products(x.float(), dequantize_packed(self.weight).unflatten(0, (self.experts, -1)), experts)


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
    """The experts of a layer: the sum over a row's experts of weight * down(activation(up(x))).

    activation  with a gate, whose rows are the first half of an expert's
    """

    up: StackedLinear
    down: StackedLinear
    activation: str

    def __call__(self, x: Tensor, chosen: Chosen, residual: Tensor) -> Tensor:
        """residual + the sum (m, hidden) for x (m, hidden), added in the order of each row's experts."""
        m, top = chosen.experts.shape
        flat = chosen.experts.flatten()
        sums = self.up.multiply(self.up.rounded(x).repeat_interleave(top, 0), flat)
        inner = activated(sums, self.activation).to(x.dtype)
        parts = self.down.multiply(self.down.rounded(inner), flat) * chosen.weights.flatten().unsqueeze(1)
        total = residual.float()
        for part in parts.unflatten(0, (m, top)).unbind(1):
            total = total + part
        return total.to(x.dtype)

    @property
    def nbytes_of_each(self) -> int:
        """Bytes of one expert."""
        return (self.up.nbytes + self.down.nbytes) // self.up.weight.experts


def products(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    """Row i of x (pairs, k) times expert experts[i] of w (experts, n, k).

    Few pairs on a GPU are one product, which reads no number back and so can be captured; its copy of the weights is
    the price.
    """
    if x.is_cuda and len(x) <= FEW_PAIRS:
        return torch.bmm(w[experts.long()], x.unsqueeze(2)).squeeze(2)
    y = x.new_empty(len(x), w.shape[1])
    for expert, pairs in pairs_by_expert(experts, len(w)):
        y[pairs] = x[pairs] @ w[expert].T
    return y


def pairs_by_expert(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that was chosen, with the indices of its pairs, in their order."""
    order = experts.argsort(stable=True)
    first = 0
    for expert, pairs in enumerate(torch.bincount(experts, minlength=count).tolist()):
        if pairs:
            yield expert, order[first : first + pairs]
        first += pairs


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
