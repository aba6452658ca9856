"""The fused product for several rows on Hopper: the rule that cuts it, and CPU reference against CUDA."""

from dataclasses import replace

import pytest
import torch

from lowbit.quant.kernels import ops, reference
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall, Problem
from lowbit.quant.kernels.wna16_gemm import (
    CLUSTERS,
    WARPGROUPS,
    GemmCut,
    beats_gemv,
    choose_cut,
    cost_of,
    reason_against,
    run,
)
from tests.kernels.make import (
    assert_close_as_half,
    assert_devices_agree,
    assert_heads_agree,
    make_packed,
    make_x,
    on_cpu,
)
from tests.kernels.test_ops import make_rotary

ON_H100 = Problem(32, 12288, 4096, 4, 128, torch.float16, "cuda", (9, 0), 132)
DTYPES = [torch.float16, torch.bfloat16]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200"
)


def test_few_rows_many_rows_small_weights_and_other_gpus_are_declined() -> None:
    assert reason_against(replace(ON_H100, m=8)) == "8 rows: wna16_gemv is faster"
    assert reason_against(replace(ON_H100, m=16)) == "16 rows of a weight below 30 MB: wna16_gemv is faster"
    assert reason_against(replace(ON_H100, m=10**5)) == "100000 rows: it takes at most 64"
    assert reason_against(replace(ON_H100, capability=(8, 9))) == "it is for sm_90, the GPU is sm_89"


def test_few_rows_of_8_bits_per_channel_are_taken_where_the_other_kernel_leaves_room() -> None:
    wide = replace(ON_H100, m=1, n=20480, k=5120, bits=8, group_size=-1)
    assert beats_gemv(wide)
    assert beats_gemv(replace(wide, m=8))
    for other in ({"n": 4096}, {"bits": 4}, {"group_size": 128}, {"norm": True}):
        assert not beats_gemv(replace(wide, **other))


@pytest.mark.parametrize("m", [9, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1000, 96), (4096, 4096), (4096, 14336), (5120, 13824), (57344, 8192)])
def test_the_cheapest_cut_is_chosen(m: int, n: int, k: int) -> None:
    problem = replace(ON_H100, m=m, n=n, k=k)
    launch = choose_cut(problem)
    assert 1 <= launch.cluster <= len(CLUSTERS)
    assert launch.cluster == 1 or 2 * launch.cluster <= -(-k // 128)
    assert launch.warpgroups in WARPGROUPS
    assert all(cost_of(launch, problem) <= cost_of(GemmCut(w, 1), problem) for w in WARPGROUPS)


def test_a_matrix_of_few_rows_is_cut_over_k() -> None:
    assert choose_cut(replace(ON_H100, n=4096)).cluster > 1
    assert choose_cut(replace(ON_H100, n=57344)).cluster == 1


def check_product(m: int, weight: PackedWeight, launch: GemmCut | None = None, outliers: bool = False) -> None:
    x = make_x(m, weight.k, weight.dtype, "cuda", outliers)
    call = PackedCall(x, weight)
    dense = reference.dequantize_packed(weight)
    y = run(call, call.problem(), launch)
    assert_close_as_half(y, x.double() @ dense.double().T, x @ dense.to(weight.dtype).T)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [1, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_scheme(m: int, dtype: torch.dtype, bits: int) -> None:
    for group_size in (32, 64, 128, 256, -1):
        for symmetric in (True, False):
            weight = make_packed(160, 1280, bits, group_size, symmetric, dtype, "cuda")
            check_product(m, weight)
            check_product(m, weight, outliers=True)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [12, 31, 64])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1, 128), (40, 96), (1000, 4128), (4096, 14336), (5120, 13824)])
def test_shapes(m: int, n: int, k: int) -> None:
    check_product(m, make_packed(n, k, 4, 32, True, torch.float16, "cuda"))
    check_product(m, make_packed(n, k, 8, -1, True, torch.bfloat16, "cuda"))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("m", "warpgroups"), [(m, w) for m in (16, 32, 64) for w in WARPGROUPS])
def test_every_cut_of_the_work(m: int, warpgroups: int) -> None:
    for k in (128, 1664, 3968):
        weights = [make_packed(456, k, 4, 128, False, torch.float16, "cuda")]
        weights += [make_packed(456, k, 8, group_size, device="cuda") for group_size in (32, -1)]
        for cluster in range(1, 9):
            for weight in weights:
                check_product(m, weight, GemmCut(warpgroups, cluster))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [17, 64])
@pytest.mark.parametrize("n", [96, 100])  # 100: rows of y that do not start at multiples of 16 bytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(m: int, n: int, dtype: torch.dtype) -> None:
    k = 512
    weight = make_packed(n, k, dtype=dtype, device="cuda")
    weight = replace(weight, scales=weight.scales / 8)
    x, bias, residual = make_x(m, k, dtype, "cuda"), make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
    gamma = make_x(1, k, dtype, "cuda")[0]
    for norm in (("none", None, None, 0.0), ("rms", gamma, None, 1e-5)):
        for activation in ("none", "gelu", "gelu_tanh", "quick_gelu"):
            for float32_out in (False, True):
                call = PackedCall(x, weight, bias, residual, *norm, activation, float32_out=float32_out)
                assert_devices_agree(ops.linear(call).to(dtype), ops.linear(on_cpu(call)).to(dtype))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_and_rotated(m: int, dtype: torch.dtype) -> None:
    gated = make_packed(320, 512, dtype=dtype, device="cuda", pair_block=320)
    call = PackedCall(make_x(m, 512, dtype, "cuda"), gated, activation="silu_mul")
    assert_devices_agree(ops.linear(call), ops.linear(on_cpu(call)))
    weight = make_packed(6 * 64, 512, dtype=dtype, device="cuda", pair_block=64)
    call = PackedCall(make_x(m, 512, dtype, "cuda"), weight, rotary=make_rotary(m, 2, 64, dtype, "cuda"))
    assert_heads_agree(call)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("m", "warpgroups"), [(m, w) for m in (9, 32, 50, 64) for w in WARPGROUPS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_with_all_of_k_and_no_residual(m: int, warpgroups: int, dtype: torch.dtype) -> None:
    x, bias = make_x(m, 512, dtype, "cuda"), make_x(1, 616, dtype, "cuda")[0]
    for n, pair_block, activations in ((616, 16, ("none", "gelu", "quick_gelu")), (608, 608, ("silu_mul",))):
        weight = make_packed(n, 512, dtype=dtype, device="cuda", pair_block=pair_block)
        weight = replace(weight, scales=weight.scales / 8)
        for activation in activations:
            for added in (None, bias[:n].contiguous()):
                call = PackedCall(x, weight, added, activation=activation)
                y = run(call, call.problem(), GemmCut(warpgroups, 1))
                assert_devices_agree(y, ops.linear(on_cpu(call)))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [48, 64])
@pytest.mark.parametrize("launch", [GemmCut(3, 1), GemmCut(3, 5), GemmCut(2, 8)])
def test_the_same_bits_every_time(m: int, launch: GemmCut) -> None:
    weight, x = make_packed(512, 8192, device="cuda"), make_x(m, 8192, torch.float16, "cuda")
    call = PackedCall(x, weight)
    first = run(call, call.problem(), launch)
    assert all(torch.equal(first, run(call, call.problem(), launch)) for _ in range(20))
