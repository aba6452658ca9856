"""The methods, one line each: transforms, then a range search or none, then rounding."""

from dataclasses import dataclass, replace
from typing import Any

from quant.recipe import Recipe, RecipeError, nearest


@dataclass(frozen=True)
class Method:
    """A way to quantize.

    summary      one line for --list-methods
    bits         the default, and `only_bits` where no other makes sense
    group_size   the default; -1 is per channel
    num_samples, seqlen  calibration by default; 0 where the method needs no data
    scale_search  move scales from activations into weights first (AWQ)
    clip_search   search each group's range on the output error
    """

    name: str
    summary: str
    bits: int = 4
    only_bits: int | None = None
    group_size: int = 128
    num_samples: int = 0
    seqlen: int = 0
    scale_search: bool = False
    clip_search: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations."""
        return self.num_samples > 0


METHODS = {
    method.name: method
    for method in (
        Method("int8", "weight-only int8, one scale per output channel; needs no data", 8, 8, -1),
        Method("rtn", "plain rounding to 4 or 8 bits; the baseline, needs no data"),
        Method(
            "awq",
            "activation-aware scales, then clipping",
            num_samples=128,
            seqlen=512,
            scale_search=True,
            clip_search=True,
        ),
    )
}


def find_method(name: str) -> Method:
    """The method called `name`; RecipeError names the nearest."""
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def complete_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe that `values` (from a file, then from flags) ask for, the method's own defaults where they are silent.

    RecipeError where the values contradict the method or no format can hold them.
    """
    method = find_method(values.get("method", Recipe.method))
    defaults: dict[str, Any] = {"method": method.name, "bits": method.bits, "group_size": method.group_size}
    if method.calibrated:
        defaults |= {"dataset": "builtin", "num_samples": method.num_samples, "seqlen": method.seqlen}
    recipe = Recipe().merged(defaults).merged(values)
    if not method.calibrated:
        recipe = replace(recipe, dataset=None, num_samples=0, seqlen=0, text_column=None)
    _require_sense(method, recipe)
    return recipe


def _require_sense(method: Method, recipe: Recipe) -> None:
    if method.only_bits not in (None, recipe.bits):
        raise RecipeError(f"method {method.name} is {method.only_bits} bits; {recipe.bits} bits are what rtn or awq do")
    try:
        scheme = recipe.scheme
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if method.name == "int8" and (scheme.group_size != -1 or not scheme.symmetric):
        raise RecipeError(
            "method int8 is symmetric with one scale per channel; for 8-bit groups use --method rtn --bits 8"
        )
    if method.calibrated and (recipe.num_samples < 1 or recipe.seqlen < 2):
        raise RecipeError(f"{recipe.num_samples} samples of {recipe.seqlen} tokens: at least 1 of 2 are needed")
    if recipe.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise RecipeError(f"dtype {recipe.dtype!r}; known: auto, bfloat16, float16, float32")
