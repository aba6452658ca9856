"""Feed-forwards as values: one for all tokens, or experts among which each token chooses, with or without one for all
besides."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.products import Consumer, HalfNorm, Hidden, Norm, Product, is_plain_rms
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.pairs import FEW_PAIRS, Chosen
from lowbit.quant.kernels.problem import PART, PARTS, Deferred
from lowbit.quant.kernels.registry import defers
from lowbit.quant.kernels.route_experts import RouteCall, Rule
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.stack import FEW_ROWS, Experts
from lowbit.quant.kernels.weight import ALONE, Hints, Linear, Packed, prepared
from lowbit.quant.kernels.wna16_experts import DownCall


class FeedForward(Protocol):
    """residual + f(norm(x))."""

    @property
    def products(self) -> tuple[Product, ...]:
        """The products with weights that all rows share, in the order of use."""

    @property
    def first(self) -> Tensor | None:
        """The weight that is read first, if it is contiguous; to be prefetched."""

    @property
    def reader(self) -> Product | None:
        """The product that reads x through a norm that may be fused; None if there is none."""

    def planned(self, following: Product, dependent: bool, shared: bool) -> Self:
        """A copy with launch hints: see layers.planned. `following` reads the result."""

    def captures(self, rows: int) -> bool:
        """True if a step of so many rows may be captured: the host reads no number of the device."""

    @property
    def experts_count(self) -> int:
        """Number of experts; 0 without a choice."""

    def step_nbytes(self, distinct: int) -> int:
        """Bytes of weights that a step reads which chooses so many experts."""

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
    def first(self) -> Tensor | None:
        return self.up.weight.bulk

    @property
    def reader(self) -> Product:
        return self.up

    def planned(self, following: Product, dependent: bool, shared: bool) -> "DenseForward":
        up = self.up.hinted(Hints(dependent, self.down.weight.bulk))
        down = self.down.hinted(Hints(dependent, following.weight.bulk))
        return DenseForward(up, down.begun_for(following) if shared else down)

    experts_count = 0

    def captures(self, rows: int) -> bool:
        return True

    def step_nbytes(self, distinct: int) -> int:
        return self.up.linear.nbytes + self.down.linear.nbytes

    def __call__(self, x: Hidden, residual: Tensor) -> Hidden:
        return self.down.onto(residual, self.up(x, reader=self.down))


@dataclass(frozen=True)
class Router:
    """The choice of each row's experts.

    weight      (experts, hidden)
    bias        (experts), or None
    correction  (experts) float32, added to scores for the choice alone, or None
    factors     (experts) float32, of the weights of a row's experts, or None
    norm        of its rows, or None: that of the experts
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    rule: Rule
    factors: Tensor | None = None
    norm: Norm | None = None

    @property
    def nbytes(self) -> int:
        every = self.weight, self.bias, self.correction, self.factors
        return sum(tensor.nbytes for tensor in every if tensor is not None)

    def __call__(self, x: Tensor, deferred: Deferred | None, dependent: bool) -> Chosen:
        """The experts of rows x (m, hidden); `deferred`: the norm still to finish on them."""
        call = RouteCall(x, self.weight, self.rule, self.bias, self.correction, deferred, dependent, self.factors)
        return Chosen(*ops.route_experts(call), len(self.weight))


@dataclass(frozen=True)
class MixedForward:
    """residual + the experts that each row chose, of norm(x), + a feed-forward of all rows, if there is one.

    shared       has the same norm
    shared_gate  (1, hidden): its sigmoid multiplies each row of `shared`; None: nothing does
    consumer     the product that reads the result, if the norm in between may be fused
    """

    norm: Norm
    router: Router
    experts: Experts
    shared: DenseForward | None = None
    shared_gate: Tensor | None = None
    hints: Hints = ALONE
    consumer: Consumer | None = None

    @property
    def products(self) -> tuple[Product, ...]:
        return () if self.shared is None else self.shared.products

    @property
    def first(self) -> Tensor:
        return self.router.weight

    @property
    def reader(self) -> Product | None:
        weight = self.weight_of_one
        if weight is None or self.router.weight.dtype != weight.dtype:
            return None
        return Product(Linear(weight), self.norm, rows_alone=True)

    @property
    def weight_of_one(self) -> Packed | None:
        """Gate and up of the first expert, if the kernel of few rows multiplies with it."""
        weights = self.experts.weights
        return None if weights is None else Packed(**vars(replace(weights[0], n=self.experts.up.weight.n)))

    def planned(self, following: Product, dependent: bool, shared: bool) -> "MixedForward":
        if self.shared is not None:
            hints = Hints(dependent, self.shared.up.weight.bulk)
            return replace(self, hints=hints, shared=self.shared.planned(following, dependent, shared))
        planned = replace(self, hints=Hints(dependent, following.weight.bulk), consumer=None)
        begins = self.experts.weights is not None and self.experts.down.weight.n % (PART * PARTS) == 0
        if not shared or not begins or not is_plain_rms(following, self.norm.weight.dtype):
            return planned
        assert following.norm is not None
        return replace(planned, consumer=Consumer(following.norm, following.weight))

    def captures(self, rows: int) -> bool:
        most = FEW_PAIRS // self.router.rule.top if self.experts.weights is None else FEW_ROWS
        return rows <= most

    @property
    def experts_count(self) -> int:
        return len(self.router.weight)

    def step_nbytes(self, distinct: int) -> int:
        every = self.router.nbytes + (0 if self.shared is None else self.shared.step_nbytes(0))
        if self.shared_gate is not None:
            every += self.shared_gate.nbytes
        return every + self.experts.nbytes_of_each * distinct

    def rows_of(self, x: Hidden) -> tuple[Tensor, Deferred | None]:
        """The rows that experts multiply, and the norm still to finish on them."""
        if x.half is not None and x.half.norm is self.norm:
            return x.half.z, x.half.deferred
        return ops.normalize(self.norm.of(Rows(x.h, dependent=self.hints.dependent))), None

    def chosen_for(self, x: Hidden) -> Chosen:
        """The experts of the rows."""
        return self.chosen_of(x, *self.rows_of(x))

    def chosen_of(self, x: Hidden, rows: Tensor, deferred: Deferred | None) -> Chosen:
        """The experts of x, whose `rows_of` are these."""
        if self.router.norm is not None:
            rows, deferred = ops.normalize(self.router.norm.of(Rows(x.h, dependent=self.hints.dependent))), None
        return self.router(rows, deferred, self.hints.dependent)

    def __call__(self, x: Hidden, residual: Tensor | None) -> Hidden:
        (rows, deferred), dependent = self.rows_of(x), self.hints.dependent
        chosen = self.chosen_of(x, rows, deferred)
        if self.experts.weights is None or len(rows) > FEW_ROWS:
            whole = rows if deferred is None else ops.normalize(self.norm.of(Rows(x.h)))
            out = Hidden(self.experts.in_parts(whole, chosen, residual))
        else:
            inner = self.experts.begun(rows, chosen, dependent, deferred)
            out = self.ended(self.experts.ended(inner, chosen, residual, self.hints))
        return out if self.shared is None else self.with_shared(x, out.h, self.shared)

    def ended(self, call: DownCall) -> Hidden:
        """The result of `call`, with the next norm half applied if that saves a launch."""
        if self.consumer is None or not self.shares(self.consumer, len(call.x)):
            return Hidden(ops.experts_down(call))
        norm = self.consumer.norm
        h, z, squares = ops.experts_down_deferring(call, norm.weight)
        return Hidden(h, HalfNorm(norm, z, Deferred(squares, norm.eps)))

    def shares(self, consumer: Consumer, m: int) -> bool:
        """True if fusing the norm into the experts and `consumer` is faster than a norm kernel."""
        problem = consumer.weight.problem(m)
        return problem is not None and defers(problem)

    def with_shared(self, x: Hidden, h: Tensor, shared: DenseForward) -> Hidden:
        """h + the feed-forward of all rows."""
        inner, down = shared.up(x), shared.down
        if self.shared_gate is not None:  # down is linear: its inputs may be multiplied in place of its outputs
            normed = ops.normalize(self.norm.of(Rows(x.h)))
            gate = torch.sigmoid(functional.linear(normed.float(), self.shared_gate.float()))
            inner = prepared(Rows(inner, activation=down.before))
            inner, down = (inner.float() * gate).to(inner.dtype), replace(down, before="none")
        return down.onto(h, inner)


@dataclass(frozen=True)
class BesideForward:
    """keeps * residual + after(dense(x) + behind(mixed(x))): experts beside a feed-forward of all tokens, each with
    norms of its own before and behind it (Gemma 4).

    dense   with the norm behind it; mixed  without
    after   the norm behind the sum, times `keeps`
    """

    dense: DenseForward
    mixed: MixedForward
    behind: Norm
    after: Norm
    keeps: float

    @property
    def products(self) -> tuple[Product, ...]:
        return self.dense.products

    @property
    def first(self) -> Tensor:
        return self.mixed.first

    reader = None

    def planned(self, following: Product, dependent: bool, shared: bool) -> "BesideForward":
        mixed = self.mixed.planned(self.dense.up, dependent, shared=False)
        return replace(self, mixed=mixed, dense=self.dense.planned(following, dependent, shared=False))

    def captures(self, rows: int) -> bool:
        return self.mixed.captures(rows)

    @property
    def experts_count(self) -> int:
        return self.mixed.experts_count

    def step_nbytes(self, distinct: int) -> int:
        return self.dense.step_nbytes(0) + self.mixed.step_nbytes(distinct)

    def __call__(self, x: Hidden, residual: Tensor) -> Hidden:
        dependent = self.mixed.hints.dependent
        mixed = ops.normalize(self.behind.of(Rows(self.mixed(x, None).h, dependent=dependent)))
        both = ops.normalize(self.after.of(Rows(self.dense(x, mixed).h, dependent=dependent)))
        return Hidden(torch.add(both, residual, alpha=self.keeps))
