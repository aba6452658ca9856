"""Model card: README.md of a quantized checkpoint, with measurements and how they were made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from jinja2 import StrictUndefined
from yaml import YAMLError

from lowbit.export.dialects import FORMATS
from lowbit.export.escape import Written, code, markdown_environment
from lowbit.export.files import read_text, write_text
from lowbit.export.format import Format
from lowbit.export.snapshot import snapshot_at
from lowbit.quant.recipe import Recipe

TEMPLATE = """---
{{ front_matter }}
---

# {{ title }}

{{ base }} quantized with lowbit {{ version }}: method {{ recipe.method|code }}, {{ schemes }}.
Weights take {{ "%.1f"|format(output_bytes / 1e6) }} MB instead of {{ "%.1f"|format(source_bytes / 1e6) }} MB; \
{{ "%.2f"|format(coverage * 100) }}% of the linear parameters that were not set aside are quantized.

## What was lost

{% if scores -%}
| model | perplexity | loss (nats) | tokens scored |
|---|---|---|---|
{% for score in scores -%}
| {{ score.model }} | {{ "%.4f"|format(score.perplexity) }} | {{ "%.5f"|format(score.nll) }} | {{ score.tokens }} |
{% endfor %}
Text: {{ text }}. Protocol: {{ scores[0].protocol }}; {{ scores[0].windows }} windows of {{ scores[0].context }} tokens.
Numbers under another text or protocol are not comparable with these.
{%- if divergence %}


KL divergence from the original on the same text: mean {{ "%.4g"|format(divergence.kl_mean) }} nats a token, 99.9% of \
tokens below {{ "%.3g"|format(divergence.kl_p999) }}; both find the same token most likely at \
{{ "%.2f"|format(100 * divergence.top1_agreement) }}% of positions.
{%- endif %}


`report.html` shows where the error is.
{%- else -%}
Not measured in this run (`--eval-windows 0`). Measure with `quantize-eval perplexity DIR --baseline MODEL`.
{%- endif %}

## Loading

{{ loading }}
{% for warning in warnings %}
**Note.** {{ warning }}
{% endfor %}
## How it was made

{{ recipe_toml|code_block("toml") }}

`quantization_report.json` has the scheme, the errors and every fallback of each layer, `SHA256SUMS` the hashes of all
files.
"""


def write_card(directory: Path, source: Path, base: str, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write README.md into `directory`.

    source  the original model's directory; its card's licence is copied
    base    the original model's name as given by the user
    facts   version, schemes (text), source_bytes, output_bytes, coverage, scores (list of dicts),
            divergence (row of evaluation.jsonl, or None), text, warnings (list)
    """
    fmt = FORMATS[recipe.format]
    local = Path(base).is_dir()  # then it is not a hub id
    label = published_name(base)
    data = ModelCardData(
        base_model=base if "/" in base and not local else None,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lowbit", fmt.name, recipe.method],
        **_carried_over(source / "README.md"),
    )
    environment = markdown_environment(undefined=StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE).render(
        front_matter=Written(data.to_yaml()),
        title=f"{Path(label).name}, {recipe.method} {recipe.default_scheme}",
        base=label,
        recipe=recipe,
        loading=Written(fmt.loading),
        recipe_toml=recipe.to_toml(),
        **facts,
    )
    write_text(directory / "README.md", text)


def note_conversion(directory: Path, source: Path, before: str, fmt: Format, version: str) -> None:
    """Copy the model card of `source`, if there is one, into `directory`, with a note about the conversion at its
    end."""
    card = source / "README.md"
    text = read_text(card).rstrip("\n") + "\n\n" if card.exists() else ""
    note = f"Converted from {code(before)} to {code(fmt.name)} by lowbit {version}, without requantizing."
    write_text(directory / "README.md", f"{text}## Converted\n\n{note} {fmt.loading}\n")


def published_name(model: str) -> str:
    """The name of a model for others: the id of a snapshot, a directory's own name, for its path is the user's."""
    snapshot = snapshot_at(Path(model))
    if snapshot is not None:
        return snapshot.repo
    return Path(model).resolve().name if Path(model).is_dir() else model


def _carried_over(card: Path) -> dict[str, Any]:
    """Licence and language of the original's card; empty if it has no readable card."""
    try:
        metadata = metadata_load(card) if card.exists() else None
    except (ValueError, YAMLError):
        metadata = None
    wanted = ("license", "license_name", "license_link", "language")
    return {key: value for key, value in (metadata or {}).items() if key in wanted}
