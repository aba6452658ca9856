"""Mixtures of experts in the engine: quantized files, half precision, and files that contradict themselves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import engine
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.engine.feed_forward import MixedForward, distinct_experts
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import fill_all
from lowbit.models.products import rounded_inputs
from lowbit.models.skeleton import Block, open_skeleton
from lowbit.models.source import open_source
from lowbit.quant.kernels.route import Rule
from lowbit.quant.kernels.stack import PackedStack
from tests.builders import changed_config, logits_of, save_family

IDS = torch.arange(3, 43).view(2, 20)
RECIPES = {
    "int4": {"method": "rtn", "bits": 4, "group_size": 32},
    "int8": {"method": "rtn", "bits": 8, "group_size": -1},
    "w8a8": {"method": "rtn", "scheme": "int8-channel-a8token"},
}


def quantized(source: Path, output: Path, recipe: str) -> Path:
    job = prepare(open_source(str(source)), complete_recipe(RECIPES[recipe]), "cpu")
    output.mkdir()
    run(job, output, None, lambda report: None)
    return output


def stored_logits(directory: Path) -> torch.Tensor:
    """transformers' logits with the weights of the files, inputs rounded if they say so."""
    skeleton = fill_all(open_skeleton(open_source(str(directory))), "cpu", torch.float32)
    linears = [spec for block in skeleton.blocks for spec in block.linears]
    every = Block("", skeleton.model, linears=linears)
    with rounded_inputs(every, skeleton.model, skeleton.inputs):
        return logits_of(skeleton.model, IDS)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_files_that_we_quantized_have_the_logits_of_their_weights(family: str, recipe: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "source")
    made = quantized(source, tmp_path / "made", recipe)
    wanted = stored_logits(made)
    model = engine.load(made, device="cpu")
    torch.testing.assert_close(model.logits(IDS), wanted, atol=2e-4, rtol=1e-3)
    assert (engine.load(source, device="cpu").logits(IDS) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_half_precision_all_experts_are_one_packed_weight(recipe: str, tmp_path: Path) -> None:
    made = quantized(save_family("qwen3_moe", tmp_path / "source"), tmp_path / "made", recipe)
    model = engine.load(made, device="cpu", dtype=torch.float16)
    for layer in model.decoder.weights.layers:
        assert isinstance(layer.feed_forward, MixedForward)
        experts = layer.feed_forward.experts
        assert isinstance(experts.up.weight, PackedStack)
        assert isinstance(experts.down.weight, PackedStack)
        assert (experts.up.weight.experts, experts.up.weight.n) == (4, 128)
    expected = engine.load(made, device="cpu").logits(IDS)
    assert (model.logits(IDS) - expected).abs().mean() < 0.03 * expected.abs().mean()


def edited(directory: Path, name: str, value: torch.Tensor | None) -> None:
    """The file with another tensor `name`, or without it."""
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
WRONG_TENSORS = {
    "missing": (EXPERT, None, f"tensor '{EXPERT}' is in no file"),
    "shape": (EXPERT, torch.zeros(63, 64), r"experts.2.up_proj has shape \[63, 64\], config.json asks for \[64, 64\]"),
    "width": (ROUTER, torch.zeros(4, 32), r"gate.weight has shape \[4, 32\], config.json asks for \[4, 64\]"),
    "router": (ROUTER, torch.zeros(5, 64), r"gate.weight has shape \[5, 64\], config.json asks for \[4, 64\]"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_wrong_tensor_is_named(case: str, tmp_path: Path) -> None:
    name, value, message = WRONG_TENSORS[case]
    edited(save_family("qwen3_moe", tmp_path), name, value)
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "5 experts of a token, of 4"),
        ({"num_experts_per_tok": 0}, "0 experts of a token, of 4"),
        ({"num_local_experts": 3}, r"gate.weight has shape \[4, 64\], config.json asks for \[3, 64\]"),
        ({"num_local_experts": 5}, "experts.4"),
        ({"moe_intermediate_size": 0}, "inner of a mixture is 0"),
    ],
)
def test_a_wrong_configuration_is_told(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    save_family("qwen3_moe", tmp_path)
    changed_config(tmp_path, lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


def test_bytes_of_a_step_count_the_experts_that_it_touches(tmp_path: Path) -> None:
    model = engine.load(save_family("qwen3_moe", tmp_path), device="cpu")
    weights = model.decoder.weights
    each = 3 * 64 * 64 * 4
    assert weights.nbytes - weights.step_nbytes(1) == pytest.approx(2 * 2 * each)
    assert distinct_experts(1, 128, Rule(8)) == pytest.approx(8)
    assert distinct_experts(16, 128, Rule(8)) == pytest.approx(82.4, abs=0.1)
