"""The emulator's checks of panels: a product that reads or writes them, and attention that writes them, give the bits
that they give with rows."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowbit.quant.kernels import decode_attention, panels, wna16_gemv
from lowbit.quant.kernels.decode_attention import AttentionCall
from lowbit.quant.kernels.kv_cache import KVCache
from lowbit.quant.kernels.packed import CHUNK_K, PackedWeight
from lowbit.quant.kernels.problem import NextNorm, PackedCall
from tests.kernels import test_emulated
from tests.kernels.emulator.build import OTHERS, Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.test_emulated import (
    check_append,
    launched,
    random_append,
    random_call,
    random_deferral,
    random_weight,
)
from tests.kernels.test_emulated_numbers import launch_of_one_tile, random_number
from tests.kernels.test_emulated_steps import crowded_launch, four_bits

GEMV, ATTENTION = "wna16_gemv.cu", "decode_attention.cu"


@pytest.fixture(scope="module")
def library() -> Path:
    """The emulated kernels that know panels; skips where they cannot be built."""
    return built(None, (GEMV, ATTENTION))


def any_number(pick: random.Random, n: int, k: int, bits: int, dtype: torch.dtype, pair_block: int) -> PackedWeight:
    """An integer of 4 or 8 bits, of other bits, or a float."""
    make = random_weight if pick.random() < 0.6 else random_number
    return make(pick, n, k, bits, dtype, pair_block, *([True] if make is random_number else []))


def in_panels(gpu: Gpu, rows: Tensor) -> Tensor:
    """The rows in guarded panels, whose other rows are NaN."""
    view = panels.panels_of(rows)
    memory = torch.full((view.shape[0], panels.height_of(view), panels.WIDTH), torch.nan, dtype=rows.dtype)
    memory[:, : len(rows)] = view
    return gpu.put(memory)[:, : len(rows)]


def assert_same(found: Tensor, rows: Tensor) -> None:
    """The same bits, and nothing in rows of a panel that are none."""
    assert torch.equal(panels.rows_of(found), rows)
    if found.ndim == 3:
        memory = found.as_strided((found.shape[0], panels.height_of(found), panels.WIDTH), found.stride())
        assert memory[:, found.shape[1] :].isnan().all()


def drawn(pick: random.Random) -> PackedCall:
    """A product of up to 16 rows of whole chunks, its norm not its own; often one of which y or z can be panels."""
    if pick.random() < 0.6:
        m, n, k = pick.randint(*test_emulated.ROWS[wna16_gemv][0]), pick.choice([64, 128, 256]), pick.choice([256, 640])
        dtype, gated = pick.choice(test_emulated.HALVES), pick.random() < 0.5
        weight = test_emulated.random_weight(pick, n, k, pick.choice([4, 8]), dtype, n if gated else 16)
        x, activation = torch.randn(m, k).to(dtype), "silu_mul" if gated else "none"
        return random_deferral(pick, PackedCall(x, weight, activation=activation, dependent=pick.random() < 0.6))
    while True:
        call = random_call(pick, wna16_gemv)
        if call.norm == "none" and call.x.shape[1] % CHUNK_K == 0:
            return random_deferral(pick, call)


def with_panels(gpu: Gpu, call: PackedCall) -> PackedCall:
    """`call`, which is on the GPU, with panels wherever it can have them."""
    y_panels = not (call.float32_out or call.rotary or call.y_shape[1] % panels.WIDTH)
    norm = call.next_norm
    if norm is not None:
        norm = NextNorm(norm.weight, in_panels(gpu, torch.full_like(norm.z, torch.nan)), gpu.put(norm.squares))
    return replace(call, x=in_panels(gpu, call.x), y_panels=y_panels, next_norm=norm)


def check_panels(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        call = gpu.put(drawn(pick))
        m, bits = call.m, call.weight.bits
        launch = test_emulated.random_launch(pick, wna16_gemv, m, bits)
        case = call.y_shape, call.weight.k, call.weight.number, call.weight.group_size, call.x.dtype, launch
        gpu.start(seed, case)
        y = launched(gpu, wna16_gemv, call, launch)
        caches = [] if call.rotary is None else [call.rotary.k_cache.clone(), call.rotary.v_cache.clone()]
        other = with_panels(gpu, call)
        gpu.start(seed + 1, case)
        assert_same(launched(gpu, wna16_gemv, other, launch), y)
        if call.next_norm is not None:
            assert_same(other.next_norm.z, call.next_norm.z)
            assert torch.equal(other.next_norm.squares, call.next_norm.squares)
        for found, wanted in zip((call.rotary.k_cache, call.rotary.v_cache) if caches else (), caches, strict=True):
            assert torch.equal(found, wanted)


@contextmanager
def products(weight: Any, launch: Any, **changes: Any) -> Iterator[None]:
    """random_call and random_launch of other weights and launches."""
    with mock.patch.multiple(test_emulated, random_weight=weight, random_launch=launch, **changes):
        yield


def check_every_number(gpu: Gpu, seeds: range) -> None:
    with products(any_number, launch_of_one_tile):
        check_panels(gpu, seeds)


def check_launches(gpu: Gpu, seeds: range) -> None:
    """Launches of one and of two tiles a warp, of 4-bit integers in float16."""
    with products(four_bits, test_emulated.random_launch, HALVES=(torch.float16,)):
        check_panels(gpu, seeds)


def check_many_rows(gpu: Gpu, seeds: range) -> None:
    """9 to 16 rows with 24 warps."""
    changes = {"GROUPS": (128, 256, -1), "ROWS": {wna16_gemv: ((9, 16),)}, "HALVES": (torch.float16,)}
    with products(four_bits, crowded_launch, **changes):
        check_panels(gpu, seeds)


def check_attention(gpu: Gpu, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        together = pick.random() < 0.5
        append, starts = random_append(pick, together)
        width = append.heads * append.cache.head_dim
        if width % panels.WIDTH:
            continue
        append = gpu.put(append)
        gpu.start(seed, (append.qkv.shape, append.cache.k.shape, append.positions.tolist()))
        check_append(gpu, append)
        q, starts, cache = gpu.put(torch.randn(len(starts), width).to(append.qkv.dtype)), gpu.put(starts), append.cache
        call = AttentionCall(q, cache, starts, append.positions, 0.1, adjacent=len(q) if together else 1)
        cut = pick.randint(1, decode_attention.MAX_SPLITS), 4
        with gpu, mock.patch.object(decode_attention, "choose_cut", mock.Mock(return_value=cut)):
            rows = decode_attention.attend(call)
            assert_same(decode_attention.attend(replace(call, in_panels=True)), rows)


def check_plain_attention(gpu: Gpu, seeds: range) -> None:
    """With a cache of float16."""
    with mock.patch.multiple(test_emulated, HALVES=(torch.float16,), random_cache=plain_cache):
        check_attention(gpu, seeds)


def plain_cache(pick: random.Random, slots: int, dtype: torch.dtype) -> KVCache:
    shape = (slots, pick.choice([1, 2]), pick.choice([64, 128]))
    return KVCache(*(torch.randn(shape).to(dtype) for _ in range(2)))


@pytest.mark.parametrize(
    ("check", "count"),
    [(check_every_number, 25), (check_launches, 20), (check_many_rows, 15), (check_attention, 15)],
)
def test_panels_give_the_bits_of_rows(library: Path, check: Any, count: int) -> None:
    failure = failure_of(library, check, range(count))
    assert failure is None, failure


MUTANTS = {
    "rows 8 to 15 read from those before": (
        Mutant(GEMV, "kPanelBytes + j * kRowsBytes", "kPanelBytes"),
        check_many_rows,
    ),
    "z written in rows": (
        Mutant("deferred_norm.cuh", "input_index(args.z_panel, ", "input_index(0, "),
        check_launches,
    ),
    "y in another row of its panel": (
        Mutant("panels.cuh", "* panel + row)", "* panel + panel - 1 - row)"),
        check_launches,
    ),
    "attention of adjacent rows in the first of them": (
        Mutant(ATTENTION, "(columns.first_row) + columns.row_of(args, head)", "(columns.first_row)"),
        check_plain_attention,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(library: Path, name: str) -> None:
    mutant, check = MUTANTS[name]
    only = (ATTENTION,) if check is check_plain_attention else (GEMV,)
    less = ("LOWBIT_T=__nv_bfloat16", "LOWBIT_NUMBER=Int8", "LOWBIT_CACHE=Int8Cache")
    require_found(mutant, built(mutant, only, (*OTHERS, *less)), check, range(40))
