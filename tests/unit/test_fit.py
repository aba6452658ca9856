"""quant/algos/fit.py, and every algorithm on blocks: they see what a super-block can hold."""

import pytest
import torch

from lowbit.calibrate.distill import TunedLinear
from lowbit.calibrate.resume import _held, _holding
from lowbit.quant import numerics
from lowbit.quant.algos.clip import group_moments, search_shrink
from lowbit.quant.algos.fit import Groups, Pair
from lowbit.quant.algos.gptq import gptq, output_loss
from lowbit.quant.algos.learned import LearnedWeight
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import NAMED, Scheme
from tests.unit.test_gptq import inputs, moment_of

BLOCKS = {name: scheme for name, scheme in NAMED.items() if scheme.weights.blocks}
EVERY = pytest.mark.parametrize("scheme", BLOCKS.values(), ids=BLOCKS)
HALF = torch.float16


def stored(weight: QTensor) -> bool:
    """True if a file can hold its scales and minima: rounding them once more changes nothing."""
    scheme, again = weight.scheme, numerics.as_stored(weight.scales, weight.scheme, HALF)
    minima = weight.zeros is None or torch.equal(numerics.stored_minima(weight.zeros, scheme, HALF), weight.zeros)
    return torch.equal(again, weight.scales) and minima


@EVERY
def test_ranges_by_hand(scheme):
    w = torch.randn(3, 512)
    scales, minima = numerics.choose_params(w, scheme, HALF)
    parts, number = numerics.grouped(w, scheme), scheme.number
    low, high = parts.amin(-1).clamp(max=0 if scheme.weights.span else 1e9), parts.amax(-1)
    if minima is None:
        wanted = torch.where(high > -low, high, low) / number.low
    else:
        wanted = (high - low) / number.high
        torch.testing.assert_close(minima, -low, atol=float(minima.max()) / 15, rtol=1e-3)
    torch.testing.assert_close(scales.float(), wanted, atol=float(wanted.abs().max()) / 15, rtol=1e-3)
    assert stored(round_to_nearest(w, scheme, HALF))


def test_the_integers_of_a_super_block_share_a_float16():
    side, values = NAMED["q4_k"].weights, torch.tensor([[0.63, 0.1, 0.0001, 0.02, 0.0, 0.3, 0.31, 0.2]])
    factor = torch.tensor(0.01, dtype=HALF).float()
    for least, wanted in ((1, [63, 10, 1, 2, 1, 30, 31, 20]), (0, [63, 10, 0, 2, 0, 30, 31, 20])):
        found = numerics.in_super_blocks(values, side, least=least)
        assert torch.equal(found, factor * torch.tensor([wanted]))
    assert not numerics.in_super_blocks(torch.zeros(1, 8), side, least=0).any()


@EVERY
def test_the_search_is_better_and_stays_within_what_is_stored(scheme):
    w, moment = torch.randn(24, 512) * torch.rand(24, 1), moment_of(inputs(512))
    moments = group_moments(moment, scheme)
    plain = round_to_nearest(w, scheme, HALF)
    for_weight = round_to_nearest(w, scheme, HALF, search_shrink(w, scheme, HALF, None))
    for_output = round_to_nearest(w, scheme, HALF, search_shrink(w, scheme, HALF, moments))
    assert stored(for_weight)
    assert stored(for_output)
    assert (for_weight.dequantize() - w).norm() < 0.97 * (plain.dequantize() - w).norm()
    losses = [output_loss(each, w, moment) for each in (plain, for_weight, for_output)]
    assert losses[2] < 1.02 * min(losses[:2])  # errors of groups add up, which the search leaves out


@EVERY
def test_a_fitted_pair_is_the_best_for_its_codes(scheme):
    torch.manual_seed(3)
    w, moments = torch.randn(4, 256), group_moments(moment_of(inputs(256)), scheme)
    groups = Groups(w, scheme, moments)
    pair = Pair(*numerics.whole_range(w, scheme))
    codes, fitted = groups.codes(pair), groups.fitted(pair)

    def loss(scale, minimum):
        error = codes * scale.unsqueeze(-1) - minimum.unsqueeze(-1) - groups.parts
        return (groups.weighted(error) * error).sum(-1)

    for factor in (0.99, 1.01):
        assert (loss(fitted.scale, fitted.minimum) <= loss(fitted.scale * factor, fitted.minimum) + 1e-5).all()
        if scheme.weights.minima:
            inside = fitted.minimum > 0
            beside = loss(fitted.scale, fitted.minimum * factor) + 1e-5
            assert (loss(fitted.scale, fitted.minimum) <= beside)[inside].all()


@EVERY
def test_gptq_rounds_to_blocks(scheme):
    w, moment = torch.randn(24, 512), moment_of(inputs(512))
    result = gptq(w, moment, scheme, HALF)
    assert stored(result.weight)
    assert result.loss < 0.7 * output_loss(round_to_nearest(w, scheme, HALF), w, moment)
    nearest = numerics.quantize(result.wanted, scheme, result.weight.scales, result.weight.zeros)
    assert (nearest == result.weight.codes).float().mean() > 0.99


@EVERY
def test_descent_learns_blocks(scheme):
    torch.manual_seed(0)
    x = torch.randn(600, 256) @ torch.randn(256, 256) / 16
    w = torch.randn(16, 256)
    learned = LearnedWeight(round_to_nearest(w, scheme, HALF), w)
    losses = []
    for step in range(50):
        weight = learned.rounded()
        assert stored(weight)
        error = x @ (weight.dequantize() - w).T
        losses.append(float(error.square().mean()))
        learned.step(weight, 2 * error.T @ x / error.numel(), 0.2 * (1 - step / 50) / 50)
    assert min(losses) < 0.95 * losses[0]


@EVERY
def test_distillation_tunes_scales_minima_and_codes(scheme):
    torch.manual_seed(1)
    w = torch.randn(16, 256)
    start = round_to_nearest(w, scheme, HALF, search_shrink(w, scheme, HALF, None))
    position = start.position(start.remainder(w))
    exact = numerics.raised(w, scheme, start.zeros) / numerics.per_weight(start.scales, scheme, w)
    inside = (exact >= scheme.number.low) & (exact <= scheme.number.high)
    assert float((position - exact)[inside].abs().max()) < 2 / 254 + 1e-4
    minima = None if start.zeros is None else start.zeros * 0.95
    wanted = numerics.dequantize(start.codes, scheme, start.scales.float() * 1.05, minima)
    for remainder in (None, start.remainder(w)):
        tuned, losses = TunedLinear(start, remainder, "cpu"), []
        for _ in range(30):
            weight = tuned.weight()
            assert stored(weight)
            error = weight.dequantize() - wanted
            losses.append(float(error.square().mean()))
            tuned.step(weight, 2 * error, 1e-3)
        assert losses[-1] < 0.8 * losses[0]


@EVERY
def test_a_journal_holds_blocks(scheme):
    weight = round_to_nearest(torch.randn(4, 256), scheme, HALF)
    tensors = _holding("a.b", weight)
    again = _held("a.b", tensors.__getitem__, scheme)
    assert again.scheme == scheme
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_a_row_that_super_blocks_do_not_divide_gets_the_blocks_that_llama_cpp_takes():
    found = {name: str(scheme.fitting([(64, 576)])) for name, scheme in BLOCKS.items()}
    assert found == {
        "q4_1": "q4_1",
        "q5_1": "q5_1",
        "q2_k": "int4-g32",
        "q3_k": "int4-g32",
        "q4_k": "int5-g32",
        "q5_k": "q5_1",
        "q6_k": "int8-g32",
    }
    assert Scheme.reason_against_shape(NAMED["q4_k"], 64, 576) == "576 inputs do not divide into super-blocks of 256"
