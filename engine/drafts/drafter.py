"""The interface of drafters: one file here for each kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """Tokens that may follow a text.

    kind    drafts of one kind are right equally often: their shares are measured together
    chance  the share of right tokens that is assumed before anything was measured
    """

    tokens: tuple[int, ...] = ()
    kind: int = 0
    chance: float = 0.5


NOTHING = Proposal()


class Drafter(Protocol):
    """Proposes tokens for the sequences of a cache.

    taps    layers whose outputs it reads, from 0; () for none
    most    longest proposal
    usual   stands for any proposal of it, if drafts cost something; None if they are free
    steady  False if the last proposals took longer than usual: a graph was captured for them
    """

    taps: tuple[int, ...]
    most: int
    usual: Proposal | None
    steady: bool

    def begin(self, sequence: int, tokens: Sequence[int]) -> None:
        """Forget a sequence's text: it now begins with these tokens."""

    def extend(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """Go on by tokens that the model has chosen.

        features  (tokens, taps * hidden): the outputs of `taps` at the position before each token; None without taps
        """

    def propose(self, sequences: Sequence[int], most: int) -> list[Proposal]:
        """At most `most` tokens for each of these sequences, all of the vocabulary."""

    def end(self, sequence: int) -> None:
        """The sequence's text is finished."""
