"""The products of a decoder: over a packed weight (one fused operator), int8 by int8, or dense."""

from dataclasses import dataclass

from torch import Tensor

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import ACTIVATIONS, PART, PARTS, Deferred, Problem, place_of
from lowbit.quant.kernels.reference import activate
from lowbit.quant.kernels.registry import defers
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.w8a8 import Int8Weight
from lowbit.quant.numbers import INT8, Number
from lowbit.quant.numerics import fake_quantize_inputs


@dataclass(frozen=True)
class RoundedInputs:
    """Inputs are rounded to `number` before the product: by `scale`, or, where it is None, by each token's own."""

    number: Number
    scale: Tensor | None = None


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias; a dense weight is (n, k) in the activations' dtype, an Int8Weight is for int8 inputs.

    next_weight  what the product that follows in a step reads: kernels ask for its first bytes ahead
    """

    weight: PackedWeight | Int8Weight | Tensor
    bias: Tensor | None = None
    inputs: RoundedInputs | None = None
    next_weight: Tensor | None = None

    @property
    def bulk(self) -> Tensor | None:
        """The tensor that is most of what a product reads, where it is one run of memory."""
        weight = self.weight
        if isinstance(weight, PackedWeight):
            return weight.words
        tensor = weight.codes if isinstance(weight, Int8Weight) else weight
        return tensor if tensor.is_contiguous() else None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True)
class Norm:
    """An RMS ("rms") or layer norm ("layer")."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Begun:
    """A norm of h (m, hidden) that the product which made h has begun: `z` and `deferred` are the next one's inputs."""

    norm: Norm
    z: Tensor
    deferred: Deferred


@dataclass(frozen=True)
class Hidden:
    """h (m, hidden), and its next norm where that was begun."""

    h: Tensor
    begun: Begun | None = None


@dataclass(frozen=True)
class Reader:
    """The product that reads what another one makes, and the norm between them."""

    linear: Linear
    norm: Norm | None


def problem_of(linear: Linear, m: int) -> Problem:
    """What the kernel for m rows of x is chosen by; the weight is packed or dense."""
    w = linear.weight
    if isinstance(w, PackedWeight):
        return Problem(m, w.n, w.k, w.bits, w.group_size, w.dtype, *place_of(w.words.device))
    assert isinstance(w, Tensor)
    n, k = w.shape
    return Problem(m, n, k, 16, -1, w.dtype, *place_of(w.device))


def begins_norm(linear: Linear, reader: Reader, m: int) -> bool:
    """Whether `linear` shall begin the norm of `reader`: an RMS norm, and kernels on both sides that share it out."""
    norm, made, read = reader.norm, linear.weight, reader.linear.weight
    if norm is None or norm.kind != "rms" or norm.bias is not None:
        return False
    if not isinstance(made, PackedWeight) or made.n % (PART * PARTS):
        return False
    if isinstance(read, Int8Weight) or reader.linear.inputs is not None or norm.weight.dtype != made.dtype:
        return False
    return defers(problem_of(linear, m)) and defers(problem_of(reader.linear, m))


def beginning_product(x: Tensor, linear: Linear, residual: Tensor, norm: Norm, dependent: bool = False) -> Hidden:
    """x W^T + bias + residual (m, n), and its norm begun; the weight is packed: see begins_norm."""
    assert isinstance(linear.weight, PackedWeight)
    x = prepared(x, linear, None, dependent)
    sides = linear.bias, residual
    ahead = linear.next_weight
    h, z, squares = ops.linear_deferring(x, linear.weight, norm.weight, *sides, dependent=dependent, next_weight=ahead)
    return Hidden(h, Begun(norm, z, Deferred(squares, norm.eps)))


def taken(x: Tensor | Hidden, linear: Linear, norm: Norm | None, dependent: bool) -> tuple[Tensor, Deferred | None]:
    """x as the product takes it, and what that lacks of the norm."""
    if isinstance(x, Hidden):
        begun = x.begun
        if begun is not None and begun.norm is norm and linear.inputs is None:
            return begun.z, begun.deferred
        x = x.h
    return prepared(x, linear, norm, dependent), None


def prepared(x: Tensor, linear: Linear | None, norm: Norm | None, dependent: bool = False) -> Tensor:
    """x (m, k) as the product takes it: normed, and rounded where the linear says so."""
    inputs = None if linear is None else linear.inputs
    if inputs is not None and inputs.number != INT8:  # which no kernel rounds to: plain torch
        return fake_quantize_inputs(prepared(x, None, norm, dependent), inputs.number, inputs.scale)
    if norm is None and inputs is None:
        return x
    return ops.normalize(rows_of(x, inputs, norm, dependent))


def rows_of(
    x: Tensor, inputs: RoundedInputs | None, norm: Norm | None, dependent: bool, activation: str = "none"
) -> Rows:
    """What happens to x (m, k) before a product."""
    int8 = "none" if inputs is None else "token" if inputs.scale is None else "tensor"
    scale = None if inputs is None else inputs.scale
    if norm is None:
        return Rows(x, int8=int8, input_scale=scale, dependent=dependent, activation=activation)
    return Rows(x, norm.kind, norm.weight, norm.bias, norm.eps, int8, scale, dependent, activation)


def rounds_late(up: Linear, down: Linear, activation: str) -> bool:
    """Whether `down` takes what `up` makes as it is: its rounding to int8 then applies the activation on the way."""
    return isinstance(up.weight, Int8Weight) and isinstance(down.weight, Int8Weight) and activation in ACTIVATIONS


def product(
    x: Tensor | Hidden,
    linear: Linear,
    norm: Norm | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    dependent: bool = False,
    float32_out: bool = False,
    before: str = "none",
) -> Tensor:
    """activation(norm(x) W^T + bias) + residual: x (m, k), residual (m, n); returns (m, n) in x's dtype or float32.

    before  an activation of x itself, where the weight takes int8 inputs: see rounds_late
    """
    if isinstance(linear.weight, Int8Weight):
        rows = rows_of(x.h if isinstance(x, Hidden) else x, linear.inputs, norm, dependent, before)
        if activation == "none":
            y = int8_product(rows, linear.weight, linear.bias, residual)
        else:
            y = with_residual(activate(int8_product(rows, linear.weight, linear.bias), activation), residual)
        return y.float() if float32_out else y
    inputs, deferred = taken(x, linear, norm, dependent)
    if isinstance(linear.weight, PackedWeight):
        return ops.linear(
            inputs,
            linear.weight,
            linear.bias,
            residual,
            activation=activation,
            float32_out=float32_out,
            dependent=dependent,
            next_weight=linear.next_weight,
            deferred=deferred,
        )
    return ops.dense_linear(
        inputs,
        linear.weight,
        linear.bias,
        residual,
        activation=activation,
        float32_out=float32_out,
        dependent=dependent,
        deferred=deferred,
    )


def int8_product(rows: Rows, weight: Int8Weight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """The rows, rounded to int8, times W^T, plus bias and residual: (m, n) in the rows' dtype."""
    codes, scales = ops.quantize_rows(rows)
    dtype, dependent = rows.x.dtype, rows.dependent
    return ops.w8a8_linear(codes, weight, bias, residual, x_scales=scales, dtype=dtype, dependent=dependent)


def with_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """y + residual, where there is one."""
    return y if residual is None else y + residual


def gated_product(
    x: Tensor | Hidden, linear: Linear, norm: Norm | None, activation: str, dependent: bool = False
) -> Tensor:
    """act(gate) * up (m, n / 2): the weight is gate's rows over up's; `activation` is "silu_mul" or "gelu_tanh_mul"."""
    if isinstance(linear.weight, PackedWeight) and linear.weight.pair_block == linear.weight.n:
        inputs, deferred = taken(x, linear, norm, dependent)
        ahead = linear.next_weight
        return ops.gated_linear(
            inputs, linear.weight, linear.bias, dependent=dependent, next_weight=ahead, deferred=deferred
        )
    if isinstance(linear.weight, Tensor) and activation == "silu_mul":
        inputs, deferred = taken(x, linear, norm, dependent)
        return ops.dense_linear(
            inputs, linear.weight, linear.bias, activation=activation, dependent=dependent, deferred=deferred
        )
    gate, up = product(x, linear, norm, dependent=dependent).chunk(2, -1)
    return activate(gate, activation.removesuffix("_mul")) * up
