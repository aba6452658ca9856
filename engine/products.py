"""The products of a decoder: over a packed weight (one fused operator), int8 by int8, or dense."""

from dataclasses import dataclass

from torch import Tensor

from quant.kernels import ops
from quant.kernels.packed import PackedWeight
from quant.kernels.problem import ACTIVATIONS
from quant.kernels.reference import activate
from quant.kernels.row_norm import Rows
from quant.kernels.w8a8 import Int8Weight


@dataclass(frozen=True)
class Int8Inputs:
    """Inputs are rounded to int8 before the product: by `scale`, or, where it is None, by each token's absmax / 127."""

    scale: Tensor | None = None


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias; a dense weight is (n, k) in the activations' dtype, an Int8Weight is for int8 inputs.

    next_weight  what the product that follows in a step reads: kernels ask for its first bytes ahead
    """

    weight: PackedWeight | Int8Weight | Tensor
    bias: Tensor | None = None
    inputs: Int8Inputs | None = None
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


def prepared(x: Tensor, linear: Linear | None, norm: Norm | None, dependent: bool = False) -> Tensor:
    """x (m, k) as the product takes it: normed, and rounded where the linear says so."""
    inputs = None if linear is None else linear.inputs
    if norm is None and inputs is None:
        return x
    return ops.normalize(rows_of(x, inputs, norm, dependent))


def rows_of(x: Tensor, inputs: Int8Inputs | None, norm: Norm | None, dependent: bool, activation: str = "none") -> Rows:
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
    x: Tensor,
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
        rows = rows_of(x, linear.inputs, norm, dependent, before)
        if activation == "none":
            y = int8_product(rows, linear.weight, linear.bias, residual)
        else:
            y = with_residual(activate(int8_product(rows, linear.weight, linear.bias), activation), residual)
        return y.float() if float32_out else y
    x = prepared(x, linear, norm, dependent)
    if isinstance(linear.weight, PackedWeight):
        return ops.linear(
            x,
            linear.weight,
            linear.bias,
            residual,
            activation=activation,
            float32_out=float32_out,
            dependent=dependent,
            next_weight=linear.next_weight,
        )
    return ops.dense_linear(
        x,
        linear.weight,
        linear.bias,
        residual,
        activation=activation,
        float32_out=float32_out,
        dependent=dependent,
    )


def int8_product(rows: Rows, weight: Int8Weight, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """The rows, rounded to int8, times W^T, plus bias and residual: (m, n) in the rows' dtype."""
    codes, scales = ops.quantize_rows(rows)
    dtype, dependent = rows.x.dtype, rows.dependent
    return ops.w8a8_linear(codes, weight, bias, residual, x_scales=scales, dtype=dtype, dependent=dependent)


def with_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """y + residual, where there is one."""
    return y if residual is None else y + residual


def gated_product(x: Tensor, linear: Linear, norm: Norm | None, activation: str, dependent: bool = False) -> Tensor:
    """act(gate) * up (m, n / 2): the weight is gate's rows over up's; `activation` is "silu_mul" or "gelu_tanh_mul"."""
    if isinstance(linear.weight, PackedWeight) and linear.weight.pair_block == linear.weight.n:
        x = prepared(x, linear, norm, dependent)
        return ops.gated_linear(x, linear.weight, linear.bias, dependent=dependent, next_weight=linear.next_weight)
    if isinstance(linear.weight, Tensor) and activation == "silu_mul":
        x = prepared(x, linear, norm, dependent)
        return ops.dense_linear(x, linear.weight, linear.bias, activation=activation, dependent=dependent)
    gate, up = product(x, linear, norm, dependent=dependent).chunk(2, -1)
    return activate(gate, activation.removesuffix("_mul")) * up
