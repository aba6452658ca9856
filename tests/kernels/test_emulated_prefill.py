"""Mistakes planted in the product of a prompt's rows, which the emulator's checks must find."""

from typing import Any

import pytest

from tests.kernels.emulator.build import Mutant
from tests.kernels.emulator.planted import built, require_found
from tests.kernels.test_emulated import check_products

MUTANTS = {
    "words expanded over those that are being multiplied, and their stage given away": Mutant(
        "wna16_prefill.cu", "      wgmma_wait<1>();  // the registers of the step before are free again\n", ""
    ),
    "x asked for before the other block has used it": Mutant(
        "wna16_prefill.cu", "barrier_init(empty(stage), kCluster * kConsumers / 32)", "barrier_init(empty(stage), 8)"
    ),
    "sums of the clusters before left out": Mutant(
        "wna16_prefill.cu", "      if (run.first > 0) add_sums<S>(launch, work, run, sums);\n", ""
    ),
    "y of a gated product stored over that of other rows of x": Mutant(
        "wna16_prefill.cu", "(kGated ? second * 8 : 0) + lane % 8", "lane % 8"
    ),
    "the scales of the other group": Mutant(
        "wna16_prefill.cu", "step % 2 * S::kStepGroups;", "(1 - step % 2) * S::kStepGroups;"
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(name: str) -> None:
    broken: Any = built(MUTANTS[name], ("wna16_prefill.cu",))
    found = "AssertionError|all threads wait"
    require_found(MUTANTS[name], broken, check_products, "wna16_prefill", range(40), expected=found)
