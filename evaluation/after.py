"""Measurements that `quantize` makes of its own result, on text that calibration never uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lowbit.calibrate.data import leading_bos
from lowbit.errors import CheckpointError, UsageError, nearest
from lowbit.evaluation.backend import Backend, TransformersBackend, choose_backend, open_backend
from lowbit.evaluation.divergence import divergence
from lowbit.evaluation.generate import PROMPTS, TOKENS, Prompt, continuations, texts_row
from lowbit.evaluation.perplexity import Score, difference, perplexity
from lowbit.evaluation.text import Protocol, cut
from lowbit.models.source import Source
from lowbit.progress import Step, tell

CONTEXT = 512
MEASURES = ("ppl", "kl", "text")
HELDOUT = "builtin held-out"  # name of that text in rows


@dataclass(frozen=True)
class Measured:
    """Scores of the original and of the checkpoint, and rows for the checkpoint; all empty if nothing was measured.

    lacks  sentences about measures that were left out, with the reason
    """

    scores: tuple[Score, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    lacks: tuple[str, ...] = ()

    def labelled(self, original: str, quantized: str) -> list[dict[str, Any]]:
        """The rows with publishable names for the two models and the text."""
        scored = {"model": quantized, "text": HELDOUT}
        names = {"generate": {"model": quantized}}
        return [
            row | names.get(row["evaluation"], scored) | {"baseline": row["baseline"] | {"model": original}}
            for row in self.rows
        ]


def parse_measures(text: str) -> tuple[str, ...]:
    """The names in `ppl,kl`. UsageError for an unknown one names the nearest."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    require_measures(names)
    return names


def require_measures(names: Sequence[str], windows: int = 0) -> None:
    """UsageError for an unknown measure, with the nearest name, or for a negative number of windows."""
    if windows < 0:
        raise UsageError(f"eval_windows is {windows}: a number of windows is needed, 0 for none")
    for name in names:
        if name not in MEASURES:
            raise UsageError(f"--eval {name!r}: {nearest(name, MEASURES)}")


def measure(
    original: Source, written: Source, text: str, windows: int, measures: tuple[str, ...], device: str
) -> Measured:
    """The `measures` of both models. Empty for 0 windows.

    Perplexity and divergence are of the first `windows` of `text`, with one block in memory at a time. Texts need a
    whole model in memory, and are left out if there is no room for it. CheckpointError if a loss is not finite.
    """
    if not windows or not measures:
        return Measured()
    scored = (
        _scored(original, written, text, windows, measures, device) if {"ppl", "kl"} & set(measures) else Measured()
    )
    if "text" not in measures:
        return scored
    lack = reason_against_texts(original, device)
    if lack is not None:
        return replace(scored, lacks=(lack,))
    return replace(scored, rows=(*scored.rows, _texts((written, original), device)))


def reason_against_texts(original: Source, device: str) -> str | None:
    """The reason why `quantize` cannot let the models write, or None."""
    if choose_backend(original, device, torch.float32) != TransformersBackend.name:
        return (
            "the models wrote no texts, for which a whole one must be in memory; with more of it: lowbit eval "
            "generate DIR --baseline MODEL --record"
        )
    return None


def _texts(sources: Sequence[Source], device: str) -> dict[str, Any]:
    """The row of the models' continuations of PROMPTS, one model in memory at a time."""
    prompts = [Prompt(text) for text in PROMPTS]
    written: list[list[list[int]]] = []
    for source in sources:
        backend = TransformersBackend(source, device)
        steps = partial(_tell_step, f"continuing prompts with the {'original' if written else 'checkpoint'}")
        written.append(continuations(backend, prompts, TOKENS, on_step=steps))
    return texts_row(prompts, written, [source.tokenizer() for source in sources], TOKENS) | {"baseline": {}}


def _scored(
    original: Source, written: Source, text: str, windows: int, measures: tuple[str, ...], device: str
) -> Measured:
    begins = len(leading_bos(original.tokenizer())) > 0  # such a model is always used with BOS
    protocol = Protocol(context_for(original), windows=windows, bos=begins)
    before, after = (open_backend("blocks", source, device) for source in (original, written))
    for backend, what in ((before, "original"), (after, "checkpoint")):
        backend.on_block = partial(_tell_step, f"scoring the {what}")
    if "kl" in measures:
        found = divergence(after, before, cut(text, original, protocol))
        scores, row = (found.baseline, found.quantized), {"evaluation": "divergence"} | found.as_json()
    else:
        scores = (_score(before, text, protocol), _score(after, text, protocol))
        row = {"evaluation": "perplexity"} | scores[1].as_json() | {"baseline": scores[0].as_json()}
    if not all(score.nll - score.nll == 0 for score in scores):
        raise CheckpointError(
            f"perplexity is not finite ({[score.perplexity for score in scores]}); nothing was written"
        )
    delta, error = difference(scores[1], scores[0])
    row |= {"delta_nll": round(delta, 6), "delta_nll_se": None if error is None else round(error, 6)}
    return Measured(scores, (row,))


def _tell_step(title: str, done: int, total: int) -> None:
    tell(Step(title, done, total))


def context_for(source: Source) -> int:
    """Tokens per scored window: CONTEXT, or the model's positions if there are fewer."""
    return min(CONTEXT, source.positions or CONTEXT)


def _score(backend: Backend, text: str, protocol: Protocol) -> Score:
    return perplexity(backend, cut(text, backend.source, protocol))
