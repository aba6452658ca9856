"""export/convert.py: every conversion between formats, and the reasons for refusals."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import open_checkpoint
from lowbit.export.convert import convert, express
from lowbit.export.dialects import FORMATS
from lowbit.export.formats import LogicalTensors
from lowbit.export.staging import exchange
from lowbit.quant.numbers import E8M0
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme, parse_scheme
from tests.quantized import write_config

SHARD = 1 << 30
NAMES = ("m.layers.0.up", "m.layers.0.down")


def quantized(text: str, scale_dtype: torch.dtype = torch.float16, k: int = 128, n: int = 0) -> QTensor:
    """A weight of k inputs, and n outputs or as many as its scheme needs, whose zeros are at least 1."""
    scheme = parse_scheme(text)
    n = n or {"fp8-block": 128, "int3-g32": 32}.get(text, 16)
    plain = round_to_nearest(torch.randn(n, k), scheme.weights_only, scale_dtype)
    zeros = None if plain.zeros is None else plain.zeros.clamp(min=1)
    scale = torch.tensor(2.0**-4) if scheme.static_inputs else None
    return QTensor(plain.codes, plain.scales, zeros, scheme, scale, plain.divisor)


def written(directory: Path, fmt: str, *weights: QTensor, **others: QTensor) -> LogicalTensors:
    """A checkpoint in `directory` with the weights under NAMES or their own names, a norm, and a linear that was left
    alone."""
    directory.mkdir()
    named = dict(zip(NAMES, weights, strict=False)) | others
    tensors = {key: value for name, each in named.items() for key, value in FORMATS[fmt].write(name, each).items()}
    tensors |= {"m.norm.weight": torch.ones(128, dtype=torch.bfloat16), "lm_head.weight": torch.randn(8, 128)}
    save_file(tensors, directory / "model.safetensors")
    schemes = {name: each.scheme for name, each in named.items()}
    write_config(directory, {"x": 1}, FORMATS[fmt], FORMATS[fmt].quantization_config(schemes, ["lm_head"]))
    return LogicalTensors(open_checkpoint(directory))


def converted(source: LogicalTensors, fmt: str, directory: Path, scheme: Scheme | None = None):
    """The conversion and what its files read as."""
    directory.mkdir()
    done = convert(source, FORMATS[fmt], ["lm_head"], directory, SHARD, scheme=scheme)
    return done, LogicalTensors(open_checkpoint(directory))


INTEGERS = ("compressed-tensors", "gptq", "gptq_v2", "awq")


def holds(fmt: str, scheme: Scheme) -> bool:
    """True if a format accepts the scheme, or the same weights with explicit zeros."""
    return any(FORMATS[fmt].reason_against(each) is None for each in (scheme, scheme.with_zeros(True)))


WAYS = [
    (before, after, text)
    for before, after in product(INTEGERS, INTEGERS)
    for text in ("int4-g32", "uint4-g32", "int4-channel", "uint4-channel", "int8-g32", "int8-channel")
    if FORMATS[before].reason_against(parse_scheme(text)) is None and holds(after, parse_scheme(text))
]
CT = "compressed-tensors"
WAYS += [(CT, CT, text) for text in ("int3-g32", "fp8-block", "nvfp4", "mxfp4-a16", "mxfp8")]
WAYS += [(CT, "fp8", "fp8-block"), ("fp8", CT, "fp8-block"), (CT, "gptq_v2", "int3-g32"), ("gptq_v2", CT, "int3-g32")]
WAYS += [(*pair, text) for pair in ((CT, "modelopt"), ("modelopt", CT)) for text in ("nvfp4", "nvfp4-a16")]


@pytest.mark.parametrize(("before", "after", "text"), WAYS, ids=str)
def test_every_way_keeps_the_weights_to_the_bit(tmp_path, before, after, text):
    weights = [quantized(text), quantized(text)]
    source = written(tmp_path / "in", before, *weights)
    done, result = converted(source, after, tmp_path / "out")
    assert result.format is FORMATS[after]
    assert (done.exact, done.rounded) == (2, {})
    assert result.schemes == done.schemes
    for name, weight in zip(NAMES, weights, strict=True):
        assert torch.equal(result.qtensor(name).dequantize(), weight.dequantize())
    for name in ("m.norm.weight", "lm_head.weight"):
        assert torch.equal(result.read(name), source.read(name))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["x"] == 1


@pytest.mark.parametrize("fmt", ["gptq", "awq", "gptq_v2"])
def test_there_and_back_gives_the_same_tensors(tmp_path, fmt):
    source = written(tmp_path / "in", "compressed-tensors", quantized("int4-g32"), quantized("int4-g32"))
    there = converted(source, fmt, tmp_path / "there")[1]
    back = converted(there, "compressed-tensors", tmp_path / "back")[1]
    assert back.schemes == source.schemes
    assert set(back.checkpoint.entries) == set(source.checkpoint.entries)
    for name in source.checkpoint.entries:
        assert torch.equal(back.checkpoint.read(name), source.checkpoint.read(name)), name


def test_activations_travel_between_layouts_of_one_dialect_alone(tmp_path):
    source = written(tmp_path / "in", "compressed-tensors", quantized("int8-channel-a8tensor"))
    result = converted(source, "compressed-tensors", tmp_path / "out")[1]
    assert torch.equal(result.qtensor(NAMES[0]).input_scale, torch.tensor(2.0**-4))
    for fmt, reason in (("gptq", "no quantized activations"), ("awq", "only 4-bit weights")):
        with pytest.raises(CheckpointError, match=reason):
            converted(source, fmt, tmp_path / fmt)


def test_a_format_of_one_scheme_gets_the_narrowest_groups(tmp_path):
    weights = quantized("int4-g64"), quantized("int4-channel", k=96)
    source = written(tmp_path / "in", "compressed-tensors", *weights)
    done, result = converted(source, "gptq", tmp_path / "out")
    assert {str(scheme) for scheme in result.schemes.values()} == {"int4-g32"}
    assert done.rewrites == {
        "each scale of g64 2 times for g32": 1,
        "each scale of channel 3 times for g32": 1,
    }
    for name, weight in zip(NAMES, weights, strict=True):
        assert torch.equal(result.qtensor(name).dequantize(), weight.dequantize())


def test_zeros_in_one_linear_are_zeros_in_all_where_there_is_one_scheme(tmp_path):
    source = written(tmp_path / "in", "compressed-tensors", quantized("int4-g32"), quantized("uint4-g32"))
    done, result = converted(source, "gptq_v2", tmp_path / "out")
    assert {str(scheme) for scheme in result.schemes.values()} == {"uint4-g32"}
    assert done.rewrites == {"symmetric codes as unsigned ones with a zero of 8": 1}
    assert done.exact == 2


def test_different_bits_have_no_common_scheme(tmp_path):
    source = written(tmp_path / "in", "compressed-tensors", quantized("int4-g32"), quantized("int8-g32"))
    with pytest.raises(CheckpointError, match=r"gptq holds one scheme, and these linears have 2: .*int4-g32.*\)$"):
        converted(source, "gptq", tmp_path / "out")


def test_a_zero_of_0_has_no_place_in_version_1(tmp_path):
    weight = quantized("uint4-g32")
    weight.zeros[3, 1] = 0
    source = written(tmp_path / "in", "awq", weight)
    with pytest.raises(CheckpointError, match=r"m\.layers\.0\.up: 1 of 64 zeros are 0, which version 1.*gptq_v2"):
        converted(source, "gptq", tmp_path / "v1")
    assert converted(source, "gptq_v2", tmp_path / "v2")[0].exact == 1


def test_8_bits_have_no_place_in_awq(tmp_path):
    source = written(tmp_path / "in", "gptq", quantized("int8-g32"))
    with pytest.raises(CheckpointError, match="only 4-bit weights"):
        converted(source, "awq", tmp_path / "out")


def test_bfloat16_scales_are_float16_exactly_where_they_are_not_tiny(tmp_path):
    source = written(tmp_path / "in", "compressed-tensors", quantized("int4-g32", torch.bfloat16))
    done, result = converted(source, "gptq", tmp_path / "out")
    assert (done.exact, done.rounded) == (1, {})
    assert result.qtensor(NAMES[0]).scales.dtype == torch.float16


def test_scales_that_are_rounded_are_counted_with_their_change(tmp_path):
    weight = quantized("int4-g32", torch.float32)
    weight.scales[0, 0] = 1 + 2**-12
    done, result = converted(written(tmp_path / "in", "compressed-tensors", weight), "gptq", tmp_path / "out")
    assert done.exact == 0
    assert 2**-13 < done.rounded[NAMES[0]] <= 2**-11
    assert torch.equal(result.qtensor(NAMES[0]).codes, weight.codes)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_scales_without_a_place_in_float16_are_refused(tmp_path, scale):
    weight = quantized("int4-g32", torch.bfloat16)
    weight.scales[0, 0] = scale
    source = written(tmp_path / "in", "compressed-tensors", weight)
    with pytest.raises(CheckpointError, match=r"1 of 64 scales .* do not fit torch\.float16"):
        converted(source, "awq", tmp_path / "out")


def test_a_model_that_is_not_quantized(tmp_path):
    save_file({"a.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not quantized; `quantize --format gptq` does that"):
        convert(LogicalTensors(open_checkpoint(tmp_path)), FORMATS["gptq"], [], tmp_path, SHARD)


def test_express_rounds_nothing():
    weight = quantized("int4-channel")
    for text in ("int4-g64", "uint4-g32", "uint4-channel"):
        other, rewrites = express(weight, parse_scheme(text))
        assert str(other.scheme) == text
        assert torch.equal(other.dequantize(), weight.dequantize())
        assert rewrites


RESTATED = [
    ("mxfp4-a16", "nvfp4-a16", CT),
    ("mxfp4-a16", "nvfp4-a16", "modelopt"),
    ("mxfp4-a16", "fp8-block", "fp8"),
    ("mxfp4-a16", "fp8-block-a16", CT),
    ("mxfp4-a16", "mxfp8-a16", CT),
    ("mxfp4-a16", "int8-g32", CT),
    ("mxfp4-a16", "int5-g32", CT),
    ("int4-g32", "int8-g32", "gptq"),
    ("int4-g64", "int6-g32", CT),
    ("uint4-g32", "int5-g32", CT),
    ("nvfp4", "nvfp4-a16", "modelopt"),
    ("fp8-block", "fp8-block-a16", CT),
]


@pytest.mark.parametrize(("before", "after", "fmt"), RESTATED)
def test_another_scheme_with_the_same_values(tmp_path, before, after, fmt):
    torch.manual_seed(11)
    n = 128 if "block" in after + before else 16
    weights = [quantized(before, n=n), quantized(before, n=n)]
    if weights[0].scheme.weights.scales == E8M0:  # of all sizes that the other scheme has, and a group of zeros
        sizes = 2.0 ** torch.randint(-14 if "int" not in after else 0, 1, (2, *weights[0].scales.shape)).bfloat16()
        weights = [replace(each, scales=scales) for each, scales in zip(weights, sizes, strict=True)]
        weights[0].codes[0, :32] = 0
    source = written(tmp_path / "in", CT, *weights)
    done, result = converted(source, fmt, tmp_path / "out", parse_scheme(after))
    assert done.exact == 2
    for name, weight in zip(NAMES, weights, strict=True):
        assert str(result.schemes[name]) == after
        assert torch.equal(result.qtensor(name).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("mxfp4-a16", "nvfp4-a16", "are no values of nvfp4-a16: its scales run from 5.42e-20 to 1"),
        ("mxfp4-a16", "fp8-block", "are no values of fp8-block: its scales run from 5.42e-20 to 1"),
        ("mxfp4-a16", "nvfp4", "calibrated scales of inputs, and the file has none: take a scheme with -a16"),
        ("int4-g32", "nvfp4-a16", "are no values of nvfp4-a16"),
        ("int8-g32", "int4-g32", "are no values of int4-g32"),
        ("int4-g32", "fp8", "are no values of fp8"),
        ("uint4-g32", "int4-g32", "its zeros are not all 8, and int4-g32 has none"),
        ("int8-g32", "uint8-g32", "asymmetric 8-bit weights have no kernel"),
        ("int4-g32", "uint5-g64", "asymmetric 5-bit weights have no kernel"),
        ("int4-g32", "fp8-block", "16 outputs do not divide into blocks of 128"),
    ],
)
def test_values_that_another_scheme_has_not_are_refused(tmp_path, before, after, said):
    n = 16 if "16 outputs" in said or after != "fp8-block" else 128
    weight = quantized(before, n=n)
    if before == "mxfp4-a16":
        weight = replace(weight, scales=torch.ones_like(weight.scales))
        weight.scales[3, 1] = 2.0**-64
    source = written(tmp_path / "in", CT, weight)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        converted(source, CT, tmp_path / "out", parse_scheme(after))


def test_linears_that_engines_join_get_one_divisor(tmp_path):
    weights = {f"m.layers.0.{part}_proj": quantized("mxfp4-a16") for part in "qko"}
    weights = {name: replace(each, scales=each.scales * 2.0**i) for i, (name, each) in enumerate(weights.items())}
    source = written(tmp_path / "in", CT, **weights)
    result = converted(source, "modelopt", tmp_path / "out", parse_scheme("nvfp4-a16"))[1]
    q, k, o = (result.qtensor(name) for name in weights)
    assert q.divisor == k.divisor != o.divisor
    for name, each in weights.items():
        assert torch.equal(result.qtensor(name).dequantize(), each.dequantize())


def test_joined_linears_with_different_divisors_are_refused(tmp_path):
    weights = {f"m.layers.0.mlp.experts.1.{part}_proj": quantized("nvfp4-a16") for part in ("gate", "up", "down")}
    other = "m.layers.0.mlp.experts.1.up_proj"
    weights[other] = replace(weights[other], divisor=torch.tensor(3.0))
    source = written(tmp_path / "in", CT, **weights)
    with pytest.raises(CheckpointError, match=r"experts\.1\.gate_proj, m\..*up_proj have different global scales"):
        converted(source, "modelopt", tmp_path / "out")


@pytest.mark.parametrize("when", ["while it reads", "before the end"])
def test_a_source_that_another_run_replaces_is_no_result(tmp_path, monkeypatch, when):
    """As --overwrite does: the directory has another checkpoint of the same shapes from then on."""
    torch.manual_seed(0)
    source = written(tmp_path / "source", "gptq", quantized("int4-g32"), quantized("int4-g32"))
    written(tmp_path / "other", "gptq", quantized("int4-g32"), quantized("int4-g32"))
    place = "lowbit.export.convert._verify" if when == "before the end" else "lowbit.export.convert._divisors"

    def replaced(*args: object) -> dict[str, torch.Tensor]:
        assert exchange(source.checkpoint.directory, tmp_path / "other")
        return {}

    monkeypatch.setattr(place, replaced)
    with pytest.raises(CheckpointError, match=r"(model.safetensors|config.json): changed while it was read"):
        converted(source, "compressed-tensors", tmp_path / "out")
