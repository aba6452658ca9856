"""Settings of parts in recipes, in tables (`[gptq]`) or by their own names (`damping`): checks and defaults."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from lowbit.calibrate.parts import Part, Rounder, Transform
from lowbit.calibrate.rounding import ROUNDERS
from lowbit.calibrate.transforms import TRANSFORMS
from lowbit.errors import RecipeError, nearest
from lowbit.quant.recipe import Recipe, widened

PARTS: dict[str, type[Part]] = {**TRANSFORMS, **ROUNDERS}
OWNERS = {name: part for part in PARTS.values() for name in part.settings()}  # setting -> its part; names are unique

Tables = dict[str, dict[str, Any]]  # part -> setting -> value


def merged(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """`recipe` with `values` replaced: its own keys, tables of parts, and settings by their own names.

    RecipeError for an unknown key names the nearest; for a bad value it names the valid ones.
    """
    plain, tables = _separated(values)
    settings = dict(recipe.settings)
    for name, table in tables.items():
        settings[name] = settings.get(name, {}) | _checked(PARTS[name], table)
    return replace(recipe.merged(plain, others=(*PARTS, *OWNERS)), settings=settings)


def transforms_of(recipe: Recipe) -> tuple[Transform, ...]:
    """The recipe's transforms in order, with their settings."""
    return tuple(TRANSFORMS[name](**recipe.settings.get(name, {})) for name in recipe.transforms)


def rounder_of(recipe: Recipe) -> Rounder:
    """The recipe's rounder with its settings."""
    return ROUNDERS[recipe.rounder](**recipe.settings.get(recipe.rounder, {}))


def completed(recipe: Recipe) -> Recipe:
    """`recipe` with all settings of the parts that it uses, and no others."""
    tables: Tables = {}
    for part in (*transforms_of(recipe), rounder_of(recipe)):
        told = {name: getattr(part, name) for name in part.settings()}
        tables[part.name] = {name: value for name, value in told.items() if value is not None}
    return replace(recipe, settings={name: table for name, table in sorted(tables.items()) if table})


def type_of(part: type[Part], name: str) -> type:
    """The type of a part's setting, without None."""
    hint = get_type_hints(part)[name]
    kind: type = next((each for each in get_args(hint) if each is not type(None)), hint)
    return kind


def _separated(values: Mapping[str, Any]) -> tuple[dict[str, Any], Tables]:
    """The recipe's own keys, and the tables of parts. A setting by its own name overrides its table."""
    plain = {key: value for key, value in values.items() if key not in PARTS and key not in OWNERS}
    tables: Tables = {}
    together = plain.pop("settings", {})
    given = [*together.items()] if isinstance(together, Mapping) else [("settings", together)]
    for name, table in given + [(name, values[name]) for name in PARTS if name in values]:
        if not isinstance(table, Mapping):
            raise RecipeError(f"recipe key {name!r} is {table!r}; expected a table of settings")
        if name not in PARTS:
            raise RecipeError(f"settings of an unknown part {name!r}; {nearest(name, PARTS)}")
        tables[name] = tables.get(name, {}) | dict(table)
    for name in values.keys() & OWNERS.keys():
        tables.setdefault(OWNERS[name].name, {})[name] = values[name]
    return plain, tables


def _checked(part: type[Part], table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `part` in `table`. RecipeError for an unknown one and for an invalid value."""
    known, found = part.settings(), {}
    for name, value in table.items():
        if name not in known:
            raise RecipeError(f"{part.name} has no setting {name!r}; {nearest(name, known)}")
        kind, about = type_of(part, name), known[name]
        value = widened(value) if kind is float else value
        if not (type(value) is kind or (value is None and about.default is None)):
            raise RecipeError(f"recipe key {name!r} is {value!r}; expected {kind.__name__}")
        if not about.metadata["valid"](value):
            raise RecipeError(f"{name} is {value}: {about.metadata['rule']}")
        found[name] = value
    return found
