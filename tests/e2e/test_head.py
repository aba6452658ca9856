"""`--head` and `--embeddings`: rounded, named in the configuration, untied where they were tied, and read by all."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.calibrate.vocabulary import rounded, row_of
from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from lowbit.quant.stats import stats_of
from tests.builders import logits_of, save_family
from tests.e2e.cli import run_lowbit, run_quantize, run_quantize_inspect

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
QUICK = ("--num-samples", 8, "--seqlen", 32, "--eval-windows", 0, "--iters", 4)


def quantized(tmp_path, head: str, scheme: str = "int4-g32", method: str = "rtn", **changes: object):
    """A tiny model and its checkpoint with a rounded head."""
    model = save_family("llama", tmp_path / "model", **changes)
    done = run_quantize(model, "--method", method, "--scheme", scheme, "--head", head, *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    return model, tmp_path / "q"


@pytest.mark.peer
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("scheme", "head", "method"),
    [("int4-g32", "int8", "rtn"), ("int4-g32", "fp8", "gptq"), ("int8", "int8", "rtn"), ("fp8", "int4-g32", "rtn")],
)
def test_every_reader_takes_the_head(tmp_path, scheme, head, method, tied):
    pytest.importorskip("compressed_tensors")
    model, out = quantized(tmp_path, head, scheme, method, tie_word_embeddings=tied)
    source = open_source(str(out))
    logical = LogicalTensors(source.checkpoint)
    assert logical.schemes["lm_head"] == parse_scheme(head)
    assert len(logical.schemes) == 15
    embeddings = LogicalTensors(open_checkpoint(model)).read("model.embed_tokens.weight")
    assert torch.equal(logical.read("model.embed_tokens.weight"), embeddings)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" not in config["quantization_config"]["ignore"]
    groups = config["quantization_config"]["config_groups"].values()
    assert [group["weights"]["num_bits"] for group in groups if "re:.*lm_head$" in group["targets"]] == [
        parse_scheme(head).bits
    ]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    found = logits_of(theirs, IDS)
    assert torch.equal(theirs.lm_head.weight, logical.qtensor("lm_head").dequantize())
    for backend in ("transformers", "blocks", "engine"):
        ours = torch.cat(list(open_backend(backend, source, "cpu").logits([IDS])))
        assert float((ours - found).norm() / found.norm()) < 0.03, backend
    told = run_quantize_inspect(out).out
    assert "lm_head" in told


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [None, "int8", "int4-g32"])
def test_the_embeddings_are_rounded_and_untied(tmp_path, head, tied):
    model = save_family("llama", tmp_path / "model", tie_word_embeddings=tied)
    args = ("--method", "rtn", "--scheme", "int4-g32", "--embeddings", "int8", *(("--head", head) if head else ()))
    done = run_quantize(model, *args, *QUICK, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    assert "model.embed_tokens: int8, 260 x 64" in done.out
    assert ("head and embeddings are one tensor in the model and two in the checkpoint" in done.out) == tied
    logical = LogicalTensors(open_checkpoint(tmp_path / "q"))
    before = LogicalTensors(open_checkpoint(model))
    names = {"model.embed_tokens": "int8"} | ({"lm_head": head} if head else {})
    for name, scheme in names.items():
        plain = before.exact("model.embed_tokens.weight" if tied else f"{name}.weight")
        wanted = round_to_nearest(plain, parse_scheme(scheme), torch.float32)
        assert torch.equal(logical.qtensor(name).codes, wanted.codes)
    if not head:
        assert torch.equal(
            logical.read("lm_head.weight"), before.read(f"{'model.embed_tokens' if tied else 'lm_head'}.weight")
        )
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    targets = [
        target for group in config["quantization_config"]["config_groups"].values() for target in group["targets"]
    ]
    assert "re:.*embed_tokens$" in targets
    assert "transformers 5.23 does not load quantized embeddings" in done.out
    source = open_source(str(tmp_path / "q"))
    found = torch.cat(list(open_backend("transformers", source, "cpu").logits([IDS])))
    for backend in ("blocks", "engine"):
        ours = torch.cat(list(open_backend(backend, source, "cpu").logits([IDS])))
        assert float((ours - found).norm() / found.norm()) < 1e-4, backend
    told = run_lowbit("generate", tmp_path / "q", "--prompt", "a", "--max-new-tokens", "2")
    assert "1 x int8 in a lookup has no kernel here: dequantized while loading" in told.err
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    assert set(report["vocabulary"]) == set(names)


def test_the_head_is_rounded_by_what_it_sees():
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(100, 64, generator=generator)
    x = torch.randn(2000, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    stats, scheme = stats_of(x, with_gram=True), parse_scheme("int4-g32")
    ways = [rounded(w, scheme, torch.float32), rounded(w, scheme, torch.float32, stats)]
    ways.append(rounded(w, scheme, torch.float32, stats, compensate=True))
    errors = [row_of(each, w, stats)["output_error"] for each in ways]
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0]
    assert ways[2].scheme == scheme


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_a_calibrated_method_reports_the_heads_error(tmp_path, method):
    _, out = quantized(tmp_path, "int4-g32", method=method)
    report = json.loads((out / "quantization_report.json").read_text())
    row = report["vocabulary"]["lm_head"]
    assert row["tokens"] == 256
    assert 0 < row["output_error"] < 0.02


def test_the_report_and_the_recipe_say_it(tmp_path):
    _, out = quantized(tmp_path, "int8")
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["head"] == "int8"
    assert "lm_head" not in report["left"]
    assert 'head = "int8"' in (out / "recipe.toml").read_text()
    again = run_quantize(tmp_path / "model", "--recipe", out / "recipe.toml", "--eval-windows", 0, "-o", tmp_path / "r")
    assert again.code == 0, again.err
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "r" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--head", "int8", "--format", "gptq"),
            "format gptq holds no quantized head; --format compressed-tensors does",
        ),
        (("--head", "fp8-static"), "head: fp8-static has calibrated inputs"),
        (("--embeddings", "fp8"), "embeddings: fp8 is no table that engines look tokens up in; take int8, int4-g64"),
        (("--embeddings", "uint4-g32"), "embeddings: uint4-g32 is no table"),
        (("--embeddings", "int8", "--format", "gptq"), "format gptq holds no quantized embeddings"),
        (("--head", "int9"), "'int9' is no scheme; did you mean"),
        (("--head", "uint8-g32"), "format compressed-tensors cannot hold lm_head as uint8-g32"),
        (("--head", "nvfp4-a16", "--format", "modelopt", "--scheme", "nvfp4-a16"), "modelopt holds no quantized head"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, args, message):
    model = save_family("llama", tmp_path / "model")
    assert message in run_quantize(model, "--method", "rtn", *args, *QUICK, "-o", tmp_path / "q").complaint
    assert not (tmp_path / "q").exists()
