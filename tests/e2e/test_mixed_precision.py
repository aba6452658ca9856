"""--target-bits: the average is met, fused sets stay whole, more bits cost less, the saved recipe reproduces it."""

import random
from itertools import product
from pathlib import Path

import pytest
import torch

from lowbit.calibrate.budget import Option, average_bits, choose, hull, spend
from lowbit.calibrate.job import Job, prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.plan import scheme_pattern
from lowbit.errors import RecipeError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import open_source
from lowbit.quant.naming import fused_set, split_sets
from lowbit.quant.scheme import parse_scheme
from tests.builders import calibration, save_family
from tests.e2e.cli import run_quantize

TOKENS = calibration(4, 24)


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
    averages = []
    for target in (4.6, 5.5, 7.0):
        job = spend(job_of(sources[family], target_bits=target), TOKENS)
        averages.append(average_bits(job))
        assert averages[-1] <= target
        assert split_sets(job.plan.schemes, job.plan.schemes) == {}
        assert set(job.plan.schemes) == job.plan.named
        kinds = {str(scheme) for scheme in job.plan.schemes.values()}
        assert "int8" in kinds or target < 5
        assert len(kinds) > 1
    assert averages == sorted(averages)
    assert averages[-1] > averages[0]


def test_more_bits_cost_less_and_the_choice_is_near_the_best():
    """Against every combination, on small random sets of options."""
    draw = random.Random(0)
    for _ in range(20):
        options = {
            name: hull([Option(parse_scheme("int4-g32"), bits, draw.random() / bits) for bits in (4, 5, 6, 9)])
            for name in "abcd"
        }
        least = sum(found[0].bits for found in options.values())
        before = float("inf")
        for budget in range(int(least), 37):
            chosen = choose(options, budget).values()
            assert sum(option.bits for option in chosen) <= budget
            cost = sum(option.divergence for option in chosen)
            assert cost <= before + 1e-12
            before = cost
            fitting = [some for some in product(*options.values()) if sum(option.bits for option in some) <= budget]
            best = min(sum(option.divergence for option in some) for some in fitting)
            one_step = max(a.divergence - b.divergence for found in options.values() for a in found for b in found)
            assert cost <= best + one_step


def test_the_saved_recipe_gives_the_same_bytes(sources, tmp_path):
    flags = ["--method", "gptq", "--group-size", 32, "--num-samples", 4, "--seqlen", 24, "--eval-windows", 0]
    first = run_quantize(sources["llama"], *flags, "--target-bits", 5.5, "-o", tmp_path / "first")
    assert first.code == 0, first.err
    assert "5.5 allowed" in first.out
    again = run_quantize(
        sources["llama"], "--recipe", tmp_path / "first" / "recipe.toml", "--eval-windows", 0, "-o", tmp_path / "again"
    )
    assert again.code == 0, again.err
    for name in ("model.safetensors", "config.json", "recipe.toml", "quantization_report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    schemes = LogicalTensors(open_checkpoint(tmp_path / "again")).schemes
    assert {scheme.bits for scheme in schemes.values()} == {4, 8}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_pattern_names_a_set_and_nothing_else(sources, family):
    job = job_of(sources[family])
    for key in {fused_set(name) for name in job.linears}:
        inside = {name for name in job.plan.schemes if fused_set(name) == key}
        if inside:
            named = job_of(sources[family], schemes={scheme_pattern(key): "int8-channel"}).plan
            assert named.named == inside
            assert {name for name, scheme in named.schemes.items() if scheme.bits == 8} == inside


def test_what_cannot_be_kept_is_refused(sources):
    with pytest.raises(RecipeError, match=r"needs 4\.\d+ at least"):
        spend(job_of(sources["llama"], target_bits=4.01), TOKENS)
    with pytest.raises(RecipeError, match="which engines fuse"):
        job_of(sources["llama"], schemes={"q_proj": "int8-channel"})
    with pytest.raises(RecipeError, match="'nothing' matches no linear"):
        job_of(sources["llama"], schemes={"nothing": "int8-channel"})
    with pytest.raises(RecipeError, match="holds one scheme"):
        spend(job_of(sources["llama"], target_bits=5.0, format="gptq"), TOKENS)
    with pytest.raises(RecipeError, match="16-bit inputs"):
        complete_recipe({"method": "smoothquant", "target_bits": 6.0})
