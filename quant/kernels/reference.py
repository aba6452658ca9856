"""The product with a packed weight in plain torch: the reference for all kernels, and the fallback."""

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.quant.kernels import panels
from lowbit.quant.kernels.extension import EXTENSION, reason_against_device
from lowbit.quant.kernels.packed import dequantize_packed, unshuffled
from lowbit.quant.kernels.problem import PART, Deferred, NextNorm, PackedCall, Problem, Rotary


def reason_against(problem: Problem) -> str | None:
    """The reason why plain torch must not be used, or None: an extension exists, but not for this GPU."""
    if problem.capability is None or EXTENSION is None:
        return None
    return reason_against_device(problem.capability)


def run(call: PackedCall) -> Tensor:
    """y of `call`, with the product in float32."""
    return compute(call, dequantize_packed(call.weight))


def compute(call: PackedCall, w: Tensor) -> Tensor:
    """y of `call` with the dense weight `w` (n, k). The product is computed in w's dtype, everything else in
    float32."""
    x = normalize(call) if call.x_scales is None else values_of(call.x, call.x_scales)
    sums = (x.to(w.dtype) @ w.T).float()
    if call.deferred is not None:
        sums = sums * inverse_deviation(call.deferred)
    if call.bias is not None:
        sums = sums + call.bias.float()
    if call.rotary is not None:
        return rotate_and_store(sums, call.rotary, call.dtype)
    y = activate(sums, call.activation)
    if call.residual is not None:
        y = y + call.residual.float()
    y = y.to(call.y_dtype)
    if call.next_norm is not None:
        begin_norm(y, call.next_norm)
    return panels.panels_of(y) if call.y_panels else y


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """The rows (m, k) float32 whose shuffled codes and scales are given."""
    return unshuffled(codes).float() * scales.unsqueeze(1)


def in_halves(call: PackedCall) -> PackedCall:
    """`call` with x in half precision."""
    if call.x_scales is None:
        return call
    return replace(call, x=values_of(call.x, call.x_scales).to(call.dtype), x_scales=None)


def inverse_deviation(deferred: Deferred) -> Tensor:
    """1 / rms(h), (m, 1) float32."""
    squares = deferred.squares
    return torch.rsqrt(squares.sum(-1, keepdim=True) / (squares.shape[1] * PART) + deferred.eps)


def begin_norm(y: Tensor, norm: NextNorm) -> None:
    """Write z and squares of the norm of y (m, n)."""
    h, most = y.float(), torch.finfo(y.dtype).max
    z = h * norm.weight.float()
    z = torch.where(h.isfinite(), z.clamp(-most, most), z).to(y.dtype)
    norm.z.copy_(panels.panels_of(z) if norm.z.ndim == 3 else z)
    norm.squares.copy_(h.square().unflatten(-1, (-1, PART)).sum(-1))


def divided(x: Tensor, deferred: Deferred) -> Tensor:
    """x (m, k) with its deferred norm finished, in its dtype: for kernels that cannot divide sums."""
    return (x.float() * inverse_deviation(deferred)).to(x.dtype)


def whole(call: PackedCall) -> PackedCall:
    """`call` with rows for x and y, its deferred norm applied, and without next_norm, which `begin_norm` computes."""
    x = panels.rows_of(call.x)
    x = x if call.deferred is None else divided(x, call.deferred)
    return replace(call, x=x, deferred=None, next_norm=None, y_panels=False)


def normalize(call: PackedCall) -> Tensor:
    """norm(x), rounded to x's dtype."""
    if call.norm_weight is None:
        return panels.rows_of(call.x)
    x = call.x.float()
    if call.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + call.norm_eps) * call.norm_weight.float()
    if call.norm_bias is not None:
        x = x + call.norm_bias.float()
    return x.to(call.x.dtype)


def activate(sums: Tensor, activation: str) -> Tensor:
    """The activation of sums (m, n), in their dtype. silu_mul halves n."""
    if activation == "silu_mul":
        gate, up = sums.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    if activation == "silu":
        return torch.nn.functional.silu(sums)
    if activation == "quick_gelu":
        return sums * torch.sigmoid(1.702 * sums)
    if activation in ("gelu", "gelu_tanh"):
        return torch.nn.functional.gelu(sums, approximate="tanh" if activation == "gelu_tanh" else "none")
    return sums


def rotate_and_store(sums: Tensor, rotary: Rotary, dtype: torch.dtype) -> Tensor:
    """q rotated, (m, q_heads * head_dim). k (rotated) and v are written to rotary's slots of the caches."""
    heads = sums.unflatten(-1, (-1, rotary.head_dim))
    turning, v = heads[:, : -rotary.kv_heads], heads[:, -rotary.kv_heads :]
    low, high = turning.chunk(2, -1)
    cosines = rotary.cosines[rotary.positions].unsqueeze(1)
    sines = rotary.sines[rotary.positions].unsqueeze(1)
    turned = torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1).to(dtype)
    rotary.k_cache[rotary.slots] = turned[:, -rotary.kv_heads :]
    rotary.v_cache[rotary.slots] = v.to(dtype)
    return turned[:, : -rotary.kv_heads].flatten(1).contiguous()
