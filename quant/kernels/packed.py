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

from lowbit.quant import numerics
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, make_scheme

TILE_ROWS = 16
CHUNK_K = 128
GROUP_SIZES = (32, 64, 128, 256, -1)
KERNEL_BITS = (4, 8)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the kernels' order.

    words   (tiles, chunks, 64 * bits)           int32   codes
    scales  (tiles, scale_rows, 8, per_chunk, 2)  float16 or bfloat16; rows g, g + 8 adjacent; 0 in the padding
    zeros   as scales                             uint8   None if the scheme is symmetric
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    n: int
    k: int
    bits: int
    group_size: int
    pair_block: int = TILE_ROWS

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory, including padding."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.scales, self.zeros) if t is not None)


def groups_per_chunk(group_size: int) -> int:
    """Scales per row in 128 inputs; 1 if a group is wider."""
    return 1 if group_size in (-1, 256) else CHUNK_K // group_size


def scale_shift(group_size: int) -> int:
    """The shift from a chunk's index to its row of scales: 0, or 1 if two chunks share a scale, or 31 if all do."""
    return {-1: 31, 256: 1}.get(group_size, 0)


def reason_against_packing(n: int, k: int, group_size: int, pair_block: int) -> str | None:
    """The reason why a weight of this shape cannot be packed, or None."""
    if group_size not in GROUP_SIZES:
        return f"groups of {group_size} inputs: the kernels take 32, 64, 128, 256 or -1 (one per channel)"
    if k % 32:
        return f"{k} inputs: the kernels take multiples of 32"
    if pair_block < TILE_ROWS or pair_block % TILE_ROWS or (pair_block > TILE_ROWS and n % pair_block):
        return f"{n} rows do not pair within blocks of {pair_block}: blocks are multiples of 16 that divide the rows"
    return None


def has_kernel(scheme: Scheme) -> bool:
    """True if the kernels support the weights' number type, and their scales have no super-blocks nor minima."""
    return not scheme.weights.blocks and scheme.number.is_integer and scheme.bits in KERNEL_BITS


def reason_against_kernel(weight: QTensor) -> str | None:
    """The reason why no kernel multiplies with weights of this kind, whatever their shape, or None."""
    if weight.scheme.weights.blocks:
        return "the kernels take no super-blocks and no minima"
    if not has_kernel(weight.scheme):
        return f"the kernels take integers of {' and '.join(map(str, KERNEL_BITS))} bits"
    return None if weight.order is None else "its inputs are in another order (act-order)"


def prepack(weight: QTensor, dtype: torch.dtype, pair_block: int = TILE_ROWS) -> PackedWeight:
    """`weight` in the kernels' order, on its device, with scales rounded to `dtype` (float16 or bfloat16).

    ValueError for a group size other than 32, 64, 128, 256 and -1, for k not a multiple of 32, for another dtype, or
    for a pair_block that does not divide n. `unprepack` returns the codes bit for bit.
    """
    n, k = weight.shape
    scheme = weight.scheme
    reason = reason_against_kernel(weight) or reason_against_packing(n, k, scheme.group_size, pair_block)
    if dtype not in (torch.float16, torch.bfloat16):
        reason = f"activations in {dtype}: the kernels take torch.float16 and torch.bfloat16"
    if reason:
        raise ValueError(f"a {scheme} weight of shape ({n}, {k}) cannot be packed: {reason}")
    unsigned = weight.codes.view(torch.uint8) + scheme.number.bias  # wraps around: a negative code's byte is 256 more
    words = pack_codes(unsigned, scheme.bits, pair_block)
    scales = pack_sides(weight.scales.to(dtype), k, scheme.group_size, pair_block)
    zeros = weight.zeros
    if zeros is not None:
        zeros = pack_sides(zeros.to(torch.uint8), k, scheme.group_size, pair_block)
    return PackedWeight(words, scales, zeros, n, k, scheme.bits, scheme.group_size, pair_block)


def unprepack(packed: PackedWeight) -> QTensor:
    """The original weight: codes and zeros bit for bit, scales as rounded to the activations' dtype."""
    scheme = make_scheme(packed.bits, packed.group_size, packed.zeros is None)
    codes = unpack_codes(packed.words, packed.n, packed.k, packed.bits, packed.pair_block)
    if scheme.symmetric:
        codes = (codes - scheme.number.bias).view(torch.int8)
    scales = unpack_sides(packed.scales, packed.n, packed.k, packed.group_size, packed.pair_block)
    zeros = packed.zeros
    if zeros is not None:
        zeros = unpack_sides(zeros, packed.n, packed.k, packed.group_size, packed.pair_block).to(torch.int32)
    return QTensor(codes.contiguous(), scales.contiguous(), zeros, scheme)


def dequantize_packed(packed: PackedWeight) -> Tensor:
    """The dense weight (n, k), float32."""
    codes = unpack_codes(packed.words, packed.n, packed.k, packed.bits, packed.pair_block)
    sides = (packed.n, packed.k, packed.group_size, packed.pair_block)
    scales = unpack_sides(packed.scales, *sides)
    zeros = None if packed.zeros is None else unpack_sides(packed.zeros, *sides).to(torch.int32)
    if zeros is None:
        zeros = torch.full_like(scales, 1 << (packed.bits - 1), dtype=torch.int32)
    return numerics.dequantize(codes, make_scheme(packed.bits, packed.group_size, False), scales, zeros)


def padded(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def lanes_of(codes: Tensor, bits: int, pair_block: int) -> Tensor:
    """`codes` (n, k) viewed as (row blocks, half, tiles, g, chunks, loads, blocks, t, 8 inputs)."""
    loads = bits // 2
    rows = codes.unflatten(0, (-1, 2, pair_block // TILE_ROWS, 8))
    return rows.unflatten(-1, (-1, loads, 4 // loads, 4, 8))


# Dimensions of lanes_of in memory order, without the 8 inputs: tile, chunk, load, g, t, block, half.
MEMORY_ORDER = (0, 2, 4, 5, 3, 7, 6, 1)


def pack_codes(codes: Tensor, bits: int, pair_block: int) -> Tensor:
    """Packed words (tiles, chunks, 64 * bits) of unsigned `codes` (n, k) uint8.

    8-bit: the 8 inputs' bytes in order. 4-bit: inputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble, that is bytes (0,
    2), (4, 6), (1, 3), (5, 7), for the reason in csrc/dequant.cuh.
    """
    n, k = codes.shape
    tiles, chunks = padded(n, TILE_ROWS) // TILE_ROWS, padded(k, CHUNK_K) // CHUNK_K
    full = torch.nn.functional.pad(codes, (0, chunks * CHUNK_K - k, 0, tiles * TILE_ROWS - n))
    lanes = lanes_of(full, bits, pair_block)
    if bits == 8:
        ordered = lanes.permute(*MEMORY_ORDER, 8).contiguous()
    else:
        halves = lanes.unflatten(-1, (2, 2, 2))  # input = 4 a + 2 b + c: bytes in the order (c, a), nibbles b
        low, high = (halves[..., b, :].permute(*MEMORY_ORDER, 9, 8) for b in (0, 1))
        ordered = low | (high << 4)
    return ordered.reshape(-1).view(torch.int32).view(tiles, chunks, 64 * bits)


def unpack_codes(words: Tensor, n: int, k: int, bits: int, pair_block: int) -> Tensor:
    """Unsigned codes (n, k) uint8. The inverse of pack_codes."""
    tiles, chunks, _ = words.shape
    loads = bits // 2
    sizes = (tiles * TILE_ROWS // pair_block, pair_block // TILE_ROWS, chunks, loads, 8, 4, 4 // loads, 2)
    memory = words.contiguous().view(torch.uint8)
    if bits == 8:
        ordered = memory.view(*sizes, 8)
    else:
        pairs = memory.view(*sizes, 2, 2)
        ordered = torch.stack([pairs & 15, pairs >> 4], -1).movedim(-3, -1).flatten(-3)  # (c, a, b) to (a, b, c)
    undone = [(*MEMORY_ORDER, 8).index(i) for i in range(9)]
    return ordered.permute(undone).reshape(tiles * TILE_ROWS, chunks * CHUNK_K)[:n, :k]


def pack_sides(values: Tensor, k: int, group_size: int, pair_block: int) -> Tensor:
    """Scales or zeros (n, g) as (tiles, scale_rows, 8, per_chunk, 2), zero in the padding."""
    n, groups = values.shape
    per_chunk = groups_per_chunk(group_size)
    rows = padded(groups, per_chunk)
    full = torch.nn.functional.pad(values, (0, rows - groups, 0, padded(n, TILE_ROWS) - n))
    lanes = full.unflatten(0, (-1, 2, pair_block // TILE_ROWS, 8)).unflatten(-1, (-1, per_chunk))
    return lanes.permute(0, 2, 4, 3, 5, 1).flatten(0, 1).contiguous()


def unpack_sides(packed: Tensor, n: int, k: int, group_size: int, pair_block: int) -> Tensor:
    """Scales or zeros (n, g). The inverse of pack_sides."""
    tiles, scale_rows, _, per_chunk, _ = packed.shape
    lanes = packed.unflatten(0, (-1, pair_block // TILE_ROWS)).permute(0, 5, 1, 3, 2, 4)
    groups = 1 if group_size == -1 else k // group_size
    return lanes.reshape(tiles * TILE_ROWS, scale_rows * per_chunk)[:n, :groups]
