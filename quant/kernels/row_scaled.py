"""A weight whose rows stand by themselves, each with scales of its own: what can be stacked, reordered and packed.

Scales that rows share (blocks, a tensor's divisor) become each row's own. A float's row has a float32 factor, so that
its scales lie in the narrow range of the kernels' scales: of fp8 half precision, of fp4 bytes with 5 bits of exponent
and 3 of mantissa.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.numbers import FP4, Number
from lowbit.quant.qtensor import QTensor

# The largest scale of a row of fp4 in units of its factor: e8m0's, and one in a tensor of e4m3's, whose largest is 448.
E8M0_TOP, E4M3_UNIT = 2.0**15, 2.0**7
# The least scale of a row as a fraction of its largest: of fp4, products with values are exact in float16; of fp8,
# scales are normal numbers of float16.
FP4_LEAST, FP8_LEAST = 2.0**-24, 2.0**-14


@dataclass(frozen=True)
class RowScaled:
    """`w ~ (code - zero) * scale * factor`.

    codes    (n, k)  in the number's storage
    scales   (n, g)  floating point; (n, 0) for a float per channel, whose factor is its scale
    zeros    (n, g)  int32; None if the number is signed
    factors  (n)     float32; None for integers
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    factors: Tensor | None
    number: Number
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The weight (n, k), float32."""
        k = self.codes.shape[1]
        size = k if self.group_size == -1 else self.group_size

        def wide(sides: Tensor) -> Tensor:
            return sides.repeat_interleave(size, 1)[:, :k]

        values = self.number.decode(self.codes)
        if self.zeros is not None:
            values = values - wide(self.zeros)
        if self.scales.shape[1]:
            values = values * wide(self.scales.float())
        return values if self.factors is None else values * self.factors.unsqueeze(1)

    def taking(self, rows: Tensor) -> "RowScaled":
        """Row i taken from row `rows[i]`."""
        zeros, factors = (None if each is None else each[rows] for each in (self.zeros, self.factors))
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros, factors=factors)


def stacked_rows(parts: list[RowScaled]) -> RowScaled:
    """The rows of weights of one kind, one after the other."""
    first = parts[0]
    codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    zeros = [part.zeros for part in parts if part.zeros is not None]
    factors = [part.factors for part in parts if part.factors is not None]
    sides = torch.cat(zeros) if zeros else None
    return RowScaled(codes, scales, sides, torch.cat(factors) if factors else None, first.number, first.group_size)


def row_scaled(weight: QTensor) -> RowScaled:
    """`weight` by its rows. Its scales have passed reason_against_scales."""
    scheme = weight.scheme
    kind = scheme.number, scheme.group_size
    if scheme.number.is_integer:
        return RowScaled(weight.codes, weight.scales, weight.zeros, None, *kind)
    n = weight.shape[0]
    scales = numerics.per_row(weight.scales.float(), scheme, n)
    if scheme.group_size == -1:
        return RowScaled(weight.codes, scales[:, :0], None, numerics.per_row(weight.steps, scheme, n)[:, 0], *kind)
    if weight.divisor is not None:
        factors = (1 / (weight.divisor.float() * E4M3_UNIT)).reshape(-1).expand(n)
        return RowScaled(weight.codes, scales * E4M3_UNIT, None, factors, *kind)
    top = E8M0_TOP if scheme.number == FP4 else 1.0
    scales = used_scales(weight)
    factors = power_below(scales.amax(1))
    relative = torch.where(scales == 0, 1, scales / factors.unsqueeze(1))
    return RowScaled(weight.codes, relative * top, None, factors / top, *kind)


def power_below(values: Tensor) -> Tensor:
    """The largest power of two that is at most each value, float32; 1 for 0."""
    mantissas, exponents = torch.frexp(values)
    return torch.ldexp(torch.where(mantissas == 0, 2, 1).float(), exponents - 1)


def used_scales(weight: QTensor) -> Tensor:
    """The scales of each row (n, g), float32. If some are too far apart, those of groups without a code other than zero
    are 0: they may be anything."""
    scales = numerics.per_row(weight.scales.float(), weight.scheme, weight.shape[0])
    if not bool(too_far(scales, weight).any()):
        return scales
    used = numerics.grouped((weight.codes.float() != 0).float(), weight.scheme).amax(-1) > 0
    return torch.where(used, scales, 0)


def too_far(scales: Tensor, weight: QTensor) -> Tensor:
    """True for each row (n) with a scale, 0 aside, that is too small beside its largest."""
    least = FP4_LEAST if weight.scheme.number == FP4 else FP8_LEAST
    return ((scales > 0) & (scales < scales.amax(1, keepdim=True) * least)).any(1)


def reason_against_scales(weight: QTensor) -> str | None:
    """The reason why the scales of a float's rows do not fit the kernels, or None."""
    scheme = weight.scheme
    if scheme.number.is_integer or scheme.group_size == -1 or weight.codes.is_meta or not weight.codes.numel():
        return None
    if weight.divisor is not None:
        fits = bool(torch.isfinite(row_scaled(weight).factors).all())  # type: ignore[arg-type]
        return None if fits else f"its scales have the divisor {float(weight.divisor):.3g}"
    scales = used_scales(weight)
    far = too_far(scales, weight)
    if not bool(far.any()):
        return None
    row = int(far.nonzero()[0, 0])
    found = scales[row][scales[row] > 0]
    return f"scales of row {row} reach from {float(found.min()):.3g} to {float(found.max()):.3g}"
