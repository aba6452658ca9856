"""Beam search: the sequence of highest log-probability / length^length_penalty among those that beams reach.

The rules are transformers': twice as many candidates as beams, so that as many go on as there are beams even where
half of them end; a search is over when no running beam can beat the worst finished one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.engine.prefill import last_logits
from lowbit.engine.request import Request
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import Sampler
from lowbit.engine.sampling import Piece


@dataclass
class Finished:
    """The best `beams` ended sequences: (score, tokens), best first."""

    beams: int
    length_penalty: float
    found: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, logprob: float, tokens: list[int]) -> None:
        """A sequence that ended, if it is among the best."""
        self.found.append((logprob / len(tokens) ** self.length_penalty, tokens))
        self.found = sorted(self.found, key=lambda entry: -entry[0])[: self.beams]

    def closed_to(self, logprob: float, length: int) -> bool:
        """True if a running beam of this log-probability and length can no longer get in."""
        return len(self.found) == self.beams and self.found[-1][0] >= logprob / length**self.length_penalty


def run_beams(runner: Runner, sampler: Sampler, request: Request) -> Iterator[Piece]:
    """Serves one request with a beam a row of the runner; the text comes whole, at the end."""
    beams, cache, device = request.sampling.beams, runner.cache, runner.tokens.device
    stops = torch.tensor(sorted(set(request.constraints.stop_tokens)), dtype=torch.int64, device=device)
    finished = Finished(beams, request.sampling.length_penalty)
    sampler.start([request.constraints] * beams)
    logits = last_logits(runner.decoder, cache, [request.prompt]).expand(beams, -1)
    cache.reorder(torch.zeros(beams, dtype=torch.int64, device=device))
    # all beams start alike: only the first may go on, or all would be the same
    totals = torch.full((beams, 1), float("-inf"), device=device)
    totals[0] = 0.0
    written: list[list[int]] = [[] for _ in range(beams)]
    while True:
        totals, rows, tokens = extend(logits, totals, sampler, stops, finished, written)
        written = [[*written[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
        length = len(written[0])
        if length >= request.most or finished.closed_to(float(totals[0]), length):
            break
        cache.reorder(rows)
        sampler.reorder(rows, tokens)
        position = len(request.prompt) + length - 1
        runner.place(tokens.tolist(), [position] * beams, [cache.start(b) for b in range(beams)])
        runner.advance()
        assert runner.logits is not None
        logits = runner.logits
    if not finished.closed_to(float(totals[0]), len(written[0])):
        for total, sequence in zip(totals.flatten().tolist(), written, strict=True):
            finished.add(total, sequence)
    request.score, best = finished.found[0]
    yield request.take(best, steps=len(written[0]))


def extend(
    logits: Tensor, totals: Tensor, sampler: Sampler, stops: Tensor, finished: Finished, written: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The beams that go on, best first: log-probabilities (beams, 1), the rows they come from, their new tokens.

    Candidates that end with a stop token, and are among the best `beams`, are added to `finished`.
    """
    beams, vocabulary = logits.shape
    scores = sampler.penalize(logits.log_softmax(-1)) if sampler.features.penalized else logits.log_softmax(-1)
    # enough candidates that `beams` are left when every stop token of every beam is among them
    candidates = min((1 + max(len(stops), 1)) * beams, beams * vocabulary)
    best, places = (totals + scores).flatten().topk(candidates)
    rows, tokens = places // vocabulary, places % vocabulary
    ends = torch.isin(tokens, stops)
    for rank in ends[:beams].nonzero().flatten().tolist():
        if best[rank] > float("-inf"):
            finished.add(float(best[rank]), [*written[int(rows[rank])], int(tokens[rank])])
    on = (~ends).nonzero().flatten()[:beams]
    return best[on].unsqueeze(1), rows[on], tokens[on]
