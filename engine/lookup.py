"""Speculative decoding without a draft model: what followed the last tokens when they stood in the text before.

Drafts are checked in one step, a row each, and kept as far as greedy decoding would have written them, so the tokens
are those of greedy decoding (on a GPU to the rounding of products with more rows).
"""

from collections.abc import Iterator, Sequence

from lowbit.engine.prefill import last_logits
from lowbit.engine.request import Request
from lowbit.engine.runner import Runner
from lowbit.engine.sampling import Piece

LENGTHS = (3, 2)  # of the tokens looked up, longest first


class Index:
    """Where each run of LENGTHS tokens ended last, before the end of the text."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """More text. Its last token ends no run yet: a run must not find itself."""
        for token in tokens:
            end = len(self.tokens)
            for length in LENGTHS:
                if end >= length:
                    self.ends[tuple(self.tokens[end - length :])] = end
            self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """What followed the longest run that ends the text, when it stood there last: at most `most` tokens."""
        for length in LENGTHS:
            end = self.ends.get(tuple(self.tokens[-length:])) if len(self.tokens) > length else None
            if end is not None:
                return self.tokens[end : end + most]
        return []


def run_lookup(single: Runner, several: Runner, request: Request) -> Iterator[Piece]:
    """Serves one request until it is finished or must be read again.

    single   a runner of one row; `several` has a row more than drafts; both have the cache's sequence 0
    """
    cache, most = single.cache, request.sampling.lookup
    request.begin()
    reach = request.short if request.short is not None and request.before_turn else cache.context
    index = Index(request.sequence)
    token = int(last_logits(single.decoder, cache, [request.sequence]).argmax())
    index.extend([token])
    yield request.take([token])
    position = len(request.sequence) - 1
    while request.left:
        room = position + most < reach
        draft = index.draft(most) if room else []
        runner = several if draft else single
        fill = most - len(draft) if draft else 0
        rows = [token, *draft, *[0] * fill]
        runner.place(rows, range(position, position + len(rows)), [0] * len(rows))
        runner.advance()
        assert runner.logits is not None
        chosen = runner.logits.argmax(-1).tolist()
        kept = accepted(draft, chosen)
        index.extend(kept)
        token, position = kept[-1], position + len(kept)
        yield request.take(kept)


def accepted(draft: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """The model's own tokens: one after each draft token that it would have written, and one more."""
    right = next((i for i, token in enumerate(draft) if token != chosen[i]), len(draft))
    return list(chosen[: right + 1])
