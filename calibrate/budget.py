"""Mixed precision: a scheme for each set of fused linears, for a given average of bits.

The cost of a scheme is its estimated effect on the model's output, in nats per token. Let e be the change in the
log-probability of a token drawn from the model itself, to first order in the error of the block's output. The cost is
the mean of e^2 / 2: the divergence to second order (Fisher information), with each token's error taken alone. One
backward pass serves all sets and schemes. Bits are then spent greedily along the convex hull of each set's options.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.job import Job
from lowbit.calibrate.plan import make_plan, scheme_pattern
from lowbit.errors import RecipeError
from lowbit.export.dialects import FORMATS
from lowbit.models.imagetext import Batch, ids_of
from lowbit.models.products import weight_view
from lowbit.models.skeleton import LinearSpec
from lowbit.models.states import States, pulled
from lowbit.models.walk import Walk
from lowbit.progress import Step, tell
from lowbit.quant.algos.clip import plain_shrink
from lowbit.quant.naming import fused_set
from lowbit.quant.qtensor import round_to_nearest
from lowbit.quant.scheme import Scheme, widths_of

PROBE_TOKENS = 2048


@dataclass(frozen=True)
class Option:
    """A candidate scheme of a fused set: stored bits including scales, and cost in nats per token."""

    scheme: Scheme
    bits: float
    divergence: float


def spend(job: Job, calibration: CalibrationSet) -> Job:
    """`job` with a scheme for every fused set, whose average does not exceed `target_bits`.

    Sets named in the recipe's `schemes` keep their scheme. RecipeError if the target is too low, or if the format
    allows one scheme only.
    """
    assert job.recipe.target_bits is not None
    if FORMATS[job.recipe.format].uniform:
        raise RecipeError(f"format {job.recipe.format} holds one scheme: --target-bits is for compressed-tensors")
    sets = _sets(job)
    total = sum(spec.n * spec.k for specs in sets.values() for spec in specs)
    options = dict(_measured(job, calibration, sets))
    fixed = sum(_bits(job, specs, job.plan.schemes[specs[0].name]) for key, specs in sets.items() if key not in options)
    least = (fixed + sum(found[0].bits for found in options.values())) / total
    if least > job.recipe.target_bits:
        raise RecipeError(
            f"target bits {job.recipe.target_bits}: this model needs {least:.4f} at least, scales counted"
        )
    chosen = choose(options, job.recipe.target_bits * total - fixed)
    schemes = {scheme_pattern(key): str(option.scheme) for key, option in chosen.items()}
    recipe = replace(job.recipe, schemes=job.recipe.schemes | schemes)
    return replace(job, recipe=recipe, plan=make_plan(job.skeleton, recipe))


def average_bits(job: Job) -> float:
    """Average stored bits per quantized weight, including scales and zeros."""
    sets = _sets(job)
    bits = sum(_bits(job, specs, job.plan.schemes[specs[0].name]) for specs in sets.values())
    return bits / sum(spec.n * spec.k for specs in sets.values() for spec in specs)


def choose(options: dict[str, list[Option]], budget: float) -> dict[str, Option]:
    """One option per set, with at most `budget` bits in total. An option with more bits never costs more.

    options  by set; each list must come from `hull`
    """
    steps = [
        ((low.divergence - high.divergence) / (high.bits - low.bits), key, place)
        for key, found in options.items()
        for place, (low, high) in enumerate(pairwise(found))
    ]
    places = dict.fromkeys(options, 0)
    left = budget - sum(found[0].bits for found in options.values())
    for _, key, place in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        price = options[key][place + 1].bits - options[key][place].bits
        if places[key] == place and price <= left:
            places[key], left = place + 1, left - price
    return {key: options[key][place] for key, place in places.items()}


def hull(options: Iterable[Option]) -> list[Option]:
    """The convex hull of options, by rising bits: each step saves less per bit than the one before."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.divergence)):
        if kept and option.divergence >= kept[-1].divergence:
            continue
        while len(kept) > 1 and _slope(kept[-2], option) <= _slope(kept[-2], kept[-1]):
            kept.pop()
        kept.append(option)
    return kept


def _slope(low: Option, high: Option) -> float:
    return (high.divergence - low.divergence) / (high.bits - low.bits)


def _sets(job: Job) -> dict[str, list[LinearSpec]]:
    """The quantized linears by fused set."""
    sets: dict[str, list[LinearSpec]] = {}
    linears = job.linears
    for name in job.plan.schemes:
        sets.setdefault(fused_set(name), []).append(linears[name])
    return sets


def _bits(job: Job, specs: list[LinearSpec], scheme: Scheme) -> float:
    return sum(spec.n * spec.k * scheme.bits_per_weight(spec.k, 8 * job.scale_dtype.itemsize) for spec in specs)


def _candidates(job: Job, specs: list[LinearSpec]) -> Iterator[Scheme]:
    """The schemes of other widths that the format can store."""
    fmt = FORMATS[job.recipe.format]
    for scheme in widths_of(job.recipe.default_scheme, [spec.k for spec in specs]):
        shapes = (fmt.reason_against_shape(scheme, spec.n, spec.k) for spec in specs)
        if not (fmt.reason_against(scheme) or any(shapes)):
            yield scheme


@torch.no_grad()
def _measured(
    job: Job, calibration: CalibrationSet, sets: dict[str, list[LinearSpec]]
) -> Iterator[tuple[str, list[Option]]]:
    """The options of every set without a scheme in the recipe, measured on one batch of calibration tokens, last block
    first. Samples with images are not batched: if there is no text, the longest one is measured."""
    names = {name for name in job.plan.schemes if name not in job.plan.named}
    if not names:
        return
    batch = max(calibration.batches(PROBE_TOKENS), key=lambda batch: ids_of(batch).numel())
    walk = Walk(job.skeleton, job.device, torch.float32)
    entering = walk.start([batch])
    gradient: list[Tensor | None]
    for index in range(len(job.skeleton.blocks)):
        with walk.loaded(index):
            entering.append(walk.run(index, entering[-1]))
    with walk.head_loaded():
        left = entering.pop()
        slope = _drawn(walk, batch, left.hidden, torch.Generator().manual_seed(job.recipe.seed))
    gradient = [slope, *(None for _ in left.flow[1:])]
    for number, index in enumerate(reversed(range(len(job.skeleton.blocks)))):
        tell(Step("measuring what each scheme costs", number, len(job.skeleton.blocks)))
        block = job.skeleton.blocks[index]
        inside = {fused_set(spec.name) for spec in block.linears if spec.name in names}
        with walk.loaded(index):
            exact = walk.run(index, entering[index]).hidden
            for key in sorted(inside):
                specs, schemes = sets[key], list(_candidates(job, sets[key]))
                cost = partial(_cost, walk, index, specs, (job, entering[index], exact, gradient[0]))
                costs = ranks.each_number(schemes, cost)
                yield key, hull(Option(s, _bits(job, specs, s), c) for s, c in zip(schemes, costs, strict=True))
            gradient = pulled(partial(walk.run, index), entering[index], gradient)


def _cost(
    walk: Walk, index: int, specs: list[LinearSpec], seen: tuple[Job, States, Tensor, Tensor | None], scheme: Scheme
) -> float:
    """The cost of rounding only `specs` of the loaded block to `scheme`."""
    job, states, exact, gradient = seen
    assert gradient is not None
    views = [weight_view(walk.skeleton.model.get_parameter(spec.placement.parameter).data, spec) for spec in specs]
    saved = [view.clone() for view in views]
    for view, w in zip(views, saved, strict=True):
        shrink = plain_shrink(w, scheme, job.scale_dtype)
        view.copy_(round_to_nearest(w, scheme, job.scale_dtype, shrink).dequantize())
    change = ((walk.run(index, states).hidden - exact) * gradient).sum(-1)
    for view, w in zip(views, saved, strict=True):
        view.copy_(w)
    return float(change.square().mean()) / 2


def _drawn(walk: Walk, batch: Batch, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the log-probability of tokens drawn from the model itself, with respect to the last block's
    output."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        scores = walk.logits_of(batch, hidden).float().log_softmax(-1)
        flat = scores.flatten(0, -2)
        # drawn on the CPU, so that a seed gives the same tokens on every device
        drawn = torch.multinomial(flat.detach().exp().cpu(), 1, generator=generator).to(flat.device)
        (gradient,) = torch.autograd.grad(flat.gather(1, drawn).sum(), hidden)
    return gradient
