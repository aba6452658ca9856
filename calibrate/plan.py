"""The plan: for each linear a scheme, or the reason why it stays in 16 bits. Decided from names and shapes alone."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lowbit.calibrate.vocabulary import VocabularyWeight, vocabulary_of
from lowbit.errors import CheckpointError, RecipeError, nearest
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.table import reason_against_part
from lowbit.export.format import Format
from lowbit.export.patterns import PatternError, Patterns
from lowbit.export.tensorfile import TensorEntry
from lowbit.models.placement import stacked_names, tensor_of
from lowbit.models.rehearsal import choosers, find_attentions
from lowbit.models.skeleton import Block, LinearSpec, Skeleton
from lowbit.quant.recipe import HEAD, Recipe
from lowbit.quant.scheme import KEPT, Scheme, name_of, parse_choice

MINIMUM_COVERAGE = 0.99
COMMON_CUTS = (2, 4, 8)  # sizes of tensor parallelism


@dataclass(frozen=True)
class Left:
    """A linear left in 16 bits: its size, the reason, and whether it is exempt from coverage."""

    parameters: int
    reason: str
    exempt: bool


@dataclass(frozen=True)
class Plan:
    """Schemes and sizes of linears to quantize, and the linears left in 16 bits.

    wanted  requested scheme by linear, before group sizes fell back
    head, embeddings  of the vocabulary, if they are quantized
    named   linears whose scheme is set by name in the recipe
    unrounded  those of them in 16 bits
    fallbacks  the reason for each linear whose scheme is not the requested one
    uncut  the reason for each linear whose parts on 2, 4 or 8 GPUs its groups or blocks do not divide
    attentions  modules whose keys and values get scales, with the file's names; empty without --kv-cache
    """

    schemes: dict[str, Scheme]
    parameters: dict[str, int]
    left: dict[str, Left]
    wanted: dict[str, Scheme]
    named: frozenset[str] = frozenset()
    head: VocabularyWeight | None = None
    embeddings: VocabularyWeight | None = None
    unrounded: frozenset[str] = frozenset()
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    uncut: Mapping[str, str] = field(default_factory=dict)
    attentions: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocabulary(self) -> list[VocabularyWeight]:
        """The head and the embeddings, those that are quantized."""
        return [weight for weight in (self.head, self.embeddings) if weight is not None]

    @property
    def unties(self) -> bool:
        """True if head and embeddings are one tensor in the model and two in the checkpoint."""
        return any(weight.tied for weight in self.vocabulary)

    @property
    def written(self) -> dict[str, Scheme]:
        """The scheme of every quantized linear of the file, head and embeddings too."""
        return self.schemes | {weight.name: weight.scheme for weight in self.vocabulary}

    @property
    def coverage(self) -> float:
        """Quantized parameters as a fraction of all linear parameters that are not exempt."""
        quantized = sum(self.parameters[name] for name in self.schemes)
        missed = sum(left.parameters for left in self.left.values() if not left.exempt)
        return quantized / max(quantized + missed, 1)

    def require_coverage(self) -> None:
        """Raise CheckpointError, with the linears left and why, if less than 99% would be quantized."""
        if self.schemes and self.coverage >= MINIMUM_COVERAGE:
            return
        reasons = [f"{name}: {left.reason}" for name, left in self.left.items() if not left.exempt]
        raise CheckpointError(
            f"only {self.coverage:.1%} of the linear parameters would be quantized, {MINIMUM_COVERAGE:.0%} expected."
            f" Left: {'; '.join(reasons[:4]) or 'everything, by --ignore'}. Name what you mean to leave with --ignore"
        )


def make_plan(skeleton: Skeleton, recipe: Recipe) -> Plan:
    """The plan for every linear of the model.

    A scheme whose groups or blocks do not divide a linear falls back (Scheme.fallback), together for fused linears and
    for all experts of a layer. Without a fallback they keep 16 bits.
    """
    linears = [spec.name for block in skeleton.blocks for spec in block.linears]
    recipe = _with_mixture(recipe, linears, skeleton.source.checkpoint.config)
    dense = {name.rpartition(".")[0] for name in (*skeleton.others, *skeleton.source.checkpoint.entries)}
    require_fits(recipe.ignore, linears, dense)
    plan = plan_of(skeleton.blocks, recipe, choosers(skeleton))
    left = dict(_outside_blocks(skeleton, recipe.ignore)) | plan.left
    for block in skeleton.blocks:
        left |= _unsplit_experts(skeleton, block)
    head, embeddings = vocabulary_of(skeleton, recipe, FORMATS[recipe.format].ties_head)
    if head is not None:
        left.pop(head.name, None)
    left |= dict(_renamed(skeleton, left))
    attentions = find_attentions(skeleton) if recipe.kv_cache else {}
    return replace(plan, left=left, head=head, embeddings=embeddings, attentions=attentions)


def _with_mixture(recipe: Recipe, linears: Iterable[str], config: Mapping[str, Any]) -> Recipe:
    """`recipe` with the schemes of a mixture of its format by name, for linears whose scheme it does not set itself."""
    mixed = FORMATS[recipe.format].mixed(recipe.scheme, linears, config)
    schemes = {name: scheme for name, scheme in mixed.items() if not ignored_by(name, recipe.schemes)}
    return replace(recipe, schemes=recipe.schemes | schemes)


def plan_of(blocks: Sequence[Block], recipe: Recipe, roles: Mapping[str, str]) -> Plan:
    """The plan for the linears of `blocks` alone.

    roles  of linears whose outputs select something (routers)
    """
    named, fmt = _named_schemes(blocks, recipe), FORMATS[recipe.format]
    kept = {name for name, scheme in named.items() if scheme is None}
    unrounded: set[str] = set()
    schemes: dict[str, Scheme] = {}
    wanted: dict[str, Scheme] = {}
    parameters: dict[str, int] = {}
    left: dict[str, Left] = {}
    for block in blocks:
        reasons = {spec.name: _reason_against(spec, block, recipe.ignore, roles) for spec in block.linears}
        _spread_over_fused(reasons, fmt)
        asked = {spec.name: named.get(spec.name, recipe.default_scheme) for spec in block.linears}
        _require_whole_sets(block, fmt, asked)
        chosen = {name for name, reason in reasons.items() if name in kept and reason is None}
        unrounded |= chosen
        reasons |= dict.fromkeys(chosen, f"{KEPT} by the recipe")
        wanted |= {spec.name: named.get(spec.name) or recipe.default_scheme for spec in block.linears}
        fitted = _fitted(block, wanted, fmt)
        for spec in block.linears:
            parameters[spec.name] = spec.n * spec.k
            reason, scheme = reasons[spec.name], fitted[spec.name]
            if reason is not None:
                left[spec.name] = Left(spec.n * spec.k, reason, exempt=True)
            elif scheme is not None:
                schemes[spec.name] = scheme
            else:
                why = _why_not(wanted[spec.name], spec)
                left[spec.name] = Left(spec.n * spec.k, f"no {wanted[spec.name]}: {why}", exempt=False)
    specs = [spec for block in blocks for spec in block.linears if spec.name in schemes]
    return Plan(
        schemes,
        parameters,
        left,
        wanted,
        frozenset(named),
        unrounded=frozenset(unrounded),
        fallbacks={spec.name: text for spec in specs if (text := _fallback(spec, schemes, wanted))},
        uncut={spec.name: text for spec in specs if (text := _uncut(spec, schemes[spec.name]))},
    )


def _why_not(scheme: Scheme, spec: LinearSpec) -> str:
    return scheme.reason_against_shape(spec.n, spec.k) or "a linear that engines fuse it with does not divide"


def _fallback(spec: LinearSpec, schemes: Mapping[str, Scheme], wanted: Mapping[str, Scheme]) -> str | None:
    """The sentence for a linear that has another scheme than the requested one, or None."""
    scheme, asked = schemes[spec.name], wanted[spec.name]
    return None if scheme == asked else f"{scheme} in place of {asked}: {_why_not(asked, spec)}"


def _uncut(spec: LinearSpec, scheme: Scheme) -> str | None:
    """The sentence for a linear that tensor parallelism cannot cut because of its scheme, or None."""
    cuts = [size for size in COMMON_CUTS if spec.n % size == 0 == spec.k % size]  # others cannot be in 16 bits either
    reasons = {size: reason_against_part(spec.name, scheme, spec.n, spec.k, size) for size in cuts}
    sizes = [str(size) for size, reason in reasons.items() if reason]
    return f"on {', '.join(sizes)} GPUs: {next(filter(None, reasons.values()))}" if sizes else None


def scheme_pattern(fused: str) -> str:
    """The recipe pattern that matches every linear of the set with key `fused` (from `fused_set`)."""
    if fused.endswith(".experts"):
        return f"re:^{re.escape(fused)}\\.[0-9]+\\."
    parent, _, leaves = fused.rpartition(".")
    return fused if "+" not in leaves else f"re:^{re.escape(parent)}\\.({leaves.replace('+', '|')})$"


def require_fits(ignore: Iterable[str], linears: list[str], others: Iterable[str]) -> None:
    """RecipeError, with the nearest names, if a pattern of `ignore` matches neither linears nor other tensors."""
    dense = set(others)
    for pattern in ignore:
        if pattern != HEAD and not any(ignored_by(name, [pattern]) for name in dense.union(linears)):
            raise RecipeError(f"ignore: {pattern!r} matches no linear of this model; {_advice(pattern, linears)}")


def _advice(pattern: str, names: list[str]) -> str:
    """A hint for the user whose `pattern` matches none of the linears `names`."""
    if "*" in pattern and not pattern.startswith("re:"):
        expression = re.escape(pattern).replace(r"\*", ".*")
        return f"wildcards do not work, regular expressions do: re:^{expression}$"
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"some names start with it; to match them write re:^{re.escape(pattern)}\\."
    endings = (".".join(name.split(".")[-parts:]) for parts in (1, 2) for name in names)
    wanted = pattern.removeprefix("re:")
    return nearest(wanted, names if wanted.count(".") > 1 else dict.fromkeys(endings))


def _named_schemes(blocks: Sequence[Block], recipe: Recipe) -> dict[str, Scheme | None]:
    """The schemes that `recipe.schemes` sets for single linears (None: 16 bits); the first matching pattern wins.

    RecipeError if a pattern matches none.
    """
    found = {spec.name: ignored_by(spec.name, recipe.schemes) for block in blocks for spec in block.linears}
    unused = recipe.schemes.keys() - set(found.values())
    if unused:
        raise RecipeError(f"schemes: {min(unused)!r} matches no linear that an earlier pattern leaves")
    return {name: parse_choice(recipe.schemes[pattern]) for name, pattern in found.items() if pattern is not None}


def _require_whole_sets(block: Block, fmt: Format, wanted: Mapping[str, Scheme | None]) -> None:
    """RecipeError if linears that engines fuse would get different schemes."""
    first: dict[str, str] = {}
    for spec in block.linears:
        other = first.setdefault(fmt.set_of(spec.name), spec.name)
        if wanted[spec.name] != wanted[other]:
            raise RecipeError(
                f"schemes: {name_of(wanted[spec.name])} for {spec.name} and {name_of(wanted[other])} for {other}, "
                "which engines fuse: give both the same"
            )


def ignored_by(name: str, patterns: Iterable[str]) -> str | None:
    """The first of `patterns` that matches `name`: its whole name, its last parts, or a `re:` pattern.

    RecipeError if a pattern takes too long.
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

    roles  of linears whose outputs select something (routers), found by running the model's code
    """
    pattern = ignored_by(spec.name, ignore)
    if pattern:
        return f"ignored by {pattern!r}"
    home = spec.name.rpartition(".")[0] + ".experts."
    beside = {other.name.removeprefix(home).split(".")[0] for other in block.linears if other.name.startswith(home)}
    gate = spec.n == 1 or spec.n == len(beside)
    role = roles.get(spec.name, "router" if gate else None)
    return None if role is None else f"a {role} with {spec.n} outputs: engines keep it in 16 bits"


def _spread_over_fused(reasons: dict[str, str | None], fmt: Format) -> None:
    """Leave a whole fused set in 16 bits if one member is ignored, since engines reject partly quantized sets."""
    for name, reason in list(reasons.items()):
        if reason is not None and reason.startswith("ignored"):
            for other in reasons:
                if other != name and fmt.set_of(other) == fmt.set_of(name) and reasons[other] is None:
                    reasons[other] = f"engines fuse it with {name}, which is {reason}"


def _fitted(block: Block, wanted: dict[str, Scheme], fmt: Format) -> dict[str, Scheme | None]:
    """The scheme that fits all members of each linear's fused set; None if there is none, or none that `fmt` holds."""
    shapes: dict[str, set[tuple[int, int]]] = {}
    for spec in block.linears:
        shapes.setdefault(fmt.set_of(spec.name), set()).add((spec.n, spec.k))
    fitted = {spec.name: wanted[spec.name].fitting(shapes[fmt.set_of(spec.name)]) for spec in block.linears}
    return {
        name: None if scheme is not None and scheme != wanted[name] and fmt.reason_against(scheme) else scheme
        for name, scheme in fitted.items()
    }


def _outside_blocks(skeleton: Skeleton, ignore: Iterable[str]) -> Iterator[tuple[str, Left]]:
    """Linears outside the blocks: the head (even if tied and without a tensor of its own), towers and projectors, and
    linears in the file without a module in the model's class (multi-token prediction).
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
            yield linear, Left(entry.numel, f"no module of {kind} has it: copied unchanged", exempt=True)


def _homeless(skeleton: Skeleton) -> Iterator[tuple[str, TensorEntry]]:
    """Matrices in the file, and stacks of them, that do not directly match a parameter of the model."""
    placed, entries = skeleton.placed(), skeleton.source.checkpoint.entries
    for name, entry in ((name, entries[name]) for name in skeleton.tensors.names if name in entries):
        alone, stacked = (
            len(entry.shape) == 2 and name.endswith(".weight"),
            len(entry.shape) == 3 and ".experts." in name,
        )
        if (alone or stacked) and (name not in placed or placed[name].conversion is not None):
            yield name, entry


def unquantized_linears(skeleton: Skeleton, quantized: Container[str]) -> list[str]:
    """The linears of the model that are not in `quantized`, by every name that a reader may use."""
    inside = [spec.name for block in skeleton.blocks for spec in block.linears]
    names = [name for name in (*inside, *dict(_outside_blocks(skeleton, ()))) if name not in quantized]
    return names + [name for name, _ in _renamed(skeleton, names)]


def _renamed(skeleton: Skeleton, left: Iterable[str]) -> Iterator[tuple[str, Left]]:
    """The linears in `left` that transformers renames, by its name: readers of the file may ignore them by either."""
    tensors = skeleton.placed()
    for name in left:
        place = tensors.get(f"{name}.weight")
        if place is not None and place.expert is None and place.parameter != f"{name}.weight":
            yield place.parameter.removesuffix(".weight"), Left(0, f"{name}, renamed by transformers", exempt=True)


def _unsplit_experts(skeleton: Skeleton, block: Block) -> dict[str, Left]:
    """Three-dimensional parameters (not convolutions) whose experts have no known names of their own."""
    covered = {spec.placement.parameter for spec in block.linears}
    left = {}
    for name, placement in block.tensors.items():
        parameter = tensor_of(skeleton.model, placement)
        owner = skeleton.model.get_submodule(placement.parameter.rpartition(".")[0])
        if parameter.ndim == 3 and placement.parameter not in covered and not isinstance(owner, nn.Conv1d):
            experts = getattr(owner, "num_experts", None) == parameter.shape[0]
            reason = "experts fused in one tensor whose separate names are unknown"
            left[name] = Left(parameter.numel(), reason if experts else "not one matrix: copied unchanged", not experts)
    return left
