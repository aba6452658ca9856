"""Gemma 4's layers have experts beside a feed-forward of all tokens, each with norms of its own."""

import pytest
import torch

import lowbit
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import load_dense
from lowbit.export.inspection import PARALLEL_SIZES
from lowbit.models.routing import widened, widest
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from lowbit.quant.naming import EXPERT
from tests.builders import changed_config, logits_of, make_model, save
from tests.e2e.test_experts import RECIPES, TOKENS, quantized


@pytest.mark.parametrize("recipe", ["awq", "gptq"])
def test_experts_beside_a_feed_forward_of_all_tokens(tmp_path, recipe):
    """Both are scaled and rounded, and the router, which has a norm and scales of its own, stays."""
    model = make_model("gemma4_moe")
    rows = quantized(save(model, tmp_path / "model"), tmp_path / "out", RECIPES[recipe] | {"bits": 8})
    assert sum(bool(EXPERT.search(name)) for name in rows) == 4 * 4 * 3
    assert {name.rsplit(".", 1)[-1] for name in rows if ".mlp." in name} == {"gate_proj", "up_proj", "down_proj"}
    assert not any("router" in name for name in rows)
    first = TOKENS.ids[:, :1]  # tokens alone: few have other experts, and no other token's
    wanted = logits_of(model, first)
    apart = (logits_of(load_dense(open_source(str(tmp_path / "out"))), first) - wanted).norm(dim=-1)
    assert 0 < float((apart / wanted.norm(dim=-1)).median()) < 0.02


def test_a_wider_choice_is_for_statistics_alone():
    """The number of a token's experts is the configuration's, which all routers read."""
    model = make_model("gemma4_moe", top_k_experts=1)
    states, layer = torch.randn(40, 64), model.model.layers[0]
    assert widest(layer) == 1
    with widened(layer, 3):
        assert widest(model) == 3
        assert layer.router(states)[2].shape == (40, 3)
    assert widest(model) == 1
    assert layer.router(states)[2].shape == (40, 1)


@pytest.mark.parametrize("width", [0, 5])
def test_more_experts_of_a_token_than_there_are_are_refused(tmp_path, width):
    save(make_model("gemma4_moe"), tmp_path)
    changed_config(tmp_path, lambda config: config.update(top_k_experts=width))
    with pytest.raises(CheckpointError, match=rf"model.layers.0.router: {width} experts of a token, of 4"):
        open_skeleton(open_source(str(tmp_path)))


def test_layers_whose_heads_differ_are_counted_one_by_one(tmp_path):
    """A configuration with two sizes of heads has no one number of them: text of the model's own needs its memory, and
    the engines' limits the fewest."""
    sizes = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    model = save(make_model("gemma4_moe", **sizes), tmp_path / "model")
    source = open_source(str(model))
    assert source.of_layers("head_dim") == [16, 32, 16, 32]
    assert source.of_layers("num_key_value_heads") == [2, 1, 2, 1]
    assert source.of_layers("num_attention_heads") == [4, 4, 4, 4]
    assert source.of_layers("no_such_number") == []
    settings = {"method": "gptq", "group_size": 32, "num_samples": 2, "own_samples": 2, "seqlen": 16, "eval_windows": 0}
    lowbit.quantize(model, tmp_path / "out", **settings)
    assert lowbit.inspect(tmp_path / "out").parallel.keys() == set(PARALLEL_SIZES)
