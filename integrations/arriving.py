"""Quantized linears whose tensors another program hands over one by one: collected, joined, cut to a process's share.

The program names modules, fuses linears and splits them between processes. A file has whole linears, in the layout of
compressed-tensors; what a share holds is cut from the weight that they stand for, not from their tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.export.format import reading, tensors_written
from lowbit.quant.kernels.joined import columns_of, len_of, moved, shared_inputs, stacked
from lowbit.quant.kernels.packed import TILE_ROWS, reason_against_kernel, reason_against_packing
from lowbit.quant.kernels.row_scaled import RowScaled
from lowbit.quant.kernels.weight import RoundedInputs
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

MOST_NAMES = 3  # in a message
DENSE = "weight"  # the only tensor of a linear that is not quantized


@dataclass(frozen=True)
class Share:
    """The part of joined linears that one of several processes holds.

    widths  outputs of each linear
    k       inputs
    rank    this process, of `ranks`
    first   the first output, where it is not a multiple of the width: of a vocabulary, whose share is padded
    """

    widths: tuple[int, ...]
    k: int
    rank: int = 0
    ranks: int = 1
    first: int | None = None

    def rows(self, sizes: Sequence[int]) -> Tensor | None:
        """The outputs of this share among those of linears of `sizes`, one after the other; None for all of them.

        A linear with fewer outputs than all shares together is held by several processes. A padded share ends with
        copies of the last output. ValueError if the linears do not split so.
        """
        if self.first is not None:
            wanted = torch.arange(self.first, self.first + self.widths[0])
            return wanted.clamp_(max=sizes[0] - 1)
        whole = tuple(sizes)
        if len(sizes) < len(self.widths):  # one linear of the file with all of them
            whole = tuple(width * self.ranks for width in self.widths)
        if sum(whole) != sum(sizes) or len(whole) != len(self.widths):
            raise ValueError(f"its {sum(sizes)} outputs do not split into {self.ranks} times {self._text}")
        if whole == self.widths:
            return None
        found, begin = [], 0
        for size, width in zip(whole, self.widths, strict=True):
            holders, left = divmod(self.ranks * width, size)
            if left or not holders or self.ranks % holders:
                raise ValueError(f"its {size} outputs do not split into {self.ranks} parts of {width}")
            first = begin + self.rank // holders * width
            found.append(torch.arange(first, first + width))
            begin += size
        return torch.cat(found)

    @property
    def _text(self) -> str:
        return " + ".join(map(str, self.widths))


@dataclass(frozen=True)
class Joined:
    """Linears as one weight (n, k), unpacked.

    inputs  the rounding of their inputs
    reason  the reason why no kernel multiplies with it, or None
    """

    weight: QTensor | RowScaled | Tensor
    inputs: RoundedInputs | None
    reason: str | None


class Arriving:
    """The tensors of linears that are multiplied together, as they arrive.

    names    of the linears in the file
    schemes  of each; None for 16 bits
    k        their inputs
    """

    def __init__(self, names: Sequence[str], schemes: Sequence[Scheme | None], k: int) -> None:
        self.names, self.schemes, self.k = list(names), list(schemes), k
        self.tensors: dict[tuple[int, str], Tensor] = {}

    @property
    def name(self) -> str:
        """A name for all of them."""
        others = len(self.names) - MOST_NAMES
        return f"{self.names[0]} and {others + MOST_NAMES - 1} more" if others > 0 else " + ".join(self.names)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Names of the tensors of any of the linears. CheckpointError if a scheme does not fit the inputs."""
        return tuple(dict.fromkeys(suffix for part in range(len(self.names)) for suffix in self.suffixes_of(part)))

    def suffixes_of(self, part: int) -> tuple[str, ...]:
        """Names of the tensors of a linear."""
        scheme = self.schemes[part]
        if scheme is None:
            return (DENSE,)
        with reading(self.names[part]):
            return tuple(tensors_written(COMPRESSED_TENSORS, scheme, scheme.rows * TILE_ROWS, self.k, torch.float16))

    def put(self, suffix: str, tensor: Tensor, part: int | None = None) -> None:
        """Keep a tensor of the linear `part`; None if the file has one linear in the place of all of them.

        CheckpointError if that one would have several schemes.
        """
        if part is None and len(self.names) > 1:
            if len(set(self.schemes)) > 1:
                raise CheckpointError(f"{self.name}: one linear in the file, with several schemes")
            self.names, self.schemes = [self.name], self.schemes[:1]
        self.tensors[part or 0, suffix] = tensor

    @property
    def missing(self) -> list[str]:
        """Tensors that have not arrived."""
        parts = enumerate(self.names)
        return [f"{name}.{s}" for part, name in parts for s in self.suffixes_of(part) if (part, s) not in self.tensors]

    def joined(self, share: Share, dtype: torch.dtype, device: torch.device) -> Joined:
        """The share of the linears, joined, on `device`; their tensors are let go.

        dtype  of activations

        CheckpointError, with the name of the linear, if tensors are missing, contradict each other or do not split.
        """
        if missing := self.missing:
            raise CheckpointError(f"{missing[0]}: not in the files ({len(missing)} such tensors): they are incomplete")
        matrices = [self._matrix(part, share, device) for part in range(len(self.names))]
        self.tensors.clear()
        reason = reason_against(matrices)
        with reading(self.name):
            rows = share.rows([len_of(matrix) for matrix in matrices])
            weight = stacked(matrices, dtype)
            weight = weight if rows is None else moved(weight, rows.to(device), dtype)
        return Joined(weight, shared_inputs(matrices), reason)

    def _matrix(self, part: int, share: Share, device: torch.device) -> QTensor | Tensor:
        """A linear with the inputs of the share: quantized, or dense."""
        name, scheme = self.names[part], self.schemes[part]

        def tensor(key: str) -> Tensor:
            return self.tensors[part, key.removeprefix(f"{name}.")].to(device)

        with reading(name):
            matrix = tensor(DENSE) if scheme is None else COMPRESSED_TENSORS.read(name, tensor, scheme)
            if matrix.shape[1] != self.k:
                raise ValueError(f"it has {matrix.shape[1]} inputs, the model {self.k}")
            return matrix if share.k == self.k else columns_of(matrix, share.rank * share.k, share.k)


def reason_against(matrices: Sequence[QTensor | Tensor]) -> str | None:
    """The reason why no kernel multiplies with quantized matrices joined to one, or None."""
    quantized = [matrix for matrix in matrices if isinstance(matrix, QTensor)]
    kinds = sorted({str(matrix.scheme) for matrix in quantized})
    if len(quantized) < len(matrices) or len(kinds) > 1:
        return f"{', '.join(kinds)} beside other weights in one product"
    for matrix in quantized:
        sizes = *matrix.shape, matrix.scheme.group_size, TILE_ROWS
        reason = reason_against_kernel(matrix) or reason_against_packing(*sizes)
        if reason:
            return f"{matrix.scheme}: {reason}"
    return None


def placeholder(loader: Callable[..., Any]) -> nn.Parameter:
    """An empty parameter whose tensors go to `loader`."""
    parameter = nn.Parameter(torch.empty(0), requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter
