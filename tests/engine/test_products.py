"""engine/products.py: int8 by int8 equals the product of the rounded inputs, with any prologue and epilogue."""

import pytest
import torch

from lowbit.engine.products import Norm, Product, rounds_late
from lowbit.quant.kernels.reference import activate
from lowbit.quant.kernels.weight import Dense, Linear, RoundedInputs, pack
from lowbit.quant.numbers import INT8
from lowbit.quant.numerics import fake_quantize_inputs
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import parse_scheme

M, N, K = 3, 64, 96
NORM = Norm("rms", torch.rand(K, dtype=torch.float16) + 0.5, None, 1e-5)


def int8_linear(scale: float | None = None) -> tuple[Linear, torch.Tensor]:
    """A linear for int8 inputs, with one static scale or a scale per token, and its weight in float32."""
    weight = round_to_nearest(torch.randn(N, K) / 8, parse_scheme("int8-channel-a8token"), torch.float16)
    inputs = RoundedInputs(weight.scheme.inputs, None if scale is None else torch.tensor(scale))
    return Linear(pack(weight, torch.float16), torch.randn(N).half(), inputs), weight.dequantize(torch.float32)


@pytest.mark.parametrize("residual", [None, torch.linspace(-2, 2, M * N).view(M, N).half()])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("scale", [None, 0.03])
@pytest.mark.parametrize("norm", [None, NORM])
def test_int8_products(norm, scale, activation, residual):
    linear, weight = int8_linear(scale)
    x = torch.randn(M, K).half()
    normed = x if norm is None else torch.nn.functional.rms_norm(x.float(), (K,), norm.weight.float(), norm.eps).half()
    rounded = fake_quantize_inputs(normed.float(), INT8, linear.inputs.scale)
    wanted = activate(rounded @ weight.T + linear.bias.float(), activation)
    wanted = wanted if residual is None else wanted + residual.float()
    got = Product(linear, norm, activation)(x, residual)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), wanted, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("activation", ["silu_mul", "quick_gelu"])
def test_an_activation_may_wait_for_the_rounding(activation):
    (up, _), (down, weight) = int8_linear(), int8_linear()
    assert rounds_late(up, down, activation)
    width = 2 * K if activation == "silu_mul" else K
    x = torch.randn(M, width).half()
    gate, factor = (x[:, :K], x[:, K:]) if activation == "silu_mul" else (x, torch.ones(M, K).half())
    active = (activate(gate.float(), activation.removesuffix("_mul")) * factor.float()).half()
    wanted = fake_quantize_inputs(active.float(), INT8) @ weight.T + down.bias.float()
    torch.testing.assert_close(Product(down, before=activation)(x).float(), wanted, atol=4e-3, rtol=4e-3)


def test_an_activation_waits_for_nobody_else():
    (int8, _), dense = int8_linear(), Linear(Dense(torch.randn(N, K).half()))
    assert not rounds_late(int8, dense, "silu_mul")
    assert not rounds_late(dense, int8, "silu_mul")
    assert not rounds_late(int8, int8, "gelu_tanh_mul")
    x = torch.randn(M, K).half()
    gate, up = Product(int8)(x).float().chunk(2, -1)
    got = Product(int8, activation="gelu_tanh_mul")(x).float()
    torch.testing.assert_close(got, activate(gate, "gelu_tanh") * up, atol=4e-3, rtol=4e-3)
