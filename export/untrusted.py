"""The one place where what libraries raise on files that may be hostile becomes our error."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowbit.errors import CheckpointError, LowbitError


@contextmanager
def untrusted(where: object, what: str) -> Iterator[None]:
    """A block in which a library reads a file that may be hostile: whatever it raises becomes a CheckpointError.

    where  the file or directory, for the message
    what   what it turns out not to be: "no tokenizer that transformers can load"

    Libraries in Rust panic with an exception that is no Exception. A GPU whose memory is full is no fault of the file.
    """
    try:
        yield
    except (LowbitError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
            raise CheckpointError(f"{where}: {what} ({said_by(error)})") from error
        raise


def said_by(error: BaseException) -> str:
    """An error's kind and the beginning of its text, on one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
