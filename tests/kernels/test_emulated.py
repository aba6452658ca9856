"""The kernels' own sources, run on the CPU lane by lane, against the references: docs/KERNELS.md says what that proves.

Every check runs on many seeded cases in a process of its own. The last tests plant mistakes, which must be found.
"""

import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import (
    choose_tokens,
    decode_attention,
    dense,
    dense_gemv,
    extension,
    gptq_block,
    packed,
    reference,
    ring,
    row_norm,
    w8a8,
    w8a8_gemm,
    wna16_args,
    wna16_dequantize,
    wna16_gemm,
    wna16_gemv,
    wna16_prefill,
)
from lowbit.quant.kernels.choose_tokens import ChoiceCall, Cursor, Noise
from lowbit.quant.kernels.decode_attention import AppendCall, AttentionCall
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.kv_cache import NIBBLES, SAME, KVCache
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import (
    ACTIVATIONS,
    NORMS,
    PART,
    Deferred,
    NextNorm,
    PackedCall,
    Problem,
    Rotary,
)
from lowbit.quant.kernels.row_norm import GROUP, Rows
from lowbit.quant.kernels.w8a8 import W8a8Call, W8a8Weight
from lowbit.quant.numbers import FP8, INT8, UINT4, Number
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import make_scheme
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found

HALVES = (torch.float16, torch.bfloat16)
GROUPS = (32, 64, 128, 256, -1)
PRODUCTS = {module.__name__.rpartition(".")[2]: module for module in (wna16_gemv, wna16_gemm, wna16_prefill)}
ROWS = {wna16_gemm: ((1, 64),), wna16_gemv: ((1, 16),), wna16_prefill: ((1, 280),)}  # of x on Hopper


@pytest.fixture(scope="session")
def library() -> Path:
    """The emulated lowbit.quant._C; skips where it cannot be built."""
    return built()


def random_weight(pick: random.Random, n: int, k: int, bits: int, dtype: torch.dtype, pair_block: int) -> PackedWeight:
    """Codes, zeros and scales over their whole range; of 4 bits the scales have signs."""
    scheme = make_scheme(bits, pick.choice([size for size in GROUPS if k % size == 0]), pick.random() < 0.5)
    number, groups = scheme.number, scheme.groups(k)
    low, above = int(number.low), int(number.high) + 1
    codes = torch.randint(low, above, (n, k)).to(number.storage)
    scales = torch.rand(n, groups) * 0.02 + 0.001
    if bits == 4:
        scales *= torch.randint(0, 2, (n, groups)) * 2 - 1
    zeros = None if scheme.symmetric else torch.randint(low, above, (n, groups), dtype=torch.int32)
    return packed.prepack(QTensor(codes, scales.to(dtype), zeros, scheme), dtype, pair_block)


def random_rotary(pick: random.Random, m: int, dtype: torch.dtype, half: int = 0) -> Rotary:
    angles = torch.rand(50, half or pick.choice([8, 16, 32])) * 6
    caches = [torch.zeros(m + 16, pick.choice([1, 2]), 2 * angles.shape[1], dtype=dtype)] * 2
    return Rotary(torch.randint(0, 50, (m,)), torch.randperm(m + 16)[:m], angles.cos(), angles.sin(), *caches)


def random_call(pick: random.Random, kernel: ModuleType) -> PackedCall:
    """A product with some prologue and some epilogue: odd n, tails of k, every kind of group."""
    dtype, bits = pick.choice(HALVES), pick.choice([4, 8])
    m, k = pick.randint(*pick.choice(ROWS[kernel])), pick.choice([32, 96, 128, 160, 256, 512, 640, 1024])
    n, pair_block, tail = pick.choice([1, 5, 16, 33, 40, 64, 72, 136, 192, 200]), 16, {}
    half = pick.choice([None, lambda *shape: torch.randn(shape).to(dtype)])
    mode = pick.choice(["plain", "plain", "gated", "rotary"])
    if mode == "gated":
        n = pair_block = pick.choice([16, 32, 96, 224])
        tail = {"activation": "silu_mul"}
    elif mode == "rotary":
        rotary = random_rotary(pick, m, dtype)
        pair_block, tail = rotary.head_dim, {"rotary": rotary}
        n = (pick.choice([1, 2, 3]) + 2 * rotary.kv_heads) * pair_block
    else:
        tail = {"activation": pick.choice(["none", "gelu", "gelu_tanh", "quick_gelu"]), "float32_out": half is None}
        tail |= {"residual": half(m, n) if half and pick.random() < 0.6 else None}
    norm = pick.choice(["none", "rms", "layer"]) if kernel is wna16_gemv else "none"
    if norm != "none":
        tail |= {"norm": norm, "norm_weight": torch.rand(k).to(dtype) + 0.5, "norm_eps": 1e-5}
        tail |= {"norm_bias": half and half(k)}
    weight, x = random_weight(pick, n, k, bits, dtype, pair_block), torch.randn(m, k).to(dtype)
    size = pick.choice([None, 7, 16, 5000, 100_000])
    tail |= {"next_weight": size and torch.zeros(size, dtype=torch.int8)}
    return PackedCall(x, weight, half and half(n), dependent=pick.random() < 0.6, **tail)


def random_deferral(pick: random.Random, call: PackedCall) -> PackedCall:
    """`call`, where it can have one, with a norm that was deferred or is the next one's; its outputs hold NaN."""
    (m, k), n, dtype = call.x.shape, call.weight.n, call.x.dtype
    if call.norm == "none" and k % 64 == 0 and pick.random() < 0.6:
        call = replace(call, deferred=Deferred(torch.rand(m, k // PART) * 40, 1e-3))
    if call.y_shape[1] == n and n % 64 == 0 and not (call.float32_out or call.rotary) and pick.random() < 0.9:
        z, squares = torch.full((m, n), torch.nan, dtype=dtype), torch.full((m, n // PART), torch.nan)
        call = replace(call, next_norm=NextNorm(torch.randn(n).to(dtype), z, squares))
    return call


def assert_next_norm(y: Tensor, norm: NextNorm) -> None:
    """z and squares are those of y: of z every bit."""
    expected = NextNorm(norm.weight, torch.empty_like(norm.z), torch.empty_like(norm.squares))
    reference.begin_norm(y, expected)
    assert torch.equal(norm.z, expected.z)
    assert torch.allclose(norm.squares, expected.squares, rtol=1e-5)


def random_launch(pick: random.Random, kernel: ModuleType, m: int, bits: int = 0) -> Any:
    """Any cut that the kernel has code for, of more blocks than there are chunks too."""
    if kernel is wna16_gemm:
        return wna16_gemm.GemmCut(pick.choice(wna16_gemm.WARPGROUPS), pick.choice([1, pick.randint(1, 8)]))
    if kernel is wna16_prefill:
        return wna16_prefill.PrefillCut(
            pick.choice(wna16_prefill.COLUMNS), pick.randint(1, 8), pick.choice([0, 1, 2, 5])
        )
    row_warps, cluster, crowded = pick.choice([1, 2, 4]), pick.choice([1, 2, 3, 4]), m <= 8 and pick.random() < 0.5
    if crowded:
        room = pick.choice(wna16_gemv.CROWDS if bits == 4 else wna16_gemv.CROWDS[:1])
        return wna16_gemv.GemvCut(1, row_warps, pick.randint(1, room // 2 // row_warps), cluster, room)
    return wna16_gemv.GemvCut(pick.choice([1, 2]), row_warps, pick.randint(1, 8 // row_warps), cluster)


def launched(gpu: Gpu, kernel: ModuleType, call: PackedCall, launch: Any) -> Tensor:
    """y by the emulated kernel; of a dependent launch, while the previous kernel still writes all but the weight."""
    call.check()
    gpu.late(call.x, call.bias, call.residual, call.norm_weight, call.norm_bias)
    if call.rotary:
        gpu.late(call.rotary.positions, call.rotary.slots)
        gpu.untouched(call.rotary.k_cache, call.rotary.v_cache)
    gpu.late(call.deferred and call.deferred.squares)
    if call.next_norm:
        gpu.untouched(call.next_norm.z, call.next_norm.squares)
    with gpu:
        return kernel.run(call, call.problem(), launch)


def assert_close(y: Tensor, expected: Tensor, dtype: torch.dtype, roundings: float = 4) -> None:
    """All finite, and within some roundings to `dtype` of the largest result."""
    assert torch.isfinite(y.float()).all()
    error = (y.float() - expected.float()).abs().max()
    limit = roundings * torch.finfo(dtype).eps * expected.float().abs().max().clamp(min=1e-3)
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"


def check_products(gpu: Gpu, kernel_name: str, seeds: range) -> None:
    kernel = PRODUCTS[kernel_name]
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = random_call(pick, kernel)
        if kernel is wna16_gemv:
            call = random_deferral(pick, call)
        call = gpu.put(call)
        if pick.random() < 0.5:  # rows that begin anywhere, and end at the page
            call = replace(call, bias=gpu.put(call.bias, 2), residual=gpu.put(call.residual, 2))
        launch = random_launch(pick, kernel, call.x.shape[0], call.weight.bits)
        gpu.start(seed, (call.y_shape, call.weight.k, call.weight.bits, call.weight.group_size, call.x.dtype, launch))
        y, rotary = launched(gpu, kernel, call, launch), call.rotary
        caches = [] if rotary is None else [rotary.k_cache, rotary.v_cache]
        written = [cache.clone() for cache in caches]
        for cache in caches:
            cache.zero_()
        assert_close(y, reference.run(replace(call, next_norm=None)), call.x.dtype)
        if call.next_norm is not None:
            assert_next_norm(y, call.next_norm)
        for cache, found in zip(caches, written, strict=True):
            assert_close(found, cache, call.x.dtype)


def cuts_of(kernel: ModuleType, n: int, k: int) -> list[tuple[int, Any]]:
    """(rows of x, launch) for every cut that the rule picks on some GPU."""
    cuts = {}
    for m in (1, 8, 9, 16, 17, 33, 64, 130):
        for processors in (1, 4, 16, 40, 78, 132):
            if m <= ROWS[kernel][-1][1]:
                problem = Problem(m, n, k, 4, 128, torch.float16, "cuda", (9, 0), processors)
                cuts[kernel.choose_cut(problem), m > 8, m > 64] = m
                crowded = wna16_gemv.crowded_cut(problem) if kernel is wna16_gemv else None
                if crowded is not None:
                    cuts[crowded, m > 8, m > 64] = m
    return [(m, launch) for (launch, *_), m in cuts.items()]


def check_cuts_of_products(gpu: Gpu, kernel_name: str) -> None:
    kernel, pick = PRODUCTS[kernel_name], random.Random(0)
    for n, k in ((40, 640), (136, 1536), (24, 8320)):
        weight = gpu.put(random_weight(pick, n, k, 4, torch.float16, 16))
        for m, launch in cuts_of(kernel, n, k):
            gpu.start(m, (n, k, launch))
            call = PackedCall(gpu.put(torch.randn(m, k).half()), weight, dependent=True)
            assert_close(launched(gpu, kernel, call, launch), reference.run(call), torch.float16)


def check_schedules(gpu: Gpu) -> None:
    pick = random.Random(0)
    for kernel, launch in ((wna16_gemv, wna16_gemv.GemvCut(1, 1, 5, 3)), (wna16_gemm, wna16_gemm.GemmCut(2, 5))):
        call = PackedCall(
            torch.randn(7, 1536).half(), random_weight(pick, 136, 1536, 4, torch.float16, 16), dependent=True
        )
        if kernel is wna16_gemv:
            call = replace(call, deferred=Deferred(torch.rand(7, 1536 // PART) * 40, 1e-3))
        call, following, results = gpu.put(call), gpu.put(torch.zeros(wna16_args.NEXT_BYTES + 64, dtype=torch.int8)), []
        for seed in range(4):
            gpu.start(seed, launch)
            next_weight = following if seed % 2 else None
            results.append(launched(gpu, kernel, replace(call, next_weight=next_weight), launch))
        assert all(torch.equal(results[0], result) for result in results)


def check_overflow(gpu: Gpu) -> None:
    """z of what is finite is finite, of what is not it says so: h of 60000, -60000, infinity and NaN."""
    for seed, dtype in enumerate(HALVES):
        most = torch.finfo(dtype).max
        weight = random_weight(random.Random(0), 64, 128, 4, dtype, 16)
        residual = torch.tensor([0.9 * most, -0.9 * most, torch.inf, torch.nan]).repeat(16).to(dtype)[None]
        norm = NextNorm(torch.full((64,), 3, dtype=dtype), torch.empty_like(residual), torch.empty(1, 64 // PART))
        call = gpu.put(PackedCall(torch.zeros(1, 128, dtype=dtype), weight, residual=residual, next_norm=norm))
        gpu.start(seed, dtype)
        y = launched(gpu, wna16_gemv, call, wna16_gemv.GemvCut(1, 1, 1, 1))
        assert torch.equal(y.nan_to_num(1), residual.nan_to_num(1))
        expected = torch.tensor([most, -most, torch.inf, torch.nan]).repeat(16)[None]
        assert torch.allclose(call.next_norm.z.float(), expected, equal_nan=True)
        assert call.next_norm.squares.isnan().all()


def check_dequantize(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        pick = random.Random(seed)
        n, dtype, bits = pick.choice([1, 5, 16, 33, 64]), pick.choice(HALVES), pick.choice([4, 8])
        pair_block = pick.choice([16, n]) if n % 16 == 0 else 16
        weight = gpu.put(random_weight(pick, n, pick.choice([32, 96, 160, 256, 512]), bits, dtype, pair_block))
        gpu.start(seed, (n, weight.k, bits, weight.group_size, dtype, pair_block))
        with gpu:
            found = wna16_dequantize.dequantize(weight)
        assert torch.equal(found, packed.dequantize_packed(weight).to(dtype))


def check_gptq(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        pick = random.Random(seed)
        n, b = pick.choice([1, 7, 8, 20]), pick.choice([1, 31, 32, 33, 100, 128])
        e = pick.choice([1, 1, 3])
        factor = torch.triu(torch.randn(e, b, b) * 0.05) + torch.eye(b) * (0.5 + torch.rand(e, 1, b))
        scales = (torch.rand(e, n, b) * 0.2 + 0.1) * (torch.randint(0, 2, (e, n, b)) * 2 - 1)
        number = pick.choice([UINT4, INT8, FP8])
        zeros = torch.randint(0, 16, (e, n, b)).float() * (not number.signed)
        tensors = [gpu.put(tensor, 4) for tensor in (torch.randn(e, n, b), factor, scales, zeros)]
        call = gptq_block.BlockCall(*tensors, *number.grid)
        gpu.start(seed, (e, n, b))
        with gpu:
            codes, errors = gptq_block.run(call)
        wanted_codes, wanted_errors = gptq_block.run(call)
        same = (codes == wanted_codes).all(-1)  # the order of two roundings may turn a code, and all that follow
        assert same.float().mean() >= 0.8
        assert torch.allclose(errors[same], wanted_errors[same], atol=1e-4)


def random_rows(pick: random.Random) -> Rows:
    dtype, activation = pick.choice(HALVES), pick.choice(["none", "none", "gelu", "silu_mul"])
    m, k, norm = pick.choice([1, 3, 256]), pick.choice([8, 72, 520, 640]), pick.choice(["none", "rms", "layer"])
    if m == 1:
        k = pick.choice([k, 8200, 16392, 16768])
    weight, bias = ((torch.randn(k) + 1).to(dtype) for _ in range(2))
    rounding = pick.choice(["none", "int8", "fp8"])
    scale = torch.tensor(0.03) if rounding != "none" and pick.random() < 0.5 else None
    x = (2 * torch.randn(m, 2 * k if activation == "silu_mul" else k) + 0.5).to(dtype)
    sides = (None if norm == "none" else weight, bias if norm == "layer" else None)
    grouped = rounding != "none" and scale is None and k % GROUP == 0
    return Rows(x, norm, *sides, 1e-5, rounding, scale, pick.random() < 0.6, activation, grouped)


def in_order(codes: Tensor) -> Tensor:
    """A code's place among all codes of its number, in the order of their values."""
    places = codes.view(torch.int8).int()
    return places if codes.dtype == torch.int8 else torch.where(places < 0, -(places & 0x7F), places)


def check_rows(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        call = gpu.put(random_rows(random.Random(seed)))
        gpu.start(seed, (call.shape, call.norm, call.rounding, call.activation, call.x.dtype))
        gpu.late(call.x)
        if call.rounding == "none":
            with gpu:
                y = row_norm.run(call)
            assert_close(y, row_norm.reference(call), call.x.dtype)
            continue
        with gpu, mock.patch.multiple(row_norm, LONG_ROW=0, PARTS=1 + seed % 8):
            codes, scales = row_norm.quantize(call)
        wanted_codes, wanted_scales = row_norm.reference_codes(call)
        exact = call.norm == "none" and call.activation == "none"
        assert_close(scales, wanted_scales, torch.float32 if exact else call.x.dtype)
        places, wanted_places = (in_order(each) for each in (codes, wanted_codes))
        turned = (places - wanted_places).abs()  # by a last bit of the norm's or the activation's
        assert turned.max() <= (0 if exact else 1 + (call.x.dtype == torch.bfloat16))
        assert (turned > 0).float().mean() < 0.2


def random_choice(pick: random.Random) -> ChoiceCall:
    """Scores of which many are equal, some infinite or NaN; rows before, at and past the last position."""
    m, n = pick.choice([1, 1, 2, 5]), pick.choice([1, 31, 1000, 20_000, 70_000])
    scores = torch.randn(m, n) if pick.random() < 0.3 else torch.randint(-2, 3, (m, n)).float() * -0.5
    if pick.random() < 0.5:
        places = torch.randint(0, n, (m, 3))
        scores.scatter_(1, places, pick.choice([float("nan"), float("inf"), float("-inf"), 9.0]))
    tokens, written, positions = (torch.randint(0, 12, (m,)) for _ in range(3))
    cursor = Cursor(positions, positions + 100 * torch.arange(m), 9) if pick.random() < 0.7 else None
    noise = None
    if pick.random() < 0.4 and scores.isfinite().all():
        noise = Noise(torch.rand(m) * torch.randint(0, 2, (m,)), torch.randint(-(2**63), 2**63 - 1, (m,)))
    return ChoiceCall(scores, tokens, written, cursor, noise, pick.random() < 0.7)


def check_choices(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        wanted, blocks = random_choice(pick), pick.choice([1, 2, 3, 8])
        call, compared = gpu.put(wanted), choose_tokens.perturbed(wanted)
        choose_tokens.reference(wanted)
        gpu.start(seed, (call.scores.shape, blocks))
        gpu.late(call.scores)
        written = [call.tokens, call.written] + ([call.cursor.positions, call.cursor.slots] if call.cursor else [])
        gpu.untouched(*written)
        with gpu, mock.patch.object(choose_tokens, "choose_blocks", return_value=blocks):
            choose_tokens.choose(call)
        if wanted.noise:  # of two that lie as near as a logarithm's last bits either may be drawn
            drawn = compared.gather(1, call.tokens.unsqueeze(1)), compared.amax(1, keepdim=True)
            assert torch.allclose(*drawn, rtol=1e-5)
            wanted.tokens.copy_(call.tokens)
        expected = [wanted.tokens, wanted.written]
        expected += [wanted.cursor.positions, wanted.cursor.slots] if wanted.cursor else []
        assert all(torch.equal(*pair) for pair in zip(written, expected, strict=True)), (written, expected)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def random_w8a8_call(pick: random.Random, number: Number) -> W8a8Call:
    m, n, k = (
        pick.choice([1, 5, 8, 13, 40, 70, 130]),
        pick.choice([1, 7, 64, 100, 200, 300]),
        pick.choice([16, 144, 1040, 640, 256]),
    )
    dtype = pick.choice([*HALVES, torch.float32])
    some = dtype != torch.float32 and pick.random() < 0.7
    bias, residual = (torch.randn(shape).to(dtype) if some else None for shape in ((n,), (m, n)))
    x, codes = random_bytes(m, k), random_bytes(n, k)
    if number == FP8:
        x, codes = (torch.randn(each.shape).to(FP8.storage) for each in (x, codes))
    weight, x_scales = W8a8Weight(codes, torch.rand(n) * 1e-4), torch.rand(m)
    if number == FP8 and k % GROUP == 0:
        weight = W8a8Weight(codes, torch.rand(w8a8.block_sides(n, k)) * 1e-4)
        x_scales = torch.rand(k // GROUP, m)
    return W8a8Call(x, x_scales, weight, bias, residual, dtype, pick.random() < 0.6)


def check_w8a8_products(gpu: Gpu, number: Number, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = gpu.put(random_w8a8_call(pick, number))
        launch = ring.RingCut(pick.choice(w8a8_gemm.WARPGROUPS), pick.choice([1, 2, 3, 8]), pick.choice([1, 2, 4]))
        gpu.start(seed, (call.y_shape, call.weight.k, call.x.dtype, call.dtype, launch))
        gpu.late(call.x, call.x_scales, call.residual)
        with gpu:
            y = w8a8_gemm.run(call, call.problem(), launch)
        assert_close(y, w8a8.reference(call), call.dtype)


def strided(pick: random.Random, gpu: Gpu, value: Tensor) -> Tensor:
    """`value` in guarded memory, as it is or with room between its rows."""
    room = pick.choice([0, 0, 8, 24])
    wide = gpu.put(
        torch.nn.functional.pad(value, (0, room), value=torch.nan).flatten()[: value.numel() + room * (len(value) - 1)]
    )
    return wide.as_strided(value.shape, (value.shape[1] + room, 1))


def random_dense_call(pick: random.Random, gpu: Gpu) -> DenseCall:
    """Some number of rows, tails of k, any n, some epilogue; bias, residual and y end at the page."""
    m = pick.randint(1, pick.choice([8, 16, 16, dense_gemv.MAX_M]))
    dtype, k = pick.choice(HALVES), pick.choice([8, 40, 64, 136, 520, 640, 1032])
    n, activation = pick.choice([1, 5, 16, 64, 67, 130, 200]), pick.choice(["none", "none", "gelu", "quick_gelu"])
    if pick.random() < 0.3:
        n, activation = pick.choice([8, 16, 64, 72, 136, 272]), "silu_mul"
    x, w, bias, residual = (torch.randn(shape).to(dtype) for shape in ((m, k), (n, k), (n,), (m, n)))
    plain, alignment = activation != "silu_mul", pick.choice([2, 16])
    deferred = Deferred(gpu.put(torch.rand(m, k // PART) * 40), 1e-3) if k % 64 == 0 and pick.random() < 0.6 else None
    return DenseCall(
        strided(pick, gpu, x),
        strided(pick, gpu, w),
        gpu.put(bias, alignment) if pick.random() < 0.5 else None,
        gpu.put(residual, alignment) if plain and pick.random() < 0.5 else None,
        activation,
        plain and pick.random() < 0.5,
        pick.random() < 0.6,
        deferred,
    )


def random_paired_call(pick: random.Random, gpu: Gpu) -> DenseCall:
    """A product whose outputs are heads, or start the next norm."""
    m, dtype, k = pick.choice([1, 2, 7, 16, 40]), pick.choice(HALVES), pick.choice([64, 136, 640])

    def halves(*shape: int) -> Tensor:
        return gpu.put(torch.randn(shape).to(dtype))

    deferred = Deferred(gpu.put(torch.rand(m, k // PART) * 40), 1e-3) if k % 64 == 0 and pick.random() < 0.6 else None
    tail = {"dependent": pick.random() < 0.6, "deferred": deferred}
    if pick.random() < 0.5:
        n, activation = pick.choice([64, 128, 192]), pick.choice(["none", "gelu"])
        z, squares = torch.full((m, n), torch.nan, dtype=dtype), torch.full((m, n // PART), torch.nan)
        norm = NextNorm(halves(n), gpu.put(z), gpu.put(squares))
        residual = halves(m, n) if pick.random() < 0.7 else None
        return DenseCall(halves(m, k), halves(n, k), halves(n), residual, activation, next_norm=norm, **tail)
    rotary = gpu.put(random_rotary(pick, m, dtype, pick.choice([32, 64])))
    n = (pick.choice([1, 2, 3]) + 2 * rotary.kv_heads) * rotary.head_dim
    return DenseCall(halves(m, k), halves(n, k), pick.choice([None, halves(n)]), rotary=rotary, **tail)


def exact(call: DenseCall) -> Tensor:
    """y of `call` in float32."""
    floats = {name: part.float() for name, part in vars(call).items() if isinstance(part, Tensor)}
    return dense.reference(replace(call, **floats))


def launched_dense(gpu: Gpu, call: DenseCall, launch: ring.RingCut) -> Tensor:
    call.check()
    gpu.late(call.x, call.bias, call.residual, call.deferred and call.deferred.squares)
    if call.rotary:
        gpu.late(call.rotary.positions, call.rotary.slots)
        gpu.untouched(call.rotary.k_cache, call.rotary.v_cache)
    if call.next_norm:
        gpu.untouched(call.next_norm.z, call.next_norm.squares)
    with gpu:
        return dense_gemv.run(call, call.problem(), launch)


def check_dense_products(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = random_dense_call(pick, gpu)
        launch = ring.RingCut(pick.choice(dense_gemv.WARPGROUPS), pick.choice([1, 2, 3, 8]), pick.choice([1, 2, 4]))
        gpu.start(seed, (call.y_shape, call.weight.shape, call.x.stride(), call.activation, call.x.dtype, launch))
        assert dense_gemv.reason_against_memory(call) is None
        assert_close(launched_dense(gpu, call, launch), exact(call), call.x.dtype)


def check_paired_dense(gpu: Gpu, seeds: range) -> None:
    """q and the caches, or y and its next norm, are the reference's."""
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = random_paired_call(pick, gpu)
        launch = ring.RingCut(pick.choice(dense_gemv.WARPGROUPS), pick.choice([1, 2, 3, 8]), pick.choice([1, 2, 4]))
        gpu.start(seed, (call.y_shape, call.weight.shape, call.rotary and call.rotary.head_dim, call.x.dtype, launch))
        assert dense_gemv.reason_against_memory(call) is None
        plain = exact(replace(call, rotary=None, next_norm=None))
        caches = call.rotary and [torch.zeros_like(call.rotary.k_cache, dtype=torch.float32) for _ in range(2)]
        y = launched_dense(gpu, call, launch)
        if call.rotary is None:
            assert_close(y, plain, call.x.dtype)
            assert_next_norm(y, call.next_norm)
            continue
        exactly = replace(call.rotary, k_cache=caches[0], v_cache=caches[1])
        assert_close(y, reference.rotate_and_store(plain, exactly, torch.float32), y.dtype)
        for found, wanted in zip((call.rotary.k_cache, call.rotary.v_cache), caches, strict=True):
            assert_close(found[exactly.slots], wanted[exactly.slots], y.dtype)


def check_cuts_of_dense(gpu: Gpu) -> None:
    for n, k in ((50, 264), (328, 1536)):
        w = gpu.put(torch.randn(n, k).half())
        for m in (1, 9):
            call = DenseCall(gpu.put(torch.randn(m, k).half()), w, float32_out=True, dependent=True)
            for seed, launch in enumerate(ring.cuts_of(m, n, 2 * k, 8)):
                gpu.start(seed, (m, n, k, launch))
                y = launched_dense(gpu, call, launch)
                assert_close(y, exact(call), torch.float16)
                gpu.start(99, launch)
                alone = launched_dense(gpu, replace(call, x=gpu.put(call.x[m // 2 : m // 2 + 1])), launch)
                assert torch.equal(y[m // 2 : m // 2 + 1], alone)


def random_cache(pick: random.Random, slots: int, dtype: torch.dtype) -> KVCache:
    int8 = pick.random() < 0.5
    head_dim = pick.choice([16, 64, 80, 128, 144, 256, 512] if int8 else [8, 40, 64, 72, 128, 136, 256, 512])
    shape = (slots, pick.choice([1, 2, 3]), head_dim)
    if not int8:
        return KVCache(*(torch.randn(shape).to(dtype) for _ in range(2)))
    scales = ((torch.rand(shape[:2]) * 0.02 + 0.002).to(dtype) for _ in range(2))
    return KVCache(*(random_bytes(*shape) for _ in range(2)), *scales)


def random_append(pick: random.Random, together: bool) -> tuple[AppendCall, Tensor]:
    """New tokens, of one sequence or of one each, and the slot of position 0 of each one's sequence."""
    dtype, m, context = pick.choice(HALVES), pick.choice([1, 2, 3, 5]), pick.choice([6, 17, 70, 300])
    if together:
        first = pick.randint(0, context - m)
        positions, starts = torch.arange(m) + first, torch.full((m,), pick.choice([0, 4]))
    else:
        positions, starts = torch.randint(0, context, (m,)), torch.arange(m) * context
    cache = random_cache(pick, m * context + 4, dtype)
    angles = torch.rand(context, cache.head_dim // 2) * 6
    heads = cache.kv_heads * (pick.choice([1, 2, 7, 8, 9, 17]) + 2)
    norms = [(torch.rand(cache.head_dim) + 0.5).to(dtype) if pick.random() < 0.5 else None for _ in range(2)]
    qkv = torch.randn(m, heads * cache.head_dim).to(dtype)
    tail = (cache, *norms, 1e-6, pick.random() < 0.6, pick.random() < 0.5)
    return AppendCall(qkv, positions, positions + starts, angles.cos(), angles.sin(), *tail), starts


def parts_of(cache: KVCache) -> list[Tensor]:
    """Tensors with something for every slot."""
    return [part for part in vars(cache).values() if part is not None and part.ndim > 1]


def check_append(gpu: Gpu, call: AppendCall) -> None:
    """q and the cache, which the call changes, are the reference's."""
    copies = {name: part if part is None else part.clone() for name, part in vars(call.cache).items()}
    wanted = replace(call, cache=KVCache(**copies))
    wanted_q = decode_attention.append_reference(wanted)
    gpu.late(call.qkv)
    gpu.untouched(*parts_of(call.cache))
    with gpu:
        q = decode_attention.append(call)
    assert_close(q, wanted_q, q.dtype)
    assert_same_caches(call.cache, wanted.cache)


def assert_same_caches(cache: KVCache, wanted: KVCache) -> None:
    """Codes are within a step, other numbers close."""
    for part, wanted_part in zip(parts_of(cache), parts_of(wanted), strict=True):
        if part.dtype.itemsize == 1 or part.dtype == torch.int32:
            assert (steps_of(part) - steps_of(wanted_part)).abs().max() <= 1
        else:
            assert_close(part, wanted_part, part.dtype)


def steps_of(codes: Tensor) -> Tensor:
    """Codes of a cache as integers in the order of their values."""
    if codes.dtype == torch.int32:
        return codes.unsqueeze(-1) >> torch.tensor(NIBBLES, dtype=torch.int32) & 15
    if codes.dtype == torch.int8:
        return codes.int()
    return torch.where(codes.view(torch.int8) < 0, -1, 1) * (codes.view(torch.uint8) & 0x7F).int()


def check_attention(gpu: Gpu, seeds: range) -> None:
    """The rows that the kernel before writes arrive late; positions that no token may see hold NaN."""
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        append, starts = random_append(pick, pick.random() < 0.5)
        append, splits = gpu.put(append), pick.randint(1, decode_attention.MAX_SPLITS)
        cache, positions = append.cache, append.positions
        gpu.start(seed, (append.qkv.shape, cache.k.shape, cache.k.dtype, positions.tolist(), splits))
        with mock.patch.object(decode_attention, "MANY_ROWS", 1 + seed % 2 * 127):
            check_append(gpu, append)
        q = torch.randn(len(starts), append.heads * cache.head_dim).to(append.qkv.dtype)
        window, softcap = pick.choice([0, 0, 1, 5, 33]), pick.choice([0.0, 0.0, 3.0])
        sinks = gpu.put(torch.randn(append.heads).to(q.dtype)) if pick.random() < 0.4 else None
        options = (cache.head_dim**-0.5, window, softcap, 0, append.dependent, sinks)
        one_sequence = positions.diff().eq(1).all() and starts.diff().eq(0).all() and not window
        call = AttentionCall(gpu.put(q), cache, gpu.put(starts), positions, *options, len(q) if one_sequence else 1)
        wanted = decode_attention.attend_reference(call)
        hide_unseen(call)
        gpu.late(call.q, *heads_of(cache, append.slots))
        cut = splits, warps_of(pick, cache)
        columns = mock.patch.object(decode_attention, "choose_columns", mock.Mock(return_value=pick.randint(1, 8)))
        with gpu, columns, mock.patch.object(decode_attention, "choose_cut", mock.Mock(return_value=cut)):
            out = decode_attention.attend(call)
        assert_close(out, wanted, out.dtype, 8)


def heads_of(cache: KVCache, slots: Tensor) -> list[Tensor]:
    """All that the cache has of each head in `slots`, piece by piece: a slot's heads may lie apart in memory."""
    return [head for part in parts_of(cache) for slot in slots.tolist() for head in part[slot].unsqueeze(-1)]


def warps_of(pick: random.Random, cache: KVCache) -> int:
    """Any number of warps that the kernel has code for."""
    wide = cache.number == SAME or cache.head_dim > decode_attention.MANY_WARPS_DIM
    return 4 if wide else pick.choice([4, 8, 16])


def hide_unseen(call: AttentionCall) -> None:
    """Fills what no token of `call` may see with ones: NaN, but for codes."""
    seen = torch.zeros(len(call.cache.k), dtype=torch.bool)
    for start, position in zip(call.starts.tolist(), call.positions.tolist(), strict=True):
        first = max(0, position + 1 - call.window) if call.window else 0
        seen[start + first : start + position + 1] = True
    for part in parts_of(call.cache):
        part.unsqueeze(-1).view(torch.uint8)[~seen] = 0xFF


def check_names(gpu: Gpu) -> None:
    """Enums have the values that Python has, whatever their order; a field is filled by its name or not at all."""
    assert extension.EXTENSION is not None
    names = ("row_norm float16", "wna16_gemv float16 4", "dense_gemv float16", "append_heads bfloat16 same")
    found = {name: {**args, **cut} for name in names for args, cut in [extension.EXTENSION.fields(name)]}
    for name, known in (("norm", NORMS), ("activation", ACTIVATIONS)):
        values = {fields[name] for fields in found.values() if name in fields}
        assert [set(text.split(", ")) for text in values] == [set(known)]
    assert found["append_heads bfloat16 same"].keys() >= {"made", "cache", "slots", "device", "dependent"}
    x = gpu.put(torch.randn(2, 8).half())
    args = {"x": x, "weight": None, "bias": None, "input_scale": None, "y": x.clone(), "codes": None, "scales": None}
    args |= {"m": 2, "k": 8, "norm": "none", "eps": 0.0, "activation": "gelu", "rounding": "fp8"}
    args |= {"grouped": False, "shuffled": False}
    for change, reason in (
        ({}, None),
        ({"norm": "max"}, "'max' is none of none, rms, layer"),
        ({"width": 8}, "16 values for the fields x, weight, bias"),
        ({"m": "2"}, "cast"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=reason) if reason else nullcontext(), gpu:
            extension.launch("row_norm", torch.float16, device=x.device, args=args | change, parts=1, dependent=False)
    with pytest.raises(ValueError, match="no value for dependent"), gpu:
        extension.launch("row_norm", torch.float16, device=x.device, args=args, parts=1)
    with pytest.raises(RuntimeError, match=r"w8a8_cutlass float16 0: .* built without it"), gpu:
        extension.launch("w8a8_cutlass", torch.float16, 0, device=x.device, args={}, processors=1, swizzle=1)


DECLARED = (
    "row_norm float16",
    "wna16_gemv float16 4",
    "wna16_gemm bfloat16 8",
    "dense_gemv float16",
    "append_heads bfloat16 same",
)
CHECKS = {
    "the names of fields and values": (check_names,),
    "wna16_gemv": (check_products, "wna16_gemv", range(60)),
    "wna16_gemm": (check_products, "wna16_gemm", range(40)),
    "wna16_prefill": (check_products, "wna16_prefill", range(30)),
    "the cuts of wna16_gemv": (check_cuts_of_products, "wna16_gemv"),
    "the cuts of wna16_gemm": (check_cuts_of_products, "wna16_gemm"),
    "the same bits in every order": (check_schedules,),
    "the next norm of numbers too large": (check_overflow,),
    "wna16_dequantize": (check_dequantize, range(30)),
    "gptq_block": (check_gptq, range(12)),
    "row_norm": (check_rows, range(40)),
    "choose_tokens": (check_choices, range(60)),
    "w8a8_gemm": (check_w8a8_products, INT8, range(40)),
    "w8a8_gemm in fp8": (check_w8a8_products, FP8, range(30)),
    "dense_gemv": (check_dense_products, range(60)),
    "dense_gemv, paired": (check_paired_dense, range(40)),
    "the cuts of dense_gemv": (check_cuts_of_dense,),
    "decode_attention": (check_attention, range(40)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_compute_the_reference(library: Path, name: str) -> None:
    function, *args = CHECKS[name]
    failure = failure_of(library, function, *args)
    assert failure is None, failure


def read_past_the_words(gpu: Gpu) -> None:
    weight = gpu.put(random_weight(random.Random(0), 16, 256, 4, torch.float16, 16))
    gpu.start(0)
    with gpu:
        wna16_dequantize.dequantize(replace(weight, n=400))


def test_reading_past_a_tensor_is_a_failure_with_its_place(library: Path) -> None:
    failure = failure_of(library, read_past_the_words)
    assert failure is not None
    assert "past the end of a tensor (block" in failure


WAIT = "  wait_for_previous_kernel();\n"
MUTANTS = {
    "no wait for the previous kernel": (
        Mutant("row_norm.cu", WAIT, ""),
        (check_rows, range(40)),
        "AssertionError|the previous kernel had finished|waited for the previous one",
    ),
    "a stage given back too early": (
        Mutant("ring.cuh", "    wgmma_wait<1>();\n    if (leader", "    if (leader"),
        (check_w8a8_products, INT8, range(40)),
        "AssertionError",
    ),
    "a group's largest number among half of its lanes": (
        Mutant("row_norm.cu", "offset = kGroupLanes / 2;", "offset = kGroupLanes / 4;"),
        (check_rows, range(40)),
        "AssertionError",
    ),
    "a row's largest number of one of its blocks alone": (
        Mutant("row_norm.cu", "if (i != rank) largest", "if (false) largest"),
        (check_rows, range(40)),
        "AssertionError",
    ),
    "y of a gated product stored over that of other rows of x": (
        Mutant("wna16_gemm.cu", "(kGated ? second * 8 : 0) + lane % 8", "lane % 8"),
        (check_products, "wna16_gemm", range(40)),
        "AssertionError",
    ),
    "a block that leaves while others read from it": (
        Mutant("ring.cuh", "cluster_sync();  // no block leaves while others read from it", "{}"),
        (check_w8a8_products, INT8, range(40)),
        "after it had left",
    ),
    "x read before the previous kernel has ended": (
        Mutant("ring.cuh", "i, i);\n  wait_for_previous_kernel();\n", "i, i);\n"),
        (check_dense_products, range(40)),
        "AssertionError|the previous kernel had finished",
    ),
    "memory of a block that may not have begun": (
        Mutant("decode_attention.cu", "  if (cluster) cluster_wait();\n  give", "  give"),
        (check_attention, range(40)),
        "AssertionError|before it had begun|after it had left",
    ),
    "a merge of what has not all come": (
        Mutant("decode_attention.cu", "if (cluster) wait_for_messages(meeting.sent);\n  else", "if (!cluster)"),
        (check_attention, range(40)),
        "AssertionError|after it had left",
    ),
    "a row that sees those behind it": (
        Mutant("decode_attention.cu", "args.adjacent - 1 - columns.row_of(args, S::kColumns * lane.member + h)", "0"),
        (check_attention, range(40)),
        "AssertionError",
    ),
    "the next weight asked for past its end": (
        Mutant("wna16_gemv.cu", "args.next_bytes, warp, part", "args.next_bytes + 16, warp, part"),
        (check_products, "wna16_gemv", range(60)),
        "past the end of a tensor",
    ),
    "sums of squares read while they are copied": (
        Mutant("wna16_gemv.cu", "  wait_for_copies();\n", ""),
        (check_products, "wna16_gemv", range(60)),
        "AssertionError|left with copies",
    ),
    "results before the warps have met": (
        Mutant("pair_ends.cuh", "    if (!met) __syncthreads();\n", ""),
        (check_products, "wna16_gemv", range(60)),
        "AssertionError",
    ),
    "a pair's second row past the last": (
        Mutant("pair_ends.cuh", "if (first + apart < n)", "if (first < n)"),
        (check_products, "wna16_gemv", range(60)),
        "past the end of a tensor",
    ),
    "the next norm of sums before they are rounded": (
        Mutant("deferred_norm.cuh", "weighted<T>(to_float(low_h), weights.x)", "weighted<T>(sums.x, weights.x)"),
        (check_products, "wna16_gemv", range(60)),
        "AssertionError",
    ),
    "a slot that goes on where its position stays": (
        Mutant("choose_tokens.cu", "+= next - position", "+= 1"),
        (check_choices, range(60)),
        "AssertionError",
    ),
    "a column read past the row": (
        Mutant("gptq_block.cu", "column < columns ? row[column] : other", "row[column]"),
        (check_gptq, range(12)),
        "past the end of a tensor",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(library: Path, name: str) -> None:
    mutant, (function, *args), expected = MUTANTS[name]
    require_found(mutant, built(mutant), function, *args, expected=expected)


def test_one_scale_for_all_rows_of_blocks_is_found() -> None:
    mutant = Mutant("w8a8_gemm.cu", "S::kColumns + threadIdx.x / 128 * kGroupRows / kBlock", "S::kColumns")
    broken = built(mutant, ("w8a8_gemm.cu",), ("LOWBIT_CODES=int8_t",))
    require_found(mutant, broken, check_w8a8_products, FP8, range(120))
