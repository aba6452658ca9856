"""The emulator's checks of the key-value cache in FP8 and in 4 bits, with planted mistakes that must be found."""

import random
from pathlib import Path
from unittest import mock

import pytest
import torch

from lowbit.quant.kernels import decode_attention
from lowbit.quant.kernels.decode_attention import MAX_SPLITS
from lowbit.quant.kernels.kv_cache import FP8_CACHE, INT4_CACHE, KVCache, empty_cache, store
from tests.kernels import test_emulated
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.test_emulated import HALVES, library

__all__ = ["library"]  # the fixture

ATTENTION = ("decode_attention.cu",)
LEFT_OUT = ("LOWBIT_T=__nv_bfloat16", "LOWBIT_CACHE=SameCache", "LOWBIT_CACHE=Int8Cache")


def random_codes(pick: random.Random, slots: int, dtype: torch.dtype) -> KVCache:
    """A cache of one of the two number types, full of random heads; each head's scale is its own."""
    number = pick.choice([FP8_CACHE, INT4_CACHE, INT4_CACHE])
    kv_heads, head_dim = (
        pick.choice([1, 2, 3]),
        pick.choice([16, 80, 128, 256, 512] if number.step == 16 else [64, 128, 256]),
    )
    scales = (torch.rand(kv_heads) * 0.02 + 0.002, torch.rand(kv_heads) * 0.02 + 0.002)
    cache = empty_cache(number, (slots, kv_heads, head_dim), torch.empty(0, dtype=dtype), scales)
    for codes, sides in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
        store(codes, sides, torch.arange(slots), torch.randn(slots, kv_heads, head_dim))
    return cache


def check_caches(gpu: Gpu, seeds: range, halves: tuple[torch.dtype, ...] = HALVES, splits: int = MAX_SPLITS) -> None:
    """The check of attention with these caches; with fewer splits a warp has more chunks."""
    chosen = mock.patch.multiple(test_emulated, random_cache=random_codes, HALVES=halves)
    with chosen, mock.patch.object(decode_attention, "MAX_SPLITS", splits):
        test_emulated.check_attention(gpu, seeds)


def test_attention_over_codes_computes_as_the_reference(library: Path) -> None:
    failure = failure_of(library, check_caches, range(60))
    assert failure is None, failure


MISTAKES = {
    "a maximum raised by too little": Mutant(
        "decode_attention.cu", "? most[h] : running", "? running.maximum[h] : running"
    ),
    "a last row that nobody masks": Mutant("decode_attention.cu", "span.length - args.adjacent + 1)", "span.length)"),
    "a scale without its sign": Mutant("decode_attention.cu", "^ __float_as_uint(side) << 31", ""),
    "nibbles of two rows in another order": Mutant(
        "cache_codes.cuh",
        "pairs[2 * i] = even[i], pairs[2 * i + 1] = odd[i]",
        "pairs[i] = even[i], pairs[i + kPairs] = odd[i]",
    ),
    "bytes of queries in another order than those of keys": Mutant(
        "cache_codes.cuh", "j % 2 * 4 + j / 2 + 2 * half", "j % 2 * 4 + j / 2 + half"
    ),
    "an upper byte without what the lower one borrows": Mutant("decode_attention.cu", "(code + 128) >> 8", "code >> 8"),
    "slots as far apart as if heads stood together": Mutant(
        "decode_attention.cu", "span.pitch = cache.slot_step", "span.pitch = cache.kv_heads"
    ),
    "a chunk read where the next one is": Mutant(
        "decode_attention.cu", "next = first + S::kTogether * step;", "next = first + step;"
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name: str) -> None:
    broken = built(MISTAKES[name], ATTENTION, LEFT_OUT)
    require_found(MISTAKES[name], broken, check_caches, range(200), HALVES[:1], 1)
