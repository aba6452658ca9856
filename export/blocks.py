"""The block types of GGUF: their bytes, field by field, and the scheme of ours that each of them holds.

A row of k weights is k / size blocks, one after the other. A block is a struct of little-endian fields without padding:
codes, or some of the bits of each code, in an order that suits llama.cpp's kernels; scales; and float16 numbers. With d
and m for the float16 numbers, `sc` and `mn` for integers of a sub-block:

    Q4_0, Q5_0, Q8_0  d q                 q signed; one d for each 32 weights
    Q4_1, Q5_1        d q + m
    Q2_K, Q4_K, Q5_K  d sc q - m mn       256 weights; sub-blocks of 16 in Q2_K, of 32 in the others
    Q3_K, Q6_K        d sc q              256 weights, sub-blocks of 16; q and sc signed
    MXFP4             2^(e - 127) q       q is fp4; 32 weights
    NVFP4             s q                 q is fp4, s e4m3 for each 16 weights; another tensor has the factor

Source: ggml/src/ggml-common.h of llama.cpp, which calls d, m and mn so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.numbers import E8M0, FP4, FP8
from lowbit.quant.numerics import LEAST_HALF, end_of
from lowbit.quant.packing import pack, pack_e8m0, pack_fp4, unpack, unpack_e8m0, unpack_fp4
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import SUPER, Scheme, Side, parse_scheme

BYTE, HALF = 8, 16  # bits
NIBBLE = 16  # values of four bits
LOW = 64  # values of six bits


@dataclass(frozen=True)
class Field:
    """A field of a block.

    source  what it holds: codes, scales or minima (or a mix of both, see `_mixed`), factor or offset
    bits    of each value; HALF for a float16
    shape   sizes of the values, as if they had several dimensions
    order   these dimensions in the order of the bytes
    above   the lowest of the value's bits that it holds
    """

    source: str
    bits: int
    shape: tuple[int, ...] = (1,)
    order: tuple[int, ...] = ()
    above: int = 0

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.bits // BYTE

    def pack(self, values: Tensor) -> Tensor:
        """The bytes (blocks, nbytes) of `values` (blocks, count): float16, or integers of which it holds some bits."""
        if self.bits == HALF:
            return values.contiguous().view(torch.uint8)
        held = (values.to(torch.int16) // (1 << self.above)).remainder(1 << self.bits).to(torch.uint8)
        if self.order:
            held = held.unflatten(1, self.shape).permute(0, *(1 + axis for axis in self.order)).flatten(1)
        return held if self.bits == BYTE else pack(held, self.bits).view(torch.uint8)[:, : self.nbytes]

    def unpack(self, raw: Tensor) -> Tensor:
        """The values (blocks, count) in the bytes `raw` (blocks, nbytes): float16, or int16 without the other bits."""
        if self.bits == HALF:
            return raw.clone(memory_format=torch.contiguous_format).view(torch.float16)
        whole = raw.clone(memory_format=torch.contiguous_format)
        held = whole if self.bits == BYTE else unpack(whole.view(torch.int32), self.bits, self.count)
        if self.order:
            sizes, back = (
                [self.shape[axis] for axis in self.order],
                [self.order.index(i) for i in range(len(self.order))],
            )
            held = held.unflatten(1, sizes).permute(0, *(1 + axis for axis in back)).flatten(1)
        return held.to(torch.int16) * (1 << self.above)


@dataclass(frozen=True)
class Block:
    """A block type.

    name    llama.cpp's
    number  its number in a file
    size    weights
    scheme  of ours with the same values
    fields  in the order of the bytes
    """

    name: str
    number: int
    size: int
    scheme: Scheme
    fields: tuple[Field, ...]

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self.fields)

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of `k` weights."""
        return k // self.size * self.nbytes


FACTOR, OFFSET = Field("factor", HALF), Field("offset", HALF)
HALVES = Field("codes", 4, (2, 16), (1, 0))  # nibbles: element j low, j + 16 high
QUARTERS = Field("codes", 4, (4, 2, 32), (0, 2, 1))  # nibbles of each 64 weights: j low, j + 32 high
CRUMBS = Field("codes", 2, (2, 4, 32), (0, 2, 1))  # two bits of each of four runs of 32 in a byte
TWELVE = (Field("scales+minima", BYTE, (12,)),)


def _block(name: str, number: int, size: int, scheme: str, *fields: Field) -> Block:
    return Block(name, number, size, parse_scheme(scheme), fields)


BLOCKS = {
    block.name: block
    for block in (
        _block("Q4_0", 2, 32, "int4-g32", FACTOR, HALVES),
        _block("Q4_1", 3, 32, "q4_1", FACTOR, OFFSET, HALVES),
        _block("Q5_0", 6, 32, "int5-g32", FACTOR, Field("codes", 1, (32,), above=4), HALVES),
        _block("Q5_1", 7, 32, "q5_1", FACTOR, OFFSET, Field("codes", 1, (32,), above=4), HALVES),
        _block("Q8_0", 8, 32, "int8-g32", FACTOR, Field("codes", BYTE, (32,))),
        _block("Q2_K", 10, SUPER, "q2_k", Field("scales+minima", BYTE, (16,)), CRUMBS, FACTOR, OFFSET),
        _block(
            *("Q3_K", 11, SUPER, "q3_k", Field("codes", 1, (2, 4, 32), (2, 0, 1), above=2), CRUMBS),
            *(Field("scales", 4, (2, 8), (1, 0)), Field("scales", 2, (4, 4), (1, 0), above=4), FACTOR),
        ),
        _block("Q4_K", 12, SUPER, "q4_k", FACTOR, OFFSET, *TWELVE, QUARTERS),
        _block(
            *("Q5_K", 13, SUPER, "q5_k", FACTOR, OFFSET, *TWELVE),
            *(Field("codes", 1, (8, 32), (1, 0), above=4), QUARTERS),
        ),
        _block(
            *("Q6_K", 14, SUPER, "q6_k", Field("codes", 4, (2, 2, 2, 32), (0, 2, 3, 1))),
            *(Field("codes", 2, (2, 4, 32), (0, 2, 1), above=4), Field("scales", BYTE, (16,)), FACTOR),
        ),
        _block("MXFP4", 39, 32, "mxfp4-a16", Field("scales", BYTE), HALVES),
        _block("NVFP4", 40, 64, "nvfp4-a16", Field("scales", BYTE, (4,)), Field("codes", 4, (4, 2, 8), (0, 2, 1))),
    )
}
BY_SCHEME = {block.scheme: block for block in BLOCKS.values()}
BY_NUMBER = {block.number: block for block in BLOCKS.values()}
UNSIGNED_SCALES = {"Q3_K": 32}  # added to signed scales; those of Q6_K are two's complement


def block_of(scheme: Scheme) -> Block | None:
    """The block type with the values of a scheme's weights, or None."""
    return BY_SCHEME.get(scheme.weights_only)


def to_rows(weight: QTensor) -> Tensor:
    """The bytes (n, row_bytes) uint8 of a weight, whose scheme must have a block type; a divisor is left out.

    ValueError, with numbers, if float16 has not all of its scales or minima, or if the scales of a super-block are no
    integers times one float16.
    """
    block = BY_SCHEME[weight.scheme.weights_only]
    n, k = weight.shape
    if weight.codes.is_meta:
        return torch.empty(n, block.row_bytes(k), dtype=torch.uint8, device="meta")
    values = _values(weight, block)
    return torch.cat([field.pack(values[field.source]) for field in block.fields], 1).view(n, -1)


def from_rows(raw: Tensor, block: Block, divisor: Tensor | None = None) -> QTensor:
    """The weight in the bytes `raw` (n, row_bytes) uint8: the inverse of `to_rows`.

    ValueError if a scale is not finite, or if it is zero and the block type has no other value for zeros. Where a scale
    is zero, all weights of its group are equal; they get the code 0 and another scale.
    """
    found: dict[str, Tensor] = {}
    pieces = raw.reshape(-1, block.nbytes).split([field.nbytes for field in block.fields], 1)
    for field, piece in zip(block.fields, pieces, strict=True):
        held = field.unpack(piece)
        found[field.source] = found[field.source] + held if field.source in found else held
    codes, scales, zeros = _sides(found, block, len(raw))
    codes = codes.view(len(raw), -1)
    empty = (scales == 0).repeat_interleave(block.scheme.group_size, 1)
    codes = torch.where(empty, torch.zeros_like(codes, dtype=torch.int8), codes.view(torch.int8)).view(codes.dtype)
    return QTensor(codes, _not_zero(scales, block.scheme.weights), zeros, block.scheme, divisor=divisor)


def _values(weight: QTensor, block: Block) -> dict[str, Tensor]:
    """The values of the block's fields by source, a block in each row."""
    side = block.scheme.weights
    values = {"codes": _stored_codes(weight, block)}
    if side.scales in (E8M0, FP8):
        stored = pack_e8m0(weight.scales) if side.scales == E8M0 else weight.scales.to(FP8.storage).view(torch.uint8)
        return values | {"scales": _by_block(stored, block)}
    if not side.span:
        values["factor"] = _by_block(_as_half(weight.scales, "scales"), block)
        if weight.zeros is not None:
            values["offset"] = _by_block(_as_half(-weight.zeros, "minima"), block)
        return values
    for source, factor, side_values in (("scales", "factor", weight.scales), ("minima", "offset", weight.zeros)):
        if side_values is not None:
            factors, integers = factored(side_values, side)
            values |= {factor: factors.view(-1, 1), source: _by_block(integers, block)}
    values["scales"] = values["scales"] + UNSIGNED_SCALES.get(block.name, 0)
    return values | {"scales+minima": _mixed(values["scales"], values["minima"])} if side.minima else values


def _sides(found: Mapping[str, Tensor], block: Block, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes in the number's storage, scales (n, g), and minima (n, g) or None, from the fields' values by source."""
    side, codes = block.scheme.weights, _read_codes(found["codes"], block)
    if side.scales in (E8M0, FP8):
        stored = found["scales"].to(torch.uint8)
        scales = unpack_e8m0(stored) if side.scales == E8M0 else stored.view(FP8.storage).to(torch.bfloat16)
        return codes, scales.view(n, -1), None
    if not side.span:
        minima = -found["offset"].float().view(n, -1) if side.minima else None
        return codes, found["factor"].reshape(n, -1), minima
    if side.minima:
        integers, minima = _unmixed(found["scales+minima"])
        scales, minima = found["factor"].float() * integers, found["offset"].float() * minima
        return codes, scales.view(n, -1), minima.view(n, -1)
    integers = found["scales"] - UNSIGNED_SCALES.get(block.name, 0)
    integers = integers.to(torch.uint8).view(torch.int8)  # those of eight bits were read as unsigned
    return codes, (found["factor"].float() * integers).view(n, -1), None


def _stored_codes(weight: QTensor, block: Block) -> Tensor:
    """The codes, a block in each row, as integers from 0; those of eight bits as they are."""
    number = weight.scheme.number
    if number == FP4:
        return unpack(pack_fp4(weight.codes).view(torch.int32), 4, weight.shape[1]).view(-1, block.size)
    bias = 0 if number.bits == BYTE or not number.signed else number.bias
    return weight.codes.reshape(-1, block.size).to(torch.int16) + bias


def _read_codes(values: Tensor, block: Block) -> Tensor:
    """The codes in the number's storage: the inverse of `_stored_codes`."""
    number = block.scheme.number
    if number == FP4:
        return unpack_fp4(pack(values, 4).view(torch.uint8))
    bias = 0 if number.bits == BYTE or not number.signed else number.bias
    return (values - bias).to(torch.uint8).view(number.storage)


def _by_block(values: Tensor, block: Block) -> Tensor:
    """Values (n, g) of groups, those of a block in each row."""
    return values.reshape(-1, block.size // block.scheme.group_size)


def _mixed(scales: Tensor, minima: Tensor) -> Tensor:
    """Integers of 8 bits that hold scales and minima: pairs of 4 bits, or 8 and 8 of 6 bits in twelve bytes."""
    if scales.shape[1] != 8:
        return scales + NIBBLE * minima
    (low, high), (least, more) = scales.split(4, 1), minima.split(4, 1)
    rest = high % NIBBLE + NIBBLE * (more % NIBBLE)
    return torch.cat([low + LOW * (high // NIBBLE), least + LOW * (more // NIBBLE), rest], 1)


def _unmixed(mixed: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and the minima in those integers."""
    if mixed.shape[1] != 12:
        return mixed % NIBBLE, mixed // NIBBLE
    first, second, rest = mixed.split(4, 1)
    scales = torch.cat([first % LOW, rest % NIBBLE + NIBBLE * (first // LOW)], 1)
    return scales, torch.cat([second % LOW, rest // NIBBLE + NIBBLE * (second // LOW)], 1)


def _as_half(values: Tensor, what: str) -> Tensor:
    """`values` in float16. ValueError if it has not all of them."""
    half = values.to(torch.float16)
    lost = int((half.float() != values.float()).sum())
    if lost:
        low, high = float(values.abs().min()), float(values.abs().max())
        raise ValueError(f"{lost} of {values.numel()} {what} ({low:.3g} to {high:.3g}) are no float16")
    return half


def factored(values: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """The float16 factor (n, s) of each super-block and the integers (n, g) int16 whose products are `values` (n, g).

    The value of largest magnitude has the largest integer, as our own rounding leaves it; else every other integer is
    tried. ValueError if some super-block has no such factor.
    """
    number = side.scales
    assert number is not None
    parts = values.float().unflatten(-1, (-1, side.span // side.group_size))
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    factors, integers, open_ = torch.zeros_like(largest), torch.zeros_like(parts), largest != 0
    end = end_of(number)
    for top in (end, *range(-abs(end) + 1 if number.signed else 1, int(number.high) + 1)):
        if top == 0 or not bool(open_.any()):
            continue
        tried = (largest / top).to(torch.float16).float()
        ratios = (parts / torch.where(tried == 0, LEAST_HALF, tried)).round_()
        inside = (ratios >= number.low) & (ratios <= number.high) & (ratios * tried == parts)
        found = open_ & inside.all(-1, keepdim=True)
        factors, integers = torch.where(found, tried, factors), torch.where(found, ratios, integers)
        open_ = open_ & ~found
    if bool(open_.any()):
        raise ValueError(
            f"the scales or minima of {int(open_.sum())} of {open_.numel()} super-blocks are no integers from "
            f"{number.low} to {number.high} times one float16"
        )
    return factors.squeeze(-1).to(torch.float16), integers.flatten(-2).to(torch.int16)


def _not_zero(scales: Tensor, side: Side) -> Tensor:
    """`scales` with another number in the place of zeros: 1, or in super-blocks one that their factor divides."""
    if not side.span:
        return torch.where(scales == 0, torch.ones_like(scales), scales)
    parts = scales.unflatten(-1, (-1, side.span // side.group_size))
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    other = torch.where(largest == 0, LEAST_HALF, largest)
    return torch.where(parts == 0, other, parts).flatten(-2)
