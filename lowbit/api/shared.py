"""Notes, progress and disk space shared by the public functions."""

from dataclasses import dataclass

PAPERS_BYTES = 50_000_000  # bytes for all files of a checkpoint that are not weights


@dataclass(frozen=True)
class Note:
    """A sentence for the user. `warning` is True if it may change the result."""

    text: str
    warning: bool = False


def ignore(event: object) -> None:
    """Report nothing."""
