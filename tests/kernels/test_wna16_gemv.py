"""The fused product for few rows: one operator, CPU reference against CUDA, and what graphs and streams do to it."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import ops, reference
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall, Problem, has_fast_memory
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.wna16_args import FAST_NEXT_BYTES, NEXT_BYTES, prepare
from lowbit.quant.kernels.wna16_gemm import beats_gemv
from lowbit.quant.kernels.wna16_gemv import (
    CROWD,
    CROWDS,
    PAIRED_WAVES,
    PANEL_WAVES,
    ROOM,
    WAVES,
    GemvCut,
    choose_cut,
    crowded_cut,
    paired_cut,
    run,
)
from tests.kernels.make import (
    assert_close_as_half,
    assert_dependence_changes_nothing,
    assert_devices_agree,
    assert_heads_agree,
    assert_streams_agree,
    make_packed,
    make_x,
    on_cpu,
    opcheck,
)
from tests.kernels.test_ops import make_rotary

ROWS = [1, 2, 7, 8, 9, 16]  # on Hopper it has no code for more
DTYPES = [torch.float16, torch.bfloat16]


def test_few_rows_get_the_fused_kernel_where_it_was_built() -> None:
    problem = Problem(1, 4096, 4096, 4, 128, torch.float16, "cuda", (9, 0), 132)
    launch = choose_cut(problem)
    assert launch.k_warps * launch.row_warps <= 8
    assert choose_kernel(replace(problem, device="cpu", capability=None)).name == "reference"


@pytest.mark.parametrize(
    ("n", "k", "warps"),
    [
        (12288, 4096, (2, 4, 24)),
        (4096, 4096, (1, 12, 24)),
        (22016, 4096, (4, 2, 24)),
        (4096, 11008, (1, 14, 28)),
        (15360, 5120, (2, 3, 24)),
        (5120, 13824, (1, 9, 28)),
        (4096, 8192, (1, 14, 28)),
        (6144, 4096, (1, 8, 24)),
        (28672, 4096, (2, 2, 28)),
        (27648, 5120, (2, 2, 28)),
        (57344, 8192, None),
        (16, 256, (4, 2, 24)),
        (16, 128, None),
    ],
)
def test_fast_memory_gets_as_many_warps_along_k_as_fit(n: int, k: int, warps: tuple[int, int, int] | None) -> None:
    problem = Problem(8, n, k, 4, 128, torch.float16, "cuda", (9, 0), 132)
    assert crowded_cut(problem) == (warps and GemvCut(1, *warps[:2], 1, warps[2]))
    assert crowded_cut(replace(problem, m=16)) == crowded_cut(problem, CROWD)
    assert crowded_cut(replace(problem, m=17)) is crowded_cut(replace(problem, m=9, group_size=64)) is None


@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (27648, 5120), (57344, 8192)])
def test_wide_weights_and_more_than_8_rows_in_panels_have_two_tiles_a_warp(n: int, k: int) -> None:
    problem = Problem(16, n, k, 4, 128, torch.float16, "cuda", (9, 0), 132, panels=True)
    assert crowded_cut(problem) == PANEL_WAVES
    for change in ({"panels": False}, {"k": 128}, {"bits": 8}, {"group_size": 64}, {"m": 17}):
        assert crowded_cut(replace(problem, **change)) is None, change


def test_more_waves_are_for_floats_and_more_bits_than_four() -> None:
    problem = Problem(8, 28672, 8192, 4, 128, torch.float16, "cuda", (9, 0), 132)
    assert crowded_cut(replace(problem, bits=3)) is None
    assert crowded_cut(replace(problem, bits=8)) == crowded_cut(replace(problem, is_float=True)) == WAVES
    assert crowded_cut(replace(problem, bits=8, k=256)) is None
    assert not beats_gemv(replace(problem, bits=8, group_size=-1, fast_memory=True))


@pytest.mark.parametrize(
    ("kilohertz", "bits", "fast"),
    [(3_201_000, 6144, True), (2_619_000, 5120, False), (1_593_000, 5120, False), (None, None, False)],
)
def test_memory_is_fast_beside_the_multiprocessors(kilohertz: int, bits: int, fast: bool, monkeypatch) -> None:
    """An H200, an H100, an A100, and a torch that does not say."""
    known = {} if kilohertz is None else {"memory_clock_rate": kilohertz, "memory_bus_width": bits}
    properties = SimpleNamespace(multi_processor_count=132, **known)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert has_fast_memory.__wrapped__(torch.device("cuda", 0)) == fast


@pytest.mark.gpu
def test_the_memory_of_an_h200_is_fast_and_an_h100s_is_not() -> None:
    name = torch.cuda.get_device_name()
    if name not in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        pytest.skip(f"nothing is known of {name}")
    assert has_fast_memory.__wrapped__(torch.device("cuda", 0)) == (name == "NVIDIA H200")


def exact(call: PackedCall) -> Tensor:
    """`call` in float64 from the packed weight, and torch's half-precision result for the tolerance."""
    dense = reference.dequantize_packed(call.weight)
    return call.x.double() @ dense.double().T


def check_product(m: int, weight: PackedWeight, launch: GemvCut | None = None, outliers: bool = False) -> None:
    x = make_x(m, weight.k, weight.dtype, "cuda", outliers)
    call = PackedCall(x, weight)
    y = run(call, call.problem(), launch)
    half = x @ reference.dequantize_packed(weight).to(weight.dtype).T
    assert_close_as_half(y, exact(call), half)


@pytest.mark.gpu
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_scheme(m: int, dtype: torch.dtype, bits: int) -> None:
    for group_size in (32, 64, 128, 256, -1):
        for symmetric in (True, False):
            weight = make_packed(96, 1280, bits, group_size, symmetric, dtype, "cuda")
            check_product(m, weight)
            check_product(m, weight, outliers=True)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize(
    ("n", "k"), [(16, 32), (1, 128), (40, 96), (1000, 4128), (4096, 4096), (4096, 14336), (5120, 13824)]
)
def test_shapes(m: int, n: int, k: int) -> None:
    check_product(m, make_packed(n, k, 4, 32, True, torch.float16, "cuda"))
    check_product(m, make_packed(n, k, 8, -1, True, torch.bfloat16, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
def test_every_cut_of_the_work(m: int) -> None:
    weight = make_packed(200, 1664, 4, 128, True, torch.float16, "cuda")
    for row_tiles in (1, 2):
        for row_warps, k_warps in ((1, 1), (1, 8), (4, 2), (8, 1)):
            for cluster in (1, 2, 3, 8):
                check_product(m, weight, GemvCut(row_tiles, row_warps, k_warps, cluster))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "bits", "room"),
    [
        *((m, 4, CROWDS[1]) for m in (1, 5, 8)),
        *((m, bits, CROWDS[0]) for m in (1, 5, 8) for bits in range(2, 9)),
        *((m, 4, CROWDS[0]) for m in (9, 16)),
    ],
)
def test_every_crowded_cut(m: int, bits: int, room: int) -> None:
    for group_size, symmetric in ((32, False), (64, True), (128, True), (-1, False)):
        if m > 8 and group_size in (32, 64):
            continue  # there is no code for these
        for dtype in DTYPES:
            weight = make_packed(200, 1664, bits, group_size, symmetric, dtype, "cuda")
            for row_warps, k_warps, cluster in ((1, 1, 1), (1, 12, 1), (4, 3, 1), (12, 1, 1), (2, 4, 2), (1, 12, 3)):
                check_product(m, weight, GemvCut(1, row_warps, k_warps, cluster, room))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("room", [ROOM, CROWD])
def test_every_cut_of_two_tiles_for_one_row(bits: int, room: int) -> None:
    """Inputs of one sign as well: the constants that codes are multiplied with then are most of the sums."""
    for group_size, symmetric in product((32, 64, 128, -1), (False, True)):
        for dtype in DTYPES:
            weight = make_packed(200, 1664, bits, group_size, symmetric, dtype, "cuda")
            for row_warps, k_warps, cluster in ((1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 3, 2), (1, 8, 3)):
                for outliers in (False, True):
                    check_product(1, weight, GemvCut(2, row_warps, k_warps, cluster, room), outliers)
            call = PackedCall(make_x(1, weight.k, dtype, "cuda").abs(), weight)
            y = run(call, call.problem(), GemvCut(2, 2, 4, 1, room))
            assert_close_as_half(y, exact(call), call.x @ reference.dequantize_packed(weight).to(dtype).T)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [384, 12288])
def test_one_row_of_one_sign_by_three_bits_with_a_large_column(n: int) -> None:
    """Two tiles a warp would lose up to twice the gate here: section 79 of the log."""
    weight = make_packed(n, 11008, 3, device="cuda")
    call = PackedCall(make_x(1, weight.k, torch.float16, "cuda").abs(), weight)
    y = run(call, call.problem())
    assert_close_as_half(y, exact(call), call.x @ reference.dequantize_packed(weight).half().T)


def test_one_row_with_few_bits_gets_two_tiles_a_warp_where_warps_remain_enough() -> None:
    problem = Problem(1, 12288, 4096, 2, 128, torch.float16, "cuda", (9, 0), 132)
    assert paired_cut(problem) == crowded_cut(problem) == GemvCut(2, 1, 8, 1, CROWD)
    assert paired_cut(replace(problem, n=22016, bits=3, dtype=torch.bfloat16)) == GemvCut(2, 2, 4, 1, CROWD)
    assert paired_cut(replace(problem, n=28672, k=8192)) == PAIRED_WAVES
    for change in ({"m": 2}, {"bits": 4}, {"bits": 3}, {"panels": True}, {"n": 4096}, {"k": 512}):
        assert paired_cut(replace(problem, **change)) is None


def test_one_row_with_floats_of_four_bits_gets_two_tiles_a_warp_as_well() -> None:
    problem = Problem(1, 12288, 4096, 4, 32, torch.float16, "cuda", (9, 0), 132, is_float=True)
    assert paired_cut(problem) == crowded_cut(problem) == GemvCut(2, 1, 8, 1, CROWD)
    assert paired_cut(replace(problem, n=22016, group_size=16)) == GemvCut(2, 2, 4, 1, CROWD)
    assert paired_cut(replace(problem, n=28672, k=8192)) == GemvCut(2, 1, 4, 1, CROWDS[-1])
    assert paired_cut(replace(problem, n=57344, k=8192)) == PAIRED_WAVES
    for change in ({"m": 2}, {"bits": 8}, {"panels": True}, {"n": 4096}, {"n": 5120, "k": 13824}):
        assert paired_cut(replace(problem, **change)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, -1)])
def test_a_long_share_is_asked_for_ahead_and_changes_nothing(m: int, bits: int, group_size: int) -> None:
    weight = make_packed(48, 8320, bits, group_size, device="cuda")
    call = PackedCall(make_x(m, 8320, torch.float16, "cuda"), weight)
    plain, ahead = (run(replace(call, dependent=d), call.problem(), GemvCut(1, 1, 1, 1)) for d in (False, True))
    assert torch.equal(plain, ahead)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16, 64, 80])
@pytest.mark.parametrize("dependent", [False, True])
def test_the_next_weight_changes_no_bit(m: int, dependent: bool) -> None:
    weight, x = make_packed(512, 4096, device="cuda"), make_x(m, 4096, torch.float16, "cuda")
    expected = ops.linear(PackedCall(x, weight))
    for size in (0, 5, 4000, NEXT_BYTES - 3, NEXT_BYTES + 40, FAST_NEXT_BYTES + 40):
        following = torch.zeros(size, dtype=torch.int8, device="cuda")
        y = ops.linear(PackedCall(x, weight, dependent=dependent, next_weight=following))
        torch.cuda.synchronize()  # the request, too, has been made and refused nothing
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 16, 40, 255])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues_and_norms(m: int, dtype: torch.dtype) -> None:
    n, k = 96, 512
    weight = make_packed(n, k, dtype=dtype, device="cuda")
    weight = replace(weight, scales=weight.scales / 8)
    x, bias, residual = make_x(m, k, dtype, "cuda"), make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
    gamma, beta = make_x(1, k, dtype, "cuda")[0], make_x(1, k, dtype, "cuda")[0]
    for norm in (("none", None, None, 0.0), ("rms", gamma, None, 1e-5), ("layer", gamma, beta, 1e-5)):
        for activation in ("none", "gelu", "gelu_tanh", "quick_gelu"):
            call = PackedCall(x, weight, bias, residual, *norm, activation)
            assert_devices_agree(ops.linear(call), ops.linear(on_cpu(call)))
        gated = make_packed(n, k, dtype=dtype, device="cuda", pair_block=n)
        call = PackedCall(x, gated, bias, None, *norm, "silu_mul")
        assert_devices_agree(ops.linear(call), ops.linear(on_cpu(call)))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qkv_rotary_append(m: int, dtype: torch.dtype) -> None:
    weight = make_packed(6 * 64, 512, dtype=dtype, device="cuda", pair_block=64)
    call = PackedCall(make_x(m, 512, dtype, "cuda"), weight, rotary=make_rotary(m, 2, 64, dtype, "cuda"))
    assert_heads_agree(call)


@pytest.mark.gpu
def test_logits() -> None:
    weight, x = make_packed(1000, 512, 8, -1, device="cuda"), make_x(4, 512, torch.float16, "cuda")
    call = PackedCall(x, weight, float32_out=True)
    assert torch.allclose(ops.linear(call).cpu(), ops.linear(on_cpu(call)), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 12, 64])
def test_the_same_bits_every_time(m: int) -> None:
    weight = make_packed(512, 8192, device="cuda")
    x = make_x(m, 8192, torch.float16, "cuda")
    first = ops.linear(PackedCall(x, weight))
    assert all(torch.equal(first, ops.linear(PackedCall(x, weight))) for _ in range(20))


def chain(x: Tensor, weights: list[PackedWeight], buffers: list[Tensor], dependent: bool) -> Tensor:
    """Products that feed each other through two buffers that are reused: stale reads would show."""
    buffers[0].copy_(x)
    for i, weight in enumerate(weights):
        y = ops.linear(PackedCall(buffers[i % 2], weight, norm="none", dependent=dependent))
        y = ops.linear(PackedCall(y, weight, residual=buffers[i % 2], dependent=dependent))
        buffers[(i + 1) % 2].copy_(y)
    return buffers[len(weights) % 2].clone()


def direct_chain(x: Tensor, weights: list[PackedWeight], dependent: bool) -> Tensor:
    """Products with nothing between them, so that each launch depends on the kernel before it."""
    for weight in weights:
        x = ops.linear(PackedCall(x, weight, residual=x, dependent=dependent))
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16, 64])
@pytest.mark.parametrize("k", [1024, 4096])
def test_dependent_launch_changes_nothing_in_a_captured_graph(m: int, k: int) -> None:
    weights = [make_packed(k, k, device="cuda") for _ in range(6)]
    weights = [replace(weight, scales=weight.scales / 64) for weight in weights]
    x = make_x(m, k, torch.float16, "cuda")
    buffers = [torch.empty_like(x) for _ in range(2)]
    assert_dependence_changes_nothing(lambda dependent: chain(x, weights, buffers, dependent))
    assert_dependence_changes_nothing(lambda dependent: direct_chain(x, weights, dependent))


@pytest.mark.gpu
def test_another_stream_waits_for_nobody_else() -> None:
    weight = make_packed(256, 512, device="cuda")
    x = make_x(3, 512, torch.float16, "cuda")
    assert_streams_agree(lambda: ops.linear(PackedCall(x, weight)))


@pytest.mark.gpu
def test_compiled_on_the_gpu() -> None:
    weight, x = make_packed(64, 256, device="cuda"), make_x(2, 256, torch.float16, "cuda")
    compiled = torch.compile(lambda x: ops.linear(PackedCall(x, weight)).relu(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.linear(PackedCall(x, weight)).relu())
    opcheck(ops.plain_linear, PackedCall(x, weight))


@pytest.mark.parametrize("name", ["words", "scales", "zeros"])
def test_a_weight_that_is_not_aligned_is_named(name: str) -> None:
    weight = make_packed(32, 128, symmetric=False)
    tensor = getattr(weight, name)
    shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    call = PackedCall(make_x(1, 128, torch.float16), replace(weight, **{name: shifted}))
    with pytest.raises(ValueError, match=f"{name} starts at .*16 bytes at a time"):
        prepare(call, most_staged=0)


@pytest.mark.gpu
def test_misaligned_and_misplaced_tensors_are_named() -> None:
    weight = make_packed(64, 256, device="cuda")
    x = make_x(3, 256, torch.float16, "cuda")
    shifted = torch.empty(3 * 256 + 1, dtype=torch.float16, device="cuda")[1:].view(3, 256)
    with pytest.raises(ValueError, match="16 bytes at a time"):
        ops.linear(PackedCall(shifted, weight))
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        ops.linear(PackedCall(x, make_packed(64, 256)))
