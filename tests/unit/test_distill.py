"""calibrate/distill.py: its optimizer is Adam, scale gradients are those of autograd, and the divergence falls."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowbit.calibrate import distill
from lowbit.calibrate.blocks import BlockLoop
from lowbit.calibrate.distill import BETAS, EPSILON, Adam, TunedLinear
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.errors import CheckpointError
from lowbit.models.source import open_source
from lowbit.models.states import States
from lowbit.quant.numerics import in_parts, per_weight
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import make_scheme, parse_scheme
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


SCHEMES = [make_scheme(4, 32, True), make_scheme(4, 32, False), make_scheme(8, -1, True)]
FLOATS = [parse_scheme(name) for name in ("nvfp4-a16", "mxfp4-a16", "fp8-channel")]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_move_against_their_gradient_and_codes_stay(scheme):
    torch.manual_seed(0)
    weight = round_to_nearest(torch.randn(8, 64), scheme, torch.float32)
    gradient = torch.randn(8, 64)
    scales = weight.scales.clone().requires_grad_()
    zeros = 0 if weight.zeros is None else weight.zeros.unsqueeze(-1)
    steps = weight.codes.float().view(8, scales.shape[1], -1) - zeros
    ((steps * scales.unsqueeze(-1)).view(8, 64) * gradient).sum().backward()
    tuned = TunedLinear(weight, None, "cpu")
    tuned.step(weight, gradient, 0.01)
    assert torch.equal(tuned.weight().codes, weight.codes)
    torch.testing.assert_close(tuned.weight().scales, weight.scales * (1 - 0.01 * (scales.grad * weight.scales).sign()))


@pytest.mark.parametrize("scheme", [*SCHEMES, *FLOATS], ids=str)
def test_a_remainder_leads_back_to_the_weight(scheme):
    """To 1/254 of the distance between codes, on both sides of a power of two; the codes are those it came from."""
    torch.manual_seed(1)
    w, _ = in_parts(torch.randn(16, 64), scheme)
    weight = round_to_nearest(w, scheme, torch.float32, divisor=torch.ones(()) if scheme.weights.parent else None)
    position = weight.position(weight.remainder(w))
    exact = w / per_weight(weight.scales, scheme, w)
    assert torch.equal(scheme.number.encode(position.clone()) if weight.zeros is None else weight.codes, weight.codes)
    inside = exact.abs() <= scheme.number.high - (0 if weight.zeros is None else scheme.number.high)
    difference = ((position - exact).abs() / scheme.number.spacing(exact))[inside]
    assert difference.numel() == 0 or float(difference.max()) < 2 / 254 + 1e-4


@pytest.mark.parametrize("scheme", [*SCHEMES, *FLOATS], ids=str)
def test_codes_flip_against_their_gradient_the_undecided_first(scheme):
    """After a few steps only weights near the border between two codes have moved, to the neighbour downhill."""
    torch.manual_seed(2)
    w, divisor = in_parts(torch.randn(16, 64), scheme)
    weight = round_to_nearest(w, scheme, torch.float32, divisor=None if divisor is None else torch.ones(()))
    remainder = weight.remainder(w)
    gradient = torch.randn(16, 64)
    tuned = TunedLinear(weight, remainder, "cpu")
    for _ in range(20):
        tuned.step(tuned.weight(), gradient, 1e-3)
    before, after = weight.values(), tuned.weight().values()
    flipped = after != before
    assert 0 < int(flipped.sum()) < 0.3 * flipped.numel()
    downhill = (after - before) * gradient * per_weight(weight.scales, scheme, w)
    assert bool((downhill[flipped] < 0).all())
    assert int(remainder.abs()[flipped].min()) > 127 * (1 - 2 * 2 * 20 * 3e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_divergence_falls(tmp_path, family):
    source = open_source(str(save_family(family, tmp_path / "source")))
    recipe = complete_recipe({"method": "rtn", "group_size": 32, "distill_steps": 30})
    (tmp_path / "out").mkdir()
    result = run(prepare(source, recipe, "cpu"), tmp_path / "out", calibration(8, 24), lambda report: None)
    assert len(result.distilled) == 30
    assert sum(result.distilled[-5:]) < 0.9 * sum(result.distilled[:5])


def test_codes_and_windows_that_memory_cannot_hold_are_refused(tmp_path, monkeypatch):
    source = open_source(str(save_family("llama", tmp_path / "source")))
    monkeypatch.setattr("lowbit.models.devices.psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    with pytest.raises(CheckpointError, match="--no-distill-codes"):
        prepare(source, complete_recipe({"method": "best", "group_size": 32, "distill_codes": True}), "cpu")
    with pytest.raises(CheckpointError, match=r"0\.0 GB for codes and \d+\.\d GB for its further windows"):
        prepare(source, complete_recipe({"method": "best", "group_size": 32, "distill_samples": 400_000}), "cpu")
    prepare(source, complete_recipe({"method": "best", "group_size": 32}), "cpu")


def test_tuned_codes_lower_the_divergence_further(tmp_path):
    source = open_source(str(save_family("llama", tmp_path / "source")))
    losses = {}
    for codes in (False, True):
        recipe = complete_recipe({"method": "rtn", "bits": 2, "group_size": 32, "distill_steps": 30})
        recipe = recipe.merged({"distill_codes": codes})
        out = tmp_path / f"out{codes}"
        out.mkdir()
        result = run(prepare(source, recipe, "cpu"), out, calibration(8, 24), lambda report: None)
        losses[codes] = sum(result.distilled[-5:])
    assert losses[True] < losses[False]


def test_the_divergence_in_parts_is_that_of_all_tokens_at_once(monkeypatch):
    torch.manual_seed(3)
    head, exact, hidden = torch.randn(4, 11), torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    walk, ids = SimpleNamespace(logits_of=lambda batch, hidden: hidden @ head), torch.zeros(6, 5, dtype=torch.int64)
    loss, slope = distill._divergence(walk, ids, exact, 0.5, hidden)
    monkeypatch.setattr(distill, "BATCH_TOKENS", 10)
    for found, wanted in zip(distill._divergence(walk, ids, exact, 0.5, hidden), (loss, slope), strict=True):
        torch.testing.assert_close(found.float(), wanted.float())


def test_a_step_takes_batches_of_text_together():
    """A remainder is a step of its own, and so is a sample with images."""
    batches = [torch.full((2, 4), place) for place in range(5)]
    states = [States(batch[..., None].float(), (2, 4)) for batch in batches]
    loop = SimpleNamespace(batches=[*batches, "images"], exact=[*states, "states of images"])
    steps = list(distill._of_steps(loop, 17))
    assert [len(batch) for batch, _ in steps] == [4, 4, 2, len("images")]
    assert all(torch.equal(batch[..., None].float(), exact.hidden) for batch, exact in steps[:3])
    assert [len(batch) for batch, _ in distill._of_steps(loop, 1)][:5] == [2] * 5


def test_steps_take_further_windows_too_with_the_exact_states_of_the_model(tmp_path):
    source = open_source(str(save_family("llama", tmp_path / "source")))
    recipe = complete_recipe({"method": "finest", "group_size": 32, "distill_samples": 5})
    further = calibration(5, 24, seed=2).ids
    loop = BlockLoop(prepare(source, recipe, "cpu"), replace(calibration(3, 24), further=further))
    steps = list(distill._further_steps(loop, 50))
    assert [len(batch) for batch, _ in steps] == [2, 2, 1]
    assert torch.equal(torch.cat([batch for batch, _ in steps]), further)
    (apart,) = loop.exact_of([further])
    torch.testing.assert_close(torch.cat([states.hidden for _, states in steps]), apart.hidden)
    none = BlockLoop(prepare(source, recipe, "cpu"), calibration(3, 24))
    assert not list(distill._further_steps(none, 50))


def test_tuning_rounds_keys_and_values_as_the_cache_does(tmp_path):
    """The divergence before the first step is larger by what the cache loses, and tuning takes some of it back."""
    source = open_source(str(save_family("llama", tmp_path / "source")))
    found = {}
    for cache in (None, "fp8"):
        recipe = complete_recipe({"method": "int8", "kv_cache": cache, "distill_steps": 30})
        (tmp_path / str(cache)).mkdir()
        job = prepare(source, recipe, "cpu")
        found[cache] = run(job, tmp_path / str(cache), calibration(8, 24), lambda report: None).distilled
    assert found["fp8"][0] > 1.05 * found[None][0]
    assert sum(found["fp8"][-5:]) < sum(found["fp8"][:5])
