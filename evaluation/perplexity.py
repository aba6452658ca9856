"""Perplexity, always together with the protocol that it depends on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from torch import Tensor

from lowbit.evaluation.backend import Backend
from lowbit.evaluation.journal import Journal, Library
from lowbit.evaluation.text import Cut

MOST_NATS = 700.0  # exp() overflows beyond it
OnStep = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, repr=False)
class Score:
    """A model's loss on a text.

    window_nll     (windows,) float64  mean negative log-likelihood per scored token of each window, in nats
    window_tokens  (windows,) int64    number of scored tokens of each window
    cut            the windows, and the protocol that cut them
    backend, dtype  the backend, and the dtype it computed in
    """

    model: str
    window_nll: Tensor
    window_tokens: Tensor
    cut: Cut
    backend: str = "transformers"
    dtype: str = "float32"

    def __repr__(self) -> str:
        """The figures, without the windows' thousands of token ids."""
        return f"Score({self.model!r}, perplexity={self.perplexity:.4f}, nll={self.nll:.5f}, tokens={self.tokens})"

    @property
    def nll(self) -> float:
        """Mean over all scored tokens, in nats."""
        return float((self.window_nll * self.window_tokens).sum() / self.window_tokens.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < MOST_NATS else math.inf

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return int(self.window_tokens.sum())

    @property
    def context(self) -> int:
        return self.cut.protocol.context

    @property
    def protocol(self) -> str:
        """The protocol in words, including the dtype."""
        return self.cut.describe(self.dtype)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "perplexity": round(self.perplexity, 4),
            "nll": round(self.nll, 6),
            "tokens": self.tokens,
            "windows": len(self.window_nll),
            "context": self.context,
            "protocol": self.protocol,
            "backend": self.backend,
            "text_sha256": self.cut.text_sha256,
        }


def difference(score: Score, baseline: Score) -> tuple[float, float | None]:
    """Mean paired difference of the losses in nats per token, and its standard error (None for a single window)."""
    weight = score.window_tokens / score.window_tokens.double().mean()
    delta = (score.window_nll - baseline.window_nll) * weight
    error = float(delta.std() / math.sqrt(len(delta))) if len(delta) > 1 else None
    return float(delta.mean()), error


def describe_difference(baseline: Score, score: Score) -> str:
    """`+0.00404 ± 0.00298`: the paired difference as text."""
    delta, error = difference(score, baseline)
    return f"{delta:+.5f}" if error is None else f"{delta:+.5f} ± {error:.5f}"


def perplexity(backend: Backend, cut: Cut, library: Library | None = None, on_step: OnStep = silent) -> Score:
    """The score of a model on the windows of `cut`.

    library  cache of finished windows
    on_step  called with (windows done, windows in total)
    """
    journal = (library or Library()).journal("perplexity", [backend], ids=cut.ids_sha256)
    on_step(len(journal.rows), len(cut.windows))
    indices, batches = tee(cut.batches(backend.source.vocabulary, frozenset(journal.rows)))
    losses = backend.log_likelihoods(ids for _, ids in batches)
    for (windows, _), batch in zip(indices, losses, strict=True):
        for index, row in zip(windows, batch, strict=True):
            journal.add(index, {"nll": -float(row[cut.first[index] - 1 :].double().mean())})
        on_step(len(journal.rows), len(cut.windows))
    return score_of(backend, cut, journal)


def score_of(backend: Backend, cut: Cut, journal: Journal, column: str = "nll") -> Score:
    """The score from `column` of a finished journal."""
    losses = torch.tensor([journal.rows[i][column] for i in range(len(cut.windows))], dtype=torch.float64)
    tokens = torch.tensor([len(ids) - first for ids, first in zip(cut.windows, cut.first, strict=True)])
    dtype = str(backend.dtype).removeprefix("torch.")
    return Score(backend.source.name, losses, tokens, cut, backend.name, dtype)
