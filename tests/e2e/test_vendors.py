"""Vendors' models in floats of few bits are originals: they are dequantized and quantized again."""

import pytest
import torch

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.builders import save_family
from tests.e2e.cli import run_quantize

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
QUICK = ("--num-samples", 8, "--seqlen", 32, "--eval-windows", 0, "--iters", 4)
VENDORS = {"deepseek": ("fp8-block", "fp8"), "nvidia": ("nvfp4", "modelopt"), "redhat": ("fp8", "compressed-tensors")}
VENDORS["ours"] = ("mxfp4-a16", "compressed-tensors")


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


def test_integers_are_no_original(models, tmp_path):
    done = run_quantize(models / "plain", "--method", "rtn", "--scheme", "int4-g32", *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    again = run_quantize(tmp_path / "q", "--method", "rtn", *QUICK, "-o", tmp_path / "r")
    assert "already quantized (compressed-tensors); quantize the original" in again.complaint


def test_scales_that_are_missing_are_refused(models, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "deepseek", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    (tmp_path / "m" / "SHA256SUMS").unlink()
    refused = run_quantize(tmp_path / "m", "--method", "rtn", *QUICK, "-o", tmp_path / "r").complaint
    assert "model.layers.0.mlp.up_proj.weight" in refused
    assert not (tmp_path / "r").exists()
