"""`lowbit.quantize`: quantize a language model and write a checkpoint that engines load."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lowbit.api.pushing import Pushed, push
from lowbit.api.shared import PAPERS_BYTES, Note, ignore
from lowbit.arguments import typed
from lowbit.calibrate import ranks
from lowbit.calibrate.budget import spend
from lowbit.calibrate.data import CalibrationSet, builtin_text, calibration_tokens
from lowbit.calibrate.free import FreeJob, prepare_free, run_free
from lowbit.calibrate.job import Job, prepare
from lowbit.calibrate.methods import complete_recipe
from lowbit.calibrate.own import kept_own_text, prompts_of
from lowbit.calibrate.pipeline import assist, run
from lowbit.calibrate.plan import Plan
from lowbit.calibrate.report import BlockReport, Result
from lowbit.calibrate.resume import Journal, journaled
from lowbit.errors import CheckpointError, Unfinished, UsageError
from lowbit.evaluation.after import MEASURES, Measured, measure, require_measures
from lowbit.evaluation.perplexity import Score
from lowbit.evaluation.record import record
from lowbit.evaluation.report.card import Original, original_of, write_card
from lowbit.evaluation.report.facts import facts_of
from lowbit.evaluation.report.page import render
from lowbit.export.checkpoint import open_checkpoint, seal
from lowbit.export.dialects import format_of, named_format
from lowbit.export.files import write_text
from lowbit.export.formats import LogicalTensors
from lowbit.export.recipes import read_recipe
from lowbit.export.staging import only_run, refuse_output, refuse_to_replace, require_space, staged, told_whole
from lowbit.export.survey import survey
from lowbit.extras import is_there
from lowbit.models.devices import check_device
from lowbit.models.files import Files, open_files
from lowbit.models.hub import require_account
from lowbit.models.source import Source, open_source
from lowbit.progress import Part, Step, watched_by
from lowbit.quant.recipe import Recipe

# The journal, the staged output and the output that is replaced are on disk at once; 0.05 is for everything else.
COPIES_ON_DISK = 3.05


@dataclass(frozen=True)
class Completed:
    """The recipe, with the method's own settings filled in."""

    recipe: Recipe


@dataclass(frozen=True)
class Planned:
    """The plan; once a budget has been distributed, that of `job.mixture`."""

    job: Job | FreeJob


@dataclass(frozen=True)
class Calibrated:
    """The calibration tokens, with counts of rows read and skipped."""

    calibration: CalibrationSet


@dataclass(frozen=True)
class Stage:
    """The start of a long step, named by `text`."""

    text: str


@dataclass(frozen=True)
class Checked:
    """Progress of the check of the model's files: `done` of `total` bytes were read and are sound."""

    done: int
    total: int


@dataclass(frozen=True)
class BlockDone:
    """One finished block of `total`."""

    report: BlockReport
    total: int


Event = Completed | Planned | Calibrated | Stage | Checked | BlockDone | Note | Step | Part
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Quantized:
    """A finished run.

    output        the checkpoint's directory or file; None after a dry run, and on ranks that do not write
    recipe        complete, with the hash of the calibration tokens
    plan          scheme of every quantized linear; reason for every linear left in 16 bits
    blocks        one report per block
    source_bytes, output_bytes  bytes of weights before and after
    scores        perplexity of the original and of the checkpoint; empty if not measured
    rows          all measurements, as in evaluation.jsonl
    warnings      limits of other engines with this checkpoint, as sentences
    readers       engines that load it on one machine or another: "vLLM", "SGLang", "transformers", "lowbit"
    seconds       wall time from the first weight to the end
    pushed        the repository that it was uploaded to, if any
    """

    output: Path | None
    recipe: Recipe
    plan: Plan
    blocks: tuple[BlockReport, ...]
    source_bytes: int
    output_bytes: int
    scores: tuple[Score, ...]
    rows: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    readers: tuple[str, ...]
    seconds: float
    pushed: Pushed | None = None


@typed()
def quantize(
    model: str | Path,
    output: str | Path | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
    eval_windows: int = 4,
    measures: Sequence[str] = MEASURES,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    model_free: bool = False,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    progress: OnEvent = ignore,
    **settings: Any,
) -> Quantized:
    """Quantize `model` and write the checkpoint to `output`.

    >>> import lowbit
    >>> done = lowbit.quantize("my-model", "my-model-int8", method="int8", eval_windows=0)
    >>> done.output_bytes < done.source_bytes
    True

    model         a directory with safetensors, a hub id, or "demo"
    output        the directory to write, or the file NAME.gguf; may be left out for a dry run
    recipe        a Recipe, a mapping, or the path of a TOML file; `settings` override it
    settings      any key of a Recipe: method, bits, group_size, dataset, ignore, format, ...
    eval_windows  windows of held-out text to score before and after; 0 for none
    measures      of "ppl", "kl" and "text": perplexity, divergence, continuations of three prompts
    dry_run       stop before a weight is read
    model_free    find linears by their names and rewrite file by file, without the model's code; nothing is measured
    resume        continue an interrupted run to the same output
    revision      branch, tag or commit of a hub id
    base_model    id on the hub of the model in a local directory, for the card
    push_to_hub   upload the result to this repository, NAME/MODEL, as `push` does
    progress      called with each Event

    Raises RecipeError, UsageError and DeviceError for bad arguments, CheckpointError for a model that cannot be used,
    DatasetError for bad calibration text. Nothing half-written is left behind.
    """
    ranks.join()
    complete = _complete(recipe, settings, None if output is None else Path(output))
    require_measures(measures, eval_windows)
    if output is None and not dry_run:
        raise UsageError("say where to write: --output DIR")
    if push_to_hub is not None:
        if output is not None and format_of(Path(output)) is not None:
            raise UsageError(f"--push-to-hub uploads a directory with a card; {output} is to be one file")
        require_account(push_to_hub)  # better now than after hours of work
    target = None if output is None else Path(output)
    with watched_by(progress), _reserved(target, overwrite):
        progress(Completed(complete))
        if model_free:
            files = open_files(str(model), revision, trust_remote_code)
            done = _rewritten(files, complete, None if dry_run else target, (device, overwrite, base_model), progress)
            return done if push_to_hub is None or target is None else _pushed(done, target, push_to_hub, progress)
        with ranks.leader_first():
            source = open_source(str(model), trust_remote_code, revision)
        _tell_commit(complete, source, progress)
        if target is not None:
            refuse_to_replace(target, source.directory, Path(model))
        job = prepare(source, complete, ranks.own_device(check_device(device)))
        progress(Planned(job))
        original = original_of(source, base_model)
        if target is None or dry_run:
            return _unwritten(job)
        with ranks.leader_first():
            sums = _surveyed(source, progress) if ranks.leads() else {}
            calibration = _calibration(complete, source, progress)
        if calibration is not None:
            calibration = _told(job, calibration, sums, progress)
        job = _spent(job, calibration, progress)
        require_space(target, int(job.output_bytes() * COPIES_ON_DISK) + PAPERS_BYTES)
        with journaled(target, job, calibration, resume, sums) as journal:
            this = _Run(job, original, calibration, journal, progress)
            if not ranks.leads():
                return _assisted(this)
            _tell_journal(journal, resume, progress)
            _tell_base(original, progress)
            done = _written(this, target, overwrite, (eval_windows, tuple(measures)))
    return done if push_to_hub is None else _pushed(done, target, push_to_hub, progress)


@dataclass(frozen=True)
class _Run:
    """The job with the original's facts for its card, its calibration tokens, journal and progress callback."""

    job: Job
    original: Original
    calibration: CalibrationSet | None
    journal: Journal
    progress: OnEvent


def _rewritten(
    files: Files, recipe: Recipe, output: Path | None, how: tuple[str, bool, str | None], progress: OnEvent
) -> Quantized:
    """Quantize without a model class; only plan without an `output`.

    how  device, overwrite, base_model
    """
    device, overwrite, base_model = how
    _tell_commit(recipe, files, progress)
    if output is not None:
        refuse_to_replace(output, files.directory, Path(files.name))
    job = prepare_free(files, recipe, check_device(device))
    progress(Planned(job))
    if output is None:
        return _unwritten(job)
    original = original_of(files, base_model)
    _tell_base(original, progress)
    require_space(output, job.output_bytes() + PAPERS_BYTES)
    begun = time.monotonic()
    with staged(output, overwrite, job.format.container.alone(output)) as staging:
        progress(Stage("rewriting files"))
        result, digests = run_free(job, staging)
        progress(Stage("reading back what was written"))
        readers = _write_papers(staging, (job, original), result, Measured(), output.resolve().name, digests)
    return _quantized(output, job, result, Measured(), readers, begun)


@contextmanager
def _reserved(output: Path | None, overwrite: bool) -> Iterator[None]:
    """A context that locks `output` against other runs. Raises if `output` cannot be written."""
    with ExitStack() as held:
        if output is not None:
            if ranks.leads() and output.parent.is_dir():
                held.enter_context(only_run(output))
            refuse_output(output, overwrite, format_of(output) is not None)
        yield


def _complete(
    recipe: Recipe | Mapping[str, Any] | str | Path | None, settings: dict[str, Any], output: Path | None
) -> Recipe:
    """The complete recipe from `recipe` and the overriding `settings`, in the format that `output` may ask for."""
    if isinstance(recipe, str | Path):
        values = read_recipe(Path(recipe))
    else:
        values = asdict(recipe) if isinstance(recipe, Recipe) else dict(recipe or {})
        values = {key: value for key, value in values.items() if value is not None}
    asked = None if output is None else format_of(output)
    complete = complete_recipe(({} if asked is None else {"format": asked.name}) | values | settings)
    named_format(output, complete.format)
    return complete


def _tell_commit(recipe: Recipe, source: Files, progress: OnEvent) -> None:
    """Warn if the recipe was made with another commit of the model."""
    snapshot = source.snapshot
    if snapshot is not None and recipe.model_commit not in (None, snapshot.commit):
        progress(
            Note(
                f"the recipe was made with commit {recipe.model_commit} of a model, this is {snapshot.repo} at "
                f"{snapshot.commit}: the weights may differ; pass that commit as --revision",
                warning=True,
            )
        )


def _tell_base(original: Original, progress: OnEvent) -> None:
    """Warn if the card cannot name the original model."""
    if not original.is_base:
        known = f"names {original.base_model}, from the model's own card," if original.base_model else "names none"
        progress(
            Note(f"the card {known} as base model; --base-model ORG/MODEL says which model of the hub this one is")
        )


def _surveyed(source: Source, progress: OnEvent) -> dict[str, str]:
    """SHA-256 of each of the model's files, after reading and checking all of them."""
    done = 0

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(Checked(done, source.checkpoint.nbytes))

    return survey(source.checkpoint, told)


def _calibration(recipe: Recipe, source: Source, progress: OnEvent) -> CalibrationSet | None:
    """The calibration tokens of the recipe's dataset; None if it needs none."""
    if recipe.dataset is None:
        return None
    tokens = calibration_tokens(
        recipe.dataset,
        source.tokenizer(),
        recipe.num_samples,
        recipe.seqlen,
        recipe.seed,
        recipe.text_column,
        source if source.sees else None,
    )
    for batch in (tokens.ids, *(sample.ids for sample in tokens.seen)):
        source.require_known(batch)
    return tokens


def _told(job: Job, tokens: CalibrationSet, sums: Mapping[str, str], progress: OnEvent) -> CalibrationSet:
    """`tokens`, with the model's own text if the recipe asks for it, told to `progress`.

    sums  SHA-256 of the model's files by name; the leader's
    """
    recipe = job.recipe
    windows = recipe.own_samples + recipe.distill_samples
    if windows:
        shape = windows, recipe.seqlen
        progress(Stage("writing text of the model's own"))
        ids = torch.empty(shape, dtype=torch.int64)
        if ranks.leads():
            prompts = prompts_of(tokens.ids, windows, recipe.own_prompt, recipe.seed)
            ids = kept_own_text(job.source, job.device, job.dtype, shape, recipe.seed, sums, prompts)
        tokens = tokens.with_own(*ranks.leaders(ids).split([recipe.own_samples, recipe.distill_samples]))
    progress(Calibrated(tokens))
    if recipe.calibration_sha256 not in (None, tokens.sha256):
        progress(
            Note(
                f"the recipe was made with calibration tokens {recipe.calibration_sha256}, these are {tokens.sha256}: "
                "another tokenizer, text, device or Python version; the weights will differ",
                warning=True,
            )
        )
    return tokens


def _spent(job: Job, calibration: CalibrationSet | None, progress: OnEvent) -> Job:
    """`job` with its budget distributed over the linears; unchanged without one."""
    if not job.recipe.budgeted or calibration is None:
        return job
    progress(Stage("measuring what each scheme costs"))
    job = spend(job, calibration)
    progress(Planned(job))
    return job


def _tell_journal(journal: Journal, resume: bool, progress: OnEvent) -> None:
    place = journal.directory
    if journal.damage:
        progress(Note(f"{journal.damage}; the blocks from there on are done again"))
    if journal.finished:
        progress(Note(f"{journal.finished} blocks were finished before, in {place}"))
    elif place.exists() and not resume:
        progress(Note(f"{place} is of an interrupted run; stop and add --resume to go on there"))


def _written(this: _Run, output: Path, overwrite: bool, evaluation: tuple[int, tuple[str, ...]]) -> Quantized:
    """Quantize, measure, and move the result to `output`."""
    begun, job = time.monotonic(), this.job
    total = len(job.skeleton.blocks)
    with staged(output, overwrite, job.format.container.alone(output)) as staging:
        this.progress(Stage("quantizing"))
        this.progress(Step("quantizing", 0, total))
        on_block = lambda done: this.progress(BlockDone(done, total))  # noqa: E731
        result = run(job, staging, this.calibration, on_block, this.journal, finished=False)
        ranks.leave()
        this.progress(Stage("measuring the loss"))
        written = open_source(str(staging), job.source.trust_remote_code, finished=False)
        measured = measure(job.source, written, builtin_text("heldout"), *evaluation, job.device)
        for lack in measured.lacks:
            this.progress(Note(lack))
        if measured.rows and not is_there("matplotlib"):
            this.progress(Note("no report.html: its plots need matplotlib: pip install 'lowbit[report]'"))
        readers = _write_papers(staging, (job, this.original), result, measured, output.resolve().name)
    return _quantized(output, job, result, measured, readers, begun)


def _quantized(
    output: Path, job: Job | FreeJob, result: Result, measured: Measured, readers: tuple[str, ...], begun: float
) -> Quantized:
    return Quantized(
        output,
        result.recipe,
        result.plan,
        tuple(result.blocks),
        result.source_bytes,
        result.output_bytes,
        measured.scores,
        tuple(measured.rows),
        tuple(job.warnings()),
        readers,
        time.monotonic() - begun,
    )


def _pushed(done: Quantized, output: Path, repo: str, progress: OnEvent) -> Quantized:
    """`done` after its upload."""
    with told_whole(output):
        try:
            return replace(done, pushed=push(output, repo, progress=progress))
        except CheckpointError as error:
            raise Unfinished(f"{output} is complete, but {error}; to upload it: lowbit push {output} {repo}") from error


def _assisted(this: _Run) -> Quantized:
    """Run this rank's share of the work. The leader writes the result."""
    assist(this.job, this.calibration, this.journal)
    ranks.leave()
    return _unwritten(this.job)


def _unwritten(job: Job | FreeJob) -> Quantized:
    """The result of a dry run, or on a rank that does not write."""
    nbytes = job.source.checkpoint.nbytes
    return Quantized(
        None, job.recipe, job.plan, (), nbytes, job.output_bytes(), (), (), tuple(job.warnings()), (), seconds=0.0
    )


def _write_papers(
    staging: Path,
    this: tuple[Job | FreeJob, Original],
    result: Result,
    measured: Measured,
    name: str,
    meant: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Write evaluation rows, HTML report (if measured), model card and checksums. Returns the engines that load it.

    name   the checkpoint's
    meant  SHA-256 of files as they were written, to be compared
    """
    job, original = this
    labels = (Path(job.source.name).name, f"{result.recipe.method} {result.recipe.default_scheme}")
    record(staging, measured.labelled(*labels))
    facts = facts_of(staging, name=name, finished=False)
    tensors = LogicalTensors(open_checkpoint(staging, finished=False))
    write_card(staging, facts, tensors, original)
    if measured.rows and is_there("matplotlib"):
        write_text(staging / "report.html", render(facts, "html"))
    seal(staging, job.format.container, meant, result.output_sums)
    return tuple(each["reader"] for each in facts["use"])
