"""Every family's logits equal transformers', in prefill and token by token; ChatGLM's equal a plain torch model's."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from lowbit import engine
from lowbit.engine.families import FAMILIES
from tests.builders import FOUR, GATED, KINDS, VOCABULARY, logits_of, make_model, save
from tests.engine.chatglm import TinyChatGLM
from tests.families.tiny import tiny_model

SMALL = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 257}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0] * 2, "long_factor": [4.0] * 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHARED = {"shared_expert_intermediate_size": 32}
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 48}
SIGMOID = GATED | GROUPED | {"head_dim": 16, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
LATENT = GATED | {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "num_hidden_layers": 3}
LATENT |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20, "first_k_dense_replace": 1}
DEEPSEEK = LATENT | GROUPED | {"routed_scaling_factor": 1.5}
WIDE = {"global_head_dim": 32, "final_logit_softcapping": 3.0}
SCALED = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}
# Models to build: a family of tests/builders with changes, or a configuration class of transformers with values.
CASES = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3": ("gemma3", {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma4_text": ("gemma4_moe", WIDE | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4_text-dense": ("gemma4_moe", WIDE | {"enable_moe_block": False, "tie_word_embeddings": True}),
    "gemma4_text-inputs": (
        "gemma4",
        {"use_double_wide_mlp": True, "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}},
    ),
    "gemma4_unified_text": ("Gemma4UnifiedTextConfig", FOUR | KINDS | {"global_head_dim": 32}),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", {"sliding_window": 6, "rope_parameters": PARTIAL}),
    "phi3-longrope": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONG}),
    "gpt2": ("gpt2", {}),
    "codegeex": ("gpt2", {"activation_function": "quick_gelu"}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gptj": ("GPTJConfig", SMALL | {"rotary_dim": 8}),
    "glm": ("GlmConfig", GATED | {"head_dim": 16}),
    "glm4": ("Glm4Config", GATED | {"head_dim": 16}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("Qwen2MoeConfig", GATED | EXPERTS | SHARED | {"num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "olmoe": ("OlmoeConfig", GATED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", GATED | {"num_local_experts": 4, "router_jitter_noise": 0.3, "lm_head_bias": True}),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "deepseek_v2-lite": ("DeepseekV2Config", DEEPSEEK | {"q_lora_rank": None, "rope_parameters": SCALED}),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "deepseek_v3-yarn": ("DeepseekV3Config", DEEPSEEK | {"rope_interleave": False, "rope_parameters": SCALED}),
    "gpt_oss": ("GptOssConfig", GATED | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8}),
    "gpt_oss-clamped": ("GptOssConfig", GATED | {"head_dim": 16, "swiglu_limit": 0.2, "num_experts_per_tok": 2}),
    "glm4_moe": ("Glm4MoeConfig", SIGMOID),
    "glm4_moe-normed": ("Glm4MoeConfig", SIGMOID | {"use_qk_norm": True, "n_shared_experts": 2}),
}
ATOL = 2e-5
IMAGES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def built(case: str) -> torch.nn.Module:
    name, changes = CASES[case]
    if not name.endswith("Config"):
        return with_buffers(make_model(name, **changes))
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return with_buffers(model.eval())


def with_buffers(model: torch.nn.Module) -> torch.nn.Module:
    """The model with other numbers in the buffers that a file holds."""
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "layer_scalar")):
            buffer.add_(0.2 * torch.randn_like(buffer))
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (13, 1, 21)]


def decoded(model: engine.engine.Engine, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of every position, one token of every prompt a step: a ragged batch on the decode path."""
    lengths = [len(prompt) for prompt in prompts]
    cache = model.spaces.make_cache(len(prompts), max(lengths))
    starts = torch.tensor([cache.start(b) for b in range(len(prompts))])
    rows = []
    with torch.inference_mode():
        for t in range(max(lengths)):
            at = [min(t, length - 1) for length in lengths]
            tokens = torch.tensor([prompt[i] for prompt, i in zip(prompts, at, strict=True)])
            step = model.decoder.step(tokens, torch.tensor(at), starts)
            rows.append(model.decoder.logits(model.decoder.hidden(step, cache)))
    return [torch.stack([row[b] for row in rows[:length]]) for b, length in enumerate(lengths)]


def check(model: engine.engine.Engine, reference) -> None:
    expected = [reference(torch.tensor([prompt]))[0] for prompt in prompts()]
    for prompt, want, got in zip(prompts(), expected, decoded(model, prompts()), strict=True):
        torch.testing.assert_close(model.logits([prompt])[0], want, atol=ATOL, rtol=1e-4)
        torch.testing.assert_close(got, want, atol=ATOL, rtol=1e-4)


def check_against(reference: transformers.PreTrainedModel, directory: Path) -> None:
    """Save the model and compare the engine's logits with its own in float64: float32 sums are rounded otherwise on
    each type of CPU, and the bounds are for the engine's rounding alone."""
    save(reference, directory)
    reference.set_experts_implementation("eager")  # the grouped product has no float64
    reference.double()
    check(engine.load(directory, device="cpu", context=32), lambda ids: logits_of(reference, ids))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    reference = built(case)
    check_against(reference, tmp_path)


@pytest.mark.parametrize("multi_query", [True, False])
def test_chatglm_is_a_plain_torch_model(multi_query: bool, tmp_path: Path) -> None:
    reference = TinyChatGLM(multi_query)
    reference.save(tmp_path)
    check(engine.load(tmp_path, device="cpu", context=32), reference.logits)


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_unified"])
def test_the_text_of_gemma_4_is_read(kind: str, tmp_path: Path) -> None:
    reference = with_buffers(tiny_model(kind))
    check_against(reference, tmp_path)


def test_the_text_of_a_model_that_sees_images_is_read(tmp_path: Path) -> None:
    text = GATED | {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 8}
    vision = IMAGES | {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    reference = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    check_against(reference, tmp_path)


def test_every_family_is_among_the_cases() -> None:
    covered = {built(case).config.model_type for case in CASES} | {
        "chatglm",
        "gemma3",
        "gemma4",
        "gemma4_unified",
        "mimo",
    }
    assert covered == set(FAMILIES)
