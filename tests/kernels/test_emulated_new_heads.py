"""The emulator's checks of attention that makes and appends its own heads, with planted mistakes that must be found."""

import random
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from lowbit.quant.kernels import decode_attention
from lowbit.quant.kernels.decode_attention import NewCall
from lowbit.quant.kernels.kv_cache import KVCache
from tests.kernels import test_emulated
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.test_emulated import HALVES, library
from tests.kernels.test_emulated_caches import ATTENTION, random_codes

__all__ = ["library"]  # the fixture

LEFT_OUT = "LOWBIT_T=__nv_bfloat16", *(f"LOWBIT_CACHE={name}Cache" for name in ("Int8", "Fp8", "Int4"))


def check_new_heads(gpu: Gpu, seeds: range) -> None:
    """One launch that appends heads and attends to them has every bit of two. What it appends has been NaN."""
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        append, starts = test_emulated.random_append(pick, together=False)
        append = gpu.put(append)
        positions = gpu.put(append.positions)
        cache, cut = (
            append.cache,
            (pick.randint(1, decode_attention.MAX_SPLITS), test_emulated.warps_of(pick, append.cache)),
        )
        window, softcap = pick.choice([0, 0, 1, 5, 33]), pick.choice([0.0, 0.0, 3.0])
        sinks = gpu.put(torch.randn(append.heads).to(append.qkv.dtype)) if pick.random() < 0.4 else None
        bounds = cache.head_dim**-0.5, window, softcap, 0, sinks
        call = NewCall(append, gpu.put(starts), positions, *bounds)
        gpu.start(seed, (append.qkv.shape, cache.k.shape, cache.k.dtype, positions.tolist(), cut))
        chosen = mock.patch.object(decode_attention, "choose_cut", mock.Mock(return_value=cut))
        apart = replace(append, cache=gpu.put(cache))
        with gpu, chosen:
            after = replace(call, append=apart).after(decode_attention.append(apart))
            wanted = decode_attention.attend(after)
        test_emulated.hide_unseen(replace(after, cache=cache))
        rows = test_emulated.heads_of(cache, append.slots)
        for row in rows:
            row.view(torch.uint8).fill_(0xFF)
        gpu.late(append.qkv)
        gpu.untouched(*rows)
        columns = mock.patch.object(decode_attention, "choose_columns", mock.Mock(return_value=pick.randint(1, 8)))
        with gpu, chosen, columns:
            out = decode_attention.attend_new(call)
        assert torch.equal(out, wanted)
        for part, same in zip(test_emulated.parts_of(cache), test_emulated.parts_of(apart.cache), strict=True):
            found, kept = (each[append.slots].flatten().view(torch.uint8) for each in (part, same))
            assert torch.equal(found, kept)


def check_new_codes(gpu: Gpu, seeds: range) -> None:
    """The same of caches in FP8 and in 4 bits."""
    with mock.patch.object(test_emulated, "random_cache", random_codes):
        check_new_heads(gpu, seeds)


def random_halves(pick: random.Random, slots: int, dtype: torch.dtype) -> KVCache:
    """A cache of float16, full of random heads."""
    shape = (slots, pick.choice([1, 2, 3]), pick.choice([8, 64, 72, 128, 256, 512]))
    return KVCache(*(torch.randn(shape).to(dtype) for _ in range(2)))


def check_halves(gpu: Gpu, seeds: range) -> None:
    """The same of caches in float16 alone."""
    with mock.patch.multiple(test_emulated, random_cache=random_halves, HALVES=HALVES[:1]):
        check_new_heads(gpu, seeds)


@pytest.mark.parametrize("check", [check_new_heads, check_new_codes])
def test_heads_made_by_attention_are_those_appended_before(library: Path, check) -> None:
    failure = failure_of(library, check, range(25))
    assert failure is None, failure


MISTAKES = {
    "a new position stored by each block": (
        "if (!owns || columns.first > 0) return;",
        "if (columns.first > 0) return;",
    ),
    "a new position made by the first block alone": ("S::kWarps == blockIdx.x;", "S::kWarps == 0;"),
    "heads read before they are made": ("  if (Heads<S>::kBytes > 0) __syncthreads();\n", ""),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name: str) -> None:
    broken = built(Mutant("decode_attention.cu", *MISTAKES[name]), ATTENTION, LEFT_OUT)
    require_found(name, broken, check_halves, range(40))
