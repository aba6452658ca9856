"""Rendering of facts: one HTML page that needs no network, and Markdown."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lowbit.evaluation.report.compare import comparison
from lowbit.evaluation.report.facts import as_written, headline, of_other_text, scored
from lowbit.evaluation.report.plots import (
    heat_step,
    loss_plot,
    megabytes,
    outlier_plot,
    pareto_plot,
    plot,
    position_plot,
    survival_plot,
    tuning_plot,
)
from lowbit.export.escape import html_environment, markdown_environment

TEMPLATES = Path(__file__).parent / "templates"


def render(facts: dict[str, Any], kind: str) -> str:
    """The report of one checkpoint as `html` or `md`."""
    with as_written(str(facts["name"])):
        return _rendered(facts, kind)


def _rendered(facts: dict[str, Any], kind: str) -> str:
    divergence = of_other_text(facts, (row for row in facts["evaluations"]["divergence"] if row["kl_mean"] is not None))
    scores = scored(facts)
    values = {
        "facts": facts,
        "divergence": divergence,
        "scores": scores,
        "headline": headline(facts) or (*scores, None)[0],
    }
    figures = figures_of(facts, divergence) if kind == "html" else {}
    return environment_of(kind).get_template(f"checkpoint.{kind}.j2").render(**values, figures=figures)


def render_comparison(all_facts: Sequence[dict[str, Any]], kind: str) -> str:
    """Several checkpoints side by side as `html` or `md`."""
    compared = comparison(all_facts)
    figures: dict[str, str | None] = {}
    with as_written(", ".join(str(facts["name"]) for facts in all_facts)):
        if kind == "html":
            figures = {
                "size": plot(pareto_plot, compared["points"], "gigabytes", "GB on disk"),
                "speed": plot(pareto_plot, compared["points"], "speed", "tokens a second", larger_is_better=True),
            }
        template = environment_of(kind).get_template(f"comparison.{kind}.j2")
        return template.render(compared=compared, figures=figures)


def figures_of(facts: dict[str, Any], divergence: dict[str, Any] | None) -> dict[str, str | None]:
    """The figures of one checkpoint's page; None for those without data."""
    return {
        "survival": plot(survival_plot, divergence) if divergence else None,
        "position": plot(position_plot, divergence) if divergence else None,
        "losses": plot(loss_plot, facts["losses"]),
        "outliers": plot(outlier_plot, facts["outliers"]),
        "tuning": plot(tuning_plot, facts["tuning"]),
    }


def environment_of(kind: str) -> Environment:
    """Templates and filters for `html` or `md`."""
    make = html_environment if kind == "html" else markdown_environment
    loader = FileSystemLoader(TEMPLATES)
    environment = make(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"megabytes": megabytes, "percent": _percent, "number": _number}
    environment.filters |= {
        "flat": _flat,
        "spaced": _spaced,
        "parted": _parted,
        "unindented": _unindented,
        "heat_step": heat_step,
    }
    return environment


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def _flat(text: str) -> str:
    """Text on one line; a space at its end stays."""
    return re.sub(r"\s+", " ", text)


def _spaced(token: str) -> str:
    """A token with visible white space."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "nothing"


def _parted(text: str, common: str | None) -> tuple[str, str]:
    """The beginning that `text` shares with the other model's, and the rest."""
    shared = common if common and text.startswith(common) else ""
    return shared, text[len(shared) :]


def _unindented(text: str) -> str:
    """`text` without the line breaks, or the space, at its beginning."""
    return text.lstrip("\n") if text.startswith("\n") else text.removeprefix(" ")
