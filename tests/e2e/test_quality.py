"""AWQ does what it is for: on activations with a few loud channels it loses less than plain rounding."""

from pathlib import Path

import pytest
import torch

from calibrate.methods import complete_recipe
from calibrate.pipeline import prepare, run
from evaluation.backend import load_dense
from models.source import open_source
from tests.builders import calibration, logits_of, make_model, save


def loud_model(family: str) -> torch.nn.Module:
    """A model whose norms amplify every eleventh channel, as trained models do."""
    model = make_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name or "layer_norm" in name:
                parameter[::11] *= 25
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_awq_loses_less_than_plain_rounding(tmp_path, family, symmetric):
    model = loud_model(family)
    source = save(model, tmp_path / "source")
    ids = calibration(4, 24, seed=77).ids
    wanted = logits_of(model, ids)
    errors = {}
    for method in ("rtn", "awq"):
        recipe = complete_recipe({"method": method, "group_size": 32, "symmetric": symmetric})
        job = prepare(open_source(str(source)), recipe, "cpu")
        output = Path(tmp_path / method)
        output.mkdir()
        run(job, output, calibration(16, 24) if method == "awq" else None, lambda report: None)
        got = logits_of(load_dense(open_source(str(output))), ids)
        errors[method] = float((got - wanted).norm() / wanted.norm())
    assert errors["awq"] < 0.9 * errors["rtn"]
