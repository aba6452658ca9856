"""Block FP8, NVFP4, MXFP4 and MXFP8 in compressed-tensors files: to the letter, the library's own packer, bad files."""

from dataclasses import replace

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS as DIALECT
from lowbit.export.compressed_tensors import layout_of
from lowbit.export.dialects import FORMATS
from lowbit.quant.algos.clip import plain_shrink
from lowbit.quant.numbers import FP4
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import NAMED, Scheme, parse_scheme

NVFP4, MXFP4, MXFP8 = (parse_scheme(name) for name in ("nvfp4-a16", "mxfp4-a16", "mxfp8-a16"))
NAMES = ("fp8-block", "fp8-block-a16", "nvfp4", "nvfp4-a16", "mxfp4", "mxfp4-a16", "mxfp8", "mxfp8-a16")
SCHEMES = [NAMED[name] for name in NAMES]


def quantized(scheme: Scheme, n: int = 256, k: int = 128) -> QTensor:
    """A weight of `scheme`, its scales searched."""
    w, plain = torch.randn(n, k) / 20, scheme.weights_only
    found = round_to_nearest(w, plain, torch.bfloat16, plain_shrink(w, plain, torch.bfloat16))
    return replace(found, scheme=scheme, input_scale=torch.tensor(0.03) if scheme.static_inputs else None)


def test_nvfp4_to_the_letter():
    codes = torch.zeros(1, 32)
    codes[0, :8] = torch.tensor([0.5, -0.5, 1.0, 6.0, -6.0, 3.0, 0.0, -4.0])
    scales = torch.tensor([[1.0, 448.0]], dtype=torch.bfloat16)
    weight = QTensor(codes.to(FP4.storage), scales, None, NVFP4, divisor=torch.tensor(2688.0))
    tensors = DIALECT.write("a.b", weight)
    assert list(tensors) == ["a.b.weight_packed", "a.b.weight_scale", "a.b.weight_global_scale"]
    assert tensors["a.b.weight_packed"].dtype == torch.uint8
    assert tensors["a.b.weight_packed"].tolist() == [[0x91, 0x72, 0x5F, 0xE0, *[0] * 12]]
    assert tensors["a.b.weight_scale"].dtype == torch.float8_e4m3fn
    assert tensors["a.b.weight_scale"].view(torch.uint8).tolist() == [[0x38, 0x7E]]
    assert tensors["a.b.weight_global_scale"].dtype == torch.float32
    assert tensors["a.b.weight_global_scale"].tolist() == [2688.0]
    assert weight.dequantize()[0, 3].item() == pytest.approx(6 / 2688)
    config = DIALECT.quantization_config({"a.b": parse_scheme("nvfp4")}, ["lm_head"])
    assert config["format"] == "nvfp4-pack-quantized"
    group = config["config_groups"]["group_0"]
    assert group["weights"] == {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    assert group["input_activations"]["dynamic"] == "local"
    a4 = replace(weight, scheme=parse_scheme("nvfp4"), input_scale=torch.tensor(100.0))
    assert DIALECT.write("p", a4)["p.input_global_scale"].tolist() == [100.0]


def test_mxfp4_and_mxfp8_to_the_letter():
    codes = torch.zeros(1, 32)
    codes[0, :2] = torch.tensor([-1.5, 4.0])
    scales = torch.tensor([[0.25]], dtype=torch.bfloat16)
    tensors = DIALECT.write("p", QTensor(codes.to(FP4.storage), scales, None, MXFP4))
    assert {key: value.dtype for key, value in tensors.items()} == {
        "p.weight_packed": torch.uint8,
        "p.weight_scale": torch.uint8,
    }
    assert tensors["p.weight_packed"][0, 0].item() == 0x6B
    assert tensors["p.weight_scale"].tolist() == [[125]]
    tensors = DIALECT.write("p", QTensor(codes.to(torch.float8_e4m3fn), scales, None, MXFP8))
    assert tensors["p.weight"].view(torch.uint8)[0, :2].tolist() == [0xBC, 0x48]
    assert tensors["p.weight_scale"].tolist() == [[125]]
    config = DIALECT.quantization_config({"p": parse_scheme("mxfp8")}, [])
    assert config["format"] == "mxfp8-quantized"
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["scale_dtype"]) == ("group", 32, "torch.uint8")
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True


def test_block_fp8_to_the_letter():
    config = DIALECT.quantization_config({"p": parse_scheme("fp8-block")}, [])
    assert config["format"] == "float-quantized"
    group = config["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["weights"]["block_structure"]) == ("block", [128, 128])
    assert (group["input_activations"]["strategy"], group["input_activations"]["group_size"]) == ("group", 128)
    tensors = DIALECT.write("p", quantized(parse_scheme("fp8-block")))
    assert list(tensors) == ["p.weight", "p.weight_scale"]
    assert tuple(tensors["p.weight_scale"].shape) == (2, 1)


OTHERS = [("fp8", "fp8-block"), ("modelopt", "nvfp4"), ("modelopt", "nvfp4-a16")]


@pytest.mark.parametrize(("fmt", "text"), [*(("compressed-tensors", name) for name in NAMES), *OTHERS])
def test_round_trip_bit_for_bit(fmt, text):
    dialect, scheme = FORMATS[fmt], parse_scheme(text)
    weight = quantized(scheme)
    if weight.input_scale is not None:
        weight = replace(weight, input_scale=torch.tensor(2.0**9))
    tensors = dialect.write("x.y", weight)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert {key.removeprefix("x.y.") for key in tensors} <= set(dialect.suffixes)
    assert dialect.linears(tensors) == ["x.y"]
    assert dialect.schemes_of(dialect.quantization_config({"x.y": scheme}, []), ["x.y"]) == {"x.y": scheme}
    assert dialect.reason_against(scheme) is None
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert dialect.shape("x.y", shapes.__getitem__, tensors.__getitem__, scheme) == weight.shape
    back = dialect.read("x.y", tensors.__getitem__, scheme)
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(back.scales, weight.scales)
    assert back.divisor is weight.divisor is None or torch.equal(back.divisor, weight.divisor)
    assert back.input_scale is weight.input_scale is None or torch.equal(back.input_scale, weight.input_scale)


@pytest.mark.peer
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_library_packs_the_same_and_reads_our_weight(scheme):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    from compressed_tensors.quantization import QuantizationScheme

    weight = quantized(scheme)
    tensors = {key.removeprefix("p."): value for key, value in DIALECT.write("p", weight).items()}
    group = DIALECT.quantization_config({"p": scheme}, [])["config_groups"]["group_0"]
    theirs = QuantizationScheme.model_validate(group)
    compressor = base.BaseCompressor.get_value_from_registry(layout_of(scheme))
    back = compressor.decompress(tensors, theirs)["weight"]
    torch.testing.assert_close(back.float(), weight.dequantize(), rtol=2**-7, atol=0)  # computed in bfloat16
    whole = {"weight": weight.dequantize(), "weight_scale": weight.scales.float()}
    whole |= {key: tensors[key] for key in tensors if "global" in key}
    packed = compressor.compress(whole, theirs)
    for key in ("weight_packed", "weight", "weight_scale"):
        if key in tensors:
            mine = tensors[key].view(torch.uint8)
            same = packed[key].to(tensors[key].dtype).view(torch.uint8) == mine
            assert bool((same | (mine == 8) | (mine == 128)).all()) or key == "weight_packed", key
    if "weight_packed" in tensors:
        again = compressor.decompress({**tensors, "weight_packed": packed["weight_packed"]}, theirs)["weight"]
        assert torch.equal(again, back)


def written(scheme: Scheme, **changes: torch.Tensor) -> QTensor:
    """The tensor read from a file with some of its tensors replaced by `changes`."""
    tensors = DIALECT.write("p", quantized(scheme)) | {f"p.{key}": value for key, value in changes.items()}
    return DIALECT.read("p", tensors.__getitem__, scheme)


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        (NVFP4, {"weight_scale": torch.zeros(256, 8).to(torch.float8_e4m3fn)}, "scale is zero"),
        (
            NVFP4,
            {"weight_scale": torch.full((256, 8), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)},
            "not finite",
        ),
        (NVFP4, {"weight_scale": torch.full((256, 8), -1.0).to(torch.float8_e4m3fn)}, "negative"),
        (NVFP4, {"weight_scale": torch.ones(256, 8)}, "its scales are torch.float32; torch.float8_e4m3fn fits"),
        (NVFP4, {"weight_scale": torch.ones(256, 4).to(torch.float8_e4m3fn)}, r"scales have shape \(256, 4\)"),
        (NVFP4, {"weight_packed": torch.ones(256, 64, dtype=torch.int32)}, "its packed codes are torch.int32"),
        (NVFP4, {"weight_global_scale": torch.tensor([0.0])}, "its divisor of scales is 0.0"),
        (NVFP4, {"weight_global_scale": torch.tensor([float("nan")])}, "its divisor of scales is nan"),
        (NVFP4, {"weight_global_scale": torch.tensor([-1.0])}, "its divisor of scales is -1.0"),
        (NVFP4, {"weight_global_scale": torch.tensor([1.0, 2.0])}, "weight_global_scale has the shape"),
        (
            NVFP4,
            {"weight_global_scale": torch.tensor([1e-4])},
            "the reciprocal of what its format asks for",
        ),
        (MXFP4, {"weight_scale": torch.full((256, 4), 255, dtype=torch.uint8)}, "1024 of 1024 scales are 255"),
        (MXFP4, {"weight_scale": torch.ones(256, 4)}, "its scales are torch.float32; torch.uint8 fits"),
        (MXFP8, {"weight_scale": torch.ones(255, 4, dtype=torch.uint8)}, r"scales have shape \(255, 4\)"),
        (MXFP8, {"weight": torch.ones(256, 128, dtype=torch.uint8)}, "codes must be"),
        (parse_scheme("fp8-block"), {"weight_scale": torch.ones(2, 2)}, r"scales have shape \(2, 2\), not \(2, 1\)"),
        (parse_scheme("fp8-block"), {"weight_scale": torch.zeros(2, 1)}, "scale is zero"),
        (parse_scheme("fp8-block"), {"weight_scale": torch.full((2, 1), 500.0)}, "weights of up to 2.24e"),
        (parse_scheme("fp8-a16"), {"weight_scale": torch.full((256, 1), 500.0)}, "the reciprocal of what"),
        (parse_scheme("nvfp4"), {"input_global_scale": torch.tensor([1 / 512])}, "inputs of up to 1.38e"),
        (parse_scheme("fp8-static"), {"input_scale": torch.tensor([1e4])}, "inputs of up to 4.48e"),
    ],
)
def test_bad_files_are_refused(scheme, changes, message):
    with pytest.raises(CheckpointError, match=f"^p: .*{message}"):
        written(scheme, **changes)


def test_a_scale_of_zero_stands_where_all_codes_are_zero():
    weight = quantized(NVFP4)
    tensors = DIALECT.write("p", weight)
    tensors["p.weight_packed"][3, :8] = 0x80
    tensors["p.weight_scale"].view(torch.uint8)[3, 0] = 0
    back = DIALECT.read("p", tensors.__getitem__, NVFP4)
    assert back.dequantize()[3, :16].tolist() == [0.0] * 16
    assert torch.equal(back.dequantize()[4:], weight.dequantize()[4:])


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 32},
        {"strategy": "group"},
        {"strategy": "channel", "group_size": None},
        {"num_bits": 6},
        {"strategy": "block", "block_structure": [128]},
        {"strategy": "block", "block_structure": None},
    ],
)
def test_groups_that_are_none_of_ours_are_refused(changes):
    config = DIALECT.quantization_config({"p": NVFP4}, [])
    config["config_groups"]["group_0"]["weights"].update(changes)
    with pytest.raises(CheckpointError, match="cannot be followed"):
        DIALECT.schemes_of(config, ["p"])


def test_block_fp8_of_deepseek_to_the_letter():
    weight = quantized(parse_scheme("fp8-block"))
    tensors = FORMATS["fp8"].write("p", weight)
    assert list(tensors) == ["p.weight", "p.weight_scale_inv"]
    assert tensors["p.weight"].dtype == torch.float8_e4m3fn
    assert tuple(tensors["p.weight_scale_inv"].shape) == (2, 1)
    assert FORMATS["fp8"].quantization_config({"p": weight.scheme}, ["lm_head"]) == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    cut = {"p.weight": tensors["p.weight"][:200, :100], "p.weight_scale_inv": tensors["p.weight_scale_inv"]}
    back = FORMATS["fp8"].read("p", cut.__getitem__, weight.scheme)
    assert torch.equal(back.dequantize(), weight.dequantize()[:200, :100])
    with pytest.raises(CheckpointError, match=r"^p: .*scales have shape \(2, 2\), not \(2, 1\)"):
        FORMATS["fp8"].read("p", (cut | {"p.weight_scale_inv": torch.ones(2, 2)}).__getitem__, weight.scheme)
    inverse = cut | {"p.weight_scale_inv": 1 / tensors["p.weight_scale_inv"]}
    with pytest.raises(CheckpointError, match=r"^p: its scale allows weights of up to .* the reciprocal of what"):
        FORMATS["fp8"].read("p", inverse.__getitem__, weight.scheme)
    with pytest.raises(CheckpointError, match="activation_scheme 'static'"):
        FORMATS["fp8"].schemes_of({"weight_block_size": [128, 128], "activation_scheme": "static"}, ["p"])
    with pytest.raises(CheckpointError, match="cannot be followed"):
        FORMATS["fp8"].schemes_of({"weight_block_size": None}, ["p"])


def test_modelopt_stores_factors():
    weight = quantized(parse_scheme("nvfp4"))
    tensors = FORMATS["modelopt"].write("p", replace(weight, input_scale=torch.tensor(64.0)))
    assert list(tensors) == ["p.weight", "p.weight_scale", "p.weight_scale_2", "p.input_scale"]
    assert float(tensors["p.weight_scale_2"]) == 1 / float(weight.divisor)
    assert float(tensors["p.input_scale"]) == 1 / 64
    block = FORMATS["modelopt"].quantization_config({"p": weight.scheme}, ["lm_head"])
    assert (block["quant_method"], block["quant_algo"], block["exclude_modules"]) == ("modelopt", "NVFP4", ["lm_head"])
    assert block["quantization"]["group_size"] == 16
    with pytest.raises(CheckpointError, match=r"p: its global scale 1966\.07996 has no exact reciprocal in float32"):
        FORMATS["modelopt"].write(
            "p", replace(weight, input_scale=torch.tensor(64.0), divisor=torch.tensor(0.03) * 2**16)
        )
    with pytest.raises(CheckpointError, match="of modelopt's algorithms NVFP4, W4A16_NVFP4, FP8 are supported"):
        FORMATS["modelopt"].schemes_of({"quant_algo": "FP8_PB_WO"}, ["p"])


def test_layers_of_modelopts_mixtures_say_their_own():
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    block = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    found = FORMATS["modelopt"].schemes_of(block, ["a", "b"])
    assert {name: str(scheme) for name, scheme in found.items()} == {"a": "fp8-static", "b": "nvfp4-a16"}
    file = {"a.weight": torch.ones(3, 4).to(torch.float8_e4m3fn), "a.weight_scale": torch.tensor(0.5)}
    file |= {"a.input_scale": torch.tensor(0.25)}
    back = FORMATS["modelopt"].read("a", file.__getitem__, found["a"])
    assert back.dequantize().tolist() == [[0.5] * 4] * 3
    assert float(back.input_scale) == 0.25
    with pytest.raises(CheckpointError, match="cannot be followed"):
        FORMATS["modelopt"].schemes_of(block, ["c"])
