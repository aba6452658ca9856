"""A container: how a checkpoint lies in its directory, whatever its weights mean."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.export.tensorfile import TensorEntry

UNFINISHED = ".unfinished"  # ends the head's name until the directory is whole: no reader takes that


class Writer(ABC):
    """Writes the files of one checkpoint."""

    @abstractmethod
    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Its name must be new."""

    @abstractmethod
    def finish(self, config: Mapping[str, Any]) -> None:
        """Close the files, the head under its unfinished name.

        config  config.json, with its quantization_config

        Tokenizer, templates and licences lie in the directory by then. A container of one file takes them in, and
        removes what it took.
        """


class Container(ABC):
    """The files of a checkpoint. One instance serves every format that is stored so.

    head     the file without which a directory is no checkpoint
    weights  patterns of the names of the files that hold tensors
    """

    head: str
    weights: tuple[str, ...]

    @abstractmethod
    def read(self, directory: Path, head: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        """config.json and the tensors by name, from headers alone; `head` is the head's path, finished or not.

        A tensor is plain bytes in a file: blocks of a kind that torch has no type for are bytes (uint8). Raises
        CheckpointError where the files are damaged or contradict one another.
        """

    @abstractmethod
    def writer(self, directory: Path, max_shard_bytes: int) -> Writer:
        """A writer of a checkpoint in `directory`, in files of at most `max_shard_bytes` where there may be several."""

    @contextmanager
    def companions(self, directory: Path) -> Iterator[Path]:
        """A block with the directory in which tokenizer, templates and generation config are files."""
        yield directory

    def holds(self, directory: Path, finished: bool = True) -> bool:
        """True if the checkpoint in `directory` is stored in this container."""
        return self.head_in(directory, finished).exists()

    def head_in(self, directory: Path, finished: bool = True) -> Path:
        """The head's path in `directory`."""
        return directory / (self.head if finished else self.head + UNFINISHED)

    def seal(self, directory: Path) -> None:
        """Give the head its name: the last step of a checkpoint."""
        self.head_in(directory, finished=False).rename(self.head_in(directory))
