"""What becomes of each linear: a scheme, or a reason why it is left alone. Decided from names and shapes alone."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lowbit.errors import CheckpointError, RecipeError, nearest
from lowbit.export.patterns import PatternError, Patterns
from lowbit.export.tensorfile import TensorEntry
from lowbit.models.placement import stacked_names, tensor_of
from lowbit.models.rehearsal import choosers
from lowbit.models.skeleton import Block, LinearSpec, Skeleton
from lowbit.quant.naming import fused_set
from lowbit.quant.recipe import HEAD, Recipe
from lowbit.quant.scheme import Scheme, fitting_group_size, parse_scheme

MINIMUM_COVERAGE = 0.99


@dataclass(frozen=True)
class Left:
    """A linear that keeps its weight: its size, why, and whether the user or its nature exempts it from coverage."""

    parameters: int
    reason: str
    exempt: bool


@dataclass(frozen=True)
class Plan:
    """Schemes of the linears to quantize, sizes of them, and those that are left.

    wanted  the scheme asked for, by linear, before any group size fell back
    named   linears whose scheme the recipe names one by one
    """

    schemes: dict[str, Scheme]
    parameters: dict[str, int]
    left: dict[str, Left]
    wanted: dict[str, Scheme]
    named: frozenset[str] = frozenset()

    @property
    def coverage(self) -> float:
        """Quantized parameters as a fraction of all linear parameters that are not exempt."""
        quantized = sum(self.parameters[name] for name in self.schemes)
        missed = sum(left.parameters for left in self.left.values() if not left.exempt)
        return quantized / max(quantized + missed, 1)

    def require_coverage(self) -> None:
        """Raise CheckpointError where less than 99% would be quantized, naming what is left and why."""
        if self.schemes and self.coverage >= MINIMUM_COVERAGE:
            return
        reasons = [f"{name}: {left.reason}" for name, left in self.left.items() if not left.exempt]
        raise CheckpointError(
            f"only {self.coverage:.1%} of the linear parameters would be quantized, {MINIMUM_COVERAGE:.0%} expected."
            f" Left: {'; '.join(reasons[:4]) or 'everything, by --ignore'}. Name what you mean to leave with --ignore"
        )


def make_plan(skeleton: Skeleton, recipe: Recipe) -> Plan:
    """The plan for every linear of the model.

    Group sizes that do not divide a linear's inputs fall back (quant.scheme.FALLBACK_GROUP_SIZES), together for linears
    that engines fuse and for all experts of a layer.
    """
    _require_fits(skeleton, recipe.ignore)
    named = _named_schemes(skeleton, recipe)
    schemes: dict[str, Scheme] = {}
    wanted: dict[str, Scheme] = {}
    parameters: dict[str, int] = {}
    left = dict(_outside_blocks(skeleton, recipe.ignore))
    roles = choosers(skeleton)
    for block in skeleton.blocks:
        reasons = {spec.name: _reason_against(spec, block, recipe.ignore, roles) for spec in block.linears}
        _spread_over_fused(reasons)
        wanted |= {spec.name: named.get(spec.name, recipe.default_scheme) for spec in block.linears}
        _require_whole_sets(block, wanted)
        sizes = _group_sizes(block, wanted)
        for spec in block.linears:
            parameters[spec.name] = spec.n * spec.k
            reason = reasons[spec.name]
            if reason is None:
                schemes[spec.name] = wanted[spec.name].with_group_size(sizes[spec.name])
            else:
                left[spec.name] = Left(spec.n * spec.k, reason, exempt=True)
        left |= _unsplit_experts(skeleton, block)
    left |= dict(_renamed(skeleton, left))
    return Plan(schemes, parameters, left, wanted, frozenset(named))


def scheme_pattern(fused: str) -> str:
    """The pattern that names, in a recipe, every linear of the set that `fused_set` calls `fused`."""
    if fused.endswith(".experts"):
        return f"re:^{re.escape(fused)}\\.[0-9]+\\."
    parent, _, leaves = fused.rpartition(".")
    return fused if "+" not in leaves else f"re:^{re.escape(parent)}\\.({leaves.replace('+', '|')})$"


def _require_fits(skeleton: Skeleton, ignore: Iterable[str]) -> None:
    """RecipeError, with the nearest names, where one of `ignore` fits nothing that the model has."""
    linears = [spec.name for block in skeleton.blocks for spec in block.linears]
    dense = {name.rpartition(".")[0] for name in (*skeleton.others, *skeleton.source.checkpoint.entries)}
    for pattern in ignore:
        if pattern != HEAD and not any(ignored_by(name, [pattern]) for name in dense.union(linears)):
            raise RecipeError(f"ignore: {pattern!r} fits no linear of this model; {_advice(pattern, linears)}")


def _advice(pattern: str, names: list[str]) -> str:
    """A line on what to write for a `pattern` that fits none of the linears `names`."""
    if "*" in pattern and not pattern.startswith("re:"):
        expression = re.escape(pattern).replace(r"\*", ".*")
        return f"there are no wildcards but regular expressions: re:^{expression}$"
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"names begin so: for all of them, re:^{re.escape(pattern)}\\."
    endings = (".".join(name.split(".")[-parts:]) for parts in (1, 2) for name in names)
    wanted = pattern.removeprefix("re:")
    return nearest(wanted, names if wanted.count(".") > 1 else dict.fromkeys(endings))


def _named_schemes(skeleton: Skeleton, recipe: Recipe) -> dict[str, Scheme]:
    """The schemes that `recipe.schemes` gives single linears, the first pattern that fits each.

    RecipeError where a pattern fits none.
    """
    found = {spec.name: ignored_by(spec.name, recipe.schemes) for block in skeleton.blocks for spec in block.linears}
    unused = recipe.schemes.keys() - set(found.values())
    if unused:
        raise RecipeError(f"schemes: {min(unused)!r} fits no linear of this model that another does not fit before")
    return {name: parse_scheme(recipe.schemes[pattern]) for name, pattern in found.items() if pattern is not None}


def _require_whole_sets(block: Block, wanted: dict[str, Scheme]) -> None:
    """RecipeError where linears that engines fuse are to have different schemes."""
    first: dict[str, str] = {}
    for spec in block.linears:
        other = first.setdefault(fused_set(spec.name), spec.name)
        if wanted[spec.name] != wanted[other]:
            raise RecipeError(
                f"schemes: {wanted[spec.name]} for {spec.name} and {wanted[other]} for {other}, which engines fuse: "
                "give both the same"
            )


def ignored_by(name: str, patterns: Iterable[str]) -> str | None:
    """The pattern that `name` falls under: the whole name, its last parts, or a `re:` pattern.

    RecipeError where a pattern takes too long.
    """
    limited = Patterns(seconds=1)
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if limited.occurs(pattern[3:], name):
                    return pattern
            except PatternError as error:
                raise RecipeError(f"recipe: {error}") from error
        elif name == pattern or name.endswith("." + pattern):
            return pattern
    return None


def _reason_against(spec: LinearSpec, block: Block, ignore: Iterable[str], roles: Mapping[str, str]) -> str | None:
    """The reason why a linear stays in 16 bits, or None.

    roles  of linears whose outputs choose, as far as running the model's code showed them
    """
    pattern = ignored_by(spec.name, ignore)
    if pattern:
        return f"ignored by {pattern!r}"
    home = spec.name.rpartition(".")[0] + ".experts."
    beside = {other.name.removeprefix(home).split(".")[0] for other in block.linears if other.name.startswith(home)}
    gate = spec.n == 1 or spec.n == len(beside)
    role = roles.get(spec.name, "router" if gate else None)
    return None if role is None else f"a {role} with {spec.n} outputs: engines keep it in 16 bits"


def _spread_over_fused(reasons: dict[str, str | None]) -> None:
    """Leave all of a fused set where one member is left: engines refuse half of one."""
    for name, reason in list(reasons.items()):
        if reason is not None and reason.startswith("ignored"):
            for other in reasons:
                if other != name and fused_set(other) == fused_set(name) and reasons[other] is None:
                    reasons[other] = f"engines fuse it with {name}, which is {reason}"


def _group_sizes(block: Block, wanted: dict[str, Scheme]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for spec in block.linears:
        key, size = fused_set(spec.name), fitting_group_size(spec.k, wanted[spec.name].group_size)
        known = sizes.get(key, size)
        sizes[key] = -1 if -1 in (known, size) else min(known, size)
    return {spec.name: sizes[fused_set(spec.name)] for spec in block.linears}


def _outside_blocks(skeleton: Skeleton, ignore: Iterable[str]) -> Iterator[tuple[str, Left]]:
    """Linears that belong to no block, by every name: of the head, also a tied one without a tensor of its own, of
    towers and projectors, and those of the file that the model's class has no module for (prediction of later tokens).
    """
    by_parameter = {place.parameter: name for name, place in skeleton.others.items() if place.conversion is None}
    head = skeleton.model.get_output_embeddings()
    for module_name, module in skeleton.model.named_modules():
        if not isinstance(module, nn.Linear) or any(module_name.startswith(f"{b.name}.") for b in skeleton.blocks):
            continue
        name = by_parameter.get(f"{module_name}.weight", f"{module_name}.weight").removesuffix(".weight")
        pattern = ignored_by(name, ignore) or (HEAD if module is head and HEAD in ignore else None)
        tied = module is head and f"{module_name}.weight" not in by_parameter
        reason = "tied to the embeddings" if tied else "outside the decoder blocks"
        yield name, Left(0 if tied else module.weight.numel(), f"ignored by {pattern!r}" if pattern else reason, True)
    kind = type(skeleton.model).__name__
    for name, entry in _homeless(skeleton):
        for linear in stacked_names(name, entry.shape):
            yield linear, Left(entry.numel, f"no module of {kind} by itself: copied as it is", exempt=True)


def _homeless(skeleton: Skeleton) -> Iterator[tuple[str, TensorEntry]]:
    """The file's matrices, and stacks of them, that are no parameter of the model as they are."""
    placed = skeleton.placed()
    for name, entry in skeleton.source.checkpoint.entries.items():
        alone, stacked = (
            len(entry.shape) == 2 and name.endswith(".weight"),
            len(entry.shape) == 3 and ".experts." in name,
        )
        if (alone or stacked) and (name not in placed or placed[name].conversion is not None):
            yield name, entry


def unquantized_linears(skeleton: Skeleton, quantized: Container[str]) -> list[str]:
    """The linears of the model that are not among `quantized`, by every name that a reader may know them by."""
    inside = [spec.name for block in skeleton.blocks for spec in block.linears]
    names = [name for name in (*inside, *dict(_outside_blocks(skeleton, ()))) if name not in quantized]
    return names + [name for name, _ in _renamed(skeleton, names)]


def _renamed(skeleton: Skeleton, left: Iterable[str]) -> Iterator[tuple[str, Left]]:
    """Those of `left` that transformers calls otherwise than the file does: readers ignore them by either name."""
    tensors = skeleton.placed()
    for name in left:
        place = tensors.get(f"{name}.weight")
        if place is not None and place.expert is None and place.parameter != f"{name}.weight":
            yield place.parameter.removesuffix(".weight"), Left(0, f"{name}, as transformers calls it", exempt=True)


def _unsplit_experts(skeleton: Skeleton, block: Block) -> dict[str, Left]:
    """Three-dimensional parameters that no expert's own name is known for; a convolution is none and no linear."""
    covered = {spec.placement.parameter for spec in block.linears}
    left = {}
    for name, placement in block.tensors.items():
        parameter = tensor_of(skeleton.model, placement)
        owner = skeleton.model.get_submodule(placement.parameter.rpartition(".")[0])
        if parameter.ndim == 3 and placement.parameter not in covered and not isinstance(owner, nn.Conv1d):
            experts = getattr(owner, "num_experts", None) == parameter.shape[0]
            reason = "experts fused in one tensor whose separate names are unknown"
            left[name] = Left(parameter.numel(), reason if experts else "no single matrix: kept as it is", not experts)
    return left
