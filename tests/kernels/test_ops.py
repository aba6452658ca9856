"""The operators on the CPU: the reference arithmetic, tracing, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import append, appended
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.problem import Deferred, PackedCall, Rotary
from lowbit.quant.linear import QLinear
from tests.kernels.make import make_linear, make_packed, make_qtensor, make_x, opcheck


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
    with_residual = ops.linear(PackedCall(x, layer.linear.weight, bias, residual, activation="gelu", float32_out=True))
    assert torch.allclose(with_residual, torch.nn.functional.gelu(expected) + residual.float(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 3, 16, 17])
@pytest.mark.parametrize("head_dim", [64, 128, 32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dense_heads_are_turned_as_by_a_kernel_of_their_own(device, head_dim, m, dtype) -> None:
    """On a GPU the product turns its sums before they are rounded, the kernel of its own after it: one rounding."""
    x, w = make_x(m, 256, dtype, device), make_x(5 * head_dim, 256, dtype, device) * 0.05
    bias, rotary = make_x(1, 5 * head_dim, dtype, device)[0], make_rotary(m, 2, head_dim, dtype, device)
    plain = Rotary(**{**vars(rotary), **caches_like(rotary)})
    call = DenseCall(x, w, bias, dependent=True)
    q, wanted = ops.linear(replace(call, rotary=rotary)), append(appended(ops.linear(call), plain))
    for found, expected in ((q, wanted), (rotary.k_cache, plain.k_cache), (rotary.v_cache, plain.v_cache)):
        error = (found.float() - expected.float()).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * expected.float().abs().max()


def caches_like(rotary: Rotary) -> dict[str, Tensor]:
    """Caches of their own, with the same contents."""
    return {"k_cache": rotary.k_cache.clone(), "v_cache": rotary.v_cache.clone()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 64}, "64 outputs hold no q beside 1 heads of k and v"),
        ({"m": 4}, r"positions is \(3,\) torch.int64 on cpu, not \(4,\)"),
        ({"dtype": torch.bfloat16}, r"k_cache is \(80, 1, 32\) torch.float16 on cpu, not .* torch.bfloat16"),
    ],
)
def test_heads_that_do_not_fit_are_refused(change, message) -> None:
    m, n, dtype = ({"m": 3, "n": 96, "dtype": torch.float16} | change).values()
    x, rotary = make_x(m, 64, dtype), make_rotary(3, 1, 32, torch.float16)
    with pytest.raises(ValueError, match=message):
        ops.linear(DenseCall(x, make_x(n, 64, dtype), rotary=rotary))


def test_gated_linear_is_silu_of_gate_times_up() -> None:
    packed = make_packed(64, 128, pair_block=64)
    x = make_x(3, 128, torch.float16)
    gate, up = (x.float() @ ops.dequantize(packed).float().T).chunk(2, -1)
    # The dense weight is rounded to half once: compare as half.
    y = ops.linear(PackedCall(x, packed, activation="silu_mul"))
    assert torch.allclose(y, (torch.nn.functional.silu(gate) * up).half(), atol=2e-2)


def test_rms_norm_before_the_product() -> None:
    weight, x, gamma = make_packed(32, 128), make_x(2, 128, torch.bfloat16), torch.rand(128).bfloat16()
    weight = replace(weight, scales=weight.scales.bfloat16())
    normed = torch.nn.functional.rms_norm(x.float(), (128,), gamma.float(), 1e-5).bfloat16()
    fused = ops.linear(PackedCall(x, weight, norm="rms", norm_weight=gamma, norm_eps=1e-5))
    assert torch.equal(fused, ops.linear(PackedCall(normed, weight)))


def test_layer_norm_before_the_product() -> None:
    weight, x, gamma, beta = (
        make_packed(32, 128),
        make_x(2, 128, torch.float16),
        torch.rand(128).half(),
        torch.randn(128).half(),
    )
    normed = torch.nn.functional.layer_norm(x.float(), (128,), gamma.float(), beta.float(), 1e-5)
    norm = {"norm": "layer", "norm_weight": gamma, "norm_bias": beta, "norm_eps": 1e-5}
    fused = ops.linear(PackedCall(x, weight, **norm, float32_out=True))
    assert torch.allclose(fused, ops.linear(PackedCall(normed.half(), weight, float32_out=True)), atol=2e-2)


def test_qkv_is_rotated_and_appended() -> None:
    head_dim, m = 32, 3
    weight = make_packed(6 * head_dim, 128, pair_block=head_dim)  # 2 heads of q, 2 of k, 2 of v
    x, rotary = make_x(m, 128, torch.float16), make_rotary(m, 2, head_dim, torch.float16)
    q = ops.linear(PackedCall(x, weight, rotary=rotary))
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
    assert torch.equal(ops.linear(PackedCall(x, plain, next_weight=ahead)), ops.linear(PackedCall(x, plain)))
    gates = PackedCall(x, gated, activation="silu_mul")
    assert torch.equal(ops.linear(replace(gates, next_weight=ahead)), ops.linear(gates))
    turned = (ops.linear(PackedCall(x, rotated, rotary=rotary, next_weight=each)) for each in (ahead, None))
    assert torch.equal(*turned)
    with pytest.raises(ValueError, match="next_weight has strides"):
        ops.linear(PackedCall(x, plain, next_weight=ahead.T))


def test_opcheck() -> None:
    x = make_x(2, 128, torch.float16)
    plain, gated, rotated = (
        make_packed(32, 128),
        make_packed(32, 128, pair_block=32),
        make_packed(96, 128, pair_block=32),
    )
    opcheck(ops.plain_linear, PackedCall(x, plain, activation="gelu"))
    opcheck(ops.plain_linear, PackedCall(x, plain, dependent=True, next_weight=gated.words))
    opcheck(ops.plain_linear, PackedCall(x, gated, activation="silu_mul", next_weight=plain.words))
    rotary = make_rotary(2, 1, 32, torch.float16)
    opcheck(ops.turning_linear, PackedCall(x, rotated, rotary=rotary))
    opcheck(ops.dequantize, plain)


def test_a_call_goes_to_torch_and_comes_back() -> None:
    """Every field, of dataclasses within it too; what is absent stays absent, and is no argument's default."""
    x, weight = make_x(2, 128, torch.float16), make_packed(96, 128, symmetric=False, pair_block=32)
    call = PackedCall(x, weight, norm_eps=0.5, rotary=make_rotary(2, 1, 32, torch.float16), dependent=True)
    arguments = ops.turning_linear.arguments(call)
    assert ops.turning_linear.call(*arguments) == call
    assert len(arguments) == len(ops.turning_linear.torch._schema.arguments)
    plain = replace(call, rotary=None, deferred=Deferred(torch.ones(2, 8), 0.25))
    assert ops.plain_linear.call(*ops.plain_linear.arguments(plain)) == plain
    with pytest.raises(ValueError, match="lowbit::linear takes no rotary"):
        ops.plain_linear(call)


def test_a_schema_follows_from_its_dataclass() -> None:
    assert str(ops.choose.torch._schema) == (
        "lowbit::choose_tokens(Tensor scores, Tensor(a!) tokens, Tensor(b!) written, Tensor(c!)? cursor_positions, "
        "Tensor(d!)? cursor_slots, int? cursor_last, Tensor? noise_temperature, Tensor? noise_seed, "
        "bool dependent, Tensor(e!)? mailbox_tokens, Tensor(f!)? mailbox_turns) -> ()"
    )
    assert str(ops.w8a8_linear.torch._schema) == (
        "lowbit::w8a8_linear(Tensor x, Tensor x_scales, Tensor weight_codes, Tensor weight_scales, Tensor? bias, "
        "Tensor? residual, ScalarType dtype, bool dependent) -> Tensor"
    )
    assert str(ops.quantize_rows.torch._schema).endswith(") -> (Tensor, Tensor)")


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
        ops.linear(PackedCall(*change(make_x(4, 256, torch.float16), make_packed(32, 256))))


def test_other_arguments_are_checked() -> None:
    x, weight = make_x(2, 256, torch.float16), make_packed(32, 256)
    with pytest.raises(ValueError, match="'tanh' is none of"):
        ops.linear(PackedCall(x, weight, activation="tanh"))
    with pytest.raises(ValueError, match=r"bias has the shape \(31,\), not \(32,\)"):
        ops.linear(PackedCall(x, weight, torch.zeros(31).half()))
    with pytest.raises(ValueError, match="has a norm_weight unless"):
        ops.linear(PackedCall(x, weight, norm="rms"))
    with pytest.raises(ValueError, match="pair_block 32, not 16"):
        ops.linear(PackedCall(x, weight, activation="silu_mul"))
