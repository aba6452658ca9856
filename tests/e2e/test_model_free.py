"""--model-free: the same tensors as with a model class, whatever the shards; memory does not grow with the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lowbit.calibrate import free
from lowbit.export.checkpoint import open_checkpoint, verify_checksums
from lowbit.export.formats import LogicalTensors
from tests.builders import changed_config, logits_of, save_family
from tests.e2e.cli import run_quantize

SCHEMES = ("fp8", "fp8-block", "int8", "int8-a8", "int4-g32", "uint4-g32", "int3-g32", "nvfp4-a16", "mxfp4", "mxfp8")
QUICK = ("--eval-windows", 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Tiny models; the llama's file is cut into three, between linears that share a parent."""
    made = {
        family: save_family(family, tmp_path_factory.mktemp(family) / "model", torch.bfloat16)
        for family in ("llama", "mixtral")
    }
    sharded(made["llama"])
    return made


def sharded(model: Path, count: int = 3) -> None:
    """Deal the tensors of `model` out to several files."""
    tensors = tensors_of(model)
    (model / "model.safetensors").unlink()
    where = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in where if where[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Assert that two files have the same tensors, to the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_tensors_are_those_that_a_model_class_gives(models, tmp_path, family, scheme, monkeypatch):
    monkeypatch.setitem(free.PIECE, "cpu", 64 * 64)  # several pieces of each weight
    monkeypatch.setattr(free, "ROWS", 32)
    flags = ["--method", "rtn", "--scheme", scheme, *QUICK]
    for name, more in (("with", ()), ("without", ("--model-free",))):
        done = run_quantize(models[family], *flags, *more, "-o", tmp_path / name)
        assert done.code == 0, done.err
    same(tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    blocks = [config["quantization_config"] for config in configs]
    assert blocks[0]["config_groups"] == blocks[1]["config_groups"]
    assert set(blocks[1]["ignore"]) <= set(blocks[0]["ignore"])  # transformers' own names for some are there too
    assert verify_checksums(open_checkpoint(tmp_path / "without")) == len(list(models[family].glob("*.safetensors")))
    reports = [json.loads((tmp_path / name / "quantization_report.json").read_text()) for name in ("with", "without")]
    for one, other in zip(reports[0]["blocks"], reports[1]["blocks"], strict=True):
        for linear, row in one["linears"].items():
            assert other["linears"][linear] == row | {"weight_error": pytest.approx(row["weight_error"], rel=1e-3)}


def test_a_type_that_nobody_knows_is_rewritten(models, tmp_path):
    """A model type without a class, with linears in a tower and in another predictor, a router and a state space."""
    strange = save_family("llama", tmp_path / "strange", torch.bfloat16)
    changed_config(strange, lambda config: config.update(model_type="unheard", architectures=["UnheardForCausalLM"]))
    tensors = tensors_of(strange)
    extra = (
        "visual.blocks.0.attn.qkv",
        "mtp.layers.0.mlp.up_proj",
        "model.layers.0.mlp.gate",
        "model.layers.0.ssm.conv1d",
    )
    tensors |= {f"{name}.weight": torch.randn(64, 64).bfloat16() for name in extra}
    tensors["model.layers.0.m.A_log"] = torch.randn(64, 16)
    save_file(tensors, strange / "model.safetensors")
    done = run_quantize(strange, "--model-free", "--method", "fp8", "--head", "int8", "-o", tmp_path / "q")
    assert done.code == 0, done.err
    found, logical = tensors_of(tmp_path / "q"), LogicalTensors(open_checkpoint(tmp_path / "q"))
    assert len(logical.schemes) == 15
    assert str(logical.schemes["lm_head"]) == "int8"
    kept = {
        name: value
        for name, value in tensors.items()
        if name in found and name.removesuffix(".weight") not in logical.schemes
    }
    assert {f"{name}.weight" for name in extra} < kept.keys()
    same(kept, {name: found[name] for name in kept})
    ignored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(extra) <= set(ignored)


@pytest.mark.parametrize("head", ["int8", "nvfp4-a16"])
def test_a_tied_head_is_untied_as_with_a_class(tmp_path, head):
    tied = save_family("llama", tmp_path / "tied", torch.bfloat16, tie_word_embeddings=True)
    flags = ["--method", "rtn", *QUICK, "--scheme", "int4-g32", "--head", head]
    for name, more in (("with", ()), ("without", ("--model-free",))):
        done = run_quantize(tied, *flags, *more, "-o", tmp_path / name)
        assert done.code == 0, done.err
    same(tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    assert [config["tie_word_embeddings"] for config in configs] == [False, False]
    assert configs[0]["quantization_config"]["config_groups"] == configs[1]["quantization_config"]["config_groups"]
    changed_config(tied, lambda config: config.update(tie_word_embeddings=False))
    refused = run_quantize(tied, *flags, "--model-free", "-o", tmp_path / "r").complaint
    assert "tie_word_embeddings" in refused


def test_block_fp8_of_a_vendor_becomes_nvfp4_without_a_class(models, tmp_path):
    flags = ["--method", "rtn", *QUICK]
    assert run_quantize(models["llama"], *flags, "--scheme", "fp8", "-o", tmp_path / "fp8").code == 0
    for name, more in (("with", ()), ("without", ("--model-free",))):
        done = run_quantize(tmp_path / "fp8", *flags, *more, "--scheme", "nvfp4-a16", "-o", tmp_path / name)
        assert done.code == 0, done.err
    same(tensors_of(tmp_path / "with"), tensors_of(tmp_path / "without"))


@pytest.mark.peer
def test_transformers_loads_it(models, tmp_path):
    pytest.importorskip("compressed_tensors")
    done = run_quantize(
        models["llama"], "--model-free", "--method", "rtn", "--scheme", "int4-g32", "-o", tmp_path / "q"
    )
    assert done.code == 0, done.err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    logits_of(theirs, torch.arange(8)[None])
    logical = LogicalTensors(open_checkpoint(tmp_path / "q"))
    for name in logical.schemes:
        assert torch.equal(theirs.get_submodule(name).weight, logical.qtensor(name).dequantize()), name


def test_what_needs_data_or_a_class_is_refused(models, tmp_path):
    def complaint(*args: object, model: Path = models["llama"]) -> str:
        done = run_quantize(model, "--model-free", *args, "-o", tmp_path / "q")
        assert not (tmp_path / "q").exists()
        return done.complaint

    assert "needs data" in complaint("--method", "awq")
    assert "needs data" in complaint("--method", "rtn", "--scheme", "nvfp4")
    assert "leave out --dtype" in complaint("--method", "fp8", "--dtype", "float16")
    assert "not row by row" in complaint("--method", "rtn", "--format", "gptq")
    assert "ignore: 'nothing' matches no linear" in complaint("--method", "fp8", "--ignore", "nothing")
    broken = save_family("llama", tmp_path / "broken", torch.bfloat16)
    tensors = tensors_of(broken)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    assert "1 of" in complaint("--method", "fp8", model=broken)
    stacked = save_family("llama", tmp_path / "stacked", torch.bfloat16)
    tensors = tensors_of(stacked) | {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(8, 64, 128).bfloat16()}
    save_file(tensors, stacked / "model.safetensors")
    assert "experts in one tensor" in complaint("--method", "fp8", model=stacked)


MEMORY = """
import resource, sys, torch
from safetensors.torch import save_file
import lowbit
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lowbit.quantize(sys.argv[1], sys.argv[2], method="rtn", scheme="int4-g128", model_free=True, device="cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_a_few_pieces_and_not_the_model(tmp_path):
    """Four weights of 64 MiB: less than two of them more than the libraries take."""
    big = save_family("llama", tmp_path / "big", torch.bfloat16)
    wide = torch.full((4096, 8192), 0.02, dtype=torch.bfloat16)
    names = [f"model.layers.{i}.mlp.{role}_proj.weight" for i in range(2) for role in ("gate", "up")]
    save_file(tensors_of(big) | {name: wide * (i + 1) for i, name in enumerate(names)}, big / "model.safetensors")
    del wide
    command = [sys.executable, "-c", MEMORY, str(big), str(tmp_path / "q")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < 128


def test_what_is_no_matrix_of_numbers_is_copied_and_declared(models, tmp_path):
    """Integers may be codes of an undeclared layout: to round them would be wrong in silence."""
    home, up = "model.layers.0.mlp", torch.linspace(-1, 1, 64 * 64).view(64, 64)
    tensors = {
        f"{home}.up_proj.weight": up.to(torch.float8_e4m3fn),
        f"{home}.down_proj.weight": torch.arange(64 * 64, dtype=torch.int64).view(64, 64).to(torch.int8),
        f"{home}.gate_proj.weight": up > 0,
        f"{home}.empty.weight": torch.ones(64, 0),
    }
    source, output = tmp_path / "model", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "unheard_of"}')
    save_file(tensors, source / "model.safetensors")
    arguments = ("--model-free", "--method", "rtn", "--scheme", "int8-g32", "--output", output)
    assert "only 33.3% of the linear parameters" in run_quantize(source, *arguments).complaint
    left = f"{home}.down_proj,{home}.gate_proj"
    assert run_quantize(source, *arguments, "--ignore", left).code == 0
    logical = LogicalTensors(open_checkpoint(output))
    assert list(logical.schemes) == [f"{home}.up_proj"]
    assert torch.allclose(logical.exact(f"{home}.up_proj.weight"), up, atol=0.07)
    same({name: logical.read(name) for name in list(tensors)[1:]}, dict(list(tensors.items())[1:]))
    ignored = logical.checkpoint.quantization["ignore"]
    assert {f"{home}.down_proj", f"{home}.gate_proj", f"{home}.empty"} <= set(ignored)
