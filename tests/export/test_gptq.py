"""export/gptq.py: hand-written words, both versions of zeros, files that contradict themselves, declarations."""

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.export.gptq import GPTQ, GPTQ_V2
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme, make_scheme, parse_scheme

SCHEMES = [make_scheme(bits, size, sym) for bits in (2, 3, 4, 8) for size in (32, 128, -1) for sym in (True, False)]
INT4, UINT4 = make_scheme(4, 32, True), make_scheme(4, 32, False)


def quantized(scheme: Scheme, n: int = 32, k: int = 256) -> QTensor:
    """A weight of `scheme` whose zeros, where it has them, are at least 1."""
    weight = round_to_nearest(torch.randn(n, k), scheme, torch.float16)
    zeros = None if weight.zeros is None else weight.zeros.clamp(min=1)
    return QTensor(weight.codes, weight.scales, zeros, scheme)


def test_a_symmetric_linear_to_the_letter():
    codes = torch.zeros(8, 32, dtype=torch.int8)
    codes[0, :8] = torch.tensor([-8, -7, -6, -5, -4, -3, -2, -1])
    codes[1, :8] = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    scales = (torch.arange(8) + 1.0).to(torch.float16).unsqueeze(1)
    tensors = GPTQ.write("a.b", QTensor(codes, scales, None, make_scheme(4, -1, True)))
    assert list(tensors) == ["a.b.qweight", "a.b.qzeros", "a.b.scales", "a.b.g_idx"]
    zero = 0x88888888 - (1 << 32)
    assert tensors["a.b.qweight"].dtype == torch.int32
    assert tensors["a.b.qweight"].tolist() == [
        [0x76543210, 0x89ABCDEF - (1 << 32)] + [zero] * 6,
        *([[zero] * 8] * 3),
    ]
    assert tensors["a.b.qzeros"].tolist() == [[0x77777777]]  # 8 - 1, eight times
    assert tensors["a.b.scales"].dtype == torch.float16
    assert tensors["a.b.scales"].tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]
    assert tensors["a.b.g_idx"].dtype == torch.int32
    assert tensors["a.b.g_idx"].tolist() == [0] * 32


def test_zeros_of_both_versions_to_the_letter():
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    zeros = torch.stack([torch.arange(1, 9), torch.arange(8, 0, -1)], 1).to(torch.int32)
    weight = QTensor(codes, torch.ones(8, 2, dtype=torch.float16), zeros, UINT4)
    assert GPTQ_V2.write("p", weight)["p.qzeros"].tolist() == [[0x87654321 - (1 << 32)], [0x12345678]]
    assert GPTQ.write("p", weight)["p.qzeros"].tolist() == [[0x76543210], [0x01234567]]
    assert GPTQ.write("p", weight)["p.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_8_bits_to_the_letter():
    codes = torch.zeros(4, 32, dtype=torch.int8)
    codes[0, :4] = torch.tensor([-128, -1, 0, 127])
    tensors = GPTQ.write("p", QTensor(codes, torch.ones(4, 1, dtype=torch.float16), None, make_scheme(8, -1, True)))
    assert tensors["p.qweight"][0].tolist() == [0xFF807F00 - (1 << 32)] + [0x80808080 - (1 << 32)] * 3
    assert tensors["p.qzeros"].tolist() == [[0x7F7F7F7F]]


@pytest.mark.parametrize("fmt", [GPTQ, GPTQ_V2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_trip_bit_for_bit(fmt, scheme):
    weight = quantized(scheme)
    tensors = fmt.write("x.y", weight)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert fmt.linears([*tensors, "x.norm.weight", "x.y.bias"]) == ["x.y"]
    back = fmt.read("x.y", tensors.__getitem__, scheme)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert (back.zeros is None) == (weight.zeros is None)
    assert weight.zeros is None or torch.equal(back.zeros, weight.zeros)


def _along(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes along each row of words; three bits go on from a word to the next, in runs of three words."""
    if bits != 3:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)).flatten(1)
    first, second, third = (words.long()[:, i::3] & 0xFFFFFFFF for i in range(3))
    parts = [first >> 3 * i & 7 for i in range(10)] + [(first >> 30) | (second & 1) << 2]
    parts += [second >> 3 * i + 1 & 7 for i in range(10)] + [(second >> 31) | (third & 3) << 1]
    parts += [third >> 3 * i + 2 & 7 for i in range(10)]
    return torch.stack(parts, -1).flatten(1)


def unpacked_as_autogptq_did(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The dense weight (k, n) by AutoGPTQ's arithmetic for version 1, which later loaders repeat."""
    zeros = (_along(tensors["p.qzeros"], bits) + 1).reshape(tensors["p.scales"].shape)
    codes = _along(tensors["p.qweight"].T, bits).T
    groups = tensors["p.g_idx"].long()
    return tensors["p.scales"].float()[groups] * (codes - zeros[groups]).float()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_autogptqs_arithmetic_gives_our_weight(scheme):
    weight = quantized(scheme)
    assert torch.equal(unpacked_as_autogptq_did(GPTQ.write("p", weight), scheme.bits).T, weight.dequantize())


def test_a_zero_of_0_is_for_version_2_alone():
    zeros = torch.tensor([[0], *[[5]] * 7], dtype=torch.int32)
    weight = QTensor(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1).half(), zeros, make_scheme(4, -1, False))
    with pytest.raises(CheckpointError, match=r"p: 1 of 8 zeros are 0, which version 1 of GPTQ cannot store.*gptq_v2"):
        GPTQ.write("p", weight)
    back = GPTQ_V2.read("p", GPTQ_V2.write("p", weight).__getitem__, weight.scheme)
    assert torch.equal(back.zeros, zeros)


def test_what_no_gptq_file_holds():
    assert "no quantized activations" in GPTQ.reason_against(parse_scheme("int8-channel-a8token"))
    assert all(GPTQ_V2.reason_against(scheme) is None for scheme in SCHEMES)
    assert all(GPTQ.reason_against(scheme) is None for scheme in SCHEMES if scheme.bits != 3)
    assert "zeros of 3 bits; use --format gptq_v2" in GPTQ.reason_against(make_scheme(3, 32, True))
    assert "2, 3, 4, 8 bits, not 5" in GPTQ.reason_against(make_scheme(5, 32, True))
    assert GPTQ.reason_against_shape(INT4, 16, 64) is None
    assert "16 outputs and 64 inputs" in GPTQ.reason_against_shape(make_scheme(3, 32, True), 16, 64)
    assert "12 outputs and 64 inputs" in GPTQ.reason_against_shape(INT4, 12, 64)
    assert GPTQ.reason_against_shape(make_scheme(8, 32, True), 12, 64) is None
    assert "16 outputs and 48 inputs" in GPTQ.reason_against_shape(INT4, 16, 48)


@pytest.mark.parametrize(
    "changes",
    [
        {"qweight": torch.zeros(32, 16, dtype=torch.int64)},
        {"qweight": torch.zeros(31, 16, dtype=torch.int32)},
        {"qweight": torch.zeros(32, 8, dtype=torch.int32)},
        {"qweight": torch.tensor(3, dtype=torch.int32)},
        {"qzeros": torch.zeros(8, 1, dtype=torch.int32)},
        {"qzeros": torch.zeros(4, 2, dtype=torch.int32)},
        {"scales": torch.zeros(8, 16)},
        {"scales": torch.ones(16, 8)},
        {"scales": torch.full((8, 16), float("nan"))},
        {"g_idx": torch.zeros(256, dtype=torch.int32)},
        {"g_idx": torch.arange(128, dtype=torch.int32) // 32},
        {"g_idx": (torch.arange(256, dtype=torch.int32) // 32).clamp(max=6)},
    ],
    ids=lambda changes: "-".join(f"{key}-{list(value.shape)}" for key, value in changes.items()),
)
def test_files_that_contradict_themselves_are_refused(changes):
    tensors = GPTQ.write("p", quantized(UINT4)) | {f"p.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=r"^p: "):
        GPTQ.read("p", tensors.__getitem__, UINT4)


@pytest.mark.parametrize(("wrote", "read"), [(GPTQ, GPTQ_V2), (GPTQ_V2, GPTQ)], ids=["v1-as-v2", "v2-as-v1"])
def test_zeros_under_the_wrong_label_are_recognized(wrote, read):
    """Some published checkpoints have v2's zeros and claim v1: taken literally, every weight would be off by a step."""
    tensors = wrote.write("p", quantized(INT4))
    with pytest.raises(CheckpointError, match=f"its zeros are those of {wrote.name}, but checkpoint_format"):
        read.read("p", tensors.__getitem__, INT4)


def test_symmetric_by_label_alone():
    with pytest.raises(CheckpointError, match=r"symmetric by config\.json, but its zeros run from"):
        GPTQ.read("p", GPTQ.write("p", quantized(UINT4)).__getitem__, INT4)


NAMES = [f"model.layers.{i}.mlp.{role}" for i in range(12) for role in ("gate_proj", "up_proj", "down_proj")]


def test_the_configuration_to_the_letter():
    config = GPTQ_V2.quantization_config(dict.fromkeys(NAMES, UINT4), ["lm_head"])
    quantizer = config.pop("meta")["quantizer"]
    assert [name.split(":")[0] for name in quantizer] == ["lowbit"]
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
    }
    assert GPTQ_V2.recognizes(config)
    assert not GPTQ.recognizes(config)


def test_linears_left_alone_are_declared_for_both_kinds_of_reader():
    left = [name for name in NAMES if ".1.mlp" in name]
    done = dict.fromkeys((name for name in NAMES if name not in left), INT4)
    config = GPTQ.quantization_config(done, [*left, "lm_head"])
    assert config["modules_in_block_to_quantize"] == [sorted(done)]
    assert config["dynamic"] == {
        rf"-:^{name}$": {}
        for name in ("lm_head", *(rf"model\.layers\.1\.mlp\.{role}" for role in ("down_proj", "gate_proj", "up_proj")))
    }
    assert GPTQ.schemes_of(config, done) == done


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_configuration_leads_back_to_the_scheme(scheme):
    schemes = dict.fromkeys(NAMES, scheme)
    assert GPTQ.schemes_of(GPTQ.quantization_config(schemes, []), NAMES) == schemes


def test_overrides_of_gptqmodel_are_heeded():
    base = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    dynamic = {r"-:.*mlp\.gate$": {}, r"+:.*\.1\..*": {"bits": 8, "group_size": 32}, r".*down_proj": {"sym": False}}
    schemes = GPTQ.schemes_of(base | {"dynamic": dynamic}, ["m.0.up", "m.1.up", "m.0.down_proj"])
    assert [str(scheme) for scheme in schemes.values()] == ["int4-g128", "int8-g32", "uint4-g128"]
    assert GPTQ.schemes_of(base | {"dynamic": None}, ["m.0.up"]) == {"m.0.up": make_scheme(4, 128, True)}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bits": 4, "sym": True},
        {"bits": 9, "group_size": 128, "sym": True},
        {"bits": 4, "group_size": 16, "sym": True},
        {"bits": 4, "group_size": 128, "sym": True, "pack_dtype": "int16"},
        {"bits": 4, "group_size": 128, "sym": True, "dynamic": {"+:(": {}}},
        {"bits": 4, "group_size": 128, "sym": True, "dynamic": ["x"]},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(config):
    with pytest.raises(CheckpointError):
        GPTQ.schemes_of(config, ["a"])


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.symmetric and s.bits != 3], ids=str)
def test_one_added_to_every_zero_of_a_word_at_once_makes_version_2(scheme):
    """GPTQModel's own conversion of version 1: no zero may carry into its neighbour."""
    ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[scheme.bits]
    words = GPTQ.write("p", quantized(scheme))["p.qzeros"]
    assert torch.equal((words.long() + ones).to(torch.int32), GPTQ_V2.write("p", quantized(scheme))["p.qzeros"])
