"""Recipes in files."""

from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, RecipeError
from lowbit.export.files import read_text
from lowbit.quant.recipe import parse_recipe

MOST_BYTES = 1 << 20  # a scheme for each linear of a large model takes a tenth


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys set in a TOML file. RecipeError if it is not a file, is too large, or as in `parse_recipe`."""
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except CheckpointError as error:
        raise RecipeError(str(error)) from error
    return parse_recipe(text, path)
