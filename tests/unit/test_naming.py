"""quant/naming.py: linears of experts, and linears that run as one."""

from lowbit.quant.naming import EXPERT, expert_role, fused_set, split_sets
from lowbit.quant.scheme import parse_scheme

W4, W8A8 = parse_scheme("int4-g128"), parse_scheme("int8-channel-a8token")


def test_what_runs_as_one():
    assert fused_set("m.0.self_attn.k_proj") == fused_set("m.0.self_attn.q_proj")
    assert fused_set("m.0.mlp.up_proj") != fused_set("m.1.mlp.up_proj")
    assert fused_set("m.0.mlp.experts.1.w2") == fused_set("m.0.mlp.experts.7.w1")


def test_experts_of_one_role():
    assert expert_role("m.0.mlp.experts.3.w2") == expert_role("m.0.mlp.experts.17.w2") == "m.0.mlp.experts.*.w2"
    assert expert_role("m.0.mlp.experts.3.w2") != expert_role("m.0.mlp.experts.3.w1")
    assert not EXPERT.search("m.0.mlp.shared_expert.w1")


def test_a_set_that_is_split():
    names = ["m.q_proj", "m.k_proj", "m.v_proj", "m.o_proj"]
    assert split_sets(names, dict.fromkeys(names, W4)) == {}
    assert split_sets(names, dict.fromkeys(names[1:], W4)) == {"m.q_proj+k_proj+v_proj": names[:3]}
    assert list(split_sets(names, dict.fromkeys(names, W4) | {"m.v_proj": W8A8})) == ["m.q_proj+k_proj+v_proj"]
