"""quant/algos/awq.py on a toy layer: the candidates are the published ones, and the search beats plain rounding."""

import pytest
import torch

from quant.algos.awq import GRID, candidates, search_scales, weight_magnitude
from quant.numerics import fake_quantize
from quant.scheme import make_scheme

SCHEME = make_scheme(4, 32, True)


def test_weight_magnitude_by_hand():
    w = torch.zeros(2, 64)
    w[0, :3] = torch.tensor([4.0, -2.0, 1.0])
    w[1, :3] = torch.tensor([1.0, 1.0, -8.0])
    w[0, 32:34] = torch.tensor([-10.0, 5.0])
    got = weight_magnitude(w, SCHEME)
    assert got[:3].tolist() == [(1 + 1 / 8) / 2, (0.5 + 1 / 8) / 2, (0.25 + 1) / 2]
    assert got[32:34].tolist() == [0.5, 0.25]
    assert not got[3:32].any()


def test_candidates_are_the_two_families():
    activation, weight = torch.tensor([0.1, 1.0, 8.0]), torch.tensor([0.5, 0.2, 0.9])
    found = list(candidates(activation, weight))
    assert [ratio for ratio, duo, _ in found if not duo] == [step / GRID for step in range(1, GRID + 1)]
    assert [ratio for ratio, duo, _ in found if duo] == [step / GRID for step in range(1, GRID)]
    for ratio, duo, scales in found:
        wanted = activation**ratio / ((weight ** (1 - ratio) + 1e-4) if duo else 1)
        wanted = wanted / (wanted.max() * wanted.min()).sqrt()
        torch.testing.assert_close(scales, wanted)
        assert scales.max() * scales.min() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("activation", [torch.zeros(4), torch.tensor([0.0, 1e30, 1.0, 1e-30])])
def test_candidates_stay_positive_and_finite(activation):
    for _, _, scales in candidates(activation, torch.tensor([0.0, 1.0, 0.5, 0.0])):
        assert bool((torch.isfinite(scales) & (scales > 0)).all())


def test_no_scaling_wins_ties():
    choice = search_scales(torch.ones(4), torch.ones(4), lambda scales: 1.0)
    assert choice.scales is None
    assert choice.loss == choice.unscaled_loss == 1.0


def test_a_loss_that_is_not_a_number_never_wins():
    choice = search_scales(torch.ones(4), torch.ones(4), lambda scales: 1.0 if scales is None else float("nan"))
    assert choice.scales is None


def test_the_winner_has_the_least_loss_of_all_candidates():
    activation, weight = torch.rand(16) + 0.1, torch.rand(16)
    target = list(candidates(activation, weight))[7][2]
    choice = search_scales(
        activation, weight, lambda scales: 9.0 if scales is None else float((scales - target).square().sum())
    )
    assert choice.loss == 0
    assert torch.equal(choice.scales, target)
    assert (choice.ratio, choice.duo) == list(candidates(activation, weight))[7][:2]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_beats_plain_rounding_where_some_inputs_are_loud(symmetric):
    scheme = make_scheme(4, 32, symmetric)
    w, x = torch.randn(48, 64), torch.randn(512, 64)
    x[:, ::16] *= 30
    wanted = x @ w.T

    def loss(scales: torch.Tensor | None) -> float:
        columns = torch.ones(64) if scales is None else scales
        rounded = fake_quantize(w * columns, scheme, torch.bfloat16)
        return float(((x / columns) @ rounded.T - wanted).square().mean())

    choice = search_scales(x.abs().mean(0), weight_magnitude(w, scheme), loss)
    assert choice.scales is not None
    assert choice.loss == loss(choice.scales)
    assert choice.unscaled_loss == loss(None)
    assert choice.loss < 0.7 * choice.unscaled_loss
    assert bool((choice.scales[::16] > choice.scales[1::16]).all())
