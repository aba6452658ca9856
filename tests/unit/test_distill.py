"""calibrate/distill.py: its optimizer is Adam, scale gradients are those of autograd, and the divergence falls."""

import pytest
import torch

from lowbit.calibrate.distill import BETAS, EPSILON, Adam, TunedLinear
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.models.source import open_source
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import make_scheme
from tests.builders import calibration, save_family


def test_steps_are_those_of_torch():
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 5), torch.randn(9, 6, 5)
    ours = Adam(start, torch.ones(6, 5))
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=BETAS, eps=EPSILON)
    for gradient in gradients:
        ours.step(gradient, 0.01)
        theirs.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(ours.value, theirs.detach())


def test_the_rate_is_in_units_of_the_size():
    value = torch.tensor([4.0, 0.5])
    tuned = Adam(value, value)
    tuned.step(torch.tensor([1.0, -3.0]), 0.01)
    torch.testing.assert_close(tuned.value, torch.tensor([4.0 * 0.99, 0.5 * 1.01]))


@pytest.mark.parametrize(
    "scheme", [make_scheme(4, 32, True), make_scheme(4, 32, False), make_scheme(8, -1, True)], ids=str
)
def test_scales_move_against_their_gradient_and_codes_stay(scheme):
    torch.manual_seed(0)
    weight = round_to_nearest(torch.randn(8, 64), scheme, torch.float32)
    gradient = torch.randn(8, 64)
    scales = weight.scales.clone().requires_grad_()
    zeros = 0 if weight.zeros is None else weight.zeros.unsqueeze(-1)
    steps = weight.codes.float().view(8, scales.shape[1], -1) - zeros
    ((steps * scales.unsqueeze(-1)).view(8, 64) * gradient).sum().backward()
    tuned = TunedLinear(weight, "cpu")
    tuned.step(gradient, 0.01)
    assert torch.equal(tuned.weight().codes, weight.codes)
    torch.testing.assert_close(tuned.weight().scales, weight.scales * (1 - 0.01 * (scales.grad * weight.scales).sign()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_divergence_falls(tmp_path, family):
    source = open_source(str(save_family(family, tmp_path / "source")))
    recipe = complete_recipe({"method": "rtn", "group_size": 32, "distill_steps": 30})
    (tmp_path / "out").mkdir()
    result = run(prepare(source, recipe, "cpu"), tmp_path / "out", calibration(8, 24), lambda report: None)
    assert len(result.distilled) == 30
    assert sum(result.distilled[-5:]) < 0.9 * sum(result.distilled[:5])
