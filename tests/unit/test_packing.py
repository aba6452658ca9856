"""quant/packing.py: literal words, both widths, and the way back."""

import pytest
import torch

from lowbit.quant.packing import pack, unpack


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


@pytest.mark.parametrize("bits", [4, 8])
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
