"""The engine's model families, one row each: tensor names, configuration, and a function from it to Architecture."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from lowbit.engine import configs
from lowbit.engine.architecture import (
    Architecture,
    LatentSizes,
    Layer,
    Mixture,
    MixtureNames,
    Names,
    Rope,
    TokenInputNames,
    TokenInputSizes,
)
from lowbit.engine.fields import Fields, NotComputed
from lowbit.engine.ropes import RULES, WHOLE_HEADS, longrope, plain_frequencies
from lowbit.quant.kernels.route_experts import Rule
from lowbit.quant.kernels.wna16_experts import Gate

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
GATED, UNGATED = ("silu", "gelu_tanh"), ("gelu", "gelu_tanh", "quick_gelu")


@dataclass(frozen=True)
class Family:
    """Rules for reading a family's files."""

    name: str
    config: type[configs.Config]
    names: Names
    architecture: Callable[[Fields], Architecture]


def activation_of(name: str, gated: bool) -> str:
    """The operators' name of an activation. NotComputed for an unknown one lists the known ones."""
    computed = GATED if gated else UNGATED
    known = [each for each, ours in ACTIVATIONS.items() if ours in computed]
    if name not in known:
        kind = "with a gate" if gated else "without a gate"
        raise NotComputed(f"activation {name!r} is not computed here; known {kind}: {', '.join(known)}")
    return f"{ACTIVATIONS[name]}_mul" if gated else ACTIVATIONS[name]


def rope_of(
    config: Fields, head_dim: int, kind: str | None = None, adjacent: bool = False, partly: bool = False
) -> Rope:
    """The rotary embedding of `config` for heads of `head_dim` inputs.

    kind      selects one if layers differ (Gemma 3)
    adjacent  as in Rope
    partly    True if rope_parameters may turn only a part of each head
    """
    parameters = config.rope_parameters
    if kind is not None and kind in parameters:
        parameters = parameters[kind]
    rule, share = parameters["rope_type"], parameters.get("partial_rotary_factor", 1.0)
    dims = head_dim if rule in WHOLE_HEADS else int(head_dim * share)
    if rule == "default":
        dims = dims if partly else head_dim
        return Rope(plain_frequencies(dims, parameters["rope_theta"]), adjacent=adjacent)
    if rule not in RULES:
        raise NotComputed(f"rope_type is {rule!r}; the engine knows default, {', '.join(RULES)}")
    if not partly and dims != head_dim:
        raise NotComputed(f"rope_parameters turn {dims} inputs of a head; this family turns {head_dim}")
    positions = config.max_position_embeddings
    frequencies, scaling = RULES[rule](parameters, dims, positions)
    if not frequencies.isfinite().all():
        raise NotComputed(f"rope_parameters {parameters} give frequencies that are no finite numbers")
    if rule != "longrope":
        return Rope(frequencies, float(scaling), adjacent)
    long, _ = longrope(parameters, dims, positions, long=True)
    return Rope(frequencies, float(scaling), adjacent, long, int(parameters["original_max_position_embeddings"]))


NO_ROPE = Rope(torch.empty(0))


def llama(config: Fields, partly: bool = False, adjacent: bool = False) -> Architecture:
    """Llama 2 and 3, and families that differ only in a few numbers.

    partly    True if rope_parameters may rotate only a part of each head
    adjacent  as in Rope
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = rope_of(config, head_dim, adjacent=adjacent, partly=partly)
    kinds = config.declared("layer_types") or ["sliding_attention"] * config.num_hidden_layers
    window = config.declared("sliding_window")
    scale = head_dim**-0.5
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        layers=tuple(Layer(window if kind == "sliding_attention" else None, rope, scale) for kind in kinds),
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=activation_of(config.hidden_act, gated=True),
        tied=bool(config.tie_word_embeddings),
        attention_bias=config.declared("attention_bias"),
        mlp_bias=config.declared("mlp_bias"),
    )


def mixed(architecture: Architecture, mixtures: Iterable[Mixture | None]) -> Architecture:
    """`architecture` with these experts in its layers."""
    pairs = zip(architecture.layers, mixtures, strict=True)
    return replace(architecture, layers=tuple(replace(layer, mixture=mixture) for layer, mixture in pairs))


def mixtral(config: Fields) -> Architecture:
    """Mixtral: Mistral with experts in every layer."""
    mixture = Mixture(config.num_local_experts, config.intermediate_size, Rule(config.num_experts_per_tok))
    return mixed(llama(config), [mixture] * config.num_hidden_layers)


def olmoe(config: Fields) -> Architecture:
    """OLMoE: experts in every layer, and norms over all heads of q and k."""
    rule = Rule(config.num_experts_per_tok, normalized=config.norm_topk_prob)
    mixture = Mixture(config.num_experts, config.intermediate_size, rule)
    return replace(mixed(llama(config), [mixture] * config.num_hidden_layers), joint_head_norms=True)


def qwen_moe(config: Fields) -> Architecture:
    """Qwen2-MoE and Qwen3-MoE: experts in some layers, beside them a gated feed-forward of all tokens in Qwen2's."""
    plain = llama(config)
    shared = config.declared("shared_expert_intermediate_size", 0)
    rule = Rule(config.num_experts_per_tok, normalized=config.norm_topk_prob)
    mixture = Mixture(config.num_experts, config.moe_intermediate_size, rule, shared)
    sparse = (
        index not in config.mlp_only_layers and config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
        for index in range(config.num_hidden_layers)
    )
    biased = config.declared("qkv_bias", plain.attention_bias)
    return replace(mixed(plain, [mixture if each else None for each in sparse]), attention_bias=biased)


def phimoe(config: Fields) -> Architecture:
    """Phi-MoE: LayerNorm, and two experts in turn (sparsemixer). Its longrope has its own scaling."""
    rule = Rule(config.num_experts_per_tok, scores="mixer", normalized=False, jitter=config.router_jitter_noise)
    mixture = Mixture(config.num_local_experts, config.intermediate_size, rule)
    plain = llama(config)
    parameters = config.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        scaling, long_scaling = parameters["short_mscale"], parameters["long_mscale"]
        if scaling != long_scaling:
            raise NotComputed(
                f"short_mscale is {scaling} and long_mscale {long_scaling}; the engine needs one for both"
            )
        rope = replace(plain.layers[0].rope, scaling=float(scaling))
        plain = replace(plain, layers=tuple(replace(layer, rope=rope) for layer in plain.layers))
    mixtures = [mixture] * config.num_hidden_layers
    return replace(mixed(plain, mixtures), norm="layer", head_bias=config.lm_head_bias)


def gpt_oss(config: Fields) -> Architecture:
    """gpt-oss: sinks in attention, biases everywhere, windows in every second layer, experts with a clamped gate."""
    gate = Gate("clamped_mul", config.swiglu_limit, config.swiglu_alpha)
    rule = Rule(config.num_experts_per_tok, scores="chosen", normalized=False)
    mixture = Mixture(config.num_local_experts, config.intermediate_size, rule, gate=gate)
    return mixed(llama(config), [mixture] * config.num_hidden_layers)


def sigmoid_rule(config: Fields) -> Rule:
    """A sigmoid for each expert, whose groups compete by their two best (DeepSeek-V3, GLM-4.5)."""
    return Rule(
        config.num_experts_per_tok,
        scores="sigmoid",
        normalized=bool(config.norm_topk_prob),
        scale=config.routed_scaling_factor,
        groups=config.n_group,
        used_groups=config.topk_group,
        group_best=2,
    )


def after_dense(plain: Architecture, config: Fields, rule: Rule) -> Architecture:
    """`plain` with experts behind its first dense layers, and an expert for all tokens beside them."""
    inner = config.moe_intermediate_size
    mixture = Mixture(config.n_routed_experts, inner, rule, inner * config.n_shared_experts)
    dense = config.first_k_dense_replace
    return mixed(plain, [None if index < dense else mixture for index in range(config.num_hidden_layers)])


def glm4_moe(config: Fields) -> Architecture:
    """GLM-4.5: the first layers are dense; then experts by sigmoids, and one of all tokens."""
    plain = replace(llama(config, partly=True), head_norms=bool(config.use_qk_norm), more_layers=config.num_mtp_layers)
    return after_dense(plain, config, sigmoid_rule(config))


def latent_attention(config: Fields, adjacent: bool) -> Architecture:
    """Llama with multi-head latent attention. Scores of a yarn rope are scaled by the square of its mscale_all_dim."""
    turned, parameters = config.qk_rope_head_dim, config.rope_parameters
    head_dim, scale = config.qk_nope_head_dim + turned, (config.qk_nope_head_dim + turned) ** -0.5
    every, factor = parameters.get("mscale_all_dim", 0), parameters.get("factor", 1.0)
    if parameters.get("rope_type", "default") != "default" and every and factor > 1:
        scale *= (0.1 * every * math.log(factor) + 1.0) ** 2
    rope = rope_of(config, turned, adjacent=adjacent)
    if config.num_key_value_heads != config.num_attention_heads:
        raise NotComputed(
            f"num_key_value_heads is {config.num_key_value_heads}; latent attention has one for each head"
        )
    return replace(
        llama(config),
        head_dim=head_dim,
        layers=(Layer(None, rope, scale),) * config.num_hidden_layers,
        latent=LatentSizes(config.q_lora_rank or 0, config.kv_lora_rank, turned, config.v_head_dim),
    )


def deepseek_v2(config: Fields) -> Architecture:
    """DeepSeek-V2: a softmax over all experts; with groups, a token's experts are of those with the best experts."""
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise NotComputed(f"topk_method is {config.topk_method!r}; the engine knows greedy and group_limited_greedy")
    grouped = config.n_group, config.topk_group
    groups, used = grouped if config.topk_method == "group_limited_greedy" else (1, 1)
    scale = config.routed_scaling_factor
    rule = Rule(config.num_experts_per_tok, normalized=False, scale=scale, groups=groups, used_groups=used)
    return after_dense(latent_attention(config, adjacent=True), config, rule)


def deepseek_v3(config: Fields) -> Architecture:
    """DeepSeek-V3 and R1: experts by sigmoids."""
    plain = latent_attention(config, adjacent=bool(config.rope_interleave))
    return after_dense(replace(plain, more_layers=config.num_mtp_layers), config, sigmoid_rule(config))


def gemma(config: Fields, capped: bool = True) -> Architecture:
    """Gemma 2 and 3: scaled embeddings, norms after products too, softcaps, two ropes (Gemma 3).

    capped  True to use the configuration's softcap of scores
    """
    config = config.get_text_config()
    ropes = {kind: rope_of(config, config.head_dim, kind) for kind in set(config.layer_types)}
    windows = {"sliding_attention": config.sliding_window, "full_attention": None}
    scale = config.query_pre_attn_scalar**-0.5
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layers=tuple(Layer(windows[kind], ropes[kind], scale) for kind in config.layer_types),
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        norm_offset=1.0,
        activation=activation_of(config.hidden_activation, gated=True),
        softcap=config.attn_logit_softcapping if capped else None,
        logit_softcap=config.final_logit_softcapping,
        embedding_scale=math.sqrt(config.hidden_size),
        tied=bool(config.tie_word_embeddings),
        attention_bias=config.attention_bias,
    )


def gemma4(config: Fields) -> Architecture:
    """Gemma 4: heads of other sizes in layers with full attention, where v may be k; norms on heads of v; a factor of
    each layer's output. Some have experts beside the feed-forward, some inputs of each layer's own, and last layers
    that read the keys and values of earlier ones."""
    config = config.get_text_config()
    if config.use_bidirectional_attention == "all":
        raise NotComputed("use_bidirectional_attention is 'all'; the engine computes causal attention alone")
    inputs = TokenInputSizes(
        config.declared("hidden_size_per_layer_input", 0), config.declared("vocab_size_per_layer_input", 0)
    )
    if inputs.width:
        activation_of(config.hidden_activation, gated=False)
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        layers=gemma4_layers(config),
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        activation=activation_of(config.hidden_activation, gated=True),
        logit_softcap=config.final_logit_softcapping,
        embedding_scale=math.sqrt(config.hidden_size),
        tied=bool(config.tie_word_embeddings),
        value_norms=True,
        token_inputs=inputs if inputs.width else None,
        attention_bias=config.attention_bias,
    )


def gemma4_layers(config: Fields) -> tuple[Layer, ...]:
    """The layers of Gemma 4."""
    kinds, shared = config.layer_types, config.num_hidden_layers - config.num_kv_shared_layers
    window = config.sliding_window
    if not 0 <= config.num_kv_shared_layers <= len(kinds):
        raise NotComputed(f"num_kv_shared_layers is {config.num_kv_shared_layers}, of {len(kinds)} layers")
    wide = config.intermediate_size * (2 if config.use_double_wide_mlp else 1)
    experts, inner, top = map(config.declared, ("num_experts", "moe_intermediate_size", "top_k_experts"))
    mixture = Mixture(experts, inner, Rule(top), beside=True) if config.declared("enable_moe_block") else None
    layers, ropes = [], dict[tuple[str, int], Rope]()
    for index, kind in enumerate(kinds):
        own = config.per_layer_config[index]
        head_dim = own.head_dim
        if (kind, head_dim) not in ropes:
            ropes[kind, head_dim] = rope_of(config, head_dim, kind)
        source = None if index < shared else last_of(kind, kinds[:shared])
        layer = Layer(
            window if kind == configs.SLIDING else None,
            ropes[kind, head_dim],
            scale=1.0,
            mixture=mixture,
            head_dim=head_dim,
            kv_heads=own.num_key_value_heads,
            inner=None if source is None else wide,
            v_is_k=config.attention_k_eq_v and kind == configs.FULL,
            source=source,
        )
        layers.append(layer)
    return tuple(layers)


def last_of(kind: str, kinds: list[str]) -> int:
    """The last layer of a kind. NotComputed if there is none."""
    if kind not in kinds:
        raise NotComputed(f"layers with {kind} read keys and values of an earlier one, and there is none")
    return len(kinds) - 1 - kinds[::-1].index(kind)


def gpt2(config: Fields) -> Architecture:
    """GPT-2: learned positions, LayerNorm, one product before the activation."""
    head_dim = config.n_embd // config.n_head
    scale = head_dim**-0.5 if config.declared("scale_attn_weights", True) else 1.0
    by_index = config.declared("scale_attn_by_inverse_layer_idx", False)
    scales = (scale / (index + 1 if by_index else 1) for index in range(config.n_layer))
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.n_embd,
        inner=config.n_inner or 4 * config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        layers=tuple(Layer(None, NO_ROPE, each) for each in scales),
        max_positions=config.n_positions,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=activation_of(config.activation_function, gated=False),
        positions=True,
        tied=bool(config.tie_word_embeddings),
    )


def gptj(config: Fields) -> Architecture:
    """GPT-J: one norm for parallel attention and MLP, and rotation of adjacent pairs."""
    plain = gpt2(config)
    rope = Rope(plain_frequencies(config.rotary_dim or plain.head_dim, 10000.0), adjacent=True)
    layers = tuple(replace(layer, rope=rope) for layer in plain.layers)
    return replace(plain, layers=layers, positions=False, parallel=True)


def gpt_neox(config: Fields) -> Architecture:
    """GPT-NeoX and Pythia: parallel attention and MLP, each with its norm; a quarter of each head is rotated."""
    head_dim = config.hidden_size // config.num_attention_heads
    layer = Layer(None, rope_of(config, head_dim, partly=True), head_dim**-0.5)
    return Architecture(
        family=config.model_type,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        layers=(layer,) * config.num_hidden_layers,
        max_positions=config.max_position_embeddings,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        activation=activation_of(config.hidden_act, gated=False),
        parallel=bool(config.use_parallel_residual),
        tied=bool(config.tie_word_embeddings),
        attention_bias=config.attention_bias,
    )


def chatglm(config: Fields) -> Architecture:
    """ChatGLM2-6B, ChatGLM3 and GLM-4 in their original files: two heads of k and v, half of each head rotated."""
    head_dim, groups = config.kv_channels, config.multi_query_group_num
    rope = Rope(plain_frequencies(head_dim // 2, 10000.0 * config.rope_ratio), adjacent=True)
    return Architecture(
        family="chatglm",
        vocabulary=config.padded_vocab_size,
        hidden=config.hidden_size,
        inner=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_heads=groups if config.multi_query_attention else config.num_attention_heads,
        head_dim=head_dim,
        layers=(Layer(None, rope, head_dim**-0.5),) * config.num_layers,
        max_positions=config.seq_length,
        norm_eps=config.layernorm_epsilon,
    )


def with_head_norms(names: Names) -> Names:
    """`names` for a family with norms on the heads of q and k."""
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
GEMMA4_EXPERTS = MixtureNames(
    router="router.proj",
    router_scale="router.scale",
    factors="router.per_expert_scale",
    expert_norm="pre_feedforward_layernorm_2",
    expert_out_norm="post_feedforward_layernorm_2",
    dense_out_norm="post_feedforward_layernorm_1",
    up=("experts.{}.gate_proj", "experts.{}.up_proj"),
    down="experts.{}.down_proj",
    up_whole="experts.gate_up_proj",
    down_whole="experts.down_proj",
)
GEMMA4 = replace(GEMMA3, factor="layer_scalar", mixture=GEMMA4_EXPERTS)
GEMMA4_WITH_IMAGES = replace(
    GEMMA4,
    embedding="model.language_model.embed_tokens",
    layer="model.language_model.layers.{}.",
    norm="model.language_model.norm",
    token_inputs=TokenInputNames(
        embedding="model.language_model.embed_tokens_per_layer",
        projection="model.language_model.per_layer_model_projection",
        norm="model.language_model.per_layer_projection_norm",
    ),
    others=tuple(f"model.{part}" for part in ("vision_", "audio_", "embed_vision.", "embed_audio.")),
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

MIXTRAL = replace(
    LLAMA,
    mixture=MixtureNames(
        router="block_sparse_moe.gate",
        up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        down="block_sparse_moe.experts.{}.w2",
    ),
)
WITH_EXPERTS = replace(LLAMA, mixture=MixtureNames())
QWEN2_MOE = MixtureNames(
    shared_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    shared_down="mlp.shared_expert.down_proj",
    shared_gate="mlp.shared_expert_gate",
)
GPT_OSS = MixtureNames(router="mlp.router", up=("mlp.experts.{}.gate_up_proj",), down="mlp.experts.{}.down_proj")
GLM4_MOE = MixtureNames(
    correction="mlp.gate.e_score_correction_bias",
    shared_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    shared_down="mlp.shared_experts.down_proj",
)
DEEPSEEK_V2 = replace(LLAMA, mixture=replace(GLM4_MOE, correction=None))

FAMILIES = {
    family.name: family
    for family in (
        Family("llama", configs.Llama, LLAMA, llama),
        Family("mistral", configs.Mistral, LLAMA, llama),
        Family("qwen2", configs.Qwen2, LLAMA, llama),
        Family("mimo", configs.Qwen2, replace(LLAMA, others=("model.mtp_layers.", "mtp_layers.")), llama),
        Family("qwen3", configs.Qwen3, with_head_norms(LLAMA), llama),
        Family("mixtral", configs.Mixtral, MIXTRAL, mixtral),
        Family("phimoe", configs.PhiMoe, MIXTRAL, phimoe),
        Family("qwen2_moe", configs.Qwen2Moe, replace(LLAMA, mixture=QWEN2_MOE), qwen_moe),
        Family("qwen3_moe", configs.Qwen3Moe, with_head_norms(WITH_EXPERTS), qwen_moe),
        Family("olmoe", configs.Olmoe, with_head_norms(WITH_EXPERTS), olmoe),
        Family(
            "deepseek_v2", configs.DeepseekV2, replace(LLAMA, mixture=replace(GLM4_MOE, correction=None)), deepseek_v2
        ),
        Family("deepseek_v3", configs.DeepseekV3, replace(LLAMA, mixture=GLM4_MOE), deepseek_v3),
        Family("gpt_oss", configs.GptOss, replace(LLAMA, sinks="self_attn.sinks", mixture=GPT_OSS), gpt_oss),
        Family("glm4_moe", configs.Glm4Moe, with_head_norms(replace(LLAMA, mixture=GLM4_MOE)), glm4_moe),
        Family("gemma2", configs.Gemma2, GEMMA2, gemma),
        Family("gemma3_text", configs.Gemma3Text, GEMMA3, partial(gemma, capped=False)),
        Family("gemma3", configs.Gemma3, GEMMA3_WITH_IMAGES, partial(gemma, capped=False)),
        Family("gemma4_text", configs.Gemma4Text, GEMMA4, gemma4),
        Family("gemma4", configs.Gemma4, GEMMA4_WITH_IMAGES, gemma4),
        Family("gemma4_unified_text", configs.Gemma4UnifiedText, GEMMA4, gemma4),
        Family("gemma4_unified", configs.Gemma4Unified, GEMMA4_WITH_IMAGES, gemma4),
        Family("phi3", configs.Phi3, replace(GLM, qkv=("self_attn.qkv_proj",)), partial(llama, partly=True)),
        Family("gpt2", configs.Gpt2, GPT2, gpt2),
        Family("gptj", configs.GptJ, GPTJ, gptj),
        Family("gpt_neox", configs.GptNeoX, NEOX, gpt_neox),
        Family("glm", configs.Glm, GLM, partial(llama, partly=True, adjacent=True)),
        Family(
            "glm4",
            configs.Glm,
            replace(GLM, attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm"),
            partial(llama, partly=True, adjacent=True),
        ),
        Family("chatglm", configs.ChatGLM, CHATGLM, chatglm),
    )
}
