"""export/awq.py: hand-written words, AutoAWQ's own arithmetic, files that contradict themselves, declarations."""

import pytest
import torch

from lowbit.errors import CheckpointError
from lowbit.export.awq import AWQ
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import Scheme, make_scheme

SCHEMES = [make_scheme(4, size, False) for size in (32, 128, -1)]
UINT4 = SCHEMES[0]


def quantized(scheme: Scheme, n: int = 16, k: int = 256) -> QTensor:
    return round_to_nearest(torch.randn(n, k) + 0.3, scheme, torch.float16)


def test_a_linear_to_the_letter():
    """Outputs 0 to 7 hold 0 to 7: from the lowest nibble up a word then says 0 2 4 6 1 3 5 7."""
    codes = torch.arange(8, dtype=torch.uint8).unsqueeze(1).repeat(1, 64)
    zeros = torch.stack([torch.arange(8), 15 - torch.arange(8)], 1).to(torch.int32)
    scales = torch.stack([torch.arange(8) + 1.0, torch.arange(8) + 9.0], 1).half()
    tensors = AWQ.write("a.b", QTensor(codes, scales, zeros, UINT4))
    assert list(tensors) == ["a.b.qweight", "a.b.qzeros", "a.b.scales"]
    assert tensors["a.b.qweight"].dtype == torch.int32
    assert tensors["a.b.qweight"].tolist() == [[0x75316420]] * 64
    assert tensors["a.b.qzeros"].tolist() == [[0x75316420], [0x8ACE9BDF - (1 << 32)]]
    assert tensors["a.b.scales"].dtype == torch.float16
    assert tensors["a.b.scales"].tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [*range(9, 17)]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_trip_bit_for_bit(scheme):
    weight = quantized(scheme)
    tensors = AWQ.write("x.y", weight)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert AWQ.linears([*tensors, "x.norm.weight", "x.y.bias"]) == ["x.y"]
    back = AWQ.read("x.y", tensors.__getitem__, scheme)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.zeros, weight.zeros)


def unpacked_as_autoawq_did(words: torch.Tensor) -> torch.Tensor:
    """Values (rows, 8 words): nibbles from the lowest up, then put in the order that undoes the interleave."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)
    order = torch.arange(nibbles.shape[1]).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].flatten()
    return nibbles[:, order]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_autoawqs_arithmetic_gives_our_weight(scheme):
    weight = quantized(scheme)
    tensors = AWQ.write("p", weight)
    size = 256 if scheme.group_size == -1 else scheme.group_size
    codes, zeros = unpacked_as_autoawq_did(tensors["p.qweight"]), unpacked_as_autoawq_did(tensors["p.qzeros"])
    dense = (codes - zeros.repeat_interleave(size, 0)) * tensors["p.scales"].float().repeat_interleave(size, 0)
    assert torch.equal(dense.T, weight.dequantize())


@pytest.mark.parametrize(
    "changes",
    [
        {"qweight": torch.zeros(256, 2, dtype=torch.int64)},
        {"qweight": torch.zeros(250, 2, dtype=torch.int32)},
        {"qweight": torch.zeros(256, 3, dtype=torch.int32)},
        {"qweight": torch.tensor(3, dtype=torch.int32)},
        {"qzeros": torch.zeros(8, 1, dtype=torch.int32)},
        {"qzeros": torch.zeros(4, 2, dtype=torch.int32)},
        {"scales": torch.zeros(8, 16)},
        {"scales": torch.ones(16, 8)},
        {"scales": torch.full((8, 16), float("inf"))},
    ],
    ids=lambda changes: "-".join(f"{key}-{list(value.shape)}" for key, value in changes.items()),
)
def test_files_that_contradict_themselves_are_refused(changes):
    tensors = AWQ.write("p", quantized(UINT4)) | {f"p.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=r"^p: "):
        AWQ.read("p", tensors.__getitem__, UINT4)


def test_what_no_awq_file_holds():
    assert "--asym" in AWQ.reason_against(make_scheme(4, 32, True))
    assert "4-bit weights" in AWQ.reason_against(make_scheme(8, -1, False))
    assert all(AWQ.reason_against(scheme) is None for scheme in SCHEMES)
    assert "12 outputs" in AWQ.reason_against_shape(UINT4, 12, 64)
    assert AWQ.reason_against_shape(UINT4, 16, 64) is None


def test_the_configuration_to_the_letter():
    config = AWQ.quantization_config({"m.layers.0.up_proj": UINT4}, ["lm_head", "m.layers.0.down_proj"])
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "m.layers.0.down_proj"],
    }
    assert AWQ.recognizes(config)
    assert AWQ.schemes_of(config, ["a", "b"]) == {"a": UINT4, "b": UINT4}


def test_a_name_that_would_take_another_with_it():
    """Engines search for the entries inside names: ignoring `mlp.gate` would also ignore `mlp.gate_proj`."""
    with pytest.raises(CheckpointError, match=r"leave m\.0\.mlp\.gate alone: engines would leave m\.0\.mlp\.gate_proj"):
        AWQ.quantization_config({"m.0.mlp.gate_proj": UINT4}, ["m.0.mlp.gate"])


def test_names_that_autoawq_once_used():
    assert AWQ.schemes_of({"w_bit": 4, "q_group_size": 128, "zero_point": True}, ["a"]) == {"a": SCHEMES[1]}
    assert AWQ.schemes_of({"bits": 4, "group_size": 128, "zero_point": False}, ["a"]) == {"a": SCHEMES[1]}
    assert AWQ.recognizes({"quant_method": "awq", "version": "GEMM"})
    assert not AWQ.recognizes({"quant_method": "awq", "version": "gemv"})


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bits": 4},
        {"bits": 8, "group_size": 128},
        {"bits": 4, "group_size": 16},
        {"bits": 4, "group_size": "128"},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(config):
    with pytest.raises(CheckpointError):
        AWQ.schemes_of(config, ["a"])
