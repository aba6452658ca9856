"""The engine's configurations read published files as transformers' classes do."""

from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import transformers

from lowbit.engine.architecture import Architecture, Rope
from lowbit.engine.families import FAMILIES, NO_ROPE
from lowbit.engine.fields import Fields
from tests.builders import readable

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LATENT_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
# The forms in which files of different ages say the same, with the sizes of published models where they matter.
FILES: dict[str, dict[str, Any]] = {
    "llama 2": {"model_type": "llama", "num_key_value_heads": 32, "rope_scaling": None, "torch_dtype": "float16"},
    "llama 3.1": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    "llama, longer": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama, dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama, new": {"model_type": "llama", "rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    "mistral 0.2": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "mistral 0.1": {"model_type": "mistral", "sliding_window": 4096},
    "qwen 2.5": {"model_type": "qwen2", "num_key_value_heads": 4, "use_sliding_window": False, "rope_theta": 1e6},
    "qwen 2, windows": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3},
    "qwen, yarn": {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
    "qwen 3": {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6, "max_window_layers": 36},
    "qwen 3, moe": {"model_type": "qwen3_moe", "num_local_experts": 16, "mlp_only_layers": [1]},
    "qwen 2, moe": {"model_type": "qwen2_moe", "use_sliding_window": True, "max_window_layers": 5},
    "mixtral": {"model_type": "mixtral", "num_experts": 4},
    "phi 3": {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [1.3] * 48},
    },
    "phi 4 mini": {"model_type": "phi3", "partial_rotary_factor": 0.75, "hidden_size": 3072, "num_attention_heads": 24},
    "phi, moe": {
        "model_type": "phimoe",
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.1] * 64,
            "long_factor": [2.0] * 64,
            "short_mscale": 1.2,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 4096,
        },
    },
    "deepseek v2 lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "num_experts_per_tok": 6,
        "rope_scaling": LATENT_YARN | {"original_max_position_embeddings": 4096},
        "max_position_embeddings": 163840,
    },
    "deepseek v3": {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1, "rope_scaling": LATENT_YARN},
    "gpt-oss": {"model_type": "gpt_oss"},
    "glm 4.5": {"model_type": "glm4_moe", "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 2},
    "gemma 2": {"model_type": "gemma2", "cache_implementation": "hybrid"},
    "gemma 3, text": {
        "model_type": "gemma3_text",
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 5000.0,
    },
    "gemma 3, new": {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "gemma 3": {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 7}},
    "gemma 4, 26b": {
        "model_type": "gemma4_text",
        "hidden_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
    },
    "gemma 4, e2b": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "num_kv_shared_layers": 5,
        "use_double_wide_mlp": True,
        "num_key_value_heads": 1,
    },
    "gemma 4, new": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 2,
        "per_layer_config": {"1": {"head_dim": 128, "num_key_value_heads": 1}},
    },
    "gemma 4": {"model_type": "gemma4", "text_config": {"num_hidden_layers": 8, "global_head_dim": 128}},
    "gemma 4 12b": {"model_type": "gemma4_unified", "text_config": {"hidden_size": 3840}},
    "gemma 4 12b, text": {"model_type": "gemma4_unified_text", "num_hidden_layers": 7},
    "gpt 2": {"model_type": "gpt2", "n_ctx": 1024, "hidden_size": 512, "num_hidden_layers": 3},
    "gpt j": {"model_type": "gptj", "rotary": True, "rotary_dim": 64},
    "pythia": {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 5000, "hidden_size": 512},
    "glm": {"model_type": "glm"},
    "glm 4": {"model_type": "glm4", "partial_rotary_factor": 0.25},
    "olmoe": {"model_type": "olmoe"},
}


def as_transformers(plain: dict[str, Any]) -> Architecture:
    """The architecture that the family's reader gives for transformers' own configuration."""
    config = readable(transformers.CONFIG_MAPPING[plain["model_type"]](**deepcopy(plain)))
    return FAMILIES[plain["model_type"]].architecture(Fields(config))


def as_ours(plain: dict[str, Any]) -> Architecture:
    family = FAMILIES[plain["model_type"]]
    read = Fields(family.config.read(plain))
    architecture = family.architecture(read)
    read.refuse_unread()
    return architecture


def frequencies(rope: Rope) -> list[torch.Tensor]:
    return [rope.frequencies, *([] if rope.long is None else [rope.long])]


def without_ropes(architecture: Architecture) -> Architecture:
    """An architecture that can be compared."""
    return replace(architecture, layers=tuple(replace(layer, rope=NO_ROPE) for layer in architecture.layers))


@pytest.mark.parametrize("file", FILES)
def test_files_of_all_ages_mean_what_they_mean_to_transformers(file: str) -> None:
    ours, theirs = as_ours(FILES[file]), as_transformers(FILES[file])
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert (one.rope.scaling, one.rope.adjacent, one.rope.short) == pytest.approx(
            (other.rope.scaling, other.rope.adjacent, other.rope.short), abs=1e-12
        )
        for mine, reference in zip(frequencies(one.rope), frequencies(other.rope), strict=True):
            torch.testing.assert_close(mine, reference, atol=0, rtol=2e-7)
    assert without_ropes(ours) == without_ropes(theirs)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"chatglm", "mimo"}))
def test_a_file_without_fields_has_the_values_of_transformers(kind: str) -> None:
    assert kind in {plain["model_type"] for plain in FILES.values()}
    theirs = readable(transformers.CONFIG_MAPPING[kind]())
    ours = FAMILIES[kind].config.read({"model_type": kind})
    resolved = {"rope_parameters", "text_config", *(["head_dim"] if getattr(ours, "head_dim", 0) is None else [])}
    same = {field.name for field in fields(ours)} & set(vars(theirs)) - resolved
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
