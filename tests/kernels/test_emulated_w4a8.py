"""The emulator's checks of the product of rows in int8 with weights of 4 bits, and of rows rounded in its order."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from lowbit.quant.kernels import packed, reference, row_norm, w4a8_gemm, wna16_gemm
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import PackedCall
from lowbit.quant.kernels.ring import RingCut
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import make_scheme
from tests.kernels import test_emulated
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.test_emulated import GROUPS, HALVES, assert_close, library, random_call

__all__ = ["library"]  # the fixture


def random_nibbles(pick: random.Random, n: int, k: int, bits: int, dtype: torch.dtype, pair_block: int) -> PackedWeight:
    """Every code of int4, whatever `bits` are asked for; scales with signs."""
    scheme = make_scheme(4, pick.choice([size for size in GROUPS if k % size == 0]), True)
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scales = (torch.rand(n, scheme.groups(k)) * 0.02 + 0.001) * (torch.randint(0, 2, (n, scheme.groups(k))) * 2 - 1)
    return packed.prepack(QTensor(codes, scales.to(dtype), None, scheme), dtype, pair_block)


def random_code_call(pick: random.Random) -> PackedCall:
    """A product of random codes with any epilogue."""
    with mock.patch.object(test_emulated, "random_weight", random_nibbles):
        call = random_call(pick, wna16_gemm)
    x, x_scales = torch.randint(-128, 128, call.x.shape, dtype=torch.int8), torch.rand(call.m) * 0.02 + 0.001
    return replace(call, x=packed.shuffled(x), x_scales=x_scales)


def check_code_products(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = gpu.put(random_code_call(pick))
        cut = RingCut(pick.choice(w4a8_gemm.WARPGROUPS), pick.choice([1, 2, 3, 8]), pick.choice([1, 2, 4]))
        gpu.late(call.x_scales)
        gpu.start(seed, (call.y_shape, call.weight.k, call.weight.group_size, call.dtype, cut))
        y = test_emulated.launched(gpu, w4a8_gemm, call, cut)
        caches = [] if call.rotary is None else [call.rotary.k_cache, call.rotary.v_cache]
        written = [cache.clone() for cache in caches]
        for cache in caches:
            cache.zero_()
        assert_close(y, reference.run(call), call.dtype)
        for cache, found in zip(caches, written, strict=True):
            assert_close(found, cache, call.dtype)


def check_shuffled_rows(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        x = torch.randn(pick.choice([1, 5]), pick.choice([32, 96, 640, 8224])).to(pick.choice(HALVES))
        call = gpu.put(Rows(x, rounding="int8", shuffled=True, dependent=pick.random() < 0.6))
        gpu.start(seed, call.shape)
        gpu.late(call.x)
        with gpu:
            found = row_norm.quantize(call)
        assert all(torch.equal(*pair) for pair in zip(found, row_norm.reference_codes(call), strict=True))


CHECKS = {"products": (check_code_products, range(60)), "rows": (check_shuffled_rows, range(20))}


@pytest.mark.parametrize("name", CHECKS)
def test_codes_compute_as_the_reference(library: Path, name: str) -> None:
    failure = failure_of(library, *CHECKS[name])
    assert failure is None, failure


MUTANTS = {
    "products added before they are there": (
        Mutant("w4a8_gemm.cu", "          wgmma_wait<0>();\n", ""),
        "AssertionError|left with products on their way",
    ),
    "the scales of the next group": (
        Mutant("w4a8_gemm.cu", "(scales_here + group * 4)", "(scales_here + (group + 1) % S::kGroups * 4)"),
        "AssertionError",
    ),
    "sums of a cluster's other blocks left out": (
        Mutant("w4a8_gemm.cu", "if (rank + 1 < gridDim.x) add_bits", "if (rank + 2 < gridDim.x) add_bits"),
        "AssertionError",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(name: str) -> None:
    mutant, expected = MUTANTS[name]
    broken: Any = built(mutant, ("w4a8_gemm.cu",))
    require_found(mutant, broken, check_code_products, range(60), expected=expected)
