"""The torch operators of `lowbit`: schemas, one implementation for all devices, and shape functions for torch.compile.

Each operator takes the tensors and numbers of a PackedWeight separately, as torch.library requires; the functions below
take the PackedWeight. On a CPU the registry's last kernel runs, the plain-torch reference, so that a kernel is tested
by running one operator on two devices.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import (
    choose_tokens,
    decode_attention,
    dense,
    gptq_block,
    reference,
    row_norm,
    w8a8,
    wna16_dequantize,
)
from lowbit.quant.kernels.choose_tokens import Choice, Cursor, Noise
from lowbit.quant.kernels.decode_attention import Append, Attention, KVCache
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PART, Call, Deferred, NextNorm, Rotary, check, problem_of
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.w8a8 import Int8Call, Int8Weight
from lowbit.quant.numbers import Number

LIBRARY = torch.library.Library("lowbit", "DEF")
WEIGHT = "Tensor words, Tensor scales, Tensor? zeros, int n, int k, int bits, int group_size, int pair_block"
NORM = "str norm, Tensor? norm_weight, Tensor? norm_bias, float norm_eps"
LAUNCH = "bool dependent, Tensor? next_weight=None"
DEFERRED = "Tensor? squares=None, float squares_eps=0.0"
LIBRARY.define(
    f"linear(Tensor x, {WEIGHT}, Tensor? bias, Tensor? residual, {NORM}, str activation, bool float32_out, {LAUNCH}, "
    f"{DEFERRED}) -> Tensor"
)
LIBRARY.define(
    f"linear_deferring(Tensor x, {WEIGHT}, Tensor? bias, Tensor? residual, Tensor next_norm, {LAUNCH}) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"gated_linear(Tensor x, {WEIGHT}, Tensor? bias, {NORM}, {LAUNCH}, {DEFERRED}) -> Tensor")
LIBRARY.define(
    f"qkv_rotary_append(Tensor x, {WEIGHT}, Tensor? bias, {NORM}, Tensor positions, Tensor slots, Tensor cosines, "
    f"Tensor sines, Tensor(a!) k_cache, Tensor(b!) v_cache, {LAUNCH}, {DEFERRED}) -> Tensor"
)
LIBRARY.define(f"logits_argmax(Tensor x, {WEIGHT}, {NORM}, {LAUNCH}) -> (Tensor, Tensor)")
LIBRARY.define(f"dequantize({WEIGHT}) -> Tensor")
LIBRARY.define(
    "gptq_block(Tensor w, Tensor factor, Tensor scales, Tensor zeros, float low, float high, float fineness, "
    "float least) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "row_norm(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, str int8, Tensor? input_scale, "
    "bool dependent, str activation) -> Tensor"
)
LIBRARY.define(
    "quantize_rows(Tensor x, str norm, Tensor? weight, Tensor? bias, float eps, str int8, Tensor? input_scale, "
    "bool dependent, str activation) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "w8a8_linear(Tensor x, Tensor? x_scales, Tensor? input_scale, Tensor codes, Tensor scales, Tensor? bias, "
    "Tensor? residual, ScalarType dtype, bool dependent) -> Tensor"
)
LIBRARY.define(
    "dense_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, bool float32_out, "
    f"bool dependent, {DEFERRED}) -> Tensor"
)
LIBRARY.define(
    "append_heads(Tensor qkv, Tensor positions, Tensor slots, Tensor cosines, Tensor sines, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor? q_norm, Tensor? k_norm, float norm_eps, "
    "bool dependent) -> Tensor"
)
LIBRARY.define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scales, Tensor? v_scales, Tensor starts, "
    "Tensor positions, float scale, int window, float softcap, int longest, bool dependent) -> Tensor"
)
LIBRARY.define(
    "choose_tokens(Tensor scores, Tensor(a!) tokens, Tensor(b!) written, Tensor(c!)? positions, Tensor(d!)? slots, "
    "int last, Tensor? temperature, Tensor? seed, bool dependent) -> ()"
)


def compute(call: Call) -> Tensor:
    """y of `call` by the first kernel that accepts it. ValueError if the tensors do not fit together."""
    check(call)
    if call.x.shape[0] == 0:
        return call.x.new_empty(call.y_shape, dtype=call.y_dtype)
    problem = problem_of(call)
    kernel = choose_kernel(problem)
    if kernel.defers or (call.deferred is None and call.next_norm is None):
        return kernel.run(call, problem)
    y = kernel.run(reference.whole(call), problem)
    if call.next_norm is not None:
        reference.begin_norm(y, call.next_norm)
    return y


def shape_of(call: Call) -> Tensor:
    """Shape function for torch.compile (fake tensor): an empty y of `call`."""
    check(call)
    return call.x.new_empty(call.y_shape, dtype=call.y_dtype)


def deferred_of(squares: Tensor | None, eps: float) -> Deferred | None:
    """The Deferred from an operator's last arguments."""
    return None if squares is None else Deferred(squares, eps)


def linear_call(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    pair_block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    activation: str,
    float32_out: bool,
    dependent: bool,
    next_weight: Tensor | None = None,
    squares: Tensor | None = None,
    squares_eps: float = 0.0,
) -> Call:
    """The Call from lowbit::linear's arguments."""
    weight = PackedWeight(words, scales, zeros, n, k, bits, group_size, pair_block)
    sides = bias, residual, norm, norm_weight, norm_bias, norm_eps
    deferred = deferred_of(squares, squares_eps)
    return Call(x, weight, *sides, activation, None, float32_out, dependent, next_weight, deferred)


def deferring_call(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    pair_block: int,
    bias: Tensor | None,
    residual: Tensor | None,
    next_norm: Tensor,
    dependent: bool,
    next_weight: Tensor | None = None,
) -> tuple[Call, NextNorm]:
    """The Call from lowbit::linear_deferring's arguments, and its additional outputs."""
    weight = PackedWeight(words, scales, zeros, n, k, bits, group_size, pair_block)
    m = x.shape[0]
    norm = NextNorm(next_norm, x.new_empty(m, n), x.new_empty(m, n // PART, dtype=torch.float32))
    return Call(x, weight, bias, residual, dependent=dependent, next_weight=next_weight, next_norm=norm), norm


def with_norm(run: Callable[[Call], Tensor], call: Call, norm: NextNorm) -> tuple[Tensor, Tensor, Tensor]:
    """y of `call`, z, and sums of squares."""
    return run(call), norm.z, norm.squares


def gated_call(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    pair_block: int,
    bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dependent: bool,
    next_weight: Tensor | None = None,
    squares: Tensor | None = None,
    squares_eps: float = 0.0,
) -> Call:
    """The Call from lowbit::gated_linear's arguments."""
    weight = PackedWeight(words, scales, zeros, n, k, bits, group_size, pair_block)
    sides = bias, None, norm, norm_weight, norm_bias, norm_eps
    deferred = deferred_of(squares, squares_eps)
    return Call(x, weight, *sides, "silu_mul", dependent=dependent, next_weight=next_weight, deferred=deferred)


def rotary_call(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    pair_block: int,
    bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    positions: Tensor,
    slots: Tensor,
    cosines: Tensor,
    sines: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    dependent: bool,
    next_weight: Tensor | None = None,
    squares: Tensor | None = None,
    squares_eps: float = 0.0,
) -> Call:
    """The Call from lowbit::qkv_rotary_append's arguments."""
    rotary = Rotary(positions, slots, cosines, sines, k_cache, v_cache)
    weight = PackedWeight(words, scales, zeros, n, k, bits, group_size, pair_block)
    sides = bias, None, norm, norm_weight, norm_bias, norm_eps
    deferred = deferred_of(squares, squares_eps)
    return Call(x, weight, *sides, rotary=rotary, dependent=dependent, next_weight=next_weight, deferred=deferred)


def logits_call(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    pair_block: int,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dependent: bool,
    next_weight: Tensor | None = None,
) -> Call:
    """The Call from lowbit::logits_argmax's arguments."""
    weight = PackedWeight(words, scales, zeros, n, k, bits, group_size, pair_block)
    sides = None, None, norm, norm_weight, norm_bias, norm_eps
    return Call(x, weight, *sides, float32_out=True, dependent=dependent, next_weight=next_weight)


def with_argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and the index of each row's largest."""
    return logits, logits.argmax(-1)


def dequantize_impl(
    words: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, group_size: int, pair_block: int
) -> Tensor:
    """lowbit::dequantize: the dense weight (n, k)."""
    return wna16_dequantize.dequantize(PackedWeight(words, scales, zeros, n, k, bits, group_size, pair_block))


def dequantize_shape(
    words: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, group_size: int, pair_block: int
) -> Tensor:
    """Shape function for torch.compile (fake tensor): an empty dense weight."""
    return scales.new_empty(n, k)


def append_call(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cosines: Tensor,
    sines: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    dependent: bool,
) -> Append:
    """The Append from lowbit::append_heads's arguments."""
    cache = KVCache(k_cache, v_cache, k_scales, v_scales)
    return Append(qkv, positions, slots, cosines, sines, cache, q_norm, k_norm, norm_eps, dependent)


def append_shape(call: Append) -> Tensor:
    """Shape function for torch.compile (fake tensor): an empty q of `call`."""
    return call.qkv.new_empty(call.qkv.shape[0], call.heads * call.cache.head_dim)


def attention_call(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    starts: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    longest: int,
    dependent: bool,
) -> Attention:
    """The Attention from lowbit::decode_attention's arguments."""
    cache = KVCache(k_cache, v_cache, k_scales, v_scales)
    return Attention(q, cache, starts, positions, scale, window, softcap, longest, dependent)


def int8_call(
    x: Tensor,
    x_scales: Tensor | None,
    input_scale: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    dependent: bool,
) -> Int8Call:
    """The Int8Call from lowbit::w8a8_linear's arguments. x is rounded to int8 here, if it is not int8 already.

    After such a rounding the product may always start early: the rounding kernel has waited for all previous work.
    """
    weight = Int8Weight(codes, scales)
    if x.dtype == torch.int8:
        if x_scales is None or input_scale is not None:
            raise ValueError("x in int8 comes with x_scales, and without an input_scale")
        return Int8Call(x, x_scales, weight, bias, residual, dtype, dependent)
    if x_scales is not None:
        raise ValueError(f"x is {x.dtype}: x_scales belong to x in int8")
    rounding = "token" if input_scale is None else "tensor"
    rows = row_norm.quantize(Rows(x, int8=rounding, input_scale=input_scale, dependent=dependent))
    return Int8Call(*rows, weight, bias, residual, dtype, dependent=True)


def compute_by(kind: ModuleType, call: Int8Call | DenseCall) -> Tensor:
    """y of `call` by the first kernel that accepts it; `kind` is the module of such calls, w8a8 or dense.

    ValueError if the tensors do not fit together.
    """
    kind.check(call)
    if 0 in call.y_shape:
        return call.x.new_empty(call.y_shape, dtype=call.y_dtype)
    problem = kind.problem_of(call)
    return choose_kernel(problem).run(call, problem)


def dense_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    float32_out: bool,
    dependent: bool,
    squares: Tensor | None = None,
    squares_eps: float = 0.0,
) -> DenseCall:
    """The DenseCall from lowbit::dense_linear's arguments."""
    deferred = deferred_of(squares, squares_eps)
    return DenseCall(x, weight, bias, residual, activation, float32_out, dependent, deferred)


def dense_shape(call: DenseCall) -> Tensor:
    """Shape function for torch.compile (fake tensor): an empty y of `call`."""
    dense.check(call)
    return call.x.new_empty(call.y_shape, dtype=call.y_dtype)


def choice_of(
    scores: Tensor,
    tokens: Tensor,
    written: Tensor,
    positions: Tensor | None,
    slots: Tensor | None,
    last: int,
    temperature: Tensor | None,
    seed: Tensor | None,
    dependent: bool,
) -> Choice:
    """The Choice from lowbit::choose_tokens's arguments."""
    cursor = None if positions is None or slots is None else Cursor(positions, slots, last)
    noise = None if temperature is None or seed is None else Noise(temperature, seed)
    return Choice(scores, tokens, written, cursor, noise, dependent)


def codes_shape(call: Rows) -> tuple[Tensor, Tensor]:
    """Shape function for torch.compile (fake tensor): empty codes and scales of `call`."""
    return call.x.new_empty(call.shape, dtype=torch.int8), call.x.new_empty(call.shape[0], dtype=torch.float32)


def register(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator's implementation, the same for both devices, and its shape function."""
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"lowbit::{name}", fake, lib=LIBRARY)


register("linear", lambda *args: compute(linear_call(*args)), lambda *args: shape_of(linear_call(*args)))
register(
    "linear_deferring",
    lambda *args: with_norm(compute, *deferring_call(*args)),
    lambda *args: with_norm(shape_of, *deferring_call(*args)),
)
register("gated_linear", lambda *args: compute(gated_call(*args)), lambda *args: shape_of(gated_call(*args)))
register("qkv_rotary_append", lambda *args: compute(rotary_call(*args)), lambda *args: shape_of(rotary_call(*args)))
register(
    "logits_argmax",
    lambda *args: with_argmax(compute(logits_call(*args))),
    lambda *args: with_argmax(shape_of(logits_call(*args))),
)
register("dequantize", dequantize_impl, dequantize_shape)
register("gptq_block", gptq_block.gptq_block, lambda w, *args: (torch.empty_like(w), torch.empty_like(w)))
register("row_norm", lambda *args: row_norm.run(Rows(*args)), lambda x, *args: x.new_empty(Rows(x, *args).shape))
register("quantize_rows", lambda *args: row_norm.quantize(Rows(*args)), lambda *args: codes_shape(Rows(*args)))
register(
    "w8a8_linear",
    lambda *args: compute_by(w8a8, int8_call(*args)),
    lambda x, x_scales, input_scale, codes, scales, bias, residual, dtype, dependent: x.new_empty(
        x.shape[0], codes.shape[0], dtype=dtype
    ),
)
register(
    "dense_linear",
    lambda *args: compute_by(dense, dense_call(*args)),
    lambda *args: dense_shape(dense_call(*args)),
)
register(
    "append_heads",
    lambda *args: decode_attention.append(append_call(*args)),
    lambda *args: append_shape(append_call(*args)),
)
register(
    "decode_attention",
    lambda *args: decode_attention.attend(attention_call(*args)),
    lambda q, *args: torch.empty_like(q),
)
register(
    "choose_tokens",
    lambda *args: choose_tokens.choose(choice_of(*args)),
    lambda *args: choose_tokens.check(choice_of(*args)),
)


def weight_args(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None, int, int, int, int, int]:
    """The weight as separate arguments."""
    sizes = weight.n, weight.k, weight.bits, weight.group_size, weight.pair_block
    return weight.words, weight.scales, weight.zeros, *sizes


def deferred_args(deferred: Deferred | None) -> tuple[Tensor | None, float]:
    """The deferred norm as separate arguments."""
    return (None, 0.0) if deferred is None else (deferred.squares, deferred.eps)


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    activation: str = "none",
    float32_out: bool = False,
    dependent: bool = False,
    next_weight: Tensor | None = None,
    deferred: Deferred | None = None,
) -> Tensor:
    """activation(norm(x) W^T + bias) + residual.

    x (m, k), weight (n, k) packed in x's dtype, bias (n), residual (m, n); returns (m, n) in x's dtype or float32.
    norm: "none", "rms", "layer"; activation: "none", "gelu", "gelu_tanh", "quick_gelu". Everything between x and y is
    float32. ValueError with numbers if the tensors do not fit together. See problem.Call.
    """
    return torch.ops.lowbit.linear(
        x,
        *weight_args(weight),
        bias,
        residual,
        norm,
        norm_weight,
        norm_bias,
        norm_eps,
        activation,
        float32_out,
        dependent,
        next_weight,
        *deferred_args(deferred),
    )


def linear_deferring(
    x: Tensor,
    weight: PackedWeight,
    next_norm: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    dependent: bool = False,
    next_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x W^T + bias + residual, and the inputs of the next product with rms_norm(h), without a norm kernel in
    between.

    x (m, k), weight (n, k), n a multiple of 64, next_norm (n) the norm's weight. Returns h (m, n), z = h * next_norm
    (m, n), and sums of h's squares (m, n / 16) float32: x and Deferred of the next product. See problem.NextNorm.
    """
    weights = weight_args(weight)
    return torch.ops.lowbit.linear_deferring(x, *weights, bias, residual, next_norm, dependent, next_weight)


def gated_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    dependent: bool = False,
    next_weight: Tensor | None = None,
    deferred: Deferred | None = None,
) -> Tensor:
    """silu(gate) * up, (m, n / 2). `weight` has gate's rows followed by up's, packed with pair_block = n."""
    norms, last = (norm, norm_weight, norm_bias, norm_eps), deferred_args(deferred)
    return torch.ops.lowbit.gated_linear(x, *weight_args(weight), bias, *norms, dependent, next_weight, *last)


def qkv_rotary_append(
    x: Tensor,
    weight: PackedWeight,
    rotary: Rotary,
    bias: Tensor | None = None,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    dependent: bool = False,
    next_weight: Tensor | None = None,
    deferred: Deferred | None = None,
) -> Tensor:
    """q (m, q_heads * head_dim), rotated; k (rotated) and v are written to rotary's caches.

    `weight` has the rows of q, then k, then v, packed with pair_block = head_dim.
    """
    return torch.ops.lowbit.qkv_rotary_append(
        x,
        *weight_args(weight),
        bias,
        norm,
        norm_weight,
        norm_bias,
        norm_eps,
        rotary.positions,
        rotary.slots,
        rotary.cosines,
        rotary.sines,
        rotary.k_cache,
        rotary.v_cache,
        dependent,
        next_weight,
        *deferred_args(deferred),
    )


def logits_argmax(
    x: Tensor,
    weight: PackedWeight,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 0.0,
    dependent: bool = False,
    next_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """norm(x) W^T as float32 (m, n), and the index of each row's largest value, int64 (m): the last product of a greedy
    step."""
    norms = norm, norm_weight, norm_bias, norm_eps
    return torch.ops.lowbit.logits_argmax(x, *weight_args(weight), *norms, dependent, next_weight)


def dequantize(weight: PackedWeight) -> Tensor:
    """The dense weight (n, k) in the packed scales' dtype."""
    return torch.ops.lowbit.dequantize(*weight_args(weight))


def rows_args(call: Rows) -> tuple[Any, ...]:
    """The rows as separate arguments."""
    return tuple(vars(call).values())


def normalize(call: Rows) -> Tensor:
    """Rows (m, k) in x's dtype after activation, norm and rounding to int8, each if requested. See Rows."""
    return torch.ops.lowbit.row_norm(*rows_args(call))


def quantize_rows(call: Rows) -> tuple[Tensor, Tensor]:
    """Codes (m, k) int8 and one scale per row, (m) float32, which several products may share. See Rows."""
    return torch.ops.lowbit.quantize_rows(*rows_args(call))


def w8a8_linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    x_scales: Tensor | None = None,
    input_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    dependent: bool = False,
) -> Tensor:
    """x W^T + bias + residual (m, n), with x and W in int8: the sums are exact, and rounded once to `dtype`.

    x            (m, k)  float16 or bfloat16, rounded here by `input_scale` (one float32 number), or by each row's
                         absmax / 127 without it; or int8 with x_scales (m) float32 from quantize_rows
    bias         (n)     of y's dtype
    residual     (m, n)  of y's dtype
    dtype        of y, by default x's dtype; for x in int8 it must be given: float16, bfloat16, or float32 without bias
                 and residual
    dependent    launch without waiting for the previous kernel (programmatic dependent launch), which must write
                 neither the weight nor the bias
    ValueError with numbers if the tensors do not fit together.
    """
    if dtype is None and x.dtype == torch.int8:
        raise ValueError("x in int8: say y's dtype")
    codes, scales = weight.codes, weight.scales
    return torch.ops.lowbit.w8a8_linear(
        x, x_scales, input_scale, codes, scales, bias, residual, dtype or x.dtype, dependent
    )


def dense_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
    float32_out: bool = False,
    dependent: bool = False,
    deferred: Deferred | None = None,
) -> Tensor:
    """activation(x W^T + bias) + residual, for a weight (n, k) in the layout of torch.nn.Linear, in x's dtype.

    x (m, k), bias (n), residual (m, n); returns (m, n) in x's dtype or float32. activation: "none", "gelu",
    "gelu_tanh", "quick_gelu", or "silu_mul": silu(gate) * up, (m, n / 2), for gate's rows followed by up's. Few rows in
    half precision on Hopper run as one kernel, in float32 between x and y; all others run as torch's functions.
    ValueError with numbers if the tensors do not fit together. See dense.DenseCall.
    """
    last = deferred_args(deferred)
    return torch.ops.lowbit.dense_linear(x, weight, bias, residual, activation, float32_out, dependent, *last)


def cache_args(cache: KVCache) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The cache as separate arguments."""
    return cache.k, cache.v, cache.k_scales, cache.v_scales


def append_heads(call: Append) -> Tensor:
    """q (m, heads * head_dim), normalized and rotated; k (treated alike) and v are written to the cache. See Append."""
    return torch.ops.lowbit.append_heads(
        call.qkv,
        call.positions,
        call.slots,
        call.cosines,
        call.sines,
        *cache_args(call.cache),
        call.q_norm,
        call.k_norm,
        call.norm_eps,
        call.dependent,
    )


def attend(call: Attention) -> Tensor:
    """Attention of few tokens over their sequences' caches, (m, heads * head_dim). See Attention."""
    return torch.ops.lowbit.decode_attention(
        call.q,
        *cache_args(call.cache),
        call.starts,
        call.positions,
        call.scale,
        call.window,
        call.softcap,
        call.longest,
        call.dependent,
    )


def choose(call: Choice) -> None:
    """Write each row's token and advance the row. See Choice."""
    cursor, noise = call.cursor, call.noise
    places = (None, None, 0) if cursor is None else (cursor.positions, cursor.slots, cursor.last)
    draws = (None, None) if noise is None else (noise.temperature, noise.seed)
    torch.ops.lowbit.choose_tokens(call.scores, call.tokens, call.written, *places, *draws, call.dependent)


def round_block(w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, number: Number) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors (n, b) of a block of columns, rounded by GPTQ. See kernels/gptq_block.py."""
    return torch.ops.lowbit.gptq_block(w, factor, scales, zeros, *number.grid)
