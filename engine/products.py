"""The products of a decoder, each over a packed weight (one fused operator) or a dense one (torch's own functions)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quant.kernels import ops
from quant.kernels.packed import PackedWeight


@dataclass(frozen=True)
class Int8Inputs:
    """Inputs are rounded to int8 before the product: by `scale`, or, where it is None, by each token's absmax / 127."""

    scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        scale = self.scale
        if scale is None:
            scale = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return ((values / scale).round().clamp(-128, 127) * scale).to(x.dtype)


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

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm_arguments(norm: Norm | None) -> dict[str, Any]:
    """`norm` as the fused operators take it."""
    if norm is None:
        return {}
    return {"norm": norm.kind, "norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}


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
    x, norm = prepared(x, linear, norm)
    if isinstance(linear.weight, PackedWeight):
        fused = norm_arguments(norm) | {"activation": activation, "float32_out": float32_out, "dependent": dependent}
        return ops.linear(x, linear.weight, linear.bias, residual, **fused)
    x = x if norm is None else norm(x)
    if residual is not None and linear.bias is None and activation == "none":
        y = torch.addmm(residual, x, linear.weight.T)
    else:
        y = activate(functional.linear(x, linear.weight, linear.bias), activation)
        y = y if residual is None else y + residual
    return y.float() if float32_out else y


def gated_product(x: Tensor, linear: Linear, norm: Norm | None, activation: str, dependent: bool = False) -> Tensor:
    """act(gate) * up (m, n / 2): the weight is gate's rows over up's; `activation` is "silu_mul" or "gelu_tanh_mul"."""
    x, norm = prepared(x, linear, norm)
    if isinstance(linear.weight, PackedWeight) and linear.weight.pair_block == linear.weight.n:
        fused = norm_arguments(norm)
        return ops.gated_linear(x, linear.weight, linear.bias, dependent=dependent, **fused)
    gate, up = product(x, linear, norm, dependent=dependent).chunk(2, -1)
    return activate(gate, activation.removesuffix("_mul")) * up


def prepared(x: Tensor, linear: Linear, norm: Norm | None) -> tuple[Tensor, Norm | None]:
    """x and the norm that is left to do: inputs that are rounded are normed first."""
    if linear.inputs is None:
        return x, norm
    return linear.inputs(x if norm is None else norm(x)), None


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of a dense product."""
    if activation == "silu":
        return functional.silu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation in ("gelu", "gelu_tanh"):
        return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x
