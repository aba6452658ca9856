"""A Linear multiplies the same for every kind of weight, and a QLinear holds every kind."""

from dataclasses import replace

import pytest
import torch

from lowbit.quant.kernels.reference import activate
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.weight import (
    ALONE,
    Dense,
    Epilogue,
    Hints,
    Packed,
    W8a8,
    activated,
    load_weight,
    pack,
)
from lowbit.quant.linear import QLinear
from lowbit.quant.numerics import fake_quantize_inputs
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.scheme import parse_scheme
from tests.kernels.make import make_linear, make_x

SCHEMES = {
    "int4-g32": Packed,
    "uint8-g64": Packed,
    "int4-g32-a8token": Packed,
    "int4-g64-afp8token": Packed,
    "int8-channel-a8token": W8a8,
    "int8-channel-a8tensor": W8a8,
    "fp8": W8a8,
    "fp8-static": W8a8,
}
N, K = 64, 128


def rounded(scheme: str, n: int = N, k: int = K) -> QTensor:
    return round_to_nearest(torch.randn(n, k) / 8, parse_scheme(scheme).weights_only, torch.float16)


def test_rows_for_4_bits_are_multiplied_as_codes_if_there_are_some_and_not_too_many() -> None:
    linear, dense = make_linear("int4-g32-a8token")
    for m in (1, 8, 9, 40):
        x = make_x(m, K, torch.float16)
        call = linear.weight.call(linear.rounded(Rows(x)), Epilogue(), ALONE)
        assert (call.x_scales is not None) == (m > 8)
        wanted = fake_quantize_inputs(x.float(), linear.inputs.side.number) @ dense.T
        torch.testing.assert_close(
            linear.weight.multiply(linear.rounded(Rows(x)), Epilogue(), ALONE).float(), wanted, atol=4e-3, rtol=4e-3
        )


def test_a_product_of_codes_begins_the_norm_of_one_that_rounds_nothing() -> None:
    linear, _ = make_linear("int4-g32-a8token")
    x, gamma = make_x(12, K, torch.float16), make_x(1, N, torch.float16)[0]
    rows = linear.rounded(Rows(x))
    h, z, squares = linear.weight.multiply_beginning(rows, Epilogue(), ALONE, gamma)
    assert torch.equal(h, linear.weight.multiply(rows, Epilogue(), ALONE))
    assert z.dtype == torch.float16
    torch.testing.assert_close(z, h * gamma)
    torch.testing.assert_close(squares, h.float().square().unflatten(1, (-1, 16)).sum(-1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_and_its_module_compute_what_the_codes_stand_for(scheme):
    linear, dense = make_linear(scheme)
    x = make_x(3, K, torch.float16).view(3, 1, K)
    assert type(linear.weight) is SCHEMES[scheme]
    inputs = x.float()
    if linear.inputs is not None:
        inputs = fake_quantize_inputs(inputs, linear.inputs.side.number, linear.inputs.scale)
    wanted = inputs @ dense.T + linear.bias.float()
    torch.testing.assert_close(linear(x).float(), wanted, atol=4e-3, rtol=4e-3)
    assert torch.equal(QLinear(linear)(x), linear(x))
    assert torch.equal(replace(linear, hints=Hints(dependent=True))(x), linear(x))


def test_the_tensors_of_a_module_are_its_buffers():
    for scheme in SCHEMES:
        module = QLinear(make_linear(scheme)[0])
        held = {name for name, _ in module.named_buffers()}
        assert held >= {"bias"} | ({"codes", "scales"} if SCHEMES[scheme] is W8a8 else {"words", "scales"})
        assert not list(module.parameters())
        for name, buffer in module.named_buffers():
            buffer.fill_(name == "input_scale")
        assert not module(make_x(2, K, torch.float16)).any()


@pytest.mark.parametrize(
    ("scheme", "dtype", "k", "kind"),
    [
        ("int4-g32", torch.float16, 128, Packed),
        ("int4-g32", torch.float32, 128, Dense),
        ("int8-channel-a8token", torch.bfloat16, 128, W8a8),
        ("int8-channel-a8token", torch.float32, 128, Dense),
        ("int8-channel", torch.float16, 40, Dense),
    ],
)
def test_what_no_kernel_takes_is_dense(scheme, dtype, k, kind):
    weight = round_to_nearest(torch.randn(N, k) / 8, parse_scheme(scheme), torch.float16)
    assert type(load_weight(weight, dtype)) is kind
    if kind is Dense and dtype != torch.float32:
        with pytest.raises(ValueError, match="40 inputs"):
            pack(weight, dtype)


def test_a_pairing_that_does_not_divide_the_rows_is_left_out():
    assert load_weight(rounded("int4-g32"), torch.float16, pair_block=N).fuses("silu_mul")
    assert not load_weight(rounded("int4-g32"), torch.float16, pair_block=48).fuses("silu_mul")


@pytest.mark.parametrize("activation", ["gelu", "silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_activations_that_are_fused_are_those_by_torch(kind, activation):
    weight = rounded("int4-g32")
    paired = N if activation == "silu_mul" else 16
    dense = Dense(weight.dequantize(torch.float16))
    held = load_weight(weight, torch.float16, paired) if kind == "packed" else dense
    x = make_x(3, K, torch.float16)
    plain = dense.multiply(Rows(x), Epilogue(), ALONE)
    wanted = activated(plain, activation)
    assert held.fuses(activation) == (activation != "gelu_tanh_mul")
    if held.fuses(activation):
        got = held.multiply(Rows(x), Epilogue(activation=activation), ALONE)
        torch.testing.assert_close(got, wanted, atol=4e-3, rtol=4e-3)
    else:
        gate, up = plain.chunk(2, -1)
        assert torch.equal(wanted, activate(gate, "gelu_tanh") * up)
