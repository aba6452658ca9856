"""quant/algos/learned.py: gradients against the straight-through definition, and descent that beats nearest."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.algos.learned import OFFSET_LIMIT, LearnedWeight
from lowbit.quant.numbers import round_to_grid
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import make_scheme, parse_scheme

SCHEMES = [make_scheme(4, 32, True), make_scheme(4, 32, False), make_scheme(8, -1, True), parse_scheme("fp8-channel")]
SCHEMES += [parse_scheme(name) for name in ("nvfp4-a16", "mxfp4-a16", "int3-g32", "int2-g32")]
F32 = torch.float32


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_at_nearest(scheme):
    w = torch.randn(12, 64)
    weight = LearnedWeight(w, scheme, torch.bfloat16).rounded()
    wanted = round_to_nearest(w, scheme, torch.bfloat16)
    assert torch.equal(weight.values(), wanted.values())
    assert torch.equal(weight.scales, wanted.scales)


def rounded(values, number):
    return round_to_grid(values.clone(), number.fineness, number.least)


def straight_through(w, offsets, shrink, scheme, gradient):
    """Steps by offsets and multipliers: bounded gradients, by autograd through rounding as the identity."""
    w, _ = numerics.in_parts(w, scheme)
    scales, zeros = numerics.choose_params(w, scheme, F32, shrink)
    base = scales / shrink
    offsets, shrink = offsets.clone().requires_grad_(), shrink.clone().requires_grad_()
    scale = numerics.grouped(w, scheme).mul(0) + (base * shrink).unsqueeze(-1)
    scale = scale.reshape(w.shape)
    zero = 0.0 if zeros is None else zeros.repeat_interleave(w.shape[1] // zeros.shape[1], 1)
    spacing = scheme.number.spacing((w / scale).detach())
    position = w / scale + offsets * spacing
    position = position + (rounded(position.detach(), scheme.number) - position).detach()
    codes = (position + zero).clamp(scheme.number.low, scheme.number.high)
    ((codes - zero) * scale * gradient).sum().backward()
    # multipliers act by their share of the scale, so their gradients are those of the scale's logarithm; offsets by the
    # loss's slope over its curvature, which goes with the square of a step
    found = offsets.grad / spacing**2, shrink.grad * shrink.detach() * scheme.number.is_integer
    return tuple((g / g.abs().mean().clamp(min=1e-30)).clamp(-1, 1) for g in found)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_step_follows_the_straight_through_gradient(scheme):
    torch.manual_seed(3)
    w, gradient = torch.randn(12, 64), torch.randn(12, 64)
    learned = LearnedWeight(w, scheme, F32, 0.8)
    learned.offsets.uniform_(-0.4, 0.4)
    offsets, shrink = learned.offsets.clone(), learned.shrink.clone()
    by_offset, by_shrink = straight_through(w, offsets, shrink, scheme, gradient)
    learned.step(learned.rounded(), gradient.clone(), 0.01)
    torch.testing.assert_close(learned.offsets - offsets, -0.01 * by_offset)
    torch.testing.assert_close(learned.shrink - shrink, -0.01 * by_shrink)


def test_offsets_stay_within_half_a_step():
    learned = LearnedWeight(torch.randn(4, 32), SCHEMES[0], F32)
    for _ in range(5):
        learned.step(learned.rounded(), torch.ones(4, 32), 0.3)
    assert learned.offsets.abs().max() <= OFFSET_LIMIT


def test_offsets_and_ranges_are_all_that_is_learned():
    learned = LearnedWeight(torch.randn(4, 32), SCHEMES[0], F32)
    offsets, shrink, codes = learned.offsets.clone(), learned.shrink.clone(), learned.rounded().codes
    learned.step(learned.rounded(), torch.randn(4, 32), 0.4)
    learned.offsets, learned.shrink = offsets, shrink
    assert torch.equal(learned.rounded().codes, codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_descent_beats_nearest_on_a_toy_layer(scheme):
    torch.manual_seed(0)
    x = torch.randn(300, 64) @ torch.randn(64, 64) / 8
    w = torch.randn(32, 64)
    learned = LearnedWeight(w, scheme, F32)

    def loss() -> tuple[float, torch.Tensor]:
        error = x @ (learned.rounded().dequantize() - w).T
        return float(error.square().mean()), 2 * error.T @ x / error.numel()

    before = loss()[0]
    for step in range(50):
        learned.step(learned.rounded(), loss()[1], 0.2 * (1 - step / 50) / 50)
    assert loss()[0] < 0.95 * before
