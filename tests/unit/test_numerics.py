"""quant/numerics.py against the formulas of its docstrings, written out by hand."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.numbers import INT8
from lowbit.quant.scheme import make_scheme

SYMMETRIC = [make_scheme(4, 32, True), make_scheme(8, 32, True), make_scheme(4, -1, True), make_scheme(8, -1, True)]
ASYMMETRIC = [make_scheme(4, 32, False), make_scheme(8, -1, False)]
ALL = SYMMETRIC + ASYMMETRIC
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(n: int = 5, k: int = 96) -> torch.Tensor:
    return torch.randn(n, k)


@pytest.mark.parametrize("scheme", SYMMETRIC, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_params_and_codes_by_hand(scheme, dtype):
    w = weights()
    scales, zeros = numerics.choose_params(w, scheme, dtype)
    size = 96 if scheme.group_size == -1 else scheme.group_size
    codes = numerics.quantize(w, scheme, scales)
    assert zeros is None
    assert scales.dtype == dtype
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    for row in range(5):
        for group in range(96 // size):
            part = w[row, group * size : (group + 1) * size]
            span = -part[part.abs().argmax()] if scheme.signed_scales else part.abs().max() * 2 / (2**scheme.bits - 1)
            scale = (span / 8 if scheme.signed_scales else span).to(dtype)
            assert scales[row, group] == scale
            quotients = (part / scale.float()).tolist()  # float32: the largest weight lies on a tie, 7.5 steps out
            wanted = [min(max(round(quotient), low), high) for quotient in quotients]
            assert codes[row, group * size : (group + 1) * size].tolist() == wanted


@pytest.mark.parametrize("scheme", ASYMMETRIC, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asymmetric_params_and_codes_by_hand(scheme, dtype):
    w = weights() + 0.7
    scales, zeros = numerics.choose_params(w, scheme, dtype)
    codes = numerics.quantize(w, scheme, scales, zeros)
    top = 2**scheme.bits - 1
    size = 96 if scheme.group_size == -1 else scheme.group_size
    for row in range(5):
        for group in range(96 // size):
            part = w[row, group * size : (group + 1) * size]
            low, high = min(part.min().item(), 0), max(part.max().item(), 0)
            scale = torch.tensor((high - low) / top).to(dtype).float().item()
            zero = min(max(round(-low / scale), 0), top)
            assert scales[row, group].item() == pytest.approx(scale, rel=1e-6)
            assert zeros[row, group] == zero
            wanted = [min(max(round(x / scale) + zero, 0), top) for x in part.tolist()]
            assert codes[row, group * size : (group + 1) * size].tolist() == wanted


def test_dequantize_is_code_minus_zero_times_scale():
    scheme = make_scheme(4, 32, False)
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).reshape(1, 64)
    scales, zeros = torch.tensor([[0.5, 0.25]]), torch.tensor([[3, 10]], dtype=torch.int32)
    got = numerics.dequantize(codes, scheme, scales, zeros)
    wanted = [(c - (3 if i < 32 else 10)) * (0.5 if i < 32 else 0.25) for i, c in enumerate(codes[0].tolist())]
    assert got.dtype == torch.float32
    assert got[0].tolist() == wanted


def test_ties_go_to_the_even_code():
    scheme = make_scheme(4, 32, True)
    w = torch.zeros(1, 32)
    w[0, :8] = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5])
    codes = numerics.quantize(w, scheme, torch.ones(1, 1))
    assert codes[0, :8].tolist() == [0, 2, 2, 4, 0, -2, -2, -4]


def test_codes_stay_inside_the_type():
    w = torch.tensor([[1e30, -1e30, 100.0, -100.0] + [0.0] * 28])
    assert numerics.quantize(w, make_scheme(4, 32, True), torch.ones(1, 1))[0, :4].tolist() == [7, -8, 7, -8]
    zeros = torch.full((1, 1), 5, dtype=torch.int32)
    assert numerics.quantize(w, make_scheme(4, 32, False), torch.ones(1, 1), zeros)[0, :4].tolist() == [15, 0, 15, 0]


@pytest.mark.parametrize("scheme", ALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_zeros_comes_back_as_zeros(scheme, dtype):
    w = weights()
    w[2] = 0
    scales, zeros = numerics.choose_params(w, scheme, dtype)
    assert bool((scales[2] == 1).all())
    back = numerics.dequantize(numerics.quantize(w, scheme, scales, zeros), scheme, scales, zeros)
    assert not back[2].any()
    assert back[1].any()


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_the_error_is_at_most_half_a_step_or_one_at_an_end(scheme):
    w = weights(16, 128)
    scales, _ = numerics.choose_params(w, scheme, torch.float32)
    error = (numerics.fake_quantize(w, scheme, torch.float32) - w).abs()
    steps = scales.repeat_interleave(128 // scales.shape[1], dim=1).abs()
    most = 0.5 if scheme.symmetric and not scheme.signed_scales else 1.0
    assert bool((error <= steps * most * 1.0001).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_fit_the_scale_that_is_stored_not_the_exact_one(dtype):
    """The rounded scale, not the exact one, decides the code: on values where the two would differ."""
    scheme = make_scheme(8, -1, True)
    w = torch.randn(64, 256)
    scales, _ = numerics.choose_params(w, scheme, dtype)
    exact = w.abs().amax(1, keepdim=True) * 2 / 255
    codes = numerics.quantize(w, scheme, scales)
    assert torch.equal(codes, (w / scales.float()).round().clamp(-128, 127).to(torch.int8))
    assert not torch.equal(codes, (w / exact).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1e-38, 1e-7, 1.0, 6e4, 3e38])
def test_scales_stay_finite_and_no_zero_whatever_the_weights(value, dtype):
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = value, -value / 2
    for scheme in ALL:
        scales, zeros = numerics.choose_params(w, scheme, dtype)
        back = numerics.dequantize(numerics.quantize(w, scheme, scales, zeros), scheme, scales, zeros)
        assert bool((scales != 0).all())
        assert bool((scales > 0).all()) or scheme.signed_scales
        assert bool(torch.isfinite(scales).all())
        assert bool(torch.isfinite(back).all())


def test_signed_scales_give_the_largest_weight_the_lowest_code():
    w = weights(16, 128)
    scheme = make_scheme(4, 32, True)
    scales, _ = numerics.choose_params(w, scheme, torch.float32)
    codes = numerics.grouped(numerics.quantize(w, scheme, scales), scheme)
    largest = numerics.grouped(w, scheme).abs().argmax(-1, keepdim=True)
    assert bool((codes.gather(-1, largest) == -8).all())
    assert bool((scales < 0).any())
    assert bool((scales > 0).any())


def test_an_outlier_spoils_its_own_group_alone():
    w = torch.randn(1, 64) * 0.01
    w[0, 3] = 1000.0
    back = numerics.fake_quantize(w, make_scheme(4, 32, True), torch.float32)
    assert back[0, 3] == pytest.approx(1000, rel=0.07)
    assert not back[0, :3].any()
    assert (back[0, 32:] - w[0, 32:]).abs().max() < 0.01


@pytest.mark.parametrize("scheme", [make_scheme(4, 32, True), make_scheme(4, 32, False)], ids=str)
def test_shrink_scales_the_range_group_by_group(scheme):
    w = weights(3, 64)
    shrink = torch.tensor([[1.0, 0.5], [0.8, 1.0], [0.25, 0.75]])
    full, _ = numerics.choose_params(w, scheme, torch.float32)
    kept, _ = numerics.choose_params(w, scheme, torch.float32, shrink)
    torch.testing.assert_close(kept, full * shrink)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_rounding_twice_changes_nothing(scheme):
    once = numerics.fake_quantize(weights(), scheme, torch.float32)
    scales, zeros = numerics.choose_params(weights(), scheme, torch.float32)
    codes = numerics.quantize(once, scheme, scales, zeros)
    back = numerics.dequantize(codes, scheme, scales, zeros)
    assert torch.equal(numerics.quantize(back, scheme, scales, zeros), codes)


def test_the_input_is_not_modified():
    w = weights()
    before = w.clone()
    numerics.fake_quantize(w, make_scheme(4, 32, False), torch.bfloat16)
    assert torch.equal(w, before)


def test_inputs_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="90 inputs do not divide into groups of 32"):
        numerics.choose_params(weights(2, 90), make_scheme(4, 32, True), torch.float32)


def test_compressed_tensors_own_parameters_agree():
    """calculate_qparams of the installed library, on the same ranges, in float32."""
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    from compressed_tensors.quantization import QuantizationArgs

    w = weights(7, 64)
    for scheme in (make_scheme(8, 32, True), make_scheme(4, 32, False)):  # theirs know no sign
        args = QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.symmetric, strategy="group", group_size=32)
        parts = numerics.grouped(w, scheme)
        theirs, their_zeros = helpers.calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        ours, zeros = numerics.choose_params(w, scheme, torch.float32)
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=0)
        if zeros is not None:
            offset = 2 ** (scheme.bits - 1)  # zeros are signed there
            assert torch.equal(zeros - offset, their_zeros.to(torch.int32))


def test_inputs_beyond_a_given_scale_end_at_the_codes_of_int8():
    codes, _ = numerics.quantize_inputs(torch.tensor([-1000.0, -128.4, 126.5, 127.5]), INT8, torch.tensor(1.0))
    assert codes.tolist() == [-128, -128, 126, 127]
