"""Tiny random models of transformers' causal and image-text types: the default configuration of each class, shrunk.

A default is shrunk by what its fields are called and by their kind: a size becomes the one below, a list with an entry
for each layer keeps every kind of layer once, sections of rotary positions are shared out anew. EXCEPTIONS has what
that leaves inconsistent.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.builders import save

VOCABULARY = 320  # the tokenizer's 260, and tokens that stand for images behind them
HIDDEN, HEADS, HEAD = 64, 4, 16
DEEPEST = 4  # layers, where there are so many kinds of them

Fields = dict[str, Any]


def _named(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


WIDTHS: dict[str, int] = (
    _named(HIDDEN, "hidden_size n_embd d_model word_embed_proj_dim lru_width embedding_size text_hidden_size")
    | _named(128, "intermediate_size ffn_dim n_inner attention_hidden_size dense_intermediate_size d_ff mamba_d_ssm")
    | _named(128, "ffn_hidden_size decoder_ffn_dim")
    | _named(HEAD, "head_dim kv_channels attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim")
    | _named(
        HEAD, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_d_state mamba_head_dim"
    )
    | _named(HEAD, "ssm_state_size state_size swa_head_dim swa_v_head_dim global_head_dim d_kv")
    | _named(64, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_hidden_size")
    | _named(64, "expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size")
    | _named(32, "q_lora_rank kv_lora_rank o_lora_rank index_head_dim hidden_size_per_layer_input")
)
TEXT: dict[str, int] = (
    WIDTHS
    | _named(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size")
    | _named(2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers")
    | _named(
        HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads index_n_heads linear_num_heads"
    )
    | _named(
        2, "num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_k top_k_experts moe_topk"
    )
    | _named(2, "num_experts_per_token mamba_expand expand")
    | _named(16, "mamba_chunk_size chunk_size block_size index_topk laurel_rank time_step_rank mamba_dt_rank")
    | _named(1024, "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length max_sequence_length")
    | _named(4, "num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads conv_kernel")
    | _named(1, "n_group topk_group first_k_dense_replace num_dense_layers n_shared_experts mamba_n_groups n_groups")
    | _named(32, "sliding_window attention_window_size attention_chunk_size")
    | _named(8, "mamba_n_heads mamba_num_heads")
    | _named(0, "num_nextn_predict_layers num_mtp_layers mtp_num_hidden_layers pad_token_id num_kv_shared_layers")
    | {"bos_token_id": 1, "eos_token_id": 2}
)
VISION_WIDTHS: dict[str, int] = (
    _named(48, "hidden_size embed_dim d_model projection_dim encoder_hidden_size")
    | _named(96, "intermediate_size encoder_ffn_dim ffn_dim")
    | _named(12, "head_dim")
    | _named(
        HIDDEN, "out_hidden_size output_dim vision_output_dim projector_input_dim projector_output_dim text_hidden_size"
    )
)
VISION: dict[str, int] = (
    VISION_WIDTHS
    | _named(2, "num_hidden_layers depth num_layers encoder_layers mlp_ratio")
    | _named(4, "num_attention_heads num_heads encoder_attention_heads num_key_value_heads")
    | _named(28, "image_size img_size")
    | _named(14, "patch_size")
    | _named(16, "num_position_embeddings")
    | _named(1, "num_global_layers temporal_patch_size")
    | _named(3, "num_channels in_channels in_chans")
)
GROWING = {*WIDTHS, *VISION_WIDTHS, "mrope_section", "qk_head_dim"}  # grow with the width
LISTS: Fields = {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 1], "out_indices": None}
IMAGE_TOKENS = (
    *("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    *("audio_token_id", "boi_token_id", "eoi_token_id", "image_start_token_id", "image_end_token_id", "boa_token_id"),
    *("eoa_token_id", "video_start_token_id", "video_end_token_id"),
)
TEXT_PARTS = ("text_config", "llm_config", "thinker_config", "language_config", "qformer_config", "decoder")

# Fields that shrinking leaves inconsistent, by type: fields of the configuration, or of one inside it.
FULL_ROTARY, HALF_ROTARY = (
    {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": part,
            "mrope_section": cut,
        }
    }
    for part, cut in ((1.0, [2, 3, 3]), (0.5, [1, 1, 2]))
)
WITH_SECTIONS = (
    "glm46v",
    "glm4v",
    "glmga",
    "glm_ocr",
    "paddleocr_vl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_omni_thinker",
)
TWO_LINEAR = {"layer_types": ["linear_attention", "linear_attention"]}
EXCEPTIONS: dict[str, Fields] = {kind: {"text_config": FULL_ROTARY} for kind in WITH_SECTIONS} | {
    "gemma3": {"mm_tokens_per_image": 4},
    "glm4v_moe": {"text_config": HALF_ROTARY},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "hunyuan_vl": {"text_config": {"head_dim": HEAD}},
    "ministral": {"head_dim": HEAD, "num_key_value_heads": 2},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
    "mistral4": {"num_key_value_heads": HEADS, "qk_head_dim": 2 * HEAD},
    "mamba2": {"num_heads": 8, "head_dim": HEAD},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "qwen4_exp_text": TWO_LINEAR,
    "qwen4_exp": {"text_config": TWO_LINEAR},
    "zaya": {"num_experts_per_tok": 1},
    "step3p7": {"text_config": {"sliding_window": 32}},
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY - 20}},
    "emu3": {"vocabulary_map": {"<image>": VOCABULARY - 20}},
}


def types() -> list[str]:
    """Every type that transformers has a causal or an image-text class for, by name."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def tiny_config(kind: str, times: int = 1, **changes: Any) -> Any:
    """The tiny configuration of a type, every width `times` what it is by default, then with `changes`."""
    cls = CONFIG_MAPPING[kind]
    default = cls().to_dict()
    parts = {name: part for name, part in (cls.sub_configs or {}).items() if default.get(name) or name in TEXT_PARTS}
    fields = _shrunk({key: value for key, value in default.items() if key not in parts}, TEXT)
    for name, part in parts.items():
        inner = default.get(name) or part().to_dict()
        named = CONFIG_MAPPING[inner["model_type"]] if inner.get("model_type") in CONFIG_MAPPING else part
        fields[name] = _shrunk(named().to_dict(), TEXT if name in TEXT_PARTS else VISION)
        if inner.get("model_type"):
            fields[name]["model_type"] = inner["model_type"]
    for place, token in enumerate(name for name in IMAGE_TOKENS if default.get(name) is not None):
        fields[token] = VOCABULARY - 20 + place
    return cls(**_merged(_wider(_merged(fields, EXCEPTIONS.get(kind, {})), times), changes))


def _wider(value: Any, times: int, grows: bool = False) -> Any:
    """`value` with the numbers in it that are widths `times` as large."""
    if isinstance(value, dict):
        return {key: _wider(inner, times, key in GROWING) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_wider(inner, times, grows) for inner in value)
    return value * times if grows and isinstance(value, int | float) else value


def _merged(fields: Fields, changes: Fields) -> Fields:
    """`fields` with `changes`, dicts inside them merged alike; a change to None takes a field away."""
    merged = dict(fields)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return {key: value for key, value in merged.items() if value is not None}


def _shrunk(default: Fields, sizes: dict[str, int]) -> Fields:
    """The fields of a default configuration that shrinking changes."""
    deep = next((default[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if default.get(name)), 0)
    fields = {name: _like(default[name], size) for name, size in sizes.items() if default.get(name) is not None}
    fields |= {name: value for name, value in LISTS.items() if default.get(name) is not None and value is not None}
    if default.get("kv_lora_rank") is not None and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    each = {name: value for name, value in default.items() if isinstance(value, list) and len(value) == deep > 2}
    kinds = [list(dict.fromkeys(value)) for name, value in each.items() if name.endswith("types")]
    layers = min(max([2, *map(len, kinds)]), DEEPEST)
    if each:
        fields["num_hidden_layers"] = layers
    for name, value in each.items():
        distinct = (
            list(dict.fromkeys(value)) if name.endswith("types") else [_like(v, sizes.get(name, v)) for v in value]
        )
        fields[name] = (distinct * layers)[:layers]
    rotary = default.get("rope_parameters")
    if isinstance(rotary, dict) and "mrope_section" in rotary:
        fields["rope_parameters"] = rotary | {"mrope_section": _sections(rotary)}
    return fields


def _like(default: Any, size: Any) -> Any:
    """`size` as a value of the kind that `default` is."""
    if isinstance(default, list | tuple):
        return type(default)(_like(item, size) for item in default)
    return float(size) if isinstance(default, float) and not isinstance(size, list) else size


def _sections(rotary: Fields) -> list[int]:
    """The pairs of rotary channels shared out among as many sections as there were."""
    count = len(rotary["mrope_section"])
    pairs = int(HEAD * rotary.get("partial_rotary_factor", 1.0)) // 2
    return [pairs // count + (place >= count - pairs % count) for place in range(count)]


def tiny_size(kind: str) -> int:
    """The number of parameters the tiny model of a type has; some classes have parts that no configuration shrinks."""
    with init_empty_weights():
        return sum(parameter.numel() for parameter in _unwritten(kind).parameters())


def _unwritten(kind: str, **changes: Any) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else AutoModelForCausalLM
    return auto.from_config(tiny_config(kind, **changes), dtype=torch.float32).eval()


def tiny_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a type, whose products have unit variance and whose norms and biases are random too."""
    torch.manual_seed(seed)
    model = _unwritten(kind, **changes)
    disturb(model, seed)
    return model


@torch.no_grad()
def disturb(model: nn.Module, seed: int) -> None:
    """Give every parameter values that do not cancel; decays and steps of state spaces keep those they came with."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("A_log", "dt_bias", ".D", "time_", "conv1d")):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(0.5 * noise if "embed" in name or "wte" in name else noise / parameter.shape[-1] ** 0.5)


def save_tiny(kind: str, directory: Path, **changes: Any) -> Path:
    """A tiny random model of a type, with `changes`, saved in `directory`."""
    return save(tiny_model(kind, **changes), directory)
