"""Distillation: tuning all that is stored on the output of the whole model.

Blocks are rounded one by one against their own outputs; the sum of their errors only shows at the end of the model.
Here every scale, every unquantized tensor inside the blocks (norms, biases) and, if asked for, every code is tuned to
bring the quantized model's next-token distribution close to the unquantized one's: Adam on the Kullback-Leibler
divergence (Chen et al., EfficientQAT, ACL 2025, section 3.3, which tunes scales on the task's loss).

Scales and codes have float32 values that are rounded to what a file can hold in each step; in the backward pass
rounding counts as the identity. A code's value begins where the rounder left it between two codes (BlockOutcome's
remainders), so that those flip first that were nearly undecided.

Memory holds the whole model in half precision and its codes, a byte each, and gradients of one block at a time; 16
bytes a weight more if codes are tuned. Host memory holds the states that enter and leave the model, of all tokens. A
step runs forward and keeps each block's input, then backward block by block, recomputing each block.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.blocks import BATCH_TOKENS, BlockLoop
from lowbit.calibrate.cache import scales_by_module
from lowbit.calibrate.job import Job
from lowbit.calibrate.outcome import BlockOutcome, hold, quantized_inputs
from lowbit.calibrate.report import Stopwatch
from lowbit.models.cached import rounded_cache
from lowbit.models.imagetext import Batch
from lowbit.models.products import taped, weight_view
from lowbit.models.states import States, joined, pulled
from lowbit.models.walk import Walk
from lowbit.progress import Part, Step, tell
from lowbit.quant import numerics
from lowbit.quant.qtensor import QTensor

RATE = 1e-3  # relative to the size of each value or tensor; falls to 0 along a cosine
WARM_UP = 10  # steps until the full rate
CODE_RATE = 3e-3  # of codes, in steps of the grid
TUNING = "tuning scales and norms"
BETAS, EPSILON = (0.9, 0.99), 1e-12


class Adam:
    """Adam on one tensor, in float32: torch.optim.Adam on the change in units of `size`.

    value  the tuned tensor
    size   (or broadcastable)  unit of the rate: a step moves `value` by about rate * size
    """

    def __init__(self, value: Tensor, size: Tensor) -> None:
        self._start, self._size = value.float(), size
        self._change = torch.zeros_like(self._start)
        self._optimizer = torch.optim.Adam([self._change], betas=BETAS, eps=EPSILON, fused=True)

    @property
    def value(self) -> Tensor:
        return self._start + self._change * self._size

    def step(self, gradient: Tensor, rate: float) -> None:
        """One step; `gradient` is the gradient of the loss with respect to `value`."""
        self._change.grad = gradient.float() * self._size
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()


class TunedLinear:
    """A rounded weight with tuned scales, tuned minima if it has any, and, if it has a remainder, tuned codes."""

    def __init__(self, weight: QTensor, remainder: Tensor | None, device: str) -> None:
        self._weight = weight.to(device)
        scales = self._weight.scales.float()
        self._scales = Adam(scales, scales)
        minima = self._weight.zeros if weight.scheme.weights.minima else None
        self._minima = None if minima is None else Adam(minima, scales)
        self._values = None
        if remainder is not None:
            start = self._weight.position(remainder.to(device))
            self._values = Adam(start, torch.as_tensor(weight.scheme.number.spacing(start) * CODE_RATE / RATE))

    def weight(self) -> QTensor:
        """The weight with its scales and codes rounded as stored."""
        old, scheme = self._weight, self._weight.scheme
        scales = numerics.as_stored(self._scales.value, scheme, old.scales.dtype)
        minima = None
        if self._minima is not None:
            minima = numerics.stored_minima(self._minima.value, scheme, torch.float16)
        if self._values is None:
            return old.iterate(scales, zeros=minima)
        held = None if scheme.weights.minima else old.zeros
        zeros = None if held is None else numerics.per_weight(held, scheme, old.codes)
        return old.iterate(scales, scheme.number.encode(self._values.value, zeros), minima)

    def step(self, weight: QTensor, gradient: Tensor, rate: float) -> None:
        """One step; `gradient` (n, k) is the gradient of the loss with respect to the rounded weight, `weight`."""
        scheme = weight.scheme
        by_row = numerics.grouped(weight.values() * gradient, scheme).sum(-1)
        self._scales.step(numerics.per_scale(by_row, scheme), rate)
        if self._minima is not None:
            self._minima.step(-numerics.grouped(gradient.float(), scheme).sum(-1), rate)
        if self._values is not None:
            self._values.step(gradient * numerics.per_weight(weight.scales, scheme, gradient), rate)


class TunedBlock:
    """A loaded block whose scales, norms and biases are tuned. The module always holds their current values."""

    def __init__(self, walk: Walk, index: int, outcome: BlockOutcome, attentions: Mapping[str, str]) -> None:
        """`attentions`  of the plan, which name the scales of the block's cache"""
        self._walk, self._index, self._outcome = walk, index, outcome
        self._cache = scales_by_module(outcome.cache, attentions)
        self._block = walk.skeleton.blocks[index]
        self._specs = {spec.name: spec for spec in self._block.linears}
        self._linears = {
            name: TunedLinear(weight, outcome.remainders.get(name), walk.device)
            for name, weight in outcome.weights.items()
        }
        self._others = {name: _others_adam(value.to(walk.device)) for name, value in outcome.kept.items()}
        self._refresh()

    def outcome(self) -> BlockOutcome:
        """The tuned block, on the CPU."""
        weights = {name: weight.checked().to("cpu") for name, weight in self._weights.items()}
        kept = {name: other.value.to("cpu", self._outcome.kept[name].dtype) for name, other in self._others.items()}
        return replace(self._outcome, weights=weights, kept=kept, remainders={})

    def run(self, states: States) -> States:
        """The block's outputs."""
        rounded = rounded_cache(self._walk.skeleton, self._cache)
        with quantized_inputs(self._walk, self._index, self._outcome.weights), rounded:
            return self._walk.run(self._index, states)

    def backward(self, states: States, gradient: list[Tensor | None], rate: float) -> list[Tensor | None]:
        """The gradient with respect to the block's input `states`, from the gradient of its output. Tunes the block on
        the way."""
        names = {spec.placement.parameter for spec in self._specs.values()} | {
            self._block.tensors[name].parameter for name in self._others
        }
        parameters = {name: self._walk.skeleton.model.get_parameter(name) for name in sorted(names)}
        with taped(parameters.values()):
            entering = pulled(self.run, states, gradient)
            ranks.total_gradients(parameters.values())
            self._step({name: parameter.grad for name, parameter in parameters.items()}, rate)
        self._refresh()
        return entering

    @torch.no_grad()
    def _step(self, gradients: dict[str, Tensor | None], rate: float) -> None:
        """One step; `gradients` are by the model's parameters, None without a gradient."""
        for name, linear in self._linears.items():
            grad = gradients[self._specs[name].placement.parameter]
            if grad is not None:
                linear.step(self._weights[name], weight_view(grad, self._specs[name]), rate)
        for name, other in self._others.items():
            place = self._block.tensors[name]
            grad = gradients[place.parameter]
            if grad is not None:
                other.step(place.view(grad), rate)

    def _refresh(self) -> None:
        """Load the tuned values into the module."""
        self._weights = {name: linear.weight() for name, linear in self._linears.items()}
        hold(self._walk, self._index, self._weights, {name: other.value for name, other in self._others.items()})


def _others_adam(value: Tensor) -> Adam:
    wide = value.float()
    return Adam(wide, wide.square().mean().sqrt().clamp(min=1e-8))


def distill(
    job: Job, loop: BlockLoop, outcomes: list[BlockOutcome], on_step: Callable[[float], None]
) -> list[BlockOutcome]:
    """The `outcomes` of the first pass, tuned together in the recipe's `distill_steps` steps.

    loop     the first pass at its end: it holds the tokens and the outputs of the unquantized model's last block
    on_step  called with each step's loss: the mean divergence per token, in nats

    Each step takes about the recipe's `distill_tokens`, of calibration or of the loop's further windows. The parts that
    they fall in come in random order; all are used once before any is used again.
    """
    walk, steps = loop.walk, job.recipe.distill_steps
    tell(Step(TUNING, 0, steps))
    loop.to_host()
    tokens = job.recipe.distill_tokens
    own = [_own_part(batch, exact) for batch, exact in chain(_of_steps(loop, tokens), _further_steps(loop, tokens))]
    entering = [states.to("cpu") for states in walk.start([batch for batch, _, _ in own])]
    generator = torch.Generator().manual_seed(job.recipe.seed)
    order: list[int] = []
    with ExitStack() as stack:
        for index in range(len(outcomes)):
            tell(Part("loading blocks", index + 1, len(outcomes)))
            stack.enter_context(walk.loaded(index))
        attentions = job.plan.attentions
        blocks = [TunedBlock(walk, index, outcome, attentions) for index, outcome in enumerate(outcomes)]
        stack.enter_context(walk.head_loaded())
        for step in range(steps):
            order = order or torch.randperm(len(own), generator=generator).tolist()
            batch = order.pop()
            states = [entering[batch].to(walk.device)]
            for number, block in enumerate(blocks, 1):
                tell(Part("forward through blocks", number, len(blocks)))
                with torch.no_grad():
                    states.append(block.run(states[-1]))
            left = states.pop()
            loss, slope = _divergence(walk, *own[batch], left.hidden)
            gradient = _of_hidden(slope, left)
            rate = RATE * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for number, block in enumerate(reversed(blocks), 1):
                tell(Part("backward through blocks", number, len(blocks)))
                gradient = block.backward(states.pop(), gradient, rate)
            on_step(float(ranks.total(loss)))
        return [block.outcome() for block in blocks]


def _of_steps(loop: BlockLoop, tokens: int) -> Iterator[tuple[Batch, States]]:
    """The calibration tokens of each step, about `tokens` of them, and their exact states: the loop's batches of text
    together, each sample with images on its own."""
    pairs = list(zip(loop.batches, loop.exact, strict=True))
    texts = [(batch, exact) for batch, exact in pairs if isinstance(batch, Tensor)]
    size = max(tokens // texts[0][0].numel(), 1) if texts else 1
    for begun in range(0, len(texts), size):
        batches, exact = zip(*texts[begun : begun + size], strict=True)
        yield (torch.cat(batches), joined(exact)) if len(batches) > 1 else texts[begun]
    yield from ((batch, exact) for batch, exact in pairs if not isinstance(batch, Tensor))


def _further_steps(loop: BlockLoop, tokens: int) -> Iterator[tuple[Batch, States]]:
    """The same of the loop's further windows."""
    if not len(loop.further):
        return
    batches = loop.further.split(max(tokens // loop.further.shape[1], 1))
    yield from zip(batches, loop.exact_of(batches), strict=True)


def rehearse(job: Job, loop: BlockLoop, outcome: BlockOutcome) -> float:
    """The expected seconds of a step of `distill`, from two steps of the first block, which has just been rounded.

    outcome  of that block; it stays as it is

    The second step counts: the first one loads libraries.
    """
    walk = loop.walk
    batch, exact, share = _own_part(*next(_of_steps(loop, job.recipe.distill_tokens)))
    [entering] = walk.start([batch])
    with walk.loaded(0), walk.head_loaded():
        block, watch = TunedBlock(walk, 0, outcome, job.plan.attentions), Stopwatch(walk.device)
        for _ in range(2):
            with watch.phase("a step of tuning, tried"), torch.no_grad():
                left = block.run(entering)
            with watch.phase("the head"):
                _, slope = _divergence(walk, batch, exact, share, left.hidden)
            with watch.phase("its way back"):
                block.backward(entering, _of_hidden(slope, left), rate=0.0)
    head = watch.seconds.pop("the head")
    return head + len(walk.skeleton.blocks) * sum(watch.seconds.values())


def _of_hidden(slope: Tensor, states: States) -> list[Tensor | None]:
    """The gradient of the flow of `states`, of which only the hidden states have one."""
    return [slope, *(None for _ in states.flow[1:])]


def _own_part(batch: Batch, exact: States) -> tuple[Batch, Tensor, float]:
    """This rank's sequences of a batch, their exact states, and their share of the batch.

    A rank without sequences takes the first one with share 0, so that all ranks run the same steps.
    """
    size = exact.shape[0]
    rows = ranks.mine(range(size))
    own = batch[rows or [0]] if isinstance(batch, Tensor) else batch
    return own, exact.hidden[rows or [0]], len(rows) / size


def _divergence(walk: Walk, batch: Batch, exact: Tensor, share: float, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`share` times the mean divergence of the logits of `hidden` from those of `exact`, in nats per token, float64 ();
    and its gradient with respect to `hidden`. At most BATCH_TOKENS tokens have logits at a time."""
    if not isinstance(batch, Tensor):
        return _divergence_at_once(walk, batch, exact, share, hidden)
    size = max(BATCH_TOKENS // batch.shape[1], 1)
    parts = zip(batch.split(size), exact.split(size), hidden.split(size), strict=True)
    found = [_divergence_at_once(walk, ids, a, share * len(ids) / len(batch), b) for ids, a, b in parts]
    losses, slopes = zip(*found, strict=True)
    return torch.stack(losses).sum(), torch.cat(slopes)


def _divergence_at_once(walk: Walk, batch: Batch, exact: Tensor, share: float, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """As `_divergence`, for all tokens at once."""
    with torch.no_grad():
        wanted = walk.logits_of(batch, exact).float().log_softmax(-1)
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        found = walk.logits_of(batch, hidden).float().log_softmax(-1)
        loss = share * (wanted.exp() * (wanted - found)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach().double().cpu(), gradient
