"""The number types that weights and inputs are rounded to, one row each."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EXPONENT_BITS = 0x7F800000  # exponent field of a float32
BYTE = 8  # bits
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # values of all codes


@dataclass(frozen=True)
class Number:
    """A number type: a grid of values between two limits, in units of a scale.

    name           its name in a scheme's text
    bits           bits of a stored code
    storage        dtype of codes in memory; a code cast to float32 is its value
    low, high      smallest and largest value
    mantissa       explicit mantissa bits of a float, whose step doubles with every power of two; None for integers,
                   whose step is always `least`
    least          smallest step between neighbouring values
    signed         True if values lie on both sides of zero; unsigned numbers need a zero point
    signed_scales  True if a scale may be negative. Useful if the grid has one value more on one side: the sign chooses
                   the side

    Rounding is to nearest, ties to even.
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
        """The offset that makes an integer's codes unsigned."""
        return -int(self.low)

    @property
    def is_integer(self) -> bool:
        """True if the values are consecutive integers."""
        return self.mantissa is None

    @property
    def is_of_storage(self) -> bool:
        """True if the values are all that the storage holds between the limits, so that a cast rounds to them."""
        if self.mantissa is None:
            return False
        limits = torch.finfo(self.storage)
        return (limits.eps, limits.smallest_normal * limits.eps) == (self.fineness, self.least)

    @property
    def coarse(self) -> bool:
        """True if the number has so few values that weights need a scale per group: fewer than 8 bits."""
        return self.bits < BYTE

    @property
    def fineness(self) -> float:
        """The relative step of a float, as a fraction of the power of two at or below a value; 0 for integers."""
        return 0.0 if self.mantissa is None else 2.0**-self.mantissa

    @property
    def grid(self) -> tuple[float, float, float, float]:
        """low, high, fineness and least, for a kernel."""
        return float(self.low), float(self.high), self.fineness, self.least

    def encode(self, values: Tensor, zeros: Tensor | None = None) -> Tensor:
        """Codes of `values` (float32, overwritten), in `storage`: clamp(round(value) + zero).

        zeros  integer zero points, broadcast to `values`; None for none
        """
        if self.is_of_storage:  # a cast rounds to nearest, ties to even, a ninth of the time of arithmetic on a CPU
            return torch.where(values.isinf(), torch.nan, values.clamp(self.low, self.high)).to(self.storage)
        codes = round_to_grid(values, self.fineness, self.least)
        if zeros is not None:
            codes += zeros
        return codes.clamp_(self.low, self.high).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """The float32 values of `codes`."""
        is_traced = type(codes) is not Tensor  # torch.compile's tensors have no values, and take no table with some
        if codes.dtype != torch.float8_e4m3fn or codes.is_cuda or is_traced:
            return codes.float()
        return E4M3.index_select(0, places_of(codes)).view(codes.shape)  # a third of the time of torch's cast on a CPU

    def spacing(self, values: Tensor) -> Tensor | float:
        """The grid's step at each of `values` (float32); one number for integers."""
        return self.least if self.is_integer else steps_at(values, self.fineness, self.least)

    def gap(self, values: Tensor, away: Tensor) -> Tensor | float:
        """The distance from each of `values`, points of the grid, to the next point on the side of the sign of `away`.

        The steps of a float double with a power of two, so below one the next point is nearer than above.
        """
        if self.is_integer:
            return self.least
        inwards = values * away < 0
        return self.spacing(torch.where(inwards, values * (1 - self.fineness / 4), values))

    def reason_against_codes(self, codes: Tensor) -> str | None:
        """The reason why `codes` (dtype `storage`, not empty) are not valid codes of this number, or None."""
        if self.is_integer:
            inside = self.low <= int(codes.min()) and int(codes.max()) <= self.high
            return None if inside else f"lies outside [{self.low:g}, {self.high:g}]"
        known = self._is_code.to(codes.device).index_select(0, places_of(codes))
        return None if bool(known.all()) else f"is no {self.name} within [{self.low:g}, {self.high:g}]"

    @cached_property
    def _is_code(self) -> Tensor:
        """True for each byte of the storage that is a code of a float."""
        values = torch.arange(256, dtype=torch.uint8).view(self.storage).float()
        return self.encode(values.clone()).float() == values


def places_of(codes: Tensor) -> Tensor:
    """The bytes of 8-bit `codes` as places in a table of all, int32, flat."""
    return codes.contiguous().view(torch.uint8).flatten().int()


def round_to_grid(values: Tensor, fineness: float, least: float) -> Tensor:
    """`values` (float32), overwritten with the nearest points of an unbounded grid.

    fineness  step as a fraction of the power of two at or below a value; 0 if all steps are `least`
    least     the smallest step
    """
    if fineness == 0 and least == 1:
        return values.round_()
    steps = steps_at(values, fineness, least)
    return values.div_(steps).round_().mul_(steps)


def steps_at(values: Tensor, fineness: float, least: float) -> Tensor:
    """The step at each value: `fineness` times the power of two at or below it, but at least `least`."""
    powers = (values.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return powers.mul_(fineness).clamp_(min=least)


def _integer(bits: int, signed: bool, signed_scales: bool = False) -> Number:
    low = -(1 << (bits - 1)) if signed else 0
    storage = torch.int8 if signed else torch.uint8
    name = f"{'' if signed else 'u'}int{bits}"
    high = low + (1 << bits) - 1
    return Number(name, bits, storage, low, high, signed=signed, signed_scales=signed_scales)


WIDTHS = range(2, 9)  # bits of integers
# With 8 bits the extra code on one side is not worth a signed scale. A zero point can express all that a signed scale
# can.
INTEGERS = tuple(_integer(bits, signed, bits < BYTE) for bits in WIDTHS for signed in (True, False))
# e4m3 without infinities: 4 bits of exponent, 3 of mantissa
FP8 = Number("fp8", 8, torch.float8_e4m3fn, -448, 448, mantissa=3, least=2**-9)
# e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6; e4m3 holds them all
FP4 = Number("fp4", 4, torch.float8_e4m3fn, -6, 6, mantissa=1, least=0.5)
# e8m0, powers of two, only for scales; bfloat16 represents it exactly
E8M0 = Number("e8m0", 8, torch.bfloat16, 2.0**-127, 2.0**127, mantissa=0, least=2.0**-127)

NUMBERS = {number.name: number for number in (*INTEGERS, FP8, FP4)}
INT4, INT8, UINT4, UINT8 = (NUMBERS[name] for name in ("int4", "int8", "uint4", "uint8"))


def integer_of(bits: int, signed: bool) -> Number:
    """The integer type of `bits` bits. ValueError lists the existing widths."""
    for number in NUMBERS.values():
        if number.is_integer and (number.bits, number.signed) == (bits, signed):
            return number
    raise ValueError(f"no {bits}-bit type: there are integers of {WIDTHS[0]} to {WIDTHS[-1]} bits")


def float_of(bits: int) -> Number:
    """The float type of `bits` bits. ValueError lists the existing widths."""
    floats = [number for number in NUMBERS.values() if not number.is_integer]
    for number in floats:
        if number.bits == bits:
            return number
    raise ValueError(f"no {bits}-bit float: there is {', '.join(number.name for number in floats)}")
