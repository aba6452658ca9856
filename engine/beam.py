"""Beam search: the sequence with the highest log-probability / length^length_penalty among those the beams reach.

The rules are those of transformers: twice as many candidates as beams, so that enough beams go on even if half of the
candidates end. The search ends when no running beam can beat the worst finished one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.engine.request import Request
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import Sampler
from lowbit.engine.sampling import Piece


@dataclass
class Finished:
    """The best `beams` finished sequences: (score, tokens), best first."""

    beams: int
    length_penalty: float
    found: list[tuple[float, list[int]]] = field(default_factory=list)

    def add(self, logprob: float, tokens: list[int]) -> None:
        """Add a finished sequence, if it is among the best."""
        self.found.append((logprob / len(tokens) ** self.length_penalty, tokens))
        self.found = sorted(self.found, key=lambda entry: -entry[0])[: self.beams]

    def closed_to(self, logprob: float, length: int) -> bool:
        """True if a running beam with this log-probability and length can no longer get in."""
        return len(self.found) == self.beams and self.found[-1][0] >= logprob / length**self.length_penalty


def run_beams(runner: Runner, sampler: Sampler, request: Request) -> Iterator[Piece]:
    """Serve one request, with one beam per row of the runner. The text comes in one piece, at the end."""
    beams, cache, device = request.sampling.beams, runner.cache, runner.tokens.device
    stops = torch.tensor(sorted(set(request.constraints.stop_tokens)), dtype=torch.int64, device=device)
    finished = Finished(beams, request.sampling.length_penalty)
    sampler.start([request.constraints] * beams)
    logits = runner.reader.last_logits([request.prompt]).expand(beams, -1)
    cache.reorder(torch.zeros(beams, dtype=torch.int64, device=device))
    # all beams start equal: only the first may go on, otherwise all would stay equal
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
    """The beams that go on, best first: log-probabilities (beams, 1), their previous rows, and their new tokens.

    Candidates among the best `beams` that end with a stop token are added to `finished`.
    """
    beams, vocabulary = logits.shape
    scores = sampler.penalize(logits.log_softmax(-1)) if sampler.features.penalized else logits.log_softmax(-1)
    # enough candidates that `beams` remain even if every beam's stop tokens are all among them
    candidates = min((1 + max(len(stops), 1)) * beams, beams * vocabulary)
    best, places = (totals + scores).flatten().topk(candidates)
    rows, tokens = places // vocabulary, places % vocabulary
    ends = torch.isin(tokens, stops)
    for rank in ends[:beams].nonzero().flatten().tolist():
        if best[rank] > float("-inf"):
            finished.add(float(best[rank]), [*written[int(rows[rank])], int(tokens[rank])])
    on = (~ends).nonzero().flatten()[:beams]
    return best[on].unsqueeze(1), rows[on], tokens[on]
