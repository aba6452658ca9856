"""Plausibility of sizes in a configuration, checked against the files before anything of that size is allocated."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.tensorfile import TensorEntry

# Keys for numbers of layers, and for widths: lists and tensors of these sizes are allocated.
DEPTH = re.compile(r"(?:^|_)(?:layers?|depth|blocks)$")
WIDTH = re.compile(
    r"(?:vocab|hidden|intermediate|embed|embedding|ffn|inner)\w*_(?:size|dim)$|(?:^|_)(?:dim|heads?|experts|labels)$"
    r"|^n_(?:embd|inner)$|^d_(?:model|ff|kv|inner)$"
)
SHARE = re.compile(r"^(?:partial_rotary_factor|rotary_(?:pct|percent)|rope_pct)$")  # of a head's channels
SLACK = 8  # an int32 word holds up to 8 packed weights; heads and groups are fractions of a width
LEAST_DEPTH, LEAST_WIDTH = 256, 1 << 13  # smaller claims are harmless, whatever the files hold


def require_sizes(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], where: Path) -> None:
    """Raise CheckpointError if `config`, from the file `where`, claims far more layers or width than `entries` hold.

    Smaller contradictions are found later, when the model's parameters are compared with the files tensor by tensor.
    This check is for numbers like ten million, with which no loop over layers ends.
    """
    numbers = {number for name in entries for number in re.findall(r"(?<=\.)\d+(?=\.|$)", name)}
    widest = max((size for entry in entries.values() for size in entry.shape), default=0)
    depth, width = SLACK * max(len(numbers), LEAST_DEPTH // SLACK), SLACK * max(widest, len(numbers), LEAST_WIDTH)
    for key, value in _numbers(config):
        if SHARE.search(key) and value > 1:
            raise CheckpointError(f"{where}: {key} is {value}, a share of each head's channels, and is 1 at most")
        most = depth if DEPTH.search(key) else width if WIDTH.search(key) else value
        if value > most:
            held = f"{len(numbers)} numbered layers or experts" if DEPTH.search(key) else f"no dimension above {widest}"
            raise CheckpointError(
                f"{where}: {key} is {value}, and the files hold {held}: config.json belongs to another model"
            )


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Every number with its key, at any depth."""
    if isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, int | float):
                yield key, inner
            yield from _numbers(inner)
