"""Multimodal models: the text part is quantized, the rest is copied bit for bit and declared in every format, so that
the class named in config.json runs the output, including image prompts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.evaluation.backend import load_dense
from lowbit.export.checkpoint import open_checkpoint
from lowbit.models.source import open_source
from tests.builders import calibration
from tests.families.tiny import VOCABULARY, save_tiny

RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "rtn": {"method": "rtn", "group_size": 32},
    "awq": {"method": "awq", "group_size": 32},
    "gptq format": {"method": "rtn", "group_size": 32, "format": "gptq"},
    "awq format": {"method": "rtn", "group_size": 32, "format": "awq", "symmetric": False},
}
# The blocks of the text part, as the file names them.
BLOCKS = {
    "llava": r"model\.language_model\.layers\.|language_model\.model\.layers\.",
    "gemma3": r"model\.language_model\.layers\.|language_model\.model\.layers\.",
    "qwen3_5": r"model\.language_model\.layers\.",
    "qwen3_vl_moe": r"model\.language_model\.layers\.",
}
FAMILIES = tuple(BLOCKS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: save_tiny(kind, root / kind) for kind in FAMILIES}


def quantize(source: Path, output: Path, recipe: str) -> Path:
    job = prepare(open_source(str(source)), complete_recipe(RECIPES[recipe]), "cpu")
    output.mkdir()
    run(job, output, calibration() if job.recipe.dataset else None, lambda report: None)
    return output


def prompt(kind: str, config: Any) -> dict[str, torch.Tensor]:
    """A text with one image in it."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (1, 12), generator=generator)
    token = getattr(config, "image_token_id", None) or config.image_token_index
    if kind == "qwen3_5":
        ids[0, 2] = config.vision_start_token_id
        ids[0, 3] = token
        patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
        pixels = torch.randn(4, patch, generator=generator)
        types = (ids == token).long()
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 2, 2]]),
            "mm_token_type_ids": types,
        }
    seen = config.mm_tokens_per_image if kind == "gemma3" else 4
    ids = torch.cat([ids[:, :3], torch.full((1, seen), token), ids[:, 3:]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=generator)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_but_the_text_part_is_copied_bit_for_bit(sources, tmp_path, kind):
    before = load_file(sources[kind] / "model.safetensors")
    after = load_file(quantize(sources[kind], tmp_path / "out", "int8") / "model.safetensors")
    outside = [name for name in before if not re.match(BLOCKS[kind], name)]
    assert len(outside) > 20
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert not any(name.endswith("weight_packed") and not re.match(BLOCKS[kind], name) for name in after)


def declared(config: dict[str, Any], linear: str) -> bool:
    """True if a reader of this quantization_config leaves the linear alone."""
    if config["quant_method"] == "compressed-tensors":
        return linear in config["ignore"]
    if config["quant_method"] == "awq":
        return any(part in linear for part in config["modules_to_not_convert"])
    return any(re.match(pattern.removeprefix("-:"), linear) for pattern in config["dynamic"])


@pytest.mark.parametrize(
    ("kind", "recipe"), [("llava", "gptq format"), ("llava", "awq format"), ("llava", "int8"), ("qwen3_5", "int8")]
)
def test_every_dense_linear_of_the_file_is_declared(sources, tmp_path, kind, recipe):
    source = with_later_tokens(sources[kind], tmp_path / "source")
    output = open_checkpoint(quantize(source, tmp_path / "out", recipe))
    assert output.quantization is not None
    dense = [name for name, entry in output.entries.items() if name.endswith(".weight") and len(entry.shape) == 2]
    linears = [name.removesuffix(".weight") for name in dense if not re.search("embed|position|norm", name)]
    assert "mtp.fc" in linears
    assert not [linear for linear in linears if not declared(output.quantization, linear)]


def with_later_tokens(source: Path, directory: Path) -> Path:
    """The model with a layer that predicts later tokens: in the file, and in no class of transformers."""
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    experts = {"mtp.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 32, 64)}
    save_file(tensors | {"mtp.fc.weight": torch.randn(64, 128)} | experts, directory / "model.safetensors")
    return directory


def test_stacked_experts_of_a_layer_without_a_class_are_declared_one_by_one(sources, tmp_path):
    output = quantize(with_later_tokens(sources["qwen3_5"], tmp_path / "source"), tmp_path / "out", "int8")
    ignored = json.loads((output / "config.json").read_text())["quantization_config"]["ignore"]
    assert {name for name in ignored if name.startswith("mtp.layers.")} == {
        f"mtp.layers.0.mlp.experts.{expert}.{role}" for expert in range(2) for role in ("gate_proj", "up_proj")
    }


@pytest.mark.peer
@pytest.mark.parametrize("recipe", ["int8", "rtn", "awq"])
@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen3_5"])
def test_transformers_runs_it_on_an_image(sources, tmp_path, kind, recipe):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForImageTextToText

    output = quantize(sources[kind], tmp_path / "out", recipe)
    theirs, info = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert type(theirs).__name__ == theirs.config.architectures[0]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = prompt(kind, theirs.config)
    assert int(inputs["input_ids"].max()) < VOCABULARY
    with torch.no_grad():
        got = theirs(**inputs, use_cache=False).logits
        ours = load_dense(open_source(str(output)))(**inputs, use_cache=False).logits
        blank = theirs(**inputs | {"pixel_values": 0 * inputs["pixel_values"]}, use_cache=False).logits
    assert (got - ours).norm() < 1e-4 * ours.norm()
    assert (got - blank).norm() > 1e-2 * ours.norm()


def test_embeddings_tied_by_the_wrapper_alone_stay_tied(tmp_path):
    """GOT-OCR's text configuration contradicts its wrapper's about tying. transformers ties, so the output does too."""
    source = save_tiny("got_ocr2", tmp_path / "source")
    output = quantize(source, tmp_path / "out", "int8")
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in open_checkpoint(output).entries
    assert load_dense(open_source(str(output))).get_output_embeddings().weight.device.type == "cpu"
