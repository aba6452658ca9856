"""quantize --format, quantize-convert and quantize-inspect on tiny models, from command to files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.export.checkpoint import open_checkpoint, verify_checksums
from lowbit.export.engines.table import ENGINES
from lowbit.export.formats import LogicalTensors
from tests.builders import changed_config, save_family
from tests.e2e.cli import names, run_quantize, run_quantize_convert, run_quantize_inspect

RTN = ["--method", "rtn", "--group-size", 32, "--eval-windows", 0]
FLAGS = {"compressed-tensors": [], "gptq": [], "gptq_v2": ["--asym"], "awq": ["--asym"]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_family("llama", tmp_path_factory.mktemp("source") / "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoints(llama, tmp_path_factory) -> dict[str, Path]:
    """The model quantized into every format, with one unquantized linear."""
    root, made = tmp_path_factory.mktemp("quantized"), {}
    for fmt, flags in FLAGS.items():
        done = run_quantize(
            llama, *RTN, *flags, "--format", fmt, "--ignore", "lm_head,1.mlp.down_proj", "-o", root / fmt
        )
        assert done.code == 0, done.err
        made[fmt] = root / fmt
    return made


def logical(directory: Path) -> LogicalTensors:
    return LogicalTensors(open_checkpoint(directory))


@pytest.mark.parametrize("fmt", FLAGS)
def test_quantize_writes_every_format(checkpoints, fmt):
    read = logical(checkpoints[fmt])
    assert read.format.name == fmt
    assert len(read.schemes) == 13
    assert "model.layers.1.mlp.down_proj" not in read.schemes
    weight = read.qtensor("model.layers.0.mlp.up_proj")
    assert weight.scales.dtype == (torch.bfloat16 if fmt == "compressed-tensors" else torch.float16)
    assert read.read("model.norm.weight").dtype == torch.bfloat16
    assert f"\n- {fmt}\n" in (checkpoints[fmt] / "README.md").read_text()
    assert ("quantize_config.json" in names(checkpoints[fmt])) == fmt.startswith("gptq")


def test_the_same_codes_whatever_the_format(llama, checkpoints):
    """bfloat16 scales differ from float16 ones by rounding; float16 formats agree to the bit."""
    ours, theirs = logical(checkpoints["gptq_v2"]), logical(checkpoints["awq"])
    for name in ours.schemes:
        assert torch.equal(ours.qtensor(name).dequantize(), theirs.qtensor(name).dequantize())


@pytest.mark.parametrize(
    ("before", "after"), [("gptq", "compressed-tensors"), ("compressed-tensors", "awq"), ("awq", "gptq_v2")]
)
def test_convert_keeps_weights_and_company(checkpoints, tmp_path, before, after):
    done = run_quantize_convert(checkpoints[before], tmp_path / "out", "--format", after)
    assert done.code == 0, done.err
    assert "13 linears have bit-identical weights" in done.out
    source, result = logical(checkpoints[before]), logical(tmp_path / "out")
    assert result.format.name == after
    for name in source.schemes:
        assert torch.equal(source.qtensor(name).dequantize(), result.qtensor(name).dequantize())
    assert verify_checksums(result.checkpoint) == 1
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= set(names(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Converted from `{before}` to `{after}`" in card
    config = json.dumps(result.checkpoint.quantization)
    assert "layers.1.mlp.down_proj" in config.replace("\\", "")


AUTOROUND = {  # AutoRound 0.16's form for GPTQ files, without checkpoint_format
    "autoround_version": "0.16.1",
    "bits": 4,
    "damp_percent": 0.01,
    "data_type": "int",
    "desc_act": False,
    "group_size": 32,
    "iters": 20,
    "lm_head": False,
    "provider": "auto-round",
    "quant_method": "gptq",
    "sym": True,
    "true_sequential": False,
}


def as_autoround_packs(w: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPTQ's tensors for a weight (n, k) in AutoRound's arithmetic: the largest weight of 32 is -8 times its scale."""
    n, k = w.shape
    groups = w.reshape(n, k // 32, 32)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = (-extreme / 8).half()
    codes = (groups / scales.float()).round().clamp(-8, 7).reshape(n, k).long() + 8
    words = (codes.T.reshape(k // 8, 8, n) << (4 * torch.arange(8))[:, None]).sum(1)
    return {
        "qweight": torch.where(words >= 1 << 31, words - (1 << 32), words).int(),
        "qzeros": torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32),
        "scales": scales[..., 0].T.contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32) // 32,
    }


def test_what_autoround_writes_is_read_and_converts_there_and_back_to_the_bit(tmp_path):
    source = save_family("llama", tmp_path / "in", torch.float16)
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if "_proj" in key]:
        packed = as_autoround_packs(tensors.pop(key).float())
        tensors |= {key.replace("weight", suffix): tensor for suffix, tensor in packed.items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    changed_config(source, lambda config: config.update(quantization_config=AUTOROUND))
    assert run_quantize_inspect(source, "--check").code == 0
    read = logical(source)
    assert {str(scheme) for scheme in read.schemes.values()} == {"int4-g32"}
    weight = read.qtensor("model.layers.0.mlp.up_proj")
    assert 0.3 < (weight.scales < 0).float().mean() < 0.7
    assert weight.codes.min() == -8
    for before, fmt in (("in", "compressed-tensors"), ("compressed-tensors", "awq"), ("awq", "gptq")):
        assert run_quantize_convert(tmp_path / before, tmp_path / fmt, "--format", fmt).code == 0
    back = load_file(tmp_path / "gptq" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_convert_says_why_not_and_leaves_nothing(checkpoints, llama, tmp_path):
    output = tmp_path / "out"
    assert "not quantized" in run_quantize_convert(llama, output, "--format", "gptq").complaint
    assert "did you mean 'gptq'" in run_quantize_convert(llama, output, "--format", "gpt").complaint
    asym = run_quantize(
        llama, "--method", "rtn", "--bits", 8, "--group-size", 32, "--eval-windows", 0, "-o", tmp_path / "w8"
    )
    assert asym.code == 0, asym.err
    complaint = run_quantize_convert(tmp_path / "w8", output, "--format", "awq").complaint
    assert "only 4-bit weights" in complaint
    assert (
        "the original model is there"
        in run_quantize_convert(checkpoints["gptq"], checkpoints["gptq"], "--format", "awq", "--overwrite").complaint
    )
    assert names(tmp_path) == ["w8"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--format", "awq"], "engines ignore zero_point: false; use --asym"),
        (["--format", "awq", "--asym", "--bits", 8], "only 4-bit weights"),
        (["--format", "gptq", "--asym"], "gptq_v2"),
    ],
)
def test_quantize_says_why_not_before_it_starts(llama, tmp_path, flags, reason):
    assert reason in run_quantize(llama, *RTN, *flags, "-o", tmp_path / "out").complaint
    assert names(tmp_path) == []


def test_quantize_names_the_group_size_that_suits_a_format_of_one_scheme(tmp_path):
    model = save_family("llama", tmp_path / "llama", intermediate_size=128)
    done = run_quantize(model, "--method", "rtn", "--group-size", 128, "--format", "gptq", "-o", tmp_path / "out")
    assert "holds one scheme, and these linears have 2" in done.complaint
    assert "--group-size 64 may suit all" in done.complaint


@pytest.mark.parametrize("fmt", FLAGS)
def test_inspect_in_json(checkpoints, fmt):
    done = run_quantize_inspect(checkpoints[fmt], "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["format"] == fmt
    assert len(found["linears"]) == 13
    up = found["linears"]["model.layers.0.mlp.up_proj"]
    assert up["shape"] == [96, 64]
    assert up["scheme"] == ("int4-g32" if fmt in ("compressed-tensors", "gptq") else "uint4-g32")
    assert 4.5 <= up["bits_per_weight"] < 5.2
    assert found["left"]["model.layers.1.mlp.down_proj"] == 64 * 96
    assert 0 < found["coverage"] < 1
    assert found["split_fused_sets"] == {}
    assert found["engines"] == {engine.name: engine.version for engine in ENGINES.values()}
    assert found["tensor_parallel"]["1"] == "yes"
    assert "96 inputs in parts of 48" in found["tensor_parallel"]["2"]
    hopper = found["kernels"]["Hopper, sm_90"]
    assert sum(hopper["lowbit"].values()) == 7
    if fmt == "gptq_v2":
        assert hopper["vLLM"] == {"none": 7}
        assert any("only symmetric GPTQ files" in reason for reason in found["refusals"]["CPU"]["vLLM"])
    else:
        assert hopper["vLLM"] == {"Marlin": 7}


def test_inspect_for_people(checkpoints):
    done = run_quantize_inspect(checkpoints["awq"], "--check")
    assert done.code == 0, done.err
    assert "model.layers.*.mlp.up_proj" in done.out
    assert "fused sets (q, k and v; gate and up; experts): one scheme each" in done.out
    assert "vLLM 0.32: runs" in done.out
    assert "read: 13 weights, 1 files with known checksums" in done.out


def test_inspect_sees_a_split_set_and_a_spoiled_weight(checkpoints, tmp_path, llama):
    assert "not quantized" in run_quantize_inspect(llama).complaint
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoints["compressed-tensors"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = open_checkpoint(broken)
    entry = tensors.entries["model.layers.0.mlp.up_proj.weight_scale"]
    raw = bytearray(entry.path.read_bytes())
    raw[entry.offset : entry.offset + entry.nbytes] = bytes(entry.nbytes)
    entry.path.write_bytes(raw)
    assert run_quantize_inspect(broken).code == 0
    assert "up_proj: a int4-g32 weight" in run_quantize_inspect(broken, "--check").complaint

    def apart(config):
        groups = config["quantization_config"]["config_groups"]
        other = json.loads(json.dumps(groups["group_0"]))
        other["targets"], other["weights"]["num_bits"] = ["model.layers.0.self_attn.q_proj"], 8
        groups["group_1"] = other

    changed_config(broken, apart)
    found = run_quantize_inspect(broken)
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj: engines run" in found.out
