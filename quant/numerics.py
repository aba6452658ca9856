"""Reference arithmetic of quantization: float32, identical on every device, not optimized.

Shapes: w (n, k), the weight as in nn.Linear; scales and zeros (n, g) with g = k / group_size (1 per channel); codes (n,
k). `w ~ (code - zero) * scale`. Kernels and exported files are tested against these functions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lowbit.quant.numbers import Number
from lowbit.quant.scheme import Scheme, Side

LOST_ENERGY = 1e-3  # fraction of a weight's energy (sum of squares) that rounding to 4 bits loses anyway


def grouped(w: Tensor, scheme: Scheme) -> Tensor:
    """`w` viewed as (n, g, group_size)."""
    n, k = w.shape
    g = scheme.groups(k)
    return w.reshape(n, g, k // g)


def per_weight(values: Tensor, scheme: Scheme, like: Tensor) -> Tensor:
    """Per-group values (n, g) expanded to every weight: float32, shape (n, k) of `like`."""
    return values.float().unsqueeze(-1).expand_as(grouped(like, scheme)).reshape(like.shape)


def step_sizes(w: Tensor, scheme: Scheme, scales: Tensor) -> Tensor:
    """The grid's step at each weight, float32 (n, k): scale times the step of the number type."""
    wide = per_weight(scales, scheme, w)
    return wide if scheme.number.is_integer else wide * scheme.number.spacing(w / wide)


def choose_params(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros that cover each group's range times `shrink`.

    w            (n, k)  float
    shrink       scalar or (n, g)  fraction of the range kept, in (0, 1]
    return       scales (n, g) in scale_dtype, zeros (n, g) int32 or None if the scheme is symmetric

    symmetric    scale = 2 absmax / (high - low) of the number. Integers use both ends of their range, as in
                 compressed-tensors; for floats absmax maps to the largest value
    signed       symmetric with signed scales: scale = extreme / low. The weight of largest magnitude, of either sign,
                 gets the lowest code, since there is one more negative code than positive ones
    asymmetric   scale = (max - min) / (high - low), zero = round(-min / scale); the range is widened to include 0
    The scale is rounded to scale_dtype before use, so that codes match the stored scale. A group of zeros gets scale 1.
    """
    values, number = grouped(w.float(), scheme), scheme.number
    low, high = values.amin(-1), values.amax(-1)
    if scheme.signed_scales:
        extreme = torch.where(high > -low, high, low)
        return stored_scale(extreme * shrink / number.low, scale_dtype), None
    if scheme.symmetric:
        span = torch.maximum(high, -low) * 2
        return stored_scale(span * shrink / (number.high - number.low), scale_dtype), None
    low = low.clamp(max=0)
    scales = stored_scale((high.clamp(min=0) - low) * shrink / (number.high - number.low), scale_dtype)
    zeros = (number.low - low * shrink / scales.float()).round().clamp(number.low, number.high)
    return scales, zeros.to(torch.int32)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it is stored: rounded to `dtype`, clamped to its normal range, and 1 if zero."""
    limits = torch.finfo(dtype)
    magnitude = scale.abs().clamp(max=limits.max).to(dtype).clamp(min=limits.tiny)
    return torch.where(scale == 0, torch.ones_like(magnitude), magnitude.copysign(scale.to(dtype)))


def reason_against_scales(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> str | None:
    """The reason why `scale_dtype` cannot hold the scales of `w` (n, k), with numbers, or None.

    No scale may be too large. Scales that are too small are raised to the smallest normal number, which loses the
    weights of their groups: these may hold at most LOST_ENERGY of the weight's energy.
    """
    limits = torch.finfo(scale_dtype)
    wanted = choose_params(w, scheme, torch.float32)[0].abs()
    large, small = int((wanted > limits.max).sum()), wanted < limits.tiny
    lost = grouped(w.float(), scheme).square().sum(-1)
    if not large and float(lost[small].sum()) <= LOST_ENERGY * float(lost.sum()):
        return None
    count, low, high = large + int(small.sum()), float(wanted.min()), float(wanted.max())
    return (
        f"{count} of {wanted.numel()} scales ({low:.3g} to {high:.3g}) "
        f"do not fit {scale_dtype} ({limits.tiny:.3g} to {limits.max:.6g})"
    )


def quantize(w: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Codes of `w`.

    w       (n, k)  float
    scales  (n, g)  not zero
    zeros   (n, g)  integer; None if the scheme is symmetric
    return  (n, k)  in the number's storage, between its limits

    code = clamp(round(w / scale) + zero), ties to even. ValueError if k is not divisible by the group size.
    """
    values = grouped(w.float(), scheme) / scales.float().unsqueeze(-1)
    codes = scheme.number.encode(values, None if zeros is None else zeros.unsqueeze(-1))
    return codes.reshape(w.shape)


def dequantize(codes: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """(code - zero) * scale as float32, shape (n, k)."""
    values = grouped(scheme.number.decode(codes), scheme)
    if zeros is not None:
        values = values - zeros.unsqueeze(-1)
    return (values * scales.float().unsqueeze(-1)).reshape(codes.shape)


def fake_quantize(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0) -> Tensor:
    """`w` quantized and dequantized, float32: the weight that the exported checkpoint computes with."""
    scales, zeros = choose_params(w, scheme, scale_dtype, shrink)
    return dequantize(quantize(w, scheme, scales, zeros), scheme, scales, zeros)


def input_scale_of(largest: Tensor, number: Number) -> Tensor:
    """The scale that maps the magnitude `largest` to the number's largest value."""
    return largest / number.high


def quantize_inputs(x: Tensor, number: Number, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations `x` (..., k).

    number  number type of the codes; signed
    scale   ()  one scale for all tokens; None for a scale per token, which maps its max |x| to the largest value
    return  codes (..., k) in the number's storage; scales (..., 1) float32, or () if `scale` is given

    Computed in float32, ties to even. An all-zero token gets scale 1. A token with a NaN gets scale NaN, since integer
    codes cannot carry it.
    """
    wide = x.float()
    if scale is None:
        largest = wide.abs().amax(-1, keepdim=True)
        scales = torch.where(largest == 0, torch.ones_like(largest), input_scale_of(largest, number))
    else:
        scales = scale.float()
    return number.encode(wide / scales), scales


def fake_quantize_inputs(x: Tensor, number: Number, scale: Tensor | None = None) -> Tensor:
    """`x` quantized and dequantized, in its own dtype."""
    codes, scales = quantize_inputs(x, number, scale)
    return (number.decode(codes) * scales).to(x.dtype)


def input_rounding(inputs: Side, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that rounds activations to the grid of `inputs`, with scale () or, if None, one scale per token."""
    return partial(fake_quantize_inputs, number=inputs.number, scale=scale)
