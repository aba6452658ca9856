"""A norm deferred between two products: the operators against a separate norm, on a CPU and on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops, reference, registry
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import Deferred, NextNorm, PackedCall
from lowbit.quant.kernels.registry import Kernel, with_whole_rows
from lowbit.quant.kernels.wna16_args import prepare
from tests.kernels.make import (
    assert_dependence_changes_nothing,
    assert_devices_agree,
    make_packed,
    make_x,
    on_cpu,
    opcheck,
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
    h, z, squares = ops.linear_deferring(PackedCall(x, weight, *sides), gamma)
    assert torch.equal(h, ops.linear(PackedCall(x, weight, *sides)))
    assert torch.equal(z, (h.float() * gamma.float()).to(dtype))
    assert torch.allclose(squares, h.float().square().view(3, 12, 16).sum(-1))
    nothing = ops.linear_deferring(PackedCall(x[:0], weight), gamma)
    assert [part.shape for part in nothing] == [(0, 192), (0, 192), (0, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_it_is_the_product_of_the_norm(dtype: torch.dtype) -> None:
    x, weight, gamma, *sides = made(3, dtype)
    h, z, squares = ops.linear_deferring(PackedCall(x, weight, *sides), gamma)
    deferred = Deferred(squares, EPS)
    plain, gated, turned = (make_packed(96, HIDDEN, dtype=dtype, group_size=64, pair_block=b) for b in (16, 96, 32))
    bias, residual = make_x(1, 96, dtype)[0], make_x(3, 96, dtype)
    norm = {**RMS, "norm_weight": gamma}
    for options in ({}, {"activation": "gelu"}, {"float32_out": True}):
        y = ops.linear(PackedCall(z, plain, bias, residual, deferred=deferred, **options))
        assert_same(y, ops.linear(PackedCall(h, plain, bias, residual, **norm, **options)), dtype)
    y = ops.linear(PackedCall(z, gated, bias, activation="silu_mul", deferred=deferred))
    assert_same(y, ops.linear(PackedCall(h, gated, bias, activation="silu_mul", **norm)), dtype)
    rotaries = [make_rotary(3, 1, 32, dtype)] * 2
    q = [ops.linear(PackedCall(z, turned, bias, rotary=rotaries[0], deferred=deferred))]
    q += [ops.linear(PackedCall(h, turned, bias, rotary=rotaries[1], **norm))]
    assert_same(*q, dtype)
    dense, normed = make_x(40, HIDDEN, dtype), torch.nn.functional.rms_norm(h, (HIDDEN,), gamma, EPS)
    y = ops.linear(DenseCall(z, dense, deferred=deferred))
    assert_same(y, ops.linear(DenseCall(normed, dense)), dtype)


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
    seen: list[PackedCall] = []
    run = with_whole_rows(lambda call, problem: reference.run(seen.append(call) or call))
    kernel = Kernel("plain", lambda problem: None, run)
    x, weight, gamma, *sides = made(3, torch.float16)
    expected = ops.linear_deferring(PackedCall(x, weight, *sides), gamma)
    _, z, squares = expected
    following = make_packed(40, HIDDEN, group_size=64)
    wanted = ops.linear(PackedCall(z, following, deferred=Deferred(squares, EPS)))
    monkeypatch.setattr(registry, "KERNELS", (kernel,))
    found = ops.linear_deferring(PackedCall(x, weight, *sides), gamma)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert_same(ops.linear(PackedCall(z, following, deferred=Deferred(squares, EPS))), wanted, torch.float16)
    assert len(seen) == 2
    assert all(call.deferred is None and call.next_norm is None for call in seen)


def test_what_cannot_be_deferred_is_named() -> None:
    x, weight, gamma, *_ = made(3, torch.float16)
    narrow = make_packed(72, 256)
    with pytest.raises(ValueError, match="rows of 72 cannot be deferred: multiples of 64"):
        ops.linear_deferring(PackedCall(x, narrow), gamma[:72])
    with pytest.raises(ValueError, match="next_norm has the shape"):
        ops.linear_deferring(PackedCall(x, weight), gamma[:64])
    deferred = Deferred(torch.ones(3, 16), EPS)
    with pytest.raises(ValueError, match="norm 'rms' cannot be applied too"):
        ops.linear(PackedCall(x, weight, norm="rms", norm_weight=x[0], deferred=deferred))
    for squares in (torch.ones(3, 8), torch.ones(3, 16).half(), torch.ones(16, 3).T):
        with pytest.raises(ValueError, match="sums of squares"):
            ops.linear(PackedCall(x, weight, deferred=Deferred(squares, EPS)))
        with pytest.raises(ValueError, match="sums of squares"):
            ops.linear(DenseCall(x, make_x(8, 256, torch.float16), deferred=Deferred(squares, EPS)))


def test_sums_of_squares_that_shared_memory_has_no_room_for_are_used_up_before() -> None:
    x, _, _, *_ = made(3, torch.float16)
    call = PackedCall(x, make_packed(32, 256), deferred=Deferred(torch.rand(3, 16), EPS))
    assert prepare(call, most_staged=192).deferred is call.deferred
    before = prepare(call, most_staged=191)
    assert before.deferred is None
    assert_same(reference.run(before), reference.run(call), torch.float16)


def test_opcheck() -> None:
    x, weight, gamma, *sides = made(2, torch.float16)
    opcheck(ops.deferring_linear, PackedCall(x, weight, *sides, next_norm=NextNorm.empty(x, gamma)))
    deferred = Deferred(torch.ones(2, 16), EPS)
    opcheck(ops.plain_linear, PackedCall(x, weight, deferred=deferred))
    gated = make_packed(32, 256, pair_block=32)
    opcheck(ops.plain_linear, PackedCall(x, gated, activation="silu_mul", deferred=deferred))
    turned, rotary = make_packed(96, 256, pair_block=32), make_rotary(2, 1, 32, torch.float16)
    opcheck(ops.turning_linear, PackedCall(x, turned, rotary=rotary, deferred=deferred))
    opcheck(ops.plain_dense_linear, DenseCall(x, make_x(8, 256, torch.float16), deferred=deferred))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 80])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_both_devices_make_the_same(m: int, dtype: torch.dtype, bits: int) -> None:
    x, weight, gamma, bias, residual = made(m, dtype, "cuda")
    weight = make_packed(HIDDEN, 256, bits, dtype=dtype, device="cuda")
    call = PackedCall(x, weight, bias, residual)
    found, wanted = ops.linear_deferring(call, gamma), ops.linear_deferring(on_cpu(call), gamma.cpu())
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
    bias, deferred = make_x(1, 96, dtype, "cuda")[0], Deferred(squares, EPS)
    plain, gated, turned = (make_packed(96, 512, dtype=dtype, device="cuda", pair_block=b) for b in (16, 96, 32))
    for call in (
        PackedCall(x, plain, bias, activation="gelu", deferred=deferred),
        PackedCall(x, plain, bias, float32_out=True, deferred=deferred),
        PackedCall(x, gated, bias, activation="silu_mul", deferred=deferred),
    ):
        y, expected = ops.linear(call), ops.linear(on_cpu(call))
        if m > 16:
            assert_roughly(y, expected, dtype)
        else:
            assert_devices_agree(y, expected.float().to(dtype))
    for activation in ("none", "silu_mul"):
        dense = DenseCall(x, make_x(40, 512, dtype, "cuda"), activation=activation, deferred=deferred)
        assert_roughly(ops.linear(dense), ops.linear(on_cpu(dense)), dtype)
    call = PackedCall(x, turned, bias, rotary=make_rotary(m, 1, 32, dtype, "cuda"), deferred=deferred)
    expected = ops.linear(on_cpu(call))
    assert_roughly(ops.linear(call), expected, dtype)


def assert_roughly(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within some roundings of the largest result to `dtype`: torch rounds between its steps."""
    error = (y.cpu().float() - expected.float()).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps * expected.float().abs().max()


def block(h: Tensor, weights: list[PackedWeight], gamma: Tensor, head: Tensor, dependent: bool) -> Tensor:
    """Products that feed each other by deferred norms alone, each launch dependent on the kernel before it."""
    z, deferred = h, None
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        inner = ops.linear(PackedCall(z, up, deferred=deferred, dependent=dependent))
        h, z, squares = ops.linear_deferring(PackedCall(inner, down, residual=h, dependent=dependent), gamma)
        deferred = Deferred(squares, EPS)
    return ops.linear(DenseCall(z, head, deferred=deferred, dependent=dependent))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 8, 16])
@pytest.mark.parametrize("k", [1024, 4096])
def test_dependent_launch_changes_nothing_in_a_captured_graph(m: int, k: int) -> None:
    weights = [make_packed(k, k, device="cuda") for _ in range(8)]
    weights = [replace(weight, scales=weight.scales / 64) for weight in weights]
    x, head = make_x(m, k, torch.float16, "cuda"), make_x(8, k, torch.float16, "cuda")
    gamma = head[0].clone()
    assert_dependence_changes_nothing(lambda dependent: block(x, weights, gamma, head, dependent))
