"""quant/algos/few.py: ranges of 2 and 3 bits lose less than those of the plain search, and scales fit their codes."""

from dataclasses import replace

import pytest
import torch

from lowbit.quant.algos.clip import group_losses, group_moments, search_shrink
from lowbit.quant.algos.few import few, round_in_ranges, search_few
from lowbit.quant.numerics import quantize
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme

FEW = [parse_scheme(name) for name in ("int2-g32", "int3-g32", "uint2-g32", "uint3-g32", "int2-channel")]
F32 = torch.float32


def layer(n=24, k=64):
    torch.manual_seed(3)
    mixed = torch.randn(k, k) * torch.rand(k) ** 2
    return torch.randn(n, k) * (1 + 3 * torch.rand(n, 1)), mixed @ mixed.T / k


def loss(weight, w, moments):
    return group_losses(weight.dequantize() - w, moments)


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_it_loses_less_than_the_plain_search(scheme):
    w, moment = layer()
    moments = group_moments(moment, scheme)
    plain = round_to_nearest(w, scheme, F32, search_shrink(w, scheme, F32, moments))
    found = round_in_ranges(w, scheme, F32, moments)
    assert torch.equal(found.codes, quantize(w, scheme, found.scales, found.zeros))
    assert float(loss(found, w, moments).sum()) < 0.99 * float(loss(plain, w, moments).sum())


@pytest.mark.parametrize("scheme", FEW[:2], ids=str)
def test_other_scales_of_the_same_codes_are_worse(scheme):
    w, moment = layer()
    moments = group_moments(moment, scheme)
    found = search_few(w, scheme, F32, moments)
    for factor in (0.97, 1.03):
        other = replace(found, scales=found.scales * factor)
        assert float(loss(other, w, moments).sum()) > float(loss(found, w, moments).sum())


def test_the_sign_gives_the_heavier_side_the_lowest_code():
    scheme = parse_scheme("int2-g32")
    w = torch.tensor([[2.0, 1.9, 1.1, 1.0, -1.0, 0.0] + [0.0] * 26]).repeat(2, 1)
    w[1] = -w[1]
    found = search_few(w, scheme, F32, torch.eye(32)[None])
    assert found.scales[0, 0] < 0 < found.scales[1, 0]
    assert torch.equal(found.dequantize()[0], -found.dequantize()[1])


def test_a_group_of_zeros_has_scale_one():
    for scheme in FEW[:4]:
        found = search_few(torch.zeros(3, 32), scheme, F32, torch.eye(32)[None])
        assert bool((found.scales == 1).all())
        assert bool((found.dequantize() == 0).all())


def test_it_is_for_integers_of_few_bits():
    assert [few(parse_scheme(name)) for name in ("int2-g64", "uint3-g64", "int4-g64", "nvfp4-a16")] == [1, 1, 0, 0]
