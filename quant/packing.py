"""The canonical bit order: unsigned codes in int32 words, lowest bits first; fp4 and e8m0 in bytes.

The only Python that shifts bits.
"""

import math

import torch
from torch import Tensor

from lowbit.quant.numbers import places_of

WORD, BYTE = 32, 8  # bits
PAIR = 0x0101  # a one in both bytes of a pair
PIECE = 1 << 18  # codes that a CPU handles at once, whole runs of any width: they stay in a core's cache
# Codes that a GPU handles at once: each piece is several launches, 25,000 of PIECE codes for Llama-2-7B in 4 bits.
LARGE_PIECE = 1 << 25


def words_of(codes: int, bits: int) -> int:
    """The number of words for a row of so many codes."""
    return -(-codes * bits // WORD)


def _run(bits: int) -> tuple[int, int]:
    """Codes and words of the shortest run that ends at the end of a word."""
    common = math.gcd(bits, WORD)
    return WORD // common, bits // common


def piece_for(tensor: Tensor) -> int:
    """Codes handled at once on a tensor's device."""
    return PIECE if tensor.device.type == "cpu" else LARGE_PIECE


def pack(codes: Tensor, bits: int, bias: int = 0) -> Tensor:
    """Words of `codes` plus `bias` along the last dimension.

    codes   (..., k)  any integer dtype; plus `bias` unsigned values below 2^bits
    return  (..., ceil(k * bits / 32))  int32; element i has bits i * bits and up of the row, and may span two words;
            the tail is zero
    """
    k = codes.shape[-1]
    missing = -k % _run(bits)[0]
    whole = torch.nn.functional.pad(codes, (0, missing), value=-bias) if missing else codes
    join = _joined if BYTE % bits == 0 else _woven
    words = torch.cat([join(piece.to(torch.uint8) + bias, bits) for piece in whole.flatten().split(piece_for(whole))])
    return words.view(*codes.shape[:-1], words_of(k + missing, bits))[..., : words_of(k, bits)].contiguous()


def unpack(words: Tensor, bits: int, k: int, bias: int = 0) -> Tensor:
    """The first `k` codes of each row of words: the inverse of pack.

    words   (..., ceil(k * bits / 32))  int32
    return  (..., k)  uint8; int8 with a bias
    """
    expected, (count, length) = words_of(k, bits), _run(bits)
    if words.shape[-1] != expected:
        raise ValueError(f"{words.shape[-1]} words a row cannot hold {k} codes of {bits} bits: {expected} are needed")
    missing = -expected % length
    whole = torch.nn.functional.pad(words, (0, missing)) if missing else words
    part = _parted if BYTE % bits == 0 else _unwoven
    codes = torch.cat(
        [part(piece, bits).sub_(bias) for piece in whole.flatten().split(piece_for(whole) // count * length)]
    )
    codes = codes.view(*words.shape[:-1], (expected + missing) // length * count)[..., :k]
    return codes.view(torch.int8) if bias else codes


def _joined(codes: Tensor, bits: int) -> Tensor:
    """Words of `codes` (uint8) of 1, 2, 4 or 8 bits: neighbouring bytes are joined until they are full."""
    while bits < BYTE:
        pairs = codes.view(torch.int16)
        codes, bits = (pairs | pairs >> (BYTE - bits)).to(torch.uint8), 2 * bits
    return codes.view(torch.int32)


def _parted(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_joined`: bytes are parted until each holds one code."""
    codes, width = words.view(torch.uint8), BYTE
    while width > bits:
        width //= 2
        pairs = codes.to(torch.int16)
        codes = ((pairs << (BYTE - width)) | pairs).bitwise_and_(PAIR * ((1 << width) - 1)).view(torch.uint8)
    return codes if width < BYTE else codes.clone()


def _woven(codes: Tensor, bits: int) -> Tensor:
    """Words of `codes` of any width, some of which lie in two words."""
    count, length = _run(bits)
    values = codes.to(torch.int32).view(-1, count)
    words = torch.zeros(len(values), length, dtype=torch.int32, device=codes.device)
    for i in range(count):
        word, shift = divmod(i * bits, WORD)
        words[:, word] |= values[:, i] << shift
        if shift + bits > WORD:
            words[:, word + 1] |= values[:, i] >> (WORD - shift)
    return words.flatten()


def _unwoven(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_woven`."""
    count, length = _run(bits)
    runs = words.view(-1, length)
    codes = torch.empty(len(runs), count, dtype=torch.uint8, device=words.device)
    for i in range(count):
        word, shift = divmod(i * bits, WORD)
        value = runs[:, word] >> shift
        if shift + bits > WORD:  # the shift has filled the upper bits with the sign
            value = value & ((1 << (WORD - shift)) - 1) | runs[:, word + 1] << (WORD - shift)
        codes[:, i] = value & ((1 << bits) - 1)
    return codes.flatten()


FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values of the three bits below the sign
E8M0_BIAS, E8M0_NAN = 127, 255


def fp4_bits(codes: Tensor) -> Tensor:
    """The four bits, uint8, of fp4 `codes` as floats: sign, two of exponent, one of mantissa."""
    if codes.dtype == torch.float8_e4m3fn:  # by a table of its bytes: a tenth of the time on a CPU
        every = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype)
        return fp4_bits(every.float()).index_select(0, places_of(codes)).view(codes.shape)
    values, table = codes.float(), torch.tensor(FP4_VALUES, device=codes.device)
    return torch.bucketize(values.abs(), table).to(torch.uint8) | torch.signbit(values).to(torch.uint8) << 3


def fp4_codes(bits: Tensor) -> Tensor:
    """The fp4 codes, float8_e4m3fn, of their four bits: the inverse of fp4_bits."""
    values = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)), device=bits.device)
    table = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return table.index_select(0, bits.flatten().int()).view(bits.shape).view(torch.float8_e4m3fn)


def pack_fp4(codes: Tensor) -> Tensor:
    """Bytes (..., k / 2) uint8 of fp4 `codes` (..., k) as floats, k even: element 2 j is the low half of byte j."""
    halves = fp4_bits(codes)
    return halves[..., ::2] | halves[..., 1::2] << 4


def unpack_fp4(packed: Tensor) -> Tensor:
    """The fp4 codes (..., k) float8_e4m3fn in bytes (..., k / 2): the inverse of pack_fp4."""
    return fp4_codes(torch.stack([packed & 15, packed >> 4], -1).flatten(-2))


def pack_e8m0(scales: Tensor) -> Tensor:
    """The exponents of `scales`, powers of two from 2^-127 on, as bytes uint8 with a bias of 127."""
    return (torch.frexp(scales.float())[1] - 1 + E8M0_BIAS).to(torch.uint8)


def unpack_e8m0(exponents: Tensor) -> Tensor:
    """The powers of two, bfloat16, from their bytes: the inverse of pack_e8m0. ValueError for a NaN."""
    missing = int((exponents == E8M0_NAN).sum())
    if missing:
        raise ValueError(f"{missing} of {exponents.numel()} scales are {E8M0_NAN}, which e8m0 has for NaN")
    ones = torch.ones(exponents.shape, dtype=torch.float32, device=exponents.device)
    return torch.ldexp(ones, exponents.to(torch.int32) - E8M0_BIAS).to(torch.bfloat16)
