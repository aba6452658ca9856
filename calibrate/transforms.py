"""The transforms applied to a block: rotation of heads, and scales moved from activations into weights."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from lowbit.calibrate.parts import BlockTask, Needs, Rows, Transform, setting
from lowbit.calibrate.search import FoldSearch, searches
from lowbit.progress import Part, tell
from lowbit.quant.algos.awq import ScaleChoice, search_scales, weight_magnitude
from lowbit.quant.algos.smooth import SmoothChoice, search_alpha


@dataclass(frozen=True)
class Rotate(Transform):
    """Rotates every head that can be rotated."""

    name: ClassVar[str] = "rotate"
    help: ClassVar[str] = "rotation of values within attention heads"
    needs: ClassVar[Needs] = Needs(statistics=False)
    mixes_channels: ClassVar[bool] = True

    def apply(self, task: BlockTask) -> Rows:
        """One row per fold between heads, or one row with the reason if there is none."""
        rows: Rows = []
        for heads in task.heads():
            row: dict[str, Any] = {"fold": heads.fold.describe(), "transform": self.name}
            if task.work.schemes.keys() & {heads.fold.producer, heads.consumer}:
                task.work.rotate(heads)
                row["heads"], row["head_size"] = heads.channels.shape
            else:
                row["skipped"] = "neither of its linears is quantized"
            rows.append(row)
        reason = "no two of its linears are connected like values and output projection in attention"
        return rows or [{"fold": task.work.block.name, "transform": self.name, "skipped": reason}]


class Choice(Protocol):
    """The result of a search at a fold: scales to move, or None."""

    @property
    def scales(self) -> Tensor | None:
        """Scales of the producer's channels."""

    def as_json(self) -> dict[str, Any]:
        """The choice as JSON, for the report."""


class FoldTransform(Transform):
    """At every fold, moves the scale found by a search from activations into weights."""

    def apply(self, task: BlockTask) -> Rows:
        """One row per fold."""
        rows: Rows = []
        for search in searches(task.work, task.structure.folds, task.sample):
            rows += self._moved(search)
            tell(Part(f"{self.name}: searching scales", len(rows), len(task.structure.folds)))
        return rows

    def _moved(self, search: FoldSearch) -> Rows:
        rows: Rows = [{"fold": fold.describe(), "transform": self.name} for fold in search.folds]
        reason = search.reason_against()
        if reason:
            return [row | {"skipped": reason} for row in rows]
        choices = self.choose(search)
        search.apply([choice.scales for choice in choices])
        return [row | choice.as_json() for row, choice in zip(rows, choices, strict=True)]

    @abstractmethod
    def choose(self, search: FoldSearch) -> Sequence[Choice]:
        """The scale for each of the search's folds."""


@dataclass(frozen=True)
class Awq(FoldTransform):
    """AWQ: scales for channels with large activations, if they beat no scaling."""

    name: ClassVar[str] = "awq"
    help: ClassVar[str] = "scales that protect channels with large activations"

    def choose(self, search: FoldSearch) -> list[ScaleChoice]:
        """The best of AWQ's candidates."""
        masters, schemes = search.work.masters, search.work.schemes
        activation = search.of_inputs(lambda stats: stats.abs_mean, "mean")
        weight = search.of_weights(lambda name: weight_magnitude(masters[name], schemes[name]), "mean")
        return search_scales(activation, weight, search.losses())


@dataclass(frozen=True)
class Smooth(FoldTransform):
    """SmoothQuant: scales that move outliers into weights."""

    name: ClassVar[str] = "smooth"
    help: ClassVar[str] = "outliers moved from activations into weights"

    alpha: float | None = setting(
        None,
        "Move outliers with this strength of SmoothQuant, 0 to 1.  [default: searched]",
        "--smoothing-strength",
        valid=lambda value: value is None or 0 <= value <= 1,
        rule="a migration strength lies between 0 and 1",
    )

    def choose(self, search: FoldSearch) -> list[SmoothChoice]:
        """The scale with strength `alpha`, or with the best strength if `alpha` is None."""
        activation = search.of_inputs(lambda stats: stats.abs_max, "amax")
        weight = search.of_weights(lambda name: search.work.masters[name].abs().amax(0), "amax")
        return search_alpha(activation, weight, search.losses(), self.alpha)


TRANSFORMS: dict[str, type[Transform]] = {part.name: part for part in (Rotate, Awq, Smooth)}
