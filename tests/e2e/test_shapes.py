"""Shapes that groups or blocks do not divide, whole or after tensor parallelism: the plan says each, by linear."""

import pytest

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.models.source import open_source
from tests.builders import save_family
from tests.e2e.cli import run_quantize

SIZES = {"hidden_size": 128, "intermediate_size": 160, "head_dim": 32, "num_key_value_heads": 2, "vocab_size": 272}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_family("llama", tmp_path_factory.mktemp("shapes") / "m", **SIZES)


def planned(model, scheme: str, **more: str):
    return prepare(open_source(str(model)), complete_recipe({"method": "rtn", "scheme": scheme} | more), "cpu").plan


@pytest.mark.parametrize(
    ("scheme", "fallbacks", "uncut"),
    [
        (
            "int4-g128",
            {"mlp.down_proj": "int4-g32 in place of int4-g128: 160 inputs do not divide into groups of 128"},
            {
                "mlp.down_proj": "on 2, 4, 8 GPUs: 160 inputs in parts of 80, in groups of g32",
                "self_attn.o_proj": "on 2, 4, 8 GPUs: 128 inputs in parts of 64, in groups of g128",
            },
        ),
        (
            "fp8-block",
            {
                "mlp.down_proj": "fp8 in place of fp8-block: 160 inputs do not divide into groups of 128",
                "mlp.gate_proj": "fp8 in place of fp8-block: 160 outputs do not divide into blocks of 128",
                "self_attn.k_proj": "fp8 in place of fp8-block: 64 outputs do not divide into blocks of 128",
                "self_attn.q_proj": "fp8 in place of fp8-block: a linear that engines fuse it with does not divide",
            },
            {"self_attn.o_proj": "on 2, 4, 8 GPUs: 128 inputs in parts of 64, in groups of b128x128"},
        ),
        ("nvfp4-a16", {}, {"mlp.down_proj": "on 4, 8 GPUs: 160 inputs in parts of 40, in groups of g16"}),
        ("int8", {}, {}),
    ],
)
def test_each_linear_says_what_it_got_and_where_it_cannot_be_cut(model, scheme, fallbacks, uncut):
    plan = planned(model, scheme)
    for found, wanted in ((plan.fallbacks, fallbacks), (plan.uncut, uncut)):
        assert (
            found.items()
            >= {f"model.layers.{i}.{role}": text for i in range(2) for role, text in wanted.items()}.items()
        )
        assert bool(found) == bool(wanted)
    for name, text in plan.fallbacks.items():
        assert text.startswith(f"{plan.schemes[name]} in place of {scheme}: ")


def test_the_command_prints_a_line_for_each_kind(model, tmp_path):
    args = ("--method", "rtn", "--scheme", "int4-g128", "--head", "fp8-block", "--dry-run")
    done = run_quantize(model, *args, "-o", tmp_path / "q")
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    for line in (
        "fallback, 2 x model.layers.*.mlp.down_proj: int4-g32 in place of int4-g128: 160 inputs do not divide into",
        "not for tensor parallelism, 2 x model.layers.*.self_attn.o_proj: on 2, 4, 8 GPUs: 128 inputs in parts of 64",
        "lm_head: fp8, 272 x 128 in place of fp8-block: 272 outputs do not divide into blocks of 128",
    ):
        assert line in told
