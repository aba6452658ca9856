"""Parts of a recipe: a transform or a rounder says its name, its settings and its needs, and does its work.

A part is a frozen dataclass whose fields are its settings. Recipe tables, command-line options and the tables of the
documents are made from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from lowbit.calibrate.block import BlockWork
from lowbit.calibrate.discover import Structure
from lowbit.models.states import States
from lowbit.quant.qtensor import QTensor
from lowbit.quant.recipe import Recipe
from lowbit.quant.site import Heads

Rows = list[dict[str, Any]]  # of the report


@dataclass(frozen=True)
class Needs:
    """What a part looks at.

    calibration    tokens run through the model
    statistics     those of every linear's inputs, before the part begins
    second_stream  what the unquantized model returns behind the block
    """

    calibration: bool = True
    statistics: bool = True
    second_stream: bool = False


@dataclass(frozen=True)
class BlockTask:
    """A loaded block, and what parts may look at.

    heads     the heads that channels can be rotated within; costs a proof
    entering  hidden states that enter the block, all batches
    sample    one batch, spread over all
    targets   what the unquantized model returns behind the block; empty where nothing needs the second stream
    """

    work: BlockWork
    structure: Structure
    heads: Callable[[], list[Heads]]
    entering: list[States]
    sample: list[States]
    targets: list[States]
    recipe: Recipe


def setting(
    default: Any, text: str, *flags: str, valid: Callable[[Any], bool] = lambda value: True, rule: str = ""
) -> Any:
    """A field of a part: a setting of it.

    text   what it is, for --help and the documents
    flags  other names of its option, beside its own
    valid  whether a value makes sense; `rule` says when
    """
    return field(default=default, metadata={"text": text, "flags": flags, "valid": valid, "rule": rule})


class Part(ABC):
    """A part of a recipe: its name, a line of help, its needs; its settings are the fields of the dataclass it is."""

    name: ClassVar[str]
    help: ClassVar[str]
    needs: ClassVar[Needs] = Needs()

    @classmethod
    def settings(cls) -> dict[str, "Field[Any]"]:
        """Its settings, by name."""
        return {each.name: each for each in fields(cls)} if is_dataclass(cls) else {}


class Transform(Part):
    """Changes weights without changing what the block computes before rounding.

    mixes_channels  it must come before transforms that scale channels, and before statistics are gathered
    """

    mixes_channels: ClassVar[bool] = False

    @abstractmethod
    def apply(self, task: BlockTask) -> Rows:
        """Change the block; a row of the report for each place."""


class Rounder(Part):
    """Chooses the codes of a block's weights."""

    @abstractmethod
    def round(self, task: BlockTask) -> dict[str, QTensor]:
        """Every linear that has a scheme, rounded; the block computes with the rounded weights from then on."""
