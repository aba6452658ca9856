"""Reports of a run: one per block, and the JSON file next to the weights."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.calibrate.block import BlockWork
from lowbit.calibrate.job import Job
from lowbit.calibrate.mixtures import Mixed
from lowbit.calibrate.plan import Plan
from lowbit.export.snapshot import published_name
from lowbit.models.files import Files
from lowbit.progress import Part, tell
from lowbit.quant.qtensor import QTensor, relative_error
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme

TUNING_STEP = "a step of tuning"  # expected seconds of one, if there will be any


@dataclass(frozen=True)
class BlockReport:
    """Results of one block.

    loss     squared error of the block's output, relative to the block's change of its input; None without calibration
    seconds, peak_bytes  wall time, and peak memory of the process (or GPU) so far
    phases   seconds per phase of the work, including the time after this report; the first block's also TUNING_STEP
    folds    one row per proved fold, with the chosen scale
    linears  per linear: scheme, errors, tokens, fallbacks
    """

    index: int
    name: str
    loss: float | None
    seconds: float
    peak_bytes: int
    folds: list[dict[str, Any]]
    linears: dict[str, dict[str, Any]]
    phases: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds per phase of a block on `device`. Each phase ends with a synchronization."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._begun = device, time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        tell(Part(name))
        yield
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.monotonic() - begun

    def elapsed(self) -> float:
        """Seconds since construction."""
        return time.monotonic() - self._begun


@dataclass
class Result:
    """Results of a run: plan, recipe (with the calibration hash), one report per block.

    distilled    divergence from the unquantized model in nats per token, before each step of distillation
    vocabulary   report rows of head and embeddings, if they are quantized, by name
    output_sums  SHA-256 of the files with weights as they were read back, by name
    """

    plan: Plan
    recipe: Recipe
    dtype: torch.dtype
    blocks: list[BlockReport] = field(default_factory=list)
    distilled: list[float] = field(default_factory=list)
    vocabulary: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_bytes: int = 0
    output_bytes: int = 0
    output_sums: dict[str, str] = field(default_factory=dict)


def report_of(
    source: Files, result: Result, mixture: Mixed | None, caveats: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """The report as JSON values, without times or memory, so that equal runs write equal files."""
    return {
        "model": published_name(source.name),
        "lowbit": __version__,
        "source_bytes": result.source_bytes,
        "dtype": str(result.dtype).removeprefix("torch."),
        "coverage": result.plan.coverage,
        "left": {
            name: {"reason": left.reason, "parameters": left.parameters} for name, left in result.plan.left.items()
        },
        "head": None if result.plan.head is None else str(result.plan.head.scheme),
        "caveats": {text: list(engines) for text, engines in caveats.items()},
        "embeddings": None if result.plan.embeddings is None else str(result.plan.embeddings.scheme),
        "vocabulary": result.vocabulary,
        "kv_cache": result.recipe.kv_cache,
        "distilled": result.distilled,
        "mixture": None if mixture is None else mixture.as_json(),
        "blocks": [
            {"name": block.name, "loss": block.loss, "folds": block.folds, "linears": block.linears}
            for block in result.blocks
        ],
    }


def linear_row(plan: Plan, name: str, weight: QTensor, original: Tensor) -> dict[str, Any]:
    """The report row of a linear: scheme, size, relative error of its weight against `original` (n, k)."""
    return row_of(plan, name, weight.scheme, weight.shape, relative_error(weight, original))


def row_of(plan: Plan, name: str, scheme: Scheme, shape: tuple[int, int], error: float) -> dict[str, Any]:
    """The same, with the relative error of the weight given."""
    row: dict[str, Any] = {
        "scheme": str(scheme),
        "shape": list(shape),
        "bits_per_weight": round(scheme.bits_per_weight(shape[1]), 4),
        "weight_error": error,
    }
    wanted = plan.wanted[name].weights_only
    if scheme.weights_only != wanted:
        reason = wanted.reason_against_shape(*shape) or "a linear that engines fuse it with does not divide"
        add_fallback(row, f"{wanted} does not fit: {reason}")
    return row


def add_fallback(row: dict[str, Any], text: str) -> None:
    """Record in a linear's row a deviation from the requested treatment."""
    row["fallback"] = f"{row['fallback']}; {text}" if "fallback" in row else text


def calibrated_rows(job: Job, work: BlockWork, weights: dict[str, QTensor]) -> dict[str, dict[str, Any]]:
    """The report rows of a calibrated block: linear_row, plus tokens (as routed, and by a wider choice of experts),
    outliers and relative output error."""
    rows = {}
    for name, weight in weights.items():
        stats = work.stats.get(name)
        rows[name] = linear_row(job.plan, name, weight, work.masters[name])
        rows[name] |= {"tokens": work.tokens.get(name, 0), "output_error": work.output_error(name, weight)}
        if name in work.widened:
            rows[name]["widened_tokens"] = work.widened[name]
        if stats is not None:
            rows[name]["outliers"] = {"before": work.outliers[name], "after": stats.outlier_ratio()}
        else:
            reason = work.scarce.get(name, "no calibration token reached it")
            add_fallback(rows[name], f"{reason}: rounded to nearest")
        for text in work.fallbacks.get(name, []):
            add_fallback(rows[name], text)
    return rows


def peak_memory(device: str) -> int:
    """Peak memory in bytes, of the GPU if one is used, else of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
