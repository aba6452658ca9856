"""Pairs of a row and an expert that it chose, and their products with dense weights in plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FEW_PAIRS = 256  # on a GPU; with more, each expert's rows are multiplied together


@dataclass(frozen=True)
class Chosen:
    """The experts of every row, as `route` returns them.

    experts  (m, top)  int32
    weights  (m, top)  float32
    count    number of experts of the layer
    """

    experts: Tensor
    weights: Tensor
    count: int

    @property
    def top(self) -> int:
        return self.experts.shape[1]


def products(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    """(pairs, n): row i of x (pairs, k) times expert experts[i] of w (count, n, k).

    Few pairs on a GPU are one product, which reads no number back and so can be captured; its copy of the weights is
    the price.
    """
    if x.is_cuda and len(x) <= FEW_PAIRS:
        return torch.bmm(w[experts.long()], x.unsqueeze(2)).squeeze(2)
    y = x.new_empty(len(x), w.shape[1])
    for expert, pairs in pairs_by_expert(experts, len(w)):
        y[pairs] = x[pairs] @ w[expert].T
    return y


def pairs_by_expert(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that was chosen, with the indices of its pairs, in their order."""
    order = experts.argsort(stable=True)
    first = 0
    for expert, pairs in enumerate(torch.bincount(experts, minlength=count).tolist()):
        if pairs:
            yield expert, order[first : first + pairs]
        first += pairs


def added(parts: Tensor, onto: Tensor | None = None) -> Tensor:
    """(m, n) float32: the sums of parts (m, top, n), taken in the order of a row's experts, then `onto` (m, n)."""
    total = torch.zeros_like(parts[:, 0], dtype=torch.float32)
    for part in parts.unbind(1):
        total = total + part
    return total if onto is None else total + onto.float()
