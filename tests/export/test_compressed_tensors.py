"""export/compressed_tensors.py: words written by hand, and the installed library reading ours and writing the same."""

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS as DIALECT
from lowbit.export.dialects import FORMATS
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme, make_scheme, parse_scheme

DYNAMIC, STATIC = parse_scheme("int8-channel-a8token"), parse_scheme("int8-channel-a8tensor")
FLOATS = [parse_scheme(f"fp8-channel{inputs}") for inputs in ("", "-afp8token", "-afp8tensor")]
SCHEMES = [
    make_scheme(4, 32, True),
    make_scheme(4, 64, True),
    make_scheme(4, -1, True),
    make_scheme(4, 32, False),
    make_scheme(4, -1, False),
    make_scheme(8, -1, True),
    make_scheme(8, 32, True),
    *(make_scheme(bits, 32, True) for bits in (2, 3, 5, 6, 7)),
    make_scheme(3, -1, True),
]


def quantized(scheme: Scheme, n: int = 16, dtype: torch.dtype = torch.float32) -> QTensor:
    """A weight (n, 128) of `scheme`."""
    plain = round_to_nearest(torch.randn(n, 128) + 0.3, scheme.weights_only, dtype)
    scale = torch.tensor(0.03) if scheme.static_inputs else None
    return QTensor(plain.codes, plain.scales, plain.zeros, scheme, scale)


def test_the_table_has_it():
    assert FORMATS["compressed-tensors"] is DIALECT


def test_a_symmetric_linear_to_the_letter():
    codes = torch.zeros(2, 32, dtype=torch.int8)
    codes[0, :8] = torch.tensor([-8, -7, -6, -5, -4, -3, -2, -1])
    codes[1, :8] = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    scales = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16)
    tensors = DIALECT.write("a.b", QTensor(codes, scales, None, make_scheme(4, 32, True)))
    assert list(tensors) == ["a.b.weight_packed", "a.b.weight_scale", "a.b.weight_shape"]
    zeros = 0x88888888 - (1 << 32)  # a code 0 is 8 in the word
    packed = tensors["a.b.weight_packed"]
    assert packed.dtype == torch.int32
    assert packed.tolist() == [[0x76543210, zeros, zeros, zeros], [0x89ABCDEF - (1 << 32), zeros, zeros, zeros]]
    assert tensors["a.b.weight_scale"].dtype == torch.bfloat16
    assert tensors["a.b.weight_scale"].tolist() == [[0.5], [0.25]]
    assert tensors["a.b.weight_shape"].dtype == torch.int64
    assert tensors["a.b.weight_shape"].tolist() == [2, 32]


def test_an_asymmetric_linear_to_the_letter():
    """Zeros go along the outputs: row o of a group lies at bits 4 (o % 8) of word o // 8."""
    codes = torch.arange(9 * 64).reshape(9, 64).remainder(16).to(torch.uint8)
    zeros = torch.stack([torch.arange(9), 15 - torch.arange(9)], dim=1).to(torch.int32)
    scales = torch.full((9, 2), 0.5, dtype=torch.float16)
    tensors = DIALECT.write("p", QTensor(codes, scales, zeros, make_scheme(4, 32, False)))
    assert set(tensors) == {f"p.weight_{suffix}" for suffix in ("packed", "scale", "shape", "zero_point")}
    words = [0x76543210, 0xFEDCBA98 - (1 << 32)] * 4
    assert tensors["p.weight_packed"].tolist() == [words] * 9
    assert tensors["p.weight_zero_point"].dtype == torch.int32
    assert tensors["p.weight_zero_point"].tolist() == [[0x76543210, 0x89ABCDEF - (1 << 32)], [8, 7]]
    assert tensors["p.weight_zero_point"].is_contiguous()


def test_an_int8_linear_to_the_letter():
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, :4] = torch.tensor([-128, -1, 0, 127])
    tensors = DIALECT.write("p", QTensor(codes, torch.ones(1, 1), None, make_scheme(8, -1, True)))
    assert tensors["p.weight_packed"][0, 0] == 0xFF807F00 - (1 << 32)
    assert tensors["p.weight_packed"][0, 1] == 0x80808080 - (1 << 32)


def test_int8_activations_to_the_letter():
    codes = torch.tensor([[-128, 127], [3, -4]], dtype=torch.int8)
    scales = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16)
    tensors = DIALECT.write("a.b", QTensor(codes, scales, None, STATIC, torch.tensor(0.125)))
    assert list(tensors) == ["a.b.weight", "a.b.weight_scale", "a.b.input_scale"]
    assert tensors["a.b.weight"].dtype == torch.int8
    assert tensors["a.b.weight"].tolist() == [[-128, 127], [3, -4]]
    assert tensors["a.b.weight_scale"].dtype == torch.bfloat16
    assert tensors["a.b.weight_scale"].tolist() == [[0.5], [0.25]]
    assert tensors["a.b.input_scale"].dtype == torch.float32
    assert tensors["a.b.input_scale"].tolist() == [0.125]
    assert list(DIALECT.write("a.b", QTensor(codes, scales, None, DYNAMIC))) == [
        "a.b.weight",
        "a.b.weight_scale",
    ]


def test_fp8_to_the_letter():
    codes = torch.tensor([[448.0, -0.5], [2**-9, 0.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5], [0.25]], dtype=torch.bfloat16)
    tensors = DIALECT.write("a.b", QTensor(codes, scales, None, FLOATS[1]))
    assert list(tensors) == ["a.b.weight", "a.b.weight_scale"]
    assert tensors["a.b.weight"].dtype == torch.float8_e4m3fn
    assert tensors["a.b.weight"].view(torch.uint8).tolist() == [[0x7E, 0xB0], [0x01, 0x00]]
    assert tensors["a.b.weight_scale"].tolist() == [[0.5], [0.25]]
    config = DIALECT.quantization_config({"a.b": FLOATS[1]}, ["lm_head"])
    group = config["config_groups"]["group_0"]
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    assert config["format"] == group["format"] == "float-quantized"
    assert group["weights"] == common | {"strategy": "channel", "dynamic": False}
    assert group["input_activations"] == common | {"strategy": "token", "dynamic": True}


@pytest.mark.parametrize("scheme", [*SCHEMES, DYNAMIC, STATIC, *FLOATS], ids=str)
@pytest.mark.parametrize("n", [1, 7, 8, 13])
def test_round_trip_bit_for_bit(scheme, n):
    weight = quantized(scheme, n, torch.bfloat16)
    tensors = DIALECT.write("x.y", weight)
    assert DIALECT.linears([*tensors, "x.norm.weight", "x.y.bias"]) == ["x.y"]
    back = DIALECT.read("x.y", tensors.__getitem__, scheme)
    assert torch.equal(back.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert torch.equal(back.scales, weight.scales)
    assert (back.zeros is None) == (weight.zeros is None)
    assert weight.zeros is None or torch.equal(back.zeros, weight.zeros)
    assert (back.input_scale is None) == (weight.input_scale is None)
    assert weight.input_scale is None or torch.equal(back.input_scale, weight.input_scale)


def test_one_scale_for_a_whole_weight_is_every_rows():
    tensors = DIALECT.write("p", quantized(DYNAMIC)) | {"p.weight_scale": torch.tensor([0.5])}
    assert DIALECT.read("p", tensors.__getitem__, DYNAMIC).scales.tolist() == [[0.5]] * 16


@pytest.mark.peer
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n", [8, 13])
def test_the_library_packs_to_the_same_words_and_reads_the_same_values(scheme, n):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight = round_to_nearest(torch.randn(n, 128) + 0.3, scheme, torch.float32)
    tensors = DIALECT.write("p", weight)
    offset = 0 if scheme.symmetric else 1 << (scheme.bits - 1)
    signed = (weight.codes.to(torch.int16) - offset).to(torch.int8)
    assert torch.equal(helpers.pack_to_int32(signed, scheme.bits), tensors["p.weight_packed"])
    assert torch.equal(helpers.unpack_from_int32(tensors["p.weight_packed"], scheme.bits, torch.Size([n, 128])), signed)
    if weight.zeros is not None:
        zeros = (weight.zeros - offset).to(torch.int8)
        packed = helpers.pack_to_int32(zeros, scheme.bits, packed_dim=0)
        assert torch.equal(packed, tensors["p.weight_zero_point"])


@pytest.mark.peer
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_library_decompresses_ours_to_our_weight(scheme):
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme

    weight = round_to_nearest(torch.randn(16, 128) + 0.3, scheme, torch.float32)
    tensors = {key.removeprefix("p."): value for key, value in DIALECT.write("p", weight).items()}
    group = DIALECT.quantization_config({"p": scheme}, [])["config_groups"]["group_0"]
    theirs = base.PackedQuantizationCompressor.decompress(tensors, QuantizationScheme.model_validate(group))
    torch.testing.assert_close(theirs["weight"], weight.dequantize(), rtol=0, atol=0)


@pytest.mark.peer
@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC], ids=str)
def test_the_library_decompresses_int8_to_our_weight(scheme):
    base = pytest.importorskip("compressed_tensors.compressors.naive_quantized.base")
    from compressed_tensors.quantization import QuantizationScheme

    weight = quantized(scheme)
    tensors = {key.removeprefix("p."): value for key, value in DIALECT.write("p", weight).items()}
    group = DIALECT.quantization_config({"p": scheme}, [])["config_groups"]["group_0"]
    theirs = base.IntQuantizationCompressor.decompress(tensors, QuantizationScheme.model_validate(group))
    torch.testing.assert_close(theirs["weight"], weight.dequantize(), rtol=0, atol=0)


def changed(tensors: dict[str, torch.Tensor], **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return tensors | {f"p.{suffix}": tensor for suffix, tensor in changes.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_packed": torch.zeros(3, 8, dtype=torch.int64)},
        {"weight_packed": torch.zeros(3, 7, dtype=torch.int32)},
        {"weight_packed": torch.zeros(4, 8, dtype=torch.int32)},
        {"weight_packed": torch.tensor(3, dtype=torch.int32)},
        {"weight_shape": torch.tensor([3, 65])},
        {"weight_shape": torch.tensor([3])},
        {"weight_shape": torch.tensor([3, 64, 1])},
        {"weight_scale": torch.ones(3, 1)},
        {"weight_scale": torch.zeros(3, 2)},
        {"weight_scale": torch.full((3, 2), float("nan"))},
        {"weight_scale": torch.ones(3, 2, dtype=torch.int32)},
        {"weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)},
        {"weight_zero_point": torch.zeros(1, 3, dtype=torch.int32)},
        {"weight_zero_point": torch.tensor(0, dtype=torch.int32)},
    ],
    ids=lambda changes: "-".join(f"{key}-{list(value.shape)}" for key, value in changes.items()),
)
def test_files_that_contradict_themselves_are_refused(changes):
    scheme = make_scheme(4, 32, False)
    tensors = changed(DIALECT.write("p", round_to_nearest(torch.randn(3, 64), scheme, torch.float32)), **changes)
    with pytest.raises(CheckpointError, match=r"^p: "):
        DIALECT.read("p", tensors.__getitem__, scheme)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": torch.zeros(16, 128)},
        {"weight": torch.zeros(16, dtype=torch.int8)},
        {"weight_scale": torch.ones(8, 1)},
        {"weight_scale": torch.zeros(16, 1)},
        {"input_scale": torch.zeros(1)},
        {"input_scale": torch.ones(2)},
        {"input_scale": torch.tensor([float("inf")])},
    ],
    ids=lambda changes: "-".join(f"{key}-{list(value.shape)}" for key, value in changes.items()),
)
def test_int8_files_that_contradict_themselves_are_refused(changes):
    tensors = changed(DIALECT.write("p", quantized(STATIC)), **changes)
    with pytest.raises(CheckpointError, match=r"^p: "):
        DIALECT.read("p", tensors.__getitem__, STATIC)


def test_asymmetric_8_bits_have_no_kernel_anywhere():
    assert "--sym" in DIALECT.reason_against(make_scheme(8, -1, False))
    assert all(DIALECT.reason_against(scheme) is None for scheme in SCHEMES)


def layers(count: int, **roles: Scheme) -> dict[str, Scheme]:
    return {
        f"model.layers.{i}.{role.replace('__', '.')}": scheme for i in range(count) for role, scheme in roles.items()
    }


def test_one_scheme_targets_every_linear():
    config = DIALECT.quantization_config(layers(2, mlp__up_proj=SCHEMES[0]), ["lm_head"])
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
    }


def test_a_scheme_per_channel_has_no_group_size():
    config = DIALECT.quantization_config({"a": make_scheme(8, -1, True)}, [])
    weights = config["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == "channel"
    assert "group_size" not in weights


def test_int8_activations_are_declared_in_their_group():
    groups = {
        str(scheme.inputs.granularity): DIALECT.quantization_config({"a": scheme}, ["lm_head"])
        for scheme in (DYNAMIC, STATIC)
    }
    assert {config["format"] for config in groups.values()} == {"int-quantized"}
    inputs = {
        key: config["config_groups"]["group_0"]["input_activations"]
        | {"layout": config["config_groups"]["group_0"]["format"]}
        for key, config in groups.items()
    }
    common = {"num_bits": 8, "type": "int", "symmetric": True, "layout": "int-quantized"}
    assert inputs["token"] == common | {"strategy": "token", "dynamic": True}
    assert inputs["tensor"] == common | {"strategy": "tensor", "dynamic": False}


def test_two_layouts_in_one_checkpoint():
    schemes = layers(2, mlp__up_proj=SCHEMES[0], mlp__down_proj=DYNAMIC)
    config = DIALECT.quantization_config(schemes, [])
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["pack-quantized", "int-quantized"]
    assert DIALECT.schemes_of(config, schemes) == schemes


MIXED = {
    "by role": layers(12, self_attn__q_proj=SCHEMES[0], mlp__up_proj=SCHEMES[0], mlp__down_proj=SCHEMES[1]),
    "one layer apart": layers(12, mlp__up_proj=SCHEMES[0], mlp__down_proj=SCHEMES[1])
    | {"model.layers.1.mlp.down_proj": SCHEMES[2]},
    "asymmetric and 8 bits": layers(3, q=SCHEMES[3], k=SCHEMES[5], v=SCHEMES[4]),
    "experts": {
        f"m.layers.{i}.experts.{e}.{role}": SCHEMES[i] for i in range(3) for e in range(2) for role in ("w1", "w2")
    },
    "no number": {"decoder.up": SCHEMES[0], "decoder.down": SCHEMES[1], "up": SCHEMES[1]},
    "activations too": layers(3, q=DYNAMIC, k=SCHEMES[0], v=STATIC),
    "a name that ends like another": layers(11, proj=SCHEMES[0], up_proj=SCHEMES[1], mlp__proj=SCHEMES[2]),
    "a role that ends like another behind a dot": layers(2, proj=SCHEMES[0], a__proj=SCHEMES[1]),
}


@pytest.mark.parametrize("schemes", MIXED.values(), ids=MIXED)
def test_targets_lead_back_to_every_scheme(schemes):
    assert DIALECT.schemes_of(DIALECT.quantization_config(schemes, []), schemes) == schemes


@pytest.mark.peer
@pytest.mark.parametrize("schemes", MIXED.values(), ids=MIXED)
def test_the_library_resolves_targets_to_the_same_schemes(schemes):
    """Its match_named_modules over a model with these linears: one group each, the same as ours."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    root = torch.nn.Module()
    for name in schemes:
        module = root
        for part in name.split("."):
            if part not in module._modules:
                module.add_module(part, torch.nn.Linear(1, 1) if f".{name}".endswith(f".{part}") else torch.nn.Module())
            module = module._modules[part]
    config = DIALECT.quantization_config(schemes, [])
    for group in config["config_groups"].values():
        linears = {name for name, _ in match.match_named_modules(root, group["targets"]) if name in schemes}
        assert linears
        wanted = schemes[min(linears)]
        assert linears == {name for name, scheme in schemes.items() if scheme == wanted}


def test_a_linear_that_no_group_targets_is_refused():
    config = DIALECT.quantization_config(MIXED["by role"], [])
    with pytest.raises(CheckpointError, match=r"no config group targets.*layers\.0\.mlp\.gate_proj"):
        DIALECT.schemes_of(config, ["model.layers.0.mlp.gate_proj"])


WEIGHTS = {"num_bits": 8, "symmetric": True, "type": "int", "strategy": "channel"}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS}


def test_the_least_that_a_group_can_say():
    assert DIALECT.schemes_of({"config_groups": {"group_0": GROUP}}, ["a"]) == {"a": make_scheme(8, -1, True)}


@pytest.mark.parametrize(
    "config",
    [
        {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}},
        {"config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": True}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 9, "symmetric": True}}}},
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True}}}},
        {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | {"type": "float", "num_bits": 4}}}},
        {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | {"type": "float", "symmetric": False}}}},
        {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | {"type": "posit"}}}},
        {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | {"strategy": "block"}}}},
        {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | {"dynamic": True}}}},
        {"config_groups": {"group_0": GROUP | {"format": "int-quantized"}}},
        {"config_groups": {"group_0": GROUP | {"output_activations": {"num_bits": 8}}}},
        {"config_groups": {"group_0": GROUP | {"input_activations": {"num_bits": 8, "type": "float"}}}},
        {
            "config_groups": {
                "group_0": GROUP | {"input_activations": {"num_bits": 8, "type": "int", "symmetric": False}}
            }
        },
        {"config_groups": {"group_0": GROUP | {"targets": ["re:("]}}},
        {"config_groups": {"group_0": GROUP | {"targets": [7]}}},
        {"config_groups": {"group_0": GROUP | {"targets": 7}}},
        {"config_groups": []},
        {},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(config):
    with pytest.raises(CheckpointError):
        DIALECT.schemes_of(config, ["a"])
