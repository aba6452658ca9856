"""Drafts from text: the tokens that followed when the end of the text, as much of it as possible, occurred before.

The text is the prompt and all that was written, and with a store also earlier requests. It costs the device nothing.
"""

from collections.abc import Sequence

from torch import Tensor

from lowbit.engine.drafts.automaton import Automaton
from lowbit.engine.drafts.drafter import NOTHING, Proposal

MOST = 7  # tokens of a proposal
# The share of right tokens after an end of 1, 2 to 3, 4 to 7, ... tokens occurred before, before any was measured.
CHANCES = (0.2, 0.4, 0.6, 0.75, 0.85)
CONTEXT = 64  # tokens by which a text finds its place in the store again
NEVER = -1  # version of no store


class Store:
    """Earlier texts, of at most `most` tokens together: the oldest are forgotten, half of all at a time.

    A token takes some 150 bytes.
    """

    def __init__(self, most: int = 1 << 16) -> None:
        self.most, self.texts = most, list[tuple[int, ...]]()
        self.automaton, self.version = Automaton(), 0

    def add(self, tokens: Sequence[int]) -> None:
        """Keep a text, or its end if it is longer than half of the store."""
        text = tuple(tokens[-(self.most // 2) :])
        if len(self.automaton) + len(text) + 1 > self.most:
            self.forget()
        self.texts.append(text)
        self.enter(text)

    def forget(self) -> None:
        """Forget the oldest texts, down to half of `most`."""
        kept, room = list[tuple[int, ...]](), self.most // 2
        for text in reversed(self.texts):
            room -= len(text) + 1
            if room < 0:
                break
            kept.append(text)
        self.texts, self.automaton, self.version = kept[::-1], Automaton(), self.version + 1
        for number, text in enumerate(self.texts):
            self.enter(text, number + 1)

    def enter(self, text: Sequence[int], number: int | None = None) -> None:
        """Append a text and a border after it, the negative of its number."""
        for token in text:
            self.automaton.append(token)
        self.automaton.append(-1 - (number or len(self.texts)))


class Text:
    """One sequence's text, and its place in a store."""

    def __init__(self, store: Store | None) -> None:
        self.own, self.store = Automaton(), store
        self.state, self.length, self.version = 0, 0, NEVER

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on by tokens."""
        for token in tokens:
            self.own.append(token)
        if self.store is None:
            return
        if self.store.version != self.version:
            self.state, self.length, self.version = 0, 0, self.store.version
            tokens = self.own.tokens[-CONTEXT:]
        for token in tokens:
            self.state, self.length = self.store.automaton.follow(self.state, self.length, token)

    def propose(self, most: int) -> Proposal:
        """The tokens after the longest end of the text that occurred before, here or in the store."""
        length, place = self.own.repeated()
        source = self.own
        if self.store is not None and self.version == self.store.version and self.length > length:
            source, length = self.store.automaton, self.length
            place = source.ends[self.state] + 1
        tokens = list(source.tokens[place : place + most])
        border = next((i for i, token in enumerate(tokens) if token < 0), len(tokens))
        if not length or not border:
            return NOTHING
        kind = min(length.bit_length(), len(CHANCES)) - 1
        return Proposal(tuple(tokens[:border]), kind, CHANCES[kind])


class Suffixes:
    """The drafter: see drafter.Drafter. With a store, finished texts go there."""

    taps: tuple[int, ...] = ()
    usual: Proposal | None = None
    steady = True

    def __init__(self, most: int = MOST, store: Store | None = None) -> None:
        self.most, self.store = most, store
        self.texts: dict[int, Text] = {}

    def begin(self, sequence: int, tokens: Sequence[int]) -> None:
        """See Drafter."""
        self.texts[sequence] = Text(self.store)
        self.texts[sequence].extend(tokens)

    def extend(self, sequence: int, tokens: Sequence[int], features: Tensor | None) -> None:
        """See Drafter."""
        self.texts[sequence].extend(tokens)

    def propose(self, sequences: Sequence[int], most: int) -> list[Proposal]:
        """See Drafter."""
        return [self.texts[sequence].propose(min(most, self.most)) for sequence in sequences]

    def end(self, sequence: int) -> None:
        """See Drafter."""
        text = self.texts.pop(sequence, None)
        if text is not None and self.store is not None:
            self.store.add(text.own.tokens)
