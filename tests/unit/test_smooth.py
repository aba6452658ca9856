"""quant/algos/smooth.py: the published scale, and a search that finds the strength that loses least."""

from collections.abc import Sequence

import pytest
import torch

from lowbit.quant.algos.smooth import ALPHAS, search_alpha, smoothing_scales
from lowbit.quant.numbers import INT8
from lowbit.quant.numerics import fake_quantize, fake_quantize_inputs, quantize_inputs
from lowbit.quant.scheme import make_scheme

ONES = torch.ones(2, 4), torch.ones(2, 4)  # at two folds
W8 = make_scheme(8, -1, True)


def test_the_published_scale():
    activation, weight = torch.tensor([16.0, 4.0]), torch.tensor([1.0, 4.0])
    torch.testing.assert_close(smoothing_scales(0.5, activation, weight), torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(smoothing_scales(1.0, activation, weight), activation)


def test_channels_without_activation_or_weight_keep_scale_one():
    scales = smoothing_scales(0.5, torch.tensor([0.0, 3.0, 9.0]), torch.tensor([2.0, 0.0, 1.0]))
    assert scales.tolist() == [1.0, 1.0, 3.0]


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with two outlier channels, and a weight."""
    torch.manual_seed(0)
    x = torch.randn(200, 64)
    x[:, [5, 40]] *= 60
    return x, torch.randn(48, 64)


def loss_under(scales: torch.Tensor | None) -> float:
    x, w = layer()
    moved = torch.ones(64) if scales is None else scales
    y = fake_quantize_inputs(x / moved, INT8) @ fake_quantize(w * moved, W8, torch.float32).T
    return float((y - x @ w.T).square().mean())


def test_the_search_beats_no_migration_and_every_fixed_strength():
    x, w = layer()
    activation, weight = x.abs().amax(0), w.abs().amax(0)

    def losses(candidates: Sequence[torch.Tensor | None]) -> list[list[float]]:
        return [[loss_under(None if scales is None else scales[0])] for scales in candidates]

    (choice,) = search_alpha(activation[None], weight[None], losses)
    assert choice.loss < 0.2 * choice.unscaled_loss
    assert choice.loss == min(loss_under(smoothing_scales(alpha, activation, weight)) for alpha in ALPHAS)
    assert choice.as_json()["alpha"] == choice.alpha


def test_a_fixed_strength_is_taken_even_where_it_loses():
    choices = search_alpha(*ONES, lambda candidates: [[0.0, 5.0], [1.0, 1.0]], fixed=0.7)
    assert [choice.alpha for choice in choices] == [0.7, 0.7]
    assert all(choice.scales is not None for choice in choices)


def test_nothing_is_moved_where_nothing_helps():
    choices = search_alpha(*ONES, lambda candidates: [[1.0, 2.0], *[[1.0, 1.0]] * (len(candidates) - 1)])
    assert [choice.scales is None for choice in choices] == [True, False]


def test_int8_inputs_by_hand():
    x = torch.tensor([[127.0, 0.5, -1.5, 2.5], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = quantize_inputs(x, INT8)
    assert codes.tolist() == [[127, 0, -2, 2], [0, 0, 0, 0]]
    assert scales.tolist() == [[1.0], [1.0]]
    static, _ = quantize_inputs(x, INT8, torch.tensor(0.5))
    assert static.tolist() == [[127, 1, -3, 5], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_inputs_keeps_their_dtype_and_loses_little(dtype):
    x = torch.randn(5, 64).to(dtype)
    rounded = fake_quantize_inputs(x, INT8)
    assert rounded.dtype == dtype
    assert (rounded.float() - x.float()).abs().max() <= x.float().abs().max() * (0.5 / 127 + 2**-8)
