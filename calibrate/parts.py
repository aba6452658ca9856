"""Parts of a recipe: base classes of transforms and rounders, with their names, settings and needs.

A part is a frozen dataclass whose fields are its settings. Recipe tables, command-line options and tables in the
documents are generated from them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor

from lowbit.calibrate.block import BlockWork
from lowbit.calibrate.discover import Structure
from lowbit.models.states import States
from lowbit.quant.qtensor import QTensor
from lowbit.quant.recipe import Recipe
from lowbit.quant.site import Heads

Rows = list[dict[str, Any]]  # rows of the report


@dataclass(frozen=True)
class Needs:
    """Inputs that a part needs.

    calibration    calibration tokens
    statistics     statistics of every linear's inputs, before the part starts
    second_stream  the unquantized model's outputs after each block
    """

    calibration: bool = True
    statistics: bool = True
    second_stream: bool = False


@dataclass(frozen=True)
class BlockTask:
    """A loaded block with everything that parts may use.

    heads     returns folds whose channels can be rotated within heads; expensive: it proves each on the block
    entering  the block's input states, all batches
    sample    one batch, spread over all batches
    targets   the unquantized model's outputs of the block; empty if no part needs the second stream
    """

    work: BlockWork
    structure: Structure
    heads: Callable[[], list[Heads]]
    entering: list[States]
    sample: list[States]
    targets: list[States]
    recipe: Recipe


@dataclass(frozen=True)
class Rounded:
    """A rounded linear.

    weight  codes and scales
    wanted  (n, k) float32  the weight that was rounded, in parts (numerics.in_parts), maybe with the errors of other
            weights compensated in it
    """

    weight: QTensor
    wanted: Tensor


def setting(
    default: Any, text: str, *flags: str, valid: Callable[[Any], bool] = lambda value: True, rule: str = ""
) -> Any:
    """A field of a part that is one of its settings.

    text   sentence for --help, its default included
    flags  further names of its option
    valid  True for valid values; `rule` describes them
    """
    return field(default=default, metadata={"text": text, "flags": flags, "valid": valid, "rule": rule})


class Part(ABC):
    """A part of a recipe, with a name, a line of help, and needs. The fields of its dataclass are its settings."""

    name: ClassVar[str]
    help: ClassVar[str]
    needs: ClassVar[Needs] = Needs()

    @classmethod
    def settings(cls) -> dict[str, "Field[Any]"]:
        """Its settings by name."""
        return {each.name: each for each in fields(cls)} if is_dataclass(cls) else {}


class Transform(Part):
    """A change of weights that leaves the block's output unchanged before rounding.

    mixes_channels  True if it must come before statistics and before transforms that scale channels
    """

    mixes_channels: ClassVar[bool] = False

    @abstractmethod
    def apply(self, task: BlockTask) -> Rows:
        """Transform the block. Returns one report row per fold."""


class Rounder(Part):
    """A choice of codes for a block's weights."""

    @abstractmethod
    def round(self, task: BlockTask) -> dict[str, Rounded]:
        """Round every linear with a scheme. Afterwards the block computes with the rounded weights."""
