"""From a model's files to a quantized checkpoint, one block in memory at a time."""

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.block import BlockWork
from calibrate.data import CalibrationSet
from calibrate.discover import Probe, Structure, Workbench, discover, prove
from calibrate.methods import Method, find_method
from calibrate.plan import Plan, make_plan
from export.checkpoint import open_checkpoint, verify_checksums
from export.errors import CheckpointError
from export.formats import FORMATS, LogicalTensors
from export.writer import ShardedWriter, copy_companions, write_json
from models.skeleton import Block, Skeleton, build_skeleton, checked
from models.source import Source
from models.walk import Walk
from quant.qtensor import QTensor, round_to_nearest
from quant.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BATCH_TOKENS = 4096  # tokens run through a block at once, and tokens that module outputs are compared on
GRAM_TOKENS = 16384  # tokens that second moments are estimated from
PROBE_LENGTH = 24
SINGLE_PROBES = 48


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block.

    loss     squared error of the block's output, relative to what the block adds to its input; None without calibration
    seconds, peak_bytes  time it took, and the process's (or GPU's) peak memory so far
    folds    proved folds with the scale chosen for each
    linears  per linear: scheme, errors, tokens seen, fallbacks
    """

    index: int
    name: str
    loss: float | None
    seconds: float
    peak_bytes: int
    folds: list[dict[str, Any]]
    linears: dict[str, dict[str, Any]]


@dataclass
class Result:
    """What a run did: the plan it followed, its recipe (calibration hash filled in), a report per block."""

    plan: Plan
    recipe: Recipe
    dtype: torch.dtype
    blocks: list[BlockReport] = field(default_factory=list)
    source_bytes: int = 0
    output_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """A source opened and a recipe that fits it."""

    source: Source
    skeleton: Skeleton
    recipe: Recipe
    method: Method
    plan: Plan
    dtype: torch.dtype
    device: str

    def output_bytes(self) -> int:
        """Bytes of the weights that the run will write."""
        quantized = sum(
            self.plan.parameters[name] * scheme.bits_per_weight(self.inputs(name)) / 8
            for name, scheme in self.plan.schemes.items()
        )
        kept = sum(entry.numel for entry in self.source.checkpoint.entries.values()) - sum(
            self.plan.parameters[name] for name in self.plan.schemes
        )
        return int(quantized + kept * self.dtype.itemsize)

    def warnings(self) -> list[str]:
        """What the user should know before loading the result elsewhere."""
        transposed = [spec.name for block in self.skeleton.blocks for spec in block.linears if spec.transposed]
        if not any(name in self.plan.schemes for name in transposed):
            return []
        return [
            "this family stores its weights transposed (Conv1D), which compressed-tensors readers do not know: "
            "lowbit reads the checkpoint, transformers and vLLM will not"
        ]

    def inputs(self, linear: str) -> int:
        """k of a linear."""
        return next(spec.k for block in self.skeleton.blocks for spec in block.linears if spec.name == linear)


OnBlock = Callable[[BlockReport], None]


def prepare(source: Source, recipe: Recipe, device: str) -> Job:
    """Everything that can be decided, and refused, before a weight is read.

    Raises CheckpointError or RecipeError where the model is quantized already, damaged, or cannot be covered.
    """
    if source.checkpoint.quantization is not None:
        method = source.checkpoint.quantization.get("quant_method")
        raise CheckpointError(f"{source.directory}: already quantized ({method}); quantize the original model instead")
    fmt = FORMATS[recipe.format]
    reason = fmt.reason_against(recipe.scheme)
    if reason:
        raise CheckpointError(f"format {fmt.name} cannot hold {recipe.scheme}: {reason}")
    checkpoint = source.checkpoint
    skeleton = build_skeleton(source, list(checkpoint.entries), checkpoint.read)
    plan = make_plan(skeleton, recipe)
    plan.require_coverage()
    return Job(source, skeleton, recipe, find_method(recipe.method), plan, _dtype(source, recipe), device)


def _dtype(source: Source, recipe: Recipe) -> torch.dtype:
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    counts: dict[torch.dtype, int] = {}
    for entry in source.checkpoint.entries.values():
        if entry.dtype in DTYPES.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.bfloat16)


def run(job: Job, output: Path, calibration: CalibrationSet | None, on_block: OnBlock) -> Result:
    """Quantize `job` into the existing, empty directory `output`.

    Writes weights, config.json, recipe.toml and quantization_report.json, and copies tokenizer and templates. What was
    written is read again and compared with what was meant. Raises CheckpointError where it differs.
    """
    verify_checksums(job.source.checkpoint)
    recipe = replace(job.recipe, calibration_sha256=calibration.sha256 if calibration else None)
    result = Result(job.plan, recipe, job.dtype, source_bytes=job.source.checkpoint.nbytes)
    writer = _RecordingWriter(ShardedWriter(output, recipe.max_shard_size), job)
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
    """Each block's weights rounded to nearest, a tensor in memory at a time."""
    for index, block in enumerate(job.skeleton.blocks):
        begun = time.monotonic()
        weights, rows = {}, {}
        specs = {spec.name: spec for spec in block.linears}
        for name, spec in specs.items():
            if name in job.plan.schemes:
                w = _file_weight(job, block, name).to(job.device)
                weights[name] = round_to_nearest(w, job.plan.schemes[name], job.dtype).to("cpu")
                rows[name] = _row(job, name, weights[name], weights[name].dequantize() - w.float().cpu(), w)
        yield weights, {}, BlockReport(index, block.name, None, time.monotonic() - begun, _peak(job.device), [], rows)


def _file_weight(job: Job, block: Block, name: str) -> Tensor:
    spec = next(spec for spec in block.linears if spec.name == name)
    if f"{name}.weight" in block.tensors:
        value = checked(f"{name}.weight", job.source.checkpoint.read(f"{name}.weight"))
        return value.T if spec.transposed else value
    fused = next(key for key, place in block.tensors.items() if place.parameter == spec.placement.parameter)
    return spec.placement.view(checked(fused, job.source.checkpoint.read(fused)))


@torch.no_grad()
def _calibrated_blocks(job: Job, calibration: CalibrationSet) -> Iterator[BlockOutcome]:
    """Each block calibrated on what the quantized blocks before it produce."""
    compute = torch.float32 if job.device == "cpu" and job.dtype == torch.float16 else job.dtype
    walk = Walk(job.skeleton, job.device, compute)
    size = max(BATCH_TOKENS // calibration.ids.shape[1], 1)
    hidden = walk.start(list(calibration.ids.split(size)))
    prober = _Prober(Walk(job.skeleton, job.device, torch.float32), calibration.ids, job.recipe.seed)
    for index, block in enumerate(job.skeleton.blocks):
        begun = time.monotonic()
        with walk.loaded(index):
            structure = prober.structure(index)
            schemes = {
                spec.name: job.plan.schemes[spec.name] for spec in block.linears if spec.name in job.plan.schemes
            }
            work = BlockWork(walk, index, schemes, job.dtype)
            sample = _sample(hidden)
            before = work.run(sample)
            work.observe(hidden, structure.sites, GRAM_TOKENS)
            folds = _search_folds(job, work, structure, sample)
            weights = work.round(job.method.clip_search)
            loss = _relative_loss(work.run(sample), before, sample)
            hidden = work.run(hidden)
            rows = _calibrated_rows(job, work, weights)
            kept = _kept_tensors(job, walk, block, weights)
        weights = {name: weight.to("cpu") for name, weight in weights.items()}
        yield (
            weights,
            kept,
            BlockReport(index, block.name, loss, time.monotonic() - begun, _peak(job.device), folds, rows),
        )


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
            choice = work.search_fold(fold, sample)
            if choice is None:
                row["skipped"] = "no calibration token reached a quantized consumer"
            else:
                row |= {
                    "ratio": choice.ratio,
                    "duo": choice.duo,
                    "loss": choice.loss,
                    "unscaled_loss": choice.unscaled_loss,
                }
        rows.append(row)
    rows += [{"fold": name, "skipped": "failed its proof on this block"} for name in structure.rejected]
    return rows


def _relative_loss(after: list[Tensor], before: list[Tensor], inputs: list[Tensor]) -> float:
    error = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(after, before, strict=True))
    signal = sum(float((b.float() - x.float()).square().sum()) for b, x in zip(before, inputs, strict=True))
    return error / max(signal, 1e-30)


class _Prober:
    """Finds the structure of blocks, once for all blocks alike, and proves it on each."""

    def __init__(self, walk: Walk, ids: Tensor, seed: int) -> None:
        self._walk, self._seed = walk, seed
        self._known: dict[Any, tuple[Block, Structure]] = {}
        flat = ids.flatten()
        probe = flat[: PROBE_LENGTH * 2].view(2, -1)
        single = flat[:SINGLE_PROBES].view(-1, 1)
        self._shapes = [tuple(states.shape) for states in walk.start([probe, single])]

    def structure(self, index: int) -> Structure:
        """The structure of block `index`, which must be loaded; folds that fail on this block are named as rejected."""
        block = self._walk.skeleton.blocks[index]
        bench = Workbench(block)
        device = next(block.module.parameters()).device
        generator = torch.Generator().manual_seed(self._seed + index)
        probe, single = (
            self._probe(index, torch.randn(shape, generator=generator).to(device)) for shape in self._shapes
        )
        key = block.signature()
        if key not in self._known:
            self._known[key] = block, discover(bench, probe, single, self._seed)
            return self._known[key][1]
        original, known = self._known[key]
        structure = known.renamed(original.names_in(block))
        proved = prove(bench, structure.folds, probe, self._seed + index)
        rejected = [fold.describe() for fold in structure.folds if fold not in proved]
        return replace(structure, folds=proved, rejected=rejected)

    def _probe(self, index: int, hidden: Tensor) -> Probe:
        def run(module: nn.Module) -> Tensor:
            return self._walk.run_module(module, index, hidden) - hidden

        return Probe(run)


def _kept_tensors(job: Job, walk: Walk, block: Block, weights: dict[str, QTensor]) -> dict[str, Tensor]:
    """The block's tensors that stay unquantized, as transforms left them."""
    done = {f"{name}.weight" for name in weights}
    kept = {}
    for name, placement in block.tensors.items():
        if name in done or _covered(block, placement.parameter, weights):
            continue
        owner, _, leaf = placement.parameter.rpartition(".")
        module = job.skeleton.model.get_submodule(owner)
        values = module._parameters.get(leaf)
        if values is not None:
            kept[name] = placement.view(values.data).detach().to("cpu", job.dtype).clone()
    return kept


def _covered(block: Block, parameter: str, weights: dict[str, QTensor]) -> bool:
    """Whether a fused parameter lives on entirely in the quantized experts cut from it."""
    inside = [spec.name for spec in block.linears if spec.placement.parameter == parameter]
    return bool(inside) and all(name in weights for name in inside)


class _RecordingWriter:
    """Writes the checkpoint's tensors, remembering a digest of each so that the files can be held against them."""

    def __init__(self, writer: ShardedWriter, job: Job) -> None:
        self._writer, self._job = writer, job
        self._format = FORMATS[job.recipe.format]
        self._meant: dict[str, str] = {}

    def add_block(self, block: Block, weights: dict[str, QTensor], kept: dict[str, Tensor]) -> None:
        """Write a block: packed weights, then every other tensor of it, changed or as in the source."""
        for name, weight in weights.items():
            for key, tensor in self._format.write(name, weight).items():
                self._writer.add(key, tensor)
            self._meant[name] = _digest((weight.codes, weight.scales, weight.zeros))
        for name, placement in block.tensors.items():
            if name.removesuffix(".weight") not in weights and not _covered(block, placement.parameter, weights):
                self._add(name, kept[name] if name in kept else self._source(name))

    def add_others(self) -> None:
        """Write the tensors outside the blocks; a copy of tied embeddings is dropped."""
        in_blocks = {name for block in self._job.skeleton.blocks for name in block.tensors}
        for name in self._job.source.checkpoint.entries:
            if name not in in_blocks and not self._is_tied_copy(name):
                self._add(name, self._source(name))

    def _is_tied_copy(self, name: str) -> bool:
        tied = getattr(self._job.source.config.get_text_config(), "tie_word_embeddings", False)
        head = self._job.skeleton.model.get_output_embeddings()
        place = self._job.skeleton.others.get(name)
        if (
            not tied
            or place is None
            or self._job.skeleton.model.get_submodule(place.parameter.rpartition(".")[0]) is not head
        ):
            return False
        others = self._job.source.checkpoint.entries
        return any(other != name and "embed" in other and others[other].shape == others[name].shape for other in others)

    def _source(self, name: str) -> Tensor:
        value = checked(name, self._job.source.checkpoint.read(name))
        return value.to(self._job.dtype) if value.is_floating_point() else value

    def _add(self, name: str, tensor: Tensor) -> None:
        self._writer.add(name, tensor)
        self._meant[name] = _digest((tensor,))

    def finish(self) -> None:
        """Close the files."""
        self._writer.finish()

    def verify(self, output: Path) -> int:
        """Bytes of the weights on disk, after reading every tensor back and comparing it with what was meant."""
        written = open_checkpoint(output)
        logical = LogicalTensors(written)
        for name, meant in self._meant.items():
            if name in logical.schemes:
                weight = logical.qtensor(name)
                found = _digest((weight.codes, weight.scales, weight.zeros))
            else:
                found = _digest((written.read(name),))
            if found != meant:
                raise CheckpointError(f"{output}: {name} does not read back as it was written; the disk may be failing")
        return written.nbytes


def _digest(tensors: Iterable[Tensor | None]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _write_companions(job: Job, output: Path, result: Result) -> None:
    copy_companions(job.source.directory, output, with_code=job.source.trust_remote_code)
    config = dict(job.source.checkpoint.config)
    config["quantization_config"] = FORMATS[job.recipe.format].quantization_config(job.plan.schemes, job.plan.left)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = str(job.dtype).removeprefix("torch.")
    write_json(output / "config.json", config)
    (output / "recipe.toml").write_text(result.recipe.to_toml(), encoding="utf-8")
    write_json(output / "quantization_report.json", report_of(result))


def report_of(result: Result) -> dict[str, Any]:
    """The per-layer report as JSON values: no times or memory, so that equal runs write equal files."""
    return {
        "coverage": result.plan.coverage,
        "left": {
            name: {"reason": left.reason, "parameters": left.parameters} for name, left in result.plan.left.items()
        },
        "blocks": [
            {"name": block.name, "loss": block.loss, "folds": block.folds, "linears": block.linears}
            for block in result.blocks
        ],
    }


def _row(job: Job, name: str, weight: QTensor, error: Tensor, original: Tensor) -> dict[str, Any]:
    k = weight.shape[1]
    row: dict[str, Any] = {
        "scheme": str(weight.scheme),
        "shape": list(weight.shape),
        "bits_per_weight": round(weight.scheme.bits_per_weight(k), 4),
        "weight_error": float(error.norm() / original.float().norm().cpu().clamp(min=1e-30)),
    }
    if weight.scheme.group_size != job.recipe.group_size:
        row["fallback"] = f"group size {job.recipe.group_size} does not divide {k} inputs (or those fused with it)"
    return row


def _calibrated_rows(job: Job, work: BlockWork, weights: dict[str, QTensor]) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, weight in weights.items():
        master = work.masters[name]
        rows[name] = _row(job, name, weight, (weight.dequantize() - master).cpu(), master)
        stats = work.stats.get(name)
        rows[name] |= {"tokens": stats.tokens if stats else 0, "output_error": work.output_error(name, weight)}
        if stats is None:
            rows[name]["fallback"] = "no calibration token reached it: rounded to nearest"
    return rows


def _peak(device: str) -> int:
    """Peak memory in bytes: of the GPU where one is used, else of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
