"""Panels: rows in the order in which the product of several rows reads them. No result depends on it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops, panels
from lowbit.quant.kernels.decode_attention import NewCall
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import Deferred, NextNorm, PackedCall, Problem
from lowbit.quant.kernels.wna16_gemm import reason_against
from lowbit.quant.kernels.wna16_gemv import CROWD, PANEL_WAVES, GemvCut, crowded_cut, prefers_panels, run
from tests.kernels.make import assert_devices_agree, make_float, make_packed, make_x, on_cpu
from tests.kernels.test_decode_attention import attention_of, make_append
from tests.kernels.test_ops import make_rotary

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("m", [1, 2, 8, 9, 16])
def test_panels_hold_the_rows(m: int) -> None:
    x = make_x(m, 256, torch.float16)
    held = panels.panels_of(x)
    assert held.shape == (8, m, 32)
    assert torch.equal(held[3, m - 1], x[m - 1, 96:128])
    assert torch.equal(panels.rows_of(held), x)
    assert panels.shape_of(held) == panels.shape_of(x) == (m, 256)
    assert panels.height_of(held) == (8 if m <= 8 else 16)
    assert panels.reason_against(held) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(8, 3, 32).half()}, r"strides \(96, 32, 1\), of 3 rows they are \(256, 32, 1\)"),
        ({"x": torch.zeros(4, 3, 64).half()}, r"panels have the shape \(k / 32, m, 32\) of at most 16 rows"),
        ({"x": torch.zeros(6, 3, 32).half()}, r"x must have the shape \(m, 256\)"),
        ({"norm": "rms", "norm_weight": torch.ones(256).half()}, "norm 'rms' is applied to rows, not to panels"),
        ({"y_panels": True, "float32_out": True}, "of half precision, no heads, at most 16 rows"),
        ({"x": torch.zeros(17, 256).half(), "y_panels": True}, r"y of shape \(17, 128\) in panels"),
    ],
)
def test_what_is_no_panel_is_refused(change: dict, reason: str) -> None:
    call = PackedCall(panels.panels_of(make_x(3, 256, torch.float16)), make_packed(128, 256))
    with pytest.raises(ValueError, match=reason):
        ops.linear(replace(call, **change))


def test_attention_in_panels_has_at_most_16_rows() -> None:
    call = make_append((2, 2, 16), [3] * 17, torch.float32, cache="same")
    with pytest.raises(ValueError, match="at most 16 rows and a multiple of 32"):
        ops.attend(attention_of(call, torch.randn(17, 32), in_panels=True))


def test_fast_memory_and_several_rows_prefer_panels() -> None:
    problem = Problem(8, 22016, 4096, 4, 128, torch.float16, "cuda", (9, 0), 132, fast_memory=True)
    assert prefers_panels(problem)
    assert prefers_panels(replace(problem, m=16))
    assert prefers_panels(replace(problem, m=16, n=28672))
    assert "wna16_gemv is faster" in (reason_against(replace(problem, m=16, panels=True)) or "")
    for change in ({"m": 1}, {"m": 17}, {"fast_memory": False}, {"k": 4096 + 64}, {"m": 9, "bits": 8}):
        assert not prefers_panels(replace(problem, **change)), change


def with_panels(call: PackedCall) -> PackedCall:
    """`call` with panels wherever it can have them."""
    norm = call.next_norm
    norm = None if norm is None else NextNorm.empty(call.x, norm.weight, in_panels=True)
    return replace(call, x=panels.panels_of(call.x), next_norm=norm, y_panels=call.rotary is None)


def products_of(weight: PackedWeight, gated: PackedWeight, m: int, device: str) -> list[PackedCall]:
    """A product that finishes one norm and starts another, and a gated one."""
    x, residual, norm = (make_x(rows, 256, torch.float16, device) for rows in (m, m, 1))
    deferred = Deferred(torch.rand(m, 16, device=device) * 40, 1e-5)
    first = PackedCall(x, weight, residual=residual, deferred=deferred, next_norm=NextNorm.empty(x, norm[0]))
    return [first, PackedCall(x, gated, activation="silu_mul", dependent=True)]


def assert_same(call: PackedCall) -> None:
    """Panels give the bits of rows."""
    other, y = with_panels(call), ops.linear(call)
    assert torch.equal(panels.rows_of(ops.linear(other)), y)
    if call.next_norm is None or other.next_norm is None:
        return
    assert torch.equal(panels.rows_of(other.next_norm.z), call.next_norm.z)
    assert torch.equal(other.next_norm.squares, call.next_norm.squares)


@pytest.mark.parametrize("m", [2, 5, 8, 9, 16])
@pytest.mark.parametrize("device", DEVICES)
def test_products_do_not_depend_on_panels(m: int, device: str) -> None:
    for symmetric in (True, False):
        weight = make_packed(256, 256, symmetric=symmetric, device=device)
        gated = make_packed(512, 256, symmetric=symmetric, device=device, pair_block=512)
        for call in products_of(weight, gated, m, device):
            assert_same(call)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_integers_in_panels_give_the_bits_of_rows(bits: int, group_size: int) -> None:
    weight = make_packed(384, 1024, bits, group_size, symmetric=False, device="cuda")
    assert_crowds_agree(weight, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["fp8-a16", "mxfp8-a16", "mxfp4-a16", "nvfp4-a16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_in_panels_give_the_bits_of_rows(scheme: str, dtype: torch.dtype) -> None:
    assert_crowds_agree(make_float(scheme, 384, 1024, dtype, "cuda"), dtype)


def assert_crowds_agree(weight: PackedWeight, dtype: torch.dtype) -> None:
    """Of all rows that there is code for, in panels and in rows; and each row alone, except of FP4: one row
    has a kernel form of its own."""
    x = make_x(16, 1024, dtype, "cuda")
    for m in (2, 7, 8, 9, 16):
        problem = PackedCall(x[:m], weight).problem()
        cut = crowded_cut(problem)
        if cut is None:
            continue
        for each in (cut, GemvCut(1, 2, 3, 1, CROWD)):
            call = PackedCall(x[:m], weight, dependent=True)
            y = run(call, problem, each)
            assert torch.equal(run(replace(call, x=panels.panels_of(x[:m])), problem, each), y)
            if weight.is_float and weight.bits == 4:
                continue
            alone = PackedCall(x[m - 1 : m], weight)
            assert torch.equal(run(alone, alone.problem(), each), y[m - 1 :])


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_tiles_a_warp_in_panels_give_the_bits_of_rows(dtype: torch.dtype, symmetric: bool) -> None:
    """Of tiles without a neighbour, too, and of whole warps without a tile or a chunk."""
    for n, k, group_size in ((16, 256, 128), (200, 1664, 128), (328, 1024, -1)):
        weight = make_packed(n, k, 4, group_size, symmetric, dtype, "cuda")
        for m in (9, 13, 16):
            call = PackedCall(make_x(m, k, dtype, "cuda"), weight, dependent=True)
            y = run(call, call.problem(), PANEL_WAVES)
            assert torch.equal(run(replace(call, x=panels.panels_of(call.x)), call.problem(), PANEL_WAVES), y)
            assert_devices_agree(y, ops.linear(on_cpu(call)))


@pytest.mark.parametrize("device", DEVICES)
def test_heads_are_turned_from_panels(device: str) -> None:
    weight = make_packed(3 * 64, 256, device=device, pair_block=64)
    x, rotary = make_x(5, 256, torch.float16, device), make_rotary(5, 1, 64, torch.float16, device)
    other = replace(rotary, k_cache=torch.zeros_like(rotary.k_cache), v_cache=torch.zeros_like(rotary.v_cache))
    q = ops.linear(PackedCall(x, weight, rotary=rotary))
    assert torch.equal(ops.linear(PackedCall(panels.panels_of(x), weight, rotary=other)), q)
    assert torch.equal(other.k_cache, rotary.k_cache)
    assert torch.equal(other.v_cache, rotary.v_cache)


def attended(m: int, adjacent: int, device: str) -> tuple[Tensor, Tensor]:
    """The attention of m rows, of one sequence if adjacent, as rows and in panels."""
    positions = list(range(20, 20 + m)) if adjacent > 1 else [7 + 5 * i for i in range(m)]
    call = make_append((8, 2, 64), positions, torch.float16, "same", device)
    if adjacent > 1:
        call = replace(call, slots=call.positions + 0)
    attention = attention_of(call, ops.append_heads(call), adjacent=adjacent)
    return ops.attend(attention), ops.attend(replace(attention, in_panels=True))


@pytest.mark.parametrize(("m", "adjacent"), [(3, 1), (16, 1), (8, 8)])
@pytest.mark.parametrize("device", DEVICES)
def test_attention_does_not_depend_on_panels(m: int, adjacent: int, device: str) -> None:
    rows, in_panels = attended(m, adjacent, device)
    assert in_panels.ndim == 3
    assert torch.equal(panels.rows_of(in_panels), rows)


@pytest.mark.parametrize("device", DEVICES)
def test_heads_that_attention_appends_itself_do_not_depend_on_panels(device: str) -> None:
    append = make_append((8, 2, 64), [7, 30, 11], torch.float16, "int8", device)
    call = NewCall(append, append.slots - append.positions, append.positions, 0.125)
    assert torch.equal(panels.rows_of(ops.attend_new(replace(call, in_panels=True))), ops.attend_new(call))


def test_operators_pass_opcheck() -> None:
    """All checks but those that copy the arguments, which leave out the rows of a panel that are none."""
    x, weight = panels.panels_of(make_x(3, 256, torch.float16)), make_packed(128, 256)
    norm = NextNorm.empty(x, torch.ones(128).half(), in_panels=True)
    calls = [(ops.plain_linear, PackedCall(x, weight, y_panels=True))]
    for operator, call in [*calls, (ops.deferring_linear, PackedCall(x, weight, next_norm=norm))]:
        arguments = tuple(operator.arguments(call))
        torch.library.opcheck(operator.torch, arguments, test_utils=("test_schema", "test_faketensor"))
