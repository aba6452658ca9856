"""Recipe: all settings that determine the bytes of a quantized checkpoint, as a dataclass and as a TOML file."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import tomli_w

from lowbit.errors import RecipeError, nearest
from lowbit.quant.scheme import INPUTS, Scheme, make_scheme, parse_scheme

ACTIVATIONS = {"none": None, "token": INPUTS["a8token"], "tensor": INPUTS["a8tensor"]}
TOLD = ("bits", "group_size", "symmetric", "activations")  # the fields that a scheme's text sets
HEAD = "lm_head"  # the recipe's name for the output embeddings of any model; no engine loads them packed
MOST_PARTS = 32  # of a dotted name: tomllib takes the square of their number
LONG_NAME = re.compile(rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MOST_PARTS}}}""")
NEVER_FROM_A_FILE = {"trust_remote_code": "a model's own code runs only with --trust-remote-code on the command line"}


@dataclass(frozen=True)
class Recipe:
    """Settings of a quantization run.

    method              row of METHODS; it sets defaults for all fields below, which the user may override
    transforms          rows of TRANSFORMS, in order
    rounder             row of ROUNDERS
    clip                search each group's clipping range for the least output error
    bits, group_size    of the weights; group_size -1 is one scale per output channel
    symmetric           signed codes without zeros, or unsigned codes with integer zeros
    activations         none (16 bits), token (int8, one scale per token), tensor (int8, one calibrated scale)
    scheme              bits, group_size, symmetric and activations in one text ("fp8", "int4-g64"); None to use those
    schemes             schemes of single linears, by exact name, last parts of a name, or `re:` pattern; 16bit for none
    head                scheme of the output embeddings ("int8", "fp8"), rounded by what the head sees; None for 16 bits
    kv_cache            calibrated scales of keys and values: fp8 (one per tensor), fp8-head (per head); None for none
    embeddings          scheme of the input embeddings ("int8", "int4-g64"); None for 16 bits
    target_bits         average bits per linear weight, distributed for the least loss; None for one scheme
    target_size         bytes of all weights, distributed likewise
    target_ms           milliseconds per token at batch 1 on lowbit's engine, distributed likewise
    target_gpu          GPU that `target_ms` is meant for: a row of STEPS (calibrate/price.py)
    candidates          schemes to distribute, and 16bit; empty for those that suit `scheme`
    distill_steps       steps of tuning all scales and norms on the model's output, after all blocks are rounded
    distill_codes       tune codes too
    distill_tokens      calibration tokens in a step of tuning
    distill_samples     further windows for tuning alone, which the unquantized model writes itself
    ignore              linears left in 16 bits: exact names, last parts of a name, or `re:` patterns; always the head
    dataset             calibration text, in the notation of calibrate/data.py; None for methods without calibration
    num_samples, seqlen  number of calibration windows, and tokens in each
    own_samples         further windows, which the unquantized model writes itself
    own_prompt          tokens of the dataset that every second text of its own begins with
    text_column         column of a dataset that holds the text; None to detect it
    format              row of FORMATS
    dtype               of scales and unquantized weights: auto (the model's), bfloat16, float16, float32
    seed                seed of all random choices
    max_shard_size      bytes of the largest weight file
    calibration_sha256  hash of the calibration tokens, written by a run; a later run warns if its tokens differ
    model_commit        commit of the hub repository of the model, written by a run; a later run warns if it differs
    settings            settings of the transforms and the rounder, by part; a table per part in a file
    """

    method: str = "awq"
    transforms: tuple[str, ...] = ()
    rounder: str = "rtn"
    clip: bool = False
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: str = "none"
    scheme: str | None = None
    schemes: dict[str, str] = field(default_factory=dict)
    head: str | None = None
    embeddings: str | None = None
    kv_cache: str | None = None
    target_bits: float | None = None
    target_size: int | None = None
    target_ms: float | None = None
    target_gpu: str = "H200"
    candidates: tuple[str, ...] = ()
    distill_steps: int = 0
    distill_codes: bool = False
    distill_tokens: int = 2048
    distill_samples: int = 0
    ignore: tuple[str, ...] = (HEAD,)
    dataset: str | None = None
    num_samples: int = 0
    seqlen: int = 0
    own_samples: int = 0
    own_prompt: int = 0
    text_column: str | None = None
    format: str = "compressed-tensors"
    dtype: str = "auto"
    seed: int = 42
    max_shard_size: int = 5_000_000_000
    calibration_sha256: str | None = None
    model_commit: str | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def default_scheme(self) -> Scheme:
        """The scheme of every linear that `schemes` does not name and whose inputs are divisible by the group size."""
        if self.scheme is not None:
            return parse_scheme(self.scheme)
        return replace(make_scheme(self.bits, self.group_size, self.symmetric), inputs=ACTIVATIONS[self.activations])

    @property
    def budgeted(self) -> bool:
        """True if schemes are distributed over the linears within a budget."""
        return any(target is not None for target in (self.target_bits, self.target_size, self.target_ms))

    def merged(self, values: Mapping[str, Any], others: Iterable[str] = ()) -> "Recipe":
        """A copy of this recipe with `values` replaced. RecipeError for an unknown key names the nearest known one.

        others  keys of parts' settings, to be suggested too
        """
        checked = {key: _checked(key, value, others) for key, value in values.items()}
        return replace(self, **checked)

    def to_toml(self) -> str:
        """The recipe as TOML text. `export.recipes.read_recipe` reads it back without loss."""
        told = TOLD if self.scheme else ()
        found = {key: value for key, value in asdict(self).items() if key not in told}
        values = {key: value for key, value in found.items() if value is not None and value != {}}
        return tomli_w.dumps(values | values.pop("settings", {}))


def parse_recipe(text: str, where: object) -> dict[str, Any]:
    """The keys set in TOML text; `where` names it in messages. RecipeError for invalid TOML, for names of too many
    parts, or for a key that files may not set."""
    if LONG_NAME.search(text):
        raise RecipeError(f"{where}: not TOML of a recipe (a name of {MOST_PARTS} parts or more)")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # deep lists and numbers of 5,000 digits too
        raise RecipeError(f"{where}: not TOML ({error})") from error
    for key in values.keys() & NEVER_FROM_A_FILE.keys():
        raise RecipeError(f"{key!r} is not read from a recipe: {NEVER_FROM_A_FILE[key]}")
    return values


def _checked(key: str, value: Any, others: Iterable[str] = ()) -> Any:
    types = {field.name: field.type for field in fields(Recipe) if field.name != "settings"}
    if key not in types:
        raise RecipeError(f"unknown recipe key {key!r}; {nearest(key, [*types, *others])}")
    wanted: Any = types[key]
    if wanted == tuple[str, ...] and isinstance(value, list | tuple) and _is_text(*value):
        return tuple(_pattern(key, item) for item in value)
    if wanted == dict[str, str] and isinstance(value, dict) and _is_text(*value, *value.values()):
        return {_pattern(key, name): scheme for name, scheme in value.items()}
    if wanted in (float, float | None):
        value = widened(value)
    generic = wanted in (tuple[str, ...], dict[str, str])
    if generic or not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
        raise RecipeError(f"recipe key {key!r} is {value!r}; expected {getattr(wanted, '__name__', wanted)}")
    return value


def widened(value: Any) -> Any:
    """`value` converted to float if it is an integer that a float can represent."""
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        return value


def _is_text(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _pattern(key: str, text: str) -> str:
    """`text`, a name or a `re:` pattern. RecipeError for an invalid regular expression."""
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise RecipeError(f"{key}: {text!r} is no regular expression ({error})") from error
    return text
