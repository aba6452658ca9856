"""Conversion of library errors on untrusted files into CheckpointError."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowbit.errors import CheckpointError, LowbitError


@contextmanager
def untrusted(where: object, what: str) -> Iterator[None]:
    """A context for a library that reads an untrusted file: any exception becomes a CheckpointError.

    where  the file or directory, for the message
    what   complaint for the message: "no tokenizer that transformers can load"

    Panics of Rust libraries, which do not derive from Exception, are caught too. A full GPU is not the file's fault and
    passes through.
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
    """An error's type and the beginning of its text, on one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
