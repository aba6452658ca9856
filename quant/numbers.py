"""The numbers that weights and inputs are rounded to: one row each."""

from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT_BITS = 0x7F800000  # of a float32
BYTE = 8  # bits


@dataclass(frozen=True)
class Number:
    """A type of number: a grid of values between two limits, in units of a scale.

    name           as schemes spell it
    bits           in a file
    storage        the dtype that holds codes in memory; a code cast to float32 is its value
    low, high      the limits, both on the grid
    mantissa       bits behind the leading one of a float, whose steps double with every power of two; None where all
                   steps are `least`
    least          the smallest step between neighbours
    signed         whether values lie on both sides of zero; the others need a zero point
    signed_scales  whether scales may lie below zero: where a side has one value more, it is worth choosing which side

    Rounding is to the nearest value, of two to the one whose last bit is zero.
    """

    name: str
    bits: int
    storage: torch.dtype
    low: float
    high: float
    mantissa: int | None = None
    least: float = 1.0
    signed: bool = True
    signed_scales: bool = False

    @property
    def bias(self) -> int:
        """What makes an integer's codes unsigned when added."""
        return -int(self.low)

    @property
    def is_integer(self) -> bool:
        """True if the values are consecutive integers."""
        return self.mantissa is None

    @property
    def coarse(self) -> bool:
        """True if there are so few values that weights want a scale for each group: fewer bits than a byte."""
        return self.bits < BYTE

    @property
    def fineness(self) -> float:
        """A step as a fraction of the power of two at or below a value; 0 where all steps are alike."""
        return 0.0 if self.mantissa is None else 2.0**-self.mantissa

    @property
    def grid(self) -> tuple[float, float, float, float]:
        """low, high, fineness and least, for a kernel."""
        return float(self.low), float(self.high), self.fineness, self.least

    def encode(self, values: Tensor, zeros: Tensor | None = None) -> Tensor:
        """Codes of `values` (float32, overwritten), in `storage`: clamp(round(value) + zero).

        zeros  integers of a shape that broadcasts; None for no zero points
        """
        codes = round_to_grid(values, self.fineness, self.least)
        if zeros is not None:
            codes += zeros
        return codes.clamp_(self.low, self.high).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of `codes`."""
        return codes.float()

    def spacing(self, values: Tensor) -> Tensor | float:
        """The step of the grid at each of `values`, float32: a number where all steps are alike."""
        return self.least if self.is_integer else steps_at(values, self.fineness, self.least)

    def reason_against_codes(self, codes: Tensor) -> str | None:
        """The reason why `codes` (of the dtype `storage`, not empty) are none of this number, or None."""
        if self.is_integer:
            inside = self.low <= int(codes.min()) and int(codes.max()) <= self.high
            return None if inside else f"lies outside [{self.low:g}, {self.high:g}]"
        values = self.decode(codes)
        kept = self.decode(self.encode(values.clone())) == values
        return None if bool(kept.all()) else f"is no {self.name} within [{self.low:g}, {self.high:g}]"


def round_to_grid(values: Tensor, fineness: float, least: float) -> Tensor:
    """`values` (float32), overwritten by the nearest points of the grid that goes on beyond any limits.

    fineness  a step as a fraction of the power of two at or below a value; 0 where all steps are `least`
    least     the smallest step
    """
    if fineness == 0 and least == 1:
        return values.round_()
    steps = steps_at(values, fineness, least)
    return values.div_(steps).round_().mul_(steps)


def steps_at(values: Tensor, fineness: float, least: float) -> Tensor:
    """The step at each value: the power of two at or below it times `fineness`, and `least` at least."""
    powers = (values.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return powers.mul_(fineness).clamp_(min=least)


def _integer(bits: int, signed: bool, signed_scales: bool = False) -> Number:
    low = -(1 << (bits - 1)) if signed else 0
    storage = torch.int8 if signed else torch.uint8
    name = f"{'' if signed else 'u'}int{bits}"
    high = low + (1 << bits) - 1
    return Number(name, bits, storage, low, high, signed=signed, signed_scales=signed_scales)


INT4 = _integer(4, signed=True, signed_scales=True)
INT8 = _integer(8, signed=True)  # the one code more on a side is worth nothing
UINT4 = _integer(4, signed=False, signed_scales=True)  # what INT4 stands for, it can say
UINT8 = _integer(8, signed=False)
# e4m3 without infinities: 4 bits of exponent, 3 of mantissa
FP8 = Number("fp8", 8, torch.float8_e4m3fn, -448, 448, mantissa=3, least=2**-9)

NUMBERS = {number.name: number for number in (INT4, INT8, UINT4, UINT8, FP8)}


def integer_of(bits: int, signed: bool) -> Number:
    """The integer of so many bits. ValueError names the widths that exist."""
    for number in NUMBERS.values():
        if number.is_integer and (number.bits, number.signed) == (bits, signed):
            return number
    raise ValueError(f"no {bits}-bit type: formats that engines load hold 4 or 8 bits")


def float_of(bits: int) -> Number:
    """The float of so many bits. ValueError names those that exist."""
    floats = [number for number in NUMBERS.values() if not number.is_integer]
    for number in floats:
        if number.bits == bits:
            return number
    raise ValueError(f"no {bits}-bit float: there is {', '.join(number.name for number in floats)}")
