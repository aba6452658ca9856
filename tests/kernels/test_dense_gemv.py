"""The dense product: which kernel takes it, one operator on two devices, and what graphs and streams do to it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import dense_gemv, extension, ops, ring
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.problem import NextNorm, Problem
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.ring import RingCut
from tests.kernels.make import (
    assert_close_as_half,
    assert_dependence_changes_nothing,
    assert_devices_agree,
    assert_streams_agree,
    make_x,
    on_cpu,
    opcheck,
)
from tests.kernels.test_ops import make_rotary

ROWS = [1, 2, 7, 8, 9, 16, 17, 33, 64]
DTYPES = [torch.float16, torch.bfloat16]
BLOCK_BYTES = 227 << 10  # of shared memory, at most
CUTS = [RingCut(w, c, stages) for w in dense_gemv.WARPGROUPS for c in (1, 2, 3, 8) for stages in (2, 5)]
ON_H100 = Problem(1, 4096, 4096, 16, -1, torch.bfloat16, "cuda", (9, 0), 132)


def shared_bytes(launch: RingCut, m: int) -> int:
    """A block's shared memory in csrc/ring.cuh: ring, barriers, scales of x, and room to align; the sums fit in the
    ring."""
    rows, columns = 64 * launch.warpgroups, next(c for c in (8, 16, 32, 64) if c >= m)
    stage = (rows + columns) * 128
    stages = max(launch.stages, -(-(rows + 4) * columns * 4 // stage), 2)
    return stages * (stage + 16) + columns * 4 + 1024


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("processors", [78, 114, 132])
@pytest.mark.parametrize(("n", "k"), [(1, 8), (1000, 96), (4096, 4096), (5120, 13824), (50257, 768), (151936, 4096)])
def test_launches_are_possible(m: int, n: int, k: int, processors: int) -> None:
    chosen = dense_gemv.choose_cut(replace(ON_H100, m=m, n=n, k=k, processors=processors))
    for launch in (chosen, *ring.cuts_of(m, n, 2 * k, processors)):
        assert launch.warpgroups in dense_gemv.WARPGROUPS
        assert launch.cluster <= -(-2 * k // ring.CHUNK_BYTES)
        assert launch.stages >= 1
        assert shared_bytes(launch, m) <= BLOCK_BYTES


@pytest.mark.parametrize(
    ("n", "row_bytes", "cut"),
    [
        (12288, 8192, RingCut(1, 2, 8)),
        (4096, 22016, RingCut(1, 2, 24)),
        (5120, 27648, RingCut(1, 4, 8)),  # 80 blocks of whole rings would leave two of five multiprocessors idle
        (5120, 10240, RingCut(1, 4, 8)),
        (15360, 10240, RingCut(1, 1, 8)),
        (12288, 4096, RingCut(1, 1, 12)),
        (22016, 4096, RingCut(1, 1, 8)),
        (4096, 4096, RingCut(1, 4, 8)),
        (64, 25600, RingCut(1, 8, 24)),
    ],
)
def test_fast_memory_is_read_by_most_multiprocessors(n: int, row_bytes: int, cut: RingCut) -> None:
    assert ring.choose_cut(1, n, row_bytes, 132, 132, True) == cut


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"m": 65}, "65 rows: it takes at most 64"),
        ({"k": 4100}, "4100 inputs: it takes multiples of 8"),
        ({"dtype": torch.float32}, "it is for float16 and bfloat16, not torch.float32"),
        ({"capability": (8, 0)}, "it is for sm_90, the GPU is sm_80"),
        ({"device": "cpu", "capability": None}, "the tensors are on the cpu"),
    ],
)
def test_what_it_does_not_take_is_torchs(change: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "EXTENSION", SimpleNamespace(architectures="80 90a"))
    assert choose_kernel(ON_H100).name == "dense_gemv"
    assert dense_gemv.reason_against(replace(ON_H100, **change)) == reason
    assert choose_kernel(replace(ON_H100, **change)).name == "torch"


def test_memory_that_the_copy_engine_cannot_read_is_named() -> None:
    whole = torch.zeros(20, 80).half()
    x, w = whole[:4, :64], whole[4:, :64]
    assert dense_gemv.reason_against_memory(DenseCall(x, w)) is None
    assert dense_gemv.reason_against_memory(DenseCall(x[:1].T.contiguous().T, w)) is None  # one row has no pitch
    for call, reason in (
        (DenseCall(whole[:4, 1:65], w), "x at .* multiples of 16 bytes"),
        (DenseCall(x, torch.zeros(64, 16).half().T), "weight at .* with strides"),
        (DenseCall(x[:1].expand(4, -1), w), "x at .* with strides"),
        (DenseCall(x, w, torch.zeros(32).half()[::2]), "bias has strides"),
        (DenseCall(x, w[:12], activation="silu_mul"), "12 rows of gate and up"),
    ):
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(dense_gemv.reason_against_memory(call))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "quick_gelu", "silu_mul"])
def test_on_a_cpu_it_is_torchs_product(dtype: torch.dtype, activation: str) -> None:
    x, w, bias = make_x(3, 40, dtype), make_x(14, 40, dtype), make_x(1, 14, dtype)[0]
    y = torch.nn.functional.linear(x, w, bias)
    active = {
        "none": lambda: y,
        "gelu": lambda: torch.nn.functional.gelu(y),
        "gelu_tanh": lambda: torch.nn.functional.gelu(y, approximate="tanh"),
        "quick_gelu": lambda: y * torch.sigmoid(1.702 * y),
        "silu_mul": lambda: torch.nn.functional.silu(y[:, :7]) * y[:, 7:],
    }[activation]()
    assert torch.equal(ops.linear(DenseCall(x, w, bias, activation=activation)), active)
    if activation != "silu_mul":
        residual = make_x(3, 14, dtype)
        assert torch.equal(ops.linear(DenseCall(x, w, bias, residual, activation=activation)), active + residual)
        floats = ops.linear(DenseCall(x, w, bias, activation=activation, float32_out=True))
        assert floats.dtype == torch.float32
        assert torch.equal(floats, active.float())
    assert ops.linear(DenseCall(x[:0], w, activation=activation)).shape == (0, active.shape[1])


def test_what_does_not_fit_is_named() -> None:
    x, w = make_x(3, 40, torch.float16), make_x(14, 40, torch.float16)
    for args, options, reason in (
        ((x[:, :39], w), {}, r"x of shape \(3, 39\) with a weight \(14, 40\): x must have the shape \(m, 40\)"),
        ((x, w.float()), {}, "weight is .* torch.float32, not .* torch.float16"),
        ((x, w, x[0]), {}, r"bias is \(40,\)"),
        ((x, w, None, x), {}, r"residual is \(3, 40\)"),
        ((x, w), {"activation": "relu"}, "activation 'relu' is none of"),
        ((x, w[:13]), {"activation": "silu_mul"}, "an even number of outputs, not 13"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.linear(DenseCall(*args, **options))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("m", [3, 80])
def test_opcheck(device: str, m: int) -> None:
    x, w, bias = (make_x(*shape, torch.float16, device) for shape in ((m, 64), (32, 64), (1, 32)))
    for args in (
        (x, w, None, None, "none", False, False),
        (x, w, bias[0], make_x(m, 32, torch.float16, device), "gelu", True, True),
        (x, w, bias[0], None, "silu_mul", False, False),
    ):
        opcheck(ops.plain_dense_linear, DenseCall(*args))
    norm = NextNorm.empty(x[:, :64], w.new_ones(64))
    opcheck(ops.deferring_dense_linear, DenseCall(x, make_x(64, 64, torch.float16, device), next_norm=norm))
    opcheck(
        ops.turning_dense_linear,
        DenseCall(x, make_x(96, 64, torch.float16, device), rotary=make_rotary(m, 1, 32, torch.float16, device)),
    )


def check_product(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, launch: RingCut | None = None) -> None:
    """The product alone, with outliers, against float64 and torch's own."""
    call = DenseCall(make_x(m, k, dtype, "cuda", outliers=True), make_x(n, k, dtype, "cuda") * 0.05)
    assert dense_gemv.reason_against_memory(call) is None
    y = dense_gemv.run(call, call.problem(), launch)
    assert_close_as_half(y, call.x.double() @ call.weight.double().T, call.x @ call.weight.T)


@pytest.mark.gpu
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(m: int, dtype: torch.dtype) -> None:
    for n, k in ((1, 8), (16, 32), (72, 264), (1000, 4104), (4096, 4096)):
        check_product(m, n, k, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(4096, 11008), (5120, 13824), (32000, 4096), (50257, 768), (65024, 4096)])
def test_shapes_of_models(n: int, k: int) -> None:
    check_product(1, n, k)
    check_product(11, n, k)
    check_product(64, n, k)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 48])
def test_every_cut_of_the_work(m: int) -> None:
    for launch in CUTS:
        check_product(m, 328, 1680, launch=launch)
    for launch in ring.cuts_of(m, 3000, 2 * 1680, 132):
        check_product(m, 3000, 1680, launch=launch)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 16, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_operator_on_two_devices(m: int, dtype: torch.dtype) -> None:
    """Held against float32 on the CPU, so that y is one rounding from it."""
    k = 512
    for n in (96, 99):
        x, w = make_x(m, k, dtype, "cuda"), make_x(n, k, dtype, "cuda") * 0.05
        bias, residual = make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
        tails = [(bias, None, "silu_mul", False)] if n % 2 == 0 else []
        for activation in ("none", "gelu", "gelu_tanh", "quick_gelu"):
            tails += [(None, residual, activation, False), (bias, residual, activation, False)]
            tails += [(bias, None, activation, True)]
        for tail in tails:
            args = [on_cpu(value) for value in (x, w, *tail)]
            floats = [value.float() if isinstance(value, Tensor) else value for value in args]
            expected, y = ops.linear(DenseCall(*floats)), ops.linear(DenseCall(x, w, *tail))
            if tail[-1]:
                assert y.dtype == torch.float32
                assert (y.cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()  # no rounding to halves
            else:
                assert_devices_agree(y, expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9])
def test_rows_may_lie_apart(m: int) -> None:
    x, w = make_x(m, 1000, torch.float16, "cuda"), make_x(70, 1000, torch.float16, "cuda")
    inner = slice(8, 520)
    y = ops.linear(DenseCall(x[:, inner], w[:, inner]))
    assert torch.equal(y, ops.linear(DenseCall(x[:, inner].contiguous(), w[:, inner].contiguous())))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 12, 64])
def test_the_same_bits_every_time(m: int) -> None:
    x, w = make_x(m, 8192, torch.float16, "cuda"), make_x(512, 8192, torch.float16, "cuda")
    first = ops.linear(DenseCall(x, w))
    assert all(torch.equal(first, ops.linear(DenseCall(x, w))) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(512, 8192), (4096, 4096), (32000, 512)])
def test_a_row_is_the_same_in_company(n: int, k: int) -> None:
    x, w = make_x(8, k, torch.float16, "cuda"), make_x(n, k, torch.float16, "cuda")
    alone = torch.cat([ops.linear(DenseCall(x[i : i + 1], w, float32_out=True)) for i in range(8)])
    for m in (2, 3, 8):
        assert torch.equal(ops.linear(DenseCall(x[:m], w, float32_out=True)), alone[:m])


def chain(x: Tensor, weights: list[Tensor], dependent: bool) -> Tensor:
    """Products with nothing between them, so that each launch depends on the kernel before it."""
    for weight in weights:
        x = ops.linear(DenseCall(x, weight, residual=x, dependent=dependent))
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("k", [1024, 4096])
def test_dependent_launch_changes_nothing_in_a_captured_graph(m: int, k: int) -> None:
    weights = [make_x(k, k, torch.bfloat16, "cuda") / k**0.5 for _ in range(6)]
    x = make_x(m, k, torch.bfloat16, "cuda")
    assert_dependence_changes_nothing(lambda dependent: chain(x, weights, dependent))


@pytest.mark.gpu
def test_another_stream_waits_for_nobody_else() -> None:
    x, w = make_x(3, 512, torch.float16, "cuda"), make_x(256, 512, torch.float16, "cuda")
    assert_streams_agree(lambda: ops.linear(DenseCall(x, w)))


@pytest.mark.gpu
def test_misaligned_rows_are_torchs() -> None:
    x, w = make_x(3, 65, torch.float16, "cuda")[:, 1:], make_x(32, 64, torch.float16, "cuda")
    assert torch.equal(ops.linear(DenseCall(x, w)), torch.nn.functional.linear(x, w))
