"""Experts stacked in one tensor, without names of their own in transformers: they are split, quantized, and written
under vLLM's names, or left whole if the user says so."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.evaluation.backend import load_dense
from lowbit.export.engines.vllm import VLLM
from lowbit.models.source import open_source
from tests.builders import calibration, logits_of
from tests.families.tiny import save_tiny

IDS = calibration(2, 24, seed=9).ids
ROLES = {"gate_proj", "up_proj", "down_proj"}
EXPERTS = {
    "gpt_oss": ("mlp.experts", {"gate_up_proj", "down_proj"}),  # gate and up take turns, as vLLM wants them
    "llama4_text": ("feed_forward.experts", ROLES),
    "granitemoe": ("block_sparse_moe.experts", ROLES),
    "aria_text": ("mlp.experts", ROLES),
    "jetmoe": ("mlp.experts", {"input_linear", "output_linear"}),
}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "bits": 8, "group_size": 32},
    "awq": {"method": "awq", "bits": 8, "group_size": 32},
    "smoothquant": {"method": "smoothquant"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stacked")
    return {kind: save_tiny(kind, root / kind) for kind in EXPERTS}


def quantize(source: Path, output: Path, recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    job = prepare(open_source(str(source)), complete_recipe(recipe), "cpu")
    output.mkdir()
    run(job, output, calibration() if job.recipe.dataset else None, lambda report: None)
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("kind", list(EXPERTS))
def test_each_expert_is_quantized_under_a_name_of_its_own(sources, tmp_path, kind, recipe):
    tensors = quantize(sources[kind], tmp_path / "out", RECIPES[recipe])
    home, roles = EXPERTS[kind]
    found = {match.groups() for name in tensors if (match := re.search(rf"{home}\.(\d)\.(\w+)\.weight_scale$", name))}
    assert found == {(str(expert), role) for expert in range(4) for role in roles}
    before, after = (load_dense(open_source(str(path))) for path in (sources[kind], tmp_path / "out"))
    wanted = logits_of(before, IDS)
    assert (
        0 < (logits_of(after, IDS) - wanted).norm() < 0.25 * wanted.norm()
    )  # a token near a tie may go to another expert


def test_experts_that_transformers_reorders_are_cut_from_what_it_makes(tmp_path):
    """Inkling's file interleaves gate and up; transformers has one after the other."""
    source = save_tiny("inkling2_text", tmp_path / "source")
    assert any(name.endswith("experts.w13_weight") for name in load_file(source / "model.safetensors"))
    quantize(source, tmp_path / "out", {"method": "int8"})
    before, after = (load_dense(open_source(str(path))) for path in (source, tmp_path / "out"))
    wanted = logits_of(before, IDS)
    assert 0 < (logits_of(after, IDS) - wanted).norm() < 0.25 * wanted.norm()


def test_biases_of_stacked_experts_come_apart_with_them(sources, tmp_path):
    stack = load_file(sources["gpt_oss"] / "model.safetensors")["model.layers.1.mlp.experts.gate_up_proj_bias"]
    tensors = quantize(sources["gpt_oss"], tmp_path / "out", RECIPES["rtn"])
    assert not any(name.endswith("_bias") for name in tensors)
    for expert in range(4):
        assert torch.equal(tensors[f"model.layers.1.mlp.experts.{expert}.gate_up_proj.bias"], stack[expert])


def test_vllm_is_told_of_experts_that_it_skips_and_finds_those_left_alone(sources, tmp_path):
    """vLLM looks up an expert's gate and up separately, and silently skips packed ones that share a matrix."""
    source = open_source(str(sources["gpt_oss"]))
    packed = prepare(source, complete_recipe(RECIPES["rtn"]), "cpu")
    assert [text for text, engines in packed.caveats().items() if VLLM.name in engines and "vLLM 0.32 skips" in text]
    left = RECIPES["rtn"] | {"ignore": ("re:\\.experts\\.",)}
    quantize(sources["gpt_oss"], tmp_path / "out", left)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    names = {name for name in ignored if ".experts." in name}
    roles = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
    assert names == {f"model.layers.{n}.mlp.experts.{e}.{r}" for n in range(2) for e in range(4) for r in roles}
    assert not any("vLLM 0.32 skips" in text for text in prepare(source, complete_recipe(left), "cpu").warnings())


@pytest.mark.parametrize("kind", list(EXPERTS))
def test_experts_left_alone_stay_stacked(sources, tmp_path, kind):
    tensors = quantize(sources[kind], tmp_path / "out", RECIPES["rtn"] | {"ignore": ("re:\\.experts\\.",)})
    before = load_file(sources[kind] / "model.safetensors")
    stacks = [name for name, value in before.items() if value.ndim == 3]
    assert stacks
    assert all(torch.equal(tensors[name], before[name]) for name in stacks)
    assert any(name.endswith("weight_packed") for name in tensors) or kind == "jetmoe"


def test_each_expert_sees_its_own_tokens_where_all_are_multiplied_at_once(sources, tmp_path):
    """Llama 4 multiplies every token with every expert, with zeros for other experts' tokens: those do not count."""
    job = prepare(open_source(str(sources["llama4_text"])), complete_recipe(RECIPES["awq"]), "cpu")
    tmp_path.joinpath("out").mkdir()
    result = run(job, tmp_path / "out", calibration(16, 24), lambda report: None)
    rows = result.blocks[1].linears
    seen = [rows[f"model.layers.1.feed_forward.experts.{expert}.up_proj"]["tokens"] for expert in range(4)]
    assert sum(seen) == 2 * 16 * 24  # two experts a token


@pytest.mark.parametrize("kind", ["aria_text", "qwen3_moe", "llama4_text"])
def test_a_family_whose_single_experts_transformers_cannot_load_is_said_to_be_one(tmp_path, kind):
    job = prepare(open_source(str(save_tiny(kind, tmp_path / kind))), complete_recipe(RECIPES["rtn"]), "cpu")
    said = [warning for warning in job.warnings() if "experts one by one" in warning]
    assert len(said) == (kind == "aria_text")
    assert not any("Conv1D" in warning for warning in job.warnings())
