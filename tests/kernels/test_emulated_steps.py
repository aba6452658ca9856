"""The emulator's checks of what decode steps have on an H200: tokens that go to a mailbox, 16 rows with 24 warps, and
attention that keeps the next kernel waiting."""

import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from lowbit.quant.kernels import choose_tokens, wna16_gemv
from lowbit.quant.kernels.choose_tokens import ChoiceCall, Mailbox
from lowbit.quant.kernels.packed import PackedWeight
from tests.kernels import test_emulated
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.test_emulated import check_products, library, random_choice, random_weight

__all__ = ["library"]  # the fixture


def check_mailboxes(gpu: Gpu, seeds: range) -> None:
    """Greedy choices, several in a row: each step's tokens, and no earlier than the previous kernel's end."""
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        chosen = replace(random_choice(pick), noise=None)
        m, steps = len(chosen.tokens), pick.choice([1, 3, 8])
        wanted = replace(chosen, mailbox=Mailbox(torch.full((steps, m), -1), torch.full((m,), pick.randrange(20))))
        call: ChoiceCall = gpu.put(wanted)
        assert wanted.mailbox is not None
        assert call.mailbox is not None
        gpu.start(seed, (call.scores.shape, steps))
        for _ in range(3):
            choose_tokens.reference(wanted)
            gpu.late(call.scores)
            gpu.untouched(call.tokens, call.written, call.mailbox.tokens, call.mailbox.turns)
            # the emulator's memory is the host's, too
            with gpu, mock.patch.object(choose_tokens, "check_sent"):
                choose_tokens.choose(call)
            for name in ("tokens", "turns"):
                assert torch.equal(getattr(call.mailbox, name), getattr(wanted.mailbox, name)), name


def four_bits(pick: random.Random, n: int, k: int, bits: int, dtype: torch.dtype, pair_block: int) -> PackedWeight:
    return random_weight(pick, n, k, 4, dtype, pair_block)


def crowded_launch(pick: random.Random, kernel: ModuleType, m: int, bits: int = 0) -> Any:
    row_warps = pick.choice([1, 2, 4])
    k_warps = pick.randint(1, wna16_gemv.CROWD // 2 // row_warps)
    return wna16_gemv.GemvCut(1, row_warps, k_warps, pick.choice([1, 1, 2, 3]), wna16_gemv.CROWD)


def check_many_rows(gpu: Gpu, seeds: range) -> None:
    """9 to 16 rows of 4-bit integers with one scale a chunk."""
    changes = {"GROUPS": (128, 256, -1), "ROWS": {wna16_gemv: ((9, 16),)}}
    with mock.patch.multiple(test_emulated, random_weight=four_bits, random_launch=crowded_launch, **changes):
        check_products(gpu, "wna16_gemv", seeds)


@pytest.mark.parametrize(("check", "count"), [(check_mailboxes, 40), (check_many_rows, 40)])
def test_the_kernels_of_a_step_compute_the_reference(library: Path, check: Any, count: int) -> None:
    failure = failure_of(library, check, range(count))
    assert failure is None, failure


def test_tokens_in_the_place_of_the_next_step_are_found(library: Path) -> None:
    mutant = Mutant("choose_tokens.cu", "turn % args.steps", "(turn + 1) % args.steps")
    require_found(mutant, built(mutant), check_mailboxes, range(40))
