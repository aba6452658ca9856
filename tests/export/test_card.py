"""export/card.py: a card with the numbers and their protocol, whatever card the original came with."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from lowbit.export.card import write_card
from lowbit.export.formats import describe_schemes
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import make_scheme

FACTS: dict[str, Any] = {
    "version": "9.9",
    "schemes": "int4-g128 (14 linears)",
    "source_bytes": 2_000_000,
    "output_bytes": 600_000,
    "coverage": 0.995,
    "scores": [],
    "divergence": None,
    "text": "some text",
    "warnings": [],
}
SCORE = {"perplexity": 12.34567, "nll": 2.5, "tokens": 4088, "windows": 8, "context": 512, "protocol": "windows"}


def card(tmp_path: Path, base: str = "org/model", original: str | bytes | None = None, **facts: Any) -> str:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    if original is not None:
        (source / "README.md").write_bytes(original if isinstance(original, bytes) else original.encode())
    write_card(target, source, base, Recipe(), FACTS | facts)
    return (target / "README.md").read_text(encoding="utf-8")


def test_the_front_matter_is_what_the_hub_reads(tmp_path):
    card(tmp_path, original="---\nlicense: apache-2.0\nlanguage: [en]\ntags: [old]\n---\n# Original\n")
    data = metadata_load(tmp_path / "target" / "README.md")
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert data["base_model"] == "org/model"
    assert data["base_model_relation"] == "quantized"
    assert data["tags"] == ["lowbit", "compressed-tensors", "awq"]


def test_a_directory_is_no_base_model(tmp_path):
    card(tmp_path, base=str(tmp_path))
    assert "base_model" not in metadata_load(tmp_path / "target" / "README.md")


def test_a_directory_is_called_by_its_name_alone(tmp_path):
    """Where a model lay on somebody's disk is nobody's business in a published card."""
    (tmp_path / "my-model").mkdir()
    text = card(tmp_path, base=str(tmp_path / "my-model"))
    assert str(tmp_path) not in text
    assert "my-model quantized with lowbit" in text


def test_scores_stand_beside_their_protocol(tmp_path):
    text = card(tmp_path, scores=[SCORE | {"model": "before"}, SCORE | {"model": "after", "perplexity": 13.0}])
    assert "| before | 12.3457 | 2.50000 | 4088 |" in text
    assert "| after | 13.0000 |" in text
    assert "Protocol: windows; 8 windows of 512 tokens" in text
    assert "some text" in text


def test_a_divergence_stands_beside_the_scores(tmp_path):
    row = {"kl_mean": 0.012345, "kl_p999": 1.5, "top1_agreement": 0.9321}
    text = " ".join(card(tmp_path, scores=[SCORE | {"model": "before"}], divergence=row).split())
    assert "mean 0.01235 nats a token, 99.9% of tokens below 1.5" in text
    assert "at 93.21% of positions" in text


def test_no_divergence_is_claimed_where_none_was_measured(tmp_path):
    assert "KL" not in card(tmp_path, scores=[SCORE | {"model": "before"}])


def test_what_was_not_measured_is_not_claimed(tmp_path):
    text = card(tmp_path)
    assert "Not measured in this run" in text
    assert "| perplexity" not in text
    assert "0.6 MB instead of 2.0 MB" in text
    assert "99.50%" in text


def test_warnings_are_carried(tmp_path):
    assert "**Note.** mind the gap" in card(tmp_path, warnings=["mind the gap"])


@pytest.mark.parametrize(
    "original",
    [
        "",
        "no front matter",
        "---\n: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: {{ 7 * 7 }}\n---\n",
        b"\xff\xfe\x00",
    ],
    ids=["empty", "none", "broken", "list", "template", "no text"],
)
def test_a_strange_card_of_the_original_does_not_stop_a_run(tmp_path, original):
    text = card(tmp_path, original=original)
    assert "org/model" in text
    assert "49" not in text.partition("# ")[0]


def test_schemes_are_counted():
    schemes = {"a": make_scheme(8, -1, True), "b": make_scheme(4, 64, True), "c": make_scheme(4, 64, True)}
    assert describe_schemes(schemes) == "int4-g64 (2 linears), int8 (1 linears)"
