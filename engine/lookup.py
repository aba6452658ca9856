"""Prompt lookup: speculative decoding without a draft model. Drafts are copied from an earlier occurrence of the last
tokens.

All tokens of a draft are checked in one step, one row each, and kept as far as greedy decoding agrees. The result
equals greedy decoding (on a GPU up to the rounding of products with more rows).
"""

from collections.abc import Iterator, Sequence

from lowbit.engine.request import Request
from lowbit.engine.runner import Runner
from lowbit.engine.sampling import Piece

LENGTHS = (3, 2)  # lengths of the token runs to look up, longest first


class Index:
    """The last position at which each run of LENGTHS tokens ended, before the end of the text."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens. The last one ends no run yet, so that a run cannot find itself."""
        for token in tokens:
            end = len(self.tokens)
            for length in LENGTHS:
                if end >= length:
                    self.ends[tuple(self.tokens[end - length :])] = end
            self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most `most` tokens that followed the longest run at the end of the text, at its previous occurrence."""
        for length in LENGTHS:
            end = self.ends.get(tuple(self.tokens[-length:])) if len(self.tokens) > length else None
            if end is not None:
                return self.tokens[end : end + most]
        return []


def run_lookup(single: Runner, several: Runner, request: Request) -> Iterator[Piece]:
    """Serve one request until it is finished or must be read again.

    single   a runner with one row; `several` has one row more than drafts; both use the cache's sequence 0
    """
    cache = single.cache
    request.begin()
    reach = request.short if request.short is not None and request.before_turn else cache.context
    index = Index(request.sequence)
    token = int(single.reader.last_logits([request.sequence]).argmax())
    index.extend([token])
    yield request.take([token])
    while request.left:
        yield request.take(lookup_step(single, several, index, 0, reach))


def lookup_step(single: Runner, several: Runner, index: Index, start: int, reach: int) -> list[int]:
    """The tokens that continue the text of `index`, which gets them too: one, and the drafts that are right.

    start  the cache slot of the sequence's position 0; the sequence has room for `reach` positions
    """
    most, position = len(several.tokens) - 1, len(index.tokens) - 1
    draft = index.draft(most) if position + most < reach else []
    runner = several if draft else single
    rows = [index.tokens[-1], *draft, *[0] * (len(runner.tokens) - 1 - len(draft))]
    runner.place(rows, range(position, position + len(rows)), [start] * len(rows))
    runner.advance()
    assert runner.logits is not None
    kept = accepted(draft, runner.logits.argmax(-1).tolist())
    index.extend(kept)
    return kept


def accepted(draft: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """The model's own tokens: one for each draft token that it agrees with, and one more."""
    right = next((i for i, token in enumerate(draft) if token != chosen[i]), len(draft))
    return list(chosen[: right + 1])
