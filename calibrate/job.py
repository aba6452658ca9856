"""A model and a recipe, checked against each other: every decision and refusal comes before a weight is read."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from lowbit.calibrate.caveats import Intent, caveats_of
from lowbit.calibrate.mixtures import Mixed
from lowbit.calibrate.plan import Plan, make_plan
from lowbit.errors import CheckpointError
from lowbit.export.checkpoint import Checkpoint
from lowbit.export.dialects import FORMATS, readable
from lowbit.export.engines.table import fused_linears
from lowbit.export.engines.verdicts import Verdicts, verdicts_of
from lowbit.export.format import Format, bytes_written
from lowbit.export.formats import LogicalTensors, require_fit, require_model
from lowbit.export.plain import read_json
from lowbit.models.devices import free_bytes
from lowbit.models.skeleton import Block, LinearSpec, Skeleton, open_skeleton, tied_weights
from lowbit.models.source import Source
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme

STATES = 2  # of a further window that are kept: before the first block and after the last
BYTES_PER_TUNED_CODE = 16  # value, change and two moments, in float32
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """A quantization job.

    dtype    of most unquantized weights, and of scales if the format leaves them a choice
    device   device that blocks run on
    mixture  the schemes that a budget was distributed over, once it is
    """

    source: Source
    skeleton: Skeleton
    recipe: Recipe
    plan: Plan
    dtype: torch.dtype
    device: str
    mixture: Mixed | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales: fixed by the format, or that of unquantized weights."""
        return scale_dtype_of(self.recipe, self.dtype)

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the file's tensor `name` is written if it stays unquantized.

        This is its own dtype, unless the recipe asks for another one. Then tensors wider than most weights keep theirs.
        """
        if self.skeleton.tensors.is_quantized(name):
            return self.dtype
        own = self.source.checkpoint.entries[name].dtype
        wider = own.itemsize > self._main_dtype.itemsize
        return own if self.recipe.dtype == "auto" or wider or not own.is_floating_point else self.dtype

    @cached_property
    def _main_dtype(self) -> torch.dtype:
        """Cached: a model with many experts asks for 100,000 tensors."""
        return main_dtype(self.source.checkpoint)

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """Every linear of every block, by name."""
        return {spec.name: spec for block in self.skeleton.blocks for spec in block.linears}

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.format]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(n, k) of every linear of the blocks, and of head and embeddings if they are quantized."""
        inside = {name: (spec.n, spec.k) for name, spec in self.linears.items()}
        return inside | {weight.name: (weight.n, weight.k) for weight in self.plan.vocabulary}

    def output_bytes(self) -> int:
        """Bytes of the weights that the run will write; an estimate in a format of one scheme."""
        linears = self.linears
        quantized = self.plan.schemes.items()
        inside = sum(self.bytes_of(name, linears[name].n, linears[name].k, scheme) for name, scheme in quantized)
        return inside + self._kept_bytes(self.plan.schemes) + self._vocabulary_bytes()

    def bytes_outside(self) -> int:
        """The same without the linears that have a scheme, or are in 16 bits by the recipe's `schemes`."""
        return self._kept_bytes(self.plan.schemes.keys() | self.plan.unrounded) + self._vocabulary_bytes()

    def bytes_of(self, name: str, n: int, k: int, scheme: Scheme | None) -> int:
        """Bytes of the linear `name` (n, k) in a scheme, or in 16 bits."""
        fmt = self.format
        if scheme is None:
            known = f"{name}.weight" in self.skeleton.tensors.checkpoint.entries
            return n * k * (self.kept_dtype(f"{name}.weight") if known else self.dtype).itemsize
        if fmt.uniform:
            return int(n * k * scheme.bits_per_weight(k, 8 * self.scale_dtype.itemsize) / 8)
        return bytes_written(fmt, scheme, n, k, self.scale_dtype)

    def _vocabulary_bytes(self) -> int:
        rounded = sum(self.bytes_of(each.name, each.n, each.k, each.scheme) for each in self.plan.vocabulary)
        untied = self.untied_head()
        return rounded + (0 if untied is None else self._numel(untied) * self.kept_dtype(untied).itemsize)

    def untied_head(self) -> str | None:
        """The tensor of the embeddings, if the head is tied to it and needs a copy: they alone are quantized."""
        embeddings = self.plan.embeddings
        return embeddings.tensor if embeddings and embeddings.tied and self.plan.head is None else None

    def _kept_bytes(self, without: Collection[str]) -> int:
        """Bytes of all tensors that are written as they are if the linears `without` are not."""
        blocks = self.skeleton.blocks
        inside = (name for block in blocks for name in block.tensors if stays(block, name, without))
        return sum(self._numel(name) * self.kept_dtype(name).itemsize for name in (*inside, *self.names_outside()))

    def _numel(self, name: str) -> int:
        tensors = self.skeleton.tensors
        inside = tensors.linears_of(name)
        return sum(math.prod(tensors.shape(each)) for each in inside) or self.source.checkpoint.entries[name].numel

    def names_outside(self) -> Iterator[str]:
        """Names of the tensors outside the blocks that are written as they are: no copies of tied embeddings, and
        neither head nor embeddings that are quantized."""
        in_blocks = {name for block in self.skeleton.blocks for name in block.tensors}
        replaced = {f"{weight.name}.weight" for weight in self.plan.vocabulary}
        for name in self.skeleton.tensors.names:
            if name not in in_blocks and not self._is_tied_copy(name) and name not in replaced:
                yield name

    def _is_tied_copy(self, name: str) -> bool:
        """True if the file's tensor `name` is a copy of a tied tensor."""
        places = self.skeleton.others
        origin = tied_weights(self.skeleton.model).get(places[name].parameter) if name in places else None
        return any(place.parameter == origin for place in places.values())

    def warnings(self) -> list[str]:
        """Limits of other programs with the result, as sentences."""
        return list(self.caveats())

    def verdicts(self) -> Verdicts:
        """The way in which each engine runs the linears of the result on each machine, one of VERDICTS."""
        layers = fused_linears(self.format, self.plan.schemes, self.shapes)
        return verdicts_of(layers.values(), {name for names in self.caveats().values() for name in names})

    def caveats(self) -> dict[str, tuple[str, ...]]:
        """The same, with the names of the engines (export/engines) that therefore cannot load the result."""
        return self._caveats

    @cached_property
    def _caveats(self) -> dict[str, tuple[str, ...]]:
        """Cached: dry runs of the model's code take a second."""
        return caveats_of(Intent(self.skeleton, self.recipe, self.plan, self.source.positions))


def scale_dtype_of(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales: fixed by the format, or `dtype`."""
    return FORMATS[recipe.format].scale_dtype or dtype


def stays(block: Block, name: str, quantized: Collection[str]) -> bool:
    """True if the block's tensor `name` is written as it is."""
    if name.removesuffix(".weight") in quantized:
        return False
    return not covered(block, block.tensors[name].parameter, quantized)


def covered(block: Block, parameter: str, quantized: Collection[str]) -> bool:
    """True if all of a fused parameter is contained in its quantized experts."""
    inside = [spec.name for spec in block.linears if spec.placement.parameter == parameter]
    return bool(inside) and all(name in quantized for name in inside)


def prepare(source: Source, recipe: Recipe, device: str) -> Job:
    """The checked job for `source` and `recipe`; no weight is read.

    CheckpointError or RecipeError if the model is already quantized, damaged, or cannot be covered.
    """
    _require_original(source)
    _require_generation_config(source)
    fmt, scheme = FORMATS[recipe.format], recipe.default_scheme
    with source.checkpoint.companions() as companions:
        require_model(fmt, source.checkpoint.config, companions)
    reason = fmt.reason_against(scheme) or fmt.risk_of(scheme)
    if reason:
        raise CheckpointError(f"format {fmt.name} cannot hold {scheme}: {reason}")
    skeleton = open_skeleton(source, original=True)
    plan = make_plan(skeleton, recipe)
    plan.require_coverage()
    job = Job(source, skeleton, recipe, plan, _dtype(source, recipe), device)
    if plan.vocabulary and not fmt.holds_head:
        what = "head" if plan.head else "embeddings"
        raise CheckpointError(f"format {fmt.name} holds no quantized {what}; --format compressed-tensors does")
    if recipe.kv_cache is not None and recipe.kv_cache not in fmt.caches:
        known = " or ".join(fmt.caches) or "none; --format compressed-tensors does"
        raise CheckpointError(f"format {fmt.name} holds no scales for --kv-cache {recipe.kv_cache}: it takes {known}")
    require_fit(fmt, plan.written, job.shapes)
    _require_room(job)
    return job


def _require_room(job: Job) -> None:
    """CheckpointError if codes are to be tuned, or on further windows, and the device has no memory for it."""
    recipe, free = job.recipe, free_bytes(job.device)
    if not recipe.distill_steps:
        return
    weights = sum(spec.n * spec.k for name, spec in job.linears.items() if name in job.plan.schemes)
    codes = BYTES_PER_TUNED_CODE * weights if recipe.distill_codes else 0
    width = job.skeleton.model.get_input_embeddings().weight.shape[1]
    windows = STATES * recipe.distill_samples * recipe.seqlen * width * job.dtype.itemsize
    if codes + windows > free:
        raise CheckpointError(
            f"tuning takes {codes / 1e9:.1f} GB for codes and {windows / 1e9:.1f} GB for its further windows beside "
            f"the model, and {free / 1e9:.1f} GB of {job.device} are free; --no-distill-codes tunes scales and norms, "
            "--distill-samples 0 reads the calibration's windows alone"
        )


def _require_generation_config(source: Source) -> None:
    """CheckpointError if generation_config.json, which is copied, is not a JSON object within limits."""
    with source.checkpoint.companions() as companions:
        path = companions / "generation_config.json"
        if path.exists():
            read_json(path)


def _require_original(source: Source) -> None:
    """CheckpointError if the weights are quantized in a way that is not read here."""
    config = source.checkpoint.quantization
    if config is None:
        return
    method = config.get("quant_method", "by a method that config.json does not name")
    if any(fmt.recognizes(config) for fmt in readable()) and LogicalTensors(source.checkpoint).schemes:
        return
    raise CheckpointError(
        f"{source.directory}: already quantized ({method}), which is not read here; quantize the original model instead"
    )


def _dtype(source: Source, recipe: Recipe) -> torch.dtype:
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    return main_dtype(source.checkpoint)


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The most frequent dtype of a model's weights; bfloat16 if none of them is a dtype to compute in."""
    counts: dict[torch.dtype, int] = {}
    entries = checkpoint.entries
    for entry in (entries[name] for name in LogicalTensors(checkpoint).names if name in entries):
        if entry.dtype in DTYPES.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.bfloat16)
