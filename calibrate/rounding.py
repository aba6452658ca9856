"""The rounders at work on a block: to nearest, by GPTQ, or learned."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.block import BlockWork
from lowbit.calibrate.parts import BlockTask, Needs, Rounder, setting
from lowbit.models.states import States, joined
from lowbit.quant.algos.clip import group_moments, search_shrink
from lowbit.quant.algos.gptq import DAMPING, gptq
from lowbit.quant.algos.learned import LearnedWeight
from lowbit.quant.naming import EXPERT, expert_role
from lowbit.quant.qtensor import QTensor, round_to_nearest
from lowbit.quant.site import Site

# Tokens a second moment is estimated from: at least so many, and so many for each input.
MOMENT_TOKENS, TOKENS_PER_INPUT = 32768, 16
STEP_TOKENS = 4096  # tokens of a step of learned rounding
TRAVEL = 0.2  # how far a weight's offset comes at most, rates summed
LOOKS = 8  # times a run of learned rounding is held against the held sample, to keep the best


def round_nearest(work: BlockWork, clip: bool) -> dict[str, QTensor]:
    """Every linear that has a scheme, rounded to nearest; with `clip`, each range searched first."""
    shrinks = ranges(work, clip)
    return {
        name: round_to_nearest(work.masters[name], scheme, work.scale_dtype, shrinks[name])
        for name, scheme in work.schemes.items()
    }


def ranges(work: BlockWork, clip: bool) -> dict[str, Tensor]:
    """The fraction (n, g) of each group's range to keep, by linear; 1 without `clip`."""
    names = list(work.schemes)
    return dict(zip(names, ranks.each(names, lambda name: _range(work, name, clip)), strict=True))


def _range(work: BlockWork, name: str, clip: bool) -> Tensor:
    """The fraction of each group's range that loses least over the inputs seen; 1 where none were."""
    stats, scheme, master = work.stats.get(name), work.schemes[name], work.masters[name]
    if stats is None or not clip:
        return master.new_ones(len(master), scheme.groups(master.shape[1]))
    return search_shrink(master, scheme, work.scale_dtype, group_moments(stats.second_moment(), scheme))


@dataclass(frozen=True)
class Nearest(Rounder):
    """Every linear to the nearest codes; with the recipe's `clip`, each range searched first."""

    name: ClassVar[str] = "rtn"
    help: ClassVar[str] = "to nearest"
    needs: ClassVar[Needs] = Needs(calibration=False)

    def round(self, task: BlockTask) -> dict[str, QTensor]:
        """All at once."""
        weights = round_nearest(task.work, task.recipe.clip)
        task.work.use(weights)
        return weights


@dataclass(frozen=True)
class Gptq(Rounder):
    """Every linear by GPTQ, in the order in which the block uses them."""

    name: ClassVar[str] = "gptq"
    help: ClassVar[str] = "column by column, each error made up for by the columns that follow"
    needs: ClassVar[Needs] = Needs(statistics=False)  # it gathers its own, stage by stage

    damping: float = setting(
        DAMPING,
        f"GPTQ's damping, a fraction of the mean diagonal: {DAMPING}",
        "--damp-percent",
        "--percdamp",
        valid=lambda value: 0 < value < math.inf,
        rule="damping must be above 0, and finite",
    )

    def round(self, task: BlockTask) -> dict[str, QTensor]:
        """Stage by stage."""
        sites, clip = task.structure.sites, task.recipe.clip
        return round_gptq(task.work, task.entering, sites, partial(_gptq, task.work, clip, self.damping))


@dataclass(frozen=True)
class SignRound(Rounder):
    """Every linear by learned rounding."""

    name: ClassVar[str] = "signround"
    help: ClassVar[str] = "learned by descent on the block's output error"
    needs: ClassVar[Needs] = Needs(second_stream=True)

    iters: int = setting(
        200,
        "steps of learned rounding a block",
        valid=lambda value: value >= 0,
        rule="there is no negative number of steps",
    )

    def round(self, task: BlockTask) -> dict[str, QTensor]:
        """The best iterate."""
        generator = torch.Generator().manual_seed(task.recipe.seed + task.work.index)
        learner = RoundingLearner(task.work, task.recipe.clip, self.iters, generator)
        return learner.learn(task.entering, [states.at(task.work.index) for states in task.targets])


ROUNDERS: dict[str, type[Rounder]] = {part.name: part for part in (Nearest, Gptq, SignRound)}


def round_gptq(
    work: BlockWork, entering: list[States], sites: list[Site], one: Callable[[str], tuple[Tensor, ...]]
) -> dict[str, QTensor]:
    """Every linear that has a scheme, rounded by GPTQ, in the order in which the block uses them.

    one  rounds a linear: see `_gptq`

    Each stage's inputs are seen with the stages before it rounded already, so that it makes up for them too.
    """
    weights: dict[str, QTensor] = {}
    for stage in stages(sites):
        width = max(site.width for site in stage)
        tokens = max(MOMENT_TOKENS, TOKENS_PER_INPUT * width)
        experts = any(EXPERT.search(site.linears[0]) for site in stage)
        work.observe(entering, stage, tokens, up_to=None if experts else tokens)
        rounded = _all_by_gptq(work, [name for site in stage for name in site.linears if name in work.schemes], one)
        work.use(rounded)
        weights |= rounded
    unseen = _all_by_gptq(work, [name for name in work.schemes if name not in weights], one)
    work.use(unseen)
    return weights | unseen


def _all_by_gptq(work: BlockWork, names: list[str], one: Callable[[str], tuple[Tensor, ...]]) -> dict[str, QTensor]:
    weights = {}
    found = ranks.each_several(names, one)
    for name, (said, codes, scales, *zeros) in zip(names, found, strict=True):
        weights[name] = QTensor(codes, scales, zeros[0] if zeros else None, work.schemes[name])
        for fallback in bytes(said.tolist()).decode().splitlines():
            work.note(name, f"gptq: {fallback}")
    return weights


def _gptq(work: BlockWork, clip: bool, damping: float, name: str) -> tuple[Tensor, ...]:
    """What the linear's rounding fell back to, a line each, as bytes; then its codes, scales and, if any, zeros."""
    master, scheme, stats = work.masters[name], work.schemes[name], work.stats.get(name)
    if stats is None:
        weight, said = round_to_nearest(master, scheme, work.scale_dtype), ""
    else:
        result = gptq(master, stats.second_moment(), scheme, work.scale_dtype, clip, damping)
        weight, said = result.weight, "\n".join(result.fallbacks)
    as_bytes = torch.tensor(list(said.encode()), dtype=torch.uint8)
    return as_bytes, weight.codes, weight.scales, *(() if weight.zeros is None else (weight.zeros,))


def stages(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites in order of use; those of all experts of a layer that play the same part come together."""
    together: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        together.setdefault(tuple(expert_role(name) for name in site.linears), []).append(site)
    yield from together.values()


def spread(batches: list[States]) -> States:
    """One batch of sequences, shaped as the first of `batches`, spread evenly over all."""
    rows, count = _rows(batches), batches[0].shape[0]
    return joined(rows[i * len(rows) // count] for i in range(count))


def _rows(batches: list[States]) -> list[States]:
    """Every sequence of them alone."""
    return [row for batch in batches for row in batch.rows()]


class RoundingLearner:
    """Learned rounding of a block."""

    def __init__(self, work: BlockWork, clip: bool, iters: int, generator: torch.Generator) -> None:
        self._work, self._iters, self._generator = work, iters, generator
        shrinks = ranges(work, clip)
        self._learned = {
            name: LearnedWeight(work.masters[name], scheme, work.scale_dtype, shrinks[name])
            for name, scheme in work.schemes.items()
        }

    def learn(self, inputs: list[States], targets: list[States]) -> dict[str, QTensor]:
        """The weights of the best iterate: the block's outputs for `inputs` brought near `targets`.

        inputs   batches that reach the block
        targets  what the unquantized model returned here
        Iterates are compared on one batch of sequences spread over all.
        """
        held = spread(inputs), spread(targets)
        weights = self._rounded()
        pairs = list(zip(_rows(inputs), _rows(targets), strict=True))
        best, least = weights, float("inf")
        look = max(self._iters // LOOKS, 1)
        for step in range(self._iters + 1):
            self._work.use(weights)
            if step % look == 0 or step == self._iters:
                loss = ranks.leaders_number(float(self._loss(*held)))
                if loss < least:
                    best, least = weights, loss
            if step < self._iters:
                self._step(
                    weights,
                    self._minibatch(pairs, inputs[0].shape[0]),
                    2 * TRAVEL * (1 - step / self._iters) / self._iters,
                )
                weights = self._rounded()
        self._work.use(best)
        return best

    def _rounded(self) -> dict[str, QTensor]:
        return {name: learned.rounded() for name, learned in self._learned.items()}

    def _loss(self, x: States, y: States) -> Tensor:
        (out,) = self._work.run_quantized([x])
        return (out.hidden.float() - y.hidden.float()).square().mean()

    def _step(self, weights: dict[str, QTensor], batches: Iterable[tuple[States, States]], rate: float) -> None:
        with self._work.gradients(name for name in weights if name not in self._work.scarce) as gradients:
            for x, y in ranks.mine(batches):
                self._loss(x, y).backward()
            for name, gradient in gradients():
                self._learned[name].step(weights[name], gradient, rate)

    def _minibatch(self, pairs: list[tuple[States, States]], size: int) -> Iterator[tuple[States, States]]:
        """Batches of `size` random sequences of `pairs`, of STEP_TOKENS tokens in all."""
        for _ in range(max(STEP_TOKENS // (size * pairs[0][0].tokens), 1)):
            chosen = torch.randperm(len(pairs), generator=self._generator)[:size].tolist()
            yield joined(pairs[row][0] for row in chosen), joined(pairs[row][1] for row in chosen)
