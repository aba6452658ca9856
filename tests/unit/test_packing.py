"""quant/packing.py: literal words, every width, fp4 and e8m0, and the way back; compressed-tensors packs the same."""

import pytest
import torch

from lowbit.quant import packing
from lowbit.quant.packing import pack, pack_e8m0, pack_fp4, unpack, unpack_e8m0, unpack_fp4


def signed(word: int) -> int:
    """The int32 that has the bits of `word`."""
    return word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize(
    ("codes", "bits", "word"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, 0x76543210),
        ([15] * 8, 4, 0xFFFFFFFF),
        ([8] * 8, 4, 0x88888888),
        ([0, 0, 0, 0, 0, 0, 0, 8], 4, 0x80000000),
        ([0xEF, 0xBE, 0xAD, 0xDE], 8, 0xDEADBEEF),
        ([255, 0, 255, 0], 8, 0x00FF00FF),
        ([128] * 4, 8, 0x80808080),
        ([0, 1, 2, 3] * 4, 2, 0xE4E4E4E4),
    ],
)
def test_words_to_the_letter(codes, bits, word):
    packed = pack(torch.tensor([codes]), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[signed(word)]]
    assert unpack(packed, bits, len(codes)).tolist() == [codes]


def test_the_tail_of_the_last_word_is_zero():
    packed = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]), 4)
    assert packed.tolist() == [[signed(0x87654321), 0x000000A9]]
    assert unpack(packed, 4, 10).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [1, 3, 4, 7, 8, 9, 31, 32, 33, 100])
def test_round_trip(bits, k):
    codes = torch.randint(0, 2**bits, (3, 5, k), dtype=torch.int32)
    words = pack(codes, bits)
    assert words.shape == (3, 5, -(-k * bits // 32))
    back = unpack(words, bits, k)
    assert back.dtype == torch.uint8
    assert torch.equal(back.to(torch.int32), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_the_dtype_of_codes_does_not_matter(dtype):
    codes = torch.arange(16).reshape(2, 8)
    assert torch.equal(pack(codes.to(dtype), 4), pack(codes.to(torch.int32), 4))


def test_empty():
    assert pack(torch.empty(0, 32, dtype=torch.uint8), 4).shape == (0, 4)
    assert unpack(torch.empty(0, 4, dtype=torch.int32), 4, 32).shape == (0, 32)


@pytest.mark.parametrize(("words", "k"), [(1, 9), (2, 8), (0, 1)])
def test_words_that_cannot_hold_the_codes_are_refused(words, k):
    with pytest.raises(ValueError, match=f"{words} words a row cannot hold {k} codes of 4 bits"):
        unpack(torch.zeros(2, words, dtype=torch.int32), 4, k)


def test_codes_that_the_border_of_a_word_cuts_to_the_letter():
    """Bits 30, 31 and 32 are code 10 of three bits: its lowest two end the first word, the last begins the second."""
    codes = [0] * 10 + [5, 7] + [0] * 20
    packed = pack(torch.tensor([codes]), 3)
    assert packed.tolist() == [[signed(0x40000000), 0b1111, 0]]
    assert unpack(packed, 3, 32).tolist() == [codes]
    assert pack(torch.tensor([[0] * 5 + [0b101101]]), 6).tolist() == [[signed(0x40000000), 0b1011]]


@pytest.mark.peer
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [32, 100, 96])
def test_compressed_tensors_packs_the_same(bits, k):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, k), dtype=torch.int8)
    theirs = helpers.pack_to_int32(codes, bits)
    assert torch.equal(pack(codes.to(torch.int32) + 2 ** (bits - 1), bits), theirs)


def test_fp4_to_the_letter():
    codes = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]])
    packed = pack_fp4(codes.to(torch.float8_e4m3fn))
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_fp4(unpack_fp4(every)), every)
    assert torch.equal(unpack_fp4(packed).view(torch.uint8), codes.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.peer
def test_compressed_tensors_packs_the_same_fp4():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    packed = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    codes = unpack_fp4(packed)
    assert torch.equal(helpers.unpack_fp4_from_uint8(packed, 8, 64).float(), codes.float())
    assert torch.equal(helpers.pack_fp4_to_uint8(codes.float()), pack_fp4(codes))


def test_exponents_to_the_letter():
    scales = torch.tensor([2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127])
    assert pack_e8m0(scales).tolist() == [0, 1, 126, 127, 128, 254]
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(pack_e8m0(unpack_e8m0(every)), every)
    with pytest.raises(ValueError, match="1 of 3 scales are 255, which e8m0 has for NaN"):
        unpack_e8m0(torch.tensor([1, 255, 3], dtype=torch.uint8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_bias_makes_signed_codes_unsigned_and_back(bits):
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (5, 77), dtype=torch.int8)
    words = pack(codes, bits, -low)
    assert torch.equal(words, pack(codes.to(torch.int32) - low, bits))
    back = unpack(words, bits, 77, -low)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_pieces_do_not_show(bits, monkeypatch):
    codes = torch.randint(0, 1 << bits, (9, 96), dtype=torch.uint8)
    words = pack(codes, bits)
    monkeypatch.setattr(packing, "PIECE", 64)
    assert torch.equal(pack(codes, bits), words)
    assert torch.equal(unpack(words, bits, 96), codes)
