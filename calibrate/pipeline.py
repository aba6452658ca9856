"""Pipeline from a model's files to a quantized checkpoint, with one block in memory at a time."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.ahead import WORKERS, Behind, one_thread
from lowbit.calibrate import ranks
from lowbit.calibrate.blocks import BlockLoop, Blocks, DataFreeBlocks
from lowbit.calibrate.data import CalibrationSet
from lowbit.calibrate.distill import TUNING, distill, rehearse
from lowbit.calibrate.job import Job
from lowbit.calibrate.outcome import BlockOutcome
from lowbit.calibrate.report import TUNING_STEP, BlockReport, Result, report_of
from lowbit.calibrate.resume import Journal
from lowbit.calibrate.vocabulary import untied
from lowbit.calibrate.written import RecordingWriter
from lowbit.export.checkpoint import require_same_source, verify_checksums
from lowbit.export.dialects import FORMATS
from lowbit.export.files import write_text
from lowbit.export.plain import write_json
from lowbit.export.writer import CheckpointWriter, carry_along
from lowbit.models.skeleton import tied_weights
from lowbit.progress import Part, Step, tell

OnBlock = Callable[[BlockReport], None]


def run(
    job: Job,
    output: Path,
    calibration: CalibrationSet | None,
    on_block: OnBlock,
    journal: Journal | None = None,
    finished: bool = True,
) -> Result:
    """Quantize `job` into the existing, empty directory `output`. Calibrated blocks in `journal` are not done again.

    finished  False leaves the sealing to the caller

    Writes weights, recipe.toml and quantization_report.json, and copies tokenizer and templates. Every written tensor
    is read back and compared. CheckpointError if a tensor differs, Unfinished if the model's files changed during the
    run.
    """
    unspent = job.recipe.budgeted and set(job.plan.schemes) - job.plan.named
    assert not unspent, "a budget is spent (calibrate.budget) before a run"
    sums = journal.sums if journal else {}
    verify_checksums(job.source.checkpoint, sums)
    snapshot = job.source.snapshot
    recipe = replace(
        job.recipe,
        calibration_sha256=calibration.sha256 if calibration else None,
        model_commit=snapshot.commit if snapshot else None,
    )
    result = Result(job.plan, recipe, job.dtype, source_bytes=job.source.checkpoint.nbytes)
    fmt = FORMATS[recipe.format]
    loop = BlockLoop(job, calibration) if calibration else None
    writer = RecordingWriter(CheckpointWriter(fmt, output, recipe.max_shard_size), job, 1 if loop else WORKERS)
    with _blocks_of(job, loop) as blocks:
        # rounding alone takes no longer than a journal
        outcomes = _outcomes(job, blocks, result, on_block, journal if loop else None)
        with Behind() as behind:  # a block is packed and written while the next one is quantized
            for block, outcome in zip(job.skeleton.blocks, outcomes, strict=True):
                tell(Part(f"writing {block.name}"))
                behind(writer.add_block, block, outcome)
        tell(Step("writing the unquantized tensors", 0, None))
        seen = loop.before_head() if loop and job.plan.head else None
        result.vocabulary = writer.add_others(seen)
    carry_along(job.source.checkpoint, output, with_code=job.source.trust_remote_code)
    write_text(output / "recipe.toml", result.recipe.to_toml())
    write_json(output / "quantization_report.json", report_of(job.source, result, job.mixture, job.caveats()))
    writer.finish(_config(job))  # a container with one file has these two in it
    result.output_bytes, result.output_sums = writer.verify(output)
    require_same_source(job.source.checkpoint, sums)
    if finished:
        fmt.container.seal(output)
    return result


def assist(job: Job, calibration: CalibrationSet | None, journal: Journal | None = None) -> None:
    """Run this rank's share of the leader's `run`. Writes nothing."""
    if calibration is not None:
        result = Result(job.plan, job.recipe, job.dtype)
        deque(_outcomes(job, BlockLoop(job, calibration), result, lambda report: None, journal), maxlen=0)


@contextmanager
def _blocks_of(job: Job, loop: BlockLoop | None) -> Iterator[Blocks]:
    """A context with the blocks of `job`: `loop`, or, without calibration, those of workers with one thread each."""
    if loop is not None:
        yield loop
        return
    with one_thread(), DataFreeBlocks(job) as blocks:
        yield blocks


def _outcomes(
    job: Job, blocks: Blocks, result: Result, on_block: OnBlock, journal: Journal | None
) -> Iterator[BlockOutcome]:
    """Every block's outcome, also reported to `result` and `on_block`. With distillation, all come at the end."""
    held = []
    for index in range(len(job.skeleton.blocks)):
        outcome = _outcome(job, blocks, index, journal)
        result.blocks.append(outcome.report)
        on_block(outcome.report)
        if job.recipe.distill_steps:
            held.append(outcome)
        else:
            yield outcome
    if isinstance(blocks, BlockLoop) and held:

        def on_step(loss: float) -> None:
            result.distilled.append(loss)
            tell(Step(TUNING, len(result.distilled), job.recipe.distill_steps))

        yield from distill(job, blocks, held, on_step)


def _outcome(job: Job, blocks: Blocks, index: int, journal: Journal | None) -> BlockOutcome:
    """The outcome of block `index`: read from `journal`, or computed now and added to it.

    If distillation will follow, the first block's report says how long a step will take.
    """
    outcome = journal.read(index) if journal else None
    if outcome is not None:
        blocks.replay(index, outcome)
        return outcome
    outcome = blocks.quantize(index)
    if job.recipe.distill_steps and index == 0 and isinstance(blocks, BlockLoop):
        outcome.report.phases[TUNING_STEP] = rehearse(job, blocks, outcome)
    if journal and ranks.leads():
        journal.add(index, outcome)
    return outcome


def _config(job: Job) -> dict[str, Any]:
    """config.json of the result, but for its quantization_config."""
    config = dict(job.source.checkpoint.config)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = str(job.dtype).removeprefix("torch.")
    if job.plan.unties:
        config = untied(config)
    elif not tied_weights(job.skeleton.model):
        # the file decides about tied weights (models.skeleton), but readers may look at config.json alone
        for part in (config, config.get("text_config", {})):
            part |= {key: False for key in ("tie_word_embeddings",) if part.get(key)}
    return config
