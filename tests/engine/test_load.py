"""Loading: every scheme and format computes with its dequantized weights; half precision runs the fused operators."""

import json
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import engine
from lowbit.engine.loader import require_build, require_memory
from lowbit.errors import CheckpointError, DeviceError, UsageError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.weight import Dense, Packed, W8a8
from lowbit.quant.scheme import parse_scheme
from tests.builders import changed_config, logits_of, save_family
from tests.engine.make import quantized, tiny

IDS = torch.tensor([[5, 77, 200, 31, 9, 100, 3]])
CASES = [
    ("compressed-tensors", "int4-g32"),
    ("compressed-tensors", "uint4-g32"),
    ("compressed-tensors", "int8-channel"),
    ("gptq", "int4-g32"),
    ("gptq_v2", "uint4-g32"),
    ("awq", "uint4-g32"),
    ("compressed-tensors", "fp8-a16"),
    ("compressed-tensors", "fp8-block-a16"),
    ("compressed-tensors", "mxfp8-a16"),
    ("compressed-tensors", "nvfp4-a16"),
    ("compressed-tensors", "mxfp4-a16"),
]
FLOATS = ("fp8-a16", "fp8-block-a16", "nvfp4-a16", "mxfp4-a16")


def check_half(model: engine.engine.Engine, expected: torch.Tensor) -> None:
    """Half precision differs from float32 by its own rounding: 11 bits, over a handful of products."""
    error = (model.logits(IDS) - expected).abs().max() / expected.abs().max()
    assert float(error) < 0.01


@pytest.mark.parametrize(("fmt", "scheme"), CASES)
def test_quantized_checkpoints_compute_what_they_stand_for(fmt, scheme, tmp_path):
    reference = quantized(tmp_path, parse_scheme(scheme), fmt)
    expected = logits_of(reference, IDS)
    torch.testing.assert_close(engine.load(tmp_path, device="cpu").logits(IDS), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("cache", ["same", "int8"])
def test_packed_weights_run_in_half_precision(family, cache, tmp_path):
    reference = quantized(tmp_path, parse_scheme("int4-g32"), family=family)
    model = engine.load(tmp_path, device="cpu", dtype=torch.float16, cache=cache)
    assert all(
        isinstance(product.weight, Packed) for layer in model.decoder.weights.layers for product in layer.products
    )
    check_half(model, logits_of(reference, IDS))
    written = model.generate([IDS[0].tolist()] * 2, max_new_tokens=6, ignore_eos=True)
    assert written[0].tokens == written[1].tokens


@pytest.mark.parametrize("scheme", FLOATS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_stay_packed_in_half_precision(scheme, family, dtype, tmp_path):
    reference = quantized(tmp_path, parse_scheme(scheme), family=family)
    model = engine.load(tmp_path, device="cpu", dtype=dtype)
    for layer in model.decoder.weights.layers:
        assert all(isinstance(product.weight, Packed) and product.weight.is_float for product in layer.products)
    assert not model.decoder.weights.expanded
    error = (model.logits(IDS.repeat(3, 1)) - logits_of(reference, IDS)).abs().max()
    assert error < (0.01 if dtype == torch.float16 else 0.08) * logits_of(reference, IDS).abs().max()
    batch = model.generate([IDS[0].tolist()] * 3, max_new_tokens=6, ignore_eos=True)
    assert len({completion.tokens for completion in batch}) == 1
    assert model.generate([IDS[0].tolist()], max_new_tokens=6, ignore_eos=True)[0].tokens == batch[0].tokens


def test_every_layer_may_have_a_number_of_its_own(tmp_path):
    mixed = {"0.self_attn": "nvfp4-a16", "0.mlp": "fp8-a16", "1.self_attn": "int4-g32", "1.mlp": "mxfp4-a16"}
    reference = quantized(tmp_path, lambda name: parse_scheme(next(mixed[key] for key in mixed if key in name)))
    model = engine.load(tmp_path, device="cpu", dtype=torch.float16)
    numbers = [product.weight.variant for layer in model.decoder.weights.layers for product in layer.products]
    assert numbers == ["fp4", "fp4", "fp8", "fp8", "4", "4", "fp4", "fp4"]
    check_half(model, logits_of(reference, IDS))


def test_every_product_knows_what_the_next_one_reads(tmp_path):
    quantized(tmp_path, parse_scheme("int4-g32"))
    weights = engine.load(tmp_path, device="cpu", dtype=torch.float16).decoder.weights
    order = [product for layer in weights.layers for product in layer.products]
    for product, following in pairwise(order):
        assert isinstance(following.weight, Packed)
        assert product.hints.next_weight is following.weight.words
    assert isinstance(weights.head.weight, Dense)
    assert order[-1].hints.next_weight is weights.head.weight.matrix
    assert weights.head.hints.next_weight is order[0].weight.bulk


def test_linears_of_one_product_may_have_different_schemes(tmp_path):
    reference = quantized(tmp_path, parse_scheme("int4-g32"))
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.v_proj"
        for suffix in ("packed", "scale", "shape"):
            del tensors[f"{name}.weight_{suffix}"]
        tensors[f"{name}.weight"] = reference.get_parameter(f"{name}.weight").data.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    expected = logits_of(reference, IDS)
    torch.testing.assert_close(engine.load(tmp_path, device="cpu").logits(IDS), expected, atol=2e-5, rtol=1e-4)


BAD = {
    ("mxfp4-a16", "weight_scale", 255): "1 of 192 scales are 255, which e8m0 has for NaN",
    ("fp8-a16", "weight", 0x7F): "a code is no fp8",
    ("fp8-a16", "weight_scale", 0): "a scale is zero",
    ("fp8-block-a16", "weight_scale", 0): "a scale is zero",
    ("nvfp4-a16", "weight_scale", 0x7F): "or not finite",
    ("nvfp4-a16", "weight_global_scale", 0): "its divisor of scales is 0.0",
}


@pytest.mark.parametrize(("scheme", "suffix", "byte"), BAD)
def test_numbers_that_are_none_are_refused_with_their_linear(scheme, suffix, byte, tmp_path):
    quantized(tmp_path, parse_scheme(scheme))
    linear = "model.layers.0.mlp.down_proj"

    def spoil(tensors):
        value = tensors[f"{linear}.{suffix}"].view(torch.uint8).flatten()
        value[: 1 if byte else 4] = byte  # of a float in up to 32 bits: its first

    edited(tmp_path, spoil)
    with pytest.raises(CheckpointError, match=f"{linear}: .*{BAD[scheme, suffix, byte]}"):
        engine.load(tmp_path, device="cpu", dtype=torch.float16)


def test_scales_too_far_apart_are_expanded_and_said(tmp_path):
    reference = quantized(tmp_path, parse_scheme("mxfp4-a16"))
    name = "model.layers.0.mlp.down_proj"

    def spread(tensors):
        tensors[f"{name}.weight_scale"][3, 0] = 127 - 40

    edited(tmp_path, spread)
    model = engine.load(tmp_path, device="cpu", dtype=torch.float16)
    assert model.decoder.weights.expanded == {"mxfp4-a16 with scales far apart": 1}
    reference.get_parameter(f"{name}.weight").data[3, :32] = 0
    check_half(model, logits_of(reference, IDS))


@pytest.mark.parametrize("scheme", ["int8-channel-a8token", "int8-channel-a8tensor"])
def test_inputs_are_rounded_where_the_scheme_says_so(scheme, tmp_path):
    reference = quantized(tmp_path, parse_scheme(scheme))

    def rounding(module, args):
        values = args[0]
        scale = values.abs().amax(-1, keepdim=True) / 127 if scheme.endswith("token") else 0.05
        return ((values / scale).round().clamp(-128, 127) * scale,)

    exact = logits_of(reference, IDS)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounding)
    expected = logits_of(reference, IDS)
    got = engine.load(tmp_path, device="cpu").logits(IDS)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
    assert (got - exact).abs().max() > 10 * (got - expected).abs().max()


@pytest.mark.parametrize("scheme", ["int4-g32-a8token", "int4-g32-afp8token"])
def test_weights_of_4_bits_take_inputs_of_8(scheme, tmp_path):
    quantized(tmp_path, parse_scheme(scheme))
    ids = torch.arange(3, 23).view(1, 20)
    expected = engine.load(tmp_path, device="cpu").logits(ids)
    plain = engine.load(tmp_path, device="cpu", dtype=torch.float16)
    with mock.patch.object(ops, "quantize_rows", wraps=ops.quantize_rows) as rounding:
        found = plain.logits(ids)
    assert bool(rounding.call_count) == scheme.endswith("a8token")
    assert all(
        isinstance(product.weight, Packed) for layer in plain.decoder.weights.layers for product in layer.products
    )
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("scheme", ["int8-channel-a8token", "int8-channel-a8tensor", "fp8", "fp8-static"])
def test_in_half_precision_codes_meet_codes(scheme, tmp_path):
    quantized(tmp_path, parse_scheme(scheme))
    model = engine.load(tmp_path, device="cpu", dtype=torch.float16)
    for layer in model.decoder.weights.layers:
        assert all(isinstance(product.weight, W8a8) for product in layer.products)
    expected = engine.load(tmp_path, device="cpu").logits(IDS)
    # a last bit of an input may turn its code by one, of int8 here 0.05 of inputs of about 1: seen, 0.063
    assert (model.logits(IDS) - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4"])
def test_in_half_precision_rounded_inputs_meet_floats(scheme, tmp_path):
    quantized(tmp_path, parse_scheme(scheme))
    model = engine.load(tmp_path, device="cpu", dtype=torch.float16)
    products = [product for layer in model.decoder.weights.layers for product in layer.products]
    assert all(isinstance(product.weight, Packed) and product.linear.inputs is not None for product in products)
    expected = engine.load(tmp_path, device="cpu").logits(IDS)
    # an input near the middle of two codes may turn to the other one
    assert (model.logits(IDS) - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_linears_of_one_product_share_their_inputs(tmp_path):
    reference = quantized(tmp_path, parse_scheme("int8-channel-a8token"))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for each in [each for each in tensors if each.startswith(name)]:
        del tensors[each]
    tensors[f"{name}.weight"] = reference.get_parameter(f"{name}.weight").data.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="gate and up"):
        engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize(("cache", "most"), [("int8", 0.02), ("int4", 0.2)])
def test_a_quantized_cache_stays_close(tmp_path, cache, most):
    _, reference = tiny(tmp_path, head_dim=64)
    expected = logits_of(reference, IDS)
    error = (engine.load(tmp_path, device="cpu", cache=cache).logits(IDS) - expected).abs().max()
    assert 1e-5 < float(error) < most * float(expected.abs().max())


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("int4", "cache 'int4': heads of 16: an int4 cache takes powers of two from 64 to 256; or use cache='int8'"),
        ("fp8", "has no scales for it: quantize with --kv-cache fp8; or use cache='int8'"),
        ("int5", "cache 'int5': write auto, same, int8, fp8 or int4"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(tmp_path, cache, message):
    tiny(tmp_path, head_dim=16)
    with pytest.raises(UsageError, match=message):
        engine.load(tmp_path, device="cpu", cache=cache)


def test_the_head_can_be_rounded_at_load(tmp_path):
    _, reference = tiny(tmp_path)
    expected = logits_of(reference, IDS)
    model = engine.load(tmp_path, device="cpu", head="int8-channel")
    error = (model.logits(IDS) - expected).abs().max() / expected.abs().max()
    assert 1e-5 < float(error) < 0.01


def test_a_base_model_without_its_prefix_is_read(tmp_path):
    save_family("gpt2", tmp_path)
    expected = engine.load(tmp_path, device="cpu").logits(IDS)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    save_file(bare, tmp_path / "model.safetensors")
    assert torch.equal(engine.load(tmp_path, device="cpu").logits(IDS), expected)


def edited(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


FIRST = "model.layers.0.mlp.down_proj.weight"
WRONG = {
    "is in no file": lambda tensors: tensors.pop(FIRST),
    "do not belong": lambda tensors: tensors.update({"model.layers.2.mlp.down_proj.weight": torch.zeros(64, 96)}),
    "has shape": lambda tensors: tensors.update({FIRST: torch.zeros(64, 64)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_tensors_that_contradict_the_configuration_are_named(message, tmp_path):
    save_family("llama", tmp_path)
    edited(tmp_path, WRONG[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        engine.load(tmp_path, device="cpu")
    assert "model.layers" in str(caught.value)


def test_a_gpu_without_code_of_ours_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 5))
    with pytest.raises(DeviceError, match=r"cuda:0: .*quant\._C was.*; or use device='cpu'"):
        require_build(torch.device("cuda:0"))
    require_build(torch.device("cpu"))


def test_a_gpu_too_small_for_the_weights_is_told(tmp_path, monkeypatch):
    save_family("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (checkpoint.nbytes - 1, 80 << 30))
    with pytest.raises(CheckpointError, match=r"take 0\.0 GiB, cuda:0 has 0\.0 of 80\.0 GiB free"):
        require_memory(checkpoint, torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (checkpoint.nbytes, 80 << 30))
    require_memory(checkpoint, torch.device("cuda:0"))


def test_an_unknown_family_is_told_the_known_ones(tmp_path):
    save_family("opt", tmp_path)
    with pytest.raises(CheckpointError, match=r"no family 'opt'.*llama, mistral, qwen2"):
        engine.load(tmp_path, device="cpu")


def test_an_activation_that_nothing_computes_is_told(tmp_path):
    save_family("gpt2", tmp_path)
    changed_config(tmp_path, lambda config: config.update(activation_function="relu"))
    with pytest.raises(CheckpointError, match="'relu' is not computed here"):
        engine.load(tmp_path, device="cpu")


def test_a_context_beyond_the_models_positions_is_refused(tmp_path):
    save_family("llama", tmp_path)
    with pytest.raises(UsageError, match=r"context 5000.*1 to 1024"):
        engine.load(tmp_path, device="cpu", context=5000)


def test_a_model_without_a_tokenizer_takes_and_gives_tokens(tmp_path):
    save_family("llama", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    model = engine.load(tmp_path, device="cpu")
    assert len(model.generate([[1, 2]], max_new_tokens=3, ignore_eos=True)[0].tokens) == 3
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate(["text"])


def test_a_tokenizer_without_a_longest_text_is_loaded(tmp_path):
    """transformers writes 10^30 for its length, an integer of 100 bits."""
    save_family("llama", tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == int(1e30)
    assert engine.load(tmp_path, device="cpu").tokenizer is not None


def test_the_models_stop_tokens_come_from_its_generation_config(tmp_path):
    model, _ = tiny(tmp_path)
    stop = model.generate([[1, 2]], max_new_tokens=6, ignore_eos=True)[0].tokens[3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 257]}))
    assert engine.load(tmp_path, device="cpu").generate([[1, 2]])[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": "</s>"}', r"generation_config\.json: eos_token_id is '</s>'; a token id"),
        ('{"eos_token_id": [1, true]}', r"eos_token_id is \[1, True\]"),
        ("[]", r"generation_config\.json: a JSON object is expected, not list"),
        ("{", r"generation_config\.json: not JSON"),
    ],
)
def test_a_generation_config_of_another_shape_is_told(text, message, tmp_path):
    save_family("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


def test_stop_tokens_that_the_model_cannot_write_are_left_out(tmp_path):
    save_family("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [32000, 257]}')
    model = engine.load(tmp_path, device="cpu")
    assert model.options.stop_tokens == (257,)
    assert len(model.generate([[1, 2]], max_new_tokens=3, min_new_tokens=3)[0].tokens) == 3


AUTO_MAP = {"AutoConfig": "configuration_theirs.Config", "AutoModelForCausalLM": "modeling_theirs.Model"}


def test_code_that_a_known_family_brings_is_not_needed_and_not_run(tmp_path):
    model, _ = tiny(tmp_path)
    expected = model.logits(IDS)
    changed_config(tmp_path, lambda config: config.update(auto_map=AUTO_MAP))
    for name in ("configuration_theirs.py", "modeling_theirs.py"):
        (tmp_path / name).write_text("raise RuntimeError('this code was run')\n")
    assert torch.equal(engine.load(tmp_path, device="cpu").logits(IDS), expected)


def test_code_of_an_unknown_family_stays_refused(tmp_path):
    save_family("opt", tmp_path)
    changed_config(tmp_path, lambda config: config.update(model_type="theirs", auto_map=AUTO_MAP))
    with pytest.raises(CheckpointError, match="no family 'theirs'"):
        engine.load(tmp_path, device="cpu")


ODD_SIZES = [
    ("llama", {"head_dim": 3}, "4 heads of 3"),
    ("llama", {"head_dim": -1}, "no llama"),
    ("llama", {"num_key_value_heads": 3}, "4 heads of 16 inputs cannot be even and share 3"),
    ("llama", {"max_position_embeddings": -1}, "max_positions is -1; a number from 1 is needed"),
    ("llama", {"vocab_size": 0}, "vocabulary is 0"),
    ("llama", {"hidden_size": "64"}, "no llama .hidden_size is '64': int is needed"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True; the engine computes only False"),
    ("qwen2", {"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has 'chunked_attention'"),
    ("llama", {"rope_parameters": {"rope_type": "other"}}, "rope_type is 'other'; the engine knows default, linear"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "frequencies that are no finite numbers"),
    ("llama", {"rms_norm_eps": float("inf")}, "no finite number"),
    ("gemma3", {"query_pre_attn_scalar": -1}, "no gemma3_text .*no finite number"),
    ("gemma3", {"sliding_window": -5}, "a window of attention that sees no position"),
    ("gpt2", {"n_head": -1}, "heads is -1"),
    ("phi3", {"num_attention_heads": 3}, "no phi3"),
]


@pytest.mark.parametrize(("family", "change", "message"), ODD_SIZES)
def test_sizes_of_no_decoder_are_told(family, change, message, tmp_path):
    save_family(family, tmp_path)
    changed_config(tmp_path, lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message) as caught:
        engine.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
