"""A text with images, as the output of a checkpoint's processor."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ImageText:
    """One sample: the model's keyword arguments, and the positions of image features.

    tensors  arguments by name; `input_ids` (1, T) int64
    marks    (T,) bool, True for placeholders of image features
    """

    tensors: dict[str, Tensor]
    marks: Tensor

    @property
    def ids(self) -> Tensor:
        """The token ids (1, T)."""
        return self.tensors["input_ids"]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self.tensors.values())

    @property
    def words(self) -> Tensor:
        """The ids (t,) of text tokens; all ids if there are none."""
        return self.ids[0] if bool(self.marks.all()) else self.ids[0][~self.marks]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all tensors with their names, dtypes and shapes."""
        digest = hashlib.sha256()
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def arguments(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        """The tensors on `device`, floating-point ones in `dtype`."""
        return {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self.tensors.items()
        }


Batch = Tensor | ImageText  # token ids (B, T) of texts alone, or one sample with images


def ids_of(batch: Batch) -> Tensor:
    """The token ids (B, T) of a batch."""
    return batch if isinstance(batch, Tensor) else batch.ids


def words_of(batch: Batch) -> Tensor:
    """The token ids (t,) of text in a batch."""
    return batch.flatten() if isinstance(batch, Tensor) else batch.words
