"""integrations/transformers.py: every format on our linears inside transformers, and what is left to transformers."""

import importlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from lowbit.calibrate.job import prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.pipeline import run
from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import load_dense
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.models.source import open_source
from lowbit.quant.kernels.weight import Packed, W8a8
from lowbit.quant.linear import QLinear
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.builders import changed_config, logits_of, make_model, save
from tests.quantized import dense, quantize_files, write_config

FORMATS_AND_SCHEMES = [
    ("compressed-tensors", "int4-g32"),
    ("compressed-tensors", "uint4-g32"),
    ("compressed-tensors", "int8-channel"),
    ("compressed-tensors", "int8-channel-a8token"),
    ("compressed-tensors", "int8-channel-a8tensor"),
    ("compressed-tensors", "int3-g32"),
    ("compressed-tensors", "fp8-channel-afp8token"),
    ("compressed-tensors", "fp8-block-a16"),
    ("compressed-tensors", "nvfp4-a16"),
    ("compressed-tensors", "mxfp4-a16"),
    ("gptq", "int4-g32"),
    ("gptq_v2", "uint4-channel"),
    ("awq", "uint4-g32"),
]


@pytest.fixture
def ours() -> Iterator[ModuleType]:
    """The integration switched on for one test: other tests load models through transformers alone."""
    tables = AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    before = [dict(table) for table in tables]
    module = sys.modules.get("lowbit.integrations.transformers")
    yield importlib.reload(module) if module else importlib.import_module("lowbit.integrations.transformers")
    for table, values in zip(tables, before, strict=True):
        table.update(values)


@pytest.mark.parametrize(("fmt", "text"), FORMATS_AND_SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_the_dequantized_model(ours, tmp_path, fmt, text, family):
    directory = save(make_model(family), tmp_path / "m", torch.bfloat16)
    quantize_files(directory, fmt, text)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    kind = W8a8 if "-a8" in text or "-afp8" in text else Packed
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(linears) == 14
    assert all(isinstance(module.linear.weight, kind) for module in linears)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    found, wanted = logits_of(model, ids), logits_of(dense(directory), ids)
    slack = 2 if "fp8" in text else 1  # an input that bfloat16 moves past a tie of fp8 changes by 6%
    assert (found - wanted).norm() < 0.03 * slack * wanted.norm()


@pytest.mark.parametrize("text", ["int8-channel", "fp8-a16"])
def test_a_quantized_head_stays_packed_and_embeddings_are_expanded(ours, tmp_path, text):
    directory = save(make_model("llama", tie_word_embeddings=False), tmp_path / "m", torch.bfloat16)
    quantize_files(directory, "compressed-tensors", "int4-g32", ())
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    schemes = {name: parse_scheme("int4-g32") for name in linears_of(tensors)}
    for name, scheme in (("lm_head", text), ("model.embed_tokens", "int8-channel")):
        schemes[name] = parse_scheme(scheme)
        weight = round_to_nearest(tensors.pop(f"{name}.weight").float(), schemes[name], torch.bfloat16)
        tensors |= COMPRESSED_TENSORS.write(name, weight)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_config(directory, config, COMPRESSED_TENSORS, COMPRESSED_TENSORS.quantization_config(schemes, ()))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert isinstance(model.lm_head.linear.weight, Packed)
    wanted = dense(directory)
    assert torch.equal(model.model.embed_tokens.weight, wanted.model.embed_tokens.weight.bfloat16())
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    found, logits = logits_of(model, ids), logits_of(wanted, ids)
    assert (found - logits).norm() < 0.03 * logits.norm()


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mixtral", {}), ("qwen3_moe", {}), ("qwen3_moe", {"hidden_act": "relu"})],
)
def test_experts_are_multiplied_packed_or_expanded(ours, tmp_path, family, changes):
    """Our kernels have no relu: transformers' module keeps the expanded experts."""
    source, output = save(make_model(family, **changes), tmp_path / "m", torch.bfloat16), tmp_path / "q"
    job = prepare(open_source(str(source)), complete_recipe({"method": "rtn", "group_size": 32}), "cpu")
    output.mkdir()
    run(job, output, None, lambda report: None)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    packed = [module for module in model.modules() if isinstance(module, ours.QExperts)]
    assert len(packed) == (0 if changes else 2)
    assert all(module.experts.weights is not None for module in packed)
    wanted = load_dense(open_source(str(output)))
    for tokens in (12, 70):  # fewer rows than the kernels take, and more
        ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(3))
        found, logits = logits_of(model, ids), logits_of(wanted, ids)
        assert (found - logits).norm() < 0.05 * logits.norm()


def linears_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The quantized linears of a file in compressed-tensors."""
    return [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]


def test_linears_left_alone_stay_transformers_own(ours, tmp_path):
    directory = save(make_model("llama"), tmp_path / "m", torch.bfloat16)
    left = "model.layers.1.mlp.down_proj"
    quantize_files(directory, "gptq", "int4-g32", ("lm_head", left))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert type(model.get_submodule(left)) is torch.nn.Linear
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), QLinear)


def test_it_writes_text(ours, tmp_path):
    directory = save(make_model("llama"), tmp_path / "m", torch.bfloat16)
    quantize_files(directory, "awq", "uint4-g32")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_float32_is_refused_with_the_way_out(ours, tmp_path):
    directory = save(make_model("llama"), tmp_path / "m", torch.bfloat16)
    quantize_files(directory, "gptq", "int4-g32")
    with pytest.raises(
        CheckpointError, match=r"torch\.float32: lowbit computes in 16 bits; pass dtype=torch\.bfloat16"
    ):
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_a_linear_that_the_model_does_not_have_is_named(ours, tmp_path):
    directory = save(make_model("llama"), tmp_path / "m", torch.bfloat16)
    quantize_files(directory, "gptq", "int4-g32")
    changed_config(directory, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*quantized in the files"):
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def test_what_our_readers_do_not_know_is_left_to_transformers(ours):
    floats = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 4, "symmetric": True}}},
    }
    assert not ours.is_read_here(floats)
    assert not ours.is_read_here({"quant_method": "bitsandbytes"})
    assert ours.is_read_here({"quant_method": "awq", "bits": 4, "group_size": 128})
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}
    assert not ours.is_read_here(gptq)
    theirs = AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].from_dict(gptq)
    assert type(theirs).__name__ == "GPTQConfig"


def test_without_the_import_transformers_is_untouched():
    assert isinstance(AUTO_QUANTIZER_MAPPING["gptq"], type)
