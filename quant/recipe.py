"""A recipe: everything that decides the bytes of a quantized checkpoint, as a value and as a TOML file."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from lowbit.errors import RecipeError, nearest
from lowbit.quant.scheme import INPUTS, Scheme, make_scheme, parse_scheme

ACTIVATIONS = {"none": None, "token": INPUTS["a8token"], "tensor": INPUTS["a8tensor"]}
TOLD = ("bits", "group_size", "symmetric", "activations")  # what a scheme's name tells
HEAD = "lm_head"  # what recipes call the output embeddings, whatever the model does: no engine has them packed
NEVER_FROM_A_FILE = {"trust_remote_code": "code of a model runs only where you say so on the command line"}


@dataclass(frozen=True)
class Recipe:
    """What to do with a model.

    method              a row of the table of methods; what follows is its to set, and the user's to change
    transforms          rows of the table of transforms, in order
    rounder             a row of the table of rounders
    clip                search each group's range on the output error
    bits, group_size    of the weights; group_size -1 is one scale per output channel
    symmetric           signed codes without zeros, or unsigned codes with integer zeros
    activations         none (16 bits), token (int8, a scale per token), tensor (int8, one calibrated scale)
    scheme              those four at once, by a scheme's name ("fp8", "int4-g64"); None where they say it
    schemes             schemes of single linears, by exact name, last parts of a name, or `re:` pattern
    target_bits         average bits per linear weight, to be spent where they help most; None for one scheme
    distill_steps       steps of tuning all scales and norms on the model's own output, after all blocks are rounded
    ignore              linears left alone: exact names, or `re:` patterns, or the last parts of a name; the head always
    dataset             calibration text, as calibrate/data.py reads it; None for methods that need none
    num_samples, seqlen  calibration windows and tokens in each
    text_column         column of a dataset that holds the text; None to find it
    format              a row of the table of formats
    dtype               of scales and unquantized weights: auto (the model's), bfloat16, float16, float32
    seed                of everything random
    max_shard_size      bytes
    calibration_sha256  hash of the calibration tokens, written by a run; a later run that gets others says so
    settings            those of its transforms and its rounder, by part; in a file each part has a table
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
    target_bits: float | None = None
    distill_steps: int = 0
    ignore: tuple[str, ...] = (HEAD,)
    dataset: str | None = None
    num_samples: int = 0
    seqlen: int = 0
    text_column: str | None = None
    format: str = "compressed-tensors"
    dtype: str = "auto"
    seed: int = 42
    max_shard_size: int = 5_000_000_000
    calibration_sha256: str | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def default_scheme(self) -> Scheme:
        """The scheme of every linear whose inputs divide by the group size, and that `schemes` says nothing of."""
        if self.scheme is not None:
            return parse_scheme(self.scheme)
        return replace(make_scheme(self.bits, self.group_size, self.symmetric), inputs=ACTIVATIONS[self.activations])

    def merged(self, values: Mapping[str, Any], others: Iterable[str] = ()) -> "Recipe":
        """This recipe with `values` in place; RecipeError names the nearest key for one that does not exist.

        others  keys of a recipe that are not its own fields, to be named too
        """
        checked = {key: _checked(key, value, others) for key, value in values.items()}
        return replace(self, **checked)

    def to_toml(self) -> str:
        """The recipe as a TOML file that `read_recipe` reads back equal."""
        told = TOLD if self.scheme else ()
        found = {key: value for key, value in asdict(self).items() if key not in told}
        values = {key: value for key, value in found.items() if value is not None and value != {}}
        return tomli_w.dumps(values | values.pop("settings", {}))


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys that a TOML file sets. RecipeError where it is no TOML, or where a key is not for files."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, and lists in lists, are no error of TOML
        raise RecipeError(f"{path}: not TOML ({error})") from error
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
    """`value`, as a float where it is an integer that a float holds."""
    try:
        return float(value) if type(value) is int else value
    except OverflowError:
        return value


def _is_text(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _pattern(key: str, text: str) -> str:
    """`text`, a name or a `re:` pattern. RecipeError where there is no such pattern."""
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise RecipeError(f"{key}: {text!r} is no regular expression ({error})") from error
    return text
