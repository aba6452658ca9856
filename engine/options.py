"""Options of an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of an engine.

    context      longest sequence in positions
    stop_tokens  the model's own end tokens
    batch        requests served at a time; more are served one batch after another
    drafter_required  as in drafts.kinds.Drafter
    """

    context: int
    stop_tokens: tuple[int, ...] = ()
    batch: int = 16
    drafter_required: bool = True
