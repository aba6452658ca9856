"""From a model's files to a quantized checkpoint, one block in memory at a time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibrate.block import BlockWork
from calibrate.data import CalibrationSet
from calibrate.discover import Structure
from calibrate.job import Job, prepare
from calibrate.report import BlockReport, Result, calibrated_rows, linear_row, peak_memory, report_of
from calibrate.structure import Prober
from calibrate.written import RecordingWriter, covered
from export.checkpoint import verify_checksums
from export.formats import FORMATS, write_config
from export.writer import ShardedWriter, copy_companions, write_json
from models.skeleton import Block, LinearSpec, Placement, checked
from models.walk import Walk
from quant.qtensor import QTensor, round_to_nearest

__all__ = ["BlockReport", "Job", "Result", "prepare", "run"]

BATCH_TOKENS = 2048  # tokens run through a block at once, and tokens that module outputs are compared on
GRAM_TOKENS = 16384  # tokens that second moments are estimated from

OnBlock = Callable[[BlockReport], None]


def run(job: Job, output: Path, calibration: CalibrationSet | None, on_block: OnBlock) -> Result:
    """Quantize `job` into the existing, empty directory `output`.

    Writes weights, config.json, recipe.toml and quantization_report.json, and copies tokenizer and templates. What was
    written is read again and compared with what was meant. Raises CheckpointError where it differs.
    """
    verify_checksums(job.source.checkpoint)
    recipe = replace(job.recipe, calibration_sha256=calibration.sha256 if calibration else None)
    result = Result(job.plan, recipe, job.dtype, source_bytes=job.source.checkpoint.nbytes)
    writer = RecordingWriter(ShardedWriter(output, recipe.max_shard_size), job)
    blocks = _calibrated_blocks(job, calibration) if calibration else _data_free_blocks(job)
    for block, (weights, kept, report) in zip(job.skeleton.blocks, blocks, strict=True):
        writer.add_block(block, weights, kept)
        result.blocks.append(report)
        on_block(report)
    writer.add_others()
    writer.finish()
    _write_companions(job, output, result)
    result.output_bytes = writer.verify(output)
    return result


BlockOutcome = tuple[dict[str, QTensor], dict[str, Tensor], BlockReport]


def _data_free_blocks(job: Job) -> Iterator[BlockOutcome]:
    """Each block's weights rounded to nearest, a tensor of the file in memory at a time."""
    for index, block in enumerate(job.skeleton.blocks):
        begun = time.monotonic()
        weights: dict[str, QTensor] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name, placement in block.tensors.items():
            specs = [spec for spec in _linears_in(block, name, placement) if spec.name in job.plan.schemes]
            value = checked(name, job.source.checkpoint.read(name)) if specs else torch.empty(0)
            for spec in specs:
                w = _cut(value, placement, spec).to(job.device)
                weight = round_to_nearest(w, job.plan.schemes[spec.name], job.scale_dtype)
                rows[spec.name] = linear_row(job, spec.name, weight, w.float())
                weights[spec.name] = weight.to("cpu")
        seconds = time.monotonic() - begun
        yield weights, {}, BlockReport(index, block.name, None, seconds, peak_memory(job.device), [], rows)


def _linears_in(block: Block, name: str, placement: Placement) -> list[LinearSpec]:
    """The linears whose weights the file's tensor `name` holds: one, or every expert of a stacked parameter."""
    alone = [spec for spec in block.linears if f"{spec.name}.weight" == name]
    stacked = placement.expert is None
    return alone or [spec for spec in block.linears if stacked and spec.placement.parameter == placement.parameter]


def _cut(value: Tensor, placement: Placement, spec: LinearSpec) -> Tensor:
    """The weight (n, k) of `spec` in a file's tensor."""
    inner = spec.placement.view(value) if placement.expert is None and value.ndim == 3 else value
    return inner.T if spec.transposed else inner


def _calibrated_blocks(job: Job, calibration: CalibrationSet) -> Iterator[BlockOutcome]:
    """Each block calibrated on what the quantized blocks before it produce."""
    compute = torch.float32 if job.device == "cpu" and job.dtype == torch.float16 else job.dtype
    walk = Walk(job.skeleton, job.device, compute)
    size = max(BATCH_TOKENS // calibration.ids.shape[1], 1)
    hidden = walk.start(list(calibration.ids.split(size)))
    prober = Prober(Walk(job.skeleton, job.device, torch.float32), calibration.ids, job.recipe.seed)
    for index in range(len(job.skeleton.blocks)):
        with walk.loaded(index):
            outcome, hidden = _calibrated_block(job, walk, index, prober.structure(index), hidden)
        yield outcome


@torch.no_grad()
def _calibrated_block(
    job: Job, walk: Walk, index: int, structure: Structure, hidden: list[Tensor]
) -> tuple[BlockOutcome, list[Tensor]]:
    """The outcome of the loaded block `index`, and its quantized outputs for `hidden`."""
    begun = time.monotonic()
    block = job.skeleton.blocks[index]
    names = [spec.name for spec in block.linears]
    schemes = {name: job.plan.schemes[name] for name in names if name in job.plan.schemes}
    work = BlockWork(walk, index, schemes, job.scale_dtype, job.dtype)
    sample = _sample(hidden)
    before = work.run(sample)
    work.observe(hidden, structure.sites, GRAM_TOKENS)
    folds = _search_folds(job, work, structure, sample)
    weights = work.round(job.method.clip_search)
    loss = _relative_loss(work.run(sample), before, sample)
    rows = calibrated_rows(job, work, weights)
    kept = _kept_tensors(job, block, weights)
    hidden = work.run(hidden)
    seconds = time.monotonic() - begun
    report = BlockReport(index, block.name, loss, seconds, peak_memory(job.device), folds, rows)
    return ({name: weight.to("cpu") for name, weight in weights.items()}, kept, report), hidden


def _sample(hidden: list[Tensor]) -> list[Tensor]:
    """One batch of sequences spread evenly over all: what module outputs are compared on."""
    rows = [row for batch in hidden for row in batch.split(1)]
    count = hidden[0].shape[0]
    return [torch.cat([rows[i * len(rows) // count] for i in range(count)])]


def _search_folds(job: Job, work: BlockWork, structure: Structure, sample: list[Tensor]) -> list[dict[str, Any]]:
    rows = []
    for fold in structure.folds:
        row: dict[str, Any] = {"fold": fold.describe()}
        if job.method.scale_search:
            reason = work.reason_against(fold)
            row |= {"skipped": reason} if reason else work.search_fold(fold, sample).as_json()
        rows.append(row)
    return rows + [{"fold": name, "skipped": "failed its proof on this block"} for name in structure.rejected]


def _relative_loss(after: list[Tensor], before: list[Tensor], inputs: list[Tensor]) -> float:
    error = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(after, before, strict=True))
    signal = sum(float((b.float() - x.float()).square().sum()) for b, x in zip(before, inputs, strict=True))
    return error / max(signal, 1e-30)


def _kept_tensors(job: Job, block: Block, weights: dict[str, QTensor]) -> dict[str, Tensor]:
    """The block's tensors that stay unquantized, as transforms left them."""
    done = {f"{name}.weight" for name in weights}
    kept = {}
    for name, placement in block.tensors.items():
        if name in done or covered(block, placement.parameter, weights):
            continue
        owner, _, leaf = placement.parameter.rpartition(".")
        module = job.skeleton.model.get_submodule(owner)
        values = module._parameters.get(leaf)
        if values is not None:
            kept[name] = placement.view(values.data).detach().to("cpu", job.dtype).clone()
    return kept


def _write_companions(job: Job, output: Path, result: Result) -> None:
    copy_companions(job.source.directory, output, with_code=job.source.trust_remote_code)
    config = dict(job.source.checkpoint.config)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = str(job.dtype).removeprefix("torch.")
    fmt = FORMATS[job.recipe.format]
    write_config(output, config, fmt, fmt.quantization_config(job.plan.schemes, job.plan.left))
    (output / "recipe.toml").write_text(result.recipe.to_toml(), encoding="utf-8")
    write_json(output / "quantization_report.json", report_of(job, result))
