"""Methods, one row each: a name on the command line for a set of recipe settings. A recipe may override any of them."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit.calibrate.mixtures import MIXTURES
from lowbit.calibrate.rounding import ROUNDERS
from lowbit.calibrate.settings import completed, merged, rounder_of, transforms_of
from lowbit.calibrate.transforms import TRANSFORMS
from lowbit.errors import RecipeError, nearest
from lowbit.export.cache import CACHES
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.steps import STEPS
from lowbit.quant.recipe import ACTIVATIONS, HEAD, Recipe
from lowbit.quant.scheme import parse_choice, parse_scheme


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
            {"rounder": "signround", "clip": True, "iters": 20, "distill_steps": 64},
            cost="the whole model's gradients: the most time and memory of all",
            use="4 bits of a model that many will use",
        ),
        Method(
            "finest",
            "annealed rounding, then codes, scales and norms tuned, on own text too",
            {
                "rounder": "anneal",
                "anneal_steps": 100,
                "clip": True,
                "distill_steps": 160,
                "distill_codes": True,
                "distill_tokens": 8192,
                "own_samples": 512,
            },
            cost="a GPU that holds the model, and 16 bytes a weight besides",
            use="2 to 4 bits, where the least loss is worth minutes of a GPU",
        ),
    )
}
WEIGHTS_ALONE = {"mxfp4": "mxfp4-a16", "nvfp4": "nvfp4-a16"}  # in formats whose mixtures have these names
TABLE_BITS = (2, 4, 8)  # of embeddings: vLLM unpacks whole codes from a word
CALIBRATION = {"dataset": "builtin", "num_samples": 128, "seqlen": 512}


def find_method(name: str) -> Method:
    """The method `name`. RecipeError for an unknown one names the nearest."""
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]


def calibrated(recipe: Recipe) -> bool:
    """True if any part of `recipe` needs calibration data."""
    schemes = (recipe.default_scheme, *map(parse_choice, recipe.schemes.values()))
    static = any(scheme.static_inputs for scheme in schemes if scheme is not None)
    parts = any(part.needs.calibration for part in (*transforms_of(recipe), rounder_of(recipe)))
    return static or parts or recipe.kv_cache is not None or recipe.clip or recipe.distill_steps > 0 or recipe.budgeted


def complete_recipe(values: dict[str, Any]) -> Recipe:
    """The complete recipe: `values` (from a file, then from flags), and the method's settings for all other keys.

    RecipeError if values contradict the method, or if no format can store the result.
    """
    values = _expanded(_with_vocabulary(values))
    method = find_method(merged(Recipe(), values).method)
    recipe = merged(merged(Recipe(), {"method": method.name, **method.settings}), values)
    _require_known(recipe)
    recipe = completed(recipe)
    _require_schemes(recipe)
    recipe = _told_by_scheme(recipe, values)
    if calibrated(recipe):
        recipe = recipe.merged(CALIBRATION | {key: values[key] for key in values.keys() & CALIBRATION.keys()})
    else:
        recipe = replace(recipe, dataset=None, num_samples=0, seqlen=0, own_samples=0, own_prompt=0, text_column=None)
    if recipe.kv_cache not in (None, *CACHES):
        raise RecipeError(f"kv_cache {recipe.kv_cache!r}; {nearest(str(recipe.kv_cache), CACHES)}")
    others = tuple(name for name in recipe.ignore if name != HEAD)
    recipe = replace(recipe, ignore=others if recipe.head else (HEAD, *others))
    _require_sense(method, recipe)
    return recipe


def _with_vocabulary(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the schemes of head and embeddings that a mixture of the format has, unless they say them."""
    fmt, scheme = FORMATS.get(str(values.get("format", ""))), values.get("scheme")
    found = fmt.vocabulary(scheme) if fmt is not None and isinstance(scheme, str) else {}
    if found and scheme in WEIGHTS_ALONE:
        values = values | {"scheme": WEIGHTS_ALONE[scheme]}
    return found | values


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, with a mixture's name in `scheme` replaced by its schemes. Those set by name come first."""
    name = values.get("scheme")
    if isinstance(name, str) and name.startswith("attention-") and name not in MIXTURES:
        raise RecipeError(f"unknown mixture {name!r}; {nearest(name, MIXTURES)}")
    if not isinstance(name, str) or name not in MIXTURES:
        return values
    mixture = MIXTURES[name]
    return values | {"scheme": mixture.scheme, "schemes": dict(values.get("schemes", {})) | mixture.schemes}


def _require_schemes(recipe: Recipe) -> None:
    """RecipeError for an invalid scheme."""
    try:
        for text in (str(recipe.default_scheme), *recipe.schemes.values(), *recipe.candidates):
            parse_choice(text)
        if recipe.head and parse_scheme(recipe.head).static_inputs:
            raise ValueError(f"head: {recipe.head} has calibrated inputs; take fp8, int8 or another of 16-bit inputs")
        table = parse_scheme(recipe.embeddings or "int8")
        plain = table.number.is_integer and table.symmetric and table.bits in TABLE_BITS and not table.weights.blocks
        any_blocks = recipe.format in FORMATS and FORMATS[recipe.format].ties_head
        if table.inputs or not (plain or any_blocks):
            raise ValueError(
                f"embeddings: {recipe.embeddings} is no table that engines look tokens up in; take int8, int4-g64 or "
                "int2-g32"
            )
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
    if recipe.own_samples < 0:
        raise RecipeError(f"own_samples is {recipe.own_samples}: 0 windows are the least")
    if recipe.own_prompt < 0:
        raise RecipeError(f"own_prompt is {recipe.own_prompt}: 0 tokens are the least")
    if not 0 <= recipe.seed < 1 << 63:
        raise RecipeError(f"seed {recipe.seed}: a seed lies between 0 and {(1 << 63) - 1}")
    if recipe.max_shard_size < 1:
        raise RecipeError(f"max_shard_size is {recipe.max_shard_size}: at least 1 byte is needed")
    if recipe.distill_steps < 0:
        raise RecipeError(f"distill_steps is {recipe.distill_steps}: steps cannot be negative")
    if recipe.distill_tokens < 1:
        raise RecipeError(f"distill_tokens is {recipe.distill_tokens}: a step takes at least 1")
    if recipe.distill_samples < 0:
        raise RecipeError(f"distill_samples is {recipe.distill_samples}: 0 windows are the least")
    if recipe.distill_samples and not recipe.distill_steps:
        raise RecipeError("distill_samples are windows for tuning: add --distill-steps")
    _require_budget(recipe)


def _require_budget(recipe: Recipe) -> None:
    """RecipeError for several targets, a target that is no amount, or candidates that nothing chooses from."""
    targets = {key: getattr(recipe, key) for key in ("target_bits", "target_size", "target_ms")}
    given = {key: value for key, value in targets.items() if value is not None}
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} are {len(given)} budgets: give one")
    if recipe.candidates and not given:
        raise RecipeError("candidates are chosen from within a budget: add --target-bits, --target-size or --target-ms")
    for key, value in given.items():
        if not 0 < value < math.inf:
            raise RecipeError(f"{key} is {value}: a budget is above 0, and finite")
    if recipe.target_gpu not in STEPS:
        raise RecipeError(f"target_gpu {recipe.target_gpu!r}: steps were measured on {', '.join(STEPS)}")
