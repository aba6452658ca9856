"""The operator w8a8_linear: against a product of codes in float64, on the CPU; tracing; what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.joined import moved, stacked
from lowbit.quant.kernels.row_norm import GROUP
from lowbit.quant.kernels.row_scaled import RowScaled
from lowbit.quant.kernels.w8a8 import MOST_K, W8a8Call, W8a8Weight, in_values, pack_w8a8
from lowbit.quant.numbers import FP8
from lowbit.quant.numerics import quantize_inputs
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import parse_scheme
from tests.kernels.make import make_qtensor, make_w8a8_weight, make_x, opcheck, rounded_weight, w8a8_call


def expected(x: Tensor, weight: W8a8Weight, input_scale: Tensor | None = None) -> Tensor:
    """The product in float64, its inputs rounded by quant.numerics."""
    if weight.in_blocks:
        codes, scales = quantize_inputs(x.unflatten(1, (-1, GROUP)), weight.number)
        values = (codes.double() * scales.double()).flatten(1)
        return values @ in_values(weight.codes, weight.scales, GROUP).T
    codes, scales = quantize_inputs(x, weight.number, input_scale)
    return (codes.double() @ weight.codes.double().T) * scales.double() * weight.scales.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "fp8-a16", "fp8-block"])
def test_x_is_rounded_and_multiplied(scheme: str, dtype: torch.dtype, static: bool) -> None:
    n, k = (256, 640) if scheme == "fp8-block" else (33, 96)
    weight, x = make_w8a8_weight(n, k, scheme=scheme), make_x(5, k, dtype, outliers=True)
    bias, residual = make_x(1, n, dtype)[0], make_x(5, n, dtype)
    scale = torch.tensor(0.7) if static and not weight.in_blocks else None
    y = ops.w8a8_linear(w8a8_call(x, weight, bias, residual, scale))
    assert y.dtype == dtype
    torch.testing.assert_close(y, (expected(x, weight, scale) + bias.double() + residual.double()).to(dtype))


def test_sums_are_exact_integers() -> None:
    weight = W8a8Weight(torch.randint(-128, 128, (40, 14336), dtype=torch.int8), torch.ones(40))
    x = torch.randint(-127, 128, (3, 14336), dtype=torch.int8)
    y = ops.w8a8_linear(W8a8Call(x, torch.ones(3), weight, dtype=torch.float32))
    assert torch.equal(y.double(), x.double() @ weight.codes.double().T)


def test_the_longest_sums_fit_in_int32() -> None:
    weight = W8a8Weight(torch.full((8, MOST_K), -128, dtype=torch.int8), torch.ones(8))
    x = torch.full((1, MOST_K), -128, dtype=torch.int8)
    y = ops.w8a8_linear(W8a8Call(x, torch.ones(1), weight, dtype=torch.float32))
    assert (y == float(MOST_K) * 128 * 128).all()


@pytest.mark.parametrize("scheme", ["int8", "fp8-a16"])
def test_a_token_that_holds_a_nan_gives_nans_alone(scheme: str) -> None:
    weight, x = make_w8a8_weight(8, 32, scheme=scheme), make_x(3, 32, torch.float16)
    y = ops.w8a8_linear(w8a8_call(x, weight))
    x[1, 5] = torch.nan
    spoilt = ops.w8a8_linear(w8a8_call(x, weight))
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[::2], y[::2])


def test_a_row_of_zeros_and_no_rows() -> None:
    weight, x = make_w8a8_weight(8, 32), torch.zeros(2, 32, dtype=torch.float16)
    assert torch.equal(ops.w8a8_linear(w8a8_call(x, weight)), torch.zeros(2, 8, dtype=torch.float16))
    assert ops.w8a8_linear(w8a8_call(x[:0], weight)).shape == (0, 8)


def test_a_weight_is_packed_bit_for_bit_or_refused() -> None:
    qtensor = make_qtensor(24, 64, 8, -1, True)
    packed = pack_w8a8(qtensor)
    assert torch.equal(packed.codes, qtensor.codes)
    assert torch.equal(packed.scales, qtensor.scales.float()[:, 0])
    with pytest.raises(ValueError, match="72 inputs: the kernels of 8-bit inputs take multiples of 16"):
        pack_w8a8(make_qtensor(24, 72, 8, -1, True))
    with pytest.raises(ValueError, match="131072 inputs: beyond 131056 a sum may not fit in int32"):
        pack_w8a8(make_qtensor(1, 1 << 17, 8, -1, True))
    with pytest.raises(ValueError, match="not int8-g32"):
        pack_w8a8(make_qtensor(24, 64, 8, 32, True))
    with pytest.raises(ValueError, match="not uint8-channel"):
        pack_w8a8(make_qtensor(24, 64, 8, -1, False))
    floats = rounded_weight(24, 64, parse_scheme("fp8-a16"))
    assert pack_w8a8(floats).codes.data_ptr() == floats.codes.data_ptr()


def test_a_weight_in_blocks_has_rows_of_scales_in_steps_of_four() -> None:
    weight = rounded_weight(256, 640, parse_scheme("fp8-block"))
    packed = pack_w8a8(weight)
    assert packed.in_blocks
    assert packed.scales.shape == (2, 8)
    assert torch.equal(packed.scales[:, :5], weight.scales.float())
    assert torch.equal(in_values(packed.codes, packed.scales, GROUP).float(), weight.dequantize())
    assert pack_w8a8(rounded_weight(256, 512, parse_scheme("fp8-block"))).scales.shape == (2, 4)


def test_rows_of_blocks_are_taken_with_their_scales_or_made_alone() -> None:
    weight = rounded_weight(512, 256, parse_scheme("fp8-block"))
    swapped = torch.arange(512).view(4, 128).flip(0).flip(1).flatten()
    for rows in (torch.arange(128, 512), swapped, torch.arange(256, 300)):
        found = moved(weight, rows, HALF)
        assert isinstance(found, QTensor)
        assert torch.equal(found.dequantize(), weight.dequantize()[rows])
    apart = moved(weight, torch.arange(64, 512), HALF)
    assert isinstance(apart, RowScaled)
    assert torch.equal(apart.dequantize(), weight.dequantize()[64:])


def test_stacked_blocks_stay_blocks_where_each_part_fills_its_own() -> None:
    first, second = (rounded_weight(n, 256, parse_scheme("fp8-block")) for n in (256, 128))
    assert isinstance(whole := stacked([first, second], HALF), QTensor)
    assert torch.equal(whole.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    short = replace(first, codes=first.codes[:200])
    assert isinstance(apart := stacked([short, second], HALF), RowScaled)
    assert torch.equal(apart.dequantize(), torch.cat([first.dequantize()[:200], second.dequantize()]))
    assert isinstance(stacked([second, short], HALF), QTensor)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(bad: float) -> None:
    qtensor = replace(make_qtensor(24, 64, 8, -1, True), scheme=parse_scheme("int8-channel-a8token"))
    scales = qtensor.scales.clone()
    scales[3] = bad
    with pytest.raises(ValueError, match="a scale is zero, negative or not finite"):
        pack_w8a8(replace(qtensor, scales=scales))
    scheme = parse_scheme("int8-channel-a8tensor")
    with pytest.raises(ValueError, match="its input scale is"):
        QTensor(qtensor.codes, qtensor.scales, None, scheme, torch.tensor(bad))
    file = {"layers.0.up.weight": qtensor.codes, "layers.0.up.weight_scale": scales}
    with pytest.raises(CheckpointError, match=r"^layers.0.up: .* a scale is zero, negative or not finite"):
        COMPRESSED_TENSORS.read("layers.0.up", file.__getitem__, parse_scheme("int8-channel-a8token"))


def test_blocks_that_do_not_fit_are_named() -> None:
    weight = make_w8a8_weight(256, 256, scheme="fp8-block")
    call = W8a8Call(torch.zeros(3, 256, dtype=FP8.storage), torch.ones(2, 3), weight)
    ops.w8a8_linear(call)
    with pytest.raises(ValueError, match=r"x_scales is \(3, 2\) torch.float32, not \(2, 3\)"):
        ops.w8a8_linear(replace(call, x_scales=torch.ones(3, 2)))
    with pytest.raises(ValueError, match=r"scales is \(2, 2\) torch.float32, not \(2, 4\)"):
        ops.w8a8_linear(replace(call, weight=replace(weight, scales=torch.ones(2, 2))))
    with pytest.raises(ValueError, match="codes in blocks are of FP8"):
        ops.w8a8_linear(replace(call, weight=replace(weight, codes=torch.zeros(256, 256, dtype=torch.int8))))
    with pytest.raises(ValueError, match="192 inputs: the kernels of 8-bit inputs take multiples of 128"):
        pack_w8a8(
            replace(rounded_weight(128, 256, parse_scheme("fp8-block")), codes=torch.zeros(128, 192, dtype=FP8.storage))
        )


def test_the_operators_pass_opcheck() -> None:
    weight, x = make_w8a8_weight(16, 32), make_x(3, 32, torch.float16)
    call = w8a8_call(x, weight, x.new_zeros(16), x.new_zeros(3, 16))
    opcheck(ops.w8a8_linear, call)
    opcheck(ops.w8a8_linear, replace(call, bias=None, residual=None, dtype=torch.float32))


@pytest.mark.parametrize("scheme", ["int8", "fp8-a16"])
def test_compiled(scheme: str) -> None:
    weight, x = make_w8a8_weight(16, 32, scheme=scheme), make_x(3, 32, torch.float16)

    def product(x: Tensor) -> Tensor:
        return ops.w8a8_linear(w8a8_call(x, weight)).relu()

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), product(x))


HALF = torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 48, dtype=torch.int8)}, r"x must have the shape \(m, 32\)"),
        ({"x": torch.zeros(2, 32, dtype=HALF)}, "x is .* torch.float16, not .* torch.int8"),
        ({"x": torch.zeros(2, 32, dtype=FP8.storage)}, "x is .* torch.float8_e4m3fn, not .* torch.int8"),
        ({"x_scales": torch.ones(3)}, r"x_scales is \(3,\)"),
        ({"bias": torch.zeros(15, dtype=HALF)}, r"bias is \(15,\)"),
        ({"bias": torch.zeros(16, dtype=torch.bfloat16)}, "bias is .* torch.bfloat16, not"),
        ({"residual": torch.zeros(16, 2, dtype=HALF).T}, "residual has strides"),
        ({"dtype": torch.float64}, "y in torch.float64"),
        ({"dtype": torch.float32, "bias": torch.zeros(16)}, "takes no bias"),
        ({"weight": W8a8Weight(torch.zeros(16, 32, dtype=FP8.storage), torch.ones(1, 4))}, "takes? multiples of 128"),
        ({"weight": W8a8Weight(torch.zeros(16, 32), torch.ones(16))}, "codes is .* torch.float32, not"),
        ({"weight": W8a8Weight(torch.zeros(16, 32, dtype=torch.int8), torch.ones(16, dtype=HALF))}, "scales is"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict, message: str) -> None:
    call = W8a8Call(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2), make_w8a8_weight(16, 32))
    with pytest.raises(ValueError, match=message):
        ops.w8a8_linear(replace(call, **change))
