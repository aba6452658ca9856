"""Malformed recipes: every key with values of every kind, and names of calibration datasets."""

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli_w
from hypothesis import strategies as st

import lowbit
from lowbit.calibrate.data import parse_datasets, share_samples
from lowbit.calibrate.methods import METHODS, ROUNDERS, TRANSFORMS, complete_recipe
from lowbit.export.dialects import FORMATS
from lowbit.export.recipes import read_recipe
from lowbit.quant.recipe import ACTIVATIONS
from tests.fuzz.documents import ODD, turned

Files = dict[str, bytes]
PATTERNS = (
    "lm_head",
    "q_proj",
    "model.layers.0",
    "re:^model",
    "re:(",
    "re:*x",
    "re:a{1,",
    "re:",
    "re:(?<=a)b",
    "*",
    "",
)
SCHEMES = (
    "16bit",
    "int8-channel",
    "int4-g32",
    "uint4-g32",
    "int4-g0",
    "int4",
    "uint8-g7",
    "int4-g-1",
    "int4-g32-a8token",
    "-",
)
SIZES = (-1, 0, 1, 2, 7, 8, 32, 64, 128, 1 << 40, -(1 << 70), 1 << 70)
NUMBERS = (*SIZES, 0.5, 4.5, -1.0, float("inf"), float("nan"), 1e-320)
HONEST: tuple[dict[str, Any], ...] = (
    {"method": "int8"},
    {"method": "rtn", "group_size": 32, "ignore": ["0.mlp.down_proj"]},
    {"method": "awq", "group_size": 32, "num_samples": 2, "seqlen": 16, "schemes": {"down_proj": "int8-channel"}},
    {"method": "gptq", "group_size": 32, "symmetric": False, "format": "gptq"},
    {"method": "smoothquant", "alpha": 0.5},
    {"method": "best", "group_size": 32, "target_bits": 4.5},
)
names = st.sampled_from
odd = st.sampled_from(ODD)
edits = {
    "method": names([*METHODS, "awqq"]),
    "transforms": st.lists(names([*TRANSFORMS, "none"]), max_size=3),
    "rounder": names([*ROUNDERS]),
    "schemes": st.dictionaries(names(PATTERNS), names(SCHEMES), max_size=3),
    "ignore": st.lists(names(PATTERNS), max_size=3),
    "candidates": st.lists(names(SCHEMES), max_size=3),
    "activations": names([*ACTIVATIONS]),
    "format": names([*FORMATS]),
    "dtype": names(["auto", "bfloat16", "float16", "float32"]),
    **{name: st.booleans() for name in ("symmetric", "clip")},
    **{name: names(NUMBERS) for name in ("target_bits", "target_size", "target_ms", "alpha", "damping")},
    **{
        name: names(SIZES) for name in ("bits", "group_size", "iters", "distill_steps", "num_samples", "seqlen", "seed")
    },
    **dict.fromkeys(("dataset", "text_column", "calibration_sha256", "trust_remote_code", "bitss"), odd),
}
edit = st.one_of([st.tuples(st.just(key), value | value | value | odd) for key, value in edits.items()])
recipes = st.builds(lambda honest, changes: honest | dict(changes), st.sampled_from(HONEST), st.lists(edit, max_size=3))


def _toml(values: dict[str, Any]) -> bytes:
    """The values as TOML, without those that it cannot hold."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        with suppress(TypeError, ValueError, AttributeError, RecursionError, tomllib.TOMLDecodeError):
            tomllib.loads(tomli_w.dumps({key: value}))
            kept[key] = value
    return tomli_w.dumps(kept).encode("utf-8", "replace")


def files(honest: Path) -> st.SearchStrategy[Files]:
    """A recipe, now and then with damaged bytes, and the name of a data set."""
    text = recipes.map(_toml)
    parts = names(
        ["builtin", "a.jsonl", "org/name", ":", ",", "=", "[", "]", "num", "split", "-1", "7", "train", " ", ""]
    )
    spec = st.lists(parts | st.text(max_size=3), max_size=8).map("".join)
    return st.tuples(text | text | text.flatmap(turned), spec).map(
        lambda made: {"recipe.toml": made[0], "spec": made[1].encode("utf-8", "surrogatepass")}
    )


def honest(directory: Path) -> None:
    """Leave a recipe that is in order, and a name of two sources."""
    (directory / "recipe.toml").write_bytes(_toml(HONEST[1]))
    (directory / "spec").write_text("builtin:64,org/name:en:train")


def read(place: Path) -> None:
    """All that `quantize --recipe --dry-run` does; its recipe is read back as it was written."""
    recipe = complete_recipe(read_recipe(place / "recipe.toml"))
    again = place / "again.toml"
    again.write_text(recipe.to_toml(), encoding="utf-8")
    assert complete_recipe(read_recipe(again)) == recipe
    lowbit.quantize(place, recipe=place / "recipe.toml", dry_run=True)


def read_spec(place: Path) -> None:
    """The sources that a name stands for."""
    text = (place / "spec").read_bytes().decode("utf-8", "surrogatepass")
    parts = share_samples(parse_datasets(text), 128)
    assert all(part.samples for part in parts)
