"""The families the engine knows: one row each, names as data and a configuration read into an Architecture.

A configuration is transformers' own object where transformers knows the family, else config.json's fields as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lowbit.engine.architecture import Architecture, Layer, Names, Rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


@dataclass(frozen=True)
class Family:
    """How a family's files are read. `own_config`: transformers has no class for its config.json."""

    name: str
    names: Names
    architecture: Callable[[Any, int], Architecture]
    own_config: bool = False


class UnknownActivation(ValueError):
    """An activation function that no operator computes."""


def activation_of(name: str, gated: bool) -> str:
    """The operators' name of an activation. UnknownActivation names the known ones."""
    found = ACTIVATIONS.get(name)
    if found is None or (gated and found not in ("silu", "gelu_tanh")) or (not gated and found == "silu"):
        raise UnknownActivation(f"activation {name!r} is not computed here; known: {', '.join(ACTIVATIONS)}")
    return f"{found}_mul" if gated else found


def plain_frequencies(dims: int, theta: float) -> Tensor:
    """theta^(-2 j / dims) for the dims / 2 pairs, float32 as transformers computes them."""
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)


def rope_of(config: Any, dims: int, context: int, kind: str | None = None, adjacent: bool = False) -> Rope:
    """The rotary embedding of `config` for `context` positions; `kind` where layers differ (Gemma 3)."""
    parameters = config.rope_parameters
    if kind is not None and kind in parameters:
        parameters = parameters[kind]
    rule = parameters.get("rope_type", "default")
    if rule == "default":
        return Rope(plain_frequencies(dims, parameters["rope_theta"]), adjacent=adjacent)
    arguments = {"layer_type": kind} if kind is not None and kind in config.rope_parameters else {}
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rule](config, torch.device("cpu"), seq_len=context, **arguments)
    return Rope(frequencies, float(scaling), adjacent)


NO_ROPE = Rope(torch.empty(0))


def llama(config: Any, context: int) -> Architecture:
    """Llama 2 and 3, and what departs from them in a few numbers: the other readers start here."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = config.rope_parameters
    dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    rope = rope_of(config, dims, context, adjacent=config.model_type.startswith("glm"))
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    layers = tuple(Layer(window if kind == "sliding_attention" else None, rope) for kind in kinds)
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        layers=layers,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=activation_of(config.hidden_act, gated=True),
        softmax_scale=head_dim**-0.5,
        tied=bool(config.tie_word_embeddings),
    )


def gemma(config: Any, context: int) -> Architecture:
    """Gemma 2 and 3: scaled embeddings, norms after the products too, softcaps, two ropes (Gemma 3)."""
    config = config.get_text_config()
    ropes = {kind: rope_of(config, config.head_dim, context, kind) for kind in set(config.layer_types)}
    windows = {"sliding_attention": config.sliding_window, "full_attention": None}
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layers=tuple(Layer(windows[kind], ropes[kind]) for kind in config.layer_types),
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        norm_offset=1.0,
        activation=activation_of(config.hidden_activation, gated=True),
        softmax_scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
        logit_softcap=config.final_logit_softcapping,
        embedding_scale=math.sqrt(config.hidden_size),
        tied=bool(config.tie_word_embeddings),
    )


def gpt2(config: Any, context: int) -> Architecture:
    """GPT-2, and CodeGeeX's shape: learned positions, LayerNorm, one product before the activation."""
    head_dim = config.n_embd // config.n_head
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.n_embd,
        inner=config.n_inner or 4 * config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        layers=(Layer(None, NO_ROPE),) * config.n_layer,
        max_positions=config.n_positions,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=activation_of(config.activation_function, gated=False),
        softmax_scale=head_dim**-0.5,
        positions=True,
        tied=bool(config.tie_word_embeddings),
    )


def gptj(config: Any, context: int) -> Architecture:
    """GPT-J: one norm for attention and MLP side by side, adjacent pairs turned."""
    rope = Rope(plain_frequencies(config.rotary_dim or config.n_embd // config.n_head, 10000.0), adjacent=True)
    return replace(gpt2(config, context), layers=(Layer(None, rope),) * config.n_layer, positions=False, parallel=True)


def gpt_neox(config: Any, context: int) -> Architecture:
    """GPT-NeoX and Pythia: attention and MLP side by side, each with its norm, a quarter of each head turned."""
    head_dim = config.hidden_size // config.num_attention_heads
    dims = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        layers=(Layer(None, rope_of(config, dims, context)),) * config.num_hidden_layers,
        max_positions=config.max_position_embeddings,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        activation=activation_of(config.hidden_act, gated=False),
        parallel=bool(config.use_parallel_residual),
        softmax_scale=head_dim**-0.5,
        tied=bool(config.tie_word_embeddings),
    )


def chatglm(config: Any, context: int) -> Architecture:
    """ChatGLM2-6B, ChatGLM3 and GLM-4 in their own files: two heads of k and v, half of each head turned."""
    head_dim = config.kv_channels
    rope = Rope(plain_frequencies(head_dim // 2, 10000.0 * getattr(config, "rope_ratio", 1)), adjacent=True)
    return Architecture(
        family="chatglm",
        vocabulary=config.padded_vocab_size,
        hidden=config.hidden_size,
        inner=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.multi_query_group_num if config.multi_query_attention else config.num_attention_heads,
        head_dim=head_dim,
        layers=(Layer(None, rope),) * config.num_layers,
        max_positions=config.seq_length,
        norm_eps=config.layernorm_epsilon,
        softmax_scale=head_dim**-0.5,
    )


def with_head_norms(names: Names) -> Names:
    """`names` of a family that norms the heads of q and k."""
    return replace(names, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


LLAMA = Names()
GEMMA2 = replace(
    LLAMA,
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
GEMMA3 = with_head_norms(GEMMA2)
GEMMA3_WITH_IMAGES = replace(
    GEMMA3,
    embedding="language_model.model.embed_tokens",
    layer="language_model.model.layers.{}.",
    norm="language_model.model.norm",
    head="language_model.lm_head",
    others=("vision_tower.", "multi_modal_projector."),
)
GLM = replace(LLAMA, up=("mlp.gate_up_proj",))
GPT2 = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{}.",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    mlp_norm="ln_2",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    norm="transformer.ln_f",
    transposed=True,
)
GPTJ = replace(
    GPT2,
    positions=None,
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    o="attn.out_proj",
    mlp_norm=None,
    up=("mlp.fc_in",),
    down="mlp.fc_out",
    transposed=False,
)
NEOX = Names(
    embedding="gpt_neox.embed_in",
    layer="gpt_neox.layers.{}.",
    qkv=("attention.query_key_value",),
    per_head=True,
    o="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
)
CHATGLM = Names(
    embedding="transformer.embedding.word_embeddings",
    layer="transformer.encoder.layers.{}.",
    qkv=("self_attention.query_key_value",),
    o="self_attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    norm="transformer.encoder.final_layernorm",
    head="transformer.output_layer",
)

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", LLAMA, llama),
        Family("mistral", LLAMA, llama),
        Family("qwen2", LLAMA, llama),
        Family("qwen3", with_head_norms(LLAMA), llama),
        Family("gemma2", GEMMA2, gemma),
        Family("gemma3_text", GEMMA3, gemma),
        Family("gemma3", GEMMA3_WITH_IMAGES, gemma),
        Family("phi3", replace(GLM, qkv=("self_attn.qkv_proj",)), llama),
        Family("gpt2", GPT2, gpt2),
        Family("gptj", GPTJ, gptj),
        Family("gpt_neox", NEOX, gpt_neox),
        Family("glm", GLM, llama),
        Family(
            "glm4",
            replace(GLM, attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm"),
            llama,
        ),
        Family("chatglm", CHATGLM, chatglm, own_config=True),
    )
}
