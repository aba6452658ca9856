"""Mixtures of experts in the engine: quantized files, half precision, and files that contradict themselves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from lowbit import engine
from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.engine.feed_forward import MixedForward
from lowbit.engine.speed import measure
from lowbit.errors import CheckpointError
from lowbit.models.products import rounded_inputs
from lowbit.models.skeleton import Block, fill_all, open_skeleton
from lowbit.models.source import open_source
from lowbit.quant.kernels.stack import PackedStack
from lowbit.quant.packing import pack_e8m0, pack_fp4
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.builders import changed_config, logits_of, save, save_family

IDS = torch.arange(3, 43).view(2, 20)
RECIPES = {
    "int4": {"method": "rtn", "bits": 4, "group_size": 32},
    "int8": {"method": "rtn", "bits": 8, "group_size": -1},
    "w8a8": {"method": "rtn", "scheme": "int8-channel-a8token"},
    "w4a8": {"method": "rtn", "scheme": "int4-g32-a8token"},
}


def quantized(source: Path, output: Path, recipe: str) -> Path:
    job = prepare(open_source(str(source)), complete_recipe(RECIPES[recipe]), "cpu")
    output.mkdir()
    run(job, output, None, lambda report: None)
    return output


def stored_logits(directory: Path) -> torch.Tensor:
    """transformers' logits with the weights of the files, inputs rounded if they say so."""
    skeleton = fill_all(open_skeleton(open_source(str(directory))), "cpu", torch.float32)
    linears = [spec for block in skeleton.blocks for spec in block.linears]
    every = Block("", skeleton.model, linears=linears)
    with rounded_inputs(every, skeleton.model, skeleton.inputs):
        return logits_of(skeleton.model, IDS)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gemma4_moe"])
def test_files_that_we_quantized_have_the_logits_of_their_weights(family: str, recipe: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "source")
    made = quantized(source, tmp_path / "made", recipe)
    wanted = stored_logits(made)
    model = engine.load(made, device="cpu")
    torch.testing.assert_close(model.logits(IDS), wanted, atol=2e-4, rtol=1e-3)
    assert (engine.load(source, device="cpu").logits(IDS) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("recipe", RECIPES)
def test_in_half_precision_all_experts_are_one_packed_weight(recipe: str, tmp_path: Path) -> None:
    made = quantized(save_family("qwen3_moe", tmp_path / "source"), tmp_path / "made", recipe)
    model = engine.load(made, device="cpu", dtype=torch.float16)
    for layer in model.decoder.weights.layers:
        assert isinstance(layer.feed_forward, MixedForward)
        experts = layer.feed_forward.experts
        assert isinstance(experts.up.weight, PackedStack)
        assert isinstance(experts.down.weight, PackedStack)
        assert (experts.up.weight.experts, experts.up.weight.n) == (4, 128)
    expected = engine.load(made, device="cpu").logits(IDS)
    assert (model.logits(IDS) - expected).abs().mean() < 0.03 * expected.abs().mean()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gate_of_the_shared_expert_multiplies_what_its_activation_made(recipe: str, tmp_path: Path) -> None:
    """The rounding before `down` applies the activation, where inputs are rounded."""
    made = quantized(save_family("qwen2_moe", tmp_path / "source"), tmp_path / "made", recipe)
    model = engine.load(made, device="cpu", dtype=torch.float16)
    late = model.decoder.weights.layers[0].feed_forward.shared.down.before
    assert late == ("silu_mul" if recipe == "w8a8" else "none")
    expected = engine.load(made, device="cpu").logits(IDS)
    assert (model.logits(IDS) - expected).abs().mean() < 0.01 * expected.abs().mean()


GPT_OSS = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
GPT_OSS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def save_gpt_oss(directory: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GptOssConfig(**GPT_OSS), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return save(model.eval(), directory)


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_experts_that_take_turns_in_one_tensor_are_put_in_order(recipe: str, tmp_path: Path) -> None:
    made = quantized(save_gpt_oss(tmp_path / "source"), tmp_path / "made", recipe)
    wanted = stored_logits(made)
    torch.testing.assert_close(engine.load(made, device="cpu").logits(IDS), wanted, atol=2e-4, rtol=1e-3)
    half = engine.load(made, device="cpu", dtype=torch.float16)
    assert half.decoder.weights.layers[0].feed_forward.experts.weights is not None
    assert (half.logits(IDS) - wanted).abs().mean() < 0.03 * wanted.abs().mean()


def test_gpt_oss_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Two tensors of all experts in MXFP4: the logits are those of the same experts, dense."""
    save_gpt_oss(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scheme, dense = parse_scheme("mxfp4-a16"), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts = [round_to_nearest(w.T.contiguous(), scheme, torch.float32) for w in tensors.pop(name)]
        dense[name] = torch.stack([weight.dequantize().T for weight in experts]).contiguous()
        codes = torch.stack([pack_fp4(weight.codes) for weight in experts])
        tensors[f"{name}_blocks"] = codes.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = torch.stack([pack_e8m0(weight.scales) for weight in experts])
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = engine.load(tmp_path, device="cpu").logits(IDS)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changed_config(tmp_path, lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    torch.testing.assert_close(engine.load(tmp_path, device="cpu").logits(IDS), wanted)
    half = engine.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.decoder.weights.layers[0].feed_forward.experts.weights is not None
    assert (half.logits(IDS) - wanted).abs().mean() < 0.05 * wanted.abs().mean()


def edited(directory: Path, name: str, value: torch.Tensor | None) -> None:
    """The file with another tensor `name`, or without it."""
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
WRONG_TENSORS = {
    "missing": (EXPERT, None, f"tensor '{EXPERT}' is in no file"),
    "shape": (EXPERT, torch.zeros(63, 64), r"experts.2.up_proj has shape \[63, 64\], config.json asks for \[64, 64\]"),
    "width": (ROUTER, torch.zeros(4, 32), r"gate.weight has shape \[4, 32\], config.json asks for \[4, 64\]"),
    "nan": (ROUTER, torch.full((4, 64), torch.nan), "gate.weight holds numbers that are NaN or infinite"),
    "router": (ROUTER, torch.zeros(5, 64), r"gate.weight has shape \[5, 64\], config.json asks for \[4, 64\]"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_wrong_tensor_is_named(case: str, tmp_path: Path) -> None:
    name, value, message = WRONG_TENSORS[case]
    edited(save_family("qwen3_moe", tmp_path), name, value)
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_moe"])
def test_a_row_of_nan_leaves_the_others_of_its_step_alone(family: str, tmp_path: Path) -> None:
    model = engine.load(save_family(family, tmp_path), device="cpu")
    prompts = [[5, 6, 7], [8]]
    wanted = [each.tokens for each in model.generate(prompts, max_new_tokens=6, ignore_eos=True)]
    model.decoder.weights.embedding[100] = torch.nan
    nan, *others = model.generate([[100, 7], *prompts], max_new_tokens=6, ignore_eos=True)
    assert len(nan.tokens) == 6
    assert [each.tokens for each in others] == wanted


GEMMA4 = "model.layers.1."
WRONG_BESIDE = {
    "stack": (
        "experts.down_proj",
        torch.zeros(3, 64, 64),
        r"down_proj has shape \[3, 64, 64\], config.json asks for \[4",
    ),
    "turned": (
        "experts.gate_up_proj",
        torch.zeros(4, 64, 128),
        r"gate_up_proj has shape .* config.json asks for \[4, 128",
    ),
    "none": ("experts.gate_up_proj", None, "experts.0.gate_proj.weight' is in no file"),
    "scale": ("router.scale", torch.full((64,), torch.nan), "router.scale holds numbers that are NaN"),
    "factors": ("router.per_expert_scale", torch.full((4,), torch.inf), "per_expert_scale holds numbers that are NaN"),
    "factor": ("layer_scalar", torch.full((1,), torch.nan), "layer_scalar holds numbers that are NaN"),
    "width": ("router.scale", torch.zeros(63), r"router.scale has shape \[63\], config.json asks for \[64\]"),
}


@pytest.mark.parametrize("case", WRONG_BESIDE)
def test_a_wrong_tensor_of_experts_beside_a_feed_forward_is_named(case: str, tmp_path: Path) -> None:
    name, value, message = WRONG_BESIDE[case]
    edited(save_family("gemma4_moe", tmp_path), GEMMA4 + name, value)
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k_experts": 5}, "5 experts of a token, of 4"),
        ({"top_k_experts": None}, "None experts of a token, of 4"),
        ({"num_experts": None}, "experts of a mixture is None"),
        ({"enable_moe_block": False}, "tensors do not belong to gemma4_text"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is -1, of 4 layers"),
        ({"num_kv_shared_layers": 4}, "read keys and values of an earlier one, and there is none"),
        ({"per_layer_config": {"1": {"head_dim": 15}}}, "4 heads of 15 inputs cannot be even"),
        (
            {"per_layer_config": {"1": {"rms_norm_eps": 1}}},
            "layer 1 has its own rms_norm_eps; the engine knows head_dim",
        ),
        ({"per_layer_config": [1]}, r"per_layer_config is \[1\]"),
    ],
)
def test_a_wrong_configuration_of_gemma_4_is_told(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    save_family("gemma4_moe", tmp_path)
    changed_config(tmp_path, lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


def test_nan_before_a_router_ends_in_nan_and_not_in_a_hang(tmp_path: Path) -> None:
    edited(
        save_family("qwen3_moe", tmp_path),
        "model.layers.0.post_attention_layernorm.weight",
        torch.full((64,), torch.nan),
    )
    model = engine.load(tmp_path, device="cpu")
    assert model.logits(IDS).isnan().all()
    assert len(model.generate([[5, 6, 7]], max_new_tokens=4, ignore_eos=True)[0].tokens) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "5 experts of a token, of 4"),
        ({"num_experts_per_tok": 0}, "0 experts of a token, of 4"),
        ({"num_local_experts": 3}, r"gate.weight has shape \[4, 64\], config.json asks for \[3, 64\]"),
        ({"num_local_experts": 5}, "experts.4"),
        ({"moe_intermediate_size": 0}, "inner of a mixture is 0"),
    ],
)
def test_a_wrong_configuration_is_told(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    save_family("qwen3_moe", tmp_path)
    changed_config(tmp_path, lambda config: config.update(changes))
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path, device="cpu")


def test_steps_whose_experts_the_host_counts_are_not_captured(tmp_path: Path) -> None:
    made = quantized(save_family("qwen3_moe", tmp_path / "source"), tmp_path / "made", "int4")
    dense, packed = (engine.load(made, device="cpu", dtype=dtype).decoder.blocks for dtype in (None, torch.float16))
    assert [dense[0].feed_forward.captures(rows) for rows in (1, 128, 129)] == [True, True, False]
    assert [packed[0].feed_forward.captures(rows) for rows in (1, 64, 65)] == [True, True, False]


def test_bytes_of_a_step_count_the_experts_that_it_touches(tmp_path: Path) -> None:
    model = engine.load(save_family("qwen3_moe", tmp_path), device="cpu")
    weights, each = model.decoder.weights, 3 * 64 * 64 * 4
    assert weights.nbytes - weights.step_nbytes({0: 2, 1: 3}) == 3 * each
    assert weights.step_nbytes({}) == weights.nbytes - 8 * each
    measured = measure(model, batch=3, prompt=4, output=2, read_gbs=1.0)
    assert measured.experts is not None
    assert 2 <= measured.experts <= 4
    assert measured.as_row()["experts"] == measured.experts
    assert measured.floor_ms >= weights.step_nbytes({0: 2, 1: 2}) / 1e6
