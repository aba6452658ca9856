"""The pieces that several public functions share."""

from dataclasses import dataclass

PAPERS_BYTES = 50_000_000  # room for everything in a checkpoint that is no weight


@dataclass(frozen=True)
class Note:
    """A sentence that the user should read; `warning` where a result is at stake."""

    text: str
    warning: bool = False


def ignore(event: object) -> None:
    """Report nothing."""
