"""Containers: how a checkpoint is divided into files, independent of its format."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.export.tensorfile import TensorEntry

UNFINISHED = ".unfinished"  # suffix of the head's name until the directory is complete; readers ignore it


class Writer(ABC):
    """Writes the files of one checkpoint."""

    @abstractmethod
    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor. Its name must be new."""

    @abstractmethod
    def finish(self, config: Mapping[str, Any]) -> None:
        """Close the files, the head under its unfinished name.

        config  config.json, with its quantization_config

        Tokenizer, templates and licences must be in the directory already. A container with a single file includes them
        and deletes their files.
        """


class Container(ABC):
    """The files of a checkpoint. One instance serves all formats with this container.

    head     name of the file that every checkpoint in this container has
    weights  name patterns of the files that hold tensors
    suffix   of an output that is the head alone; empty if the head is no whole checkpoint
    """

    head: str
    weights: tuple[str, ...]
    suffix: str = ""

    @abstractmethod
    def read(self, directory: Path, head: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        """config.json and the tensors by name, from headers alone; `head` is the head's path, finished or not.

        A tensor is bytes in a file. Block types that torch does not have are uint8. Raises CheckpointError if the files
        are damaged or contradict each other.
        """

    @abstractmethod
    def writer(self, directory: Path, max_shard_bytes: int) -> Writer:
        """A writer of a checkpoint in `directory`, in files of at most `max_shard_bytes` if the container has
        several."""

    @contextmanager
    def companions(self, directory: Path) -> Iterator[Path]:
        """A context with a directory that holds tokenizer, templates and generation config as files."""
        yield directory

    def holds(self, directory: Path, finished: bool = True) -> bool:
        """True if the checkpoint in `directory` is stored in this container."""
        return self.head_in(directory, finished).exists()

    def head_in(self, directory: Path, finished: bool = True) -> Path:
        """The head's path in `directory`."""
        return directory / (self.head if finished else self.head + UNFINISHED)

    def alone(self, output: Path) -> str | None:
        """The head's name if `output` asks for it alone, as one file."""
        return self.head if self.suffix and output.suffix == self.suffix else None

    def seal(self, directory: Path) -> None:
        """Give the head its final name, the last step of writing a checkpoint."""
        self.head_in(directory, finished=False).rename(self.head_in(directory))
