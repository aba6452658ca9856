"""Checkpoints stay the same bit for bit, except for intended changes.

Two stages, for floating-point sums differ between processors and versions of torch:

- Files of fixed codes and scales, in every format: integers and copies alone, the same on every machine.
- Whole runs of a tiny model, in a process of its own whose arithmetic is pinned to instructions that every x86-64
  processor has. runs.json holds what 2 cores of an EPYC gave. Its probe and versions say whether the numbers mean
  anything here: if not, the test is skipped, with the reason. One thread and two must agree on every machine.

A change that is meant: `PINNED python -m tests.golden.whole_runs > tests/golden/runs.json`, PINNED as below, and the
reason in the commit. Kernels on a GPU, larger shapes and other models are not covered.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.export.dialects import FORMATS
from lowbit.quant.numerics import coarse_scale
from lowbit.quant.packing import unpack_fp4
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, parse_scheme
from tests.golden.whole_runs import RUNS, digest

KEPT = Path(__file__).with_name("runs.json")
PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
}
N, K = 48, 128
FILES = {
    ("compressed-tensors", "int4-g32"): "a948dbcb021d9f38",
    ("compressed-tensors", "int4-channel"): "59a4df73f8cb2489",
    ("compressed-tensors", "uint4-g32"): "b7d7ba8b0168f5b8",
    ("compressed-tensors", "uint4-channel"): "c677e1d326bc3213",
    ("compressed-tensors", "int8-g32"): "553becc713121a48",
    ("compressed-tensors", "int8"): "fb224f706e86efc8",
    ("compressed-tensors", "int8-a8"): "bb420817313bce50",
    ("compressed-tensors", "fp8"): "a44ea2aa6d9399d0",
    ("compressed-tensors", "int3-g32"): "8832327c042f0a38",
    ("compressed-tensors", "fp8-static"): "9e048c60762c429a",
    ("compressed-tensors", "fp8-block"): "e98019ec29a50ce6",
    ("compressed-tensors", "nvfp4"): "39538c9377e3a54e",
    ("compressed-tensors", "nvfp4-a16"): "ed9d520f3308cef0",
    ("compressed-tensors", "mxfp4"): "929b986dbd30c17b",
    ("compressed-tensors", "mxfp8"): "d99cfa2503fa5cbc",
    ("gptq", "int2-g32"): "d3951b3e53af1c30",
    ("gptq", "int4-g32"): "2c2e534f47a85eda",
    ("gptq", "int4-channel"): "cb99a81ba5167ee8",
    ("gptq", "uint4-g32"): "3fb1b07f52f3b3b4",
    ("gptq", "uint4-channel"): "404c436a9d0877eb",
    ("gptq", "int8-g32"): "6afcb8777f663305",
    ("gptq", "int8"): "12e6485159dda6e5",
    ("gptq", "uint8-g32"): "856d8ea5b1b2aed0",
    ("gptq_v2", "int4-g32"): "42fd69252873d168",
    ("gptq_v2", "int4-channel"): "da6ca534460af683",
    ("gptq_v2", "uint4-g32"): "6bf53967a6b99ac5",
    ("gptq_v2", "uint4-channel"): "ecc7deb63614b0c3",
    ("gptq_v2", "int8-g32"): "81c97342ac752da6",
    ("gptq_v2", "int8"): "87891ab92795fabb",
    ("gptq_v2", "uint8-g32"): "16bb2f94e49b8289",
    ("gptq_v2", "int3-g32"): "58b917fa387a326a",
    ("fp8", "fp8-block"): "6679249385f0764d",
    ("modelopt", "nvfp4"): "31f427393e8a33a4",
    ("modelopt", "nvfp4-a16"): "f0c5267ff42fbfe8",
    ("awq", "uint4-g32"): "ad2338615e5eadf1",
    ("awq", "uint4-channel"): "a7220c1de54d1390",
}


def weight(scheme: Scheme, dtype: torch.dtype) -> QTensor:
    """A weight (N, K) of every code there is, its scales exact in every type."""
    number = scheme.number
    if number.is_integer:
        counted = (torch.arange(N * K).reshape(N, K) * 7 + torch.arange(N).unsqueeze(1)) % (1 << number.bits)
        codes = (counted - (0 if not number.signed else 1 << (number.bits - 1))).to(number.storage)
    elif number.coarse:
        codes = unpack_fp4(((torch.arange(N * K // 2).reshape(N, K // 2) * 7) % 256).to(torch.uint8))
    else:
        codes = (((torch.arange(N * K).reshape(N, K) * 7) % 31 - 15) / 4).to(number.storage)
    rows, groups = scheme.sides(N, K)
    scales = ((torch.arange(rows * groups).reshape(rows, groups) % 9 + 8) / 1024).to(dtype)
    if scheme.weights.scales is not None:
        scales = coarse_scale(scales, scheme.weights.scales)
    zeros = None if scheme.symmetric else (torch.arange(N * groups, dtype=torch.int32).reshape(N, groups) % 15) + 1
    divisor = torch.tensor(512.0) if scheme.weights.parent else None
    return QTensor(codes, scales, zeros, scheme, torch.tensor(0.0625) if scheme.static_inputs else None, divisor)


def file_digest(fmt: str, text: str) -> str:
    scheme, form = parse_scheme(text), FORMATS[fmt]
    tensors = form.write("m.0.up", weight(scheme, form.scale_dtype or torch.bfloat16))
    block = form.quantization_config({"m.0.up": scheme}, ["lm_head"])
    named = [part for key in sorted(tensors) for part in (f"{key} {tensors[key].dtype}", tensors[key])]
    return digest([*named, json.dumps(block)])


@pytest.mark.parametrize(("fmt", "text"), FILES, ids=" ".join)
def test_codes_and_scales_are_stored_as_ever(fmt: str, text: str) -> None:
    assert file_digest(fmt, text) == FILES[fmt, text]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The results of a pinned process. It fails if one thread and two threads give different results."""
    command = [sys.executable, "-m", "tests.golden.whole_runs"]
    done = subprocess.run(command, env=os.environ | PINNED, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("method", RUNS)
def test_a_run_writes_the_bytes_it_wrote(method: str, found: dict[str, Any]) -> None:
    kept = json.loads(KEPT.read_text())
    for key in ("torch", "transformers", "probe"):
        if found[key] != kept[key]:
            pytest.skip(f"the hashes are of {key} {kept[key]}, this is {found[key]}")
    assert found["runs"][method] == kept["runs"][method]
