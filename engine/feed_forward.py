"""Feed-forwards as values: one for all tokens, or experts among which each token chooses, with or without one for all
besides."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.products import Hidden, Norm, Product
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.route import RouteCall, Rule, route
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.stack import Chosen, Experts


class FeedForward(Protocol):
    """residual + f(norm(x))."""

    @property
    def products(self) -> tuple[Product, ...]:
        """The products whose launches are planned, in the order of use."""

    @property
    def reader(self) -> Product | None:
        """The product that alone reads x, so that the norm before it may be fused; None if others read x too."""

    def with_products(self, products: tuple[Product, ...]) -> Self:
        """A copy with these products."""

    def step_nbytes(self, rows: int) -> float:
        """Bytes of weights that a step of so many rows reads; expected ones if they depend on the rows' choices."""

    def __call__(self, x: Hidden, residual: Tensor) -> Hidden:
        """residual (m, hidden) + the feed-forward of x (m, hidden)."""


@dataclass(frozen=True)
class DenseForward:
    """residual + down(act(up(norm(x)))), with the gate's rows stacked on those of up if there is a gate."""

    up: Product
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        return self.up, self.down

    @property
    def reader(self) -> Product:
        return self.up

    def with_products(self, products: tuple[Product, ...]) -> "DenseForward":
        return DenseForward(*products)

    def step_nbytes(self, rows: int) -> float:
        return self.up.linear.nbytes + self.down.linear.nbytes

    def __call__(self, x: Hidden, residual: Tensor) -> Hidden:
        return self.down.onto(residual, self.up(x))


@dataclass(frozen=True)
class Router:
    """The choice of each row's experts.

    weight      (experts, hidden)
    bias        (experts), or None
    correction  (experts) float32, added to scores for the choice alone, or None
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    rule: Rule

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.bias, self.correction) if tensor is not None)

    def __call__(self, x: Tensor) -> Chosen:
        """The experts of rows x (m, hidden)."""
        return Chosen(*route(RouteCall(x, self.weight, self.rule, self.bias, self.correction)))


@dataclass(frozen=True)
class MixedForward:
    """residual + the experts that each row chose, of norm(x), + a feed-forward of all rows, if there is one.

    shared       reads norm(x), and has no norm of its own
    shared_gate  (1, hidden): its sigmoid multiplies each row of `shared`; None: nothing does
    """

    norm: Norm | None
    router: Router
    experts: Experts
    shared: DenseForward | None = None
    shared_gate: Tensor | None = None

    @property
    def products(self) -> tuple[Product, ...]:
        return () if self.shared is None else self.shared.products

    @property
    def reader(self) -> None:
        return None

    def with_products(self, products: tuple[Product, ...]) -> "MixedForward":
        return self if self.shared is None else replace(self, shared=self.shared.with_products(products))

    def step_nbytes(self, rows: int) -> float:
        every = self.router.nbytes + (0 if self.shared is None else self.shared.step_nbytes(rows))
        if self.shared_gate is not None:
            every += self.shared_gate.nbytes
        return every + self.experts.nbytes_of_each * distinct_experts(rows, len(self.router.weight), self.router.rule)

    def __call__(self, x: Hidden, residual: Tensor) -> Hidden:
        normed = x.h if self.norm is None else ops.normalize(self.norm.of(Rows(x.h)))
        h = self.experts(normed, self.router(normed), residual)
        return Hidden(h) if self.shared is None else self.add_shared(normed, h, self.shared)

    def add_shared(self, normed: Tensor, h: Tensor, shared: DenseForward) -> Hidden:
        """h + the feed-forward of all rows."""
        inner = shared.up(normed)
        if self.shared_gate is not None:  # down is linear: its inputs may be multiplied in place of its outputs
            gate = torch.sigmoid(functional.linear(normed.float(), self.shared_gate.float()))
            inner = (inner.float() * gate).to(inner.dtype)
        return shared.down.onto(h, inner)


def distinct_experts(rows: int, experts: int, rule: Rule) -> float:
    """Expected number of distinct experts that so many rows choose, if each choice is equally likely."""
    return experts * (1 - (1 - rule.top / experts) ** rows)
