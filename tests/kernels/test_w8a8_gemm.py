"""The product of 8 bits for few rows: exact sums, one operator on two devices, and what graphs and streams do to it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import extension, ops, ring, w8a8, w8a8_gemm
from lowbit.quant.kernels.problem import Problem
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.ring import RingCut
from lowbit.quant.kernels.row_norm import GROUP
from lowbit.quant.kernels.w8a8 import W8a8Call, W8a8Weight
from lowbit.quant.kernels.w8a8_gemm import choose_cut, run
from tests.kernels.make import (
    assert_dependence_changes_nothing,
    assert_devices_agree,
    assert_streams_agree,
    make_w8a8_weight,
    make_x,
    on_cpu,
    w8a8_call,
)

ROWS = [1, 2, 7, 8, 9, 16, 17, 33, 64, 100, 128, 255]
BLOCK_BYTES = 227 << 10  # of shared memory, at most
CUTS = [RingCut(w, c, stages) for w in w8a8_gemm.WARPGROUPS for c in ring.CLUSTERS for stages in (2, 4)]
ON_H100 = Problem(1, 4096, 4096, 8, -1, torch.float16, "cuda", (9, 0), 132, code_inputs=True)


def shared_bytes(launch: RingCut, m: int) -> int:
    """A block's shared memory in csrc/ring.cuh: ring, barriers, scales, and room to align; sums fit in the ring."""
    rows, columns = 64 * launch.warpgroups, next(c for c in (8, 16, 32, 64, 128) if c >= min(m, 128))
    stage = (rows + columns) * 128
    stages = max(launch.stages, -(-(rows + 4) * columns * 4 // stage), 2)
    return stages * (stage + 16) + 4 * (rows + columns) + 1024


@pytest.mark.parametrize("m", [1, 16, 17, 64, 128, 1000])
@pytest.mark.parametrize("processors", [78, 114, 132])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1000, 96), (4096, 4096), (4096, 14336), (5120, 13824), (57344, 8192)])
def test_launches_are_possible(m: int, n: int, k: int, processors: int) -> None:
    launch = choose_cut(replace(ON_H100, m=m, n=n, k=k, processors=processors))
    assert launch.warpgroups in w8a8_gemm.WARPGROUPS
    assert launch.cluster <= -(-k // ring.CHUNK_BYTES)
    assert launch.stages >= 1
    assert shared_bytes(launch, m) <= BLOCK_BYTES


def test_the_cuts_that_are_tried_are_possible() -> None:
    assert max(shared_bytes(launch, 128) for launch in CUTS) <= BLOCK_BYTES


def test_other_gpus_are_declined_by_name() -> None:
    assert w8a8_gemm.reason_against(replace(ON_H100, capability=(8, 0))) == "it is for sm_90, the GPU is sm_80"
    assert choose_kernel(replace(ON_H100, capability=(8, 0))).name == "torch._int_mm"


@pytest.mark.parametrize(
    ("m", "n", "architectures", "name"),
    [
        (1, 4096, "80 90a", "w8a8_gemm"),
        (128, 4096, "90a", "w8a8_gemm"),
        (129, 4096, "90a", "w8a8_cutlass"),
        (129, 4097, "90a", "w8a8_gemm"),
        (1, 4096, "80 90+PTX", "torch._int_mm"),
    ],
)
def test_the_number_of_rows_decides(
    m: int, n: int, architectures: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "EXTENSION", SimpleNamespace(architectures=architectures))
    assert choose_kernel(replace(ON_H100, m=m, n=n)).name == name


def random_codes(*shape: int, device: str = "cuda") -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)


def check_sums(m: int, n: int, k: int, launch: RingCut | None = None) -> None:
    """Every bit of the sums, which float32 holds: scales of 1, and inputs over the whole range."""
    weight = W8a8Weight(random_codes(n, k), torch.ones(n, device="cuda"))
    x = random_codes(m, k).clamp(min=-127)
    call = W8a8Call(x, torch.ones(m, device="cuda"), weight, dtype=torch.float32)
    y = run(call, call.problem(), launch)
    assert torch.equal(y.double(), x.double() @ weight.codes.double().T)


@pytest.mark.gpu
@pytest.mark.parametrize("m", ROWS)
def test_sums_are_exact_integers(m: int) -> None:
    for n, k in ((1, 16), (16, 32), (72, 272), (1000, 4128), (4096, 4096)):
        check_sums(m, n, k)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 48, 128])
def test_every_cut_of_the_work(m: int) -> None:
    for launch in CUTS:
        check_sums(m, 328, 1680, launch)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (5120, 13824), (28672, 4096)])
def test_shapes_of_models(n: int, k: int) -> None:
    check_sums(3, n, k)
    check_sums(64, n, k)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 40, 255])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_operator_on_two_devices(m: int, dtype: torch.dtype) -> None:
    for n, k in ((96, 512), (99, 1040)):
        weight = make_w8a8_weight(n, k, "cuda")
        x, bias, residual = make_x(m, k, dtype, "cuda"), make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
        scale = torch.tensor(0.02, device="cuda")
        for input_scale in (None, scale):
            for tail in ((None, None), (bias, None), (None, residual), (bias, residual)):
                call = w8a8_call(x, weight, *tail, input_scale)
                on_host = w8a8_call(*map(on_cpu, (x, weight, *tail, input_scale)))
                assert_devices_agree(ops.w8a8_linear(call), ops.w8a8_linear(on_cpu(call)))
                assert_devices_agree(ops.w8a8_linear(call), ops.w8a8_linear(on_host))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 12, 64])
def test_the_same_bits_every_time(m: int) -> None:
    weight, x = make_w8a8_weight(512, 8192, "cuda"), make_x(m, 8192, torch.float16, "cuda")
    first = ops.w8a8_linear(w8a8_call(x, weight))
    assert all(torch.equal(first, ops.w8a8_linear(w8a8_call(x, weight))) for _ in range(20))


def chain(x: Tensor, weights: list[W8a8Weight], dependent: bool) -> Tensor:
    """Products with nothing between them, so that each launch depends on the kernel before it."""
    for weight in weights:
        x = ops.w8a8_linear(w8a8_call(x, weight, residual=x, dependent=dependent))
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 64])
@pytest.mark.parametrize("k", [1024, 4096])
def test_dependent_launch_changes_nothing_in_a_captured_graph(m: int, k: int) -> None:
    weights = [make_w8a8_weight(k, k, "cuda") for _ in range(6)]
    weights = [replace(weight, scales=weight.scales / 64) for weight in weights]
    x = make_x(m, k, torch.float16, "cuda")
    assert_dependence_changes_nothing(lambda dependent: chain(x, weights, dependent))


@pytest.mark.gpu
def test_another_stream_waits_for_nobody_else() -> None:
    weight = make_w8a8_weight(256, 512, "cuda")
    x = make_x(3, 512, torch.float16, "cuda")
    assert_streams_agree(lambda: ops.w8a8_linear(w8a8_call(x, weight)))


@pytest.mark.gpu
def test_misaligned_and_misplaced_tensors_are_named() -> None:
    weight = make_w8a8_weight(64, 256, "cuda")
    x = random_codes(3 * 256 + 1)[1:].view(3, 256)
    with pytest.raises(ValueError, match="16 bytes at a time"):
        ops.w8a8_linear(W8a8Call(x, torch.ones(3, device="cuda"), weight))
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        ops.w8a8_linear(w8a8_call(make_x(3, 256, torch.float16, "cuda"), make_w8a8_weight(64, 256)))


FLOATS = Problem(1, 4096, 4096, 8, -1, torch.float16, "cuda", (9, 0), 132, code_inputs=True, is_float=True)


@pytest.mark.parametrize(
    ("m", "n", "dtype", "capability", "name"),
    [
        (64, 4096, torch.float16, (9, 0), "w8a8_gemm"),
        (65, 4096, torch.float16, (9, 0), "torch._scaled_mm"),
        (129, 4104, torch.float16, (9, 0), "w8a8_gemm"),
        (129, 4096, torch.float32, (9, 0), "w8a8_gemm"),
        (129, 4096, torch.float16, (8, 9), "reference"),
        (1, 4096, torch.float16, None, "reference"),
    ],
)
def test_the_kernels_of_fp8(
    m: int,
    n: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "EXTENSION", SimpleNamespace(architectures="90a"))
    assert choose_kernel(replace(FLOATS, m=m, n=n, dtype=dtype, capability=capability)).name == name


def fp8_call(m: int, n: int, k: int, outliers: bool = False, dtype: torch.dtype = torch.float32) -> W8a8Call:
    """A product of FP8; with `outliers` every k / 5th input is 60 times larger."""
    weight, x = make_w8a8_weight(n, k, "cuda", "fp8-a16"), make_x(m, k, torch.float16, "cuda", outliers)
    return replace(w8a8_call(x, weight), dtype=dtype)


def block_call(m: int, n: int, k: int, outliers: bool = False, dtype: torch.dtype = torch.float32) -> W8a8Call:
    """The same in blocks whose scales are far apart, the last of which may be incomplete."""
    like, sides = fp8_call(m, n, k, outliers, dtype), w8a8.block_sides(n, k)
    scales = torch.rand(sides, device="cuda").exp2() * 2.0 ** torch.randint(-12, 3, (sides[0], 1), device="cuda")
    x_scales = 2.0 ** torch.randint(-12, 3, (k // GROUP, m), device="cuda").float()
    return replace(like, x_scales=x_scales, weight=W8a8Weight(like.weight.codes, scales))


def error_of(y: Tensor, call: W8a8Call) -> Tensor:
    """The largest error against a product in float64, as a part of the sum of the products' magnitudes."""
    if call.weight.in_blocks:
        x = w8a8.in_values(call.x, call.x_scales.T)
        codes = w8a8.in_values(call.weight.codes, call.weight.scales, GROUP)
    else:
        x, codes = call.x.double() * call.x_scales.double().unsqueeze(1), call.weight.codes.double()
        codes = codes * call.weight.scales.double().unsqueeze(1)
    return ((y.double() - x @ codes.T).abs() / (x.abs() @ codes.abs().T).clamp(min=1e-30)).max()


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("m", ROWS)
def test_sums_of_fp8_lose_the_bits_of_a_chunk_alone(m: int, outliers: bool) -> None:
    for n, k in ((1, 16), (72, 272), (1000, 4128), (4096, 4096)):
        call = fp8_call(m, n, k, outliers)
        # four tensor instructions of a chunk, each cut after 13 bits behind the largest term
        assert error_of(run(call, call.problem()), call) < 4 * 2.0**-12


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 48, 128])
def test_every_cut_of_fp8(m: int) -> None:
    for launch in CUTS:
        call = fp8_call(m, 328, 1680)
        y = run(call, call.problem(), launch)
        assert error_of(y, call) < 4 * 2.0**-12
        assert torch.equal(y, run(call, call.problem(), launch))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outliers", [False, True])
def test_many_rows_of_fp8_in_torch(outliers: bool, dtype: torch.dtype) -> None:
    for m, n, k in ((65, 96, 512), (300, 4096, 4096), (512, 4096, 11008)):
        call = fp8_call(m, n, k, outliers, dtype)
        assert choose_kernel(call.problem()).name == "torch._scaled_mm"
        bias, residual = make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
        exact = w8a8.reference(replace(call, bias=bias, residual=residual, dtype=torch.float32, x=call.x))
        y = ops.w8a8_linear(replace(call, bias=bias, residual=residual))
        assert (y.float() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def distance(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("k", [4096, w8a8.MOST_FAST_K])
def test_sums_that_stay_in_the_tensor_cores_double_no_error_of_bfloat16(k: int, outliers: bool) -> None:
    call = fp8_call(512, 4096, k, outliers, torch.bfloat16)
    assert w8a8.keeps_sums(call)
    x, codes = call.x.double() * call.x_scales.double().unsqueeze(1), call.weight.codes.double()
    exact = x @ (codes * call.weight.scales.double().unsqueeze(1)).T
    dense = x.bfloat16() @ (codes * call.weight.scales.double().unsqueeze(1)).bfloat16().T
    assert distance(ops.w8a8_linear(call), exact) <= 2 * distance(exact.bfloat16(), exact)
    assert distance(ops.w8a8_linear(call), exact) <= 2 * distance(dense, exact)


def test_longer_and_finer_sums_are_added_up_in_float32() -> None:
    weight = make_w8a8_weight(16, w8a8.MOST_FAST_K, scheme="fp8-a16")
    call = w8a8_call(make_x(1, w8a8.MOST_FAST_K, torch.bfloat16, "cpu"), weight)
    assert w8a8.keeps_sums(call)
    assert not w8a8.keeps_sums(replace(call, dtype=torch.float16))
    longer = replace(weight, codes=torch.cat((weight.codes, weight.codes[:, :16].contiguous()), 1))
    assert not w8a8.keeps_sums(replace(call, weight=longer))


@pytest.mark.gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("m", ROWS)
def test_sums_of_blocks_are_multiplied_with_their_scales(m: int, outliers: bool) -> None:
    for n, k in ((1, 128), (200, 384), (1000, 4224), (4096, 4096)):
        call = block_call(m, n, k, outliers)
        assert error_of(run(call, call.problem()), call) < 4 * 2.0**-12


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 48, 100])
def test_every_cut_of_blocks(m: int) -> None:
    call = block_call(m, 328, 1664)
    for launch in CUTS:
        assert error_of(run(call, call.problem(), launch), call) < 4 * 2.0**-12


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 40, 255])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_operator_in_blocks_on_two_devices(m: int, dtype: torch.dtype) -> None:
    n, k = 384, 1152
    weight = make_w8a8_weight(n, k, "cuda", "fp8-block")
    x, bias, residual = make_x(m, k, dtype, "cuda"), make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
    for tail in ((None, None), (bias, None), (None, residual), (bias, residual)):
        call = w8a8_call(x, weight, *tail)
        assert_devices_agree(ops.w8a8_linear(call), ops.w8a8_linear(on_cpu(call)))
        assert_devices_agree(ops.w8a8_linear(call), ops.w8a8_linear(w8a8_call(*map(on_cpu, (x, weight, *tail)))))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 64])
def test_dependent_launch_changes_no_bit_of_blocks(m: int) -> None:
    weights = [make_w8a8_weight(1024, 1024, "cuda", "fp8-block") for _ in range(6)]
    weights = [replace(weight, scales=weight.scales / 64) for weight in weights]
    x = make_x(m, 1024, torch.float16, "cuda")
    assert_dependence_changes_nothing(lambda dependent: chain(x, weights, dependent))
