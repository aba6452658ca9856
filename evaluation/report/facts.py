"""All facts of a report as JSON values, read from a checkpoint's files."""

import math
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.evaluation.record import FILE, merge_rows
from lowbit.evaluation.report.family import families_of, family_of
from lowbit.evaluation.report.use import use_of
from lowbit.export.checkpoint import Checkpoint, open_checkpoint
from lowbit.export.escape import one_line
from lowbit.export.files import read_text
from lowbit.export.formats import LogicalTensors
from lowbit.export.plain import read_json, read_rows
from lowbit.export.snapshot import published_name
from lowbit.export.untrusted import untrusted

REPORT = "quantization_report.json"
RECIPE = "recipe.toml"
GROUPS = {  # part of a model -> substrings of module names that belong to it
    "experts": ("experts.", "shared_expert"),
    "norms": ("norm", "ln_", "layernorm"),
    "embeddings": ("embed", "wte", "wpe"),
    "head": ("lm_head", "embed_out", "output_layer"),
    "attention": ("attn", "attention", "query_key_value", "qkv", "q_proj", "k_proj", "v_proj", "o_proj"),
    "feed-forward": ("mlp", "feed_forward", "ffn", "fc1", "fc2", "gate", "up_proj", "down_proj"),
}
SCORE = ("text", "perplexity", "delta_nll", "delta_nll_se", "tokens", "windows", "context", "protocol", "backend")
EVALUATIONS = {  # keys shown from the rows of each evaluation; None for a missing one
    "perplexity": (*SCORE, "baseline"),
    "divergence": (
        *SCORE,
        "baseline",
        "kl_mean",
        "kl_median",
        "kl_p99",
        "kl_p999",
        "kl_max",
        "top1_agreement",
        "worst",
    ),
    "task": ("task", "metric", "value", "stderr", "examples", "fewshot", "baseline"),
    "code": ("problems", "pass_at_1", "rows", "baseline"),
    "generate": ("rows",),
    "drafts": ("drafter", "tokens_per_step", "right", "steps", "prompt", "output", "baseline"),
    "speed": ("device", "batch", "prompt", "output", "tokens_per_s", "ms_per_token", "share_of_floor", "baseline"),
}


def facts_of(
    directory: Path,
    extra_rows: Iterable[dict[str, Any]] = (),
    name: str | None = None,
    finished: bool = True,
) -> dict[str, Any]:
    """The facts about the checkpoint in `directory`, under `name` or the directory's own.

    extra_rows  measurements from elsewhere (speed rows of a benchmark), besides those in the checkpoint
    Sections without measurements are None or empty, and shown as such. CheckpointError if a file was not written by
    lowbit.
    """
    checkpoint = open_checkpoint(directory, finished)
    with as_written(directory):
        return _facts(directory, checkpoint, extra_rows, name)


@contextmanager
def as_written(where: Path | str) -> Iterator[None]:
    """A context that expects the values of a report's files in the form that lowbit writes."""
    with untrusted(where, f"{REPORT}, {FILE} or {RECIPE} is not as lowbit writes it"):
        yield


def _facts(
    directory: Path, checkpoint: Checkpoint, extra_rows: Iterable[dict[str, Any]], name: str | None
) -> dict[str, Any]:
    run = read_json(directory / REPORT) if (directory / REPORT).exists() else {}
    recipe_text = _read_text(directory / RECIPE)
    recipe = _recipe(directory / RECIPE, recipe_text)
    rows = merge_rows(read_rows(directory / FILE), list(extra_rows))
    tensors = LogicalTensors(checkpoint)
    kinds = bytes_by_kind(tensors, run.get("dtype"))
    evaluations = {
        name: [dict.fromkeys(keys) | row for row in rows if row.get("evaluation") == name]
        for name, keys in EVALUATIONS.items()
    }
    families = families_of(recipe.get("dataset"))
    return {
        "name": name or published_name(str(directory)),
        "model": run.get("model"),
        "lowbit": run.get("lowbit"),
        "method": recipe.get("method"),
        "format": tensors.format.name if tensors.format else None,
        "schemes": dict(Counter(map(str, tensors.schemes.values())).most_common()),
        "recipe": recipe_text,
        "command": _command(run.get("model"), recipe),
        "calibration": {"dataset": recipe.get("dataset"), "families": families}
        | {key: recipe.get(key) for key in ("num_samples", "seqlen", "calibration_sha256")},
        "bytes": _sizes(checkpoint, run, kinds),
        "kinds": kinds,
        "use": use_of(name or published_name(str(directory)), tensors, _refused(run)),
        "caveats": list(run.get("caveats", {})),
        "coverage": run.get("coverage"),
        "left": _left(run),
        "fallbacks": _fallbacks(run),
        "errors": error_map(run),
        "losses": [block.get("loss") for block in run.get("blocks", [])],
        "outliers": outliers(run),
        "tuning": run.get("distilled") or [],
        "experts": expert_tokens(run),
        "evaluations": evaluations,
        "marks": calibration_marks(families, evaluations),
    }


def _read_text(path: Path) -> str | None:
    return read_text(path) if path.exists() else None


def _recipe(path: Path, text: str | None) -> dict[str, Any]:
    try:
        return tomllib.loads(text or "")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not TOML ({error})") from error


def _command(model: str | None, recipe: dict[str, Any]) -> str | None:
    """The command that reproduces the checkpoint; None without a recipe."""
    if not recipe:
        return None
    commit = recipe.get("model_commit")
    revision = ["--revision", str(commit)] if commit else []
    command = ["quantize", one_line(model or "MODEL"), *revision, "--recipe", RECIPE, "--output", "DIR"]
    return shlex.join(command)


def kind_of(name: str) -> str:
    """A module's name without numbers, the same for all blocks: mlp.gate_proj for `model.layers.3.mlp.gate_proj`."""
    parts = re.sub(r"\.\d+(?=\.|$)", "", name).split(".")
    return ".".join(parts[-3:] if "experts" in parts[-3:] else parts[-2:])


def group_of(kind: str) -> str:
    """The part of a model that a kind of module belongs to."""
    found = (group for group, marks in GROUPS.items() if any(mark in kind.lower() for mark in marks))
    return next(found, "other")


def bytes_by_kind(tensors: LogicalTensors, dtype: str | None) -> list[dict[str, Any]]:
    """One row per kind of module: group, scheme, parameters, bytes in the files, bits per parameter; largest first.

    dtype  of the original's weights, for the bytes in `before`; None if unknown, then `before` is None
    """
    entries = tensors.checkpoint.entries
    rows: dict[str, dict[str, Any]] = {}
    owners = _owners(tensors)
    for name, entry in entries.items():
        owner, scheme = owners.get(name, (name.rpartition(".")[0], None))
        kind = kind_of(owner)
        kind = "norms" if group_of(kind) == "norms" and scheme is None else kind
        row = rows.setdefault(kind, {"kind": kind, "group": group_of(kind), "parameters": 0, "after": 0, "schemes": []})
        row["after"] += entry.nbytes
        if scheme is None:
            row["parameters"] += entry.numel
            scheme = str(entry.dtype).removeprefix("torch.")
        if scheme not in row["schemes"]:
            row["schemes"].append(scheme)
    for linear in tensors.schemes:
        rows[kind_of(linear)]["parameters"] += math.prod(tensors.shape(linear))
    width = getattr(torch, dtype).itemsize if dtype else None
    for row in rows.values():
        row["before"] = row["parameters"] * width if width else None
        row["bits"] = round(8 * row["after"] / max(row["parameters"], 1), 3)
    return sorted(rows.values(), key=lambda row: -row["after"])


def _owners(tensors: LogicalTensors) -> dict[str, tuple[str, str]]:
    """Tensor of the file -> its quantized linear and that linear's scheme."""
    suffixes = tensors.format.suffixes if tensors.format else ()
    return {f"{name}.{suffix}": (name, str(scheme)) for name, scheme in tensors.schemes.items() for suffix in suffixes}


def _sizes(checkpoint: Checkpoint, run: dict[str, Any], kinds: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = sum(row["parameters"] for row in kinds)
    return {
        "before": run.get("source_bytes"),
        "after": checkpoint.nbytes,
        "parameters": parameters,
        "bits": round(8 * checkpoint.nbytes / max(parameters, 1), 3),
    }


def _refused(run: dict[str, Any]) -> set[str]:
    """The engines that cannot load the checkpoint, by the caveats of the run."""
    return {name for names in run.get("caveats", {}).values() for name in names}


def _left(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Linears left in 16 bits, grouped by reason."""
    rows: dict[str, dict[str, Any]] = {}
    for name, left in run.get("left", {}).items():
        row = rows.setdefault(left["reason"], {"reason": left["reason"], "count": 0, "parameters": 0, "names": []})
        row["count"] += 1
        row["parameters"] += left.get("parameters", 0)
        row["names"].append(name)
    return [row | {"names": row["names"][:4]} for row in rows.values()]


def _fallbacks(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Linears that differ from the recipe, grouped by kind and reason."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for block in run.get("blocks", []):
        for name, linear in block["linears"].items():
            reason = linear.get("fallback")
            if reason:
                key = (kind_of(name), str(reason))
                row = rows.setdefault(key, {"kind": key[0], "reason": key[1], "scheme": linear["scheme"], "count": 0})
                row["count"] += 1
    return list(rows.values())


def error_map(run: dict[str, Any]) -> dict[str, Any] | None:
    """Errors by block and kind of linear; None if none were recorded.

    metric  output_error: squared error of the outputs relative to the outputs, over calibration tokens. If not measured
            everywhere, weight_error: error of the weights relative to the weights
    values  one row per block, None for a missing linear; experts of one kind are averaged
    low, high  the range of 96% of the values
    """
    blocks = run.get("blocks", [])
    linears = [linear for block in blocks for linear in block["linears"].values()]
    if not linears:
        return None
    measured = all(linear.get("output_error") is not None for linear in linears)
    metric = "output_error" if measured else "weight_error"
    cells = [_by_kind(block, metric) for block in blocks]
    kinds = list(dict.fromkeys(kind for cell in cells for kind in cell))
    values = [[_mean(cell.get(kind, [])) for kind in kinds] for cell in cells]
    known = sorted(value for row in values for value in row if value is not None)
    low, high = (known[round(share * (len(known) - 1))] for share in (0.02, 0.98))
    return {"metric": metric, "kinds": kinds, "values": values, "low": low, "high": high}


def outliers(run: dict[str, Any]) -> list[dict[str, Any]]:
    """For each shared input of linears: largest over median channel, before and after transforms, one value per block.
    Kinds with equal values read the same input and are merged."""
    blocks = run.get("blocks", [])
    found: dict[str, dict[str, Any]] = {}
    for side in ("before", "after"):
        cells = [_by_kind(block, "outliers", side) for block in blocks]
        for kind in dict.fromkeys(kind for cell in cells for kind in cell):
            values = [_mean(cell.get(kind, [])) for cell in cells]
            if any(value is not None for value in values):
                found.setdefault(kind, {})[side] = values
    merged: dict[str, dict[str, Any]] = {}
    for kind, sides in found.items():
        row = merged.setdefault(str(sides), {"kinds": [], **sides})
        row["kinds"].append(kind)
    return [row for row in merged.values() if "after" in row and "before" in row]


def expert_tokens(run: dict[str, Any]) -> dict[str, int] | None:
    """Calibration tokens of experts' linears: number of linears; fewest, median and most tokens.
    None without experts or calibration."""
    rows = [row for block in run.get("blocks", []) for name, row in block["linears"].items() if "experts." in name]
    tokens = sorted(row["tokens"] for row in rows if row.get("tokens") is not None)
    if not tokens:
        return None
    return {"linears": len(tokens), "least": tokens[0], "median": tokens[len(tokens) // 2], "most": tokens[-1]}


def _by_kind(block: dict[str, Any], *keys: str) -> dict[str, list[float]]:
    """Kind -> values of its linears in `block` under the nested `keys`; linears without a value are left out."""
    cells: dict[str, list[float]] = {}
    for name, linear in block["linears"].items():
        found: Any = linear
        for key in keys:
            found = (found or {}).get(key)
        if found is not None:
            cells.setdefault(kind_of(name), []).append(found)
    return cells


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def calibration_marks(families: list[str], evaluations: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Texts of the evaluation that belong to a family of the calibration data."""
    texts = [row.get("text") for name in ("perplexity", "divergence") for row in evaluations[name]]
    return sorted({text for text in texts if text and family_of(text) in families})


def scored(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with a perplexity: divergences, which include it, and perplexities on other texts."""
    rows = [*facts["evaluations"]["divergence"], *facts["evaluations"]["perplexity"]]
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["perplexity"] is not None:
            seen.setdefault(conditions(row), row)
    return list(seen.values())


def headline(facts: dict[str, Any]) -> dict[str, Any] | None:
    """The row that says best what was lost: most tokens, on a text of another family than the calibration's if any."""
    return of_other_text(facts, (row for row in scored(facts) if row["baseline"] and row["delta_nll"] is not None))


def of_other_text(facts: dict[str, Any], rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row with most tokens, on a text of another family than the calibration's if there is one."""
    known = list(rows)
    foreign = [row for row in known if row["text"] not in facts["marks"]]
    return max(foreign or known, key=lambda row: row["tokens"] or 0, default=None)


def conditions(row: dict[str, Any]) -> tuple[Any, ...]:
    """The conditions that two perplexities must share to be comparable."""
    return row.get("text_sha256") or row.get("text"), row.get("protocol"), row.get("context"), row.get("windows")
