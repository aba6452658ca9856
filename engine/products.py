"""The products of a layer: a linear with the norm before it, and everything that is planned at load."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.quant.kernels import ops, panels
from lowbit.quant.kernels.problem import ACTIVATIONS, Deferred, Rotary
from lowbit.quant.kernels.registry import defers
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.weight import Epilogue, Hints, Linear, Weight, activated


@dataclass(frozen=True)
class Norm:
    """An RMS norm ("rms") or a layer norm ("layer")."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float

    def of(self, rows: Rows) -> Rows:
        """The rows with this norm set."""
        return replace(rows, norm=self.kind, weight=self.weight, bias=self.bias, eps=self.eps)

    def scaled(self, factor: float) -> "Norm":
        """This norm times a factor."""
        return replace(self, weight=self.weight * factor, bias=None if self.bias is None else self.bias * factor)


@dataclass(frozen=True)
class HalfNorm:
    """A half-applied RMS norm of h (m, hidden): z = h * weight; `deferred` is the division that the next product must
    do."""

    norm: Norm
    z: Tensor
    deferred: Deferred


@dataclass(frozen=True)
class Hidden:
    """h (m, hidden), with its next RMS norm half applied if the product that computed h did so."""

    h: Tensor
    half: HalfNorm | None = None


@dataclass(frozen=True)
class Consumer:
    """The product that reads another one's output through an RMS norm, which may be fused into both.

    rows_alone  it reads rows, never panels
    """

    norm: Norm
    weight: Weight
    rows_alone: bool = False

    def reads_panels(self, m: int) -> bool:
        """True if m rows of its input may come in panels."""
        return not self.rows_alone and self.weight.takes_panels(m)


@dataclass(frozen=True)
class Product:
    """activation(norm(before(x)) W^T + bias), with its launch planned.

    norm      norm of the input, or None
    before    activation of the input, fused into its rounding to int8
    after     norm of the output, or None
    keeps     factor of the residual that an output behind `after` is added to
    consumer  the product that reads the output, if the norm in between may be fused
    rows_alone  it reads rows, never panels
    """

    linear: Linear
    norm: Norm | None = None
    activation: str = "none"
    before: str = "none"
    after: Norm | None = None
    keeps: float = 1.0
    float32_out: bool = False
    consumer: Consumer | None = None
    rows_alone: bool = False

    @property
    def weight(self) -> Weight:
        return self.linear.weight

    @property
    def hints(self) -> Hints:
        return self.linear.hints

    def hinted(self, hints: Hints) -> "Product":
        """A copy with these launch hints."""
        return replace(self, linear=replace(self.linear, hints=hints))

    def begun_for(self, reader: "Product") -> "Product":
        """A copy that begins the norm of `reader`, which reads its output, if weights and norm allow it."""
        return replace(self, consumer=consumer_of(self.linear, reader))

    def __call__(self, x: Tensor | Hidden, residual: Tensor | None = None, reader: "Product | None" = None) -> Tensor:
        """The product (m, n) of x (m, k), plus residual (m, n); in panels if `reader`, which multiplies it, takes
        them."""
        rows, deferred = self.taken(x)
        m = panels.shape_of(rows.x)[0]
        in_panels = reader is not None and reader.reads_panels(m) and self.weight.takes_panels(m)
        end = Epilogue(self.linear.bias, residual, self.activation, self.float32_out, in_panels)
        if self.weight.fuses(self.activation):
            return self.weight.multiply(rows, end, self.hints, deferred)
        plain = replace(end, residual=None, activation="none", y_panels=False)
        y = activated(self.weight.multiply(rows, plain, self.hints, deferred), self.activation)
        return y if residual is None else y + residual

    def onto(self, residual: Tensor, x: Tensor) -> Hidden:
        """residual + the product of x, with the next norm half applied if that saves a launch."""
        if self.after is not None:
            y = ops.normalize(self.after.of(Rows(self(x), dependent=self.hints.dependent)))
            return Hidden(torch.add(y, residual, alpha=self.keeps))
        m = panels.shape_of(x)[0]
        if self.consumer is None or not self.shares(self.consumer, m):
            return Hidden(self(x, residual))
        rows, _ = self.taken(x)
        norm, end = self.consumer.norm, Epilogue(self.linear.bias, residual)
        in_panels = self.consumer.reads_panels(m) and self.weight.takes_panels(m)
        h, z, squares = self.weight.multiply_beginning(rows, end, self.hints, norm.weight, in_panels)
        return Hidden(h, HalfNorm(norm, z, Deferred(squares, norm.eps)))

    def turned(self, x: Hidden, rotary: Rotary) -> Tensor:
        """The qkv product: q (m, heads * head_dim), rotated; k and v go to the cache."""
        rows, deferred = self.taken(x)
        return self.weight.multiply_turning(rows, Epilogue(self.linear.bias), self.hints, rotary, deferred)

    def taken(self, x: Tensor | Hidden) -> tuple[Rows, Deferred | None]:
        """The tensor to multiply, and the norm the product must finish (None if x is fully normalized)."""
        if isinstance(x, Hidden):
            half = x.half
            if half is not None and half.norm is self.norm and self.linear.inputs is None:
                return Rows(half.z), half.deferred
            x = x.h
        rows = Rows(x, dependent=self.hints.dependent, activation=self.before)
        return self.linear.rounded(rows if self.norm is None else self.norm.of(rows)), None

    def reads_panels(self, m: int) -> bool:
        """True if m rows of its input, which has no norm, may come in panels."""
        plain = self.norm is None and self.before == "none" and self.linear.inputs is None
        return plain and not self.rows_alone and self.weight.takes_panels(m)

    def shares(self, consumer: Consumer, m: int) -> bool:
        """True if, for m rows, fusing the norm into this product and `consumer` is faster than a norm kernel."""
        problems = self.weight.problem(m), consumer.weight.problem(m)
        return all(problem is not None and defers(problem) for problem in problems)


def consumer_of(made: Linear, reader: Product) -> Consumer | None:
    """`reader` as the consumer of the output of `made`, if weights and norm allow fusing the norm between them."""
    if not made.weight.begins_norms or not is_plain_rms(reader, made.weight.dtype):
        return None
    assert reader.norm is not None
    return Consumer(reader.norm, reader.weight, reader.rows_alone)


def is_plain_rms(reader: Product, dtype: torch.dtype) -> bool:
    """True if `reader` has an RMS norm in `dtype`, and does not round its output."""
    norm = reader.norm
    if norm is None or norm.kind != "rms" or norm.bias is not None or reader.linear.inputs is not None:
        return False
    return norm.weight.dtype == dtype


def rounds_late(up: Linear, down: Linear, activation: str) -> bool:
    """True if `down` can read the output of `up` without an activation: its rounding to int8 then applies the
    activation."""
    return not up.weight.fuses(activation) and down.weight.rounds_inputs and activation in ACTIVATIONS
