"""The torch operators of `lowbit`: schemas, one implementation for every device, shapes for tracing.

Each operator takes a PackedWeight's tensors and numbers one by one, as torch.library wants; the functions above them take
the PackedWeight. On the CPU the registry's last kernel, the plain-torch reference, is what runs: a kernel's test is one
operator on two devices.
"""

import torch
from torch import Tensor

from quant.kernels import wna16_dequantize
from quant.kernels.packed import PackedWeight
from quant.kernels.problem import Call, Rotary, check, problem_of
from quant.kernels.registry import choose_kernel

LIBRARY = torch.library.Library("lowbit", "DEF")
WEIGHT = "Tensor words, Tensor scales, Tensor? zeros, int n, int bits, int group_size"
NORM = "str norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps"
LIBRARY.define(
    f"linear(Tensor x, {WEIGHT}, Tensor? bias, Tensor? residual, {NORM}, str activation, bool float32_out, "
    "bool dependent) -> Tensor"
)
LIBRARY.define(f"gated_linear(Tensor x, {WEIGHT}, Tensor? bias, {NORM}, bool dependent) -> Tensor")
LIBRARY.define(
    f"qkv_rotary_append(Tensor x, {WEIGHT}, Tensor? bias, {NORM}, Tensor positions, Tensor slots, Tensor cosines, "
    "Tensor sines, Tensor(a!) k_cache, Tensor(b!) v_cache, bool dependent) -> Tensor"
)
LIBRARY.define(f"dequantize({WEIGHT}, int k, int pair_block) -> Tensor")


def compute(call: Call) -> Tensor:
    """y of `call` by the first kernel that takes it. ValueError where the tensors do not fit together."""
    check(call)
    if call.x.shape[0] == 0:
        return call.x.new_empty(call.y_shape, dtype=call.y_dtype)
    problem = problem_of(call)
    return choose_kernel(problem).run(call, problem)


def shape_of(call: Call) -> Tensor:
    """An empty y of `call`: what tracing needs."""
    check(call)
    return call.x.new_empty(call.y_shape, dtype=call.y_dtype)


def linear_call(x, words, scales, zeros, n, bits, group_size, bias, residual, norm, norm_weight, norm_bias, norm_eps,
                activation, float32_out, dependent) -> Call:
    weight = PackedWeight(words, scales, zeros, n, x.shape[-1], bits, group_size)
    return Call(x, weight, bias, residual, norm, norm_weight, norm_bias, norm_eps, activation, None, float32_out,
                dependent)


def gated_call(x, words, scales, zeros, n, bits, group_size, bias, norm, norm_weight, norm_bias, norm_eps,
               dependent) -> Call:
    weight = PackedWeight(words, scales, zeros, n, x.shape[-1], bits, group_size, pair_block=n)
    return Call(x, weight, bias, None, norm, norm_weight, norm_bias, norm_eps, "silu_mul", dependent=dependent)


def rotary_call(x, words, scales, zeros, n, bits, group_size, bias, norm, norm_weight, norm_bias, norm_eps, positions,
                slots, cosines, sines, k_cache, v_cache, dependent) -> Call:
    rotary = Rotary(positions, slots, cosines, sines, k_cache, v_cache)
    weight = PackedWeight(words, scales, zeros, n, x.shape[-1], bits, group_size, rotary.head_dim)
    return Call(x, weight, bias, None, norm, norm_weight, norm_bias, norm_eps, rotary=rotary, dependent=dependent)


def dequantize_impl(words, scales, zeros, n, bits, group_size, k, pair_block) -> Tensor:
    return wna16_dequantize.dequantize(PackedWeight(words, scales, zeros, n, k, bits, group_size, pair_block))


for name, call_of in (("linear", linear_call), ("gated_linear", gated_call), ("qkv_rotary_append", rotary_call)):
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, lambda *args, call_of=call_of: compute(call_of(*args)), device)
    torch.library.register_fake(f"lowbit::{name}", lambda *args, call_of=call_of: shape_of(call_of(*args)), lib=LIBRARY)
for device in ("CPU", "CUDA"):
    LIBRARY.impl("dequantize", dequantize_impl, device)
torch.library.register_fake(
    "lowbit::dequantize", lambda words, scales, zeros, n, bits, group_size, k, pair_block: scales.new_empty(n, k),
    lib=LIBRARY,
)


def weight_args(weight: PackedWeight) -> tuple:
    return weight.words, weight.scales, weight.zeros, weight.n, weight.bits, weight.group_size


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None, *,
           norm: str = "none", norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, norm_eps: float = 0.0,
           activation: str = "none", float32_out: bool = False, dependent: bool = False) -> Tensor:
    """activation(norm(x) W^T + bias) + residual.

    x (m, k), weight (n, k) packed in x's dtype, bias (n), residual (m, n); returns (m, n) in x's dtype or float32.
    norm: "none", "rms", "layer"; activation: "none", "gelu", "gelu_tanh", "quick_gelu". Everything between x and y is
    float32. ValueError with the numbers where the tensors do not fit together. problem.Call says more.
    """
    return torch.ops.lowbit.linear(x, *weight_args(weight), bias, residual, norm, norm_weight, norm_bias, norm_eps,
                                   activation, float32_out, dependent)


def gated_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, norm: str = "none",
                 norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, norm_eps: float = 0.0,
                 dependent: bool = False) -> Tensor:
    """silu(gate) * up, (m, n / 2): `weight` is gate's rows over up's, packed with pair_block = n."""
    return torch.ops.lowbit.gated_linear(x, *weight_args(weight), bias, norm, norm_weight, norm_bias, norm_eps, dependent)


def qkv_rotary_append(x: Tensor, weight: PackedWeight, rotary: Rotary, bias: Tensor | None = None, *, norm: str = "none",
                      norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, norm_eps: float = 0.0,
                      dependent: bool = False) -> Tensor:
    """q (m, q_heads * head_dim), rotated; k (rotated) and v are written to rotary's caches.

    `weight` is the rows of q over those of k over those of v, packed with pair_block = head_dim.
    """
    return torch.ops.lowbit.qkv_rotary_append(x, *weight_args(weight), bias, norm, norm_weight, norm_bias, norm_eps,
                                              rotary.positions, rotary.slots, rotary.cosines, rotary.sines,
                                              rotary.k_cache, rotary.v_cache, dependent)


def dequantize(weight: PackedWeight) -> Tensor:
    """The dense weight (n, k) in the packed scales' dtype."""
    return torch.ops.lowbit.dequantize(*weight_args(weight), weight.k, weight.pair_block)
