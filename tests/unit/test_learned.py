"""quant/algos/learned.py: gradients against the straight-through definition, and descent that beats nearest."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.algos.gptq import gptq
from lowbit.quant.algos.learned import DAMPING, OFFSET_LIMIT, LearnedWeight, scales_move
from lowbit.quant.numbers import round_to_grid
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import make_scheme, parse_scheme

SCHEMES = [make_scheme(4, 32, True), make_scheme(4, 32, False), make_scheme(8, -1, True), parse_scheme("fp8-channel")]
SCHEMES += [parse_scheme(name) for name in ("nvfp4-a16", "mxfp4-a16", "int3-g32", "int2-g32")]
F32 = torch.float32


def learned_from(w, scheme, dtype=F32, shrink=1.0):
    """Learned rounding that starts at the nearest codes."""
    return LearnedWeight(round_to_nearest(w, scheme, dtype, shrink), numerics.in_parts(w, scheme)[0])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_where_it_is_told(scheme):
    w = torch.randn(12, 64)
    start = round_to_nearest(w, scheme, torch.bfloat16, 0.9)
    weight = LearnedWeight(start, numerics.in_parts(w, scheme)[0]).rounded()
    assert torch.equal(weight.dequantize(), start.dequantize())
    assert torch.equal(weight.scales, start.scales)
    assert weight.scales.dtype == start.scales.dtype


def rounded(values, number):
    return round_to_grid(values.clone(), number.fineness, number.least)


def straight_through(w, offsets, multipliers, start, gradient, energy):
    """Steps by offsets and multipliers: bounded gradients, by autograd through rounding as the identity."""
    scheme, number = start.scheme, start.scheme.number
    offsets, multipliers = offsets.clone().requires_grad_(), multipliers.clone().requires_grad_()
    size = w.shape[1] // start.scales.shape[1]
    scale = (start.scales * multipliers).repeat_interleave(size, 1)
    stored = numerics.as_stored((start.scales * multipliers).detach(), scheme, F32).float().repeat_interleave(size, 1)
    scale = scale + (stored - scale).detach()
    zero = 0.0 if start.zeros is None else start.zeros.repeat_interleave(size, 1)
    spacing = number.spacing((w / scale).detach())
    position = w / scale + offsets * spacing
    position = position + (rounded(position.detach(), number) - position).detach()
    codes = (position + zero).clamp(number.low, number.high)
    ((codes - zero) * scale * gradient).sum().backward()
    # multipliers act by their share of the scale, so their gradients are those of the scale's logarithm; offsets by the
    # loss's slope over its curvature, which goes with the square of a step and the energy of an input
    learned = scales_move(scheme)
    curvature = (scale.detach() * spacing) ** 2 * (energy + DAMPING * energy.mean())
    found = offsets.grad / curvature, multipliers.grad * stored[:, ::size] / start.scales * learned
    return tuple((g / g.abs().mean().clamp(min=1e-30)).clamp(-1, 1) for g in found)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_step_follows_the_straight_through_gradient(scheme):
    torch.manual_seed(4)
    w, gradient = torch.randn(12, 64), torch.randn(12, 64)
    start = round_to_nearest(w, scheme, F32, 0.8)
    energy = torch.rand(64) ** 3
    learned = LearnedWeight(start, numerics.in_parts(w, scheme)[0], energy)
    learned.offsets.uniform_(-0.4, 0.4)
    offsets, multipliers = learned.offsets.clone(), learned.multipliers.clone()
    parts, _ = numerics.in_parts(w, scheme)
    by_offset, by_scale = straight_through(parts, offsets, multipliers, start, gradient, energy)
    learned.step(learned.rounded(), gradient.clone(), 0.01)
    torch.testing.assert_close(learned.offsets - offsets, -0.01 * by_offset)
    torch.testing.assert_close(learned.multipliers - multipliers, -0.01 * by_scale)


def test_offsets_stay_within_half_a_step():
    learned = learned_from(torch.randn(4, 32), SCHEMES[0])
    for _ in range(5):
        learned.step(learned.rounded(), torch.ones(4, 32), 0.3)
    assert learned.offsets.abs().max() <= OFFSET_LIMIT


def test_offsets_and_multipliers_are_all_that_is_learned():
    learned = learned_from(torch.randn(4, 32), SCHEMES[0])
    offsets, multipliers, codes = learned.offsets.clone(), learned.multipliers.clone(), learned.rounded().codes
    learned.step(learned.rounded(), torch.randn(4, 32), 0.4)
    learned.offsets, learned.multipliers = offsets, multipliers
    assert torch.equal(learned.rounded().codes, codes)


@pytest.mark.parametrize("name", ["nvfp4-a16", "mxfp4-a16", "fp8-channel", "mxfp8"])
def test_scales_of_few_bits_and_of_floats_that_follow_them_stay(name):
    learned = learned_from(torch.randn(4, 64), parse_scheme(name))
    scales = learned.rounded().scales
    for _ in range(5):
        learned.step(learned.rounded(), torch.randn(4, 64), 0.3)
    assert torch.equal(learned.rounded().scales, scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_descent_beats_nearest_on_a_toy_layer(scheme):
    """From nearest it is better than nearest on every grid; from GPTQ it leaves at most 0.8 of nearest's error."""
    torch.manual_seed(0)
    x = torch.randn(300, 64) @ torch.randn(64, 64) / 8
    w = torch.randn(32, 64)
    first = gptq(w, x.T @ x / len(x), scheme, F32)
    for learned, most in ((learned_from(w, scheme), 0.95), (LearnedWeight(first.weight, first.wanted), 0.8)):
        before = float((x @ (round_to_nearest(w, scheme, F32).dequantize() - w).T).square().mean())
        losses = []
        for step in range(50):
            weight = learned.rounded()
            error = x @ (weight.dequantize() - w).T
            losses.append(float(error.square().mean()))
            learned.step(weight, 2 * error.T @ x / error.numel(), 0.2 * (1 - step / 50) / 50)
        assert min(losses) < most * before
