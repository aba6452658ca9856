"""Mixtures of experts under every method: the report says how many tokens each expert saw. An expert with too few is
calibrated on tokens of a wider choice; where there is none it is rounded to nearest, with the reason."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from lowbit.calibrate import alike
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import load_dense
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.formats import LogicalTensors
from lowbit.models.routing import widened, widest
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from lowbit.quant.naming import EXPERT
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.builders import GATED, calibration, changed_config, logits_of, make_model, save, save_family

TOKENS = calibration(16, 24)
COUNT = TOKENS.ids.numel()
RECIPES: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq", "group_size": 32},
    "gptq": {"method": "gptq", "group_size": 32},
    "gptq, nvfp4": {"method": "gptq", "scheme": "nvfp4-a16"},
    "rtn, searched": {"transforms": ("awq",), "rounder": "rtn", "scheme": "int3-g32"},
    "smoothquant": {"method": "smoothquant"},
    "smoothquant, static": {"method": "smoothquant", "activations": "tensor"},
    "signround": {"method": "signround", "iters": 4, "group_size": 32},
    "best": {"method": "best", "iters": 2, "distill_steps": 2, "group_size": 32},
}
# the first is what no other weight of the expert is folded into
ROLES = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("gate_proj", "down_proj", "up_proj")}
UNUSED = 3


def quantized(source: Path, output: Path, recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The report's rows by linear, after checking that every block's loss is finite."""
    job = prepare(open_source(str(source)), complete_recipe(recipe), "cpu")
    output.mkdir()
    result = run(job, output, TOKENS, lambda report: None)
    assert all(block.loss is not None and math.isfinite(block.loss) for block in result.blocks)
    report = json.loads((output / "quantization_report.json").read_text())
    return {name: row for block in report["blocks"] for name, row in block["linears"].items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Callable[[str, bool], Path]:
    """Models with top-1 routing whose last expert is never the first choice: its router row is the others' mean."""
    made: dict[tuple[str, bool], Path] = {}

    def source(family: str, stacked: bool) -> Path:
        if (family, stacked) not in made:
            model = make_model(family, num_experts_per_tok=1)
            for name, parameter in model.named_parameters():
                if name.endswith("mlp.gate.weight"):
                    parameter.data[UNUSED] = parameter.data[:UNUSED].mean(0)
            directory = save(model, tmp_path_factory.mktemp(family) / "model")
            if stacked:
                tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
                save_file(tensors, directory / "model.safetensors")
            made[family, stacked] = directory
        return made[family, stacked]

    return source


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("family", "stacked"), [("mixtral", False), ("qwen3_moe", True)])
def test_every_method(sources, tmp_path, family, stacked, recipe):
    source = sources(family, stacked)
    rows = quantized(source, tmp_path / "out", RECIPES[recipe])
    experts = {name: row for name, row in rows.items() if EXPERT.search(name)}
    assert len(experts) == 2 * 4 * 3
    for layer in range(2):
        for role in ROLES[family]:
            seen = [rows[name]["tokens"] for name in experts if f"layers.{layer}." in name and name.endswith(role)]
            assert sum(seen) == COUNT
            assert seen[UNUSED] == 0
    for name, row in experts.items():
        assert row.get("widened_tokens") == (COUNT if f".{UNUSED}." in name else None)
        assert "rounded to nearest" not in row.get("fallback", "")
    found = logits_of(load_dense(open_source(str(tmp_path / "out"))), TOKENS.ids[:2])
    assert found.isfinite().all()


@pytest.mark.parametrize("recipe", ["awq", "gptq", "gptq, nvfp4", "rtn, searched", "best"])
@pytest.mark.parametrize(("family", "stacked"), [("mixtral", False), ("qwen3_moe", True)])
def test_experts_at_once_have_the_files_of_one_by_one(sources, tmp_path, monkeypatch, family, stacked, recipe):
    """On a CPU to the bit: a batch of experts is multiplied by the same loops as each of them."""
    counts: list[int] = []
    whole = alike.in_batches

    def counted(items, kind, most, work):
        return whole(items, kind, most, lambda some: counts.append(len(some)) or work(some))

    for module in ("alike", "search"):
        monkeypatch.setattr(f"lowbit.calibrate.{module}.in_batches", counted)
    source = sources(family, stacked)
    together = quantized(source, tmp_path / "together", RECIPES[recipe])
    assert max(counts) >= 3  # experts; the one without tokens may be rounded otherwise
    counts.clear()
    monkeypatch.setattr(alike, "CPU_ROOM", 1)
    alone = quantized(source, tmp_path / "alone", RECIPES[recipe])
    assert set(counts) == {1}
    assert together == alone
    files = [load_file(tmp_path / where / "model.safetensors") for where in ("together", "alone")]
    assert files[0].keys() == files[1].keys()
    differ = [name for name, value in files[0].items() if not torch.equal(value, files[1][name])]
    assert not differ


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_an_expert_that_nobody_routes_to_needs_a_wider_choice(sources, tmp_path, monkeypatch, stacked, wide):
    if not wide:
        monkeypatch.setattr("lowbit.models.routing.WIDTH", "no attribute of a router")
    source = sources("mixtral", stacked)
    rows = quantized(source, tmp_path / "out", RECIPES["gptq"])
    for name, row in rows.items():
        reason = f"0 of {COUNT} calibration tokens reached it, 32 are needed: rounded to nearest"
        assert (reason in row.get("fallback", "")) == (not wide and f".{UNUSED}." in name)
    written = LogicalTensors(open_checkpoint(tmp_path / "out"))
    originals = load_file(sources("mixtral", False) / "model.safetensors")
    for name in rows:
        if EXPERT.search(name):
            found = written.qtensor(name)
            where = name.replace(".mlp.", ".block_sparse_moe.")
            original = originals[f"{where if f'{where}.weight' in originals else name}.weight"]
            nearest = round_to_nearest(original.float(), parse_scheme(rows[name]["scheme"]), torch.float32)
            assert torch.equal(found.codes, nearest.codes) == (not wide and f".{UNUSED}." in name), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_it_takes_part_in_the_folds_of_its_layer(sources, tmp_path, family, method):
    """A norm that was divided also feeds experts without tokens, so their columns must be multiplied too."""
    source = sources(family, False)
    recipe = {"method": "awq", "bits": 8, "group_size": 32} if method == "awq" else {"method": method, "alpha": 0.5}
    quantized(source, tmp_path / "out", recipe)
    before, after = LogicalTensors(open_checkpoint(source)), LogicalTensors(open_checkpoint(tmp_path / "out"))
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert not torch.equal(before.read(norm), after.read(norm))
    for expert in range(4):
        end = f".experts.{expert}.{ROLES[family][0]}.weight"
        (name,) = (name for name in after.names if "layers.1." in name and name.endswith(end))
        wanted = before.read(name) * before.read(norm)
        found = after.read(name).float() * after.read(norm)
        assert float((found - wanted).norm() / wanted.norm()) < 0.03, name


def test_one_that_sees_too_few_tokens_is_too(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.calibrate.block.EXPERT_SHARE", 0.9)
    monkeypatch.setattr("lowbit.models.routing.WIDTH", "no attribute of a router")
    rows = quantized(sources("mixtral", False), tmp_path / "out", RECIPES["signround"])
    least = math.ceil(0.9 * COUNT)
    for name, row in rows.items():
        if EXPERT.search(name):
            assert f"{row['tokens']} of {COUNT} calibration tokens reached it, {least} are needed" in row["fallback"]
        else:
            assert row["tokens"] == COUNT


def test_a_wider_choice_is_for_statistics_alone():
    """The block hands on the same outputs afterwards, and its routers have the widths that they had."""
    model = make_model("qwen3_moe", num_experts_per_tok=1)
    states, block = torch.randn(1, 40, 64), model.model.layers[0].mlp
    before = block(states)
    with widened(block, 3):
        assert widest(block) == 3
        assert not torch.equal(block(states), before)
    assert widest(block) == 1
    assert torch.equal(block(states), before)


@pytest.mark.parametrize("method", ["awq", "gptq", "signround"])
@pytest.mark.parametrize("layer", [0, 1])
def test_nan_in_a_routers_logits_is_told(tmp_path, method, layer):
    """The weights are finite, their products are not."""
    source = save_family("qwen3_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
    router.copy_(3e38 * router.sign())
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"model.layers.{layer}: its outputs are NaN or infinite"):
        quantized(source, tmp_path / "out", RECIPES[method])


GROUPED = GATED | {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "first_k_dense_replace": 1}
GROUPED |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "moe_intermediate_size": 32}
GROUPED |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, r"layers.1.mlp.gate: 2 of 3 groups of 8 experts"),
        ({"topk_group": 5}, r"layers.1.mlp.gate: 5 of 4 groups of 8 experts"),
        ({"topk_group": 1}, r"layers.1.mlp.gate: 3 experts of 1 groups of 2"),
        (None, r"1 weights that .* needs are in no file, the first 'model.layers.1.mlp.gate.e_score_correction_bias'"),
    ],
)
def test_groups_that_do_not_exist_and_a_lost_correction_are_refused(tmp_path, changes, message):
    torch.manual_seed(0)
    source = save(AutoModelForCausalLM.from_config(DeepseekV3Config(**GROUPED)), tmp_path)
    if changes is None:
        tensors = load_file(source / "model.safetensors")
        del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    else:
        changed_config(source, lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=message):
        open_skeleton(open_source(str(source)))


FIRST_EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.0.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
}


def quantize_to(out, source, method):
    job = prepare(open_source(str(source)), complete_recipe({"method": method}), "cpu")
    run(job, out, TOKENS if job.recipe.dataset else None, lambda report: None)


@pytest.mark.parametrize("method", ["int8", "gptq"])
@pytest.mark.parametrize("family", list(FIRST_EXPERT))
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing", "1 weights that .* needs are in no file, the first '{expert}'"),
        ("shape", r"{expert}: \[8, 64\] in the file"),
        ("nan", "{expert}: 1 of .* values are NaN"),
        ("router", r"gate.weight: \[3, 64\] in the file, \[4, 64\] in the model of config.json"),
        ("5", "mlp.*: 5 experts of a token, of 4"),
        ("0", "mlp.*: 0 experts of a token, of 4"),
    ],
)
def test_a_mixture_that_contradicts_itself_is_refused(tmp_path, family, method, wrong, message):
    source, expert = save_family(family, tmp_path / "source"), FIRST_EXPERT[family]
    tensors = load_file(source / "model.safetensors")
    router = next(name for name in tensors if "layers.1." in name and name.endswith("gate.weight"))
    if wrong == "missing":
        del tensors[expert]
    elif wrong == "shape":
        tensors[expert] = tensors[expert][:8].contiguous()
    elif wrong == "nan":
        tensors[expert][0, 0] = torch.nan
    elif wrong == "router":
        tensors[router] = tensors[router][:3].contiguous()
    else:
        changed_config(source, lambda config: config.update(num_experts_per_tok=int(wrong)))
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=message.format(expert=expert)):
        quantize_to(tmp_path / "out", source, method)
    assert not list((tmp_path / "out").glob("*.safetensors"))
