"""A budget of bits, bytes or milliseconds, distributed over schemes of fused linears for the least divergence.

The value of a scheme is the divergence of the model's output, in nats per token, with that set alone rounded. To second
order it is the Fisher information: let e be the change in the log-probability of a token drawn from the model itself,
to first order in the error of the block's output; the divergence is the mean of e^2 / 2, with each token's error taken
alone. One backward pass for each draw serves all sets and schemes. The choice is exact (calibrate/knapsack.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.blocks import BATCH_TOKENS
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.job import Job
from lowbit.calibrate.knapsack import solve
from lowbit.calibrate.mixtures import Mixed, Option, candidates_beside
from lowbit.calibrate.plan import make_plan, scheme_pattern
from lowbit.calibrate.price import Bits, Price, price_of
from lowbit.errors import RecipeError
from lowbit.models.imagetext import Batch, ids_of
from lowbit.models.products import InputRounding, LinearInputs, rounded_inputs, weight_view
from lowbit.models.skeleton import LinearSpec
from lowbit.models.states import States, pulled
from lowbit.models.walk import Walk
from lowbit.progress import Step, tell
from lowbit.quant.algos.clip import round_plainly
from lowbit.quant.naming import fused_set, largest_by_parent, parent_set
from lowbit.quant.numerics import divisor_of, input_rounding, input_scale_of
from lowbit.quant.scheme import Scheme, name_of, parse_choice

PROBE_TOKENS = 6144  # by 2048 a mixture of 4.5 bits lost 0.003 nats more of the demo model
DRAWS = 4  # tokens drawn at each position: the error falls, and rounding and running blocks take the most time

Sets = dict[str, list[LinearSpec]]
Prices = dict[str, list[tuple[Scheme | None, int]]]  # of each candidate of each set
Effects = dict[str, list[Tensor]]  # likewise: the divergence (tokens,) float64


def spend(job: Job, calibration: CalibrationSet) -> Job:
    """`job` with a scheme for every fused set, within the recipe's budget.

    Sets named in the recipe's `schemes` keep their scheme. RecipeError says the least possible if the budget is below
    it, or if the format allows one scheme only.
    """
    if job.format.uniform:
        raise RecipeError(f"format {job.recipe.format} holds one scheme: budgets are for compressed-tensors")
    budget = _budget(job)
    budget.require_possible()
    effects = _measured(job, calibration, budget.prices)
    options = {
        key: [Option(*pair, *_mean(effect)) for pair, effect in zip(found, effects[key], strict=True)]
        for key, found in budget.prices.items()
    }
    places = solve(
        [[option.price for option in found] for found in options.values()],
        [[option.divergence for option in found] for found in options.values()],
        budget.price.limit(budget.weights) - budget.fixed,
    )
    assert places is not None, "the least was checked"
    picked = dict(zip(options, places, strict=True))
    chosen = {key: options[key][place] for key, place in picked.items()}
    schemes = {scheme_pattern(key): name_of(option.scheme) for key, option in chosen.items()}
    recipe = replace(job.recipe, schemes=job.recipe.schemes | schemes)
    numbers = budget.told(budget.fixed + sum(option.price for option in chosen.values())), budget.told(budget.least)
    whole = _mean(sum((effects[key][place] for key, place in picked.items()), torch.zeros(1)))
    mixture = Mixed(budget.price.unit, budget.price.target, *numbers, *whole, chosen, options)
    return replace(job, recipe=recipe, plan=make_plan(job.skeleton, recipe), mixture=mixture)


def average_bits(job: Job) -> float:
    """Average stored bits per linear weight with a scheme or in 16 bits by the recipe, including scales and zeros."""
    price, sets = Bits(job, 0.0), _sets(job)
    bits = sum(price.of(specs, job.plan.schemes.get(specs[0].name)) for specs in sets.values())
    return price.told(bits, _weights(sets))


@dataclass(frozen=True)
class _Budget:
    """A budget before anything is measured.

    price    the unit that it is counted in
    weights  number of weights in all sets
    fixed    price of all that has no choice
    prices   candidates of each set that has one
    """

    price: Price
    weights: int
    fixed: int
    prices: Prices

    @property
    def least(self) -> int:
        """The least price that the candidates allow."""
        return self.fixed + sum(min(price for _, price in found) for found in self.prices.values())

    def told(self, price: int) -> float:
        """A price in the budget's unit."""
        return self.price.told(price, self.weights)

    def require_possible(self) -> None:
        """RecipeError with the least possible if the budget is below it."""
        if self.least <= self.price.limit(self.weights):
            return
        names = {name_of(scheme) for found in self.prices.values() for scheme, _ in found}
        target, least = (f"{value:.15g}" for value in (self.price.target, self.price.enough(self.least, self.weights)))
        raise RecipeError(
            f"a budget of {target} {self.price.unit}: this model needs {least} at least, with "
            f"{', '.join(sorted(names))}; name smaller ones with --candidates"
        )


def _budget(job: Job) -> _Budget:
    """The recipe's budget. RecipeError if a set has no candidate."""
    price, sets, prices, fixed = price_of(job), _sets(job), Prices(), 0
    for key, specs in sets.items():
        if specs[0].name in job.plan.named:
            fixed += price.of(specs, job.plan.schemes.get(specs[0].name)) or 0
            continue
        found = [(scheme, price.of(specs, scheme)) for scheme in _candidates(job, specs)]
        prices[key] = [(scheme, cost) for scheme, cost in found if cost is not None]
        if not prices[key]:
            raise RecipeError(f"candidates: none of {', '.join(job.recipe.candidates)} suits {key}")
    return _Budget(price, _weights(sets), fixed + price.rest(), prices)


def _sets(job: Job) -> Sets:
    """The linears that are quantized, or in 16 bits by choice, by fused set."""
    sets: Sets = {}
    for name, spec in job.linears.items():
        if name in job.plan.schemes or name in job.plan.unrounded:
            sets.setdefault(fused_set(name), []).append(spec)
    return sets


def _weights(sets: Sets) -> int:
    return sum(spec.n * spec.k for specs in sets.values() for spec in specs)


def _candidates(job: Job, specs: Sequence[LinearSpec]) -> list[Scheme | None]:
    """The schemes that a set may have: each candidate of the recipe as it fits the set, if the format can store it."""
    recipe, fmt, shapes = job.recipe, job.format, [(spec.n, spec.k) for spec in specs]
    wanted = [parse_choice(text) for text in recipe.candidates] or candidates_beside(recipe.default_scheme)
    found = [None if scheme is None else scheme.fitting(shapes) for scheme in wanted]
    fitting = [each for each, scheme in zip(found, wanted, strict=True) if each is not None or scheme is None]

    def held(scheme: Scheme | None) -> bool:
        return scheme is None or not (
            fmt.reason_against(scheme) or any(fmt.reason_against_shape(scheme, *shape) for shape in shapes)
        )

    return list(dict.fromkeys(filter(held, fitting)))


def _mean(effect: Tensor) -> tuple[float, float]:
    """The mean of divergences (tokens,), and its standard error."""
    error = float(effect.std() / len(effect) ** 0.5) if len(effect) > 1 else 0.0
    return float(effect.mean()), error


@torch.no_grad()
def _measured(job: Job, calibration: CalibrationSet, prices: Prices) -> Effects:
    """The effects of every candidate, measured on one batch of calibration tokens, last block first.

    Samples with images are not batched: if there is no text, the longest one is measured.
    """
    batch = max(calibration.batches(PROBE_TOKENS), key=lambda batch: ids_of(batch).numel())
    walk = Walk(job.skeleton, job.device, torch.float32)
    entering = walk.start([batch])
    for index in range(len(job.skeleton.blocks)):
        with walk.loaded(index):
            entering.append(walk.run(index, entering[-1]))
    left, generator = entering.pop(), torch.Generator().manual_seed(job.recipe.seed)
    with walk.head_loaded():
        slopes = _drawn(walk, batch, left.hidden, generator)
    gradients: list[list[Tensor | None]] = [[slope, *(None for _ in left.flow[1:])] for slope in slopes]
    found: Effects = {}
    for number, index in enumerate(reversed(range(len(job.skeleton.blocks)))):
        tell(Step("measuring what each scheme costs", number, len(job.skeleton.blocks)))
        with walk.loaded(index):
            probe = _Probe(job, walk, index, entering[index], [each[0] for each in gradients])
            for key, specs in probe.sets(prices).items():
                found[key] = ranks.each([scheme for scheme, _ in prices[key]], partial(probe.effect, specs))
            run = partial(walk.run, index)
            gradients = [pulled(run, entering[index], gradient) for gradient in gradients]
    return found


class _Probe:
    """A loaded block in which one set at a time is rounded.

    states     the block's inputs
    gradients  of each draw's log-probability, with respect to the block's outputs
    """

    def __init__(self, job: Job, walk: Walk, index: int, states: States, gradients: Sequence[Tensor | None]) -> None:
        self._job, self._walk, self._index, self._states = job, walk, index, states
        self._block, self._model = walk.skeleton.blocks[index], walk.skeleton.model
        self._gradients = [gradient for gradient in gradients if gradient is not None]
        self._largest: dict[str, Tensor] = {}
        with LinearInputs(self._block, lambda name: self._model.get_parameter(name).data, self._see):
            self._exact = walk.run(index, states).hidden

    def _see(self, names: tuple[str, ...], x: Tensor) -> None:
        """Keep the largest magnitude of each linear's inputs."""
        for name in names:
            seen = x.abs().amax().float()
            self._largest[name] = torch.maximum(self._largest.get(name, seen), seen)

    def sets(self, prices: Prices) -> Sets:
        """The block's sets that have candidates."""
        sets: Sets = {}
        for spec in self._block.linears:
            if fused_set(spec.name) in prices:
                sets.setdefault(fused_set(spec.name), []).append(spec)
        return dict(sorted(sets.items()))

    def effect(self, specs: Sequence[LinearSpec], scheme: Scheme | None) -> Tensor:
        """The divergence (tokens,) float64 with only `specs` rounded to `scheme`, on the CPU."""
        if scheme is None:
            return torch.zeros(self._states.tokens, dtype=torch.float64)
        parameters = (self._model.get_parameter(spec.placement.parameter).data for spec in specs)
        views = {spec.name: weight_view(each, spec) for each, spec in zip(parameters, specs, strict=True)}
        saved = {name: view.clone() for name, view in views.items()}
        largest = largest_by_parent(saved.items()) if scheme.weights.parent else {}
        for name, w in saved.items():
            parent = largest.get(parent_set(name))
            divisor = None if parent is None else divisor_of(parent, scheme.weights)
            views[name].copy_(round_plainly(w, scheme.weights_only, self._job.scale_dtype, divisor).dequantize())
        with rounded_inputs(self._block, self._model, self._rounds(specs, scheme)):
            change = self._walk.run(self._index, self._states).hidden - self._exact
        for name, w in saved.items():
            views[name].copy_(w)
        drawn = [(change * gradient).sum(-1).double().square() / 2 for gradient in self._gradients]
        return torch.stack(drawn).mean(0).flatten().cpu()

    def _rounds(self, specs: Sequence[LinearSpec], scheme: Scheme) -> InputRounding:
        """The rounding of each linear's inputs; none of an expert that no token reached."""
        inputs = scheme.inputs
        if inputs is None:
            return {}
        seen = [spec.name for spec in specs if spec.name in self._largest]
        scales = {name: input_scale_of(self._largest[name], inputs) if inputs.static else None for name in seen}
        return {name: input_rounding(inputs, scale) for name, scale in scales.items()}


def _drawn(walk: Walk, batch: Batch, hidden: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Gradients of the log-probability of tokens drawn from the model itself, with respect to the last block's output:
    one for each draw. At most BATCH_TOKENS tokens have logits at a time."""
    if not isinstance(batch, Tensor):
        return _drawn_at_once(walk, batch, hidden, generator)
    size = max(BATCH_TOKENS // batch.shape[1], 1)
    parts = zip(batch.split(size), hidden.split(size), strict=True)
    return list(map(torch.cat, zip(*(_drawn_at_once(walk, *part, generator) for part in parts), strict=True)))


def _drawn_at_once(walk: Walk, batch: Batch, hidden: Tensor, generator: torch.Generator) -> list[Tensor]:
    """As `_drawn`, for all tokens at once."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        scores = walk.logits_of(batch, hidden).float().log_softmax(-1)
        flat = scores.flatten(0, -2)
        # drawn on the CPU, so that a seed gives the same tokens on every device
        drawn = torch.multinomial(flat.detach().exp().cpu(), DRAWS, True, generator=generator).to(flat.device)
        sums = flat.gather(1, drawn).sum(0)
        return [torch.autograd.grad(each, hidden, retain_graph=True)[0] for each in sums]
