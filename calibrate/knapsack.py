"""An exact solver of the multiple-choice knapsack: one option of each class, for the least value within a budget.

Classes are taken one after another. A state is a sum of costs with the least sum of values that reaches it. States are
dropped where another one costs no more and is worth no less, and where even the relaxed problem (fractions of options
allowed) of the remaining classes cannot beat a solution that is known. Neither drops an optimum.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SLACK = 1e-10  # of the largest sum of values; sums of float64 in another order differ by less

Class = tuple[NDArray[np.int64], NDArray[np.float64]]  # costs, and values, of the options of a class


def solve(costs: Sequence[Sequence[int]], values: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """The option of each class with the least sum of values whose costs are at most `budget`; None if none fits.

    Of equal values the cheaper one is taken.
    """
    classes = [(np.array(c, np.int64), np.array(v, np.float64)) for c, v in zip(costs, values, strict=True)]
    if sum(int(cost.min()) for cost, _ in classes) > budget:
        return None
    price, known = _relaxed(classes, budget)
    slack = SLACK * sum(float(np.abs(value).max()) for _, value in classes)
    return _traced(_levels(classes, budget, price, known + slack))


def _hull(costs: NDArray[np.int64], values: NDArray[np.float64]) -> list[int]:
    """The options on the lower convex hull, by rising cost: each saves less per cost than the one before."""
    kept: list[int] = []

    def saving(low: int, high: int) -> float:
        return float((values[low] - values[high]) / (costs[high] - costs[low]))

    for option in np.lexsort((values, costs)).tolist():
        if kept and values[option] >= values[kept[-1]]:
            continue
        if kept and costs[option] == costs[kept[-1]]:
            kept.pop()
        while len(kept) > 1 and saving(kept[-2], option) >= saving(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _relaxed(classes: Sequence[Class], budget: int) -> tuple[float, float]:
    """The value of a unit of budget at the optimum of the relaxed problem, and the value of a solution near it."""
    hulls = [_hull(*each) for each in classes]
    left = budget - sum(int(costs[hull[0]]) for (costs, _), hull in zip(classes, hulls, strict=True))
    known = sum(float(values[hull[0]]) for (_, values), hull in zip(classes, hulls, strict=True))
    steps = [
        (float((values[low] - values[high]) / (costs[high] - costs[low])), place, int(costs[high] - costs[low]))
        for place, ((costs, values), hull) in enumerate(zip(classes, hulls, strict=True))
        for low, high in pairwise(hull)
    ]
    price, stopped = 0.0, set[int]()
    for saving, place, cost in sorted(steps, key=lambda step: (-step[0], step[1])):
        if place in stopped or cost > left:
            price = price or saving
            stopped.add(place)
        else:
            left, known = left - cost, known - saving * cost
    return price, known


Level = tuple[NDArray[np.int64], NDArray[np.int64]]  # of each state: the state before, and the option


def _levels(classes: Sequence[Class], budget: int, price: float, known: float) -> list[Level]:
    """The states after each class that may lead to a value of at most `known`, by rising cost and falling value."""
    least = [int(costs.min()) for costs, _ in classes]
    reduced = [float((values + price * costs).min()) for costs, values in classes]
    cost, value = np.zeros(1, np.int64), np.zeros(1)
    levels = []
    for place, (costs, values) in enumerate(classes):
        room = budget - sum(least[place + 1 :])
        bound = known + price * budget - sum(reduced[place + 1 :])
        sums = (cost[:, None] + costs).reshape(-1)
        worth = (value[:, None] + values).reshape(-1)
        (open_,) = np.nonzero((sums <= room) & (worth + price * sums <= bound))
        order = open_[np.lexsort((worth[open_], sums[open_]))]
        before = np.minimum.accumulate(np.concatenate(([np.inf], worth[order])))[:-1]
        order = order[worth[order] < before]
        cost, value = sums[order], worth[order]
        levels.append((order // len(costs), order % len(costs)))
    return levels


def _traced(levels: list[Level]) -> list[int]:
    """The options that lead to the last state."""
    chosen, state = [], -1
    for before, option in reversed(levels):
        chosen.append(int(option[state]))
        state = int(before[state])
    return chosen[::-1]
