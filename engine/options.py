"""How an engine serves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How an engine serves.

    context      positions of a sequence
    int8_cache   keys and values with 8 bits
    stop_tokens  the model's own
    batch        requests served together; more are served in turn
    """

    context: int
    int8_cache: bool = False
    stop_tokens: tuple[int, ...] = ()
    batch: int = 16
