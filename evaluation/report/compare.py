"""Comparison of checkpoints: the cost and the loss of each, under equal conditions."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lowbit.evaluation.report.facts import as_written, conditions, scored

SPEED_CONDITIONS = ("device", "batch", "prompt", "output")


def comparison(all_facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of a comparison, as JSON values.

    conditions  text, protocol and context shared by most checkpoints; perplexities and divergences under other
                conditions are not shown, and `apart` names the checkpoints without any under these
    points      one row per checkpoint, and one for the unquantized model if measured under the same conditions
    speed       the SPEED_CONDITIONS shared by most checkpoints, or None
    """
    with as_written(", ".join(str(facts["name"]) for facts in all_facts)):
        return _compared(all_facts)


def _compared(all_facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shared = _most_common([{conditions(row): row for row in scored(facts)} for facts in all_facts])
    speed = _most_common(
        [{_speed_conditions(row): row for row in facts["evaluations"]["speed"]} for facts in all_facts]
    )
    points = [_point(facts, shared, speed) for facts in all_facts]
    baseline = _baseline(all_facts, shared, speed)
    return {
        "conditions": _described(all_facts, shared),
        "speed": dict(zip(SPEED_CONDITIONS, speed, strict=True)) if speed else None,
        "points": ([baseline] if baseline else []) + points,
        "apart": [point["name"] for point in points if point["perplexity"] is None],
    }


def _most_common(found: Sequence[dict[tuple[Any, ...], dict[str, Any]]]) -> tuple[Any, ...] | None:
    """The most frequent key of the dicts; None if all are empty."""
    counts = Counter(key for each in found for key in each)
    return counts.most_common(1)[0][0] if counts else None


def _speed_conditions(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in SPEED_CONDITIONS)


def _point(facts: dict[str, Any], shared: tuple[Any, ...] | None, speed: tuple[Any, ...] | None) -> dict[str, Any]:
    row = next((row for row in scored(facts) if conditions(row) == shared), {})
    fast: dict[str, Any] = next(
        (row for row in facts["evaluations"]["speed"] if _speed_conditions(row) == speed and speed is not None), {}
    )
    return {
        "name": facts["name"],
        "baseline": False,
        "method": facts["method"],
        "schemes": facts["schemes"],
        "bytes": facts["bytes"]["after"],
        "gigabytes": facts["bytes"]["after"] / 1e9,
        "bits": facts["bytes"]["bits"],
        "speed": fast.get("tokens_per_s"),
        **{key: row.get(key) for key in ("perplexity", "delta_nll", "delta_nll_se", "kl_mean", "kl_p999")},
        "top1": row.get("top1_agreement"),
        "dataset": facts["calibration"]["dataset"],
        "marked": row.get("text") in facts["marks"],
    }


def _baseline(
    all_facts: Sequence[dict[str, Any]], shared: tuple[Any, ...] | None, speed: tuple[Any, ...] | None
) -> dict[str, Any] | None:
    """The unquantized model's row, from the first checkpoint that measured it; None if the checkpoints' models
    differ."""
    models = {facts["model"] for facts in all_facts if facts["model"]}
    for facts in all_facts:
        for row in scored(facts):
            if conditions(row) == shared and row.get("baseline") and facts["bytes"]["before"] and len(models) == 1:
                before = facts["bytes"]["before"]
                point: dict[str, Any] = dict.fromkeys(_point(facts, shared, None))
                return point | {
                    "name": facts["model"],
                    "baseline": True,
                    "schemes": {},
                    "bytes": before,
                    "gigabytes": before / 1e9,
                    "bits": round(8 * before / max(facts["bytes"]["parameters"], 1), 3),
                    "perplexity": row["baseline"]["perplexity"],
                    "speed": _original_speed(all_facts, speed),
                    "marked": False,
                }
    return None


def _original_speed(all_facts: Sequence[dict[str, Any]], speed: tuple[Any, ...] | None) -> float | None:
    """Tokens a second of the unquantized model under these conditions, from the first checkpoint that measured it."""
    rows = (row for facts in all_facts for row in facts["evaluations"]["speed"] if _speed_conditions(row) == speed)
    return next((row["baseline"]["tokens_per_s"] for row in rows if row["baseline"]), None)


def _described(all_facts: Sequence[dict[str, Any]], shared: tuple[Any, ...] | None) -> dict[str, Any] | None:
    """The conditions in words, from the first row under them."""
    for facts in all_facts:
        for row in scored(facts):
            if conditions(row) == shared:
                return {key: row.get(key) for key in ("text", "protocol", "context", "windows", "tokens")}
    return None
