"""export/blocks.py byte for byte against gguf, llama.cpp's own package."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from lowbit.export.blocks import BLOCKS, Block, block_of, factored, from_rows, to_rows
from lowbit.quant import numerics
from lowbit.quant.algos.clip import round_plainly
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import NAMED, Scheme, parse_scheme

WRITTEN_BY_THEM = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
IN_SUPER_BLOCKS = [name for name, block in BLOCKS.items() if block.scheme.weights.span]
EVERY = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def theirs(block: Block) -> GGMLQuantizationType:
    return GGMLQuantizationType[block.name]


def values_by_them(raw: torch.Tensor, block: Block) -> torch.Tensor:
    return torch.from_numpy(quants.dequantize(raw.numpy(), theirs(block)))


def values(weight: QTensor) -> torch.Tensor:
    """The weight without NVFP4's factor, which is a tensor of its own."""
    return numerics.dequantize(weight.codes, weight.scheme, weight.scales, weight.zeros)


def rounded(w: torch.Tensor, scheme: Scheme) -> QTensor:
    return round_to_nearest(w, scheme, torch.float16)


def extreme(k: int) -> dict[str, torch.Tensor]:
    """Weights (2, k) at the limits of the blocks."""
    spread = torch.logspace(-6, 1, k).expand(2, k).clone()
    spread[1] *= -1
    return {
        "zeros": torch.zeros(2, k),
        "ones": torch.ones(2, k),
        "minus": -torch.ones(2, k),
        "small": torch.randn(2, k) * 1e-7,
        "large": torch.rand(2, k) * 6e4 - 3e4,
        "spread": spread,
        "one": torch.nn.functional.one_hot(torch.tensor([0, k - 1]), k) * 3.0,
    }


def test_sizes_and_numbers_are_theirs():
    for block in BLOCKS.values():
        assert gguf.GGML_QUANT_SIZES[theirs(block)] == (block.size, block.nbytes), block.name
        assert theirs(block) == block.number
        assert block_of(block.scheme) is block
        assert block.scheme.bits_per_weight(512) == pytest.approx(8 * block.nbytes / block.size)


@EVERY
def test_what_we_pack_has_our_values_for_them(block):
    w = torch.randn(7, 512) * torch.logspace(-3, 0, 7)[:, None]
    weight = rounded(w, block.scheme)
    raw = to_rows(weight)
    assert raw.shape == (7, block.row_bytes(512))
    assert torch.equal(values_by_them(raw, block), values(weight))
    again = from_rows(raw, block, weight.divisor)
    assert torch.equal(values(again), values(weight))
    assert torch.equal(to_rows(again), raw)


@EVERY
def test_any_bytes_have_the_values_that_they_read(block):
    """Random codes and integers, with finite factors of either sign: files of other programs have any of them."""
    raw = torch.randint(0, 256, (5, 2 * 256 // block.size, block.nbytes), dtype=torch.uint8)
    place = 0
    for field in block.fields:
        if field.bits == 16:
            half = torch.randn(5, raw.shape[1], 1).to(torch.float16)
            raw[:, :, place : place + 2] = half.view(torch.uint8)
        elif block.name in ("MXFP4", "NVFP4") and field.source == "scales":
            raw[:, :, : field.nbytes] = raw[:, :, : field.nbytes] % 100 + 16
        place += field.nbytes
    raw = raw.flatten(1)
    divisor = torch.ones(()) if block.scheme.weights.parent else None
    weight = from_rows(raw, block, divisor)
    assert torch.equal(values_by_them(raw, block), values(weight))
    assert torch.equal(values(from_rows(to_rows(weight), block, divisor)), values(weight))


@pytest.mark.parametrize("name", WRITTEN_BY_THEM)
def test_their_bytes_come_back(name):
    block = BLOCKS[name]
    for w in (torch.randn(3, 256) * 0.02, *extreme(256).values()):
        raw = torch.from_numpy(quants.quantize(w.numpy(), theirs(block)))
        weight = from_rows(raw, block)
        assert torch.equal(values(weight), values_by_them(raw, block))
        used = weight.codes.float().unflatten(1, (-1, 32)).any(-1).repeat_interleave(block.nbytes, 1)
        assert torch.equal(to_rows(weight)[used], raw[used])  # elsewhere a scale may be zero, and is not here


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_our_scale_is_theirs_and_our_codes_are_nearer(name):
    """Their codes divide by the scale before it is rounded to float16."""
    block, w = BLOCKS[name], torch.randn(64, 256) * 0.02
    raw = torch.from_numpy(quants.quantize(w.numpy(), theirs(block)))
    ours, other = rounded(w, block.scheme), from_rows(raw, block)
    assert torch.equal(ours.scales, other.scales)
    assert (ours.codes != other.codes).float().mean() < 0.01
    assert (values(ours) - w).norm() <= (values(other) - w).norm()


@EVERY
def test_extreme_weights_round_trip(block):
    for name, w in extreme(512).items():
        if numerics.reason_against_scales(w, block.scheme, torch.float16):
            continue
        weight = round_plainly(w, block.scheme, torch.float16)
        raw = to_rows(weight)
        assert torch.equal(values_by_them(raw, block), values(weight)), name
        assert bool(torch.isfinite(values(weight)).all()), name
    assert not values(rounded(torch.zeros(1, 256), block.scheme)).any()


@EVERY
def test_scales_beyond_float16_are_refused(block):
    wide = torch.randn(2, 256) * 1e10
    said = numerics.reason_against_scales(wide, block.scheme, torch.float16)
    assert (said is None) == (block.scheme.weights.scales is not None and not block.scheme.weights.span)


def test_a_factor_that_is_no_number_is_refused():
    for name in ("Q4_0", "Q8_0", "Q3_K", "Q6_K"):
        block = BLOCKS[name]
        raw = to_rows(rounded(torch.randn(1, 256), block.scheme)).clone()
        place = sum(field.nbytes for field in block.fields[: [field.source for field in block.fields].index("factor")])
        raw[0, place : place + 2] = torch.from_numpy(np.array([np.nan], np.float16).view(np.uint8))
        with pytest.raises(ValueError, match="not finite"):
            from_rows(raw, block)
    with pytest.raises(ValueError, match="which e8m0 has for NaN"):
        from_rows(torch.full((1, 17), 255, dtype=torch.uint8), BLOCKS["MXFP4"])


def test_scales_are_given_back_as_integers_of_a_float16():
    for name in IN_SUPER_BLOCKS:
        side = BLOCKS[name].scheme.weights
        number, count = side.scales, 256 // side.group_size
        factor = torch.tensor([[0.00123]], dtype=torch.float16)
        integers = torch.randint(1, int(number.high) + 1, (1, count))
        found = factored(factor.float() * integers, side)
        assert torch.equal(found[0].float() * found[1], factor.float() * integers)
    with pytest.raises(ValueError, match="1 of 1 super-blocks are no integers from 0 to 63"):
        factored(torch.rand(1, 8), NAMED["q4_k"].weights)


def test_scales_that_are_no_float16_are_refused():
    weight = round_to_nearest(torch.randn(2, 64) * 1e-3, parse_scheme("int4-g32"), torch.float32)
    with pytest.raises(ValueError, match=r"4 of 4 scales .* are no float16"):
        to_rows(weight)


@pytest.mark.parametrize("name", IN_SUPER_BLOCKS)
def test_searched_ranges_are_better_by_what_the_block_can_hold(name):
    scheme, w = BLOCKS[name].scheme, torch.randn(16, 512) * torch.rand(16, 512)
    plain, searched = rounded(w, scheme), round_plainly(w, scheme, torch.float16)
    for weight in (plain, searched):
        assert torch.equal(numerics.as_stored(weight.scales, scheme, torch.float16), weight.scales)
    assert (values(searched) - w).norm() < (values(plain) - w).norm()
