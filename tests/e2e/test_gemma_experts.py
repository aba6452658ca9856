"""Gemma 4's layers have experts beside a feed-forward of all tokens, each with norms of its own."""

import pytest

from lowbit.evaluation.backend import load_dense
from lowbit.models.source import open_source
from lowbit.quant.naming import EXPERT
from tests.builders import logits_of, make_model, save
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
