"""quant/algos/awq.py on a toy layer: the candidates are the published ones, and the search beats plain rounding."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from lowbit.quant.algos.awq import GRID, ScaleChoice, scales_at, search_scales, weight_magnitude
from lowbit.quant.numerics import fake_quantize
from lowbit.quant.scheme import make_scheme

POINTS = [(7, False), (GRID, False), (0, True), (4, True), (11, True)]
SCHEME = make_scheme(4, 32, True)


def search(activation: torch.Tensor, weight: torch.Tensor, loss: Callable[[torch.Tensor | None], float]) -> ScaleChoice:
    """The choice at one fold."""

    def losses(candidates: Sequence[torch.Tensor | None]) -> list[list[float]]:
        return [[loss(None if scales is None else scales[0])] for scales in candidates]

    (choice,) = search_scales(activation[None], weight[None], losses)
    return choice


def test_weight_magnitude_by_hand():
    w = torch.zeros(2, 64)
    w[0, :3] = torch.tensor([4.0, -2.0, 1.0])
    w[1, :3] = torch.tensor([1.0, 1.0, -8.0])
    w[0, 32:34] = torch.tensor([-10.0, 5.0])
    got = weight_magnitude(w, SCHEME)
    assert got[:3].tolist() == [(1 + 1 / 8) / 2, (0.5 + 1 / 8) / 2, (0.25 + 1) / 2]
    assert got[32:34].tolist() == [0.5, 0.25]
    assert not got[3:32].any()


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.95, 1.0])
def test_candidates_are_the_two_families(ratio):
    activation, weight = torch.tensor([0.1, 1.0, 8.0]), torch.tensor([0.5, 0.2, 0.9])
    for duo in (False, True):
        scales = scales_at(ratio, duo, activation, weight)
        wanted = activation**ratio / ((weight ** (1 - ratio) + 1e-4) if duo else 1)
        torch.testing.assert_close(scales, wanted / (wanted.max() * wanted.min()).sqrt())
        assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("activation", [torch.zeros(4), torch.tensor([0.0, 1e30, 1.0, 1e-30])])
@pytest.mark.parametrize("duo", [False, True])
def test_candidates_stay_positive_and_finite(activation, duo):
    for step in range(GRID + 1):
        scales = scales_at(step / GRID, duo, activation, torch.tensor([0.0, 1.0, 0.5, 0.0]))
        assert bool((torch.isfinite(scales) & (scales > 0)).all())


def test_no_scaling_wins_ties():
    choice = search(torch.ones(4), torch.ones(4), lambda scales: 1.0)
    assert choice.scales is None
    assert choice.loss == choice.unscaled_loss == 1.0


def test_a_loss_that_is_not_a_number_never_wins():
    choice = search(torch.ones(4), torch.ones(4), lambda s: 1.0 if s is None else float("nan"))
    assert choice.scales is None


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("step", [1, 2, 7, 10, 15])
def test_a_smooth_loss_is_followed_to_its_least_value(step, duo):
    activation, weight = torch.rand(16) + 0.1, torch.rand(16)
    target = scales_at(step / GRID, duo, activation, weight)

    def loss(scales: torch.Tensor | None) -> float:
        return 9.0 if scales is None else float((scales - target).square().sum())

    choice = search(activation, weight, loss)
    assert choice.loss == 0
    assert torch.equal(choice.scales, target)
    assert (choice.ratio, choice.duo) == (step / GRID, duo)


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

    choice = search(x.abs().mean(0), weight_magnitude(w, scheme), loss)
    assert choice.scales is not None
    assert choice.loss == loss(choice.scales)
    assert choice.unscaled_loss == loss(None)
    assert choice.loss < 0.7 * choice.unscaled_loss
    assert bool((choice.scales[::16] > choice.scales[1::16]).all())


def test_folds_are_searched_together_as_one_by_one():
    """Each has an optimum of its own, one of them no scaling, one at the end of the grid."""
    activation, weight = torch.rand(5, 16) + 0.1, torch.rand(5, 16)
    targets = [scales_at(step / GRID, duo, activation[i], weight[i]) for i, (step, duo) in enumerate(POINTS)]

    def loss(fold: int, scales: torch.Tensor | None) -> float:
        unscaled = 0.0 if fold == 3 else 9.0
        return unscaled if scales is None else float((scales - targets[fold]).square().sum())

    def losses(candidates: Sequence[torch.Tensor | None]) -> list[list[float]]:
        return [[loss(fold, None if each is None else each[fold]) for fold in range(5)] for each in candidates]

    found = search_scales(activation, weight, losses)
    for fold, choice in enumerate(found):
        alone = search(activation[fold], weight[fold], partial(loss, fold))
        assert choice.as_json() == pytest.approx(alone.as_json(), abs=1e-9)
        assert (choice.scales is None) == (alone.scales is None) == (fold == 3)
        assert fold == 3 or (choice.ratio, choice.duo) == (POINTS[fold][0] / GRID, POINTS[fold][1])
        # a power may differ in its last bit with the place in a vector
        assert fold == 3 or torch.allclose(choice.scales, alone.scales, rtol=1e-6)
