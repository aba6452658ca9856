"""Checkpoints side by side: what each costs, and what each lost, where that can be compared at all."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lowbit.evaluation.report.facts import as_written, conditions, scored

SPEED_CONDITIONS = ("device", "batch", "prompt", "output")


def comparison(all_facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of a comparison, as JSON values.

    conditions  text, protocol and context that most of the checkpoints were scored under; perplexities and divergences
                under others are not shown, and `apart` names the checkpoints that have no other
    points      a row for each checkpoint, and one for the unquantized model where it was measured under the same
    speed       SPEED_CONDITIONS that most were timed under, or None
    """
    with as_written(", ".join(str(facts["name"]) for facts in all_facts)):
        return _compared(all_facts)


def _compared(all_facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shared = _most_common([{conditions(row): row for row in scored(facts)} for facts in all_facts])
    speed = _most_common(
        [{_speed_conditions(row): row for row in facts["evaluations"]["speed"]} for facts in all_facts]
    )
    points = [_point(facts, shared, speed) for facts in all_facts]
    baseline = _baseline(all_facts, shared)
    return {
        "conditions": _described(all_facts, shared),
        "speed": dict(zip(SPEED_CONDITIONS, speed, strict=True)) if speed else None,
        "points": ([baseline] if baseline else []) + points,
        "apart": [point["name"] for point in points if point["perplexity"] is None],
    }


def _most_common(found: Sequence[dict[tuple[Any, ...], dict[str, Any]]]) -> tuple[Any, ...] | None:
    """The key that most of the dicts have; None where there is none."""
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


def _baseline(all_facts: Sequence[dict[str, Any]], shared: tuple[Any, ...] | None) -> dict[str, Any] | None:
    """The unquantized model's row, from the first checkpoint that measured it; None where models differ."""
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
                    "marked": False,
                }
    return None


def _described(all_facts: Sequence[dict[str, Any]], shared: tuple[Any, ...] | None) -> dict[str, Any] | None:
    """The conditions in words, from a row that has them."""
    for facts in all_facts:
        for row in scored(facts):
            if conditions(row) == shared:
                return {key: row.get(key) for key in ("text", "protocol", "context", "windows", "tokens")}
    return None
