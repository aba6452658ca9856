"""Budgets: the target is met, fused sets stay whole, more budget costs less, the saved recipe reproduces it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.calibrate.budget import average_bits, spend
from lowbit.calibrate.job import Job, prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.mixtures import MIXTURES
from lowbit.calibrate.plan import scheme_pattern
from lowbit.errors import CheckpointError, RecipeError
from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.naming import fused_set, split_sets
from lowbit.quant.scheme import parse_scheme
from tests.builders import calibration, logits_of, save_family
from tests.e2e.cli import run_quantize

TOKENS = calibration(4, 24)
QUICK = ("--num-samples", 4, "--seqlen", 24, "--eval-windows", 0)
FLOATS = "nvfp4-a16,mxfp4-a16,int4-g32,fp8-a16,16bit"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    return {
        family: save_family(family, tmp_path_factory.mktemp(family) / "model", torch.bfloat16)
        for family in ("llama", "mixtral")
    }


def job_of(source: Path, **values: object) -> Job:
    return prepare(open_source(str(source)), complete_recipe({"method": "rtn", "group_size": 32} | values), "cpu")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_average_is_kept_and_sets_stay_whole(sources, family):
    averages, losses = [], []
    for target in (4.6, 5.5, 7.0, 12.0):
        job = spend(job_of(sources[family], target_bits=target), TOKENS)
        averages.append(average_bits(job))
        losses.append(job.mixture.divergence)
        assert averages[-1] == pytest.approx(job.mixture.reached)
        assert averages[-1] <= target
        assert split_sets(job.plan.schemes, job.plan.schemes) == {}
        assert job.plan.named == job.plan.schemes.keys() | job.plan.unrounded
        kinds = {str(scheme) for scheme in job.plan.schemes.values()}
        assert "int8" in kinds or target < 5
        assert len(kinds) > 1 or job.plan.unrounded
    assert job.plan.unrounded
    assert averages == sorted(averages)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("head", [None, "int8"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_size_is_kept_to_the_byte(sources, tmp_path, family, head):
    """The bytes that the plan tells are those of the files, and the budget is not exceeded."""
    whole = open_checkpoint(sources[family]).nbytes
    flags = ["--method", "rtn", "--scheme", "int4-g32", "--candidates", FLOATS, *QUICK]
    flags += ["--head", head] if head else []
    done = run_quantize(sources[family], *flags, "--target-size", int(whole * 0.55), "-o", tmp_path / "q")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    written = open_checkpoint(tmp_path / "q").nbytes
    assert report["mixture"]["reached"] == written
    assert report["mixture"]["least"] < written <= int(whole * 0.55)
    assert f"{written} bytes" in done.out.replace("e+06", "") or f"{written:.6g} bytes" in done.out


def test_milliseconds_are_those_of_the_kernels_that_run(sources):
    """Numbers without a kernel take as long as 16 bits, so that 16 bits are chosen instead of them."""
    candidates = ("int4-g32", "int8", "nvfp4-a16", "16bit")
    free = spend(job_of(sources["llama"], target_ms=1.0, candidates=candidates), TOKENS)
    assert free.plan.schemes == {}
    least = free.mixture.least
    tight = spend(job_of(sources["llama"], target_ms=least, candidates=candidates), TOKENS)
    assert {str(scheme) for scheme in tight.plan.schemes.values()} <= {"int4-g32", "int8"}
    assert tight.mixture.reached == pytest.approx(least, abs=1e-6)
    slow = spend(job_of(sources["llama"], target_ms=least, candidates=candidates, target_gpu="H200"), TOKENS)
    assert slow.mixture == tight.mixture
    with pytest.raises(CheckpointError, match="knows no steps with experts"):
        spend(job_of(sources["mixtral"], target_ms=1.0), TOKENS)


def test_the_saved_recipe_gives_the_same_bytes(sources, tmp_path):
    flags = ["--method", "gptq", "--group-size", 32, *QUICK]
    first = run_quantize(sources["llama"], *flags, "--target-bits", 5.5, "-o", tmp_path / "first")
    assert first.code == 0, first.err
    assert "5.5 allowed" in first.out
    again = run_quantize(
        sources["llama"], "--recipe", tmp_path / "first" / "recipe.toml", "--eval-windows", 0, "-o", tmp_path / "again"
    )
    assert again.code == 0, again.err
    for name in ("model.safetensors", "config.json", "recipe.toml"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    reports = [json.loads((tmp_path / run / "quantization_report.json").read_text()) for run in ("first", "again")]
    measured, named = (report.pop("mixture") for report in reports)
    assert reports[0] == reports[1]
    assert named["sets"] == {}
    assert measured["reached"] == pytest.approx(named["reached"])
    schemes = LogicalTensors(open_checkpoint(tmp_path / "again")).schemes
    assert {scheme.bits for scheme in schemes.values()} == {4, 8}


@pytest.mark.peer
def test_transformers_loads_a_mixture_of_floats(sources, tmp_path):
    pytest.importorskip("compressed_tensors")
    flags = ["--method", "gptq", "--scheme", "int4-g32", "--candidates", FLOATS, *QUICK]
    done = run_quantize(sources["llama"], *flags, "--target-bits", 7.5, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    logical = LogicalTensors(open_checkpoint(tmp_path / "q"))
    assert len({str(scheme) for scheme in logical.schemes.values()}) > 1
    ids = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    found = logits_of(theirs, ids)  # the first pass expands the weights
    for name in logical.schemes:
        meant = logical.qtensor(name).dequantize(torch.bfloat16)
        assert torch.equal(theirs.get_submodule(name).weight.to(torch.bfloat16), meant), name
    [ours] = open_backend("transformers", open_source(str(tmp_path / "q")), "cpu").logits([ids])
    torch.testing.assert_close(found.float(), ours, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_pattern_names_a_set_and_nothing_else(sources, family):
    job = job_of(sources[family])
    for key in {fused_set(name) for name in job.linears}:
        inside = {name for name in job.plan.schemes if fused_set(name) == key}
        if inside:
            named = job_of(sources[family], schemes={scheme_pattern(key): "int8-channel"}).plan
            assert named.named == inside
            assert {name for name, scheme in named.schemes.items() if scheme.bits == 8} == inside
            kept = job_of(sources[family], schemes={scheme_pattern(key): "16bit"}).plan
            assert kept.unrounded == inside == job.plan.schemes.keys() - kept.schemes.keys()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_by_name_gives_attention_and_the_rest_their_schemes(sources, name):
    family = "mixtral" if "experts" in name else "llama"
    recipe = complete_recipe({"method": "rtn", "scheme": name})
    plan = prepare(open_source(str(sources[family])), recipe, "cpu").plan
    attention, rest = name.split("-", 2)[1], name.split("-", 3)[3].replace("int4", "int4-g128")
    wanted = {"16": None, "fp8": "fp8-a16" if name.endswith("a16") else "fp8", "int8": "int8"}[attention]
    for linear in plan.schemes.keys() | plan.unrounded:
        fitting = parse_scheme(rest).fitting([(1 << 10, 64)])
        scheme = wanted and parse_scheme(wanted) if "self_attn" in linear else fitting
        assert plan.schemes.get(linear) == scheme or (scheme and scheme.number == plan.schemes[linear].number), linear
    assert plan.unrounded or wanted


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_scales_with_a_parent_stand_beside_scales_without(sources, tmp_path, method):
    """NVFP4 and FP8 in one block, rounded without data and with it."""
    out, data = tmp_path / "out", QUICK if method == "gptq" else ("--eval-windows", 0)
    mixture = "attention-fp8-mlp-nvfp4-a16"
    done = run_quantize(sources["llama"], "--method", method, "--scheme", mixture, *data, "--output", out)
    assert done.code == 0, done.err
    logical = LogicalTensors(open_checkpoint(out))
    divided = {str(scheme): logical.qtensor(name).divisor is not None for name, scheme in logical.schemes.items()}
    assert divided == {"fp8-a16": False, "nvfp4-a16": True}


def test_what_cannot_be_kept_is_refused(sources):
    with pytest.raises(RecipeError, match=r"needs 4\.\d+ at least, with 16bit, int4-g32, int4-g64, int8"):
        spend(job_of(sources["llama"], target_bits=4.01), TOKENS)
    with pytest.raises(RecipeError, match=r"a budget of 1000 bytes: this model needs \d{5,}"):
        spend(job_of(sources["llama"], target_size=1000), TOKENS)
    with pytest.raises(RecipeError, match="which engines fuse"):
        job_of(sources["llama"], schemes={"q_proj": "int8-channel"})
    with pytest.raises(RecipeError, match="16bit for"):
        job_of(sources["llama"], schemes={"q_proj": "16bit"})
    with pytest.raises(RecipeError, match="'nothing' matches no linear"):
        job_of(sources["llama"], schemes={"nothing": "int8-channel"})
    with pytest.raises(RecipeError, match="holds one scheme"):
        spend(job_of(sources["llama"], target_bits=5.0, format="gptq"), TOKENS)


@pytest.mark.parametrize(("target", "little"), [("target_bits", 1.0), ("target_size", 1), ("target_ms", 1e-6)])
def test_the_least_that_is_said_is_enough(sources, target, little):
    with pytest.raises(RecipeError) as refused:
        spend(job_of(sources["llama"], **{target: little}), TOKENS)
    least = type(little)(re.search(r"needs (\S+) at least", str(refused.value)).group(1))
    assert spend(job_of(sources["llama"], **{target: least}), TOKENS).mixture.reached <= least


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_bits": 5.0, "target_ms": 2.0}, "are 2 budgets"),
        ({"target_size": 0}, "above 0"),
        ({"target_ms": math.inf}, "finite"),
        ({"candidates": ("int8",)}, "add --target-bits"),
        ({"candidates": ("int9",), "target_bits": 5.0}, "'int9' is no scheme"),
        ({"target_ms": 1.0, "target_gpu": "B200"}, "measured on H100, H200"),
        ({"scheme": "attention-fp8-mlp-nvfp8"}, "unknown mixture .*did you mean 'attention-fp8-mlp-nvfp4'"),
    ],
)
def test_a_recipe_that_makes_no_budget_is_refused(values, said):
    with pytest.raises(RecipeError, match=said):
        complete_recipe({"method": "rtn"} | values)
