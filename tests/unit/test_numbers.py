"""quant/numbers.py: the grid of every number, against torch's own conversion and by hand."""

import pytest
import torch

from lowbit.quant import numerics
from lowbit.quant.numbers import FP4, FP8, INT8, NUMBERS, UINT4, float_of
from lowbit.quant.packing import FP4_VALUES
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import parse_scheme

FP8_WEIGHT = parse_scheme("fp8-channel")


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_every_code_stands_for_itself(number):
    """decode and encode undo each other on the whole grid, whose ends are the limits."""
    codes = torch.arange(256, dtype=torch.uint8).view(number.storage)
    values = number.decode(codes)
    inside = values[(values >= number.low) & (values <= number.high)]
    if number is FP4:  # its codes are among those of e4m3
        inside = torch.tensor([sign * value for value in FP4_VALUES for sign in (1, -1)])
    assert torch.equal(number.decode(number.encode(inside.clone())), inside)
    assert (inside.min(), inside.max()) == (number.low, number.high)
    assert len(inside.unique()) == (2**number.bits if number.is_integer else {FP4: 15, FP8: 253}[number])


@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 100.0])
def test_fp8_is_what_torch_converts_to(size):
    values = torch.randn(10000) * size
    ties = torch.tensor([2**-10, 3 * 2**-10, 1.0625, 1.1875, -17.0, -19.0, 447.0, 464.0, 1e9, -1e9, 0.0])
    for each in (values, ties):
        wanted = each.clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(FP8.encode(each.clone()), wanted)


def test_the_spacing_doubles_with_every_power_of_two():
    values = torch.tensor([0.0, 2**-9, 2**-6, 1.0, 1.9, 2.0, -2.0, 448.0])
    assert FP8.spacing(values).tolist() == [2**-9, 2**-9, 2**-9, 0.125, 0.125, 0.25, 0.25, 32.0]
    assert UINT4.spacing(values) == 1


def test_zeros_are_added_between_rounding_and_clamping():
    codes = UINT4.encode(torch.tensor([-9.5, -0.5, 1.5, 99.0]), torch.tensor(5))
    assert codes.tolist() == [0, 5, 7, 15]


def test_a_float_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no 7-bit float: there is fp8"):
        float_of(7)


def test_the_largest_weight_of_a_row_becomes_the_largest_fp8():
    w = torch.randn(4, 64)
    weight = round_to_nearest(w, FP8_WEIGHT, torch.float32)
    torch.testing.assert_close(weight.scales, w.abs().amax(1, keepdim=True) / 448)
    assert weight.codes.float().abs().amax(1).tolist() == [448.0] * 4
    # half a step of 3 bits of mantissa, or half of the smallest step
    bound = torch.maximum(w.abs() / 16, weight.scales * 2**-10) * 1.0001
    assert bool(((weight.dequantize() - w).abs() <= bound).all())


@pytest.mark.parametrize(("value", "why"), [(float("nan"), "is no fp8"), (1.0, None)])
def test_a_weight_holds_no_nan(value, why):
    codes = torch.full((2, 32), value).to(torch.float8_e4m3fn)
    scales = torch.ones(2, 1)
    if why is None:
        assert QTensor(codes, scales, None, FP8_WEIGHT).dequantize().unique().tolist() == [1.0]
    else:
        with pytest.raises(ValueError, match=why):
            QTensor(codes, scales, None, FP8_WEIGHT)


@pytest.mark.parametrize(("number", "largest"), [(INT8, 127), (FP8, 448)])
def test_inputs_of_a_token_span_the_number(number, largest):
    x = torch.tensor([[-2.0, 1.0, 0.5], [0.0, 0.0, 0.0], [float("nan"), 1.0, 1.0]])
    codes, scales = numerics.quantize_inputs(x, number)
    assert codes.dtype == number.storage
    assert scales[:2, 0].tolist() == [pytest.approx(2 / largest), 1.0]
    assert number.decode(codes)[0, 0] == -largest
    assert scales[2].isnan()
    fixed, _ = numerics.quantize_inputs(torch.tensor([1e6, -1e6]), number, torch.tensor(0.5))
    assert number.decode(fixed).tolist() == [number.high, number.low]


def test_signed_scales_are_for_few_bits_alone():
    assert [number for number in NUMBERS.values() if number.signed_scales] == [
        number for number in NUMBERS.values() if number.is_integer and number.bits < 8
    ]
