"""How a weight is quantized: an integer type, and who shares a scale."""

import re
from dataclasses import dataclass, replace
from enum import Enum

from lowbit.quant.qtypes import QTYPES, QType, qtype_of


@dataclass(frozen=True)
class PerChannel:
    """One scale per output row."""

    def groups(self, k: int) -> int:
        return 1

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive inputs of a row."""

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1 or self.size % 32:
            raise ValueError(f"group size {self.size!r}: engines take multiples of 32, or -1 for one scale per channel")

    def groups(self, k: int) -> int:
        if k % self.size:
            raise ValueError(f"{k} inputs do not divide into groups of {self.size}")
        return k // self.size

    def __str__(self) -> str:
        return f"g{self.size}"


Granularity = PerChannel | PerGroup


def granularity_of(group_size: int) -> Granularity:
    """PerGroup(group_size), or PerChannel where group_size is -1."""
    return PerChannel() if group_size == -1 else PerGroup(group_size)


class Activations(Enum):
    """How the inputs of a linear are quantized: symmetric int8, who shares a scale being the value's name."""

    TOKEN = "a8token"  # one scale per token, found as the tokens come
    TENSOR = "a8tensor"  # one scale for all, fixed by calibration


@dataclass(frozen=True)
class Scheme:
    """A linear's quantization: `w ~ (code - zero) * scale`, and how its inputs are quantized, if they are.

    Symmetric schemes have signed codes and no zeros; asymmetric ones unsigned codes and one integer zero beside each
    scale. Text form: "int4-g128", "int8-channel", "uint4-g64", "int8-channel-a8token".
    """

    qtype: QType
    granularity: Granularity
    activations: Activations | None = None

    def __post_init__(self) -> None:
        plain = self.qtype.name == "int8" and isinstance(self.granularity, PerChannel)
        if self.activations is not None and not plain:
            raise ValueError(f"{self}: quantized activations go with symmetric 8-bit weights, one scale per channel")

    @property
    def weights_only(self) -> "Scheme":
        """The scheme of the weight alone."""
        return replace(self, activations=None)

    @property
    def symmetric(self) -> bool:
        return self.qtype.signed

    @property
    def signed_scales(self) -> bool:
        """Whether rounding chooses scales below zero too; with 8 bits the one code more on a side is worth nothing."""
        return self.symmetric and self.bits == 4

    @property
    def bits(self) -> int:
        return self.qtype.bits

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1 for the whole row."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else -1

    def groups(self, k: int) -> int:
        """Scales per row of `k` inputs. ValueError where k does not divide."""
        return self.granularity.groups(k)

    def with_group_size(self, group_size: int) -> "Scheme":
        return replace(self, granularity=granularity_of(group_size))

    def bits_per_weight(self, k: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of a row of `k`, scales and zeros counted."""
        side = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + side * self.groups(k) / k

    def __str__(self) -> str:
        return "-".join(
            [self.qtype.name, str(self.granularity)] + ([self.activations.value] if self.activations else [])
        )


def make_scheme(bits: int, group_size: int, symmetric: bool) -> Scheme:
    """Scheme(bits, group_size, symmetric); group_size -1 is per channel. ValueError for what no format holds."""
    return Scheme(qtype_of(bits, symmetric), granularity_of(group_size))


def parse_scheme(text: str) -> Scheme:
    """The scheme that `str(scheme)` printed."""
    match = re.fullmatch("(?P<name>[a-z]+[0-9]+)-(channel|g(?P<size>[0-9]+))(-(?P<activations>a8[a-z]+))?", text)
    known = {activations.value: activations for activations in Activations}
    if match is None or match["name"] not in QTYPES or match["activations"] not in {None, *known}:
        raise ValueError(f"{text!r} is no scheme: write int4-g128, uint4-g64, int8-channel, int8-channel-a8token")
    granularity = granularity_of(int(match["size"] or -1))
    activations = known[match["activations"]] if match["activations"] else None
    return Scheme(QTYPES[match["name"]], granularity, activations)


# Tried in this order where a layer's inputs do not divide by the size asked for.
FALLBACK_GROUP_SIZES = (128, 64, 32, -1)


def fitting_group_size(k: int, wanted: int) -> int:
    """The largest size of FALLBACK_GROUP_SIZES at most `wanted` (or `wanted` itself) that divides k; -1 as the last."""
    if wanted == -1 or k % wanted == 0:
        return wanted
    return next(size for size in FALLBACK_GROUP_SIZES if size == -1 or (size < wanted and k % size == 0))
