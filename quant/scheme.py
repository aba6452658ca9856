"""Quantization scheme of a linear: number types of weights and inputs, and granularity of their scales."""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from lowbit.errors import nearest
from lowbit.quant.numbers import E8M0, FP4, FP8, INT4, INT8, NUMBERS, Number, integer_of

GROUP_RULE = "engines take multiples of 32, or -1 for one scale per channel"


@dataclass(frozen=True)
class PerChannel:
    """Weights: one scale per output row."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive inputs, of a row of weights or of a token."""

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1 or self.size % 16:
            raise ValueError(f"group size {self.size!r}: {GROUP_RULE}")

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True)
class PerBlock:
    """Weights: one scale per `rows` outputs and `columns` inputs."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"b{self.rows}x{self.columns}"


@dataclass(frozen=True)
class PerToken:
    """Inputs: one scale per token, computed at run time."""

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerTensor:
    """Inputs: one scale for all tokens, fixed by calibration."""

    def __str__(self) -> str:
        return "tensor"


Granularity = PerChannel | PerGroup | PerBlock | PerToken | PerTensor


def granularity_of(group_size: int) -> PerChannel | PerGroup:
    """PerGroup(group_size), or PerChannel if group_size is -1."""
    return PerChannel() if group_size == -1 else PerGroup(group_size)


@dataclass(frozen=True)
class Side:
    """One side of a product: the number type of its values, and the granularity of its scales.

    scales  number type of the scales; None for the floating-point type of the checkpoint
    parent  True if scales are relative to one float32 per tensor, the divisor: scale = stored scale / divisor
    span    inputs of a super-block, whose scales are integers times one float16; 0 if there are none
    minima  True if groups have minima, of the same kind as scales: `w ~ code * scale - minimum`, without zeros
    """

    number: Number
    granularity: Granularity
    scales: Number | None = None
    parent: bool = False
    span: int = 0
    minima: bool = False

    @property
    def static(self) -> bool:
        """True if one scale, or one divisor of scales, serves all tokens, fixed by calibration."""
        return self.parent or isinstance(self.granularity, PerTensor)

    @property
    def blocks(self) -> bool:
        """True for the blocks of GGUF that no other format has: super-blocks, or minima."""
        return self.span > 0 or self.minima

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1 for all."""
        match self.granularity:
            case PerGroup(size):
                return size
            case PerBlock(_, columns):
                return columns
        return -1


KNOWN = "fp8, fp8-block, nvfp4, mxfp4, mxfp8 and their kin"
# Quantized inputs, by the last part of a scheme's text.
INPUTS = {
    "a8token": Side(INT8, PerToken()),
    "a8tensor": Side(INT8, PerTensor()),
    "afp8token": Side(FP8, PerToken()),
    "afp8tensor": Side(FP8, PerTensor()),
}


@dataclass(frozen=True)
class Scheme:
    """Quantization of a linear: `w ~ (code - zero) * scale`, and optionally quantized inputs.

    Symmetric schemes have signed numbers and no zeros. Asymmetric schemes have unsigned integers, and one integer zero
    or one minimum per scale. Text form: a name of NAMED ("int8", "fp8"), or else number, granularity and inputs:
    "int4-g128", "uint4-g64", "int4-channel".
    """

    weights: Side
    inputs: Side | None = None

    def __post_init__(self) -> None:
        number, size = self.number, self.group_size
        if number.is_integer and size % 32 and size != -1 and not self.weights.span:
            raise ValueError(f"group size {size}: {GROUP_RULE}")
        plain = not number.is_integer and self.weights.scales is None and self.rows == 1
        if plain and (size != -1 or number.coarse):
            raise ValueError(f"{number.name} per {self.granularity} is no scheme: floats are {KNOWN}")
        if self.inputs is None:
            return
        alike = self.inputs.number == number and self.inputs.group_size == size
        if not self.wide_inputs and (not alike or self.inputs.scales != self.weights.scales):
            raise ValueError(
                f"{self}: quantized inputs go with weights of the same number, one scale per channel, or groups alike; "
                "and those of 8 bits by token with int4"
            )

    @property
    def weights_only(self) -> "Scheme":
        """The scheme of the weight alone."""
        return replace(self, inputs=None)

    @property
    def wide_inputs(self) -> bool:
        """True for weights of int4 with inputs in 8 bits by token."""
        by_token = self.inputs in (INPUTS["a8token"], INPUTS["afp8token"])
        return by_token and self.number == INT4 and not self.weights.blocks

    @property
    def number(self) -> Number:
        """The weights' number."""
        return self.weights.number

    @property
    def granularity(self) -> Granularity:
        """The granularity of the weights' scales."""
        return self.weights.granularity

    @property
    def static_inputs(self) -> bool:
        """True if inputs have one scale, fixed by calibration."""
        return self.inputs is not None and self.inputs.static

    @property
    def symmetric(self) -> bool:
        return self.number.signed

    @property
    def signed_scales(self) -> bool:
        """True if rounding may choose negative scales."""
        return self.symmetric and self.number.signed_scales

    @property
    def may_be_negative(self) -> bool:
        """True if a weight may have negative scales. Ours have none in 8 bits, other writers' integers may."""
        return self.number.signed_scales or (self.number.is_integer and self.inputs is None)

    @property
    def bits(self) -> int:
        return self.number.bits

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1 for the whole row."""
        return self.weights.group_size

    @property
    def rows(self) -> int:
        """Outputs that share a scale."""
        return self.granularity.rows if isinstance(self.granularity, PerBlock) else 1

    def groups(self, k: int) -> int:
        """Scales per row of `k` inputs. ValueError if k is not divisible by the group size of rows."""
        if self.group_size == -1:
            return 1
        reason = None if self.rows > 1 else self._reason_against_inputs(k)
        if reason:
            raise ValueError(reason)
        return -(-k // self.group_size)

    def sides(self, n: int, k: int) -> tuple[int, int]:
        """The shape of the scales of a weight (n, k)."""
        return -(-n // self.rows), self.groups(k)

    def reason_against_shape(self, n: int, k: int) -> str | None:
        """The reason why a weight (n, k) cannot have this scheme, or None."""
        outputs = f"{n} outputs do not divide into blocks of {self.rows}" if n % self.rows else None
        return self._reason_against_inputs(k) or outputs

    def _reason_against_inputs(self, k: int) -> str | None:
        """The reason why groups or super-blocks do not divide a row of `k` inputs, or None."""
        size, kind = (self.weights.span, "super-blocks") if self.weights.span else (self.group_size, "groups")
        return f"{k} inputs do not divide into {kind} of {size}" if size != -1 and k % size else None

    def fallback(self) -> "Scheme | None":
        """The scheme to try if this one does not fit a shape; None if none is left."""
        if self.rows > 1:
            inputs = None if self.inputs is None else INPUTS["afp8token"]
            return replace(self, weights=replace(self.weights, granularity=PerChannel()), inputs=inputs)
        if self.weights.span:
            return parse_scheme(SMALLER_BLOCKS[str(self)])
        if self.weights.scales is not None or self.weights.minima or self.group_size == -1:
            return None
        return self.with_group_size(next(size for size in FALLBACK_GROUP_SIZES if size < self.group_size))

    def fitting(self, shapes: Collection[tuple[int, int]]) -> "Scheme | None":
        """This scheme, or the first fallback that fits all `shapes` (n, k); None if none does."""
        scheme: Scheme | None = self
        while scheme is not None and any(scheme.reason_against_shape(n, k) for n, k in shapes):
            scheme = scheme.fallback()
        return scheme

    def with_group_size(self, group_size: int) -> "Scheme":
        return replace(self, weights=replace(self.weights, granularity=granularity_of(group_size)))

    def with_zeros(self, zeros: bool) -> "Scheme":
        """The integer scheme with or without zeros. Schemes of floats, of blocks and of quantized inputs have no such
        variant and are returned unchanged."""
        if not self.number.is_integer or self.inputs is not None or self.weights.blocks:
            return self
        return replace(self, weights=replace(self.weights, number=integer_of(self.bits, signed=not zeros)))

    def bits_per_weight(self, k: int, scale_bits: int = 16) -> float:
        """Stored bits per weight in a row of `k`, including scales, zeros and minima."""
        weights = self.weights
        own = scale_bits if weights.scales is None else weights.scales.bits
        other = 0 if self.symmetric else own if weights.minima else self.bits
        above = (2 if weights.minima else 1) * FACTOR_BITS / weights.span if weights.span else 0
        return self.bits + (own + other) * self.groups(k) / (k * self.rows) + above

    def __str__(self) -> str:
        named = next((name for name, scheme in NAMED.items() if scheme == self), None)
        return named or f"{self.number.name}-{self.granularity}{self._ending}"

    @property
    def _ending(self) -> str:
        return next((f"-{text}" for text, side in INPUTS.items() if side == self.inputs), "")


FP8_BLOCK = Side(FP8, PerBlock(128, 128))
FP8_GROUP = Side(FP8, PerGroup(128))
NVFP4 = Side(FP4, PerGroup(16), scales=FP8, parent=True)
MXFP4 = Side(FP4, PerGroup(32), scales=E8M0)
MXFP8 = Side(FP8, PerGroup(32), scales=E8M0)
FACTOR_BITS = 16  # of the float16 that the scales of a super-block are multiples of
SUPER = 256  # inputs of a super-block


def _block(number: str, size: int, scales: str | None = None, minima: bool = False) -> Scheme:
    """A scheme of GGUF's blocks: with a number of scales in super-blocks, else with float scales."""
    known = None if scales is None else NUMBERS[scales]
    return Scheme(Side(NUMBERS[number], PerGroup(size), known, span=SUPER if scales else 0, minima=minima))


# Schemes with a short name.
NAMED = {
    "int8": Scheme(Side(INT8, PerChannel())),
    "int8-a8": Scheme(Side(INT8, PerChannel()), INPUTS["a8token"]),
    "int8-a8-static": Scheme(Side(INT8, PerChannel()), INPUTS["a8tensor"]),
    "fp8": Scheme(Side(FP8, PerChannel()), INPUTS["afp8token"]),
    "fp8-static": Scheme(Side(FP8, PerChannel()), INPUTS["afp8tensor"]),
    "fp8-a16": Scheme(Side(FP8, PerChannel())),
    "fp8-block": Scheme(FP8_BLOCK, FP8_GROUP),
    "fp8-block-a16": Scheme(FP8_BLOCK),
    "nvfp4": Scheme(NVFP4, NVFP4),
    "nvfp4-a16": Scheme(NVFP4),
    "mxfp4": Scheme(MXFP4, MXFP4),
    "mxfp4-a16": Scheme(MXFP4),
    "mxfp8": Scheme(MXFP8, MXFP8),
    "mxfp8-a16": Scheme(MXFP8),
    "int4-a8": Scheme(Side(INT4, PerGroup(128)), INPUTS["a8token"]),
    "int4-afp8": Scheme(Side(INT4, PerGroup(128)), INPUTS["afp8token"]),
    "q4_1": _block("uint4", 32, minima=True),
    "q5_1": _block("uint5", 32, minima=True),
    "q2_k": _block("uint2", 16, "uint4", minima=True),
    "q3_k": _block("int3", 16, "int6"),
    "q4_k": _block("uint4", 32, "uint6", minima=True),
    "q5_k": _block("uint5", 32, "uint6", minima=True),
    "q6_k": _block("int6", 16, "int8"),
}
# In place of super-blocks that do not divide a row: llama.cpp's choices.
SMALLER_BLOCKS = {"q2_k": "int4-g32", "q3_k": "int4-g32", "q4_k": "int5-g32", "q5_k": "q5_1", "q6_k": "int8-g32"}
# llama.cpp's names: of schemes, and of its mixtures by the scheme of most linears.
LLAMA_NAMES = {"q4_0": "int4-g32", "q5_0": "int5-g32", "q8_0": "int8-g32", "q2_k_s": "q2_k", "q3_k_l": "q3_k"}
LLAMA_NAMES |= {f"{base}_{size}": base for base in ("q3_k", "q4_k", "q5_k") for size in "sm"}
# Group sizes that an error message proposes.
USUAL_GROUPS = (128, 64, 32)
KEPT = "16bit"  # in place of a scheme: the linear is not quantized


def make_scheme(bits: int, group_size: int, symmetric: bool) -> Scheme:
    """An integer scheme; group_size -1 is per channel. ValueError for a width that no format can store."""
    return Scheme(Side(integer_of(bits, symmetric), granularity_of(group_size)))


def parse_scheme(text: str) -> Scheme:
    """The scheme with this name or text. ValueError for an unknown one names the nearest."""
    text = LLAMA_NAMES.get(text, text)
    if text in NAMED:
        return NAMED[text]
    match = re.fullmatch("(?P<name>[a-z]+[0-9]+)-(channel|g(?P<size>[0-9]+))(-(?P<inputs>a[a-z0-9]+))?", text)
    if match is None or match["name"] not in NUMBERS or match["inputs"] not in {None, *INPUTS}:
        begun = [name for name in scheme_names() if name.startswith(text)]
        raise ValueError(f"{text!r} is no scheme; {nearest(text, begun or scheme_names(), most=3)}")
    weights = Side(NUMBERS[match["name"]], granularity_of(int(match["size"] or -1)))
    return Scheme(weights, INPUTS[match["inputs"]] if match["inputs"] else None)


def parse_choice(text: str) -> Scheme | None:
    """The scheme with this name or text; None for KEPT. ValueError for an unknown one names the nearest."""
    return None if text == KEPT else parse_scheme(text)


def name_of(scheme: Scheme | None) -> str:
    """The text that `parse_choice` reads."""
    return KEPT if scheme is None else str(scheme)


def scheme_names() -> list[str]:
    """Names to suggest in errors: NAMED, and integers with usual group sizes."""
    integers = [number.name for number in NUMBERS.values() if number.is_integer and number.bits < 8]
    return [*NAMED, *(f"{name}-g{size}" for name in integers for size in USUAL_GROUPS)]


# Tried in this order if the requested size does not divide a layer's inputs.
FALLBACK_GROUP_SIZES = (128, 64, 32, -1)
