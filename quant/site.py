"""Sites, folds and heads: linears with a common input, and places where scales and rotations can move between
layers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """Linears that multiply the same input.

    linears  their names
    width    k, the inputs of each
    """

    linears: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class Fold:
    """A place where scales can move from activations into weights without changing the block's output.

    producer   the norm or linear whose outputs are divided by the scale
    offset     constant that the norm adds to its weight (1.0 in Gemma's (1 + w)); 0.0 for plain norms and linears
    is_linear  True if the producer is a linear: then rows of its weight are divided
    channels   number of the producer's outputs
    columns    consumer's name -> (k,) int64: the producer's channel behind each input column. With grouped-query
               attention several columns share a channel. Channels without columns keep scale 1
    """

    producer: str
    offset: float
    is_linear: bool
    channels: int
    columns: dict[str, Tensor]

    def column_scales(self, scales: Tensor, consumer: str) -> Tensor:
        """The scale (k,) of each input column of `consumer`, from the scales (channels,) of the producer's outputs."""
        return scales[self.columns[consumer].to(scales.device)]

    def on_used_channels(self, scales: Tensor) -> Tensor:
        """`scales` (channels,) for channels that feed a column, 1 for others (queries and keys of a fused qkv
        linear)."""
        used = torch.zeros(self.channels, dtype=torch.bool, device=scales.device)
        for columns in self.columns.values():
            used[columns.to(scales.device)] = True
        return torch.where(used, scales, torch.ones_like(scales))

    def per_channel(self, values: dict[str, Tensor], reduce: str) -> Tensor:
        """Values per input column (consumer -> (k,)), reduced to the producer's channels by `reduce` ("mean", "amax").

        Channels without columns get 1.
        """
        first = next(iter(values.values()))
        index = torch.cat([self.columns[name].to(first.device) for name in values])
        source = torch.cat([values[name].float() for name in values])
        return first.new_ones(self.channels, dtype=torch.float32).scatter_reduce_(
            0, index, source, reduce=reduce, include_self=False
        )

    def describe(self) -> str:
        names = ", ".join(name.split(".")[-1] for name in self.columns)
        return f"{self.producer} -> {names}"


@dataclass(frozen=True)
class Heads:
    """A fold between two linears whose channels can also be rotated within each head.

    fold      its columns come in runs of the head size, one head per run
    channels  (h, size) int64: the producer's channels of each head
    """

    fold: Fold
    channels: Tensor

    @property
    def consumer(self) -> str:
        """The linear that reads the heads' channels."""
        return next(iter(self.fold.columns))
