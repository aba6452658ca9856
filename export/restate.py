"""The same weights in another scheme, to the bit, or the reason why that scheme has no such values.

Everything is computed in float64, where the product of a code and a scale is exact. A group's scale is a power of two
times a scale that the weight has there, or a power of two alone if the scheme's scales are (e8m0): the smallest one
that its largest weight fits. Then small weights have the most steps, and if any scale of this kind has all values, it
does.
"""

import math

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.numbers import E8M0, FP8
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme


def restated(weight: QTensor, scheme: Scheme, divisor: Tensor | None = None) -> QTensor:
    """`weight` as a `scheme` weight with the same values.

    divisor  () float32, of the scales, in schemes whose scales have one: from `divisor_for`, shared by fused linears

    ValueError, with numbers, if the scheme has no such values.
    """
    values = _values(weight)
    scales = _fitting_scales(weight, values, scheme)
    if divisor is not None:
        scales = scales * divisor.double()
    stored = _stored(scales, weight.scales.dtype, scheme)
    steps = stored.double() if divisor is None else stored.double() / divisor.double()
    wide = numerics.per_row(steps, scheme, len(values)).unsqueeze(-1)
    parts = numerics.grouped(values, scheme)
    codes = scheme.number.encode((parts / wide).float())
    lost = scheme.number.decode(codes).double() * wide != parts
    if bool(lost.any()):
        raise ValueError(_why(weight, scheme, lost))
    codes = numerics.ungrouped(codes, values.shape[1]).contiguous()
    return QTensor(codes, stored, None, scheme, weight.input_scale if scheme.static_inputs else None, divisor)


def divisor_for(largest: float) -> Tensor:
    """The divisor () float32, a power of two, that makes the scale `largest` the greatest that e4m3 scales hold."""
    return torch.tensor(2.0 ** math.floor(math.log2(FP8.high / largest)))


def largest_scale(weight: QTensor, scheme: Scheme) -> float:
    """The largest of the scales that `restated` would choose, before a divisor; 0 for a weight of zeros."""
    values = _values(weight)
    used = numerics.per_scale(numerics.grouped(values, scheme).abs().amax(-1), scheme, largest=True) > 0
    return float((_fitting_scales(weight, values, scheme) * used).amax())


def reason_against(weight: QTensor, scheme: Scheme) -> str | None:
    """The reason why no weight of `scheme` can be made from `weight`, whatever its values, or None."""
    if scheme.weights.blocks or weight.scheme.weights.minima:
        return f"{weight.scheme} weights are not rewritten as {scheme}: `quantize` rounds to it"
    if weight.order is not None:
        return "its inputs are in act-order, which no file is written in; `quantize` takes such files as its original"
    if not scheme.symmetric:
        return f"{scheme} has zero points, and {weight.scheme} weights are not rewritten with any"
    if scheme.static_inputs and scheme.inputs != weight.scheme.inputs:
        return f"{scheme} has calibrated scales of inputs, and the file has none: take a scheme with -a16"
    return scheme.reason_against_shape(*weight.shape)


def _values(weight: QTensor) -> Tensor:
    """The weight (n, k) in float64."""
    parts = numerics.grouped(weight.values().double(), weight.scheme)
    values = parts * numerics.per_row(weight.steps.double(), weight.scheme, len(parts)).unsqueeze(-1)
    return numerics.ungrouped(values, weight.shape[1])


def _fitting_scales(weight: QTensor, values: Tensor, scheme: Scheme) -> Tensor:
    """For each group of `scheme` the smallest scale of its kind that all values fit, float64; 1 for zeros alone."""
    number, parts = scheme.number, numerics.grouped(values, scheme)
    need = torch.maximum(parts.amax(-1) / number.high, parts.amin(-1) / number.low)
    need = numerics.per_scale(need, scheme, largest=True)
    base = torch.ones_like(need)
    if scheme.weights.scales != E8M0:
        base = numerics.per_scale(_largest_step(weight, values, scheme), scheme, largest=True)
    powers = torch.log2(torch.where(need > 0, need / base, 1.0)).ceil()
    powers = torch.where(torch.ldexp(base, powers - 1) >= need, powers - 1, powers)  # log2 may round up
    return torch.where(need > 0, torch.ldexp(base, powers), 1.0)


def _largest_step(weight: QTensor, values: Tensor, scheme: Scheme) -> Tensor:
    """The largest magnitude of the weight's own scales in each group (n, g) of `scheme`, those of zeros aside."""
    steps = weight.steps.double().abs()
    own = numerics.per_row(steps, weight.scheme, len(values)).unsqueeze(-1)
    wide = numerics.ungrouped(own.expand_as(numerics.grouped(values, weight.scheme)), values.shape[1])
    found = numerics.grouped(wide * (values != 0), scheme).amax(-1)
    return torch.where(found > 0, found, 1.0)


def _stored(scales: Tensor, dtype: torch.dtype, scheme: Scheme) -> Tensor:
    """`scales` in the scheme's number of scales, or else in `dtype` if that has them all, or float32."""
    coarse = scheme.weights.scales
    if coarse is not None:
        return numerics.coarse_scale(scales, coarse)
    narrow = scales.to(dtype)
    return narrow if torch.equal(narrow.double(), scales) else scales.float()


def _why(weight: QTensor, scheme: Scheme, lost: Tensor) -> str:
    """The sentence for weights that `scheme` has no values for; `lost` is True for each of them."""
    steps = weight.steps.abs().float()
    return (
        f"{int(lost.sum())} of {weight.codes.numel()} weights are no values of {scheme}: its scales run from "
        f"{float(steps.min()):.3g} to {float(steps.max()):.3g}, and a group of {scheme} has one for all of its codes"
    )
