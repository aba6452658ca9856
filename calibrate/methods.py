"""Methods, one row each: a name on the command line for a set of recipe settings. A recipe may override any of them."""

from dataclasses import dataclass, field, replace
from typing import Any

from lowbit.calibrate.rounding import ROUNDERS
from lowbit.calibrate.settings import completed, merged, rounder_of, transforms_of
from lowbit.calibrate.transforms import TRANSFORMS
from lowbit.errors import RecipeError, nearest
from lowbit.quant.recipe import ACTIVATIONS, HEAD, Recipe
from lowbit.quant.scheme import Scheme, bits_between, parse_scheme


@dataclass(frozen=True)
class Method:
    """A method: a name for recipe settings.

    summary    one line for --list-methods
    cost, use  the same: what a run takes, and when to choose it
    settings   recipe keys that differ from the defaults
    only_bits  the only valid width, or None
    only_weights  the only valid scheme of weights, or None
    """

    name: str
    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    only_bits: int | None = None
    only_weights: str | None = None
    cost: str = "128 windows of calibration text, a forward pass per search"
    use: str = ""


ONE_READING = "the model is read once"
W8A8 = {"bits": 8, "group_size": -1, "activations": "token"}
METHODS = {
    method.name: method
    for method in (
        Method(
            "int8",
            "weight-only int8, one scale per output channel; needs no data",
            {"bits": 8, "group_size": -1},
            only_bits=8,
            only_weights="int8",
            cost=ONE_READING,
            use="first: half the size, and a loss that is hard to measure",
        ),
        Method(
            "fp8",
            "8-bit floats, weights per output channel, inputs per token; needs no data",
            {"scheme": "fp8"},
            only_bits=8,
            only_weights="fp8-a16",
            cost=ONE_READING,
            use="on GPUs that multiply 8-bit floats (Ada, Hopper and later), also for many users at once",
        ),
        Method(
            "rtn",
            "plain rounding to 4 or 8 bits; the baseline, needs no data",
            cost=ONE_READING,
            use="to see at once what 4 bits cost a model",
        ),
        Method(
            "awq",
            "activation-aware scales, then clipping",
            {"transforms": ("awq",), "clip": True},
            use="4 bits that every engine loads; the default",
        ),
        Method(
            "gptq",
            "columns rounded by importance, errors compensated",
            {"rounder": "gptq", "clip": True},
            cost="128 windows of calibration text, second moments of each input",
            use="4 bits: about half of the loss of awq on the demo model",
        ),
        Method(
            "smoothquant",
            "int8 weights and int8 activations, outliers moved into the weights",
            {"transforms": ("smooth",), **W8A8},
            only_bits=8,
            use="int8 products, for many users at once on GPUs before Ada",
        ),
        Method(
            "signround",
            "rounding learned block by block",
            {"rounder": "signround", "clip": True},
            cost="200 steps of descent per block: about three times gptq",
            use="4 bits, where minutes more on a GPU are worth a lower loss",
        ),
        Method(
            "best",
            "learned rounding, then scales and norms tuned on the model's own output",
            {"rounder": "signround", "clip": True, "iters": 20, "distill_steps": 48},
            cost="the whole model's gradients: the most time and memory of all",
            use="4 bits of a model that many will use",
        ),
    )
}
CALIBRATION = {"dataset": "builtin", "num_samples": 128, "seqlen": 512}


def find_method(name: str) -> Method:
    """The method `name`. RecipeError for an unknown one names the nearest."""
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def calibrated(recipe: Recipe) -> bool:
    """True if any part of `recipe` needs calibration data."""
    static = any(parse_scheme(text).static_inputs for text in (str(recipe.default_scheme), *recipe.schemes.values()))
    parts = any(part.needs.calibration for part in (*transforms_of(recipe), rounder_of(recipe)))
    return static or parts or recipe.clip or recipe.distill_steps > 0 or recipe.target_bits is not None


def complete_recipe(values: dict[str, Any]) -> Recipe:
    """The complete recipe: `values` (from a file, then from flags), and the method's settings for all other keys.

    RecipeError if values contradict the method, or if no format can store the result.
    """
    method = find_method(merged(Recipe(), values).method)
    recipe = merged(merged(Recipe(), {"method": method.name, **method.settings}), values)
    _require_known(recipe)
    recipe = completed(recipe)
    _require_schemes(recipe)
    recipe = _told_by_scheme(recipe, values)
    if calibrated(recipe):
        recipe = recipe.merged(CALIBRATION | {key: values[key] for key in values.keys() & CALIBRATION.keys()})
    else:
        recipe = replace(recipe, dataset=None, num_samples=0, seqlen=0, text_column=None)
    others = tuple(name for name in recipe.ignore if name != HEAD)
    recipe = replace(recipe, ignore=others if recipe.head else (HEAD, *others))
    _require_sense(method, recipe)
    return recipe


def _require_schemes(recipe: Recipe) -> None:
    """RecipeError for an invalid scheme."""
    try:
        for text in (str(recipe.default_scheme), *recipe.schemes.values()):
            parse_scheme(text)
        if recipe.head and parse_scheme(recipe.head).static_inputs:
            raise ValueError(f"head: {recipe.head} has calibrated inputs; take fp8, int8 or another of 16-bit inputs")
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _told_by_scheme(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """`recipe` with the keys that its `scheme` determines. RecipeError if `values` contradict the scheme."""
    if recipe.scheme is None:
        return recipe
    scheme = recipe.default_scheme
    told: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activations": "none" if scheme.inputs is None else str(scheme.inputs.granularity),
    }
    for key, value in told.items():
        if values.get(key, value) != value:
            raise RecipeError(f"scheme {recipe.scheme} has {key} {value}, not {values[key]}: say one of the two")
    return replace(recipe, **told)


def _require_known(recipe: Recipe) -> None:
    """RecipeError for the name of an unknown transform, rounder, dtype or kind of activations."""
    for name in recipe.transforms:
        if name not in TRANSFORMS:
            raise RecipeError(f"unknown transform {name!r}; {nearest(name, TRANSFORMS)}")
    for kind, name, known in (
        ("rounder", recipe.rounder, ROUNDERS),
        ("activations", recipe.activations if recipe.scheme is None else "none", ACTIVATIONS),
        ("dtype", recipe.dtype, ("auto", "bfloat16", "float16", "float32")),
    ):
        if name not in known:
            raise RecipeError(f"unknown {kind} {name!r}; {nearest(name, known)}")


def _require_sense(method: Method, recipe: Recipe) -> None:
    if method.only_bits not in (None, recipe.bits):
        raise RecipeError(f"method {method.name} is {method.only_bits} bits; for {recipe.bits} bits use rtn or awq")
    weights = str(recipe.default_scheme.weights_only)
    if method.only_weights not in (None, weights):
        raise RecipeError(f"method {method.name} has weights of {method.only_weights}; for {weights} use --method rtn")
    late = next((name for name in recipe.transforms[1:] if TRANSFORMS[name].mixes_channels), None)
    if late is not None:
        raise RecipeError(f"{late} mixes the channels that other transforms scale: put it first")
    if recipe.dataset is not None and (recipe.num_samples < 1 or recipe.seqlen < 2):
        raise RecipeError(f"{recipe.num_samples} samples of {recipe.seqlen} tokens: at least 1 of 2 are needed")
    if not 0 <= recipe.seed < 1 << 63:
        raise RecipeError(f"seed {recipe.seed}: a seed lies between 0 and {(1 << 63) - 1}")
    if recipe.max_shard_size < 1:
        raise RecipeError(f"max_shard_size is {recipe.max_shard_size}: at least 1 byte is needed")
    if recipe.distill_steps < 0:
        raise RecipeError(f"distill_steps is {recipe.distill_steps}: steps cannot be negative")
    if recipe.target_bits is not None:
        _require_widths(recipe.target_bits, recipe.default_scheme)


def _require_widths(target: float, scheme: Scheme) -> None:
    """RecipeError if no mix of integers has `target` bits per weight, or if `scheme` is not integer, 16-bit inputs."""
    widths = bits_between(scheme)
    named = f"{', '.join(map(str, widths[:-1]))} and {widths[-1]} bits"
    if not widths[0] < target <= widths[-1] + 1:
        raise RecipeError(
            f"target bits {target}: more than {widths[0]} and at most {widths[-1] + 1} bits per weight are possible, "
            "scales included"
        )
    if not scheme.number.is_integer or scheme.inputs is not None:
        raise RecipeError(f"target bits mix integer weights of {named} with 16-bit inputs; no other scheme is possible")
