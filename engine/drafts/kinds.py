"""The kinds of drafters that are loaded from a directory, one row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.engine.architecture import Architecture, Names
from lowbit.engine.drafts.block import block_names, block_taps, load_block
from lowbit.engine.drafts.eagle import eagle_names, eagle_taps, load_eagle
from lowbit.engine.drafts.heads import Head, Model
from lowbit.engine.weights import CheckpointReader, Settings
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import Checkpoint


@dataclass(frozen=True)
class Drafter:
    """A drafter to load.

    name      directory or hub id, or "mtp" for the head that the model's own files carry
    scheme    "dense", or the scheme to round its dense linears to while loading ("int8", "int4-g64")
    required  False: texts are written without it, with a warning, if it cannot be loaded or its keys and values do not
              fit
    """

    name: str
    scheme: str = "dense"
    required: bool = True


@dataclass(frozen=True)
class Kind:
    """A kind of drafter.

    mark      part of a name in config.json's `architectures`
    family    of engine/families.py, whose fields its configuration has
    names     of its tensors, by those that the files hold
    taps      layers of the model, from 0, whose outputs it reads
    """

    mark: str
    family: str
    names: Callable[[Mapping[str, Any]], Names]
    taps: Callable[[Mapping[str, Any], int], tuple[int, ...]]
    load: Callable[[CheckpointReader, Mapping[str, Any], tuple[int, ...], Model], Head]


KINDS = (
    Kind("Eagle3", "llama", eagle_names, eagle_taps, load_eagle),
    Kind("DFlash", "qwen3", block_names, block_taps, load_block),
)


def kind_of(checkpoint: Checkpoint) -> Kind:
    """The row of KINDS for a checkpoint. CheckpointError for an unknown one lists the known ones."""
    found = checkpoint.config.get("architectures")
    names = [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
    kind = next((kind for kind in KINDS if any(kind.mark in name for name in names)), None)
    if kind is None:
        known = ", ".join(kind.mark for kind in KINDS)
        raise CheckpointError(f"{checkpoint.head}: architectures are {found!r}, no drafter; known are {known}")
    return kind


def taps_for(checkpoint: Checkpoint, architecture: Architecture, model: Architecture) -> tuple[int, ...]:
    """The layers of a model, from 0, whose outputs a drafter reads. CheckpointError if it was made for another."""
    kind, config = kind_of(checkpoint), checkpoint.config
    wide = config.get("target_hidden_size") or architecture.hidden
    for what, own, needed in (
        ("vocabulary", architecture.vocabulary, model.vocabulary),
        ("hidden size of its model", wide, model.hidden),
    ):
        if own != needed:
            raise CheckpointError(
                f"{checkpoint.head}: the drafter's {what} is {own}, that of the model {needed}: it was made for another"
            )
    layers = len(model.layers)
    taps = kind.taps(config, layers)
    wrong = [tap for tap in taps if type(tap) is not int or not 0 <= tap < layers]
    if wrong or len(set(taps)) < len(taps) or not taps:
        raise CheckpointError(
            f"{checkpoint.head}: the drafter reads outputs of layers {list(taps)} (from 0), the model has {layers}: it "
            "was made for another"
        )
    return taps


def load_head(checkpoint: Checkpoint, architecture: Architecture, model: Model, settings: Settings) -> Head:
    """The head in a checkpoint. CheckpointError if it is damaged, or made for another model."""
    kind, config = kind_of(checkpoint), checkpoint.config
    taps = taps_for(checkpoint, architecture, model.architecture)
    reader = CheckpointReader(checkpoint, kind.names(checkpoint.entries), architecture, settings)
    head = kind.load(reader, config, taps, model)
    reader.refuse_leftovers()
    return head
