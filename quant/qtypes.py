"""The integer types a code can have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QType:
    """An integer type: how many bits, and whether codes carry a sign.

    Codes lie in [min, max]. In memory a packed code is always unsigned: `code + bias`. Rounding to a code is to the
    nearest, ties to even (torch.round).
    """

    name: str
    bits: int
    signed: bool

    @property
    def min(self) -> int:
        return -self.bias

    @property
    def max(self) -> int:
        return (1 << self.bits) - 1 - self.bias

    @property
    def bias(self) -> int:
        """What is added to a code to make it unsigned."""
        return 1 << (self.bits - 1) if self.signed else 0


INT4 = QType("int4", 4, signed=True)
INT8 = QType("int8", 8, signed=True)
UINT4 = QType("uint4", 4, signed=False)
UINT8 = QType("uint8", 8, signed=False)

QTYPES = {qtype.name: qtype for qtype in (INT4, INT8, UINT4, UINT8)}


def qtype_of(bits: int, symmetric: bool) -> QType:
    """The type for `bits`: signed where the scheme is symmetric. ValueError names the widths that exist."""
    for qtype in QTYPES.values():
        if qtype.bits == bits and qtype.signed == symmetric:
            return qtype
    raise ValueError(f"no {bits}-bit type: formats that engines load hold 4 or 8 bits")
