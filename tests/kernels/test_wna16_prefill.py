"""The product of a prompt's rows on Hopper: the rule that cuts it, and CPU reference against CUDA."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lowbit.quant.kernels import ops, reference
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall
from lowbit.quant.kernels.wna16_prefill import (
    COLUMNS,
    PrefillCut,
    choose_cut,
    cost_of,
    cuts_of,
    parts_of,
    reason_against,
    run,
)
from tests.kernels.make import (
    assert_close_as_half,
    assert_dependence_changes_nothing,
    assert_devices_agree,
    assert_streams_agree,
    make_float,
    make_packed,
    make_x,
    on_cpu,
)
from tests.kernels.test_ops import make_rotary
from tests.kernels.test_wna16_gemm import DTYPES, ON_H100, hopper

PROMPT = replace(ON_H100, m=512)
FLOATS = ("fp8-a16", "fp8-block-a16", "mxfp8-a16", "mxfp4-a16", "nvfp4-a16")


def test_few_and_very_many_rows_streams_and_other_gpus_are_declined() -> None:
    assert reason_against(replace(PROMPT, m=64)) == "64 rows: it is for more than 64"
    assert reason_against(replace(PROMPT, m=8192)) == "8192 rows: wna16_dequantize is faster"
    assert reason_against(replace(PROMPT, bits=3)) == "3 bits: it takes 4 and 8"
    assert reason_against(replace(PROMPT, capability=(8, 9))) == "it is for sm_90, the GPU is sm_89"
    assert reason_against(replace(PROMPT, capability=None, device="cpu")) == "the tensors are on the cpu"


@pytest.mark.parametrize("m", [65, 192, 256, 512, 1000, 2048])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1000, 96), (4096, 4096), (4096, 14336), (28672, 4096), (57344, 8192)])
def test_the_cheapest_cut_is_chosen_and_clusters_do_the_whole_product(m: int, n: int, k: int) -> None:
    problem = replace(PROMPT, m=m, n=n, k=k)
    cuts, chosen = cuts_of(problem), choose_cut(problem)
    assert all(cost_of(chosen, problem) <= cost_of(cut, problem) for cut in cuts)
    for cut in cuts:
        assert cut.columns in COLUMNS
        assert 1 <= cut.clusters <= 66
        assert 0 <= cut.whole <= parts_of(cut.columns, problem)


def test_parts_that_fill_no_wave_are_shared() -> None:
    few = replace(PROMPT, n=4096, k=14336, m=256)
    assert choose_cut(few).whole < parts_of(choose_cut(few).columns, few)


def check_product(m: int, weight: PackedWeight, cut: PrefillCut | None = None, outliers: bool = False) -> None:
    x = make_x(m, weight.k, weight.dtype, "cuda", outliers)
    call, dense = PackedCall(x, weight), reference.dequantize_packed(weight)
    y = run(call, call.problem(), cut)
    assert_close_as_half(y, x.double() @ dense.double().T, x @ dense.to(weight.dtype).T)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [65, 130, 512])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_scheme(m: int, dtype: torch.dtype, bits: int) -> None:
    for group_size in (32, 64, 128, 256, -1):
        for symmetric in (True, False):
            weight = make_packed(168, 1280, bits, group_size, symmetric, dtype, "cuda")
            for outliers in (False, True):
                check_product(m, weight, outliers=outliers)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", FLOATS)
def test_floats(scheme: str, dtype: torch.dtype) -> None:
    weight = make_float(scheme, 264, 1280, dtype, "cuda")
    for m in (65, 300):
        check_product(m, weight)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [65, 300, 1024])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1, 128), (40, 96), (1000, 4128), (4096, 14336), (5120, 13824)])
def test_shapes(m: int, n: int, k: int) -> None:
    check_product(m, make_packed(n, k, 4, 32, True, torch.float16, "cuda"))
    check_product(m, make_packed(n, k, 8, -1, True, torch.bfloat16, "cuda"))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("clusters", [1, 3, 32, 50, 66])
def test_every_cut_of_the_work_gives_the_same_bits_every_time(columns: int, clusters: int) -> None:
    weight = make_packed(4096, 2048, device="cuda")
    call = PackedCall(make_x(700, 2048, torch.float16, "cuda"), weight)
    problem = call.problem()
    for whole in (0, 1, 48, 1000):
        cut = PrefillCut(columns, clusters, whole)
        check_product(700, weight, cut)
        compute = partial(run, problem=problem, cut=cut)
        assert_dependence_changes_nothing(lambda dependent, run=compute: run(replace(call, dependent=dependent)))
        assert_streams_agree(lambda run=compute: run(call))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [96, 300])
@pytest.mark.parametrize("n", [264, 100])  # 100: rows of y that do not start at multiples of 16 bytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(m: int, n: int, dtype: torch.dtype) -> None:
    k = 512
    weight = make_packed(n, k, dtype=dtype, device="cuda")
    weight = replace(weight, scales=weight.scales / 8)
    x, bias, residual = make_x(m, k, dtype, "cuda"), make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
    for added in (None, residual):
        for activation in ("none", "gelu", "gelu_tanh", "quick_gelu"):
            for float32_out in (False, True):
                call = PackedCall(x, weight, bias, added, activation=activation, float32_out=float32_out)
                y = run(call, call.problem())
                assert_devices_agree(y.to(dtype), ops.linear(on_cpu(call)).to(dtype))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_and_rotated(dtype: torch.dtype) -> None:
    gated = make_packed(320, 512, dtype=dtype, device="cuda", pair_block=320)
    call = PackedCall(make_x(72, 512, dtype, "cuda"), gated, activation="silu_mul")
    assert_devices_agree(run(call, call.problem()), ops.linear(on_cpu(call)))
    weight = make_packed(6 * 64, 512, dtype=dtype, device="cuda", pair_block=64)
    call = PackedCall(make_x(72, 512, dtype, "cuda"), weight, rotary=make_rotary(72, 2, 64, dtype, "cuda"))
    copy = on_cpu(call)
    assert_devices_agree(run(call, call.problem()), ops.linear(copy))
    assert call.rotary is not None
    assert_devices_agree(call.rotary.k_cache, copy.rotary.k_cache)
    assert_devices_agree(call.rotary.v_cache, copy.rotary.v_cache)
