"""quant/algos/annealed.py: soft weights between the weight and its codes, exact gradients, and annealing that beats
GPTQ and learned rounding at 2 bits."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.algos.annealed import SHARPNESS, AnnealedWeight, sharpness
from lowbit.quant.algos.gptq import gptq
from lowbit.quant.algos.learned import DAMPING, LearnedWeight
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme

SCHEMES = [
    parse_scheme(name) for name in ("int2-g32", "uint2-g32", "int3-channel", "int4-g32", "nvfp4-a16", "q2_k", "q3_k")
]
F32 = torch.float32


def width(scheme):
    return scheme.weights.span or 64


def annealed(w, scheme, shrink=0.8, energy=None):
    start = round_to_nearest(w, scheme, F32, shrink)
    return AnnealedWeight(start, numerics.in_parts(w, scheme)[0], energy)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_begin_as_they_are_and_end_as_codes(scheme):
    torch.manual_seed(0)
    w = torch.randn(12, width(scheme))
    learned = annealed(w, scheme)
    codes = learned.rounded()
    assert torch.equal(codes.codes, round_to_nearest(w, scheme, F32, 0.8).codes)
    wide = numerics.per_weight(codes.steps, scheme, w)
    raised = numerics.raised(w, scheme, codes.zeros)
    inside = (learned.positions * wide - raised).abs() < 1e-5  # the others lie beyond the grid
    assert float(inside.float().mean()) > 0.7
    assert float((learned.computed(codes, 0.0) - w)[inside].abs().max()) < 0.01 * float(wide.abs().max())
    steps = numerics.step_sizes(w, scheme, codes.steps).abs()
    last = (learned.computed(codes, 1.0) - codes.dequantize()).abs() / steps
    assert float((last < 0.01).float().mean()) > 0.9


def test_the_sharpness_grows_by_equal_factors():
    assert (sharpness(0.0), sharpness(1.0)) == pytest.approx(SHARPNESS)
    assert sharpness(0.5) ** 2 == pytest.approx(sharpness(0.25) * sharpness(0.75))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("done", [0.0, 0.5])
def test_a_step_follows_the_exact_gradient(scheme, done):
    """Against differences of `computed` by positions, in steps of the grid, and by the scales' logarithms."""
    torch.manual_seed(1)
    w, gradient, energy = torch.randn(8, width(scheme)), torch.randn(8, width(scheme)), torch.rand(width(scheme))
    learned = annealed(w, scheme, energy=energy)
    codes, before, scales = learned.rounded(), learned.positions.clone(), learned.multipliers.clone()
    wide = numerics.per_weight(codes.steps, scheme, w)
    step = scheme.number.spacing(before)
    tiny = 1e-3 * step
    learned.positions = before + tiny
    above = learned.computed(codes, done)
    learned.positions = before - tiny
    slope = (above - learned.computed(codes, done)) / (2 * tiny) / wide
    learned.positions = before.clone()
    wanted = gradient * slope / (numerics.per_weight(codes.scales, scheme, w) * step)
    wanted = wanted / (energy + DAMPING * energy.mean())
    wanted = (wanted / wanted.abs().mean()).clamp(-1, 1)
    soft = numerics.raised(learned.computed(codes, done), scheme, codes.zeros)
    by_range = numerics.grouped(gradient * soft, scheme).sum(-1)
    learned.step(codes, gradient.clone(), 0.01, done)
    moved = (learned.positions - before) / (0.01 * step)
    values = codes.values()
    inside = (learned.positions > learned._low) & (learned.positions < learned._high)
    free = (
        (learned.positions != before)
        & inside
        & ((before - values).abs() < 0.45 * step)
        & ((before - values).abs() > tiny * 2)
    )
    torch.testing.assert_close(moved[free], -wanted[free], atol=0.02, rtol=0.02)
    assert bool((((learned.multipliers - scales) * by_range)[by_range.abs() > 1e-3] <= 0).all())


def descend(learned, w, x, steps=150, travel=0.3):
    """Descent on the output error of a linear over minibatches of inputs `x`."""
    torch.manual_seed(2)
    for step in range(steps):
        done = step / steps
        rows = x[torch.randint(len(x), (256,))]
        weight = learned.rounded()
        gradient = 2 * (learned.computed(weight, done) - w) @ (rows.T @ rows / len(rows))
        learned.step(weight, gradient, 2 * travel * (1 - done) / steps, done)
    return learned.rounded().dequantize()


@pytest.mark.parametrize("scheme", [parse_scheme("int2-g64"), parse_scheme("uint2-g64")], ids=str)
def test_it_beats_gptq_and_learned_rounding_at_2_bits(scheme):
    torch.manual_seed(0)
    k = 128
    x = torch.randn(2000, k) @ (torch.randn(k, k) * torch.rand(k)) + torch.randn(2000, k)
    w, moment = torch.randn(32, k), x.T @ x / len(x)
    first = gptq(w, moment, scheme, F32)

    def loss(rounded):
        return float(((x @ (rounded - w).T) ** 2).mean())

    found = loss(descend(AnnealedWeight(first.weight, first.wanted, moment.diagonal()), w, x))
    learned = loss(descend(LearnedWeight(first.weight, first.wanted, moment.diagonal()), w, x, travel=0.05))
    assert found < 0.95 * min(loss(first.weight.dequantize()), learned)


def test_a_position_reaches_codes_beyond_its_neighbours():
    scheme = parse_scheme("int3-g32")
    learned = annealed(torch.randn(4, 32), scheme, shrink=1.0)
    before = learned.rounded().values()
    for _ in range(30):
        learned.step(learned.rounded(), torch.ones(4, 32), 0.1, 0.0)
    assert float((learned.rounded().values() - before).abs().max()) >= 2


@pytest.mark.parametrize("kind", [LearnedWeight, AnnealedWeight])
@pytest.mark.parametrize("scheme", [parse_scheme(name) for name in ("int3-g32", "uint4-g32", "nvfp4-a16")], ids=str)
def test_linears_together_learn_what_each_learns_alone(kind, scheme):
    torch.manual_seed(1)
    w, gradient, energy = torch.randn(24, 64), torch.randn(24, 64), torch.rand(2, 64)
    gradient[12:] *= 100  # each has a mean magnitude of its own
    start, wanted = round_to_nearest(w, scheme, F32, 0.8), numerics.in_parts(w, scheme)[0]
    both = kind(start, wanted, energy)
    alone = [kind(*each) for each in zip(start.split(2), wanted.chunk(2), energy, strict=True)]
    for done in (0.0, 0.5):
        both.step(both.rounded(), gradient, 0.1, done)
        for each, own in zip(alone, gradient.chunk(2), strict=True):
            each.step(each.rounded(), own, 0.1, done)
    found = both.rounded().split(2)
    for weight, each in zip(found, alone, strict=True):
        own = each.rounded()
        assert torch.equal(weight.codes, own.codes)
        torch.testing.assert_close(weight.scales, own.scales)
        torch.testing.assert_close(weight.dequantize(), own.dequantize())
