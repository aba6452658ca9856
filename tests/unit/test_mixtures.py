"""Candidates of a budget, and the exact choice among them."""

import random
from itertools import product

import numpy as np
import pytest

from benchmarks.fit_steps import fitted
from lowbit.calibrate.knapsack import solve
from lowbit.calibrate.mixtures import candidates_beside
from lowbit.export.engines.steps import COARSE, DENSE, FINE, INT8_INPUTS, STEPS
from lowbit.quant.scheme import name_of, parse_scheme


@pytest.mark.parametrize(
    ("scheme", "wanted"),
    [
        ("int4-g128", "int4-g128 int4-g64 int4-g32 int8 16bit"),
        ("uint4-g64", "uint4-g128 uint4-g64 uint4-g32 int8 16bit"),
        ("int3-g64", "int3-g128 int3-g64 int3-g32 int4-g128 int4-g64 int4-g32 int8 16bit"),
        ("int8", "int4-g128 int4-g64 int4-g32 int8 16bit"),
        ("nvfp4", "nvfp4 fp8 16bit"),
        ("nvfp4-a16", "nvfp4-a16 mxfp4-a16 fp8-a16 mxfp8-a16 16bit"),
        ("int8-a8", "int8-a8 int4-g128 16bit"),
        ("fp8-block", "fp8-block 16bit"),
    ],
)
def test_candidates_run_on_the_same_gpus_as_the_scheme(scheme, wanted):
    assert [name_of(each) for each in candidates_beside(parse_scheme(scheme))] == wanted.split()


def test_the_choice_is_the_best_of_all_combinations():
    draw = random.Random(0)
    for _ in range(200):
        sizes = [draw.randint(1, 4) for _ in range(draw.randint(1, 6))]
        costs = [[draw.randint(1, 20) for _ in range(size)] for size in sizes]
        values = [[draw.choice([0.0, 0.5, draw.random()]) for _ in range(size)] for size in sizes]
        budget = draw.randint(len(sizes), 20 * len(sizes))
        sums = [
            (sum(v[i] for v, i in zip(values, at, strict=True)), sum(c[i] for c, i in zip(costs, at, strict=True)))
            for at in product(*map(range, sizes))
        ]
        fitting = [value for value, cost in sums if cost <= budget]
        found = solve(costs, values, budget)
        assert (found is None) == (not fitting)
        if found is not None:
            assert sum(c[i] for c, i in zip(costs, found, strict=True)) <= budget
            assert sum(v[i] for v, i in zip(values, found, strict=True)) == pytest.approx(min(fitting), abs=1e-12)


def test_the_choice_is_that_of_dynamic_programming_over_every_cost():
    draw = np.random.default_rng(1)
    for budget in (220, 300, 500):
        costs = draw.integers(1, 30, (40, 6))
        values = draw.random((40, 6)) / costs
        best = np.full(budget + 1, 0.0)
        for cost, value in zip(costs, values, strict=True):
            moved = (np.concatenate((np.full(c, np.inf), best))[: budget + 1] for c in cost)
            best = np.minimum.reduce([each + v for each, v in zip(moved, value, strict=True)])
        found = solve(costs.tolist(), values.tolist(), budget)
        if found is None:
            assert costs.min(1).sum() > budget
        else:
            assert values[range(40), found].sum() == pytest.approx(best[budget], abs=1e-12)


def test_a_model_of_70b_is_solved_in_seconds():
    """320 sets of few shapes, seven schemes each: within 0.01% of the budget."""
    draw = np.random.default_rng(0)
    weights = [8192 * 10240, 8192 * 8192, 8192 * 57344, 28672 * 8192] * 80
    bits = np.array([4.125, 4.25, 4.5, 5.125, 6.125, 8.004, 16])
    costs = [[int(n * b / 8) for b in bits] for n in weights]
    scales = np.exp(draw.normal(0, 1.5, len(weights)))
    values = [(s * 4.0**-bits * np.exp(draw.normal(0, 0.1, len(bits)))).tolist() for s in scales]
    budget = int(sum(weights) * 4.7 / 8)
    found = solve(costs, values, budget)
    spent = sum(c[i] for c, i in zip(costs, found, strict=True))
    assert 0.9999 * budget < spent <= budget


def test_the_steps_are_those_of_the_rows():
    """The numbers of the table are those that the rows give, and each row is met within the error that is told."""
    for gpu, step in STEPS.items():
        found, errors = fitted(gpu)
        told = [step.block_us, *(step.rates[kernel] for kernel in (COARSE, FINE, DENSE, INT8_INPUTS))]
        assert [round(value, 1) for value in found] == told
        assert max(map(abs, errors)) == pytest.approx(step.error, abs=5e-4)
