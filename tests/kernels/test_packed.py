"""The kernels' element order comes back bit for bit, and says what it cannot hold."""

import pytest
import torch

from lowbit.quant.kernels.packed import dequantize_packed, prepack, unprepack
from tests.kernels.make import make_packed, make_qtensor

SHAPES = [(40, 768, 16), (16, 1280, 16), (1, 256, 16), (64, 512, 32), (256, 256, 256)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_scales_and_zeros_come_back(bits: int, group_size: int, symmetric: bool) -> None:
    for n, k, pair_block in SHAPES:
        weight = make_qtensor(n, k, bits, group_size, symmetric)
        packed = prepack(weight, torch.float16, pair_block)
        back = unprepack(packed)
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.scales, weight.scales)
        assert symmetric or torch.equal(back.zeros, weight.zeros)
        assert torch.equal(dequantize_packed(packed), weight.dequantize())


@pytest.mark.parametrize("k", [32, 96, 160, 4128])
def test_k_need_not_fill_a_chunk(k: int) -> None:
    weight = make_qtensor(24, k, 4, 32, symmetric=True)
    assert torch.equal(unprepack(prepack(weight, torch.bfloat16)).codes, weight.codes)


def test_the_order_of_a_word() -> None:
    # The contract with csrc/dequant.cuh: a row's codes 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble.
    weight = make_qtensor(16, 128, 4, 128, symmetric=False)
    weight.codes[0, :8] = torch.arange(8, dtype=torch.uint8)
    assert prepack(weight, torch.float16).words[0, 0, 0].item() == 0x75316420


@pytest.mark.parametrize(
    ("n", "k", "group_size", "dtype", "pair_block", "reason"),
    [
        (16, 384, 96, torch.float16, 16, "groups of 96"),
        (16, 128, 128, torch.float32, 16, "torch.float32"),
        (24, 128, 128, torch.float16, 32, "24 rows do not pair within blocks of 32"),
        (16, 48, -1, torch.float16, 16, "48 inputs"),
    ],
)
def test_what_cannot_be_packed_is_named(n, k, group_size, dtype, pair_block, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        prepack(make_qtensor(n, k, 4, group_size, symmetric=True), dtype, pair_block)


def test_the_order_of_a_stream() -> None:
    # The contract with Stream in csrc/dequant.cuh: three words hold 16 pairs of 3-bit codes, five fields to a half of a
    # word, and bit j of the last pair in the highest bits of word j.
    weight = make_qtensor(16, 128, 3, 128, symmetric=False)
    weight.codes[:] = 0
    weight.codes[0, :4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)  # pairs 0 and 1 of lane 0's first row
    weight.codes[8, 38:40] = torch.tensor([5, 6], dtype=torch.uint8)  # pair 15: the last of block 1 in row 8
    words = prepack(weight, torch.float16).words[0, 0]
    assert words[0].item() == (1 | 3 << 3) | (2 | 4 << 3) << 16 | 1 << 15
    assert words[1].item() & 0xFFFFFFFF == 1 << 31
    assert words[2].item() & 0xFFFFFFFF == 1 << 15 | 1 << 31
    assert not words[3:].any()


@pytest.mark.gpu
def test_both_devices_pack_alike() -> None:
    for bits in range(2, 9):
        weight = make_qtensor(80, 1152, bits, 64, symmetric=False)
        cpu, gpu = prepack(weight, torch.float16), prepack(weight.to("cuda"), torch.float16)
        assert torch.equal(cpu.words, gpu.words.cpu())
        assert torch.equal(cpu.scales, gpu.scales.cpu())


def test_bytes_count_the_padding() -> None:
    assert make_packed(16, 128).nbytes == 1024 + 32
    assert make_packed(17, 128).nbytes == 2 * (1024 + 32)
