"""The kernels' element order of a weight: made at load by prepack, inverted by unprepack, never written to a file.

W (n, k) is cut into tiles of 16 rows and chunks of 128 inputs, both padded. A chunk of a tile is contiguous in memory,
2 bytes x bits / 4 per lane and load, in the order in which the 32 lanes of a warp read it. Lane 4 g + t has rows g and
g + 8 and, of each block of 32 inputs, inputs 8 t to 8 t + 7: mma.m16n8k16 allows any order of k that both operands
share, and this one makes each lane's inputs adjacent. Rows i and i + pair_block / 2 within a block of `pair_block` rows
become rows g and g + 8 of a tile. pair_block 16 is the plain order, n pairs gate with up, and the head dimension pairs
the inputs that rotary embedding rotates together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.kernels.row_scaled import RowScaled, reason_against_scales, row_scaled
from lowbit.quant.numbers import FP4, FP8, Number, float_of, integer_of
from lowbit.quant.packing import fp4_bits, fp4_codes
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

TILE_ROWS = 16
CHUNK_K = 128
GROUP_SIZES = (16, 32, 64, 128, 256, -1)
KERNEL_BITS = (2, 3, 4, 5, 6, 7, 8)  # of integers
WHOLE_BITS = (4, 8)  # that divide a word evenly; integers of other widths are streams
KERNEL_FLOATS = (FP8, FP4)
HALF = (torch.float16, torch.bfloat16)
# The power of two by which csrc/dequant.cuh divides a float's values.
EXPANSION = {FP8: 2.0**8, FP4: 2.0**14}


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernels' order.

    words    (tiles, chunks, 64 * bits)           int32   codes
    scales   (tiles, scale_rows, 8, per_chunk, 2)  float16 or bfloat16; rows g, g + 8 adjacent; 0 in the padding. Of fp4
             uint8: the upper bits of a float16 without its sign. Of fp8 with one scale per channel no scale_rows
    zeros    as scales                             uint8   None if the scheme is symmetric
    factors  (tiles, 8, 2)                         float32 of a float's rows; None for integers
    inputs   dtype of the activations of a float; None for integers, whose scales have it
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    n: int
    k: int
    bits: int
    group_size: int
    pair_block: int = TILE_ROWS
    factors: Tensor | None = None
    inputs: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.scales.dtype if self.inputs is None else self.inputs

    @property
    def is_float(self) -> bool:
        return self.factors is not None

    @property
    def number(self) -> Number:
        """The number type of the codes."""
        if self.is_float:
            return float_of(self.bits)
        return integer_of(self.bits, signed=self.zeros is None)

    @property
    def variant(self) -> str:
        """The number type in the kernels' names."""
        return self.number.name if self.is_float else str(self.bits)

    @property
    def scale_groups(self) -> int:
        """Scales per row in 128 inputs; 0 for a float with its factors alone."""
        return self.scales.shape[3] if self.scales.shape[1] else 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory, including padding."""
        held = (self.words, self.scales, self.zeros, self.factors)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def groups_per_chunk(group_size: int) -> int:
    """Scales per row in 128 inputs; 1 if a group is wider."""
    return 1 if group_size in (-1, 256) else CHUNK_K // group_size


def scale_shift(group_size: int) -> int:
    """The shift from a chunk's index to its row of scales: 0, or 1 if two chunks share a scale, or 31 if all do."""
    return {-1: 31, 256: 1}.get(group_size, 0)


def reason_against_packing(n: int, k: int, group_size: int, pair_block: int) -> str | None:
    """The reason why a weight of this shape cannot be packed, or None."""
    if group_size not in GROUP_SIZES:
        return f"groups of {group_size} inputs: the kernels take 16, 32, 64, 128, 256 or -1 (one per channel)"
    if k % 32:
        return f"{k} inputs: the kernels take multiples of 32"
    if pair_block < TILE_ROWS or pair_block % TILE_ROWS or (pair_block > TILE_ROWS and n % pair_block):
        return f"{n} rows do not pair within blocks of {pair_block}: blocks are multiples of 16 that divide the rows"
    return None


def has_kernel(scheme: Scheme) -> bool:
    """True if the kernels support the weights' number type, and their scales have no super-blocks nor minima."""
    if scheme.weights.blocks:
        return False
    return scheme.bits in KERNEL_BITS if scheme.number.is_integer else scheme.number in KERNEL_FLOATS


def reason_against_kernel(weight: QTensor) -> str | None:
    """The reason why no kernel multiplies with weights of this kind, whatever their shape, or None."""
    if weight.scheme.weights.blocks:
        return "the kernels take no super-blocks and no minima"
    if not has_kernel(weight.scheme):
        floats = " and ".join(number.name for number in KERNEL_FLOATS)
        return f"the kernels take integers of {KERNEL_BITS[0]} to {KERNEL_BITS[-1]} bits, {floats}"
    if weight.order is not None:
        return "its inputs are in another order (act-order)"
    return reason_against_scales(weight)


def prepack(weight: QTensor, dtype: torch.dtype, pair_block: int = TILE_ROWS) -> PackedWeight:
    """`weight` in the kernels' order, on its device, for activations in `dtype` (float16 or bfloat16).

    Scales of integers and of fp8 groups are rounded to `dtype`. ValueError for a group size that the kernels lack, for
    k not a multiple of 32, for another dtype, for a pair_block that does not divide n, and for scales of a float's row
    that are too far apart. `unprepack` returns the codes bit for bit.
    """
    (n, k), scheme = weight.shape, weight.scheme
    reason = reason_against_kernel(weight) or reason_against_packing(n, k, scheme.group_size, pair_block)
    if dtype not in HALF:
        reason = f"activations in {dtype}: the kernels take torch.float16 and torch.bfloat16"
    if reason:
        raise ValueError(f"a {scheme} weight of shape ({n}, {k}) cannot be packed: {reason}")
    return prepack_rows(row_scaled(weight), dtype, pair_block)


def prepack_rows(weight: RowScaled, dtype: torch.dtype, pair_block: int) -> PackedWeight:
    """`weight` in the kernels' order. Its shape, kind and scales are those that the kernels take."""
    (n, k), number, size = weight.codes.shape, weight.number, weight.group_size
    words = pack_codes(bits_of(weight.codes, number), number, pair_block)
    scales = pack_sides(as_bytes(weight.scales) if number == FP4 else weight.scales.to(dtype), size, pair_block)
    zeros, factors = weight.zeros, weight.factors
    if zeros is not None:
        zeros = pack_sides(zeros.to(torch.uint8), size, pair_block)
    if factors is None:
        return PackedWeight(words, scales, zeros, n, k, number.bits, size, pair_block)
    factors = pack_sides((factors * EXPANSION[number]).unsqueeze(1), -1, pair_block).view(-1, 8, 2)
    return PackedWeight(words, scales, None, n, k, number.bits, size, pair_block, factors, dtype)


def unprepack(packed: PackedWeight) -> RowScaled:
    """The weight that was packed: codes and zeros bit for bit, scales as rounded to the activations' dtype."""
    number, (n, k, size, pair_block) = packed.number, (packed.n, packed.k, packed.group_size, packed.pair_block)
    codes = codes_of(unpack_codes(packed.words, n, k, number, pair_block), number)
    scales, zeros, factors = unpack_sides(packed.scales, n, k, size, pair_block), packed.zeros, packed.factors
    if zeros is not None:
        zeros = unpack_sides(zeros, n, k, size, pair_block).to(torch.int32)
    if factors is not None:
        factors = unpack_sides(factors.view(-1, 1, 8, 1, 2), n, k, -1, pair_block)[:, 0] / EXPANSION[number]
    return RowScaled(codes, of_bytes(scales) if number == FP4 else scales, zeros, factors, number, size)


def dequantize_packed(packed: PackedWeight) -> Tensor:
    """The dense weight (n, k), float32."""
    return unprepack(packed).dequantize()


def bits_of(codes: Tensor, number: Number) -> Tensor:
    """The stored bits of codes, uint8."""
    if number == FP4:
        return fp4_bits(codes)
    bits = codes.view(torch.uint8)
    return bits + number.bias if number.is_integer else bits  # wraps around: a negative code's byte is 256 more


def codes_of(bits: Tensor, number: Number) -> Tensor:
    """The codes of stored bits: the inverse of bits_of."""
    if number == FP4:
        return fp4_codes(bits)
    return ((bits - number.bias) if number.is_integer else bits).contiguous().view(number.storage)


def as_bytes(scales: Tensor) -> Tensor:
    """Scales of fp4 as bytes: float16's 5 bits of exponent and first 3 of mantissa."""
    return (scales.half().view(torch.int16) >> 7).to(torch.uint8)


def of_bytes(scales: Tensor) -> Tensor:
    """The inverse of as_bytes, float16."""
    return (scales.to(torch.int16) << 7).view(torch.float16)


# Inputs of each 8 in the order in which int8 is multiplied with 4 bits: those of the low halves of a word's bytes, then
# those of the high halves. The former are in the first half of 32 inputs.
SHUFFLED = ((0, 4, 1, 5), (2, 6, 3, 7))


def shuffled(codes: Tensor) -> Tensor:
    """Rows of codes (m, k) in the order in which w4a8_gemm takes them; k is a multiple of 32."""
    eights = codes.unflatten(1, (-1, 4, 8))
    return torch.cat([eights[..., half].flatten(2) for half in SHUFFLED], 2).flatten(1)


def unshuffled(codes: Tensor) -> Tensor:
    """The inverse of `shuffled`."""
    halves = codes.unflatten(1, (-1, 2, 4, 4))
    eights = torch.empty_like(codes).unflatten(1, (-1, 4, 8))
    for half, inputs in enumerate(SHUFFLED):
        eights[..., inputs] = halves[:, :, half]
    return eights.flatten(1)


def padded(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def loads_of(bits: int) -> int:
    """Parts of a chunk whose codes are together in memory: 16-byte loads of 4 and 8 bits; of a stream two."""
    return bits // 2 if bits in WHOLE_BITS else 2


def lanes_of(codes: Tensor, bits: int, pair_block: int) -> Tensor:
    """`codes` (n, k) viewed as (row blocks, half, tiles, g, chunks, loads, blocks, t, 8 inputs)."""
    loads = loads_of(bits)
    rows = codes.unflatten(0, (-1, 2, pair_block // TILE_ROWS, 8))
    return rows.unflatten(-1, (-1, loads, 4 // loads, 4, 8))


# Dimensions of lanes_of in memory order, without the 8 inputs: tile, chunk, load, g, t, block, half.
MEMORY_ORDER = (0, 2, 4, 5, 3, 7, 6, 1)


def pack_codes(codes: Tensor, number: Number, pair_block: int) -> Tensor:
    """Packed words (tiles, chunks, 64 * bits) of the stored bits `codes` (n, k) uint8.

    The order of 8 inputs, for the reasons in csrc/dequant.cuh. 8-bit integers: their bytes in order. fp8: inputs 2, 0,
    3, 1, 6, 4, 7, 5. 4-bit integers: inputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble, that is bytes (0, 2), (4,
    6), (1, 3), (5, 7). fp4: inputs 0, 2, 4, 6 in the low half of a word, see FP4_PLACES. Other widths: see _weave.
    """
    (n, k), bits = codes.shape, number.bits
    tiles, chunks = padded(n, TILE_ROWS) // TILE_ROWS, padded(k, CHUNK_K) // CHUNK_K
    full = torch.nn.functional.pad(codes, (0, chunks * CHUNK_K - k, 0, tiles * TILE_ROWS - n))
    lanes = lanes_of(full, bits, pair_block)
    if bits not in WHOLE_BITS:
        return _weave(lanes.permute(*MEMORY_ORDER, 8), bits).view(tiles, chunks, 64 * bits)
    if number == FP4:
        ordered = _spread(lanes.permute(*MEMORY_ORDER, 8))
    elif bits == 8:
        ordered = lanes.permute(*MEMORY_ORDER, 8)
        ordered = (ordered if number.is_integer else ordered[..., FP8_ORDER]).contiguous()
    else:
        halves = lanes.unflatten(-1, (2, 2, 2))  # input = 4 a + 2 b + c: bytes in the order (c, a), nibbles b
        low, high = (halves[..., b, :].permute(*MEMORY_ORDER, 9, 8) for b in (0, 1))
        ordered = low | (high << 4)
    return ordered.reshape(-1).view(torch.int32).view(tiles, chunks, 64 * bits)


def unpack_codes(words: Tensor, n: int, k: int, number: Number, pair_block: int) -> Tensor:
    """The stored bits (n, k) uint8. The inverse of pack_codes."""
    (tiles, chunks, _), bits = words.shape, number.bits
    loads = loads_of(bits)
    sizes = (tiles * TILE_ROWS // pair_block, pair_block // TILE_ROWS, chunks, loads, 8, 4, 4 // loads, 2)
    memory = words.contiguous().view(torch.uint8)
    if bits not in WHOLE_BITS:
        ordered = _unweave(words, bits).view(*sizes, 8)
    elif number == FP4:
        ordered = _gather(memory.view(torch.int16).view(*sizes, 2))
    elif bits == 8:
        ordered = memory.view(*sizes, 8)
        ordered = ordered if number.is_integer else ordered[..., [FP8_ORDER.index(i) for i in range(8)]]
    else:
        pairs = memory.view(*sizes, 2, 2)
        ordered = torch.stack([pairs & 15, pairs >> 4], -1).movedim(-3, -1).flatten(-3)  # (c, a, b) to (a, b, c)
    undone = [(*MEMORY_ORDER, 8).index(i) for i in range(9)]
    return ordered.permute(undone).reshape(tiles * TILE_ROWS, chunks * CHUNK_K)[:n, :k]


FP8_ORDER = [2, 0, 3, 1, 6, 4, 7, 5]  # inputs of the 8 bytes
FP4_PLACES = ((9, 15), (6, 12), (3, 14), (0, 13))  # lowest bit of a magnitude, bit of a sign, of four codes in 16 bits


def _spread(codes: Tensor) -> Tensor:
    """The 16 bits (..., 2) int16 of each four of 8 codes (..., 8) of fp4."""
    fours = codes.to(torch.int16).unflatten(-1, (4, 2))
    halves = torch.zeros_like(fours[..., 0, :])
    for i, (magnitude, sign) in enumerate(FP4_PLACES):
        halves |= (fours[..., i, :] & 7) << magnitude | fours[..., i, :] >> 3 << sign
    return halves


def _gather(halves: Tensor) -> Tensor:
    """The inverse of _spread, uint8."""
    codes = [halves >> magnitude & 7 | (halves >> sign & 1) << 3 for magnitude, sign in FP4_PLACES]
    return torch.stack(codes, -2).flatten(-2).to(torch.uint8)


def _weave(codes: Tensor, bits: int) -> Tensor:
    """Words, int32, of `codes` (..., 2 parts of a chunk, 8, 4, 2 blocks, 2 rows, 8 inputs): Stream in csrc/dequant.cuh.

    Each part of a lane is `bits` words. A lane's words of the chunk lie in fours, each four after the same of the lane
    before; of an odd width the last two lie in pairs.
    """
    pairs = codes.to(torch.int32).flatten(-3).unflatten(-1, (16, 2))  # (..., 2, 8, 4, 16, 2)
    fields, words = 16 // bits, []
    for j in range(bits):
        halves = sum(pairs[..., j * fields + f, :] << f * bits for f in range(fields))
        for i, pair in enumerate(range(fields * bits, 16)):
            halves = halves | (pairs[..., pair, :] >> j & 1) << fields * bits + i
        words.append(halves[..., 0] | halves[..., 1] << 16)
    lanes = torch.stack(words, -1)  # (..., 2, 8, 4, bits)
    lanes = lanes.movedim(-4, -2).flatten(-2).flatten(-3, -2)  # (..., 32, 2 * bits)
    fours = lanes[..., : bits // 2 * 4].unflatten(-1, (-1, 4)).transpose(-3, -2).flatten(-3)
    return torch.cat([fours, lanes[..., bits // 2 * 4 :].flatten(-2)], -1)


def _unweave(words: Tensor, bits: int) -> Tensor:
    """The inverse of _weave, uint8, of words (tiles, chunks, 64 * bits)."""
    whole = bits // 2 * 4
    fours = words[..., : whole * 32].unflatten(-1, (bits // 2, 32, 4)).transpose(-3, -2).flatten(-2)
    lanes = torch.cat([fours, words[..., whole * 32 :].unflatten(-1, (32, 2 * bits - whole))], -1)
    parts = lanes.unflatten(-1, (2, bits)).unflatten(-3, (8, 4)).movedim(-2, -4)  # (..., 2, 8, 4, bits)
    halves = torch.stack([parts & 0xFFFF, parts >> 16 & 0xFFFF], -1)
    fields, mask = 16 // bits, (1 << bits) - 1
    pairs = [halves[..., pair // fields, :] >> pair % fields * bits & mask for pair in range(fields * bits)]
    for i in range(16 - fields * bits):
        single = [(halves[..., j, :] >> fields * bits + i & 1) << j for j in range(bits)]
        pairs.append(torch.stack(single).sum(0))
    return torch.stack(pairs, -2).to(torch.uint8)  # (..., 2, 8, 4, 16, 2)


def pack_sides(values: Tensor, group_size: int, pair_block: int) -> Tensor:
    """Scales or zeros (n, g) as (tiles, scale_rows, 8, per_chunk, 2), zero in the padding.

    Of groups of 16, the first ones of a chunk's four blocks of 32 inputs come before the second ones.
    """
    n, groups = values.shape
    per_chunk = groups_per_chunk(group_size)
    rows = padded(groups, per_chunk)
    full = torch.nn.functional.pad(values, (0, rows - groups, 0, padded(n, TILE_ROWS) - n))
    lanes = full.unflatten(0, (-1, 2, pair_block // TILE_ROWS, 8)).unflatten(-1, (rows // per_chunk, per_chunk))
    if group_size == 16:
        lanes = lanes.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2)
    return lanes.permute(0, 2, 4, 3, 5, 1).flatten(0, 1).contiguous()


def unpack_sides(packed: Tensor, n: int, k: int, group_size: int, pair_block: int) -> Tensor:
    """Scales or zeros (n, g). The inverse of pack_sides."""
    tiles, scale_rows, _, per_chunk, _ = packed.shape
    if group_size == 16:
        packed = packed.unflatten(3, (2, 4)).transpose(3, 4).flatten(3, 4)
    lanes = packed.unflatten(0, (-1, pair_block // TILE_ROWS)).permute(0, 5, 1, 3, 2, 4)
    groups = min(scale_rows, 1) if group_size == -1 else -(-k // group_size)
    return lanes.reshape(tiles * TILE_ROWS, scale_rows * per_chunk)[:n, :groups]
