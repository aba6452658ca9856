"""quant/qtensor.py: a quantized weight is valid when constructed, or not constructed."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.qtensor import QTensor, relative_error, round_to_nearest
from lowbit.quant.scheme import make_scheme, parse_scheme

INT4 = make_scheme(4, 32, True)
UINT4 = make_scheme(4, 32, False)
CODES = torch.zeros(3, 64, dtype=torch.int8)
SCALES = torch.ones(3, 2)
UCODES = torch.zeros(3, 64, dtype=torch.uint8)
ZEROS = torch.zeros(3, 2, dtype=torch.int32)


def changed(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """`tensor` with `value` in its middle."""
    copy = tensor.clone()
    copy[1, 1] = value
    return copy


@pytest.mark.parametrize(
    ("codes", "scales", "zeros", "scheme", "message"),
    [
        (CODES.to(torch.uint8), SCALES, None, INT4, "codes must be 2-dimensional torch.int8"),
        (CODES[0], SCALES, None, INT4, "not 1-dimensional"),
        (UCODES.to(torch.int8), SCALES, ZEROS, UINT4, "torch.uint8"),
        (CODES[:, :63], SCALES, None, INT4, "63 inputs do not divide into groups of 32"),
        (CODES, SCALES[:, :1], None, INT4, r"scales have shape \(3, 1\), not \(3, 2\)"),
        (CODES, SCALES.T, None, INT4, r"scales have shape \(2, 3\)"),
        (CODES, SCALES.int(), None, INT4, "scales are torch.int32"),
        (CODES, SCALES, ZEROS, INT4, "only asymmetric schemes have zeros"),
        (UCODES, SCALES, None, UINT4, "only asymmetric schemes have zeros"),
        (UCODES, SCALES, ZEROS[:2], UINT4, r"zeros have shape \(2, 2\)"),
        (CODES, changed(SCALES, 0.0), None, INT4, "scale is zero or not finite"),
        (CODES, -SCALES[:, :1], None, parse_scheme("int8-a8"), "scale is zero, negative"),
        (CODES, changed(SCALES, float("nan")), None, INT4, "scale is zero"),
        (CODES, changed(SCALES, float("inf")), None, INT4, "scale is zero"),
        (changed(CODES, 8), SCALES, None, INT4, r"a code lies outside \[-8, 7\]"),
        (changed(CODES, -9), SCALES, None, INT4, "a code lies outside"),
        (changed(UCODES, 16), SCALES, ZEROS, UINT4, r"a code lies outside \[0, 15\]"),
        (UCODES, SCALES, changed(ZEROS, 16), UINT4, "a zero lies outside"),
        (UCODES, SCALES, changed(ZEROS, -1), UINT4, "a zero lies outside"),
    ],
)
def test_contradictions_are_refused(codes, scales, zeros, scheme, message):
    with pytest.raises(ValueError, match=message) as caught:
        QTensor(codes, scales, zeros, scheme)
    assert str(scheme) in str(caught.value)


def test_an_input_scale_belongs_to_static_activations():
    static, dynamic = parse_scheme("int8-channel-a8tensor"), parse_scheme("int8-channel-a8token")
    scales = torch.ones(3, 1)
    weight = QTensor(CODES, scales, None, static, torch.tensor(0.1)).to("cpu")
    assert weight.input_scale == torch.tensor(0.1)
    assert QTensor(CODES, scales, None, dynamic).input_scale is None
    for scheme, input_scale in ((static, None), (dynamic, torch.tensor(0.1))):
        with pytest.raises(ValueError, match="an input scale is required by schemes with static inputs"):
            QTensor(CODES, scales, None, scheme, input_scale)
    with pytest.raises(ValueError, match=r"its input scale is 0\.0; one finite, positive number"):
        QTensor(CODES, scales, None, static, torch.tensor(0.0))


@pytest.mark.parametrize("scheme", [INT4, UINT4, make_scheme(8, -1, True)], ids=str)
def test_round_to_nearest_is_the_reference_arithmetic(scheme):
    w = torch.randn(6, 64)
    weight = round_to_nearest(w, scheme, torch.bfloat16)
    assert weight.shape == (6, 64)
    assert weight.scales.dtype == torch.bfloat16
    assert torch.equal(weight.dequantize(), numerics.fake_quantize(w, scheme, torch.bfloat16))
    assert weight.dequantize(torch.float16).dtype == torch.float16


def test_bytes_when_packed():
    weight = round_to_nearest(torch.randn(6, 64), UINT4, torch.bfloat16)
    assert weight.nbytes == 6 * 64 // 2 + 12 * 2 + 12 // 2
    assert round_to_nearest(torch.randn(6, 64), make_scheme(8, -1, True), torch.float32).nbytes == 6 * 64 + 6 * 4


def test_an_empty_weight_is_possible():
    empty = QTensor(torch.empty(0, 64, dtype=torch.int8), torch.empty(0, 2), None, INT4)
    assert empty.dequantize().shape == (0, 64)


def test_moving_keeps_the_values():
    weight = round_to_nearest(torch.randn(2, 32), UINT4, torch.float32)
    moved = weight.to("cpu")
    assert torch.equal(moved.dequantize(), weight.dequantize())
    assert moved.scheme == weight.scheme


@pytest.mark.parametrize("name", ["int4-g32", "uint4-g32", "fp8-block", "nvfp4-a16"])
def test_rounding_in_pieces_is_rounding_as_a_whole(name, monkeypatch):
    scheme = parse_scheme(name)
    w = torch.randn(300, 256) * torch.rand(300, 1)
    whole = round_to_nearest(w.to(torch.bfloat16), scheme, torch.bfloat16)
    lost = float((whole.dequantize() - w).norm() / w.norm())
    monkeypatch.setattr(numerics, "CPU_PIECE", 1000)
    parts = round_to_nearest(w.to(torch.bfloat16), scheme, torch.bfloat16)
    for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert relative_error(parts, w) == pytest.approx(lost, rel=1e-5)


def test_an_iterate_is_checked_when_asked():
    weight = round_to_nearest(torch.randn(3, 64), UINT4, torch.float32)
    next_one = weight.iterate(weight.scales * 2, codes=UCODES)
    assert torch.equal(
        next_one.checked().dequantize(),
        (0 - weight.zeros).repeat_interleave(32, 1) * weight.scales.repeat_interleave(32, 1) * 2,
    )
    assert weight.codes.any()
    diverged = weight.iterate(changed(weight.scales, float("nan")))
    with pytest.raises(ValueError, match="a scale is zero or not finite"):
        diverged.checked()
