"""Every family quantized, written and read again. No linear is left out without a reason. Fine rounding hardly changes
the logits, so every fold reached its norms, biases and weights on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbit.calibrate.budget import spend
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.evaluation.backend import load_dense
from lowbit.export.checkpoint import Checkpoint, open_checkpoint
from lowbit.models.source import open_source
from tests.builders import FAMILIES, calibration, logits_of, make_model, save

IDS = calibration(2, 24, seed=9).ids
RECIPES = {
    "awq": {"method": "awq", "bits": 8, "group_size": 32},
    "awq asymmetric": {"method": "awq", "bits": 4, "group_size": 32, "symmetric": False},
    "rotated": {"method": "awq", "bits": 8, "group_size": 32, "transforms": ("rotate", "awq"), "rounder": "gptq"},
    "rtn": {"method": "rtn", "bits": 8, "group_size": 32},
    "int8": {"method": "int8"},
    "learned": {"method": "signround", "bits": 8, "group_size": 32, "iters": 2, "distill_steps": 2},
    "spent": {"method": "rtn", "target_bits": 8.2, "group_size": 32, "dataset": "builtin"},
}
# Relative error of the logits. A fold missing on one side changes them by more than half; a router near a tie may send
# a token to another expert with any rounding.
LIMITS = {"awq": 0.03, "rotated": 0.03, "awq asymmetric": 0.5, "rtn": 0.03, "int8": 0.05, "learned": 0.05, "spent": 0.1}
ROUTED = {"mixtral", "qwen3_moe"}


def quantize(source: Path, output: Path, recipe: str) -> Path:
    job = prepare(open_source(str(source)), complete_recipe(RECIPES[recipe]), "cpu")
    output.mkdir()
    run(job, output, calibration() if job.recipe.dataset else None, lambda report: None)
    return output


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Callable[[str], tuple[nn.Module, Path]]:
    made: dict[str, tuple[nn.Module, Path]] = {}

    def original(family: str) -> tuple[nn.Module, Path]:
        if family not in made:
            model = make_model(family)
            made[family] = model, save(model, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return original


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def matrices(model: nn.Module) -> int:
    """The number of weights the model multiplies with: linears, and experts one by one (gate, up and down)."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    stacks = [parameter for parameter in model.parameters() if parameter.ndim == 3]
    routers = [name for name, p in model.named_parameters() if p.ndim == 2 and name.endswith("mlp.gate.weight")]
    return len(linears) + len(routers) + sum(3 * len(stack) for stack in stacks) // 2


def reported(output: Path) -> tuple[set[str], dict[str, dict[str, object]]]:
    """Counts of quantized linears and of others, from quantization_report.json."""
    report = json.loads((output / "quantization_report.json").read_text())
    return {name for block in report["blocks"] for name in block["linears"]}, report["left"]


def quantized(checkpoint: Checkpoint) -> set[str]:
    return {name.removesuffix(".weight_packed") for name in checkpoint.entries if name.endswith(".weight_packed")}


@pytest.mark.parametrize("recipe", ["awq", "int8", "rtn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(originals, tmp_path, family, recipe):
    model, source = originals(family)
    output = quantize(source, tmp_path / "out", recipe)
    packed, left = reported(output)
    checkpoint = open_checkpoint(output)
    assert packed == quantized(checkpoint)
    tied = 1 if model.config.get_text_config().tie_word_embeddings else 0
    assert len(packed) + len(left) >= matrices(model) - tied
    assert all(entry["reason"] for entry in left.values())
    assert all(name in {"lm_head", "embed_out"} or name.endswith(".gate") for name in left)
    assert set(checkpoint.quantization["ignore"]) >= set(left)
    error = relative(logits_of(load_dense(open_source(str(output))), IDS), logits_of(model, IDS))
    assert error < LIMITS[recipe] * (3 if family in ROUTED else 1)


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
def test_rotated_scaled_and_rounded_by_gptq(originals, tmp_path, family):
    """Biases, fused projections, transposed weights: both transforms leave a consistent model on disk."""
    model, source = originals(family)
    output = quantize(source, tmp_path / "out", "rotated")
    for block in json.loads((output / "quantization_report.json").read_text())["blocks"]:
        (row,) = [row for row in block["folds"] if row["transform"] == "rotate"]
        assert row["head_size"] == 16
        assert any(other["transform"] == "awq" and other["fold"] == row["fold"] for other in block["folds"])
    error = relative(logits_of(load_dense(open_source(str(output))), IDS), logits_of(model, IDS))
    assert 0 < error < LIMITS["rotated"]


# Linears outside the blocks, and the one that chooses positions.
LEFT = {
    "gemma4": ("re:^model\\.per_layer_model",),
    "gemma3n": ("re:^model\\.(per_layer_model|altup_)",),
    "glm_moe_dsa": ("weights_proj",),
}


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("gemma4", "rotated"),
        ("gemma4", "learned"),
        ("gemma4", "spent"),
        ("gemma3n", "rotated"),
        ("glm_moe_dsa", "spent"),
    ],
)
def test_blocks_that_hand_each_other_more_than_hidden_states(originals, tmp_path, monkeypatch, family, recipe):
    """Several batches: each has its own embeddings per layer, keys and values, and choice of positions."""
    monkeypatch.setattr("lowbit.calibrate.blocks.BATCH_TOKENS", 48)
    model, source = originals(family)
    fitted = RECIPES[recipe] | {"ignore": LEFT[family]}
    job = prepare(open_source(str(source)), complete_recipe(fitted), "cpu")
    tokens = calibration()
    if job.recipe.target_bits:
        job = spend(job, tokens)
    run(job, tmp_path, tokens, lambda report: None)
    error = relative(logits_of(load_dense(open_source(str(tmp_path))), IDS), logits_of(model, IDS))
    assert 0 < error < LIMITS[recipe] * (4 if family == "glm_moe_dsa" else 2)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt", "mixtral"])
def test_asymmetric(originals, tmp_path, family):
    model, source = originals(family)
    output = quantize(source, tmp_path / "out", "awq asymmetric")
    error = relative(logits_of(load_dense(open_source(str(output))), IDS), logits_of(model, IDS))
    assert 0 < error < LIMITS["awq asymmetric"]


def test_a_router_is_scaled_with_its_norm_and_stays_in_16_bits(originals, tmp_path):
    """The norm before the experts is divided, so the router's unquantized weight must be multiplied."""
    model, source = originals("mixtral")
    output = open_checkpoint(quantize(source, tmp_path / "out", "awq"))
    prefix = "model.layers.0."
    before = model.state_dict()[f"{prefix}mlp.gate.weight"]
    after = output.read(f"{prefix}block_sparse_moe.gate.weight")
    norm = f"{prefix}post_attention_layernorm.weight"
    scales = model.state_dict()[norm] / output.read(norm)
    assert (scales - 1).abs().max() > 0.01
    torch.testing.assert_close(after, before * scales, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", ["awq", "int8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_stacked_on_disk_are_written_one_by_one(originals, tmp_path, family, recipe):
    model, source = originals(family)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    for path in source.iterdir():
        (stacked / path.name).write_bytes(path.read_bytes())
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, stacked / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in open_checkpoint(stacked).entries
    output = open_checkpoint(quantize(stacked, tmp_path / "out", recipe))
    roles = ("w1", "w2", "w3") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    wanted = {f"model.layers.{i}.mlp.experts.{e}.{role}" for i in range(2) for e in range(4) for role in roles}
    assert {name for name in quantized(output) if ".experts." in name} == wanted
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in output.entries)
    error = relative(logits_of(load_dense(open_source(str(output.directory))), IDS), logits_of(model, IDS))
    assert error < 3 * LIMITS[recipe]


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "v_proj", "down_proj", "up_proj", "re:layers\\.0\\."])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_linears_left_alone_take_part_in_folds(originals, tmp_path, family, name):
    """A linear that stays unquantized is still scaled together with its neighbours."""
    model, source = originals(family)
    recipe = complete_recipe(RECIPES["awq"] | {"ignore": ("lm_head", name)})
    job = prepare(open_source(str(source)), recipe, "cpu")
    run(job, tmp_path, calibration(), lambda report: None)
    error = relative(logits_of(load_dense(open_source(str(tmp_path))), IDS), logits_of(model, IDS))
    assert 0 < error < LIMITS["awq"]


@pytest.mark.peer
@pytest.mark.parametrize("recipe", ["rtn", "int8", "awq"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_transformers_loads_it_with_compressed_tensors(originals, tmp_path, family, recipe):
    """No reader of this layout supports GPT-2's Conv1D, and the run says so. transformers' Falcon computes with
    `weight` itself, so it must be told to unpack while loading."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    _, source = originals(family)
    output = quantize(source, tmp_path / "out", recipe)
    unpacked = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if family.startswith("falcon") else {}
    theirs, info = AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True, **unpacked
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load_dense(open_source(str(output)))
    assert relative(logits_of(theirs.eval(), IDS), logits_of(ours, IDS)) < 1e-4


def test_a_family_that_readers_do_not_know_is_said_to_be_one(originals):
    job = prepare(open_source(str(originals("gpt2")[1])), complete_recipe(RECIPES["int8"]), "cpu")
    assert any("Conv1D" in warning for warning in job.warnings())
    assert prepare(open_source(str(originals("llama")[1])), complete_recipe(RECIPES["int8"]), "cpu").warnings() == []
