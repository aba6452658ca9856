"""Contents of a finished checkpoint: tied heads stay tied, companions are copied, sums verify, equal runs are equal."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.plan import Left
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import open_backend
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.recipes import read_recipe
from lowbit.models.source import open_source
from tests.builders import calibration, changed_config, logits_of, save_family
from tests.e2e.cli import names, run_quantize

AWQ = ["--method", "awq", "--group-size", 32, "--num-samples", 4, "--seqlen", 32, "--eval-windows", 1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    source = save_family("llama", tmp_path_factory.mktemp("source") / "llama", torch.bfloat16)
    (source / "modeling_evil.py").write_text("raise SystemExit('must never run')")
    (source / "LICENSE").write_text("free")
    return source


@pytest.fixture(scope="module")
def awq(llama, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("awq") / "out"
    done = run_quantize(llama, *AWQ, "-o", output)
    assert done.code == 0, done.err
    return output


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_what_the_directory_holds(awq):
    assert names(awq) == [
        "LICENSE",
        "README.md",
        "SHA256SUMS",
        "chat_template.jinja",
        "config.json",
        "evaluation.jsonl",
        "generation_config.json",
        "model.safetensors",
        "quantization_report.json",
        "recipe.toml",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert names(awq.parent) == ["out"]


def test_sums_verify(awq):
    found = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=awq, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == len(names(awq)) - 1


def test_an_untied_head_and_all_that_is_not_linear_are_copied(awq, llama):
    before, after = load_file(llama / "model.safetensors"), load_file(awq / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    assert after["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert after["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    linears = {name.removesuffix(".weight") for name in before if name.endswith("proj.weight")}
    assert {name.removesuffix(".weight_packed") for name in after if name.endswith("packed")} == linears


def test_the_configuration_says_what_the_files_hold(awq, llama):
    before, after = (json.loads((directory / "config.json").read_text()) for directory in (llama, awq))
    added = after.pop("quantization_config")
    assert after == before
    assert added["ignore"] == ["lm_head"]
    assert added["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def test_the_report_has_every_linear_and_its_errors(awq):
    report = json.loads((awq / "quantization_report.json").read_text())
    assert report["coverage"] == 1
    assert list(report["left"]) == ["lm_head"]
    assert report["model"] == "llama"
    assert report["dtype"] == "bfloat16"
    for block in report["blocks"]:
        assert 0 < block["loss"] < 1
        assert len(block["linears"]) == 7
        assert len(block["folds"]) == 4
        for row in block["linears"].values():
            assert row["scheme"] == "int4-g32"
            assert row["tokens"] == 128
            assert row["outliers"]["before"] >= 1
            assert row["outliers"]["after"] >= 1
            assert 0 < row["weight_error"] < 0.3
            assert 0 < row["output_error"] < 0.3


def test_the_card_has_the_measured_perplexities(awq):
    card = (awq / "README.md").read_text()
    assert "non-overlapping windows" in card
    assert "perplexity" in card
    assert "library_name: transformers" in card


def test_no_file_says_where_the_model_lay(awq, llama):
    """A checkpoint may be published, so it must not contain its maker's directories."""
    for path in awq.iterdir():
        assert str(llama.parent).encode() not in path.read_bytes(), path.name


def test_the_saved_recipe_gives_the_same_bytes(awq, llama, tmp_path):
    done = run_quantize(llama, "--recipe", awq / "recipe.toml", "--eval-windows", 0, "-o", tmp_path / "again")
    assert done.code == 0, done.err
    assert weights(tmp_path / "again") == weights(awq)
    assert (tmp_path / "again" / "recipe.toml").read_text() == (awq / "recipe.toml").read_text()
    assert read_recipe(awq / "recipe.toml")["calibration_sha256"]


def test_flags_override_the_recipe(awq, llama, tmp_path):
    done = run_quantize(llama, "--recipe", awq / "recipe.toml", "--bits", 8, "--dry-run")
    assert done.code == 0, done.err
    assert "int8-g32" in done.out
    assert names(tmp_path) == []


def test_another_seed_gives_other_bytes(awq, llama, tmp_path):
    done = run_quantize(llama, *AWQ, "--seed", 7, "-o", tmp_path / "other")
    assert done.code == 0, done.err
    assert weights(tmp_path / "other") != weights(awq)


def test_shards(llama, tmp_path):
    done = run_quantize(
        llama, "--method", "int8", "--max-shard-size", "50KB", "--eval-windows", 1, "-o", tmp_path / "o"
    )
    assert done.code == 0, done.err
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert open_checkpoint(tmp_path / "o").nbytes == index["metadata"]["total_size"]


@pytest.mark.parametrize("method", ["int8", "awq"])
def test_tied_embeddings_stay_tied(tmp_path, method):
    source = save_family("gemma2", tmp_path / "source")
    flags = AWQ if method == "awq" else ["--method", "int8", "--eval-windows", 0]
    done = run_quantize(source, *flags, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    checkpoint = open_checkpoint(tmp_path / "out")
    assert not any(name.startswith("lm_head") for name in checkpoint.entries)
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head" in checkpoint.quantization["ignore"]


def test_a_tied_copy_on_disk_is_dropped(tmp_path):
    source = save_family("gemma2", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    done = run_quantize(source, "--method", "int8", "--eval-windows", 0, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert not any(name.startswith("lm_head") for name in open_checkpoint(tmp_path / "out").entries)


def with_another_head(directory: Path) -> tuple[Path, torch.nn.Module]:
    """A model whose configuration ties its head, but whose file has another one; and transformers' model of it."""
    source = save_family("llama", directory)
    changed_config(source, lambda config: config.update(tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(source)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    return source, model


@pytest.mark.parametrize("backend", ["transformers", "blocks", "engine"])
def test_a_head_of_its_own_is_read_though_it_is_said_to_be_tied(tmp_path, backend):
    source, model = with_another_head(tmp_path)
    ids = calibration(2, 16).ids
    (logits,) = open_backend(backend, open_source(str(source)), "cpu").logits([ids])
    torch.testing.assert_close(logits, logits_of(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["int8", "awq"])
def test_a_head_of_its_own_is_written_though_it_is_said_to_be_tied(tmp_path, method):
    source, _ = with_another_head(tmp_path / "source")
    done = run_quantize(source, *(AWQ if method == "awq" else ["--method", "int8"]), "-o", tmp_path / "out")
    assert done.code == 0, done.err
    checkpoint = open_checkpoint(tmp_path / "out")
    assert torch.equal(checkpoint.read("lm_head.weight"), open_checkpoint(source).read("lm_head.weight"))
    assert checkpoint.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(("dtype", "head"), [("auto", torch.bfloat16), ("float16", torch.float16)])
@pytest.mark.parametrize("method", ["int8", "awq"])
def test_float32_tensors_among_bfloat16_ones_keep_their_dtype(tmp_path, method, dtype, head):
    """Unquantized linears that nothing is folded into keep their values bit for bit."""
    source = save_family("qwen3", tmp_path / "source", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    kept = [name for name in tensors if name.endswith(("q_norm.weight", "model.norm.weight", "input_layernorm.weight"))]
    for name in kept:
        tensors[name] = tensors[name].float() + torch.rand(tensors[name].shape) * 1e-3
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    flags = AWQ if method == "awq" else ["--method", "int8", "--eval-windows", 0]
    done = run_quantize(source, *flags, "--dtype", dtype, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {written[name].dtype for name in kept} == {torch.float32}
    assert written["lm_head.weight"].dtype == head
    for name in kept:
        assert torch.equal(written[name], tensors[name]) or "input_layernorm" in name


def plan_of(source: Path, **values: object):
    return prepare(open_source(str(source)), complete_recipe({"method": "rtn", "group_size": 32} | values), "cpu").plan


def test_ignoring_one_of_a_fused_set_leaves_all_of_it(tmp_path):
    """Engines run q, k and v as one matrix. Leaving it unquantized is 12% of this model, refused unless requested."""
    plan = plan_of(save_family("llama", tmp_path), ignore=("lm_head", "q_proj"))
    for i in range(2):
        prefix = f"model.layers.{i}.self_attn"
        assert plan.left[f"{prefix}.q_proj"].reason == "ignored by 'q_proj'"
        for other in ("k_proj", "v_proj"):
            reason = plan.left[f"{prefix}.{other}"].reason
            assert reason == f"engines fuse it with {prefix}.q_proj, which is ignored by 'q_proj'"
        assert f"{prefix}.o_proj" in plan.schemes
    assert plan.coverage == 1


@pytest.mark.parametrize("pattern", ["model.layers.1.mlp.down_proj", "layers.1.mlp.down_proj", r"re:layers\.1\..*down"])
def test_ignoring_by_name_end_or_pattern(tmp_path, pattern):
    plan = plan_of(save_family("llama", tmp_path), ignore=("lm_head", pattern))
    assert plan.left["model.layers.1.mlp.down_proj"].reason == f"ignored by {pattern!r}"
    assert "model.layers.0.mlp.down_proj" in plan.schemes


def test_group_sizes_fall_back_together_where_engines_fuse(tmp_path):
    """hidden 64 and intermediate 96 under groups of 64: down_proj alone falls back; 80 inputs go per channel."""
    plan = plan_of(save_family("llama", tmp_path / "a"), group_size=64)
    assert {str(plan.schemes[f"model.layers.0.{name}"]) for name in ("self_attn.q_proj", "mlp.up_proj")} == {"int4-g64"}
    assert str(plan.schemes["model.layers.0.mlp.down_proj"]) == "int4-g32"
    plan = plan_of(save_family("llama", tmp_path / "b", intermediate_size=80), group_size=128)
    assert str(plan.schemes["model.layers.0.mlp.down_proj"]) == "int4-channel"
    assert str(plan.schemes["model.layers.0.mlp.gate_proj"]) == "int4-g64"
    plan = plan_of(save_family("qwen3_moe", tmp_path / "c", moe_intermediate_size=96), group_size=64)
    assert {str(scheme) for name, scheme in plan.schemes.items() if ".experts." in name} == {"int4-g32"}


def test_the_coverage_gate_fails_where_a_large_linear_is_left(tmp_path):
    plan = plan_of(save_family("llama", tmp_path))
    missed = plan.left | {"model.wide": Left(10**6, "of a kind that is not read here", exempt=False)}
    with pytest.raises(CheckpointError, match=r"only .*% of the linear.*model.wide: of a kind that is not.*--ignore"):
        replace(plan, left=missed).require_coverage()


def test_the_head_is_left_where_nobody_says_so(tmp_path):
    recipe = replace(complete_recipe({"method": "rtn", "group_size": 32}), ignore=())
    plan = prepare(open_source(str(save_family("llama", tmp_path))), recipe, "cpu").plan
    assert plan.left["lm_head"].reason == "outside the decoder blocks"
    assert plan.coverage == 1


def test_nothing_left_to_quantize_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="everything, by --ignore"):
        plan_of(save_family("llama", tmp_path), ignore=("lm_head", "re:.*"))
