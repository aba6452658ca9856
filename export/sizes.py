"""Sizes that a configuration claims, held against the files before anything of that size is made."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.tensorfile import TensorEntry

# Keys that say how many layers there are, and how wide something is: their numbers end up as lists and tensors.
DEPTH = re.compile(r"(?:^|_)(?:layers?|depth|blocks)$")
WIDTH = re.compile(
    r"(?:vocab|hidden|intermediate|embed|embedding|ffn|inner)\w*_(?:size|dim)$|(?:^|_)(?:dim|heads?|experts|labels)$"
    r"|^n_(?:embd|inner)$|^d_(?:model|ff|kv|inner)$"
)
SLACK = 8  # int32 words of packed weights stand for up to eight; heads and groups are parts of a width
LEAST_DEPTH, LEAST_WIDTH = 256, 1 << 13  # below these a claim costs nothing, whatever the files hold


def require_sizes(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], where: Path) -> None:
    """Raise CheckpointError where `config`, read from `where`, claims far more layers or width than `entries` hold.

    What contradicts the files by less is found when the model's parameters are compared with them, tensor by
    tensor. This is for a number like ten million, which no loop over layers survives.
    """
    numbers = {number for name in entries for number in re.findall(r"(?<=\.)\d+(?=\.|$)", name)}
    widest = max((size for entry in entries.values() for size in entry.shape), default=0)
    depth, width = SLACK * max(len(numbers), LEAST_DEPTH // SLACK), SLACK * max(widest, len(numbers), LEAST_WIDTH)
    for key, value in _numbers(config):
        most = depth if DEPTH.search(key) else width if WIDTH.search(key) else value
        if value > most:
            held = f"{len(numbers)} numbered layers or experts" if DEPTH.search(key) else f"no dimension above {widest}"
            raise CheckpointError(
                f"{where}: {key} is {value}, and the files hold {held}: config.json belongs to another model"
            )


def _numbers(value: Any) -> Iterator[tuple[str, int]]:
    """Every key with a whole number, at any depth."""
    if isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, int):
                yield key, inner
            yield from _numbers(inner)
