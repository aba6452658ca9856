"""export/formats.py: the table of formats, and a checkpoint's tensors under the names of an unquantized model."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors, require_fit
from lowbit.export.writer import copy_companions
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme, parse_scheme
from tests.quantized import write_config

W4, W8A8 = parse_scheme("int4-g32"), parse_scheme("int8-channel-a8token")


def weight(scheme: Scheme) -> QTensor:
    plain = round_to_nearest(torch.randn(16, 64), scheme.weights_only, torch.float32)
    return QTensor(plain.codes, plain.scales, plain.zeros, scheme)


def written(directory, weights: dict[str, QTensor], **others: torch.Tensor) -> LogicalTensors:
    """`weights` and `others` in a compressed-tensors checkpoint in `directory`."""
    fmt = FORMATS["compressed-tensors"]
    tensors = {key: value for name, each in weights.items() for key, value in fmt.write(name, each).items()}
    save_file(tensors | others, directory / "model.safetensors")
    config = fmt.quantization_config({name: each.scheme for name, each in weights.items()}, ["lm_head"])
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return LogicalTensors(open_checkpoint(directory))


def test_names_are_those_of_an_unquantized_model(tmp_path):
    weights = {"m.0.up": weight(W4), "m.0.down": weight(W8A8)}
    logical = written(tmp_path, weights, **{"m.norm.weight": torch.ones(64), "m.0.up.bias": torch.zeros(16)})
    assert sorted(logical.names) == ["m.0.down.weight", "m.0.up.bias", "m.0.up.weight", "m.norm.weight"]
    assert logical.schemes == {"m.0.up": W4, "m.0.down": W8A8}
    for name, each in weights.items():
        assert torch.equal(logical.qtensor(name).codes, each.codes)
        assert torch.equal(logical.read(f"{name}.weight"), each.dequantize())
    assert torch.equal(logical.read("m.norm.weight"), torch.ones(64))


def test_a_tensor_that_is_nowhere_is_named(tmp_path):
    logical = written(tmp_path, {"a": weight(W4)})
    with pytest.raises(CheckpointError, match=r"no tensor 'b\.weight' in its files"):
        logical.read("b.weight")


@pytest.mark.parametrize(
    ("fmt", "text"),
    [("compressed-tensors", "int8-channel"), ("gptq", "int4-g32"), ("gptq_v2", "uint4-g32"), ("awq", "uint4-g32")],
)
def test_every_format_is_recognized_by_its_configuration(tmp_path, fmt, text):
    scheme = parse_scheme(text)
    each = round_to_nearest(torch.randn(16, 64), scheme, torch.float16)
    save_file(FORMATS[fmt].write("m.0.up", each) | {"m.0.up.bias": torch.zeros(16)}, tmp_path / "model.safetensors")
    block = FORMATS[fmt].quantization_config({"m.0.up": scheme}, ["lm_head"])
    write_config(tmp_path, {"model_type": "llama"}, FORMATS[fmt], block)
    logical = LogicalTensors(open_checkpoint(tmp_path))
    assert logical.format is FORMATS[fmt]
    assert logical.schemes == {"m.0.up": scheme}
    assert sorted(logical.names) == ["m.0.up.bias", "m.0.up.weight"]
    assert torch.equal(logical.qtensor("m.0.up").dequantize(), each.dequantize())
    assert (tmp_path / "quantize_config.json").exists() == fmt.startswith("gptq")


def test_a_block_beside_the_configuration_is_enough(tmp_path):
    """Older tools left config.json as it was and wrote quantize_config.json."""
    each = round_to_nearest(torch.randn(16, 64), W4, torch.float16)
    save_file(FORMATS["gptq"].write("a", each), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    block = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(block))
    assert LogicalTensors(open_checkpoint(tmp_path)).schemes == {"a": W4}
    (tmp_path / "copy").mkdir()
    assert copy_companions(tmp_path, tmp_path / "copy", with_code=False) == []  # for a copy in another format
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block | {"quant_method": "other"}}))
    with pytest.raises(CheckpointError, match="quantized as 'other'"):
        LogicalTensors(open_checkpoint(tmp_path))


def test_what_does_not_fit_is_said_with_the_way_out():
    schemes = {"a": W4, "b": parse_scheme("int4-g64")}
    shapes = {"a": (16, 64), "b": (16, 64)}
    require_fit(FORMATS["compressed-tensors"], schemes, shapes)
    with pytest.raises(CheckpointError, match=r"holds one scheme.*int4-g32 \(1 linears\), int4-g64.*--group-size 32"):
        require_fit(FORMATS["gptq"], schemes, shapes)
    with pytest.raises(CheckpointError, match=r"gptq cannot hold b as int4-g64: 15 outputs"):
        require_fit(FORMATS["gptq"], schemes, shapes | {"b": (15, 64)})
    with pytest.raises(CheckpointError, match=r"awq cannot hold a as int4-g32: .*--asym"):
        require_fit(FORMATS["awq"], schemes, shapes)


def test_a_method_that_is_not_read_here_is_named(tmp_path):
    save_file({"a.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(CheckpointError, match="'bitsandbytes', which is not read here; known: compressed-tensors"):
        LogicalTensors(open_checkpoint(tmp_path))
