"""Reference arithmetic of quantization: float32, identical on every device, not optimized.

Shapes: w (n, k), the weight as in nn.Linear; scales and zeros (n, g) with g = k / group_size (1 per channel), fewer
rows if blocks of rows share a scale; codes (n, k). `w ~ (code - zero) * scale`. Scales relative to a tensor's divisor
are `scale / divisor`: such weights are multiplied by it first (`in_parts`). In schemes with minima `zeros` are these,
float32, and `w ~ code * scale - minimum`. Kernels and exported files are tested
against these functions.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lowbit.quant.numbers import E8M0, Number, round_to_grid, steps_at
from lowbit.quant.scheme import Scheme, Side

PARENT_TOP = 256  # scale of the largest group: twice it is still below e4m3's 448 (as in ModelOpt and four-over-six)
# Weights handled at once. On a CPU a core's cache. On an H200 that others use too, an operator on 2^24 takes 100 us, on
# 2^22 37, which is what the host needs to launch it.
CPU_PIECE, GPU_PIECE = 1 << 18, 1 << 24
Ends = tuple[Tensor, Tensor]
LEAST_HALF = 2.0**-24  # the smallest float16 above zero
LOST_ENERGY = 1e-3  # fraction of a weight's energy (sum of squares) that rounding to 4 bits loses anyway


def grouped(w: Tensor, scheme: Scheme) -> Tensor:
    """`w` viewed as (n, g, group_size). An incomplete last block is padded with zeros."""
    n, k = w.shape
    g = scheme.groups(k)
    size = k if scheme.group_size == -1 else scheme.group_size
    if k % max(size, 1):
        w = torch.nn.functional.pad(w, (0, -k % size))
    return w.reshape(n, g, size)


def pieces_of(w: Tensor, scheme: Scheme) -> Iterator[tuple[slice, slice]]:
    """Slices of the rows of `w` (n, k) in pieces of one size, and of the scales of these rows.

    On a CPU all temporaries of a piece stay in a core's cache. Whole weights of 16 million numbers take ten times as
    long there, most of it for pages of new memory.
    """
    n, k = w.shape
    blocks = max(piece_size(w) // (max(k, 1) * scheme.rows), 1)
    for first in range(0, max(-(-n // scheme.rows), 1), blocks):
        last = first + blocks
        yield slice(first * scheme.rows, last * scheme.rows), slice(first, last)


def piece_size(w: Tensor) -> int:
    """The number of weights handled at once on the device of `w`."""
    return CPU_PIECE if w.device.type == "cpu" else GPU_PIECE


def ungrouped(values: Tensor, k: int) -> Tensor:
    """The weights (n, k) from their view by `grouped`."""
    return values.flatten(1)[:, :k]


def per_row(values: Tensor, scheme: Scheme, n: int) -> Tensor:
    """Values of scales for each of `n` rows, (n, g); rows of a block share values."""
    return values if scheme.rows == 1 else values.repeat_interleave(scheme.rows, 0)[:n]


def per_scale(values: Tensor, scheme: Scheme, largest: bool = False) -> Tensor:
    """Values (n, g) of rows' groups, summed over the rows that share a scale, or their maximum."""
    if scheme.rows == 1:
        return values
    blocks = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % scheme.rows)).unflatten(0, (-1, scheme.rows))
    return blocks.amax(1) if largest else blocks.sum(1)


def per_weight(values: Tensor, scheme: Scheme, like: Tensor) -> Tensor:
    """Values per scale expanded to every weight: float32, shape (n, k) of `like`."""
    n, k = like.shape
    wide = per_row(values.float(), scheme, n).unsqueeze(-1)
    size = k if scheme.group_size == -1 else scheme.group_size
    return ungrouped(wide.expand(*wide.shape[:2], size), k)


def divisor_of(largest: Tensor, weights: Side) -> Tensor:
    """The divisor () float32 of a tensor's scales: it makes the scale of the magnitude `largest` PARENT_TOP or less."""
    return _power_divisor(largest, weights, PARENT_TOP)


def _power_divisor(largest: Tensor, side: Side, top: float) -> Tensor:
    """The largest power of two that makes the scale of the magnitude `largest` at most `top`.

    Its reciprocal is exact, and division by it does not round.
    """
    largest = torch.where(largest > 0, largest.float(), torch.ones_like(largest, dtype=torch.float32))
    wanted = (top * side.number.high / largest).clamp(max=torch.finfo(torch.float32).max)
    return torch.ldexp(torch.ones_like(wanted), torch.frexp(wanted)[1] - 1)


def in_parts(w: Tensor, scheme: Scheme, divisor: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`w` in float32 times the divisor of its scales, and that divisor; (w, None) if the scheme has none.

    divisor  ()  shared with other weights; None for the weight's own
    """
    divisor = own_divisor(w, scheme) if divisor is None else divisor
    return (w.float(), None) if divisor is None else (w.float() * divisor, divisor)


def own_divisor(w: Tensor, scheme: Scheme) -> Tensor | None:
    """The divisor of the scales of `w` alone; None if the scheme has none. Of weights (e, n, k) each has its own,
    (e, 1, 1)."""
    if not scheme.weights.parent:
        return None
    return divisor_of(w.abs().amax((-2, -1), keepdim=w.ndim > 2), scheme.weights)


def step_sizes(w: Tensor, scheme: Scheme, scales: Tensor) -> Tensor:
    """The grid's step at each weight, float32 (n, k): scale times the step of the number type."""
    wide = per_weight(scales, scheme, w)
    return wide if scheme.number.is_integer else wide * scheme.number.spacing(w / wide)


def choose_params(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0, ends: Ends | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros that cover each group's range times `shrink`.

    w            (n, k)  float; in parts (`in_parts`)
    shrink       scalar or (n, g)  fraction of the range kept; (2, n, g) for scales and for minima
    ends         `ends_of(w)`, if they are known
    return       scales (n, g) in scale_dtype; zeros (n, g) int32, minima (n, g) float32, or None if the scheme is
                 symmetric

    symmetric    scale = 2 absmax / (high - low) of the number. Integers use both ends of their range, as in
                 compressed-tensors; for floats absmax maps to the largest value
    signed       symmetric with signed scales: scale = extreme / low. The weight of largest magnitude, of either sign,
                 gets the lowest code, since there is one more negative code than positive ones
    minima       scale = (max - min) / (high - low), minimum = -min; in super-blocks minima are never negative
    asymmetric   scale = (max - min) / (high - low), zero = round(-min / scale); the range is widened to include 0
    The scale is rounded to scale_dtype, or to the scheme's number of scales (in bfloat16, which represents it exactly),
    before use, so that codes match the stored scale. A group of zeros gets scale 1.
    """
    number, (low, high) = scheme.number, ends or ends_of(w, scheme)
    shrink, of_minima = shrink if isinstance(shrink, Tensor) and shrink.ndim > 2 else (shrink, shrink)
    wanted = _wanted_scales(low, high, scheme, shrink)
    if scheme.symmetric:
        return as_stored(wanted, scheme, scale_dtype), None
    if scheme.weights.minima:
        return as_stored(wanted, scheme, scale_dtype), stored_minima(-low * of_minima, scheme, scale_dtype)
    scales = stored_scale(wanted, scale_dtype)
    zeros = (number.low - low * shrink / scales.float()).round().clamp(number.low, number.high)
    return scales, zeros.to(torch.int32)


def whole_range(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The scale and the minimum (n, g) float32 that cover each group's range, before they are rounded; both are 0 for a
    group of zeros. In schemes without minima all minima are 0."""
    low, high = ends_of(w, scheme)
    return _wanted_scales(low, high, scheme, 1.0), -low if scheme.weights.minima else torch.zeros_like(low)


def ends_of(w: Tensor, scheme: Scheme) -> Ends:
    """The smallest and the largest weight (n, g) of each group; widened to include 0 in schemes with zeros, and down to
    it in super-blocks."""
    values = grouped(w.float(), scheme)
    low, high = values.amin(-1), values.amax(-1)
    if scheme.symmetric:
        return low, high
    if not scheme.weights.minima:
        return low.clamp(max=0), high.clamp(min=0)
    return (low.clamp(max=0), torch.maximum(low.clamp(max=0), high)) if scheme.weights.span else (low, high)


def _wanted_scales(low: Tensor, high: Tensor, scheme: Scheme, shrink: Tensor | float) -> Tensor:
    """The scales of groups between `low` and `high`, before they are rounded to what is stored."""
    number = scheme.number
    if scheme.signed_scales:
        return torch.where(high > -low, high, low) * shrink / number.low
    if scheme.symmetric:
        span = per_scale(torch.maximum(high, -low), scheme, largest=True) * 2
        return span * shrink / (number.high - number.low)
    return (high - low) * shrink / (number.high - number.low)


def as_stored(scale: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """`scale` as the scheme stores it: in its number of scales, or else in `dtype`. In super-blocks, float32."""
    coarse = scheme.weights.scales
    if scheme.weights.span:
        return in_super_blocks(scale, scheme.weights, least=1)
    return stored_scale(scale, dtype) if coarse is None else coarse_scale(scale, coarse)


def stored_minima(minima: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """`minima` as the scheme stores them, float32: integers times a float16 in super-blocks, or else in `dtype`."""
    if scheme.weights.span:
        return in_super_blocks(minima, scheme.weights, least=0)
    return minima.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float()


def in_super_blocks(values: Tensor, side: Side, least: int) -> Tensor:
    """`values` (n, g) rounded to integers times one float16 for each super-block: float32, which holds the products.

    least  smallest magnitude of the integers: 1 for scales, which must not be zero

    The value of largest magnitude gets the integer at the end of the range, so that the float16 can be read off.
    """
    number = side.scales
    assert number is not None
    parts = values.float().unflatten(-1, (-1, side.span // side.group_size))
    parts = parts if number.signed else parts.clamp(min=0)
    end = end_of(number)
    place = parts.abs().argmax(-1, keepdim=True)
    largest = parts.gather(-1, place)
    factors = as_half(largest / end)
    integers = (parts / factors).round_().clamp_(number.low, number.high).add_(0.0)  # no zero below zero
    integers = torch.where(integers.abs() < least, torch.ones_like(integers).copysign(integers), integers)
    used = factors if least else factors * (largest != 0)
    return (integers.scatter_(-1, place, end) * used).flatten(-2)


def end_of(number: Number) -> int:
    """The integer of largest magnitude."""
    return int(number.low if number.signed else number.high)


def as_half(factors: Tensor) -> Tensor:
    """`factors` rounded to the finite float16 that are not zero, in float32."""
    magnitude = factors.abs().clamp(LEAST_HALF, torch.finfo(torch.float16).max)
    return magnitude.to(torch.float16).float().copysign(factors)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it is stored: rounded to `dtype`, clamped to its normal range, and 1 if zero."""
    limits = torch.finfo(dtype)
    magnitude = scale.abs().clamp(max=limits.max).to(dtype).clamp(min=limits.tiny)
    return torch.where(scale == 0, torch.ones_like(magnitude), magnitude.copysign(scale.to(dtype)))


def coarse_scale(scale: Tensor, number: Number) -> Tensor:
    """`scale`, not negative, rounded to `number`, in bfloat16; 1 if it is zero."""
    least = max(number.least, number.low)
    rounded = round_to_grid(scale.float().clamp(least, number.high), number.fineness, number.least)
    return torch.where(scale == 0, torch.ones_like(rounded), rounded.clamp_(least, number.high)).to(torch.bfloat16)


def reason_against_scales(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> str | None:
    """The reason why `scale_dtype` cannot hold the scales of `w` (n, k), with numbers, or None.

    No scale may be too large. Scales that are too small are raised to the smallest normal number, which loses the
    weights of their groups: these may hold at most LOST_ENERGY of the weight's energy.
    """
    if scheme.weights.scales is not None and not scheme.weights.span:
        return None  # within the range of 32 bits, which weights have
    tiny, most = _limits(scheme, scale_dtype)
    pieces = [whole_range(w[rows], scheme) for rows, _ in pieces_of(w, scheme)]
    wanted, minima = (torch.cat(each).abs() for each in zip(*pieces, strict=True))
    wanted = torch.where(wanted == 0, torch.ones_like(wanted), wanted)
    beyond = minima > most if scheme.weights.minima else torch.zeros((), dtype=torch.bool)
    large, small = int(((wanted > most) | beyond).sum()), wanted < tiny
    if not large and not small.any():
        return None
    lost = per_scale(grouped(w.float(), scheme).square().sum(-1), scheme)
    if not large and float(lost[small].sum()) <= LOST_ENERGY * float(lost.sum()):
        return None
    count, low, high = large + int(small.sum()), float(wanted.min()), float(wanted.max())
    what = f"{scheme.weights.span} inputs' scales" if scheme.weights.span else str(scale_dtype)
    return f"{count} of {wanted.numel()} scales ({low:.3g} to {high:.3g}) do not fit {what} ({tiny:.3g} to {most:.6g})"


def _limits(scheme: Scheme, dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and largest scale that is stored; in super-blocks a largest one, integer times float16."""
    limits, number = torch.finfo(dtype), scheme.weights.scales
    if not scheme.weights.span or number is None:
        return limits.tiny, limits.max
    half = torch.finfo(torch.float16)
    return LEAST_HALF * abs(end_of(number)), half.max * abs(end_of(number))


def quantize(w: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Codes of `w`.

    w       (n, k)  float
    scales  (n, g)  not zero
    zeros   (n, g)  integer, or minima; None if the scheme is symmetric
    return  (n, k)  in the number's storage, between its limits

    code = clamp(round(w / scale) + zero), ties to even. ValueError if k is not divisible by the group size.
    """
    if scheme.weights.minima:
        w, zeros = raised(w.float(), scheme, zeros), None
    values = grouped(w.float(), scheme) / per_row(scales.float(), scheme, len(w)).unsqueeze(-1)
    codes = scheme.number.encode(values, None if zeros is None else zeros.unsqueeze(-1))
    return ungrouped(codes, w.shape[1])


def raised(w: Tensor, scheme: Scheme, zeros: Tensor | None) -> Tensor:
    """`w` (n, k) plus the minima of its groups, which are `zeros` (n, g) in schemes with minima; `w` in others."""
    return w + per_weight(zeros, scheme, w) if zeros is not None and scheme.weights.minima else w


def dequantize(codes: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """(code - zero) * scale, or code * scale - minimum, as float32, shape (n, k)."""
    values = grouped(scheme.number.decode(codes), scheme)
    if zeros is not None and scheme.weights.minima:
        return ungrouped(values * scales.float().unsqueeze(-1) - zeros.unsqueeze(-1), codes.shape[1])
    if zeros is not None:
        values = values - zeros.unsqueeze(-1)
    return ungrouped(values * per_row(scales.float(), scheme, len(codes)).unsqueeze(-1), codes.shape[1])


def fake_quantize(w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0) -> Tensor:
    """`w` (n, k), or weights (e, n, k), quantized and dequantized, float32: the weight that the exported checkpoint
    computes with."""
    parts, divisor = in_parts(w, scheme)
    rounded = rounded_parts(parts.flatten(0, -2), scheme, scale_dtype, shrink).view(w.shape)
    return rounded if divisor is None else rounded / divisor


def rounded_parts(
    w: Tensor, scheme: Scheme, scale_dtype: torch.dtype, shrink: Tensor | float = 1.0, ends: Ends | None = None
) -> Tensor:
    """The same for `w` multiplied by its divisor (`in_parts`), float32; `ends` as in `choose_params`."""
    scales, zeros = choose_params(w, scheme, scale_dtype, shrink, ends)
    return dequantize(quantize(w, scheme, scales, zeros), scheme, scales, zeros)


def input_scale_of(largest: Tensor, inputs: Side) -> Tensor:
    """The scale that maps the magnitude `largest` to the number's largest value; or the divisor of group scales.

    The divisor maps that scale to the largest value of the scales' number, so that no calibration token exceeds it.
    """
    if not inputs.parent:
        return largest / inputs.number.high
    assert inputs.scales is not None
    return _power_divisor(largest, inputs, inputs.scales.high)


def quantize_inputs(x: Tensor, number: Number, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations `x` (..., k).

    number  number type of the codes; signed
    scale   ()  one scale for all tokens; None for a scale per token, which maps its max |x| to the largest value
    return  codes (..., k) in the number's storage; scales (..., 1) float32, or () if `scale` is given

    Computed in float32, ties to even; values beyond the largest code become it. An all-zero token gets scale 1. A token
    with a NaN gets scale NaN, since integer codes cannot carry it.
    """
    wide = x.float()
    if scale is None:
        largest = wide.abs().amax(-1, keepdim=True)
        scales = torch.where(largest == 0, torch.ones_like(largest), largest / number.high)
    else:
        scales = scale.float()
    return number.encode((wide / scales).clamp_(number.low, number.high)), scales


def fake_quantize_inputs(x: Tensor, number: Number, scale: Tensor | None = None) -> Tensor:
    """`x` quantized and dequantized, in its own dtype."""
    codes, scales = quantize_inputs(x, number, scale)
    return (number.decode(codes) * scales).to(x.dtype)


def fake_quantize_groups(x: Tensor, inputs: Side, divisor: Tensor | None = None) -> Tensor:
    """`x` (..., k) rounded in groups, each with its own scale, and dequantized, in its own dtype.

    divisor  ()  of the scales, if they have a parent

    absmax of a group becomes the number's largest value. Scales that are powers of two have the exponent of absmax
    minus that of the largest value, plus one for a mantissa of absmax from 1.75 on, like the writers of microscaling
    formats.
    """
    wide, number = x.float().unflatten(-1, (-1, inputs.group_size)), inputs.number
    largest = wide.abs().amax(-1, keepdim=True)
    wanted = largest / number.high if divisor is None else largest / number.high * divisor
    if inputs.scales == E8M0:
        wanted = steps_at((largest * (8 / 7)), 1.0, E8M0.least) * 2.0 ** -math.floor(math.log2(number.high))
    scales = wanted if inputs.scales is None else coarse_scale(wanted, inputs.scales).float()
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    scales = scales if divisor is None else scales / divisor
    codes = number.encode(wide / scales)
    return (number.decode(codes) * scales).flatten(-2).to(x.dtype)


def input_rounding(inputs: Side, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that rounds activations to the grid of `inputs`.

    scale  ()  the static scale, or the static divisor of group scales; None if each token has its own scale
    """
    if inputs.group_size != -1:
        return partial(fake_quantize_groups, inputs=inputs, divisor=scale)
    return partial(fake_quantize_inputs, number=inputs.number, scale=scale)
