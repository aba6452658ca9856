"""Every number type from the command to the library that owns the format: it loads what was meant."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.numerics import input_rounding
from tests.builders import logits_of, save_family
from tests.e2e.cli import run_quantize, run_quantize_inspect

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
QUICK = ("--num-samples", 8, "--seqlen", 32, "--eval-windows", 0, "--iters", 4)
INTEGERS = [("rtn", "int3-g32"), ("signround", "int2-g32"), ("gptq", "int5-g32"), ("rtn", "int6-channel")]
INTEGERS += [("awq", "int7-g32")]
FLOATS = [("rtn", "fp8-block"), ("gptq", "fp8-static"), ("rtn", "fp8-a16"), ("signround", "nvfp4-a16")]
FLOATS += [("gptq", "nvfp4"), ("awq", "mxfp4-a16"), ("rtn", "mxfp4"), ("best", "mxfp8"), ("rtn", "nvfp4-a16")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4}
    return save_family("llama", tmp_path_factory.mktemp("numbers") / "model", **sizes)


@pytest.mark.peer
@pytest.mark.parametrize(("method", "scheme"), [*INTEGERS, *FLOATS])
def test_transformers_loads_what_was_meant(model, tmp_path, method, scheme):
    pytest.importorskip("compressed_tensors")
    done = run_quantize(model, "--method", method, "--scheme", scheme, *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    logical = LogicalTensors(open_checkpoint(tmp_path / "q"))
    assert {str(found) for found in logical.schemes.values()} == {scheme}
    assert len(logical.schemes) == 14
    narrow = logical.schemes["model.layers.0.mlp.up_proj"].weights.scales is not None  # it expands those to bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16 if narrow else torch.float32)
    logits_of(theirs, IDS)  # the first pass expands the weights
    torch.nn.Module.float(theirs)
    for name in logical.schemes:
        module, weight = theirs.get_submodule(name), logical.qtensor(name)
        assert torch.equal(module.weight, weight.dequantize()), name
        x = torch.randn(5, weight.shape[1]) * torch.exp(torch.randn(5, weight.shape[1]))
        inputs = weight.scheme.inputs
        rounded = x if inputs is None else input_rounding(inputs, weight.input_scale)(x)
        torch.testing.assert_close(module(x), rounded @ weight.dequantize().T, rtol=1e-5, atol=1e-4)
    [ours] = open_backend("transformers", open_source(str(tmp_path / "q")), "cpu").logits([IDS])
    if not narrow:
        torch.testing.assert_close(logits_of(theirs, IDS), ours, rtol=1e-3, atol=1e-3)
    elif weight.scheme.inputs is None:  # norms and embeddings were rounded to bfloat16 on the way
        torch.testing.assert_close(logits_of(theirs, IDS), ours, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--scheme", "uint3-g32"), "asymmetric 3-bit weights have no kernel"),
        (("--scheme", "int5-g32", "--format", "gptq"), "GPTQ files hold 2, 3, 4, 8 bits, not 5"),
        (("--scheme", "int3-g32", "--format", "gptq"), "zeros of 3 bits; use --format gptq_v2"),
        (("--scheme", "int9-g32"), "no scheme; did you mean"),
    ],
)
def test_what_no_file_holds_is_refused(model, tmp_path, args, message):
    assert message in run_quantize(model, "--method", "rtn", *args, *QUICK, "-o", tmp_path / "q").complaint


@pytest.mark.peer
def test_transformers_loads_block_fp8_as_deepseek_writes_it(model, tmp_path):
    done = run_quantize(
        model, "--method", "rtn", "--scheme", "fp8-block", "--format", "fp8", *QUICK, "-o", tmp_path / "q"
    )
    assert done.code == 0, done.err
    logical = LogicalTensors(open_checkpoint(tmp_path / "q"))
    assert logical.format is FORMATS["fp8"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    for name in logical.schemes:
        torch.testing.assert_close(theirs.get_submodule(name).weight, logical.qtensor(name).dequantize())


@pytest.mark.parametrize(
    ("scheme", "fmt"),
    [("int3-g32", "gptq_v2"), ("nvfp4", "modelopt"), ("fp8-block", "fp8"), ("mxfp4", "compressed-tensors")],
)
def test_the_engine_computes_what_was_meant(model, tmp_path, scheme, fmt):
    done = run_quantize(model, "--method", "rtn", "--scheme", scheme, "--format", fmt, *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    source = open_source(str(tmp_path / "q"))
    dense, ours = (next(open_backend(name, source, "cpu").logits([IDS])) for name in ("transformers", "engine"))
    if LogicalTensors(source.checkpoint).schemes["model.layers.0.mlp.up_proj"].inputs is None:
        torch.testing.assert_close(ours, dense, rtol=1e-3, atol=1e-3)
    else:  # an input halfway between two codes may go to either
        assert float((ours - dense).norm() / dense.norm()) < 0.2
    told = run_quantize_inspect(tmp_path / "q").out
    assert scheme in told


def test_what_engines_fuse_shares_its_divisor(model, tmp_path):
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        assert run_quantize(model, "--method", method, "--scheme", "nvfp4-a16", *QUICK, "-o", out).code == 0
        logical = LogicalTensors(open_checkpoint(out))
        found = {name: float(logical.qtensor(name).divisor) for name in logical.schemes}
        for layer in ("model.layers.0", "model.layers.1"):
            assert len({found[f"{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
            assert len({found[f"{layer}.mlp.{part}_proj"] for part in ("gate", "up")}) == 1


def test_inspect_warns_of_fused_linears_with_different_global_scales(model, tmp_path):
    out = tmp_path / "q"
    assert run_quantize(model, "--method", "rtn", "--scheme", "nvfp4-a16", *QUICK, "-o", out).code == 0
    assert "global scale" not in run_quantize_inspect(out).out
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight_global_scale"] *= 2
    tensors["model.layers.1.mlp.down_proj.weight_global_scale"] *= 2  # fused with no other
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "SHA256SUMS").unlink()
    told = " ".join(run_quantize_inspect(out).out.split())
    assert "self_attn.q_proj+k_proj+v_proj: vLLM takes the largest global scale for" in told
    assert told.count("decodes the others wrongly") == 1


def test_what_does_not_divide_falls_back_or_is_left_and_said(tmp_path):
    small = save_family("llama", tmp_path / "model", intermediate_size=72)
    done = run_quantize(small, "--method", "rtn", "--scheme", "fp8-block", *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    assert {str(scheme) for scheme in LogicalTensors(open_checkpoint(tmp_path / "q")).schemes.values()} == {"fp8"}
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    row = report["blocks"][0]["linears"]["model.layers.0.mlp.down_proj"]
    assert "fp8-block-a16 does not fit: 72 inputs do not divide into groups of 128" in row["fallback"]
    told = run_quantize(small, "--method", "rtn", "--scheme", "mxfp8", *QUICK, "-o", tmp_path / "r").complaint
    assert "no mxfp8: 72 inputs do not divide into groups of 32" in told
    assert not (tmp_path / "r").exists()
