"""The operators on the CPU: the reference arithmetic, tracing, and what is refused."""

from dataclasses import replace

import pytest
import torch

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.problem import Rotary
from lowbit.quant.linear import QLinear
from tests.kernels.make import make_linear, make_packed, make_qtensor, make_x

NO_NORM = ("none", None, None, 0.0)


def make_rotary(m: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> Rotary:
    angles = torch.outer(torch.arange(64.0), 10000 ** -torch.linspace(0, 1, head_dim // 2)).to(device)
    caches = torch.zeros(2, 80, kv_heads, head_dim, dtype=dtype, device=device)
    positions = torch.randint(0, 64, (m,), device=device)
    slots = torch.randperm(80, device=device)[:m]
    return Rotary(positions, slots, angles.cos(), angles.sin(), caches[0], caches[1])


@pytest.mark.parametrize("m", [0, 1, 7])
def test_linear_is_the_dense_product(m: int) -> None:
    weight = make_qtensor(40, 256, 4, 64, symmetric=False)
    x, bias, residual = make_x(m, 256, torch.float16), torch.randn(40).half(), torch.randn(m, 40).half()
    layer = QLinear.from_qtensor(weight, bias, torch.float16)
    expected = torch.nn.functional.linear(x.float(), weight.dequantize(), bias.float())
    assert torch.equal(layer(x), expected.half())
    with_residual = ops.linear(x, layer.linear.weight, bias, residual, activation="gelu", float32_out=True)
    assert torch.allclose(with_residual, torch.nn.functional.gelu(expected) + residual.float(), atol=1e-5)


def test_gated_linear_is_silu_of_gate_times_up() -> None:
    packed = make_packed(64, 128, pair_block=64)
    x = make_x(3, 128, torch.float16)
    gate, up = (x.float() @ ops.dequantize(packed).float().T).chunk(2, -1)
    # The dense weight is rounded to half once: compare as half.
    assert torch.allclose(ops.gated_linear(x, packed), (torch.nn.functional.silu(gate) * up).half(), atol=2e-2)


def test_rms_norm_before_the_product() -> None:
    weight, x, gamma = make_packed(32, 128), make_x(2, 128, torch.bfloat16), torch.rand(128).bfloat16()
    weight = replace(weight, scales=weight.scales.bfloat16())
    normed = torch.nn.functional.rms_norm(x.float(), (128,), gamma.float(), 1e-5).bfloat16()
    fused = ops.linear(x, weight, norm="rms", norm_weight=gamma, norm_eps=1e-5)
    assert torch.equal(fused, ops.linear(normed, weight))


def test_layer_norm_before_the_product() -> None:
    weight, x, gamma, beta = (
        make_packed(32, 128),
        make_x(2, 128, torch.float16),
        torch.rand(128).half(),
        torch.randn(128).half(),
    )
    normed = torch.nn.functional.layer_norm(x.float(), (128,), gamma.float(), beta.float(), 1e-5)
    fused = ops.linear(x, weight, norm="layer", norm_weight=gamma, norm_bias=beta, norm_eps=1e-5, float32_out=True)
    assert torch.allclose(fused, ops.linear(normed.half(), weight, float32_out=True), atol=2e-2)


def test_qkv_is_rotated_and_appended() -> None:
    head_dim, m = 32, 3
    weight = make_packed(6 * head_dim, 128, pair_block=head_dim)  # 2 heads of q, 2 of k, 2 of v
    x, rotary = make_x(m, 128, torch.float16), make_rotary(m, 2, head_dim, torch.float16)
    q = ops.qkv_rotary_append(x, weight, rotary)
    heads = (x.float() @ ops.dequantize(weight).float().T).unflatten(-1, (6, head_dim))
    angle = rotary.positions[0]
    low, high = heads[0, 2, :16], heads[0, 2, 16:]
    turned = low * rotary.cosines[angle] - high * rotary.sines[angle]
    assert q.shape == (m, 2 * head_dim)
    assert torch.allclose(rotary.k_cache[rotary.slots[0], 0, :16].float(), turned, atol=3e-2)
    assert torch.allclose(rotary.v_cache[rotary.slots].float(), heads[:, 4:], atol=3e-2)
    untouched = [i for i in range(80) if i not in rotary.slots.tolist()]
    assert not rotary.k_cache[untouched].any()


def test_the_next_weight_changes_nothing() -> None:
    x, plain, gated, rotated = (
        make_x(2, 128, torch.float16),
        make_packed(32, 128),
        make_packed(32, 128, pair_block=32),
        make_packed(96, 128, pair_block=32),
    )
    rotary, ahead = make_rotary(2, 1, 32, torch.float16), torch.randn(3, 5)
    assert torch.equal(ops.linear(x, plain, next_weight=ahead), ops.linear(x, plain))
    assert torch.equal(ops.gated_linear(x, gated, next_weight=ahead), ops.gated_linear(x, gated))
    turned = (ops.qkv_rotary_append(x, rotated, rotary, next_weight=each) for each in (ahead, None))
    assert torch.equal(*turned)
    with pytest.raises(ValueError, match="next_weight has strides"):
        ops.linear(x, plain, next_weight=ahead.T)


def test_logits_come_with_their_argmax() -> None:
    weight, x = make_packed(40, 128), make_x(3, 128, torch.float16)
    logits, tokens = ops.logits_argmax(x, weight)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, ops.linear(x, weight, float32_out=True))
    assert torch.equal(tokens, logits.argmax(-1))


def test_opcheck() -> None:
    x = make_x(2, 128, torch.float16)
    plain, gated, rotated = (
        make_packed(32, 128),
        make_packed(32, 128, pair_block=32),
        make_packed(96, 128, pair_block=32),
    )
    check, lowbit = torch.library.opcheck, torch.ops.lowbit
    check(lowbit.linear.default, (x, *ops.weight_args(plain), None, None, *NO_NORM, "gelu", False, False))
    check(lowbit.linear.default, (x, *ops.weight_args(plain), None, None, *NO_NORM, "none", False, True, gated.words))
    check(lowbit.gated_linear.default, (x, *ops.weight_args(gated), None, *NO_NORM, False, plain.words))
    rotary = make_rotary(2, 1, 32, torch.float16)
    check(
        lowbit.qkv_rotary_append.default, (x, *ops.weight_args(rotated), None, *NO_NORM, *vars(rotary).values(), False)
    )
    check(lowbit.logits_argmax.default, (x, *ops.weight_args(plain), *NO_NORM, False))
    check(lowbit.logits_argmax.default, (x, *ops.weight_args(plain), *NO_NORM, False, plain.words))
    check(lowbit.dequantize.default, ops.weight_args(plain))


@pytest.mark.parametrize("scheme", ["int4-g32", "uint8-g64", "int8-channel-a8token", "int8-channel-a8tensor"])
def test_one_graph_under_compile(scheme: str) -> None:
    layer = QLinear(make_linear(scheme)[0])
    x = make_x(2, 128, torch.float16)
    compiled = torch.compile(lambda x: layer(x) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x) * 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, w: (x.float(), w), "x is torch.float32"),
        (lambda x, w: (x.bfloat16(), w), "scales is torch.float16, x is torch.bfloat16"),
        (lambda x, w: (x[:, :96], w), r"x must have the shape \(m, 256\)"),
        (lambda x, w: (x[:, :224].contiguous(), w), r"x must have the shape \(m, 256\)"),
        (lambda x, w: (x[:, :96].contiguous(), replace(w, k=96)), r"words hold \(2, 2\) tiles and chunks"),
        (lambda x, w: (x.T.contiguous().T, w), "strides"),
        (lambda x, w: (x, replace(w, group_size=64)), "were not packed for groups of 64"),
        (lambda x, w: (x, replace(w, bits=8)), "no packed 8-bit weight"),
        (lambda x, w: (x[0], w), "must have the shape"),
    ],
)
def test_what_does_not_fit_is_named(change, reason) -> None:
    with pytest.raises((ValueError, RuntimeError), match=reason):
        ops.linear(*change(make_x(4, 256, torch.float16), make_packed(32, 256)))


def test_other_arguments_are_checked() -> None:
    x, weight = make_x(2, 256, torch.float16), make_packed(32, 256)
    with pytest.raises(ValueError, match="'tanh' is none of"):
        ops.linear(x, weight, activation="tanh")
    with pytest.raises(ValueError, match=r"bias has the shape \(31,\), not \(32,\)"):
        ops.linear(x, weight, torch.zeros(31).half())
    with pytest.raises(ValueError, match="has a norm_weight unless"):
        ops.linear(x, weight, norm="rms")
    with pytest.raises(ValueError, match="pair_block 32, not 16"):
        ops.gated_linear(x, weight)
