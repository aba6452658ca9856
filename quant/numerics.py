"""The reference arithmetic of quantization: slow where it must be, the same on every device, float32 throughout.

Shapes: w (n, k) weight as nn.Linear stores it; scales, zeros (n, g) with g = k / group_size (1 per channel); codes
(n, k), each standing for its number's value. `w ~ (code - zero) * scale`. Every kernel and every exported file is held
against these functions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lowbit.quant.numbers import Number
from lowbit.quant.scheme import Scheme, Side

LOST_ENERGY = 1e-3  # of a weight's squares: what rounding to 4 bits loses anyway


def grouped(w: Tensor, scheme: Scheme) -> Tensor:
    """`w` viewed as (n, g, group_size)."""
    n, k = w.shape
    g = scheme.groups(k)
    return w.reshape(n, g, k // g)


def per_weight(values: Tensor, scheme: Scheme, like: Tensor) -> Tensor:
    """Values (n, g) of groups spread over their weights: float32, of the shape (n, k) of `like`."""
    return values.float().unsqueeze(-1).expand_as(grouped(like, scheme)).reshape(like.shape)


def step_sizes(w: Tensor, scheme: Scheme, scales: Tensor) -> Tensor:
    """The step of the scheme's grid at each weight, float32 (n, k): a scale times the number's step there."""
    wide = per_weight(scales, scheme, w)
    return wide if scheme.number.is_integer else wide * scheme.number.spacing(w / wide)


def choose_params(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros that cover each group's range times `shrink`.

    w            (n, k)  float
    shrink       scalar or (n, g)  fraction of the range kept, in (0, 1]
    return       scales (n, g) in scale_dtype, zeros (n, g) int32 or None where the scheme is symmetric

    symmetric    scale = 2 absmax / (high - low) of the number: integers use both ends of their range, as in
                 compressed-tensors; a float's largest value stands for absmax
    signed       symmetric too, scale = extreme / low: the weight of largest magnitude has the lowest code, of which
                 there is one more than of positive ones, whatever its sign; a scale below zero turns it round
    asymmetric   scale = (max - min) / (high - low), zero = round(-min / scale), the range widened to include 0
    The scale is rounded to scale_dtype before anything is divided by it, so the codes fit what is stored. A group of
    zeros gets scale 1.
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
    """`scale` as it will be stored: rounded to `dtype`, kept within its normal range, and 1 where it is zero."""
    limits = torch.finfo(dtype)
    magnitude = scale.abs().clamp(max=limits.max).to(dtype).clamp(min=limits.tiny)
    return torch.where(scale == 0, torch.ones_like(magnitude), magnitude.copysign(scale.to(dtype)))


def reason_against_scales(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> str | None:
    """The reason why the scales of `w` (n, k) have no place in `scale_dtype`, in words, or None.

    None may be too large for it. Scales too small are raised to the smallest it has, which loses the weights of their
    groups: those may have LOST_ENERGY of the whole at most.
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
        f"have no place in {scale_dtype} ({limits.tiny:.3g} to {limits.max:.6g})"
    )


def quantize(w: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Codes of `w`.

    w       (n, k)  float
    scales  (n, g)  not zero
    zeros   (n, g)  integer, None when the scheme is symmetric
    return  (n, k)  in the number's storage, between its limits

    code = clamp(round(w / scale) + zero), ties to even. ValueError where k does not divide into groups.
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
    """`w` after quantization and back, float32: what the exported checkpoint will compute with."""
    scales, zeros = choose_params(w, scheme, scale_dtype, shrink)
    return dequantize(quantize(w, scheme, scales, zeros), scheme, scales, zeros)


def input_scale_of(largest: Tensor, number: Number) -> Tensor:
    """The scale at which `largest`, a magnitude, is the number's largest value."""
    return largest / number.high


def quantize_inputs(x: Tensor, number: Number, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of activations `x` (..., k), and their scales.

    number  what they are rounded to; signed
    scale   ()  the one scale of all tokens; None for a scale of each token's own: its max |x| is the largest value
    return  codes (..., k) in the number's storage, scales (..., 1) float32, or () where `scale` was given

    Computed in float32, ties to even. A token of zeros gets scale 1. One that holds a NaN gets scale NaN: integer codes
    have none.
    """
    wide = x.float()
    if scale is None:
        largest = wide.abs().amax(-1, keepdim=True)
        scales = torch.where(largest == 0, torch.ones_like(largest), input_scale_of(largest, number))
    else:
        scales = scale.float()
    return number.encode(wide / scales), scales


def fake_quantize_inputs(x: Tensor, number: Number, scale: Tensor | None = None) -> Tensor:
    """`x` after quantize_inputs and back, in its own dtype."""
    codes, scales = quantize_inputs(x, number, scale)
    return (number.decode(codes) * scales).to(x.dtype)


def input_rounding(inputs: Side, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What rounds activations as `inputs` says, and back: by `scale` (), or by one a token where that is None."""
    return partial(fake_quantize_inputs, number=inputs.number, scale=scale)
