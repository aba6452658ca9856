"""Every field of a family's configuration is computed like in transformers, or refused; none is silently ignored."""

from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowbit import engine
from lowbit.errors import CheckpointError
from tests.builders import COMMON, GATED, changed_config, logits_of, readable
from tests.engine.chatglm import TinyChatGLM

IDS = torch.arange(3, 33).unsqueeze(0)
NARROW = GATED | {"head_dim": 16, "sliding_window": 8}
GPT = {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
ROPE = {"rope_theta": 500.0, "rope_type": "default"}
LINEAR = ROPE | {"rope_type": "linear", "factor": 2.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5] * 4, "long_factor": [4.0, 2.0] * 4}
WHOLE = {"partial_rotary_factor": 1.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 32}
LATENT = GATED | {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "v_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "first_k_dense_replace": 1}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
BESIDE = {"global_head_dim": 32, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 260}
BESIDE |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
# Family -> the fields of its tiny model.
TINY: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": GATED | {"sliding_window": 8},
    "qwen2": GATED,
    "qwen3": GATED | {"head_dim": 16},
    "gemma2": NARROW,
    "gemma3_text": NARROW,
    "gemma4_text": NARROW | BESIDE,
    "gemma4_unified_text": NARROW | {"global_head_dim": 32, "num_hidden_layers": 7, "num_kv_shared_layers": 1},
    "phi3": GATED,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 8},
    "gpt_neox": COMMON | {"intermediate_size": 96, "max_position_embeddings": 64},
    "glm": GATED | {"head_dim": 16},
    "glm4": GATED | {"head_dim": 16},
    "mixtral": GATED | {"num_local_experts": 4},
    "phimoe": GATED | {"num_local_experts": 4},
    "qwen2_moe": GATED | EXPERTS | SLIDING | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": GATED | EXPERTS | {"head_dim": 16},
    "deepseek_v2": LATENT | GROUPED | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | GROUPED,
    "gpt_oss": NARROW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": GATED | {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": GATED | GROUPED | {"head_dim": 16},
}
# Field -> values to try instead of the tiny model's. Other fields are negated or changed slightly.
VALUES: dict[str, list[Any]] = {
    "hidden_size": [128],
    "n_embd": [128],
    "num_attention_heads": [2],
    "n_head": [2],
    "num_key_value_heads": [1, 4],
    "head_dim": [32],
    "rotary_dim": [4],
    "max_position_embeddings": [512],
    "hidden_act": ["gelu_pytorch_tanh", "gelu"],
    "hidden_activation": ["silu", "gelu"],
    "activation_function": ["gelu", "quick_gelu"],
    "layer_types": [
        ["full_attention", "sliding_attention"],
        ["full_attention"] * 2,
        ["full_attention", "sliding_attention"] * 3 + ["full_attention"],
    ],
    "rope_parameters": [
        LINEAR,
        LINEAR | {"rope_type": "dynamic"},
        YARN | {"beta_fast": 8.0, "original_max_position_embeddings": 16},
        YARN | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 0.3},
        LONG | WHOLE | {"original_max_position_embeddings": 16},
        LONG | WHOLE | {"original_max_position_embeddings": 64},
        ROPE | {"partial_rotary_factor": 0.5},
        {"full_attention": ROPE, "sliding_attention": LINEAR},
    ],
    "final_logit_softcapping": [5.0, None],
    "attn_logit_softcapping": [5.0, None],
    "sliding_window": [5, None],
    "use_sliding_window": [True],
    "max_window_layers": [1],
    "summary_type": ["mean"],
    "summary_activation": ["tanh"],
    "n_inner": [96],
    "problem_type": ["regression"],
    "dtype": ["float32"],
    "architectures": [["Other"]],
    "transformers_version": ["4.0.0"],
    "id2label": [{0: "a"}],
    "label2id": [{"a": 0}],
    "original_max_position_embeddings": [16],
    "intermediate_size": [128],
    "moe_intermediate_size": [48],
    "clip_qkv": [0.5],
    "topk_method": ["greedy"],
    "q_lora_rank": [32, None],
    "kv_lora_rank": [48],
    "qk_rope_head_dim": [32],
    "qk_nope_head_dim": [32],
    "v_head_dim": [24],
    "mlp_only_layers": [[0]],
    "decoder_sparse_step": [2],
    "n_group": [2],
    "topk_group": [1],
    "n_routed_experts": [12],
    "use_bidirectional_attention": [True, "all", "vision"],
    "vocab_size_per_layer_input": [300],
    "num_kv_shared_layers": [0, 1],
    "per_layer_config": [{"1": {"head_dim": 64}}, {"0": {"sliding_window": 4}}],
}


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of these fields, norms and biases too."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](**TINY[family] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def built(family: str, changes: dict[str, Any]) -> PreTrainedModel | None:
    """The model, or None if transformers itself refuses the fields or cannot compute with them."""
    try:
        model = tiny(family, **changes)
        model(input_ids=IDS, use_cache=False) if "return_dict" not in changes else None
    except (ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError):
        return None
    return model


def others(name: str, value: Any) -> list[Any]:
    """Other values that a field may have."""
    if name in VALUES:
        return deepcopy(VALUES[name])
    if name.endswith("_token_id"):
        return [7]
    if isinstance(value, bool) or value is None:
        return [not value]
    return [value + 1] if isinstance(value, int) else [value * 1.5 + 0.25]


def perturbations(family: str) -> list[tuple[str, Any]]:
    """(field, value) for every field that the family's class declares."""
    config = readable(transformers.CONFIG_MAPPING[family](**TINY[family]))
    names = [field.name for field in fields(config) if field.name != "tokenizer_class"]
    return [(name, value) for name in names for value in others(name, getattr(config, name))]


def difference(model: PreTrainedModel, directory: Path) -> float | str:
    """Largest difference of the engine's logits from transformers', relative to the largest; or the engine's
    refusal."""
    model.save_pretrained(directory)
    model.config.return_dict = True  # transformers' own classes need it
    expected = logits_of(model, IDS)
    try:
        got = engine.load(directory, device="cpu").logits(IDS)
    except CheckpointError as error:
        return str(error)
    return float((got - expected).abs().max() / expected.abs().max())


# (field, value) -> the engine's refusal, if it does not compute the field
REFUSED = {
    ("hidden_act", "gelu"): "activation 'gelu' is not computed here; known with a gate: silu",
    ("hidden_activation", "gelu"): "activation 'gelu' is not computed here; known with a gate: silu",
    ("hidden_activation", "silu"): "activation 'silu' is not computed here; known without a gate: gelu",
    ("attn_logit_softcapping", 5.0): "attn_logit_softcapping is 5.0; the engine computes only None",
    ("num_attention_heads", 2): "num_key_value_heads is 4; latent attention has one for each head",
    ("norm_topk_prob", True): "norm_topk_prob is True; the engine computes only False",  # DeepSeek-V2
    ("clip_qkv", 0.5): "clip_qkv is 0.5; the engine computes only None",
    ("num_experts_per_tok", 3): "scores 'mixer' for 3 experts of a token",
    ("add_cross_attention", True): "add_cross_attention is True; the engine computes only False",
    ("is_encoder_decoder", True): "is_encoder_decoder is True; the engine computes only False",
    ("use_bidirectional_attention", True): "use_bidirectional_attention is True; the engine computes only",
    ("use_bidirectional_attention", "all"): "'all'; the engine computes causal attention alone",
    ("vocab_size", 261): "inputs of layers of width 16 for 260 of 261 tokens",
}


@pytest.mark.parametrize("family", TINY)
def test_a_changed_field_changes_both_or_is_refused(family: str, tmp_path: Path) -> None:
    tried = set()
    for index, (name, value) in enumerate(perturbations(family)):
        model = built(family, {name: value})
        if model is None:
            continue
        tried.add(name)
        found = difference(model, tmp_path / str(index))
        if isinstance(found, float):
            assert found < 1e-4, (name, value)
        else:
            assert (name, value) in REFUSED, (name, value, found)
            assert REFUSED[name, value] in found
    assert tried == {name for name, _ in perturbations(family)}


EXTRA = {
    "sliding_window": 4,
    "layer_types": ["sliding_attention"] * 2,
    "attention_chunk_size": 4,
    "final_logit_softcapping": 5.0,
    "attn_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 7,
    "use_bidirectional_attention": True,
    "scale_attn_weights": False,
    "use_parallel_residual": True,
    "partial_rotary_factor": 0.5,
}


def test_fields_of_other_families_say_nothing(tmp_path: Path) -> None:
    model = tiny("llama")
    assert difference(model, tmp_path) < 1e-4
    before = engine.load(tmp_path, device="cpu").logits(IDS)
    changed_config(tmp_path, lambda config: config.update(EXTRA))
    assert torch.equal(engine.load(tmp_path, device="cpu").logits(IDS), before)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits_of(reloaded, IDS), before, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"is_causal": False}, "is_causal is False; the engine computes only True"),
        ({"per_layer_config": {"1": {"intermediate_size": 32}}}, "the engine computes only None"),
    ],
)
def test_what_transformers_obeys_undeclared_is_refused(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    changed_config(tmp_path, lambda config: config.update(extra))
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("family", "field"), [("llama", "attention_bias"), ("llama", "mlp_bias"), ("glm", "attention_bias")]
)
def test_biases_that_the_configuration_excludes_are_not_added(family: str, field: str, tmp_path: Path) -> None:
    tiny(family, **{field: True}).save_pretrained(tmp_path)
    changed_config(tmp_path, lambda config: config.update({field: False}))
    with pytest.raises(CheckpointError, match=r"do not belong to .*bias"):
        engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_the_file_is_tied_where_it_is_the_embedding(same: bool, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    if same:
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    model.save_pretrained(tmp_path)
    changed_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    got = engine.load(tmp_path, device="cpu").logits(IDS)
    torch.testing.assert_close(got, logits_of(reloaded, IDS), atol=2e-5, rtol=1e-4)


def test_fields_of_chatglm_that_are_not_computed_are_refused(tmp_path: Path) -> None:
    for field, value in {"rmsnorm": False, "post_layer_norm": False, "pre_seq_len": 8, "interleaved_qkv": True}.items():
        TinyChatGLM(True).save(tmp_path)
        changed_config(tmp_path, lambda config, field=field, value=value: config.update({field: value}))
        with pytest.raises(CheckpointError, match=f"{field} is {value}"):
            engine.load(tmp_path, device="cpu")
