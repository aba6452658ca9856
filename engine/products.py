"""The products of a decoder, each over a packed weight (one fused operator) or a dense one (torch's own functions)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quant.kernels import ops
from quant.kernels.packed import PackedWeight
from quant.kernels.row_norm import Rows


@dataclass(frozen=True)
class Int8Inputs:
    """Inputs are rounded to int8 before the product: by `scale`, or, where it is None, by each token's absmax / 127."""

    scale: Tensor | None = None


@dataclass(frozen=True)
class Linear:
    """y = x W^T + bias; a dense weight is (n, k) in the activations' dtype."""

    weight: PackedWeight | Tensor
    bias: Tensor | None = None
    inputs: Int8Inputs | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        weight = self.weight
        own = weight.nbytes if isinstance(weight, PackedWeight) else weight.numel() * weight.element_size()
        return own + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())


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
    int8 = "none" if inputs is None else "token" if inputs.scale is None else "tensor"
    scale = None if inputs is None else inputs.scale
    if norm is None:
        return ops.normalize(Rows(x, int8=int8, input_scale=scale, dependent=dependent))
    return ops.normalize(Rows(x, norm.kind, norm.weight, norm.bias, norm.eps, int8, scale, dependent))


def product(
    x: Tensor,
    linear: Linear,
    norm: Norm | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    dependent: bool = False,
    float32_out: bool = False,
) -> Tensor:
    """activation(norm(x) W^T + bias) + residual: x (m, k), residual (m, n); returns (m, n) in x's dtype or float32."""
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
        )
    if residual is not None and linear.bias is None and activation == "none":
        y = torch.addmm(residual, x, linear.weight.T)
    else:
        y = activate(functional.linear(x, linear.weight, linear.bias), activation)
        y = y if residual is None else y + residual
    return y.float() if float32_out else y


def gated_product(x: Tensor, linear: Linear, norm: Norm | None, activation: str, dependent: bool = False) -> Tensor:
    """act(gate) * up (m, n / 2): the weight is gate's rows over up's; `activation` is "silu_mul" or "gelu_tanh_mul"."""
    if isinstance(linear.weight, PackedWeight) and linear.weight.pair_block == linear.weight.n:
        x = prepared(x, linear, norm, dependent)
        return ops.gated_linear(x, linear.weight, linear.bias, dependent=dependent)
    gate, up = product(x, linear, norm, dependent=dependent).chunk(2, -1)
    return activate(gate, activation.removesuffix("_mul")) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of a dense product."""
    if activation == "silu":
        return functional.silu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation in ("gelu", "gelu_tanh"):
        return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x
