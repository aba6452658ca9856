"""The rounders applied to a block: to nearest, by GPTQ, learned, or annealed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.alike import Names, Tensors, alike, stacked, together
from lowbit.calibrate.block import BlockWork
from lowbit.calibrate.parts import BlockTask, Needs, Rounded, Rounder, setting
from lowbit.models.states import States, batched
from lowbit.progress import Part, tell
from lowbit.quant.algos.annealed import AnnealedWeight
from lowbit.quant.algos.clip import group_moments, round_plainly
from lowbit.quant.algos.few import round_in_ranges
from lowbit.quant.algos.gptq import DAMPING, gptq_each
from lowbit.quant.algos.learned import LearnedWeight
from lowbit.quant.naming import EXPERT, expert_role
from lowbit.quant.numerics import in_parts
from lowbit.quant.qtensor import QTensor
from lowbit.quant.site import Site

# Least tokens for a second moment: in total, and per input.
MOMENT_TOKENS, TOKENS_PER_INPUT = 32768, 16
SAMPLE_TOKENS = 2048  # tokens used to compare module outputs
STEP_TOKENS = 4096  # tokens per step of learned rounding
# Largest total change of an offset, the sum of all rates, by the codes that it starts from. GPTQ's errors cancel, which
# longer ways spoil.
TRAVEL = {"rtn": 0.2, "gptq": 0.05}
FIRST = tuple(TRAVEL)
LOOKS = 8  # evaluations on the held sample per block, to keep the best iterate


def round_nearest(task: BlockTask) -> dict[str, Rounded]:
    """Every linear with a scheme, rounded to nearest. With the recipe's `clip`, each range is searched first."""
    work = task.work
    rounded = {}
    for name, (codes, scales, *zeros) in together(
        work, list(work.schemes), partial(_nearest, work, task.recipe.clip)
    ).items():
        weight = _assembled(work, name, codes, scales, zeros)
        rounded[name] = Rounded(weight, in_parts(work.masters[name], weight.scheme, weight.divisor)[0])
    work.use({name: each.weight for name, each in rounded.items()})
    return rounded


def _nearest(work: BlockWork, clip: bool, sites: list[Names]) -> list[Tensors]:
    """Codes, scales and, if any, zeros of each linear, rounded to nearest; in the ranges with the least output error if
    there are statistics and `clip` is true. See `together`."""
    first = sites[0][0]
    scheme, divisor, w = work.schemes[first], work.divisor(first), _weights(work, sites)
    rows = w.view(-1, w.shape[-1])
    if clip and first in work.stats:
        moments = stacked([group_moments(work.stats[site[0]].second_moment(), scheme) for site in sites])
        weight = round_in_ranges(rows, scheme, work.scale_dtype, moments, divisor)
    else:
        weight = round_plainly(rows, scheme, work.scale_dtype, divisor)
    return [_tensors(one) for one in weight.split(w.shape[0] * w.shape[1])]


def _weights(work: BlockWork, sites: list[Names]) -> Tensor:
    """The weights (e, r, n, k) of e sites with r linears each."""
    return stacked([work.masters[name] for site in sites for name in site]).unflatten(0, (len(sites), -1))


def _tensors(weight: QTensor) -> Tensors:
    return weight.codes, weight.scales, *(() if weight.zeros is None else (weight.zeros,))


def _assembled(work: BlockWork, name: str, codes: Tensor, scales: Tensor, zeros: list[Tensor]) -> QTensor:
    """The weight of a linear from its tensors; `zeros` has one or none."""
    return QTensor(codes, scales, zeros[0] if zeros else None, work.schemes[name], divisor=work.divisor(name))


@dataclass(frozen=True)
class Nearest(Rounder):
    """Rounds every linear to nearest. With the recipe's `clip`, each range is searched first."""

    name: ClassVar[str] = "rtn"
    help: ClassVar[str] = "to the nearest code"
    needs: ClassVar[Needs] = Needs(calibration=False)

    def round(self, task: BlockTask) -> dict[str, Rounded]:
        """Round all linears at once."""
        return round_nearest(task)


@dataclass(frozen=True)
class Gptq(Rounder):
    """Rounds every linear by GPTQ, in the order of use."""

    name: ClassVar[str] = "gptq"
    help: ClassVar[str] = "column by column; the following columns compensate each error"
    needs: ClassVar[Needs] = Needs(statistics=False)  # it gathers its own statistics per stage

    damping: float = setting(
        DAMPING,
        f"Damp GPTQ's second moments by this fraction of their mean diagonal.  [default: {DAMPING}]",
        "--damp-percent",
        "--percdamp",
        valid=lambda value: 0 < value < math.inf,
        rule="damping must be above 0, and finite",
    )

    def round(self, task: BlockTask) -> dict[str, Rounded]:
        """Round stage by stage."""
        return round_gptq(task, self.damping)


@dataclass(frozen=True)
class SignRound(Rounder):
    """Rounds every linear by learned rounding."""

    name: ClassVar[str] = "signround"
    help: ClassVar[str] = "learned by descent on the block's output error"
    needs: ClassVar[Needs] = Needs(second_stream=True)

    iters: int = setting(
        200,
        "Learn the rounding of a block in this many steps.  [default: by --method]",
        valid=lambda value: value >= 0,
        rule="steps cannot be negative",
    )
    first: str = setting(
        "rtn",
        "Begin learned rounding from the codes of this rounder: rtn or gptq.  [default: rtn]",
        valid=lambda value: value in FIRST,
        rule="learned rounding starts from rtn or gptq",
    )

    def round(self, task: BlockTask) -> dict[str, Rounded]:
        """Round to the best iterate."""
        start = round_gptq(task, DAMPING) if self.first == "gptq" else round_nearest(task)
        return descended(task, LearnedWeight, start, self.iters, TRAVEL[self.first])


@dataclass(frozen=True)
class Annealed(Rounder):
    """Rounds every linear by annealing."""

    name: ClassVar[str] = "anneal"
    help: ClassVar[str] = "weights harden into codes while the others make up for the error; for 2 and 3 bits"
    needs: ClassVar[Needs] = Needs(second_stream=True)

    anneal_steps: int = setting(
        200,
        "Take this many steps to anneal a block.  [default: 200]",
        valid=lambda value: value >= 0,
        rule="steps cannot be negative",
    )
    anneal_travel: float = setting(
        0.3,
        "Move a weight by at most this many codes in annealing.  [default: 0.3]",
        valid=lambda value: 0 < value < math.inf,
        rule="the way must be above 0, and finite",
    )

    def round(self, task: BlockTask) -> dict[str, Rounded]:
        """Round to the best iterate."""
        start = round_gptq(task, DAMPING)
        return descended(task, AnnealedWeight, start, self.anneal_steps, self.anneal_travel)


ROUNDERS: dict[str, type[Rounder]] = {part.name: part for part in (Nearest, Gptq, SignRound, Annealed)}


def descended(
    task: BlockTask,
    kind: type[LearnedWeight] | type[AnnealedWeight],
    start: Mapping[str, Rounded],
    steps: int,
    travel: float,
) -> dict[str, Rounded]:
    """The best iterate of `steps` steps of the block's weights from `start` on; `travel` as in RoundingLearner."""
    work, index = task.work, task.work.index
    generator = torch.Generator().manual_seed(task.recipe.seed + index)
    weights = {}
    for names in alike(work, list(start)):
        first, wanted = _joined([start[name].weight for name in names]), [start[name].wanted for name in names]
        weights[names] = kind(first, _rows_of(wanted), _energies(work, names))
    learner = RoundingLearner(work, weights, steps, travel, generator)
    return learner.learn(task.entering, [states.at(index) for states in task.targets])


def _rows_of(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of all tensors, one behind the other; the only one itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _joined(weights: Sequence[QTensor]) -> QTensor:
    """The rows of weights of one shape and scheme in one, which `QTensor.split` takes apart again."""
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    codes, scales = ([getattr(weight, name) for weight in weights] for name in ("codes", "scales"))
    return weights[0].iterate(_rows_of(scales), _rows_of(codes), _rows_of(zeros) if zeros else None)


def _energies(work: BlockWork, names: Names) -> Tensor | None:
    """The mean squares (e, k) of the inputs of each linear, or None if they are not known."""
    energies = [energy for energy in map(work.energy, names) if energy is not None]
    return stacked(energies).flatten(1) if energies else None


def round_gptq(task: BlockTask, damping: float) -> dict[str, Rounded]:
    """Every linear with a scheme, rounded by GPTQ in the order of use.

    Each stage's statistics are gathered with earlier stages already rounded, so that it compensates their errors too.
    """
    work, one = task.work, partial(_gptq, task.work, task.recipe.clip, damping)
    rounded: dict[str, Rounded] = {}
    for stage in stages(task.structure.sites):
        width = max(site.width for site in stage)
        tokens = max(MOMENT_TOKENS, TOKENS_PER_INPUT * width)
        experts = any(EXPERT.search(site.linears[0]) for site in stage)
        work.observe(task.entering, stage, tokens, up_to=None if experts else tokens)
        names = [name for site in stage for name in site.linears if name in work.schemes]
        rounded |= _all_by_gptq(work, names, one)
    return rounded | _all_by_gptq(work, [name for name in work.schemes if name not in rounded], one)


def _all_by_gptq(work: BlockWork, names: list[str], one: Callable[[list[Names]], list[Tensors]]) -> dict[str, Rounded]:
    """The linears `names`, rounded by `one` (see `_gptq`). The module computes with them afterwards."""
    rounded = {}
    for name, (said, wanted, codes, scales, *zeros) in together(work, names, one).items():
        rounded[name] = Rounded(_assembled(work, name, codes, scales, zeros), wanted)
        for fallback in bytes(said.tolist()).decode().splitlines():
            work.note(name, f"gptq: {fallback}")
    work.use({name: each.weight for name, each in rounded.items()})
    return rounded


def _gptq(work: BlockWork, clip: bool, damping: float, sites: list[Names]) -> list[Tensors]:
    """For each linear (see `together`) the rounding's fallbacks as UTF-8 bytes, one per line; the weight that was
    rounded, in parts; then codes, scales and, if any, zeros."""
    first = sites[0][0]
    tell(Part(f"rounding {first}" + (f" and of {len(sites) - 1} experts more" if len(sites) > 1 else "")))
    scheme, divisor, w = work.schemes[first], work.divisor(first), _weights(work, sites)
    if first not in work.stats:
        nothing, rows = torch.empty(0, dtype=torch.uint8), w.view(-1, w.shape[-1])
        wanted, _ = in_parts(rows, scheme, divisor)
        weights = round_plainly(rows, scheme, work.scale_dtype, divisor).split(w.shape[0] * w.shape[1])
        pairs = zip(wanted.split(w.shape[2]), weights, strict=True)
        return [(nothing, plain, *_tensors(weight)) for plain, weight in pairs]
    moments = stacked([work.stats[site[0]].second_moment() for site in sites])
    found = gptq_each(w, moments, scheme, work.scale_dtype, clip, damping, divisor)
    return [(_bytes(each.fallbacks), each.wanted, *_tensors(each.weight)) for each in found]


def _bytes(fallbacks: tuple[str, ...]) -> Tensor:
    """Sentences as UTF-8 bytes, one per line."""
    return torch.tensor(list("\n".join(fallbacks).encode()), dtype=torch.uint8)


def stages(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites in order of use. Sites with the same role in all experts of a layer come together."""
    together: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        together.setdefault(tuple(expert_role(name) for name in site.linears), []).append(site)
    yield from together.values()


def spread(batches: list[States]) -> list[States]:
    """Sequences spread evenly over all `batches`: as many as the first has, or about SAMPLE_TOKENS tokens."""
    rows, size = _rows(batches), batches[0].shape[0]
    count = min(max(size, SAMPLE_TOKENS * len(rows) // sum(row.tokens for row in rows)), len(rows))
    return batched((rows[i * len(rows) // count] for i in range(count)), size)


def _rows(batches: list[States]) -> list[States]:
    """Every sequence of `batches` on its own."""
    return [row for batch in batches for row in batch.rows()]


def _apart(weights: Mapping[Names, QTensor]) -> dict[str, QTensor]:
    """The weight of every linear."""
    found: dict[str, QTensor] = {}
    for names, weight in weights.items():
        found |= zip(names, weight.split(len(names)), strict=True)
    return found


class RoundingLearner:
    """Learned rounding of a block. A LearnedWeight has the linears of its names."""

    def __init__(
        self,
        work: BlockWork,
        learned: Mapping[Names, LearnedWeight | AnnealedWeight],
        iters: int,
        travel: float,
        generator: torch.Generator,
    ) -> None:
        self._work, self._iters, self._travel, self._generator = work, iters, travel, generator
        self._learned = learned

    def learn(self, inputs: list[States], targets: list[States]) -> dict[str, Rounded]:
        """The best iterate, which brings the block's outputs for `inputs` closest to `targets`.

        inputs   the block's input batches
        targets  the unquantized model's outputs of the block
        Iterates are compared on one batch of sequences, spread over all.
        """
        held = list(zip(spread(inputs), spread(targets), strict=True))
        weights = self._rounded()
        pairs = list(zip(_rows(inputs), _rows(targets), strict=True))
        best: dict[str, Rounded] = {}
        least = float("inf")
        look = max(self._iters // LOOKS, 1)
        for step in range(self._iters + 1):
            tell(Part("learned rounding", step, self._iters))
            if step % look == 0 or step == self._iters:
                self._work.use(_apart(weights))
                loss = ranks.leaders_number(sum(float(self._loss(*pair)) for pair in held))
                if loss < least or not best:
                    best, least = self._iterate(weights), loss
            if step < self._iters:
                self._step(weights, self._minibatch(pairs, inputs[0].shape[0]), step / self._iters)
                weights = self._rounded()
        best = {name: Rounded(each.weight.checked(), each.wanted) for name, each in best.items()}
        self._work.use({name: each.weight for name, each in best.items()})
        return best

    def _iterate(self, weights: dict[Names, QTensor]) -> dict[str, Rounded]:
        wanted: dict[str, Tensor] = {}
        for names, weight in weights.items():
            wanted |= zip(names, self._learned[names].shifted(weight).chunk(len(names)), strict=True)
        return {name: Rounded(weight, wanted[name]) for name, weight in _apart(weights).items()}

    def _rounded(self) -> dict[Names, QTensor]:
        return {names: learned.rounded() for names, learned in self._learned.items()}

    def _loss(self, x: States, y: States) -> Tensor:
        (out,) = self._work.run_quantized([x])
        return (out.hidden.float() - y.hidden.float()).square().mean()

    def _step(self, weights: dict[Names, QTensor], batches: Iterable[tuple[States, States]], done: float) -> None:
        rate = 2 * self._travel * (1 - done) / self._iters
        moving = [names for names in weights if names[0] not in self._work.scarce]
        for names in moving:
            computed = self._learned[names].computed(weights[names], done).chunk(len(names))
            for name, values in zip(names, computed, strict=True):
                self._work.weight(name).copy_(values)
        with self._work.gradients(name for names in moving for name in names) as gradients:
            for x, y in ranks.mine(batches):
                self._loss(x, y).backward()
            found = dict(gradients())
            for names in moving:
                reached = [name for name in names if name in found]
                if reached:
                    # no token of this step reached the others: their gradient is 0, and they stay
                    nothing = torch.zeros_like(found[reached[0]])
                    gradient = _rows_of([found.get(name, nothing) for name in names])
                    self._learned[names].step(weights[names], gradient, rate, done)

    def _minibatch(self, pairs: list[tuple[States, States]], size: int) -> Iterator[tuple[States, States]]:
        """Batches of `size` random sequences from `pairs`, with about STEP_TOKENS tokens in total."""
        mean = sum(x.tokens for x, _ in pairs) // len(pairs)
        for _ in range(max(STEP_TOKENS // (size * mean), 1)):
            chosen = torch.randperm(len(pairs), generator=self._generator)[:size].tolist()
            yield from zip(*(batched((pairs[row][side] for row in chosen), size) for side in (0, 1)), strict=True)
