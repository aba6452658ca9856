"""Slots: the sequences of a cache, and the tokens whose keys and values each still holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

KEPT = 0.5  # share of a slot's tokens that a prompt must share to take the slot over instead of copying from it


@dataclass(eq=False)
class Slot:
    """One sequence of the cache.

    tokens  those whose keys and values it holds, from position 0 on
    long    True if they were rotated for a sequence beyond the decoder's `short`
    used    time of the last use, in turns
    busy    True while a request has it
    """

    sequence: int
    tokens: list[int] = field(default_factory=list)
    long: bool = False
    used: int = 0
    busy: bool = False

    def clear(self) -> None:
        """Forget the tokens."""
        self.tokens = []


class Slots:
    """All slots of a cache. A request takes the free slot that shares most of its tokens, or the least recently used
    one."""

    def __init__(self, count: int) -> None:
        self.all = [Slot(sequence) for sequence in range(count)]
        self.turn = 0

    @property
    def free(self) -> list[Slot]:
        """Slots without a request."""
        return [slot for slot in self.all if not slot.busy]

    def take(self, prompt: Sequence[int]) -> Slot:
        """A free slot for a request with this prompt, marked busy."""
        best = max(self.free, key=lambda slot: shared(slot.tokens, prompt))
        if shared(best.tokens, prompt) <= KEPT * len(best.tokens):
            best = min(self.free, key=lambda slot: (bool(slot.tokens), slot.used))
        best.busy = True
        return best

    def release(self, slot: Slot) -> None:
        """Mark a slot free. Its tokens stay for later prompts."""
        self.turn += 1
        slot.busy, slot.used = False, self.turn

    def nearest(self, tokens: Sequence[int], long: bool, own: Slot) -> tuple[Slot, int]:
        """The slot that shares most of a sequence, busy or not, and the number of shared tokens. `own` wins a tie."""
        found = [(shared(slot.tokens, tokens) if slot.long == long else 0, slot) for slot in self.all]
        count, slot = max(found, key=lambda entry: (entry[0], entry[1] is own))
        return slot, count


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix, by bisection: slices of lists are compared fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
