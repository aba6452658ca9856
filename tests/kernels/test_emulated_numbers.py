"""The emulator's checks of products and of dequantization with weights of the other number types: floats, and integers
of widths that do not divide a word."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from lowbit.quant.kernels import packed, wna16_gemv
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import parse_scheme
from tests.kernels import test_emulated
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.test_emulated import library, random_launch, random_weight

__all__ = ["library"]  # the fixture

FLOATS = ("fp8-a16", "fp8-block-a16", "mxfp8-a16", "mxfp4-a16", "nvfp4-a16")
STREAMS = (2, 3, 5, 6, 7)  # bits


def random_float(pick: random.Random, n: int, k: int, dtype: torch.dtype, pair_block: int) -> PackedWeight:
    """Every code of some number, and scales as far apart as a row may have them."""
    scheme = parse_scheme(pick.choice(FLOATS))
    number, sides = scheme.number, scheme.sides(n, k)
    codes = number.encode(torch.randn(n, k) * pick.choice([number.high / 2, number.least]))
    scales = torch.ldexp(torch.ones(sides), torch.randint(-20, -9, sides))
    if scheme.weights.scales is None:
        scales *= torch.rand(sides) + 1
    elif scheme.weights.parent:
        scales = (torch.rand(sides) * 448).to(torch.float8_e4m3fn).float().clamp(2**-9)
    divisor = torch.tensor(3e4) if scheme.weights.parent else None
    kept = torch.float32 if scheme.weights.scales is None else torch.bfloat16
    return packed.prepack(QTensor(codes, scales.to(kept), None, scheme, divisor=divisor), dtype, pair_block)


def random_number(
    pick: random.Random, n: int, k: int, bits: int, dtype: torch.dtype, pair_block: int, streams: bool
) -> PackedWeight:
    """A weight of a float or, with `streams`, of one; `bits` is what the check asked for."""
    if streams and pick.random() < 0.5:
        return random_weight(pick, n, k, pick.choice(STREAMS), dtype, pair_block)
    return random_float(pick, n, k, dtype, pair_block)


def launch_of_one_tile(*args: Any) -> Any:
    """A random launch with one tile a warp: streams have code for no other, except of one row."""
    launch = random_launch(*args)
    return replace(launch, row_tiles=1) if hasattr(launch, "row_tiles") else launch


def launch_of_numbers(pick: random.Random, kernel: ModuleType, m: int, bits: int) -> Any:
    """The same, or one with two tiles a warp for one row of x and 2 or 3 bits or floats of 4."""
    launch = launch_of_one_tile(pick, kernel, m, bits)
    if kernel is not wna16_gemv or m > 1 or bits > 4 or pick.random() < 0.3:
        return launch
    room = pick.choice(wna16_gemv.CROWDS if bits == 4 else (wna16_gemv.ROOM, wna16_gemv.CROWD))
    return replace(launch, row_tiles=2, k_warps=min(launch.k_warps, room // 2 // launch.row_warps), room=room)


def check_numbers(gpu: Gpu, check: str, streams: bool, *args: Any) -> None:
    """A check of test_emulated with other weights."""
    numbers = partial(random_number, streams=streams)
    with mock.patch.multiple(test_emulated, random_weight=numbers, random_launch=launch_of_numbers):
        getattr(test_emulated, check)(gpu, *args)


@pytest.mark.parametrize(
    ("check", "streams", "args"),
    [
        ("check_products", True, ("wna16_gemv", range(60))),
        ("check_products", False, ("wna16_gemm", range(12))),
        ("check_products", False, ("wna16_prefill", range(12))),
        ("check_dequantize", True, (range(60),)),
    ],
)
def test_every_number_computes_as_the_reference(library: Path, check: str, streams: bool, args: tuple) -> None:
    failure = failure_of(library, check_numbers, check, streams, *args)
    assert failure is None, failure
