"""Tiny real models for tests to quantize: every family in the README, each with a few tens of thousands of weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from lowbit.calibrate.data import CalibrationSet

VOCABULARY = 260  # one token per byte, three special ones, and one spare
SPECIALS = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
GATED = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 1024}

# Family -> transformers' configuration class and its arguments.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GATED | {"head_dim": 16}),
    "mistral": ("MistralConfig", GATED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", GATED),
    "qwen3": ("Qwen3Config", GATED | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", GATED | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", GATED | {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 8}),
    "phi3": ("Phi3Config", GATED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "eos_token_id": 257},
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON | {"intermediate_size": 96, "max_position_embeddings": 1024}),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 1024}),
    "falcon_7b": ("FalconConfig", COMMON),
    "falcon_40b": ("FalconConfig", COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "mixtral": ("MixtralConfig", GATED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        GATED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}
FAMILIES = tuple(CONFIGS)

# Families whose blocks get more than hidden states, masks and positions: an embedding per layer, shared keys
# and values, several streams, another block's choice of positions.
FOUR = GATED | {"head_dim": 16, "num_hidden_layers": 4}
KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8, "num_kv_shared_layers": 2}
PER_LAYER = KINDS | {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
INDEXED = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "index_topk": 4,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "indexer_types": ["full", "shared"] * 2,
}
CONNECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": ("Gemma4TextConfig", FOUR | PER_LAYER | {"per_layer_config": {}}),
    "gemma3n": ("Gemma3nTextConfig", FOUR | PER_LAYER | {"intermediate_size": [96] * 4, "laurel_rank": 16}),
    "glm_moe_dsa": ("GlmMoeDsaConfig", FOUR | INDEXED),
}

# Families with special cases elsewhere: a linear with one output, weights stored before their inputs, experts beside a
# feed-forward of all tokens, each with norms of its own, experts chosen by token ids, and names that transformers does
# not rename.
BESIDE = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        GATED | {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    ),
    "jamba": (
        "JambaConfig",
        GATED | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_dt_rank": 32},
    ),
    "gemma4_moe": ("Gemma4TextConfig", FOUR | BESIDE),
    "deepseek_v4": ("DeepseekV4Config", GATED | INDEXED | {"head_dim": 16, "o_groups": 2, "o_lora_rank": 32}),
}


def readable(config: Any) -> Any:
    """`config`, whose fields may be read though some layers have others (Gemma 4)."""
    for each in (config, config.get_text_config()):
        if hasattr(each, "allow_global_per_layer_attribute_access"):
            each.allow_global_per_layer_attribute_access = True
    return config


def make_config(family: str, **changes: Any) -> Any:
    """The tiny configuration of a family."""
    name, values = (CONFIGS | CONNECTED | UNUSUAL)[family]
    return getattr(transformers, name)(**values | changes)


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights; norms and biases are random too, so that nothing cancels by being one or zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.1 * noise) if parameter.ndim == 1 else parameter.add_(0.05 * noise)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and <s>, </s> and <pad> after them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, *SPECIALS])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(model: PreTrainedModel, directory: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """`model` as a checkpoint with a tokenizer, a chat template and a generation config; returns `directory`."""
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    GenerationConfig(bos_token_id=256, eos_token_id=257, max_length=64).save_pretrained(directory)
    return directory


def save_family(family: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model of `family` saved in `directory`."""
    return save(make_model(family, **changes), directory, dtype)


def calibration(samples: int = 8, length: int = 24, seed: int = 1) -> CalibrationSet:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return CalibrationSet(torch.randint(0, 256, (samples, length), generator=generator), "random")


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits in float32, without a cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def changed_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit config.json of a model directory in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
