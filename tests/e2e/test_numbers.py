"""Every number type from the command to the library that owns the format: it loads what was meant."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from tests.builders import logits_of, save_family
from tests.e2e.cli import run_quantize

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
QUICK = ("--num-samples", 8, "--seqlen", 32, "--eval-windows", 0, "--iters", 4)
INTEGERS = [("rtn", "int3-g32"), ("signround", "int2-g32"), ("gptq", "int5-g32"), ("rtn", "int6-channel")]
INTEGERS += [("awq", "int7-g32")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("numbers") / "model")


@pytest.mark.peer
@pytest.mark.parametrize(("method", "scheme"), INTEGERS)
def test_transformers_loads_what_was_meant(model, tmp_path, method, scheme):
    pytest.importorskip("compressed_tensors")
    done = run_quantize(model, "--method", method, "--scheme", scheme, *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    logical = LogicalTensors(open_checkpoint(tmp_path / "q"))
    assert {str(found) for found in logical.schemes.values()} == {scheme}
    assert len(logical.schemes) == 14
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    found = logits_of(theirs, IDS)  # the first pass expands the weights
    for name in logical.schemes:
        assert torch.equal(theirs.get_submodule(name).weight.float(), logical.qtensor(name).dequantize()), name
    [ours] = open_backend("transformers", open_source(str(tmp_path / "q")), "cpu").logits([IDS])
    torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-3)


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
