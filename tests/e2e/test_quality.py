"""Methods serve their purpose: on activations with a few large channels each loses less than plain rounding."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.evaluation.backend import load_dense
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import Source, open_source
from lowbit.models.walk import Walk
from tests.builders import calibration, logits_of, make_model, save

Measure = Callable[[torch.Tensor, torch.Tensor], float]


def loud_model(family: str) -> torch.nn.Module:
    """A model whose norms amplify every eleventh channel, as trained models do."""
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name or "layer_norm" in name:
                parameter[::11] *= 25
    return model


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def divergence(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the distributions over the next token, in nats."""
    logs, found = wanted.log_softmax(-1), got.log_softmax(-1)
    return float((logs.exp() * (logs - found)).sum(-1).mean())


def loss_of(
    source: Path, output: Path, measure: Measure = relative_error, samples: int = 64, **settings: object
) -> float:
    """The loss of the logits of `source` when quantized with `settings` and calibrated on `samples` other windows."""
    ids = calibration(4, 24, seed=77).ids
    recipe = complete_recipe({"group_size": 32, **settings})
    job = prepare(open_source(str(source)), recipe, "cpu")
    output.mkdir()
    run(job, output, calibration(samples, 24) if recipe.dataset else None, lambda report: None)
    wanted = logits_of(load_dense(open_source(str(source))), ids)
    got = torch.cat(list(Walker(open_source(str(output))).logits(ids)))
    assert torch.isfinite(got).all()
    return measure(got, wanted)


class Walker:
    """A quantized checkpoint as calibration and evaluation run it: int8 inputs where its file says so."""

    def __init__(self, source: Source) -> None:
        self._walk = Walk(open_skeleton(source), "cpu", torch.float32)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        hidden = self._walk.start([ids])
        for index in range(len(self._walk.skeleton.blocks)):
            with self._walk.loaded(index):
                hidden = [self._walk.run(index, states) for states in hidden]
        yield from self._walk.logits([ids], hidden)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_neox", "opt", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_awq_and_gptq_lose_less_than_plain_rounding(tmp_path, family, symmetric):
    source = save(loud_model(family), tmp_path / "source")
    losses = {
        method: loss_of(source, tmp_path / method, method=method, symmetric=symmetric)
        for method in ("rtn", "awq", "gptq")
    }
    assert losses["awq"] < 0.9 * losses["rtn"]
    assert losses["gptq"] < 0.9 * losses["rtn"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_learned_rounding_and_tuning_lose_less_still(tmp_path, family, symmetric):
    source = save(loud_model(family), tmp_path / "source")
    # tuning has hundreds of scales to fit: on 64 windows it fits these and no others
    common = {"symmetric": symmetric, "iters": 40, "measure": divergence, "samples": 256}
    losses = {
        "rtn": loss_of(source, tmp_path / "rtn", divergence, method="rtn", symmetric=symmetric),
        "signround": loss_of(source, tmp_path / "signround", method="signround", **common),
        "best": loss_of(source, tmp_path / "best", method="best", distill_steps=40, **common),
    }
    assert losses["signround"] < 0.95 * losses["rtn"]
    assert losses["best"] < losses["signround"]


def test_annealing_loses_less_than_gptq_at_2_bits(tmp_path):
    source = save(loud_model("llama"), tmp_path / "source")
    common = {"measure": divergence, "samples": 256, "bits": 2, "method": "gptq"}
    annealed = loss_of(source, tmp_path / "anneal", rounder="anneal", anneal_steps=40, **common)
    assert annealed < 0.9 * loss_of(source, tmp_path / "gptq", **common)


@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize("rounder", ["rtn", "gptq"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_smoothing_loses_less_than_none(tmp_path, family, rounder, activations):
    source = save(loud_model(family), tmp_path / "source")
    settings = {"method": "smoothquant", "rounder": rounder, "activations": activations}
    smooth = loss_of(source, tmp_path / "smooth", **settings, group_size=-1)
    plain = loss_of(source, tmp_path / "plain", **settings, group_size=-1, transforms=())
    assert smooth < 0.9 * plain


def test_transforms_compose_with_any_rounder(tmp_path):
    source = save(loud_model("llama"), tmp_path / "source")
    gptq = loss_of(source, tmp_path / "gptq", method="gptq")
    both = loss_of(source, tmp_path / "both", method="awq", rounder="gptq")
    assert both < loss_of(source, tmp_path / "rtn", method="rtn")
    assert both < 1.2 * gptq


def test_a_fixed_alpha_is_used_everywhere(tmp_path):
    source = save(loud_model("llama"), tmp_path / "source")
    loss_of(source, tmp_path / "out", method="smoothquant", group_size=-1, alpha=0.65)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    folds = [fold for block in report["blocks"] for fold in block["folds"]]
    assert {fold["alpha"] for fold in folds} == {0.65}
