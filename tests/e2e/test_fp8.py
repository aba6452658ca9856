"""`--scheme fp8` from the command to transformers: every method rounds to it, transformers loads what was meant."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from tests.builders import logits_of, save_family
from tests.e2e.cli import run_quantize, run_quantize_inspect

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
QUICK = ("--num-samples", 8, "--seqlen", 32, "--eval-windows", 0)
METHODS = ("fp8", "rtn", "gptq", "awq", "signround", "smoothquant")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("fp8") / "model")


@pytest.mark.peer
@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_what_was_meant(model, tmp_path, method):
    pytest.importorskip("compressed_tensors")
    args = () if method == "fp8" else ("--scheme", "fp8", "--iters", 4)
    done = run_quantize(model, "--method", method, *args, *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    logical = LogicalTensors(open_checkpoint(tmp_path / "q"))
    assert {str(scheme) for scheme in logical.schemes.values()} == {"fp8"}
    assert len(logical.schemes) == 14
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    found = logits_of(theirs, IDS)  # the first pass expands the weights
    for name in logical.schemes:
        assert torch.equal(theirs.get_submodule(name).weight, logical.qtensor(name).dequantize()), name
    [ours] = open_backend("transformers", open_source(str(tmp_path / "q")), "cpu").logits([IDS])
    torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-3)


def test_what_contradicts_the_scheme_is_refused(model, tmp_path):
    def complaint(*args: object) -> str:
        return run_quantize(model, *args, *QUICK, "-o", tmp_path / "q").complaint

    assert "scheme fp8 has bits 8, not 4" in complaint("--scheme", "fp8", "--bits", 4)
    assert "method int8 has weights of int8; for fp8-a16 use --method rtn" in complaint(
        "--method", "int8", "--scheme", "fp8"
    )
    assert "'fp9' is no scheme; did you mean 'fp8'?" in complaint("--scheme", "fp9")
    assert "GPTQ files hold only integer weights" in complaint("--scheme", "fp8", "--format", "gptq")


def test_inspect_says_what_engines_do_with_it(model, tmp_path):
    assert run_quantize(model, "--method", "fp8", *QUICK, "-o", tmp_path / "q").code == 0
    told = run_quantize_inspect(tmp_path / "q").out
    assert "fp8" in told
    assert "CUTLASS fp8" in told
