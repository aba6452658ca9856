"""A quantized weight."""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.quant import numerics
from lowbit.quant.scheme import Scheme

HALF = 127  # half the distance between two codes, in a remainder
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QTensor:
    """A weight as codes and scales: `w ~ (code - zero) * scale`, `code * scale / divisor` or `code * scale - minimum`.

    codes        (n, k)  in the number's storage; unpacked
    scales       (n, g)  float16, bfloat16 or float32, finite and not zero; positive unless the scheme says that they
                         may be negative; fewer rows if rows share scales; values of the scheme's number of scales, if
                         any. In super-blocks float32: integers times one float16
    zeros        (n, g)  int32 between the number's limits; None if the scheme is symmetric. Minima, float32, in schemes
                 with minima
    input_scale  ()      float32, positive: `x ~ code * input_scale`, or the divisor of the inputs' group scales; only
                         in schemes with static inputs
    divisor      ()      float32, positive: of the scales, only in schemes whose scales are relative to one
    order        (k)     int64: column i of the codes multiplies input order[i] (GPTQ's act-order); None if that is i

    Checked on construction: ValueError, with numbers, if shapes, dtypes or values contradict the scheme. A check waits
    for the device, so that iterates of a descent are made by `iterate`, and the one that is kept is `checked`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: Scheme
    input_scale: Tensor | None = None
    divisor: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        reason = self.reason_against()
        if reason:
            raise ValueError(f"a {self.scheme} weight of shape {tuple(self.codes.shape)} is impossible: {reason}")

    def reason_against(self) -> str | None:
        """The reason why these tensors are not a weight of this scheme, or None."""
        number = self.scheme.number
        dtype = number.storage
        if self.codes.ndim != 2 or self.codes.dtype != dtype:
            return f"codes must be 2-dimensional {dtype}, not {self.codes.ndim}-dimensional {self.codes.dtype}"
        n, k = self.codes.shape
        if self.scheme.group_size > 0 and k % self.scheme.group_size and self.scheme.rows == 1:
            return f"{k} inputs do not divide into groups of {self.scheme.group_size}"
        sides = self.scheme.sides(n, k)
        if tuple(self.scales.shape) != sides:
            return f"scales have shape {tuple(self.scales.shape)}, not {sides}"
        if self.scales.dtype not in SCALE_DTYPES:
            return f"scales are {self.scales.dtype}, not float16, bfloat16 or float32"
        if (self.zeros is None) != self.scheme.symmetric:
            return "only asymmetric schemes have zeros, and they must have them"
        if self.zeros is not None and tuple(self.zeros.shape) != sides:
            return f"zeros have shape {tuple(self.zeros.shape)}, not {sides}"
        if (self.input_scale is None) == self.scheme.static_inputs:
            return "an input scale is required by schemes with static inputs, and only by them"
        if (self.divisor is None) == self.scheme.weights.parent:
            return "a divisor of scales is required by schemes whose scales are relative to one, and only by them"
        if self.codes.is_meta or not n * k:
            return None
        if self.order is not None and not torch.equal(self.order.sort().values, torch.arange(k).to(self.order)):
            return f"its order is no permutation of {k} inputs"
        for name, one in (("input scale", self.input_scale), ("divisor of scales", self.divisor)):
            if one is not None and not (one.numel() == 1 and bool((one > 0) & torch.isfinite(one))):
                return f"its {name} is {one.tolist()}; one finite, positive number is needed"
        size = self.scales.abs() if self.scheme.may_be_negative else self.scales
        if not bool((torch.isfinite(size) & (size > 0)).all()):
            return f"a scale is zero{'' if self.scheme.may_be_negative else ', negative'} or not finite"
        zeros = None if self.scheme.weights.minima else self.zeros
        for name, values in (("code", self.codes), ("zero", zeros)):
            reason = None if values is None else number.reason_against_codes(values)
            if reason:
                return f"a {name} {reason}"
        return self._reason_against_sides()

    def _reason_against_sides(self) -> str | None:
        """The reason why scales are not those that the scheme stores, or minima not finite, or None."""
        side = self.scheme.weights
        minima = self.zeros if side.minima else None
        if minima is not None and not (minima.dtype == torch.float32 and bool(torch.isfinite(minima).all())):
            return f"its minima are {minima.dtype}, or not all finite; finite float32 fits"
        if side.span:
            return None if self.scales.dtype == torch.float32 else f"scales of super-blocks are {self.scales.dtype}"
        coarse = side.scales
        if coarse is None or torch.equal(numerics.coarse_scale(self.scales, coarse).float(), self.scales.float()):
            return None
        return f"a scale is no {coarse.name}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Packed size in bytes: codes, scales and zeros."""
        n, k = self.shape
        return int(n * k * self.scheme.bits_per_weight(k, 8 * self.scales.element_size()) / 8)

    @property
    def steps(self) -> Tensor:
        """The weight of one code step, (n, g) float32: the scales, divided by their divisor."""
        return self.scales.float() if self.divisor is None else self.scales.float() / self.divisor

    def values(self) -> Tensor:
        """code - zero, (n, k) float32: the weight in units of its scales, or the weight above its minima."""
        values = self.scheme.number.decode(self.codes)
        if self.zeros is None or self.scheme.weights.minima:
            return values
        return values - numerics.per_weight(self.zeros, self.scheme, values)

    def remainder(self, wanted: Tensor) -> Tensor:
        """The difference to the weight (n, k) that was rounded, in parts, as a fraction of the distance to the next
        code in its direction: int8, of which 127 is half the distance. A larger difference counts as half."""
        values = self.values()
        wanted = numerics.raised(wanted, self.scheme, self.zeros)
        away = wanted / numerics.per_weight(self.scales, self.scheme, wanted) - values
        return (away / self.scheme.number.gap(values, away) * 2 * HALF).clamp_(-HALF, HALF).round_().to(torch.int8)

    def position(self, remainder: Tensor) -> Tensor:
        """The weight (n, k) with this `remainder`, float32 in units of its scales: it rounds to `values()`."""
        values, away = self.values(), remainder.float()
        return values + away * self.scheme.number.gap(values, away) / (2 * HALF + 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (n, k), computed in float32 and rounded once to `dtype`; its inputs are in their own order."""
        weight = numerics.dequantize(self.codes, self.scheme, self.steps, self.zeros).to(dtype)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def iterate(self, scales: Tensor, codes: Tensor | None = None, zeros: Tensor | None = None) -> "QTensor":
        """This weight with other `scales`, and codes and zeros if they are given, without a check."""
        other = copy.copy(self)
        changed = {"scales": scales, "codes": codes, "zeros": zeros}
        other.__dict__.update({name: value for name, value in changed.items() if value is not None})
        return other

    def split(self, count: int) -> list["QTensor"]:
        """The `count` weights of one shape whose rows, one behind the other, are this one's; without a check."""
        assert count == 1 or not self.shape[0] % (count * self.scheme.rows), "each weight has blocks of its own"
        zeros = [None] * count if self.zeros is None else self.zeros.tensor_split(count)
        parts = zip(self.codes.tensor_split(count), self.scales.tensor_split(count), zeros, strict=True)
        return [self.iterate(scales, codes, zero) for codes, scales, zero in parts]

    def checked(self) -> "QTensor":
        """This weight, if it is a possible one: ValueError otherwise."""
        return replace(self)

    def to(self, device: torch.device | str) -> "QTensor":
        """This weight on a device. One that is there already is not checked again."""
        codes = self.codes.to(device)
        if codes is self.codes:
            return self
        zeros, *ones = (
            None if each is None else each.to(device)
            for each in (self.zeros, self.input_scale, self.divisor, self.order)
        )
        return QTensor(codes, self.scales.to(device), zeros, self.scheme, *ones)


def round_to_nearest(
    w: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    shrink: Tensor | float = 1.0,
    divisor: Tensor | None = None,
) -> QTensor:
    """`w` (n, k) rounded to the nearest code; `shrink` as in numerics.choose_params, `divisor` as in in_parts."""
    divisor = numerics.own_divisor(w, scheme) if divisor is None else divisor
    codes, scales, zeros = [], [], []
    for rows, sides in numerics.pieces_of(w, scheme):
        part, _ = numerics.in_parts(w[rows], scheme, divisor)
        kept = shrink[..., sides, :] if isinstance(shrink, Tensor) and shrink.ndim else shrink
        scale, zero = numerics.choose_params(part, scheme, scale_dtype, kept)
        codes.append(numerics.quantize(part, scheme, scale, zero))
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return QTensor(torch.cat(codes), torch.cat(scales), torch.cat(zeros) if zeros else None, scheme, divisor=divisor)


def relative_error(weight: QTensor, original: Tensor) -> float:
    """The norm of the error of `weight` as a fraction of that of `original` (n, k)."""
    lost = total = 0.0
    steps = weight.steps
    for rows, sides in numerics.pieces_of(original, weight.scheme):
        zeros, wanted = None if weight.zeros is None else weight.zeros[sides], original[rows].float()
        error = numerics.dequantize(weight.codes[rows], weight.scheme, steps[sides], zeros) - wanted
        lost += float(error.square().sum())
        total += float(wanted.square().sum())
    return math.sqrt(lost / max(total, 1e-60))
