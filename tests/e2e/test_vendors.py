"""Quantized models are originals too: they are dequantized and quantized again, evaluated and run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.builders import logits_of, save_family
from tests.e2e.cli import run_lowbit, run_quantize, run_quantize_convert, run_quantize_inspect
from tests.families.tiny import save_tiny

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
QUICK = ("--num-samples", 8, "--seqlen", 32, "--eval-windows", 0, "--iters", 4)
VENDORS = {"deepseek": ("fp8-block", "fp8"), "nvidia": ("nvfp4", "modelopt"), "redhat": ("fp8", "compressed-tensors")}
VENDORS |= {f"ours-{text}": (text, "compressed-tensors") for text in ("mxfp4-a16", "int4-g32", "int3-g64", "int8-a8")}
VENDORS |= {"autoawq": ("uint4-g32", "awq"), "gptqmodel": ("int4-g64", "gptq")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model of each vendor, in bfloat16."""
    home = tmp_path_factory.mktemp("vendors")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4}
    plain = save_family("llama", home / "plain", torch.bfloat16, **sizes)
    for name, (scheme, fmt) in VENDORS.items():
        args = ("--method", "rtn", "--scheme", scheme, "--format", fmt)
        assert run_quantize(plain, *args, *QUICK, "-o", home / name).code == 0
    return home


def changed(source: Path, copy: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "SHA256SUMS").unlink(missing_ok=True)
    return copy


@pytest.mark.parametrize("vendor", VENDORS)
def test_rounding_starts_from_what_the_weights_stand_for(models, tmp_path, vendor):
    done = run_quantize(models / vendor, "--method", "rtn", "--scheme", "int4-g32", *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    assert f"the model is quantized itself, as {VENDORS[vendor][0]} (14 linears)" in done.out
    before, after = (LogicalTensors(open_checkpoint(directory)) for directory in (models / vendor, tmp_path / "q"))
    assert set(after.schemes) == set(before.schemes)
    for name in after.schemes:
        wanted = round_to_nearest(before.qtensor(name).dequantize(), parse_scheme("int4-g32"), torch.bfloat16)
        assert torch.equal(after.qtensor(name).codes, wanted.codes)
        assert torch.equal(after.qtensor(name).scales, wanted.scales)
    dense = {name for name in before.names if name.removesuffix(".weight") not in before.schemes}
    assert dense == {name for name in after.names if name.removesuffix(".weight") not in after.schemes}
    assert all(torch.equal(before.read(name), after.read(name)) for name in dense)
    assert not any("scale_inv" in name or "scale_2" in name for name in after.checkpoint.entries)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_calibrated_method_follows_the_dequantized_model(models, tmp_path, method):
    args = ("--method", method, "--scheme", "int8", *QUICK)
    done = run_quantize(models / "deepseek", *args, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    found = next(open_backend("transformers", open_source(str(tmp_path / "q")), "cpu").logits([IDS]))
    wanted = next(open_backend("transformers", open_source(str(models / "deepseek")), "cpu").logits([IDS]))
    assert float((found - wanted).norm() / wanted.norm()) < 0.1


def test_its_sizes_are_those_of_the_dequantized_model(models):
    recipe = complete_recipe({"method": "rtn", "scheme": "int4-g32"})
    sizes = {
        name: prepare(open_source(str(models / name)), recipe, "cpu").output_bytes() for name in ("plain", *VENDORS)
    }
    assert len(set(sizes.values())) == 1


def test_scales_that_are_missing_are_refused(models, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    changed(models / "deepseek", tmp_path / "m", lambda tensors: tensors.pop(name))
    refused = run_quantize(tmp_path / "m", "--method", "rtn", *QUICK, "-o", tmp_path / "r").complaint
    assert "model.layers.0.mlp.up_proj.weight" in refused
    assert not (tmp_path / "r").exists()


def sorted_by_size(tensors: dict[str, Tensor]) -> None:
    """Rewrite a GPTQ file as act-order does: groups of inputs by size, not by place."""
    for name in [key.removesuffix(".g_idx") for key in tensors if key.endswith(".g_idx")]:
        order = torch.randperm(len(tensors[f"{name}.g_idx"]), generator=torch.Generator().manual_seed(5))
        tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"][order].contiguous()


def test_act_order_is_dequantized_by_the_group_of_each_input(models, tmp_path):
    """The formula of GPTQModel's own torch kernel: (code - zero) * scale, both of the input's group."""
    ordered = changed(models / "gptqmodel", tmp_path / "m", sorted_by_size)
    tensors, logical = load_file(ordered / "model.safetensors"), LogicalTensors(open_checkpoint(ordered))
    for name in logical.schemes:
        words, scales, g_idx = (tensors[f"{name}.{part}"] for part in ("qweight", "scales", "g_idx"))
        codes = (words.unsqueeze(1) >> torch.arange(0, 32, 4).view(1, -1, 1) & 15).flatten(0, 1)
        assert torch.equal(logical.exact(f"{name}.weight").T, (codes - 8) * scales.float()[g_idx.long()])
    again = run_quantize(ordered, "--method", "rtn", "--scheme", "int8", *QUICK, "-o", tmp_path / "q")
    assert again.code == 0, again.err
    after = LogicalTensors(open_checkpoint(tmp_path / "q"))
    name = "model.layers.1.mlp.down_proj"
    wanted = round_to_nearest(logical.exact(f"{name}.weight"), parse_scheme("int8"), torch.bfloat16)
    assert torch.equal(after.qtensor(name).codes, wanted.codes)
    told = run_lowbit("generate", ordered, "--prompt", "a", "--max-new-tokens", "2")
    assert told.code == 0
    assert "14 x int4-g64 in act-order has no kernel here: dequantized while loading" in told.err
    engine = next(open_backend("engine", open_source(str(ordered)), "cpu").logits([IDS]))
    blocks = next(open_backend("transformers", open_source(str(ordered)), "cpu").logits([IDS]))
    assert torch.allclose(engine, blocks, atol=1e-3)
    refused = run_quantize_convert(ordered, tmp_path / "c", "--format", "awq").complaint
    assert "model.layers.0.mlp.down_proj" in refused
    assert "act-order" in refused


def test_the_groups_of_inputs_of_compressed_tensors_are_followed(models, tmp_path):
    """Older files with actorder "group": the scale of an input is that of its group."""
    before = LogicalTensors(open_checkpoint(models / "ours-int4-g32"))
    groups = {}

    def regroup(tensors: dict[str, Tensor]) -> None:
        for name in before.schemes:
            k = before.shape(name)[1]
            order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
            groups[name] = tensors[f"{name}.weight_g_idx"] = (torch.arange(k, dtype=torch.int32) // 32)[order]

    ordered = changed(models / "ours-int4-g32", tmp_path / "m", regroup)
    config = json.loads((ordered / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    (ordered / "config.json").write_text(json.dumps(config))
    after = LogicalTensors(open_checkpoint(ordered))
    assert set(after.schemes) == set(before.schemes)
    for name, g_idx in groups.items():
        weight = before.qtensor(name)
        wanted = weight.codes.float() * weight.scales.float()[:, g_idx.long()]
        assert torch.equal(after.exact(f"{name}.weight"), wanted)
    blocks = next(open_backend("transformers", open_source(str(ordered)), "cpu").logits([IDS]))
    engine = next(open_backend("engine", open_source(str(ordered)), "cpu").logits([IDS]))
    assert torch.allclose(engine, blocks, atol=0.02)
    assert "act-order" in run_quantize_convert(ordered, tmp_path / "c", "--format", "gptq").complaint


def test_act_order_that_is_no_grouping_is_refused(models, tmp_path):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.g_idx"][0] = 1

    spoiled = changed(models / "gptqmodel", tmp_path / "m", spoil)
    refused = run_quantize(spoiled, "--method", "rtn", *QUICK, "-o", tmp_path / "r").complaint
    assert "model.layers.0.mlp.up_proj: g_idx [128] with values in [0, 1] does not divide 128 inputs into 2" in refused


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """gpt-oss in its own layout: experts in MXFP4, all of a layer together. All codes, and exponents 110 to 126."""
    home = tmp_path_factory.mktemp("gpt-oss")
    plain = save_tiny("gpt_oss", home / "plain")
    generator = torch.Generator().manual_seed(7)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [key for key in tensors if key.endswith("_proj") and ".experts." in key]:
            experts, k, n = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, n, k // 32, 16), generator=generator)
            tensors[f"{name}_blocks"] = blocks.to(torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(110, 127, blocks.shape[:3], generator=generator).to(torch.uint8)

    packed = changed(plain, home / "mxfp4", pack)
    config = json.loads((packed / "config.json").read_text())
    block = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return packed


def test_gpt_oss_computes_as_in_transformers(gpt_oss):
    theirs = AutoModelForCausalLM.from_pretrained(gpt_oss, dtype=torch.float32)
    found = next(open_backend("transformers", open_source(str(gpt_oss)), "cpu").logits([IDS]))
    wanted = logits_of(theirs, IDS)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_gpt_oss_is_quantized_from_its_experts_values(gpt_oss, tmp_path):
    done = run_quantize(gpt_oss, "--method", "rtn", "--scheme", "int8", *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    before, after = (LogicalTensors(open_checkpoint(directory)) for directory in (gpt_oss, tmp_path / "q"))
    assert set(before.schemes) < set(after.schemes)
    for name in before.schemes:
        wanted = round_to_nearest(before.qtensor(name).dequantize(), parse_scheme("int8"), torch.float32)
        assert torch.equal(after.qtensor(name).codes, wanted.codes)
    assert not any(name.endswith(("_blocks", "_scales")) for name in after.checkpoint.entries)
    seen = run_quantize_inspect(gpt_oss)
    assert seen.code == 0, seen.err
    assert "mxfp4-a16" in seen.out


def test_experts_of_gpt_oss_that_stay_are_stacked_again(gpt_oss, tmp_path):
    args = ("--method", "rtn", "--scheme", "int8", "--ignore", "re:\\.experts\\.")
    done = run_quantize(gpt_oss, *args, *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    before, after = (LogicalTensors(open_checkpoint(directory)) for directory in (gpt_oss, tmp_path / "q"))
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(after.checkpoint.read(stack).float(), before.exact(stack))


def test_gpt_oss_is_converted_to_the_bit(gpt_oss, tmp_path):
    done = run_quantize_convert(gpt_oss, tmp_path / "c", "--format", "modelopt", "--scheme", "nvfp4-a16")
    assert done.code == 0, done.err
    before, after = (LogicalTensors(open_checkpoint(directory)) for directory in (gpt_oss, tmp_path / "c"))
    assert set(after.schemes) == set(before.schemes)
    assert all(torch.equal(after.exact(f"{name}.weight"), before.qtensor(name).dequantize()) for name in after.schemes)
    wanted, found = (
        next(open_backend("transformers", open_source(str(path)), "cpu").logits([IDS]))
        for path in (gpt_oss, tmp_path / "c")
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors, name: tensors.pop(f"{name}_scales"), "no tensor"),
        (lambda tensors, name: tensors[f"{name}_scales"].fill_(255), "which e8m0 has for NaN"),
        (lambda tensors, name: tensors.update({f"{name}_scales": torch.ones(1, 2).byte()}), "must agree"),
    ],
)
def test_damaged_experts_of_gpt_oss_are_refused(gpt_oss, tmp_path, spoil, said):
    name = "model.layers.0.mlp.experts.down_proj"
    spoiled = changed(gpt_oss, tmp_path / "m", lambda tensors: spoil(tensors, name))
    refused = run_quantize(spoiled, "--method", "rtn", *QUICK, "-o", tmp_path / "r").complaint
    assert name.rpartition(".")[2] in refused
    assert said in refused
    assert not (tmp_path / "r").exists()
