"""Quantization without a model class, for schemes that need no data: files are rewritten, several at a time.

Linears are found by their names (calibrate/bynames.py) and rounded to nearest, some rows at a time, so that memory does
not grow with the model. All other tensors are copied bit for bit. Each output file has the name and the order of its
source. It is hashed while it is written, and again as it is read back.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from lowbit.ahead import Behind
from lowbit.calibrate.bynames import BLOCK, plan_by_names
from lowbit.calibrate.job import main_dtype, scale_dtype_of
from lowbit.calibrate.mixtures import Mixed
from lowbit.calibrate.plan import Plan
from lowbit.calibrate.report import BlockReport, Result, peak_memory, report_of, row_of
from lowbit.calibrate.vocabulary import untied
from lowbit.calibrate.written import require_scales
from lowbit.errors import CheckpointError, RecipeError
from lowbit.export.checkpoint import require_same_source, verify_checksums
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.table import fused_linears
from lowbit.export.engines.verdicts import Verdicts, verdicts_of
from lowbit.export.files import write_text
from lowbit.export.format import Format, tensors_written
from lowbit.export.formats import FLOAT8, LogicalTensors, require_fit
from lowbit.export.plain import write_json
from lowbit.export.sharded import SAFETENSORS, SINGLE_NAME, write_index
from lowbit.export.survey import checked
from lowbit.export.tensorfile import PlannedFile, Spec, nbytes_of, read_pieces
from lowbit.export.writer import carry_along, configured
from lowbit.models.files import Files
from lowbit.models.placement import engine_names
from lowbit.progress import Step, tell
from lowbit.quant.algos.clip import round_plainly
from lowbit.quant.naming import parent_set
from lowbit.quant.numerics import divisor_of
from lowbit.quant.qtensor import QTensor
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme

ROWS = 128  # a piece is a multiple of so many rows: a block's, and more than the zeros that share a word
PIECE = {"cpu": 1 << 20, "cuda": 1 << 26}  # weights of a piece: on a CPU it stays in the caches
WORKERS = min(os.cpu_count() or 1, 8)  # files at a time

Put = Callable[[Tensor], None]


@dataclass(frozen=True)
class FreeJob:
    """A job without a model class: the counterpart of job.Job."""

    source: Files
    tensors: LogicalTensors
    recipe: Recipe
    plan: Plan
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device: str
    mixture: Mixed | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.format]

    def warnings(self) -> list[str]:
        """Limits of other programs with the result, as sentences."""
        return list(self.caveats())

    def verdicts(self) -> Verdicts:
        """The way in which each engine runs the linears of the result on each machine, one of VERDICTS."""
        return verdicts_of(fused_linears(self.format, self.plan.schemes, self.shapes).values())

    def caveats(self) -> dict[str, tuple[str, ...]]:
        """The same, with the names of the engines that therefore cannot load the result."""
        caveat = self.format.caveat(self.recipe.default_scheme)
        named = "linears were found by their names, without the model's code: check the list of those left in 16 bits"
        none: tuple[str, ...] = ()
        return {text: none for text in (named, caveat) if text}

    def output_bytes(self) -> int:
        """Bytes of the weights that the run will write."""
        specs = (spec for file in self.files.values() for spec in file.values())
        return sum(map(nbytes_of, specs))

    @cached_property
    def files(self) -> dict[str, dict[str, Spec]]:
        """Every output file, by name: its tensors in the order in which they are written."""
        found: dict[str, dict[str, Spec]] = {path.name: {} for path in self.sources}
        for path, names in self.sources.items():
            for name in names:
                for key, spec in self._specs(name).items():
                    if key in found[path.name]:
                        raise CheckpointError(f"{path}: {key!r} would be there twice; take it out of the file")
                    found[path.name][key] = spec
        return found if len(found) > 1 else {SINGLE_NAME: next(iter(found.values()))}

    @cached_property
    def sources(self) -> dict[Path, list[str]]:
        """The tensors by their logical names, by the file that holds them (most of a quantized one)."""
        entries, fmt = self.tensors.checkpoint.entries, self.tensors.format
        found: dict[Path, list[tuple[int, str]]] = {}
        for name in self.tensors.names:
            parts = fmt.parts(name.removesuffix(".weight")) if fmt and self.tensors.is_quantized(name) else [name]
            present = [entries[part] for part in parts if part in entries]
            held = max(present, key=lambda entry: entry.nbytes)
            found.setdefault(held.path, []).append((held.offset, name))
        return {path: [name for _, name in sorted(names)] for path, names in sorted(found.items())}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of every linear that is written."""
        head = self.plan.head
        found = {} if head is None else {head.name: (head.n, head.k)}
        return found | {name: self.shape(name) for name in self.plan.schemes}

    def shape(self, linear: str) -> tuple[int, int]:
        """Outputs and inputs of a linear, from headers."""
        if linear in self.tensors.schemes:
            return self.tensors.shape(linear)
        n, k = self.tensors.checkpoint.entries[f"{linear}.weight"].shape
        return n, k

    def stays(self, name: str) -> bool:
        """True if the tensor `name` is written as it is."""
        linear = name.removesuffix(".weight")
        return linear == name or linear not in self.plan.written

    def rounded_from(self, name: str) -> tuple[str, Scheme] | None:
        """The linear that is rounded from the tensor `name`, with its scheme; the head, if embeddings are tied to it.
        None if there is none."""
        head, linear = self.plan.head, name.removesuffix(".weight")
        if head is not None and head.tensor == name:
            return head.name, head.scheme
        return None if self.stays(name) else (linear, self.plan.written[linear])

    def _specs(self, name: str) -> dict[str, Spec]:
        """The tensors that are written for the tensor `name`."""
        found: dict[str, Spec] = {}
        if self.stays(name):
            if self.tensors.is_quantized(name):
                found[name] = (self.dtype, self.shape(name.removesuffix(".weight")))
            else:
                entry = self.tensors.checkpoint.entries[name]
                found[name] = (entry.dtype, entry.shape)
        rounded = self.rounded_from(name)
        if rounded is not None:
            linear, scheme = rounded
            n, k = self.shape(name.removesuffix(".weight"))
            written = tensors_written(self.format, scheme, n, k, self.scale_dtype)
            found |= {f"{linear}.{suffix}": spec for suffix, spec in written.items()}
        return found


def prepare_free(source: Files, recipe: Recipe, device: str) -> FreeJob:
    """The checked job; no weight is read. RecipeError or CheckpointError if it needs data, or a model class."""
    fmt, scheme = FORMATS[recipe.format], recipe.default_scheme
    if recipe.dataset is not None:
        raise RecipeError(
            f"method {recipe.method} with {recipe.scheme or scheme} needs data, and so a model class: --model-free is "
            "for --method rtn, and for schemes whose inputs are not calibrated (fp8, nvfp4-a16)"
        )
    if recipe.embeddings is not None:
        raise RecipeError("--model-free copies the embeddings as they are: leave out --embeddings")
    if recipe.dtype != "auto":
        raise RecipeError(f"--model-free copies all other tensors as they are: leave out --dtype {recipe.dtype}")
    reason = fmt.reason_against(scheme) or fmt.risk_of(scheme)
    if reason or not fmt.by_rows:
        raise CheckpointError(f"format {fmt.name} cannot hold {scheme} by --model-free: {reason or 'not row by row'}")
    tensors = LogicalTensors(source.checkpoint)
    if tensors.stacks:
        raise CheckpointError(f"{source.directory}: stacks of quantized experts need a model class; not --model-free")
    plan = plan_by_names(tensors, recipe)
    plan.require_coverage()
    dtype = main_dtype(source.checkpoint)
    job = FreeJob(source, tensors, recipe, plan, dtype, scale_dtype_of(recipe, dtype), device)
    require_fit(fmt, plan.written, job.shapes)
    return job


def run_free(job: FreeJob, output: Path) -> tuple[Result, dict[str, str]]:
    """Write the checkpoint of `job` into the existing, empty directory `output`, unsealed.

    Returns the result, and the SHA-256 of each weight file as it was written.
    """
    checkpoint, snapshot = job.source.checkpoint, job.source.snapshot
    verify_checksums(checkpoint)
    recipe = replace(job.recipe, model_commit=snapshot.commit if snapshot else None)
    writing = _Writing(job, output)
    with ThreadPoolExecutor(WORKERS) as pool:
        if any(scheme.weights.parent for scheme in job.plan.written.values()):
            list(pool.map(writing.look, job.sources))
        digests: dict[str, str] = {}
        for name, digest in zip(job.files, pool.map(writing.write, job.sources, job.files), strict=True):
            digests[name] = digest
            tell(Step("rewriting files", len(digests), len(job.files)))
    carry_along(checkpoint, output, with_code=job.source.trust_remote_code)
    _write_heads(job, output)
    result = Result(job.plan, recipe, job.dtype, writing.reports(), source_bytes=checkpoint.nbytes)
    result.output_bytes = job.output_bytes()
    write_text(output / "recipe.toml", recipe.to_toml())
    write_json(output / "quantization_report.json", report_of(job.source, result, job.mixture, job.caveats()))
    require_same_source(checkpoint, {})
    return result, digests


def _write_heads(job: FreeJob, output: Path) -> None:
    """Write the index, if there are several files, and the configuration under its unfinished name."""
    if len(job.files) > 1:
        weight_map = {key: name for name, tensors in job.files.items() for key in tensors}
        write_index(output, weight_map, job.output_bytes())
    config = {key: value for key, value in job.source.checkpoint.config.items() if key != "quantization_config"}
    config = untied(config) if job.plan.unties else config
    config = configured(job.format, output, config, job.plan.written, engine_names(job.plan.left))
    write_json(SAFETENSORS.head_in(output, finished=False), config)


@dataclass
class _Writing:
    """A run in progress, in several threads.

    largest  largest magnitude of weights whose scales share a parent, by `parent_set`
    rows     report row of each linear
    """

    job: FreeJob
    output: Path
    largest: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    _lock: Any = field(default_factory=Lock)

    def look(self, path: Path) -> None:
        """Find the largest magnitudes in a file."""
        for name in self.job.sources[path]:
            rounded = self.job.rounded_from(name)
            if rounded is not None and rounded[1].weights.parent:
                found = torch.stack([piece.abs().amax() for piece in self._pieces(name)]).amax().float()
                with self._lock:
                    key = parent_set(rounded[0])
                    self.largest[key] = torch.maximum(self.largest.get(key, found), found)

    def write(self, path: Path, name: str) -> str:
        """Write the output file `name` from the file at `path`. Returns its SHA-256."""
        with _opened(PlannedFile(self.output / name, self.job.files[name])) as file:
            with Behind() as behind:  # a piece is hashed and written while the next one is read and rounded
                put = partial(behind, file.write)
                for tensor in self.job.sources[path]:
                    if self.job.stays(tensor):
                        self._copy(put, tensor)
                    rounded = self.job.rounded_from(tensor)
                    if rounded is not None:
                        self._quantize(put, tensor, *rounded)
            return file.close()

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """The tensor `name` on the job's device, some rows at a time. CheckpointError if a value is not finite."""
        job = self.job
        _, k = job.shape(name.removesuffix(".weight"))
        rows = max(PIECE[torch.device(job.device).type] // (k * ROWS), 1) * ROWS
        if job.tensors.is_quantized(name):
            pieces: Iterator[Tensor] = iter(job.tensors.exact(name).split(rows))
        else:
            pieces = read_pieces(job.tensors.checkpoint.entries[name], rows)
        for piece in pieces:
            yield checked(name, (piece.float() if piece.dtype in FLOAT8 else piece).to(job.device))

    def _quantize(self, put: Put, tensor: str, linear: str, scheme: Scheme) -> None:
        """Write a linear from a tensor of the source: the codes piece by piece, then everything else."""
        job, fmt = self.job, self.job.format
        n, k = job.shape(tensor.removesuffix(".weight"))
        codes, *others = tensors_written(fmt, scheme, n, k, job.scale_dtype)
        shared = self.largest.get(parent_set(linear))
        divisor = None if shared is None else divisor_of(shared, scheme.weights)
        scales, zeros, error, energy = [], [], 0.0, 0.0
        for w in self._pieces(tensor):
            require_scales(linear, w, scheme, job.scale_dtype)
            weight = round_plainly(w, scheme, job.scale_dtype, divisor)
            put(fmt.write(linear, weight)[f"{linear}.{codes}"].cpu())
            scales.append(weight.scales.cpu())
            zeros += [] if weight.zeros is None else [weight.zeros.cpu()]
            error += float((weight.dequantize() - w).square().sum())
            energy += float(w.float().square().sum())
        empty = torch.empty(n, k, dtype=scheme.number.storage, device="meta")
        parent = None if divisor is None else divisor.cpu()
        rest = QTensor(empty, torch.cat(scales), torch.cat(zeros) if zeros else None, scheme, divisor=parent)
        written = fmt.write(linear, rest)
        for suffix in others:
            put(written[f"{linear}.{suffix}"])
        if linear in job.plan.schemes:
            self.rows[linear] = row_of(job.plan, linear, scheme, (n, k), (error / max(energy, 1e-30)) ** 0.5)

    def _copy(self, put: Put, name: str) -> None:
        """Write a tensor as it is; one that is quantized in the source, dequantized."""
        if self.job.tensors.is_quantized(name):
            put(checked(name, self.job.tensors.exact(name)).to(self.job.dtype))
            return
        entry = self.job.tensors.checkpoint.entries[name]
        rows = max((1 << 24) * entry.shape[0] // max(entry.nbytes, 1), 1) if entry.shape else 1
        for piece in read_pieces(entry, rows):
            put(checked(name, piece))

    def reports(self) -> list[BlockReport]:
        """One report for each block, in the order of their names."""
        blocks: dict[str, dict[str, dict[str, Any]]] = {}
        for name in self.job.plan.schemes:
            blocks.setdefault(BLOCK.match(name)[1], {})[name] = self.rows[name]  # type: ignore[index]
        seconds, peak = (time.monotonic() - self.begun) / max(len(blocks), 1), peak_memory(self.job.device)
        return [BlockReport(i, name, None, seconds, peak, [], rows) for i, (name, rows) in enumerate(blocks.items())]


@contextmanager
def _opened(file: PlannedFile) -> Iterator[PlannedFile]:
    """A context that closes a file whose writing fails."""
    try:
        yield file
    except BaseException:
        file.abandon()
        raise
