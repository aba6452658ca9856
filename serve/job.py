"""A job: one request in the queue or in the batch, and the function that gets its results."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lowbit.engine.request import Request
from lowbit.engine.sampling import Piece, TokenLogprob
from lowbit.errors import EngineError
from lowbit.serve.slots import Slot

ORDER = itertools.count()


@dataclass(frozen=True)
class Update:
    """One step's result for a job: its piece, and the log-probabilities of the piece's tokens if requested."""

    piece: Piece
    logprobs: tuple[TokenLogprob, ...] = ()


class Constraint(Protocol):
    """A rule for the next token, and its state: see grammar.Grammar."""

    def copy(self) -> "Constraint":
        """The same rule in the same state."""

    def fill(self, row: Tensor) -> None:
        """Write the mask of the next token: int32, one bit per token."""

    def take(self, token: int) -> None:
        """Go on by a token."""

    @property
    def ended(self) -> bool:
        """True if the text is complete."""


Tell = Callable[["Job", Update | EngineError], None]


@dataclass(eq=False)
class Job:
    """One request.

    tell       called on the session's thread with each update, or with the error that ended the job
    client     name of the client, for a fair order among clients
    cancelled  True once nobody waits for the rest
    slot       its slot in the cache, once it has one
    read       positions of its sequence in the cache, while it is read
    reused     positions that were copied or kept instead of computed
    grammar    that the text must follow, if any
    """

    request: Request
    tell: Tell
    client: str = ""
    grammar: Constraint | None = None
    cancelled: bool = False
    slot: Slot | None = None
    read: int = 0
    reused: int = 0
    scores: list[TokenLogprob] = field(default_factory=list)
    order: int = field(default_factory=lambda: next(ORDER))

    @property
    def length(self) -> int:
        """The most positions that the sequence may need."""
        return len(self.request.prompt) + self.request.most
