"""Discovery of folds (places where scales can move), by trial and proof.

No knowledge of architectures is used. A producer (a norm, or rows of a linear) is scaled by random factors. A linear
reads that producer if its input columns come out multiplied by exactly these factors. Its columns are divided by them,
and the block runs again: this reveals linears hidden behind the change (experts behind a router). Once the block's
output equals the original, the fold is proved. Otherwise there is no fold.

All experts of a layer are one function with different weights. The findings for one expert are copied to the others:
to those that probe tokens reach with a proof, which all share, and to the rest as they are.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lowbit.calibrate.capture import sites_of
from lowbit.models.products import LinearInputs, bias_view, weight_view
from lowbit.models.skeleton import Block
from lowbit.quant.algos.rotate import rotation, turned_inputs, turned_outputs
from lowbit.quant.naming import EXPERT, expert_of, expert_role
from lowbit.quant.site import Fold, Heads, Site

# Largest relative change of the block's contribution due to float32 rounding; a wrong fold changes it by over 1%.
PROOF_TOLERANCE = 1e-4
COLUMN_TOLERANCE = 1e-3  # residual of a column against its best multiple
FACTOR_TOLERANCE = 2e-5  # relative distance from the producer's factor; factors are further apart than this
ROUNDS = 4  # rounds of search: direct consumers first, then those behind a router

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """A fixed input for the block: `run(module)` returns output minus input, flat, with everything the block leaves for
    later blocks. Hidden states are random but fixed."""

    run: Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Structure:
    """Structure of a block.

    sites      linears by common input
    folds      proved folds
    unreached  linears without probe tokens, and without a reached expert of the same role
    rejected   folds found on a similar block that failed their proof on this one
    """

    sites: list[Site]
    folds: list[Fold]
    unreached: list[str]
    rejected: list[str] = field(default_factory=list)

    def renamed(self, names: dict[str, str]) -> "Structure":
        """The same structure for a similar block; `names` maps names of this block to names of that one."""
        sites = [Site(tuple(names[linear] for linear in site.linears), site.width) for site in self.sites]
        folds = [
            replace(
                fold, producer=names[fold.producer], columns={names[key]: value for key, value in fold.columns.items()}
            )
            for fold in self.folds
        ]
        return Structure(sites, folds, [names[linear] for linear in self.unreached])


class Workbench:
    """A float32 copy of a block, for trying factors and taking them back."""

    def __init__(self, block: Block) -> None:
        self.module = copy.deepcopy(block.module).float()
        self.block = block
        self._prefix = block.name + "."
        self._specs = {spec.name: spec for spec in block.linears}

    def parameter(self, name: str) -> Tensor:
        """The parameter with this name in the model."""
        return self.module.get_parameter(name.removeprefix(self._prefix)).data

    def weight(self, linear: str) -> Tensor:
        """The weight (n, k) of `linear`, a view."""
        spec = self._specs[linear]
        return weight_view(self.parameter(spec.placement.parameter), spec)

    def bias(self, linear: str) -> Tensor | None:
        return bias_view(self.parameter, self._specs[linear])

    def inputs(self, probe: Probe) -> tuple[list[tuple[tuple[str, ...], Tensor]], Tensor]:
        """Names and input of every product in one run, and the block's output."""
        calls: list[tuple[tuple[str, ...], Tensor]] = []
        with LinearInputs(self.block, self.parameter, lambda names, x: calls.append((names, x))):
            output = probe.run(self.module)
        return calls, output

    def scale(self, fold: Fold, factors: Tensor) -> None:
        """Multiply the producer's outputs by `factors` (channels,), and divide its consumers' columns by them."""
        for weight, bias in self._producers(fold):
            if weight.ndim == 2:
                weight.mul_(factors[:, None])
            else:
                weight.add_(fold.offset).mul_(factors).sub_(fold.offset)
            if bias is not None:
                bias.mul_(factors)
        for name in fold.columns:
            self.weight(name).div_(fold.column_scales(factors, name))

    def turn(self, heads: Heads) -> None:
        """Rotate the producer's outputs within `heads`, and the consumer's inputs to match."""
        matrix = rotation(heads.channels.shape[1])
        for tensor in (self.weight(heads.fold.producer), self.bias(heads.fold.producer)):
            if tensor is not None:
                tensor.copy_(turned_outputs(tensor, heads.channels, matrix))
        reader = self.weight(heads.consumer)
        reader.copy_(turned_inputs(reader, matrix))

    def _producers(self, fold: Fold) -> Iterator[tuple[Tensor, Tensor | None]]:
        if fold.is_linear:
            yield self.weight(fold.producer), self.bias(fold.producer)
        else:
            norm = self.module.get_submodule(fold.producer.removeprefix(self._prefix))
            bias = norm._parameters.get("bias")
            yield norm.get_parameter("weight").data, None if bias is None else bias.data

    def keep(self, fold: Fold) -> Callable[[], None]:
        """A function that restores, to the bit, everything that `scale(fold)` or `turn` of its heads changes."""
        tensors = [self.weight(name) for name in fold.columns]
        tensors += [tensor for pair in self._producers(fold) for tensor in pair if tensor is not None]
        saved = [tensor.clone() for tensor in tensors]

        def restore() -> None:
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)

        return restore


@torch.no_grad()
def discover(bench: Workbench, probe: Probe, single: Probe, seed: int) -> Structure:
    """Sites and proved folds of a block.

    probe   several tokens in a row
    single  many sequences of one token each, for which attention passes values through whatever queries and keys are
    """
    calls, output = bench.inputs(probe)
    search = _Search(bench, probe, single, _by_name(calls), output, torch.Generator().manual_seed(seed))
    reached = {name for names, _ in calls for name in names}
    unreached = [spec.name for spec in bench.block.linears if spec.name not in reached]
    twins, silent = _reached_twins(bench.block, reached), list(_twins(unreached, reached))
    # an expert without tokens hands nothing on: it has its twin's findings (a third of 128 experts, most of the time)
    alike = {name for names in (*twins, *silent) for name in names.values()}
    searched = (producer for producer in _producers(bench) if producer.producer not in alike)
    folds = [fold for producer in searched if (fold := search.fold_of(producer))]
    copies = [_moved(fold, names) for names in twins for fold in folds if fold.producer in names]
    proved = prove(bench, copies, probe, seed)
    failed = {fold.producer for fold in copies} - {fold.producer for fold in proved}
    again = (producer for producer in _producers(bench) if producer.producer in failed)
    folds += [*proved, *(fold for producer in again if (fold := search.fold_of(producer)))]
    structure = Structure(sites_of(calls), folds, unreached)
    for names in silent:
        structure = _with_twin(structure, names)
    return structure


def _twins(unreached: list[str], reached: set[str]) -> Iterator[dict[str, str]]:
    """For each expert without tokens: a map from the linears of a reached expert of its layer to its own."""
    for prefix in dict.fromkeys(name[: found.end()] for name in unreached if (found := EXPERT.search(name))):
        layer = prefix.removesuffix(EXPERT.findall(prefix)[-1])
        own = [name.removeprefix(prefix) for name in unreached if name.startswith(prefix)]
        for twin in dict.fromkeys(name[: found.end()] for name in sorted(reached) if (found := EXPERT.search(name))):
            if twin.startswith(f"{layer}.experts.") and all(twin + part in reached for part in own):
                yield {twin + part: prefix + part for part in own}
                break


def _reached_twins(block: Block, reached: set[str]) -> list[dict[str, str]]:
    """For each reached expert but the first of its layer with the same linears: a map from the linears of that one to
    its own."""
    first: dict[tuple[str, ...], dict[str, str]] = {}
    twins = []
    experts: dict[str, list[str]] = {}
    for spec in block.linears:
        if spec.name in reached and EXPERT.search(spec.name):
            experts.setdefault(expert_of(spec.name), []).append(spec.name)
    for own in experts.values():
        names = dict(zip((expert_role(name) for name in own), own, strict=True))
        model = first.setdefault(tuple(names), names)
        if model is not names:
            twins.append({model[role]: name for role, name in names.items()})
    return twins


def _moved(fold: Fold, names: dict[str, str]) -> Fold:
    """A fold inside an expert, in the expert whose linears `names` maps to."""
    columns = {names[name]: values for name, values in fold.columns.items() if name in names}
    return replace(fold, producer=names[fold.producer], columns=columns)


def _with_twin(structure: Structure, names: dict[str, str]) -> Structure:
    """Copy the findings for one expert to its twin; `names` maps the expert's linears to the twin's."""
    sites = [
        Site(tuple(names[linear] for linear in site.linears), site.width)
        for site in structure.sites
        if all(linear in names for linear in site.linears)
    ]
    folds, inside = [], []
    for fold in structure.folds:
        if fold.producer in names:
            folds.append(fold)
            inside.append(_moved(fold, names))
        else:
            moved = {names[name]: columns for name, columns in fold.columns.items() if name in names}
            folds.append(replace(fold, columns=fold.columns | moved))
    unreached = [name for name in structure.unreached if name not in names.values()]
    return replace(structure, sites=structure.sites + sites, folds=folds + inside, unreached=unreached)


@torch.no_grad()
def prove(bench: Workbench, folds: list[Fold], probe: Probe, seed: int) -> list[Fold]:
    """The `folds` (found on a block of the same structure) that leave this block's output unchanged."""
    output = probe.run(bench.module)
    generator = torch.Generator().manual_seed(seed)

    def holds(some: list[Fold]) -> bool:
        restores = []
        for fold in some:
            restores.append(bench.keep(fold))
            bench.scale(fold, fold.on_used_channels(_factors(fold.channels, generator).to(output.device)))
        unchanged = same(output, probe.run(bench.module))
        for restore in reversed(restores):
            restore()
        return unchanged

    return folds if holds(folds) else [fold for fold in folds if holds([fold])]


class _Search:
    """The search for one block's folds."""

    def __init__(
        self, bench: Workbench, probe: Probe, single: Probe, inputs: Inputs, output: Tensor, generator: torch.Generator
    ) -> None:
        self._bench, self._probe, self._single = bench, probe, single
        self._inputs, self._output, self._generator = inputs, output, generator
        self._single_inputs = _by_name(bench.inputs(single)[0])

    def fold_of(self, producer: Fold) -> Fold | None:
        """The proved fold of `producer` (a Fold without consumers), or None."""
        for rows in self._row_choices(producer):
            fold = self._close(producer, rows)
            if fold is not None:
                return fold
        return None

    def _row_choices(self, producer: Fold) -> Iterator[Tensor]:
        """Candidate channels to scale: all; for fused linears also those seen by single tokens, and slices."""
        channels = torch.arange(producer.channels)
        yield channels
        if not producer.is_linear:
            return
        values = self._behind_single_tokens(producer)
        if values is not None and len(values) < producer.channels:
            yield values
        half, third = producer.channels // 2, producer.channels // 3
        for rows in (channels[half:], channels[:half], channels[2 * third :], channels[1::2], channels[::2]):
            if any(x.shape[-1] % max(len(rows), 1) == 0 for x in self._inputs.values()):
                yield rows

    def _behind_single_tokens(self, producer: Fold) -> Tensor | None:
        found = self._consumers(producer, torch.arange(producer.channels), self._single, self._single_inputs)
        return torch.cat(list(found.values())).unique() if found else None

    def _consumers(self, fold: Fold, rows: Tensor, probe: Probe, before: Inputs) -> dict[str, Tensor]:
        """Linears not yet in `fold` whose input columns are multiplied by the factors."""
        factors = self._random(fold.channels, rows)
        after = _by_name(self._tried(fold, factors, probe)[0])
        tried = [
            name
            for name, x in before.items()
            if name not in fold.columns and name != fold.producer and name in after and after[name].shape == x.shape
        ]
        ratios = [_ratios(before[name], after[name]) for name in tried]
        scaled = [pair for pair, fits in zip(zip(tried, ratios, strict=True), _said(ratios), strict=True) if fits]
        matches = [_match(ratio, factors) for _, (ratio, _) in scaled]
        return {
            name: columns for (name, _), (columns, _), fits in zip(scaled, matches, _said(matches), strict=True) if fits
        }

    def _close(self, producer: Fold, rows: Tensor) -> Fold | None:
        fold = producer
        for _ in range(ROUNDS):
            found = self._consumers(fold, rows, self._probe, self._inputs)
            if not found:
                return None
            fold = replace(fold, columns=fold.columns | found)
            output = self._tried(fold, self._random(fold.channels, rows), self._probe)[1]
            if same(self._output, output):
                return fold
        return None

    def _random(self, channels: int, rows: Tensor) -> Tensor:
        factors = torch.ones(channels)
        factors[rows] = _factors(len(rows), self._generator)
        return factors.to(self._output.device)

    def _tried(self, fold: Fold, factors: Tensor, probe: Probe) -> tuple[list[tuple[tuple[str, ...], Tensor]], Tensor]:
        restore = self._bench.keep(fold)
        self._bench.scale(fold, factors)
        try:
            return self._bench.inputs(probe)
        finally:
            restore()


def _producers(bench: Workbench) -> Iterator[Fold]:
    """Every norm, as plain and as (1 + w), and every linear, as folds without consumers."""
    linears = {spec.placement.parameter for spec in bench.block.linears}
    for name, module in bench.module.named_modules():
        weight = module._parameters.get("weight")
        full = f"{bench.block.name}.{name}"
        if weight is not None and weight.ndim == 1 and f"{full}.weight" not in linears:
            for offset in (0.0, 1.0):
                yield Fold(full, offset, False, weight.numel(), {})
    for spec in bench.block.linears:
        yield Fold(spec.name, 0.0, True, spec.n, {})


def _factors(count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct factors in random order, from 1/2 to 0.84 and from 1.19 to 2, evenly spaced in the logarithm.

    None is near 1, so that an unchanged input cannot look like a scaled one.
    """
    half = (count + 1) // 2
    magnitudes = torch.linspace(0.25, 1, half)
    exponents = torch.cat([magnitudes, -magnitudes])[:count]
    return exponents[torch.randperm(count, generator=generator)].exp2()


def _by_name(calls: list[tuple[tuple[str, ...], Tensor]]) -> Inputs:
    """The first input (tokens, k) of each linear."""
    inputs: Inputs = {}
    for names, x in calls:
        for name in names:
            inputs.setdefault(name, x.reshape(-1, x.shape[-1]).clone())
    return inputs


def _said(findings: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """The second of each pair, a () bool. The host waits once for all: a mixture has hundreds of inputs."""
    return torch.stack([fits for _, fits in findings]).tolist() if findings else []


def _ratios(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The factor (k,) that makes each column of `after` from that of `before` (tokens, k), NaN for columns that never
    fired; and () bool, False if a column has none or one near 1, or none ever fired."""
    energy = before.square().sum(0)
    dead = energy == 0
    ratio = (before * after).sum(0) / energy.clamp(min=1e-30)
    residual = (after - before * ratio).square().sum(0)
    fits = (residual <= COLUMN_TOLERANCE**2 * energy) & ((ratio - 1).abs() > FACTOR_TOLERANCE)
    return torch.where(dead, torch.nan, ratio), (fits | dead).all() & ~dead.all()


def _match(ratio: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """For each column of an input: the channel whose factor `ratio` (k,) is; and () bool, False if a column has
    none."""
    dead = ratio.isnan()
    ratio = ratio.nan_to_num(0.0)
    ordered, order = factors.sort()
    right = torch.searchsorted(ordered, ratio).clamp(max=len(ordered) - 1)
    left = (right - 1).clamp(min=0)
    nearest = torch.where((ratio - ordered[left]).abs() < (ordered[right] - ratio).abs(), left, right)
    matched = (ordered[nearest] / ratio - 1).abs() < FACTOR_TOLERANCE
    channels = order[nearest]
    if len(factors) == len(ratio):
        # a column that never fired (ReLU) maps to itself, provided that all others do
        straight = torch.arange(len(factors), device=channels.device)
        all_straight = ((channels == straight) | dead).all()
        channels = torch.where(dead & all_straight, straight, channels)
        matched = matched | (dead & (channels == straight))
    moved = factors[channels] != 1
    return channels, (matched & moved).all()


def same(before: Tensor, after: Tensor) -> bool:
    """True if two outputs of the block are equal up to float32 rounding."""
    return bool((after - before).norm() <= PROOF_TOLERANCE * before.norm())
