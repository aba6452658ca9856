"""The reference arithmetic of quantization: slow where it must be, the same on every device, float32 throughout.

Shapes: w (n, k) weight as nn.Linear stores it; scales, zeros (n, g) with g = k / group_size (1 per channel); codes
(n, k). `w ~ (code - zero) * scale`. Every kernel and every exported file is held against these functions.
"""

import torch
from torch import Tensor

from lowbit.quant.scheme import Scheme

LOST_ENERGY = 1e-3  # of a weight's squares: what rounding to 4 bits loses anyway


def grouped(w: Tensor, scheme: Scheme) -> Tensor:
    """`w` viewed as (n, g, group_size)."""
    n, k = w.shape
    g = scheme.groups(k)
    return w.reshape(n, g, k // g)


def per_weight(values: Tensor, scheme: Scheme, like: Tensor) -> Tensor:
    """Values (n, g) of groups spread over their weights: float32, of the shape (n, k) of `like`."""
    return values.float().unsqueeze(-1).expand_as(grouped(like, scheme)).reshape(like.shape)


def choose_params(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros that cover each group's range times `shrink`.

    w            (n, k)  float
    shrink       scalar or (n, g)  fraction of the range kept, in (0, 1]
    return       scales (n, g) in scale_dtype, zeros (n, g) int32 or None where the scheme is symmetric

    symmetric    scale = absmax / ((2^bits - 1) / 2): the half-open range of compressed-tensors, which uses both ends
    signed       symmetric too, scale = -extreme / 2^(bits - 1): the weight of largest magnitude has the lowest code, of
                 which there is one more than of positive ones, whatever its sign; a scale below zero turns it round
    asymmetric   scale = (max - min) / (2^bits - 1), zero = round(-min / scale), the range widened to include 0
    The scale is rounded to scale_dtype before anything is divided by it, so the codes fit what is stored. A group of
    zeros gets scale 1.
    """
    values = grouped(w.float(), scheme)
    low, high = values.amin(-1), values.amax(-1)
    if scheme.signed_scales:
        extreme = torch.where(high > -low, high, low)
        return stored_scale(-extreme * shrink / 2 ** (scheme.bits - 1), scale_dtype), None
    if scheme.symmetric:
        span = torch.maximum(high, -low) * 2
        return stored_scale(span * shrink / (2**scheme.bits - 1), scale_dtype), None
    low = low.clamp(max=0)
    scales = stored_scale((high.clamp(min=0) - low) * shrink / (2**scheme.bits - 1), scale_dtype)
    zeros = (scheme.qtype.min - low * shrink / scales.float()).round().clamp(scheme.qtype.min, scheme.qtype.max)
    return scales, zeros.to(torch.int32)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it will be stored: rounded to `dtype`, kept within its normal range, and 1 where it is zero."""
    limits = torch.finfo(dtype)
    magnitude = scale.abs().clamp(max=limits.max).to(dtype).clamp(min=limits.tiny)
    return torch.where(scale == 0, torch.ones_like(magnitude), magnitude.copysign(scale.to(dtype)))


def reason_against_scales(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> str | None:
    """Why the scales of `w` (n, k) have no place in `scale_dtype`, in words, or None.

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
    """Integer codes of `w`.

    w       (n, k)  float
    scales  (n, g)  strictly positive
    zeros   (n, g)  integer, None when the scheme is symmetric
    return  (n, k)  int8 (signed) or uint8, in [qtype.min, qtype.max]

    code = clamp(round(w / scale) + zero), ties to even. ValueError where k does not divide into groups.
    """
    values = grouped(w.float(), scheme) / scales.float().unsqueeze(-1)
    codes = values.round_()
    if zeros is not None:
        codes += zeros.unsqueeze(-1)
    codes.clamp_(scheme.qtype.min, scheme.qtype.max)
    return codes.reshape(w.shape).to(torch.int8 if scheme.qtype.signed else torch.uint8)


def dequantize(codes: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """(code - zero) * scale as float32, shape (n, k)."""
    values = grouped(codes.float(), scheme)
    if zeros is not None:
        values = values - zeros.unsqueeze(-1)
    return (values * scales.float().unsqueeze(-1)).reshape(codes.shape)


def fake_quantize(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0) -> Tensor:
    """`w` after quantization and back, float32: what the exported checkpoint will compute with."""
    scales, zeros = choose_params(w, scheme, scale_dtype, shrink)
    return dequantize(quantize(w, scheme, scales, zeros), scheme, scales, zeros)


def quantize_inputs(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of activations `x` (..., k), and their scales.

    scale   ()  the one scale of all tokens; None for a scale of each token's own, max |x| / 127
    return  codes (..., k) int8, scales (..., 1) float32, or () where `scale` was given

    Computed in float32, ties to even. A token of zeros gets scale 1, one that holds a NaN gets NaN, which no code says.
    """
    wide = x.float()
    if scale is None:
        largest = wide.abs().amax(-1, keepdim=True)
        scales = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
    else:
        scales = scale.float()
    return (wide / scales).round_().clamp_(-128, 127).to(torch.int8), scales


def fake_quantize_inputs(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """`x` after quantize_inputs and back, in its own dtype."""
    codes, scales = quantize_inputs(x, scale)
    return (codes.float() * scales).to(x.dtype)
