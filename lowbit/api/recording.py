"""Measurements added to a checkpoint: rows, card and page stay consistent."""

from pathlib import Path
from typing import Any

from lowbit.evaluation.record import record, replace_text
from lowbit.evaluation.report.card import CARD, refresh_card
from lowbit.evaluation.report.facts import facts_of
from lowbit.evaluation.report.page import render
from lowbit.export.checkpoint import refresh_sums
from lowbit.export.files import held

PAGES = {"report.html": "html", "report.md": "md"}


def store(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Add `rows` to the checkpoint in `directory`, and rewrite its card and any pages.

    Evaluations that end at the same time wait for each other, so that all their rows stay.
    """
    with held(directory):
        record(directory, rows)
        refresh_papers(directory)


def refresh_papers(directory: Path) -> None:
    """Rewrite the existing card and pages of the checkpoint in `directory` from all measurements."""
    facts = facts_of(directory)
    renewed = [CARD] if refresh_card(directory, facts) else []
    for name, kind in PAGES.items():
        if (directory / name).exists():
            replace_text(directory / name, render(facts, kind))
            renewed.append(name)
    refresh_sums(directory, renewed)
