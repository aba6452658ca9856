"""latent_attention.cu on the CPU, lane by lane, with planted mistakes that must be found."""

import random
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from lowbit.quant.kernels import latent_attention
from lowbit.quant.kernels.latent_attention import MAX_SPLITS
from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.device import Gpu, failure_of
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.test_emulated import library
from tests.kernels.test_latent_attention import assert_as_the_reference, copied, make_call

__all__ = ["library"]  # the fixture

SOURCE = "latent_attention.cu"
BOUNDARIES = (0, 1, 62, 63, 64, 127, 128, 200)


def check_latent(gpu: Gpu, seeds: range, dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)) -> None:
    """Rows that the product before writes arrive late; the newest positions have been NaN, and those behind them."""
    for seed in seeds:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        with mock.patch("tests.kernels.test_latent_attention.CONTEXT", 201):
            positions = [pick.choice(BOUNDARIES) for _ in range(pick.choice([1, 2, 3]))]
            call = make_call(positions, pick.choice(dtypes), heads=pick.choice([1, 7, 16, 17]))
        call = replace(call, dependent=pick.random() < 0.6, norm=call.norm if pick.random() < 0.8 else None)
        wanted, call = copied(call), gpu.put(call)
        splits = pick.randint(1, MAX_SPLITS)
        gpu.start(seed, (call.q.shape, positions, splits))
        for part in (call.cache.k, call.cache.v):
            for start, position in zip(call.starts.tolist(), positions, strict=True):
                part[start + position : start + 202].view(torch.uint8).fill_(0xFF)
        gpu.late(call.q, call.compressed, call.q_turned, call.turned)
        slots = (call.starts + call.positions).tolist()
        gpu.untouched(*(part[slot] for part in (call.cache.k, call.cache.v) for slot in slots))
        with gpu, mock.patch.object(latent_attention, "choose_splits", mock.Mock(return_value=splits)):
            out = latent_attention.attend(call)
        assert_as_the_reference(call, out, wanted)


def test_the_kernel_computes_the_reference(library: Path) -> None:
    failure = failure_of(library, check_latent, range(16))
    assert failure is None, failure


def check_rows_alone(gpu: Gpu) -> None:
    """A row has the bits that it has in a batch, in any order of the warps."""
    call = make_call([150, 64, 3], torch.float16, heads=16)
    results = []
    for rows in ([0, 1, 2], [0], [1], [2]):
        views = {
            n: getattr(call, n)[rows] for n in ("q_turned", "compressed", "turned", "turns", "starts", "positions")
        }
        part = gpu.put(replace(copied(call), q=call.q[:, rows], **views))
        gpu.start(sum(rows), rows)
        with gpu, mock.patch.object(latent_attention, "choose_splits", mock.Mock(return_value=3)):
            results.append(latent_attention.attend(part))
    for row in range(3):
        assert torch.equal(results[0][:, row], results[1 + row][:, 0])


def test_a_row_does_not_see_its_batch(library: Path) -> None:
    failure = failure_of(library, check_rows_alone)
    assert failure is None, failure


MISTAKES = {
    "queries read before they are made": (
        "  __syncthreads();\n  if (owns && first_head == 0)",
        "  if (owns && first_head == 0)",
    ),
    "the newest position read from the cache": ("position == length - 1 ? newest : k", "false ? newest : k"),
    "weights of an earlier maximum": ("running.sum[h] * memory.shrink[head]", "running.sum[h]"),
    "shares read before they are made": (
        "    memory.totals[head] = total;\n  }\n  __syncthreads();\n",
        "    memory.totals[head] = total;\n  }\n",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name: str) -> None:
    broken = built(Mutant(SOURCE, *MISTAKES[name]), (SOURCE,), ("LOWBIT_T=__nv_bfloat16",))
    require_found(name, broken, check_latent, range(16), (torch.float16,))
