"""Hyperparameters: the keys of GGUF from a model's config.json, and the settings that llama.cpp computes otherwise.

Every setting that changes a result is written, or is refused if the architecture in llama.cpp has no key for it:
without the key it would compute another model.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.gguf.families import Family

LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}  # blocks of the 27B models, for which llama.cpp scales queries otherwise
GEMMA_PERIOD = {"gemma2": 2, "gemma3": 6}  # blocks until the next one with full attention
MOST_LAYERS, MOST_EXPERTS, WIDEST_HEAD = 1 << 14, 1 << 14, 1 << 16  # far above any model: lists of so many are made
U32, LARGEST = 1 << 32, 3.4e38  # the keys' integers are below, and their float32 not above
# Errors of settings that have the wrong type or size.
UNFIT = (AttributeError, KeyError, TypeError, ValueError, ArithmeticError, IndexError, RuntimeError)
YARN: dict[str, Any] = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # llama.cpp's, which no key changes
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def head_dim_of(config: Mapping[str, Any]) -> int:
    """The width of an attention head."""
    return _at_most(WIDEST_HEAD, "inputs of a head", int(config.get("head_dim") or _width(config) // _heads(config)))


def heads_of(config: Mapping[str, Any], part: str) -> int:
    """The number of heads among the rows of `attn_q` or `attn_k`."""
    return _heads(config) if part == "attn_q" else int(config.get("num_key_value_heads") or _heads(config))


def query_scalar_of(config: Mapping[str, Any], arch: str) -> int:
    """The number whose inverse root llama.cpp scales Gemma's queries by."""
    large = layers_of(config) == LARGE_GEMMA[arch]
    return _width(config) // _heads(config) if large else head_dim_of(config)


def experts_of(config: Mapping[str, Any]) -> int:
    """The number of experts in a layer; 0 without any."""
    return _at_most(MOST_EXPERTS, "experts", int(config.get("num_local_experts") or config.get("num_experts") or 0))


def layers_of(config: Mapping[str, Any]) -> int:
    """The number of blocks."""
    count = int(config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"])
    return _at_most(MOST_LAYERS, "blocks", count)


def _at_most(most: int, what: str, count: int) -> int:
    """`count`. ValueError for a number that no model has."""
    if not 0 <= count <= most:
        raise ValueError(f"{count} {what}; 0 to {most} are read")
    return count


def _heads(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] if "num_attention_heads" in config else config["n_head"])


def _width(config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"] if "hidden_size" in config else config["n_embd"])


def hyper_keys(config: Mapping[str, Any], family: Family) -> dict[str, int | float | str | bool]:
    """The keys of a model and their values. CheckpointError for a setting that llama.cpp does not compute."""
    try:
        _require_computed(config, family)
        keys = {f"{family.arch}.{key}": value for key, value in _keys(config, family) if value is not None}
        for key, value in keys.items():
            if isinstance(value, int) and not 0 <= value < U32:
                raise ValueError(f"{key} is {value}; 0 to {U32 - 1} fit")
            if isinstance(value, float) and not abs(value) <= LARGEST:
                raise ValueError(f"{key} is {value}, which is no float32")
        return keys
    except UNFIT as error:
        raise CheckpointError(f"config.json: no GGUF can be written of it ({error!r})") from error


def _keys(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, int | float | str | bool | None]]:
    gpt2 = family.arch == "gpt2"
    width = _width(config)
    yield "context_length", int(config["n_positions" if gpt2 else "max_position_embeddings"])
    yield "embedding_length", width
    yield "block_count", layers_of(config)
    yield "feed_forward_length", int((config.get("n_inner") or 4 * width) if gpt2 else config["intermediate_size"])
    yield "attention.head_count", _heads(config)
    if gpt2:
        yield "attention.layer_norm_epsilon", float(config["layer_norm_epsilon"])
        return
    yield "attention.head_count_kv", heads_of(config, "attn_k")
    yield "attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"])
    yield "attention.key_length", head_dim_of(config)
    yield "attention.value_length", head_dim_of(config)
    yield "vocab_size", int(config["vocab_size"])
    yield from _rope_keys(config, family)
    yield from _expert_keys(config, family)
    if family.arch in ("gemma2", "gemma3", "phi3"):
        yield "attention.sliding_window", int(config.get("sliding_window") or 0)
    for theirs in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = config.get(theirs)
        yield theirs, None if cap is None else float(cap)


def _expert_keys(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, int | None]]:
    if not experts_of(config):
        return
    yield "expert_count", experts_of(config)
    yield "expert_used_count", int(config["num_experts_per_tok"])
    yield "expert_feed_forward_length", config.get("moe_intermediate_size")
    yield "expert_shared_feed_forward_length", config.get("shared_expert_intermediate_size")


def rope_of(config: Mapping[str, Any], kind: str = "full_attention") -> dict[str, Any]:
    """The settings of the rotary embedding, from config.json as transformers writes it now or wrote it before."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    found = {"rope_theta": config.get("rope_theta", 10000.0)} | old | new.get(kind, new)
    return found | {"rope_type": found.get("rope_type", found.get("type", "default"))}


def _rope_keys(config: Mapping[str, Any], family: Family) -> Iterator[tuple[str, int | float | str | None]]:
    rope, kind = rope_of(config), rope_of(config)["rope_type"]
    yield "rope.freq_base", float(rope["rope_theta"])
    yield "rope.dimension_count", int(rope.get("partial_rotary_factor", 1.0) * head_dim_of(config))
    if kind == "linear":
        yield "rope.scaling.type", "linear"
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield "rope.scaling.type", "yarn"
        yield "rope.scaling.factor", float(rope["factor"])
        yield "rope.scaling.original_context_length", int(_original_length(config, rope))
        yield "rope.scaling.attn_factor", _yarn_factor(rope)
    if kind == "longrope":
        before, after = _original_length(config, rope), config["max_position_embeddings"]
        yield "rope.scaling.original_context_length", int(before)
        stretched = 1 + math.log(max(after / before, 1.0)) / math.log(before)
        yield "rope.scaling.attn_factor", float(rope.get("attention_factor") or math.sqrt(stretched))
    if family.arch == "gemma3":
        yield "rope.freq_base_swa", float(_local_base(config))


def _yarn_factor(rope: Mapping[str, Any]) -> float | None:
    """The factor of cosines and sines beside yarn's usual one, 0.1 ln(factor) + 1; None if there is no other."""
    usual, factor = _stretched(rope["factor"], 1.0), rope.get("attention_factor")
    if factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        factor = _stretched(rope["factor"], rope["mscale"]) / _stretched(rope["factor"], rope["mscale_all_dim"])
    return None if factor is None else float(factor) / usual


def _stretched(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _local_base(config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding in blocks with a sliding window."""
    if "rope_local_base_freq" in config:
        return float(config["rope_local_base_freq"])
    return float(rope_of(config, "sliding_attention")["rope_theta"])


def _original_length(config: Mapping[str, Any], rope: Mapping[str, Any]) -> Any:
    return rope.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings", config["max_position_embeddings"]
    )


def rope_tensors(config: Mapping[str, Any], family: Family) -> dict[str, Tensor]:
    """Factors of the rotary embedding's frequencies that llama.cpp reads as tensors, float32; empty for most models."""
    rope, kind = rope_of(config), rope_of(config)["rope_type"]
    if family.arch == "gpt2" or kind not in ("llama3", "longrope"):
        return {}
    if kind == "longrope":
        both = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return {f"rope_factors_{key}.weight": torch.tensor(values, dtype=torch.float32) for key, values in both.items()}
    width = head_dim_of(config)
    lengths = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    before, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    # 1 for waves much shorter than the original context, the factor for longer ones, smooth between them
    share = ((before / lengths - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - share) / rope["factor"] + share)).float()}


def caveat_of(config: Mapping[str, Any], family: Family) -> str | None:
    """A warning about a model that llama.cpp computes otherwise beyond some length of a text, or None."""
    window = config.get("sliding_window")
    if family.arch not in ("llama", "phi3") or not window or window >= config["max_position_embeddings"]:
        return None
    return (
        f"llama.cpp attends to all tokens, and the model to the last {window}: beyond that many they differ, "
        f"--ctx-size {window} keeps llama.cpp below"
    )


def _require_computed(config: Mapping[str, Any], family: Family) -> None:
    """ValueError for a setting that llama.cpp's code for the architecture does not know."""
    for reason in _reasons(config, family):
        raise ValueError(reason)


def _reasons(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    found = next((config[key] for key in ACTIVATIONS if key in config), family.activations[0])
    if found not in family.activations:
        yield f"its activation is {found}; llama.cpp computes {' or '.join(family.activations)} for {family.arch}"
    if family.arch == "gpt2":
        if config.get("scale_attn_by_inverse_layer_idx") or config.get("scale_attn_weights") is False:
            yield "its attention is scaled in a way that llama.cpp does not compute for gpt2"
        return
    kind = rope_of(config)["rope_type"]
    known = {"default", "linear", "yarn", "llama3"} if family.arch != "phi3" else {"default", "longrope"}
    if kind not in known:
        yield f"its rotary embedding is {kind!r}; written are {', '.join(sorted(known))}"
    if family.arch != "phi3" and rope_of(config).get("partial_rotary_factor", 1.0) != 1.0:
        yield f"it rotates a part of each head, which llama.cpp computes otherwise for {family.arch}"
    yield from _reasons_in_yarn(rope_of(config))
    yield from _reasons_in_shapes(config, family)
    if family.arch.startswith("qwen") and config.get("use_sliding_window"):
        yield "use_sliding_window is on, which llama.cpp does not compute for Qwen"
    yield from _reasons_in_experts(config, family)
    if family.arch in GEMMA_PERIOD:
        yield from _reasons_in_gemma(config, family)


def _reasons_in_yarn(rope: Mapping[str, Any]) -> Iterator[str]:
    """The settings of yarn that llama.cpp has no keys for in these families."""
    for key, value in YARN.items() if rope["rope_type"] == "yarn" else ():
        if rope.get(key) not in (None, value):
            yield f"{key} of its rotary embedding is {rope[key]}, llama.cpp computes {value}"


def _reasons_in_shapes(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """The shapes and tensors with which llama.cpp does not load a model of the architecture."""
    if family.arch in ("qwen2", "qwen2moe", "phi3") and head_dim_of(config) * _heads(config) != _width(config):
        yield f"its heads are {_heads(config)} of {head_dim_of(config)}, llama.cpp has {_width(config)} in all"
    tied = bool(config.get("tie_word_embeddings", family.arch.startswith("gemma")))
    if tied != (family.arch == "gemma2") and family.arch in ("qwen2moe", "gemma2"):
        yield f"its head is {'tied' if tied else 'not tied'} to the embeddings, which llama.cpp has otherwise"
    if family.arch.startswith("qwen3") and config.get("attention_bias"):
        yield f"its attention has biases, which llama.cpp does not compute for {family.arch}"


def _reasons_in_experts(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        yield "some of its blocks have no experts, which llama.cpp does not know of this architecture"
    wanted = {"qwen3moe": True, "qwen2moe": False}.get(family.arch)
    if wanted is not None and bool(config.get("norm_topk_prob", False)) != wanted:
        yield f"norm_topk_prob is {not wanted}, llama.cpp computes {wanted} for {family.arch}"


def _reasons_in_gemma(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    period, layers = GEMMA_PERIOD[family.arch], layers_of(config)
    usual = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.get("layer_types") or usual) != usual:
        yield f"its layer_types are not full attention in each {period}th block, as llama.cpp has it"
    scaled = query_scalar_of(config, family.arch)
    if config.get("query_pre_attn_scalar", scaled) != scaled:
        yield f"query_pre_attn_scalar is {config['query_pre_attn_scalar']}, llama.cpp computes {scaled}"
    local = (config.get("rope_parameters") or {}).get("sliding_attention", {})
    if local.get("rope_type", "default") != "default":
        yield "its local rotary embedding is scaled, for which GGUF has no key"
    if config.get("attention_bias") or config.get("use_bidirectional_attention"):
        yield "its attention has biases, or looks ahead, which llama.cpp does not compute"
