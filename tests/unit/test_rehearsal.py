"""models/rehearsal.py: uses of linears, and the code that reads their weights, found on a model without weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.models import rehearsal
from lowbit.models.rehearsal import choosers
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from tests.builders import FAMILIES, GATED, save, save_family
from tests.families.tiny import save_tiny

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
ROUTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "hunyuan": ("HunYuanMoEV1Config", EXPERTS | {"moe_topk": 2}, "mlp.gate.wg"),
    "hy_v3": ("HYV3Config", EXPERTS | {"first_k_dense_replace": 0}, "mlp.router.gate"),
    "afmoe": ("AfmoeConfig", EXPERTS | {"num_dense_layers": 0}, "mlp.router.gate"),
    "gpt_oss": ("GptOssConfig", EXPERTS | {"num_local_experts": 4}, "mlp.router"),
}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MambaBlock": ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}),
    "NanoChatDecoderLayer": ("NanoChatConfig", GATED),
    "xLSTMBlock": ("xLSTMConfig", {"hidden_size": 64, "num_blocks": 2, "num_heads": 4}),
    "RwkvForCausalLM": ("RwkvConfig", {"hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2}),
    "GPTBigCodeBlock": ("GPTBigCodeConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def saved(name: str, values: dict[str, Any], directory: Path) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{"vocab_size": 260, "pad_token_id": 0} | values)
    return save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), directory)


@pytest.mark.parametrize("family", ROUTED)
def test_a_router_is_known_by_what_its_outputs_do(tmp_path, family):
    name, values, router = ROUTED[family]
    source = open_source(str(saved(name, GATED | values, tmp_path)))
    skeleton = open_skeleton(source)
    routers = [name for name in skeleton.placed() if name.endswith(f"{router}.weight")]
    routers = [name.removesuffix(".weight") for name in routers]
    assert routers
    assert choosers(skeleton) == dict.fromkeys(routers, "router")
    left = prepare(source, complete_recipe({"method": "int8"}), "cpu").plan.left
    assert all("router with 4 outputs: engines keep it in 16 bits" in left[name].reason for name in routers)


def test_the_weights_of_an_indexers_heads_stay_and_its_scores_do_not(tmp_path):
    source = open_source(str(save_family("glm_moe_dsa", tmp_path)))
    job = prepare(source, complete_recipe({"method": "int8"}), "cpu")
    for index in (0, 2):
        indexer = f"model.layers.{index}.self_attn.indexer"
        assert "weight of an indexer's heads with 4 outputs" in job.plan.left[f"{indexer}.weights_proj"].reason
        assert {f"{indexer}.wq_b", f"{indexer}.wk"} <= job.plan.schemes.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_chooses_and_no_weight_is_read(tmp_path, family, monkeypatch):
    skeleton = open_skeleton(open_source(str(save_family(family, tmp_path))))
    monkeypatch.setattr(rehearsal, "FAILURES", ())
    monkeypatch.setattr(skeleton, "read", None)
    found = choosers(skeleton)
    routed = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate"}
    assert set(found) == {f"model.layers.{i}.{routed[family]}" for i in range(2) if family in routed}
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("reader", READERS)
def test_code_that_reads_weights_itself_is_named_before_the_work(tmp_path, reader):
    job = prepare(open_source(str(saved(*READERS[reader], tmp_path))), complete_recipe({"method": "int8"}), "cpu")
    assert any(f"(dequantize=True) to load it: {reader} reads weights" in warning for warning in job.warnings())


@pytest.mark.parametrize(
    ("family", "method", "said"),
    [
        ("llama", "int8", False),
        ("qwen3_moe", "smoothquant", True),
        ("qwen3_moe", "rtn", False),
        ("falcon_7b", "rtn", True),
    ],
)
def test_what_transformers_loads_packed_has_no_warning(tmp_path, family, method, said):
    """Experts with inputs in 16 bits load there, also packed."""
    recipe = complete_recipe({"method": method} | ({"group_size": 32} if method == "rtn" else {}))
    warnings = prepare(open_source(str(save_family(family, tmp_path))), recipe, "cpu").warnings()
    assert any("transformers" in warning for warning in warnings) == said


@pytest.mark.parametrize(("kind", "said"), [("olmo_hybrid", True), ("kimi_k25", False)])
def test_weights_that_transformers_joins_on_loading_are_said_before_the_work(tmp_path, kind, said):
    """Of kimi_k25 it splits tensors too, but by a name that biases share: those it finds."""
    job = prepare(open_source(str(save_tiny(kind, tmp_path))), complete_recipe({"method": "int8"}), "cpu")
    assert any("joins or splits weights" in warning for warning in job.warnings()) == said
    elsewhere = replace(job, recipe=replace(job.recipe, format="gptq"))  # read without compressed-tensors
    assert not any("joins or splits weights" in warning for warning in elsewhere.warnings())


def test_a_norm_with_a_row_for_each_head_is_no_linear(tmp_path):
    """Command R+ scales the queries of each head by values of its own."""
    source = open_source(str(saved("CohereConfig", GATED | {"use_qk_norm": True}, tmp_path)))
    plan = prepare(source, complete_recipe({"method": "int8"}), "cpu").plan
    assert source.checkpoint.entries["model.layers.0.self_attn.q_norm.weight"].shape == (4, 16)
    assert not any("norm" in name for name in (*plan.schemes, *plan.left))
    assert len(plan.schemes) == 14
