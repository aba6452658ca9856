"""integrations/int8.py: the int8 product against float64, the way it rounds, and what it does not take."""

import pytest
import torch

from integrations.int8 import int8_linear, quantize_rows, reason_against


@pytest.mark.parametrize("m", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
def test_the_product_is_that_of_the_codes(m, dtype, static):
    x = torch.randn(m, 64).to(dtype)
    codes = torch.randint(-128, 128, (24, 64), dtype=torch.int8)
    scales, bias = torch.rand(24, 1).to(dtype) * 0.01, torch.randn(24).to(dtype)
    scale = torch.tensor(0.02) if static else None
    y = int8_linear(x, codes, scales, scale, bias)
    quantized, rows = quantize_rows(x, scale)
    exact = (quantized.double() @ codes.double().T) * rows.double() * scales.double().T + bias.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_rows_are_scaled_by_their_largest_value():
    codes, scales = quantize_rows(torch.tensor([[1.0, -2.0], [0.0, 0.0], [254.0, 1.0]]), None)
    assert codes.tolist() == [[64, -127], [0, 0], [127, 0]]
    assert scales[0].item() == pytest.approx(2 / 127)
    clipped, _ = quantize_rows(torch.tensor([[1.0, -2.0, 0.05]]), torch.tensor(0.01))
    assert clipped.tolist() == [[100, -128, 5]]


def test_no_bias_and_no_rows():
    codes, scales = torch.ones(8, 8, dtype=torch.int8), torch.ones(8, 1)
    assert int8_linear(torch.ones(1, 8).half(), codes, scales, None, None).tolist() == [[8.0] * 8]
    assert int8_linear(torch.ones(0, 8).half(), codes, scales, None, None).shape == (0, 8)


def test_the_operator_can_be_traced():
    args = torch.randn(3, 16).half(), torch.ones(8, 16, dtype=torch.int8), torch.ones(8, 1), None, None
    torch.library.opcheck(int8_linear, args)


def test_what_it_does_not_take():
    assert reason_against(24, 64) is None
    assert "20 x 64" in reason_against(20, 64)
