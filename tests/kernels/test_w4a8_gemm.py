"""Rows in int8 by weights of 4 bits: the order of x, the rule that cuts the product, and CPU reference against CUDA."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowbit.quant.kernels import extension, ops, packed, reference
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall, Problem
from lowbit.quant.kernels.registry import choose_kernel
from lowbit.quant.kernels.ring import RingCut
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.w4a8_gemm import MOST_ROWS, WARPGROUPS, choose_cut, run, shared_bytes, takes
from tests.kernels.make import (
    assert_dependence_changes_nothing,
    assert_devices_agree,
    assert_heads_agree,
    make_float,
    make_packed,
    make_x,
    on_cpu,
    opcheck,
)
from tests.kernels.test_ops import make_rotary

ROWS = [1, 2, 8, 9, 16, 17, 33, 64, 65, 130, 300]
DTYPES = [torch.float16, torch.bfloat16]
GROUPS = (32, 64, 128, 256, -1)
BLOCK_BYTES = 227 << 10  # of shared memory, at most
ON_H200 = Problem(32, 12288, 4096, 4, 128, torch.float16, "cuda", (9, 0), 132, fast_memory=True, code_inputs=True)
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200"
)


def code_call(m: int, weight: PackedWeight, outliers: bool = False, **tail) -> PackedCall:
    """The product of random rows, rounded to int8 by a kernel of its own, which the product waits for."""
    x = make_x(m, weight.k, weight.dtype, str(weight.words.device), outliers)
    codes, scales = ops.quantize_rows(Rows(x, rounding="int8", shuffled=True))
    return PackedCall(codes, weight, x_scales=scales, **({"dependent": True} | tail))


def test_the_order_of_inputs_is_that_of_the_words() -> None:
    codes = torch.randint(-128, 128, (3, 96), dtype=torch.int8)
    turned = packed.shuffled(codes)
    assert torch.equal(packed.unshuffled(turned), codes)
    plain = torch.arange(32, dtype=torch.int8)[None]
    assert packed.shuffled(plain)[0, :8].tolist() == [0, 4, 1, 5, 8, 12, 9, 13]
    assert packed.shuffled(plain)[0, 16:20].tolist() == [2, 6, 3, 7]


def test_the_words_that_it_expands_hold_their_codes_in_that_order() -> None:
    """csrc/w4a8_gemm.cu's expansion of a lane's word, in integers."""
    codes = torch.randint(-8, 8, (16, 128), dtype=torch.int8)
    words = packed.pack_codes(packed.bits_of(codes, packed.integer_of(4, True)), packed.integer_of(4, True), 16)
    for lane in range(32):
        word = int(words[0, 0, lane * 4]) & 0xFFFFFFFF  # row lane / 4, the first block of 32 inputs
        parts = [(word << 4 & 0xF0F0F0F0) ^ 0x80808080, (word & 0xF0F0F0F0) ^ 0x80808080]
        found = [
            torch.tensor(part >> 8 * i & 0xFF, dtype=torch.uint8).view(torch.int8) for part in parts for i in range(4)
        ]
        eight = codes[lane // 4, lane % 4 * 8 :][:8]
        wanted = [16 * int(eight[i]) for half in packed.SHUFFLED for i in half]
        assert [int(each) for each in found] == wanted


def test_only_symmetric_integers_of_4_bits_are_taken() -> None:
    assert takes(make_packed(64, 128))
    for weight in (
        make_packed(64, 128, symmetric=False),
        make_packed(64, 128, bits=3),
        make_packed(64, 128, bits=8),
        make_float("mxfp4-a16", 64, 128),
    ):
        assert not takes(weight)
        with pytest.raises(ValueError, match="codes of x are multiplied with"):
            replace(code_call(2, make_packed(64, 128)), weight=weight).check()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x_scales": torch.ones(3)}, "x_scales is"),
        ({"x": torch.ones(2, 128, dtype=torch.float16)}, "not rows of torch.int8"),
        ({"bias": torch.ones(64)}, "bias is torch.float32"),
        ({"norm": "rms", "norm_weight": torch.ones(128).half()}, "no norm to come"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ops.linear(replace(code_call(2, make_packed(64, 128)), **change))


@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 128, 1000])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1000, 96), (4096, 4096), (4096, 14336), (5120, 13824), (57344, 8192)])
def test_launches_are_possible(m: int, group_size: int, n: int, k: int) -> None:
    for processors in (78, 132):
        problem = replace(ON_H200, m=m, n=n, k=k, group_size=group_size, processors=processors)
        cut = choose_cut(problem)
        assert cut.warpgroups in WARPGROUPS
        assert cut.cluster <= -(-k // 128)
        assert shared_bytes(cut, problem) <= BLOCK_BYTES


@pytest.mark.parametrize(
    ("m", "architectures", "name"),
    [(1, "90a", "w4a8_gemm"), (64, "90a", "w4a8_gemm"), (MOST_ROWS + 1, "90a", "in halves"), (64, "80", "in halves")],
)
def test_the_number_of_rows_decides(m: int, architectures: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "EXTENSION", SimpleNamespace(architectures=architectures))
    assert choose_kernel(replace(ON_H200, m=m)).name == name
    assert choose_kernel(replace(ON_H200, m=m, capability=None)).name == "reference"


def test_x_in_halves_gives_what_codes_give() -> None:
    call = code_call(5, make_packed(64, 256))
    torch.testing.assert_close(ops.linear(reference.in_halves(call)), ops.linear(call), atol=2e-2, rtol=2e-3)
    opcheck(ops.plain_linear, call)


def check_product(call: PackedCall, cut: RingCut | None = None) -> None:
    """y is the exact product, rounded, but for the order of float32 sums."""
    y = run(call, call.problem(), cut)
    x = packed.unshuffled(call.x).double() * call.x_scales.double().unsqueeze(1)
    exact = x @ packed.dequantize_packed(call.weight).double().T
    size = x.abs() @ packed.dequantize_packed(call.weight).double().abs().T
    assert ((y.double() - exact).abs() <= torch.finfo(y.dtype).eps * exact.abs() + 2.0**-20 * size).all()


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_group_size(m: int, dtype: torch.dtype) -> None:
    for group_size in GROUPS:
        weight = make_packed(168, 1280, group_size=group_size, dtype=dtype, device="cuda")
        for outliers in (False, True):
            check_product(code_call(m, weight, outliers))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [1, 16, 48, 64, 130])
def test_every_cut_of_the_work(m: int) -> None:
    for k in (128, 1664):
        for group_size in (32, 64, 128):
            call = code_call(m, make_packed(456, k, group_size=group_size, device="cuda"))
            for warpgroups in WARPGROUPS:
                for cluster in (1, 2, 3, 8):
                    for stages in (1, 2, 5):
                        check_product(call, RingCut(warpgroups, cluster, stages))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [3, 64, 300])
@pytest.mark.parametrize(("n", "k"), [(16, 32), (1, 128), (40, 96), (1000, 4128), (4096, 14336), (28672, 4096)])
def test_shapes(m: int, n: int, k: int) -> None:
    check_product(code_call(m, make_packed(n, k, group_size=32, device="cuda")))
    check_product(code_call(m, make_packed(n, k, group_size=-1, dtype=torch.bfloat16, device="cuda")))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [5, 64, 130, MOST_ROWS + 3])
@pytest.mark.parametrize("n", [96, 100])  # 100: rows of y that do not start at multiples of 16 bytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(m: int, n: int, dtype: torch.dtype) -> None:
    weight = make_packed(n, 512, dtype=dtype, device="cuda")
    bias, residual = make_x(1, n, dtype, "cuda")[0], make_x(m, n, dtype, "cuda")
    for activation in ("none", "gelu", "gelu_tanh", "quick_gelu"):
        for float32_out in (False, True):
            tail = {"activation": activation, "float32_out": float32_out}
            call = code_call(m, weight, bias=bias, residual=residual, **tail)
            assert_devices_agree(ops.linear(call).to(dtype), ops.linear(on_cpu(call)).to(dtype))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [7, 33, 72])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_and_rotated(m: int, dtype: torch.dtype) -> None:
    gated = make_packed(320, 512, dtype=dtype, device="cuda", pair_block=320)
    call = code_call(m, gated, activation="silu_mul")
    assert_devices_agree(ops.linear(call), ops.linear(on_cpu(call)))
    weight = make_packed(6 * 64, 512, dtype=dtype, device="cuda", pair_block=64)
    call = code_call(m, weight, rotary=make_rotary(m, 2, 64, dtype, "cuda"))
    assert_heads_agree(call)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("m", [1, 48, 300])
def test_the_same_bits_every_time_and_in_a_captured_graph(m: int) -> None:
    weight = make_packed(512, 8192, device="cuda")
    call = code_call(m, weight)
    assert_dependence_changes_nothing(lambda dependent: ops.linear(replace(call, dependent=dependent)))
    for cut in (RingCut(1, 3, 4), RingCut(2, 8, 2)):
        first = run(call, call.problem(), cut)
        assert all(torch.equal(first, run(call, call.problem(), cut)) for _ in range(20))
