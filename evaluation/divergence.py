"""Kullback-Leibler divergence from the unquantized model, token by token.

Perplexity depends on the probability of one token, KL on all of them, and errors cannot cancel: KL(P || Q) = sum p
log(p / q) is 0 only if the quantized model Q predicts exactly what the original P does. Both models read the same
windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, tee
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.evaluation.backend import LOSS_ROWS, Backend
from lowbit.evaluation.journal import Journal, Library
from lowbit.evaluation.perplexity import OnStep, Score, score_of, silent
from lowbit.evaluation.text import Cut, require_same_tokens

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
WORST = 24  # worst tokens reported with their text, at most WORST_A_WINDOW per window
WORST_A_WINDOW = 4
CONTEXT_SHOWN = 24  # tokens of text shown before a worst token


@dataclass(frozen=True)
class Divergence:
    """The comparison of two models on the same windows.

    kl        (windows,) list of float32 (scored,)  KL at every scored position, in nats
    agree     (windows,) list of bool (scored,)     True if both models have the same most likely token
    worst     rows of the worst tokens: kl, window, position, text before, next token, expectations of each model
    baseline, quantized  the losses of both on the same tokens
    """

    kl: list[Tensor]
    agree: list[Tensor]
    worst: list[dict[str, Any]]
    baseline: Score
    quantized: Score

    @cached_property
    def all_kl(self) -> Tensor:
        """KL at every scored position, float64."""
        return torch.cat(self.kl).double()

    @property
    def mean(self) -> float:
        return float(self.all_kl.mean())

    @property
    def mean_error(self) -> float | None:
        """Standard error of the mean over windows, which are less dependent than tokens; None for a single window."""
        if len(self.kl) < 2:
            return None
        weight = len(self.kl) / len(self.all_kl)
        sums = torch.stack([row.double().sum() * weight for row in self.kl])
        return float(sums.std() / len(sums) ** 0.5)

    @property
    def top1(self) -> float:
        """Share of positions at which both models have the same most likely token."""
        return float(torch.cat(self.agree).double().mean())

    def by_position(self, buckets: int = 16) -> list[dict[str, float]]:
        """Mean KL and agreement for equal ranges of positions in a window."""
        positions = torch.cat([torch.arange(first, len(ids)) for ids, first in _windows(self.baseline.cut)])
        agree, context = torch.cat(self.agree).double(), self.baseline.context
        edges = torch.linspace(1, context, min(buckets, context - 1) + 1).round().long().tolist()
        rows = []
        for begin, end in pairwise(edges):
            inside = (positions >= begin) & (positions < end)
            if inside.any():
                kl, share = float(self.all_kl[inside].mean()), float(agree[inside].mean())
                rows.append({"from": begin, "to": end - 1, "kl": _round(kl), "top1": _round(share)})
        return rows

    def survival(self, points: int = 60) -> list[tuple[float, float]]:
        """(KL, share of tokens beyond it) at ranks spaced evenly in the logarithm, for a plot with a detailed tail."""
        ordered = self.all_kl.sort(descending=True).values
        ranks = torch.logspace(0, torch.log10(torch.tensor(float(len(ordered)))), points).round().long().unique() - 1
        return [(_round(float(ordered[rank])), _round((int(rank) + 1) / len(ordered))) for rank in ranks]

    def as_json(self) -> dict[str, Any]:
        quantiles = torch.quantile(self.all_kl, torch.tensor(list(QUANTILES.values()), dtype=torch.float64))
        named = dict(zip(QUANTILES, map(_round, quantiles.tolist()), strict=True))
        error = self.mean_error
        return self.quantized.as_json() | {
            "kl_mean": _round(self.mean),
            "kl_mean_se": None if error is None else _round(error),
            **{f"kl_{name}": value for name, value in named.items()},
            "kl_max": _round(float(self.all_kl.max())),
            "top1_agreement": _round(self.top1),
            "baseline": self.baseline.as_json(),
            "by_position": self.by_position(),
            "survival": self.survival(),
            "worst": self.worst,
        }


@torch.no_grad()
def divergence(
    quantized: Backend, baseline: Backend, cut: Cut, library: Library | None = None, on_step: OnStep = silent
) -> Divergence:
    """The divergence of `quantized` from `baseline` on the windows of `cut`. Both must tokenize alike.

    CheckpointError if the vocabularies differ.
    """
    require_same_vocabulary(quantized, baseline)
    journal = (library or Library()).journal("divergence", [quantized, baseline], ids=cut.ids_sha256)
    on_step(len(journal.rows), len(cut.windows))
    batches = cut.batches(baseline.source.vocabulary, frozenset(journal.rows))
    known, ours, theirs = tee(batches, 3)
    logits = zip(
        known,
        quantized.logits(ids for _, ids in ours),
        baseline.logits(ids for _, ids in theirs),
        strict=True,
    )
    for (windows, _), q, p in logits:
        for row, index in enumerate(windows):
            journal.add(index, _compare(p[row], q[row], cut.windows[index], cut.first[index]))
        on_step(len(journal.rows), len(cut.windows))
    return _collect(quantized, baseline, cut, journal)


def require_same_vocabulary(quantized: Backend, baseline: Backend) -> None:
    """Raise CheckpointError if the two heads have different numbers of outputs."""
    ours, theirs = quantized.source.vocabulary, baseline.source.vocabulary
    if ours != theirs:
        raise CheckpointError(
            f"{quantized.source.name} has a vocabulary of {ours} tokens, {baseline.source.name} one of {theirs}: their "
            "distributions cannot be compared; name the model that the checkpoint was made from"
        )


def _compare(p: Tensor, q: Tensor, ids: Tensor, first: int) -> dict[str, Any]:
    """One window's row; p and q are logits (T, vocabulary) of the original and the quantized model."""
    q = q.to(p.device)
    targets = ids[first:].to(p.device)
    kls, agrees, losses_p, losses_q = [], [], [], []
    span = slice(first - 1, len(ids) - 1)
    for rows_p, rows_q, wanted in zip(
        p[span].split(LOSS_ROWS), q[span].split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True
    ):
        log_p, log_q = rows_p.log_softmax(-1), rows_q.log_softmax(-1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        agrees.append(rows_p.argmax(-1) == rows_q.argmax(-1))
        losses_p.append(-log_p.gather(-1, wanted[:, None])[:, 0])
        losses_q.append(-log_q.gather(-1, wanted[:, None])[:, 0])
    kl = torch.cat(kls).clamp(min=0).cpu()  # rounding may make a zero divergence slightly negative
    worst = kl.topk(min(WORST_A_WINDOW, len(kl))).indices.tolist()
    return {
        "kl": [float(f"{value:.9g}") for value in kl.tolist()],
        "agree": torch.cat(agrees).int().tolist(),
        "nll": float(torch.cat(losses_q).double().mean()),
        "baseline_nll": float(torch.cat(losses_p).double().mean()),
        "worst": [_expected(at, kl, p[first - 1 + at], q[first - 1 + at], int(targets[at])) for at in worst],
    }


def _expected(at: int, kl: Tensor, p: Tensor, q: Tensor, wanted: int) -> dict[str, Any]:
    """The expectations of both models at scored position `at`: most likely token with its probability, and the next
    token's."""
    row: dict[str, Any] = {"at": at, "kl": _round(float(kl[at]))}
    for name, logits in (("baseline", p), ("quantized", q)):
        chances = logits.softmax(-1)
        top = int(chances.argmax())
        row[name] = {"token": top, "chance": _round(float(chances[top])), "next": _round(float(chances[wanted]))}
    return row


def _collect(quantized: Backend, baseline: Backend, cut: Cut, journal: Journal) -> Divergence:
    rows = [journal.rows[i] for i in range(len(cut.windows))]
    ranked = sorted(
        ((window, entry) for window, row in enumerate(rows) for entry in row["worst"]), key=lambda each: -each[1]["kl"]
    )
    decode = quantized.source.tokenizer().decode
    return Divergence(
        [torch.tensor(row["kl"]) for row in rows],
        [torch.tensor(row["agree"], dtype=torch.bool) for row in rows],
        [_in_words(decode, cut, window, entry) for window, entry in ranked[:WORST]],
        score_of(baseline, cut, journal, "baseline_nll"),
        score_of(quantized, cut, journal),
    )


def _in_words(decode: Any, cut: Cut, window: int, entry: dict[str, Any]) -> dict[str, Any]:
    """A worst token with the text before it, and each model's expectation as text."""
    ids, position = cut.windows[window], cut.first[window] + entry["at"]
    row = {
        "kl": entry["kl"],
        "window": window,
        "position": position,
        "before": decode(ids[max(position - CONTEXT_SHOWN, 0) : position].tolist()),
        "next": decode([int(ids[position])]),
    }
    for name in ("baseline", "quantized"):
        row[name] = entry[name] | {"token": decode([entry[name]["token"]])}
    return row


def _windows(cut: Cut) -> Iterator[tuple[Tensor, int]]:
    return zip(cut.windows, cut.first, strict=True)


def _round(value: float) -> float:
    """Six significant digits: enough for readers, and reproducible."""
    return float(f"{value:.6g}")


def require_comparable(quantized: Backend, baseline: Backend, ours: Cut, theirs: Cut) -> None:
    """Raise CheckpointError if the two models tokenize the text differently, or have different vocabularies."""
    require_same_tokens(quantized.source, baseline.source, ours, theirs)
    require_same_vocabulary(quantized, baseline)
