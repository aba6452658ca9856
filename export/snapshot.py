"""Directories that must not be written to: snapshots in the hub's cache, and original models."""

import re
from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import quantization_of
from lowbit.export.plain import read_json
from lowbit.export.sharded import CONFIG_NAME

COMMIT = re.compile(r"[0-9a-f]{40}")
STORES = ("models--", "datasets--", "spaces--")  # prefix of folders in the hub's cache


@dataclass(frozen=True)
class Snapshot:
    """A repository of the hub at one commit.

    repo    its id, as org/model
    commit  40 hexadecimal digits
    """

    repo: str
    commit: str


def snapshot_at(directory: Path) -> Snapshot | None:
    """The snapshot in `directory` by the layout of the hub's cache, models--org--model/snapshots/COMMIT; None for
    others."""
    place = directory.absolute()
    store, middle = place.parent.parent.name, place.parent.name
    if middle != "snapshots" or not store.startswith("models--") or not COMMIT.fullmatch(place.name):
        return None
    return Snapshot(store.removeprefix("models--").replace("--", "/"), place.name)


def refuse_to_write_into(directory: Path) -> None:
    """Raise CheckpointError if `directory` is in the hub's cache, or holds an unquantized model."""
    parts = (*directory.absolute().parts, *directory.resolve().parts)
    if any(part.startswith(STORES) for part in parts):
        raise CheckpointError(
            f"{directory}: in the hub's cache, which other programs share; copy the model to a directory of yours, or "
            "name another output"
        )
    if _holds_original(directory):
        raise CheckpointError(
            f"{directory}: holds an unquantized model, beside which nothing is written; name another output"
        )


def _holds_original(directory: Path) -> bool:
    """True for safetensors files with a config.json that declares no quantization."""
    if not any(directory.glob("*.safetensors")):
        return False
    try:
        return quantization_of(directory, read_json(directory / CONFIG_NAME)) is None
    except CheckpointError:  # an incomplete model, or none
        return False


def published_name(model: str) -> str:
    """The name of a model for publication: the id of a snapshot, or the directory's name without the user's path."""
    snapshot = snapshot_at(Path(model))
    if snapshot is not None:
        return snapshot.repo
    return Path(model).resolve().name if Path(model).is_dir() else model
