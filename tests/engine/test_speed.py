"""Counts of the benchmark, and its run without a GPU."""

import json
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from benchmarks.train_drafter import config_for, write_head
from lowbit.commands.quantize_bench import bench
from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.training import Eagle3
from lowbit.engine.engine import Engine
from lowbit.engine.options import Options
from lowbit.engine.shapes import SHAPES, RandomParts, decoder_shape, random_weights
from lowbit.engine.speed import measure, step_bytes
from lowbit.quant.kernels.stack import PackedStack
from lowbit.quant.kernels.weight import Dense, Packed
from tests.builders import make_model, save, save_family

TINY = decoder_shape(vocabulary=256, hidden=128, inner=256, heads=2, layers=2, kv_heads=1)


def make_engine(method: str, int8: bool = False) -> Engine:
    weights = random_weights(TINY, method, torch.empty(0, dtype=torch.float16), cache="int8" if int8 else "same")
    return Engine(Decoder(TINY, weights, 64), None, Options(64))


def test_bytes_of_a_step_are_weights_and_cache():
    # q, k, v; o; gate, up; down, a row each of (outputs, inputs)
    linears = 2 * (256 * 128 + 128 * 128 + 512 * 128 + 128 * 256)
    head, per_position = 256 * 128 * 2, 2 * 2 * 64
    assert step_bytes(make_engine("dense"), 3, 10, {}) == 2 * linears + head + 3 * 10 * per_position * 2
    assert step_bytes(make_engine("w4"), 1, 0, {}) == linears // 2 + linears // 128 * 2 + head
    assert step_bytes(make_engine("dense", int8=True), 1, 10, {}) == 2 * linears + head + 10 * 2 * 2 * (64 + 2)


def test_layers_read_what_their_heads_and_windows_have():
    """Layers that share keys and values each read them; memory is allocated once."""
    narrow = replace(TINY.layers[0], window=4)
    wide = replace(TINY.layers[0], head_dim=128, kv_heads=2)
    shape = replace(TINY, layers=(narrow, wide, replace(wide, source=1)))
    engine = Engine(Decoder(shape, random_weights(shape, "dense", torch.empty(0)), 64), None, Options(64))
    weights = engine.decoder.weights.step_nbytes({})
    assert step_bytes(engine, 1, 10, {}) - weights == 2 * 4 * (4 * 64 + 2 * 10 * 2 * 128)
    cache = engine.spaces.make_cache(3, 10)
    assert cache.nbytes == engine.spaces.cache_nbytes(3, 10) == 3 * 10 * 2 * 4 * (64 + 2 * 128)
    assert cache.layers[2] is cache.layers[1]


def test_a_speed_is_its_parts():
    speed = measure(make_engine("w4"), batch=2, prompt=8, output=4, read_gbs=10.0)
    row = speed.as_row()
    assert row["tokens_per_s"] == pytest.approx(2e3 / speed.ms_per_token, abs=0.1)
    assert speed.floor_ms == pytest.approx(step_bytes(make_engine("w4"), 2, 10, {}) / 10e9 * 1e3)
    assert row["share_of_floor"] == pytest.approx(speed.floor_ms / speed.ms_per_token, abs=1e-4)


@pytest.mark.parametrize(("shape", "billions"), [("llama2-7b", 6.74), ("llama2-13b", 13.0), ("codegeex-13b", 12.9)])
def test_shapes_have_the_parameters_of_their_names(shape, billions):
    a = SHAPES[shape]
    up = a.inner * (2 if a.gated else 1)
    layer = a.hidden * (a.heads_of(0).qkv_rows + a.heads * a.head_dim + up + a.inner)
    assert (len(a.layers) * layer + 2 * a.vocabulary * a.hidden) / 1e9 == pytest.approx(billions, rel=0.02)


MIXED = {"qwen3-30b-a3b": "w4", "glm-4.5-air": "w4", "deepseek-v2-lite": "w4", "gpt-oss-20b": "experts-mxfp4"}


@pytest.mark.parametrize("shape", MIXED)
def test_experts_of_shapes_are_what_kernels_multiply(shape):
    """Also where groups of 128 do not divide the inputs of a dense layer, or all else is dense."""
    a, like = SHAPES[shape], torch.empty(0, dtype=torch.bfloat16)
    mixture, parts = a.layers[-1].mixture, RandomParts(SHAPES[shape], MIXED[shape], like)
    assert mixture is not None
    one = replace(mixture, experts=1)
    stacks = [parts.stack("up", one, 32, a.hidden), parts.stack("down", one, 32, mixture.inner)]
    assert all(isinstance(stack.weight, PackedStack) for stack in stacks)
    assert isinstance(parts.linear("down", 32, a.inner).weight, Dense if shape == "gpt-oss-20b" else Packed)


def test_the_command_measures_a_checkpoint(tmp_path):
    save_family("llama", tmp_path)
    options = ["--device", "cpu", "--dtype", "float32", "--batch", "2", "--prompt-tokens", "8", "--new-tokens", "3"]
    result = CliRunner().invoke(bench, [str(tmp_path), *options, "--json"])
    row = json.loads(result.stdout)
    assert (row["batch"], row["prompt"], row["output"]) == (2, 8, 3)
    assert row["ms_per_token"] > 0
    assert "baseline" not in row
    assert "share of floor" in CliRunner().invoke(bench, [str(tmp_path), *options]).stdout


def test_the_original_is_measured_under_the_same_conditions(tmp_path, monkeypatch):
    for name in ("model", "made"):
        save_family("llama", tmp_path / name)
    sizes = ["--batch", "1", "--batch", "2", "--prompt-tokens", "8", "--new-tokens", "2"]
    options = [str(tmp_path / "made"), "--device", "cpu", *sizes, "--baseline", str(tmp_path / "model")]
    rows = [json.loads(line) for line in CliRunner().invoke(bench, [*options, "--json"]).stdout.splitlines()]
    assert [row["batch"] for row in rows] == [1, 2]
    assert [row["baseline"]["model"] for row in rows] == ["model", "model"]
    assert all(row["baseline"]["tokens_per_s"] > 0 for row in rows)
    monkeypatch.setattr("lowbit.commands.display.EVERY", 0.001)
    told = CliRunner().invoke(bench, options)
    lines = told.stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.split()[:1] in (["original"], ["checkpoint"])] == [
        *(["original", "1"], ["original", "2"], ["checkpoint", "1"], ["checkpoint", "2"])
    ]
    assert "checkpoint: decoding in float32 on CPU" in told.stderr
    assert re.search(r"measuring (original|checkpoint)( 1/2)?: [12] x 2 tokens after 8; 0:00 so far", told.stderr)


def test_the_command_wants_a_checkpoint_or_a_shape():
    assert "name a CHECKPOINT, or a --shape" in CliRunner().invoke(bench, []).stderr
    wrong = CliRunner().invoke(bench, ["--shape", "llama2-7b", "--baseline", "demo"])
    assert "beside a --shape write --weights dense as well" in wrong.stderr


def test_the_command_measures_a_drafter(tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.commands.quantize_bench.PROMPT", 16)
    model = make_model("llama", num_hidden_layers=8)
    save(model, tmp_path / "model")
    config = config_for(model.config.to_dict(), 260)
    write_head(Eagle3(config, torch.zeros(1)), config, torch.arange(260), tmp_path / "head")
    options = ["--device", "cpu", "--batch", "1", "--prompt-tokens", "8", "--new-tokens", "6", "--json"]
    options += ["--drafter", str(tmp_path / "head"), "--drafter-scheme", "int8"]
    result = CliRunner().invoke(bench, [str(tmp_path / "model"), *options])
    row = json.loads(result.stdout.splitlines()[-1])
    assert (row["tokens"], row["same_text"]) == (24, True)
    assert row["tokens_per_step"] == pytest.approx(24 / row["steps"], abs=1e-3)
    assert 0 < row["draft_ms"] < row["draft_ms"] + row["check_ms"]
    wrong = CliRunner().invoke(bench, ["--shape", "llama2-7b", "--drafter", "x"])
    assert "--drafter x is for a CHECKPOINT" in wrong.output
