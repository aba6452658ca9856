"""A norm shared out between two products: the operators against the norm by itself, on a CPU and on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops, reference, registry
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import Call, Deferred, NextNorm
from lowbit.quant.kernels.registry import Kernel
from lowbit.quant.kernels.wna16_args import prepare
from tests.kernels.make import (
    assert_dependence_changes_nothing,
    assert_devices_agree,
    make_packed,
    make_x,
    on_cpu,
)
from tests.kernels.test_ops import make_rotary

DTYPES = [torch.float16, torch.bfloat16]
HIDDEN, EPS = 192, 1e-5
RMS = {"norm": "rms", "norm_eps": EPS}


def made(m: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, PackedWeight, Tensor, Tensor, Tensor]:
    """x (m, 256), a weight, the next norm's weight, bias and residual."""
    weight = make_packed(HIDDEN, 256, dtype=dtype, device=device)
    gamma, bias = (make_x(1, HIDDEN, dtype, device)[0] for _ in range(2))
    return make_x(m, 256, dtype, device), weight, gamma, bias, make_x(m, HIDDEN, dtype, device)


def assert_same(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within what one rounding of every input makes: z is rounded before the deviation, a normed h after it."""
    error = (y.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_product_makes_what_the_next_one_takes(dtype: torch.dtype) -> None:
    x, weight, gamma, *sides = made(3, dtype)
    h, z, squares = ops.linear_deferring(x, weight, gamma, *sides)
    assert torch.equal(h, ops.linear(x, weight, *sides))
    assert torch.equal(z, (h.float() * gamma.float()).to(dtype))
    assert torch.allclose(squares, h.float().square().view(3, 12, 16).sum(-1))
    assert [part.shape for part in ops.linear_deferring(x[:0], weight, gamma)] == [(0, 192), (0, 192), (0, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_it_is_the_product_of_the_norm(dtype: torch.dtype) -> None:
    x, weight, gamma, *sides = made(3, dtype)
    h, z, squares = ops.linear_deferring(x, weight, gamma, *sides)
    deferred = Deferred(squares, EPS)
    plain, gated, turned = (make_packed(96, HIDDEN, dtype=dtype, group_size=64, pair_block=b) for b in (16, 96, 32))
    bias, residual = make_x(1, 96, dtype)[0], make_x(3, 96, dtype)
    norm = {**RMS, "norm_weight": gamma}
    for options in ({}, {"activation": "gelu"}, {"float32_out": True}):
        y = ops.linear(z, plain, bias, residual, deferred=deferred, **options)
        assert_same(y, ops.linear(h, plain, bias, residual, **norm, **options), dtype)
    assert_same(ops.gated_linear(z, gated, bias, deferred=deferred), ops.gated_linear(h, gated, bias, **norm), dtype)
    rotaries = [make_rotary(3, 1, 32, dtype)] * 2
    q = [ops.qkv_rotary_append(z, turned, rotaries[0], bias, deferred=deferred)]
    q += [ops.qkv_rotary_append(h, turned, rotaries[1], bias, **norm)]
    assert_same(*q, dtype)
    dense, normed = make_x(40, HIDDEN, dtype), torch.nn.functional.rms_norm(h, (HIDDEN,), gamma, EPS)
    assert_same(ops.dense_linear(z, dense, deferred=deferred), ops.dense_linear(normed, dense), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_too_large_stays_finite_and_what_was_infinite_shows(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    h = torch.tensor([0.9 * most, -0.9 * most, torch.inf, torch.nan]).repeat(16).to(dtype)[None]
    norm = NextNorm(torch.full((64,), 2, dtype=dtype), torch.empty_like(h), torch.empty(1, 4))
    reference.begin_norm(h, norm)
    expected = torch.tensor([most, -most, torch.inf, torch.nan]).to(dtype).repeat(16)[None]
    assert torch.equal(norm.z.nan_to_num(1), expected.nan_to_num(1))
    assert norm.squares.isnan().all()


def test_a_kernel_without_deferred_norms_gets_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Call] = []
    kernel = Kernel("plain", lambda problem: None, lambda call, problem: reference.run(seen.append(call) or call))
    x, weight, gamma, *sides = made(3, torch.float16)
    expected = ops.linear_deferring(x, weight, gamma, *sides)
    _, z, squares = expected
    following = make_packed(40, HIDDEN, group_size=64)
    wanted = ops.linear(z, following, deferred=Deferred(squares, EPS))
    monkeypatch.setattr(registry, "KERNELS", (kernel,))
    assert all(
        torch.equal(*pair) for pair in zip(ops.linear_deferring(x, weight, gamma, *sides), expected, strict=True)
    )
    assert_same(ops.linear(z, following, deferred=Deferred(squares, EPS)), wanted, torch.float16)
    assert len(seen) == 2
    assert all(call.deferred is None and call.next_norm is None for call in seen)


def test_what_cannot_be_deferred_is_named() -> None:
    x, weight, gamma, *_ = made(3, torch.float16)
    narrow = make_packed(72, 256)
    with pytest.raises(ValueError, match="rows of 72 cannot be deferred: multiples of 64"):
        ops.linear_deferring(x, narrow, gamma[:72])
    with pytest.raises(ValueError, match="next_norm has the shape"):
        ops.linear_deferring(x, weight, gamma[:64])
    deferred = Deferred(torch.ones(3, 16), EPS)
    with pytest.raises(ValueError, match="takes no norm 'rms'"):
        ops.linear(x, weight, norm="rms", norm_weight=x[0], deferred=deferred)
    for squares in (torch.ones(3, 8), torch.ones(3, 16).half(), torch.ones(16, 3).T):
        with pytest.raises(ValueError, match="sums of squares"):
            ops.linear(x, weight, deferred=Deferred(squares, EPS))
        with pytest.raises(ValueError, match="sums of squares"):
            ops.dense_linear(x, make_x(8, 256, torch.float16), deferred=Deferred(squares, EPS))


def test_sums_of_squares_that_shared_memory_has_no_room_for_are_used_up_before() -> None:
    x, _, _, *_ = made(3, torch.float16)
    call = Call(x, make_packed(32, 256), deferred=Deferred(torch.rand(3, 16), EPS))
    assert prepare(call, most_staged=192).deferred is call.deferred
    before = prepare(call, most_staged=191)
    assert before.deferred is None
    assert_same(reference.run(before), reference.run(call), torch.float16)


def test_opcheck() -> None:
    x, weight, gamma, *sides = made(2, torch.float16)
    check, lowbit, squares = torch.library.opcheck, torch.ops.lowbit, torch.ones(2, 16)
    none = ("none", None, None, 0.0)
    check(lowbit.linear_deferring.default, (x, *ops.weight_args(weight), *sides, gamma, False))
    check(
        lowbit.linear.default,
        (x, *ops.weight_args(weight), None, None, *none, "none", False, False, None, squares, EPS),
    )
    gated = make_packed(32, 256, pair_block=32)
    check(lowbit.gated_linear.default, (x, *ops.weight_args(gated), None, *none, False, None, squares, EPS))
    turned, rotary = make_packed(96, 256, pair_block=32), make_rotary(2, 1, 32, torch.float16)
    tail = (*vars(rotary).values(), False, None, squares, EPS)
    check(lowbit.qkv_rotary_append.default, (x, *ops.weight_args(turned), None, *none, *tail))
    dense = make_x(8, 256, torch.float16)
    check(lowbit.dense_linear.default, (x, dense, None, None, "none", False, False, squares, EPS))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 80])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_both_devices_make_the_same(m: int, dtype: torch.dtype, bits: int) -> None:
    x, weight, gamma, bias, residual = made(m, dtype, "cuda")
    weight = make_packed(HIDDEN, 256, bits, dtype=dtype, device="cuda")
    args = (x, *ops.weight_args(weight), bias, residual, gamma, False)
    found, wanted = torch.ops.lowbit.linear_deferring(*args), torch.ops.lowbit.linear_deferring(*map(on_cpu, args))
    for part, expected in zip(found, wanted, strict=True):
        assert (part.cpu().float() - expected.float()).abs().max() <= 0.01 * expected.float().abs().max() * (
            8 if dtype == torch.bfloat16 else 1
        )
    h, z, squares = found
    exact = NextNorm(gamma.cpu(), torch.empty_like(z, device="cpu"), torch.empty_like(squares, device="cpu"))
    reference.begin_norm(h.cpu(), exact)  # of this h: z to the bit
    assert torch.equal(z.cpu(), exact.z)
    assert torch.allclose(squares.cpu(), exact.squares, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_devices_take_the_same(m: int, dtype: torch.dtype) -> None:
    x, squares = make_x(m, 512, dtype, "cuda"), torch.rand(m, 32, device="cuda") * 30
    none, last = ("none", None, None, 0.0), (squares, EPS)
    bias = make_x(1, 96, dtype, "cuda")[0]
    plain, gated, turned = (make_packed(96, 512, dtype=dtype, device="cuda", pair_block=b) for b in (16, 96, 32))
    for operator, args in (
        ("linear", (x, *ops.weight_args(plain), bias, None, *none, "gelu", False, False, None, *last)),
        ("linear", (x, *ops.weight_args(plain), bias, None, *none, "none", True, False, None, *last)),
        ("gated_linear", (x, *ops.weight_args(gated), bias, *none, False, None, *last)),
        ("dense_linear", (x, make_x(40, 512, dtype, "cuda"), None, None, "none", False, False, *last)),
        ("dense_linear", (x, make_x(40, 512, dtype, "cuda"), None, None, "silu_mul", False, False, *last)),
    ):
        run = getattr(torch.ops.lowbit, operator)
        y, expected = run(*args), run(*map(on_cpu, args))
        if operator == "dense_linear" or m > 16:  # torch rounds between its steps
            assert (y.cpu() - expected).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()
        else:
            assert_devices_agree(y, expected.float().to(dtype))
    rotary = make_rotary(m, 1, 32, dtype, "cuda")
    args = (x, *ops.weight_args(turned), bias, *none, *vars(rotary).values())
    copies = [value.cpu().clone() if isinstance(value, Tensor) else value for value in args]
    expected = torch.ops.lowbit.qkv_rotary_append(*copies, False, None, *map(on_cpu, last))
    y = torch.ops.lowbit.qkv_rotary_append(*args, False, None, *last)
    assert (y.cpu().float() - expected.float()).abs().max() <= 16 * torch.finfo(dtype).eps * expected.abs().max()


def block(h: Tensor, weights: list[PackedWeight], gamma: Tensor, head: Tensor, dependent: bool) -> Tensor:
    """Products that feed each other by deferred norms alone, each launch dependent on the kernel before it."""
    z, deferred = h, None
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        inner = ops.linear(z, up, deferred=deferred, dependent=dependent)
        h, z, squares = ops.linear_deferring(inner, down, gamma, residual=h, dependent=dependent)
        deferred = Deferred(squares, EPS)
    return ops.dense_linear(z, head, deferred=deferred, dependent=dependent)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 8, 16])
@pytest.mark.parametrize("k", [1024, 4096])
def test_dependent_launch_changes_nothing_in_a_captured_graph(m: int, k: int) -> None:
    weights = [make_packed(k, k, device="cuda") for _ in range(8)]
    weights = [replace(weight, scales=weight.scales / 64) for weight in weights]
    x, head = make_x(m, k, torch.float16, "cuda"), make_x(8, k, torch.float16, "cuda")
    gamma = head[0].clone()
    assert_dependence_changes_nothing(lambda dependent: block(x, weights, gamma, head, dependent))
