"""The model card, README.md of a checkpoint. Later measurements update their section; users' own text is kept."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from yaml import YAMLError

from lowbit import __version__
from lowbit.evaluation.report.facts import facts_of, headline, scored
from lowbit.evaluation.report.page import environment_of
from lowbit.evaluation.report.use import plain, renamed
from lowbit.export.engines.lowbit import LOWBIT
from lowbit.export.engines.table import ENGINES
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.escape import Written, code
from lowbit.export.files import read_text, write_text
from lowbit.export.formats import LogicalTensors
from lowbit.export.snapshot import published_name
from lowbit.models.demo import BASE_MODEL
from lowbit.models.files import DEMO, Files
from lowbit.quant.scheme import Scheme

CARD = "README.md"
LICENCE = ("license", "license_name", "license_link", "language")  # keys copied to a derivative's card
HUB_DATASET = re.compile(r"(?!builtin\b)(?:[\w.-]+/)?[\w-]+(?=:|$)")


@dataclass(frozen=True)
class Original:
    """The facts of the unquantized model for a card.

    name        for readers
    base_model  its id on the hub, or the id that its own card names; None if unknown
    is_base     True if `base_model` is exactly the model that was quantized
    pipeline    the hub's name of its task
    carried     licence and language, from its own card
    """

    name: str
    base_model: str | None = None
    is_base: bool = False
    pipeline: str = "text-generation"
    carried: dict[str, Any] = field(default_factory=dict)


def original_of(source: Files, base_model: str | None = None) -> Original:
    """The facts about the model `source`. `base_model` is its id on the hub, if the user gives one."""
    own = _metadata(source.directory / CARD)
    named = base_model or (source.snapshot.repo if source.snapshot else BASE_MODEL if source.name == DEMO else None)
    inherited = own.get("base_model")
    sees = source.checkpoint.config.get("vision_config") is not None
    return Original(
        name=named or published_name(source.name),
        base_model=named or (inherited if isinstance(inherited, str) else None),
        is_base=named is not None,
        pipeline=str(own.get("pipeline_tag") or ("image-text-to-text" if sees else "text-generation")),
        carried={key: own[key] for key in LICENCE if key in own},
    )


def _metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card; empty if there is none or it cannot be read."""
    try:
        return (metadata_load(card) if card.exists() else None) or {}
    except (ValueError, YAMLError):
        return {}


def write_card(directory: Path, facts: dict[str, Any], tensors: LogicalTensors, original: Original) -> None:
    """Write README.md of the checkpoint in `directory`.

    facts     of the checkpoint, from `facts_of`
    original  the model that was quantized
    """
    dataset = facts["calibration"]["dataset"] or ""
    data = ModelCardData(
        base_model=original.base_model,
        base_model_relation="quantized" if original.is_base else None,
        library_name=tensors.format.library if tensors.format else None,
        pipeline_tag=original.pipeline,
        tags=["quantized", *_short_names(tensors), facts["format"], *_tags(facts["use"]), "lowbit", facts["method"]],
        datasets=[found[0] for each in dataset.split(",") if (found := HUB_DATASET.match(each.strip()))] or None,
        **original.carried,
    )
    _measured_into(data, facts)
    environment = environment_of("md")
    text = environment.get_template("card.md.j2").render(
        facts=facts,
        original=original,
        measured=_measured(facts),
        name=Written(plain(facts["name"])),
        use=_use(facts["use"]),
        version=__version__,
    )
    write_text(directory / CARD, f"---\n{data.to_yaml()}\n---\n\n{text}")


def refresh_card(directory: Path, facts: dict[str, Any]) -> bool:
    """Update the section of measurements in README.md, if lowbit wrote one; True if it did."""
    path = directory / CARD
    text = read_text(path) if path.exists() else ""
    if not _section("measured").search(text):
        return False
    card = ModelCard(_put(text, "measured", _measured(facts)), ignore_metadata_errors=True)
    _measured_into(card.data, facts)
    write_text(path, str(card))
    return True


def name_card(directory: Path, name: str) -> bool:
    """Make the commands in README.md load the checkpoint by `name`, its id on the hub; True if that changed the
    file."""
    path = directory / CARD
    text = read_text(path) if path.exists() else ""
    found = _section("use").search(text)
    if found is None or found["name"] == name:
        return False
    write_text(path, _put(text, "use", Written(renamed(found["text"], found["name"], name)), name))
    return True


def convert_card(directory: Path, name: str, source: Path, tensors: LogicalTensors, before: str) -> None:
    """Write the card of `source` into `directory`, which has the same weights in another format than `before`.

    name  of the checkpoint, for engines
    """
    assert tensors.format is not None
    text = read_text(source / CARD) if (source / CARD).exists() else ""
    own = _section("use").search(text)
    card: Any = ModelCard(text, ignore_metadata_errors=True)
    use = facts_of(directory, name=name, finished=False)["use"]
    if own:
        card.text = _put(card.text, "use", _use(use), plain(name))
        card.data.library_name = tensors.format.library
    card.data.tags = _converted_tags(card.data.tags or [], before, tensors.format.name, use) or None
    after = code(tensors.format.name)
    note = f"Converted from {code(before)} to {after} by lowbit {__version__}, without requantizing."
    ending = "" if own else f" {tensors.format.loading}"
    write_text(directory / CARD, f"{str(card).strip()}\n\n## Converted\n\n{note}{ending}\n".lstrip())


def _converted_tags(tags: Sequence[str], before: str, after: str, use: Sequence[dict[str, Any]]) -> list[str]:
    """The `tags` of a checkpoint after its conversion from a format to another, with the engines that load it now."""
    engines = {name.lower() for name in ENGINES} - {TRANSFORMERS.name, LOWBIT.name}
    found = [each for tag in tags for each in ((after, *_tags(use)) if tag == before else (tag,))]
    return list(dict.fromkeys(tag for tag in found if tag not in engines or tag in _tags(use)))


def _tags(use: Sequence[dict[str, Any]]) -> list[str]:
    return [each["reader"].lower() for each in use if each["reader"] not in (TRANSFORMERS.name, LOWBIT.name)]


def _short_names(tensors: LogicalTensors) -> list[str]:
    """The schemes in the notation of the hub's tags (w4a16, w8a8, fp8), each once."""
    return list(dict.fromkeys(map(_short_name, tensors.schemes.values())))


def _short_name(scheme: Scheme) -> str:
    inputs = 16 if scheme.inputs is None else scheme.inputs.number.bits
    return f"w{scheme.bits}a{inputs}" if scheme.number.is_integer else f"fp{scheme.bits}"


def _section(part: str) -> re.Pattern[str]:
    """A pattern for a section written by lowbit in a card, between two comments. The first comment may have a name."""
    return re.compile(
        rf"<!-- lowbit:{part}(?: (?P<name>[^\n]*?))? -->\n(?P<text>.*?)\n<!-- /lowbit:{part} -->", re.DOTALL
    )


def _put(text: str, part: str, content: str, name: str = "") -> str:
    """`text` with `content` in its section `part`."""
    opening = f"<!-- lowbit:{part} {name}".rstrip()
    whole = f"{opening} -->\n{content}\n<!-- /lowbit:{part} -->"
    return _section(part).sub(lambda found: whole, text, count=1)


def _measured(facts: dict[str, Any]) -> Written:
    """Scores and sizes as Markdown."""
    template = environment_of("md").get_template("measured.md.j2")
    return Written(template.render(facts=facts, scores=scored(facts), headline=headline(facts)).strip())


def _use(rows: Sequence[dict[str, Any]]) -> Written:
    """The commands with which engines load the checkpoint, as Markdown."""
    return Written(environment_of("md").get_template("use.md.j2").render(facts={"use": rows}).strip())


def _measured_into(data: Any, facts: dict[str, Any]) -> None:
    """Add the measurements to a card's front matter (the hub's model-index)."""
    results = _results(facts)
    data.eval_results, data.model_name = (results, facts["name"]) if results else (None, None)
    data.metrics = list(dict.fromkeys(each.metric_type for each in results)) or None


def _results(facts: dict[str, Any]) -> list[EvalResult]:
    """Every measurement in the hub's notation."""
    rows: list[tuple[str, str, Any, str]] = []
    for row in scored(facts):
        text = str(row["text"] or "text")
        how = f"{row['tokens']} tokens, {row['context']} a window, {row['protocol']}"
        rows.append(("perplexity", f"Perplexity ({how})", row["perplexity"], text))
        if row.get("kl_mean") is not None:
            rows.append(("kl_divergence", f"KL divergence from the original ({how})", row["kl_mean"], text))
    for row in facts["evaluations"]["task"]:
        rows.append((str(row["metric"]), str(row["metric"]), row["value"], str(row["task"])))
    for row in facts["evaluations"]["code"]:
        rows.append(("pass@1", "pass@1", row["pass_at_1"], str(row["problems"])))
    return [_result(*row) for row in rows]


def _result(kind: str, title: str, value: Any, text: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text Generation",
        dataset_type=re.sub(r"[^\w./-]+", "-", text),
        dataset_name=text,
        metric_type=kind,
        metric_name=title,
        metric_value=value,
    )
