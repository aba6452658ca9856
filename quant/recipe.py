"""A recipe: everything that decides the bytes of a quantized checkpoint, as a value and as a TOML file."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from quant.scheme import Scheme, make_scheme

NEVER_FROM_A_FILE = {"trust_remote_code": "code of a model runs only where you say so on the command line"}


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says which key, and what would do."""


@dataclass(frozen=True)
class Recipe:
    """What to do with a model.

    method              a row of the table of methods
    bits, group_size    of the weights; group_size -1 is one scale per output channel
    symmetric           signed codes without zeros, or unsigned codes with integer zeros
    ignore              linears left alone: exact names, or `re:` patterns, or the last parts of a name
    dataset             calibration text, as calibrate/data.py reads it; None for methods that need none
    num_samples, seqlen  calibration windows and tokens in each
    text_column         column of a dataset that holds the text; None to find it
    format              a row of the table of formats
    dtype               of scales and unquantized weights: auto (the model's), bfloat16, float16, float32
    seed                of everything random
    max_shard_size      bytes
    calibration_sha256  hash of the calibration tokens, written by a run; a later run that gets others says so
    """

    method: str = "awq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    ignore: tuple[str, ...] = ("lm_head",)
    dataset: str | None = None
    num_samples: int = 0
    seqlen: int = 0
    text_column: str | None = None
    format: str = "compressed-tensors"
    dtype: str = "auto"
    seed: int = 42
    max_shard_size: int = 5_000_000_000
    calibration_sha256: str | None = None

    @property
    def scheme(self) -> Scheme:
        """The scheme of every weight whose inputs divide by the group size."""
        return make_scheme(self.bits, self.group_size, self.symmetric)

    def merged(self, values: Mapping[str, Any]) -> "Recipe":
        """This recipe with `values` in place; RecipeError names the nearest key for one that does not exist."""
        checked = {key: _checked(key, value) for key, value in values.items()}
        return replace(self, **checked)

    def to_toml(self) -> str:
        """The recipe as a TOML file that `read_recipe` reads back equal."""
        return tomli_w.dumps({key: value for key, value in asdict(self).items() if value is not None})


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys that a TOML file sets, checked. RecipeError where it is no TOML or a key is unknown."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path}: not TOML ({error})") from error
    return {key: _checked(key, value) for key, value in values.items()}


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence naming the known word nearest to `word`, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _checked(key: str, value: Any) -> Any:
    types = {field.name: field.type for field in fields(Recipe)}
    if key in NEVER_FROM_A_FILE:
        raise RecipeError(f"{key!r} is not read from a recipe: {NEVER_FROM_A_FILE[key]}")
    if key not in types:
        raise RecipeError(f"unknown recipe key {key!r}; {nearest(key, types)}")
    if isinstance(value, list) and types[key] == tuple[str, ...] and all(isinstance(item, str) for item in value):
        return tuple(value)
    plain: Any = tuple if types[key] == tuple[str, ...] else types[key]
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is int):
        raise RecipeError(f"recipe key {key!r} is {value!r}; expected {getattr(plain, '__name__', plain)}")
    return value
