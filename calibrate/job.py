"""A model and a recipe that fit each other: everything decided, and refused, before a weight is read."""

from dataclasses import dataclass
from functools import cached_property

import torch

from lowbit.calibrate.plan import Plan, make_plan
from lowbit.errors import CheckpointError
from lowbit.export.formats import FORMATS, require_fit
from lowbit.models.placement import stacked_only
from lowbit.models.rehearsal import reader_of_weights
from lowbit.models.skeleton import LinearSpec, Skeleton, open_skeleton
from lowbit.models.source import Source
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What is to be done to a model.

    dtype   of most weights that stay unquantized, and of scales where the format leaves them a choice
    device  where blocks run
    """

    source: Source
    skeleton: Skeleton
    recipe: Recipe
    plan: Plan
    dtype: torch.dtype
    device: str

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales: the format's own, or that of the unquantized weights."""
        return FORMATS[self.recipe.format].scale_dtype or self.dtype

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the file's tensor `name` is written where it stays unquantized.

        Its own, unless the recipe asks for another one than most weights have: then those that are no wider take it.
        """
        own = self.source.checkpoint.entries[name].dtype
        wider = own.itemsize > self._main_dtype.itemsize
        return own if self.recipe.dtype == "auto" or wider or not own.is_floating_point else self.dtype

    @cached_property
    def _main_dtype(self) -> torch.dtype:
        """Counted once: a model of many experts has 100,000 tensors, each of which asks."""
        return main_dtype(self.source)

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """Every linear of every block, by name."""
        return {spec.name: spec for block in self.skeleton.blocks for spec in block.linears}

    def output_bytes(self) -> int:
        """Bytes of the weights that the run will write."""
        linears = self.linears
        bits = sum(spec.n * spec.k * scheme.bits_per_weight(spec.k) for spec, scheme in self._quantized(linears))
        parameters = sum(entry.numel for entry in self.source.checkpoint.entries.values())
        kept = parameters - sum(spec.n * spec.k for spec, _ in self._quantized(linears))
        return int(bits / 8 + kept * self.dtype.itemsize)

    def _quantized(self, linears: dict[str, LinearSpec]) -> list[tuple[LinearSpec, Scheme]]:
        return [(linears[name], scheme) for name, scheme in self.plan.schemes.items()]

    def warnings(self) -> list[str]:
        """What the user should know before loading the result elsewhere."""
        quantized = [
            (spec, self.plan.schemes[name]) for name, spec in self.linears.items() if name in self.plan.schemes
        ]
        reader, default = reader_of_weights(self.skeleton, self.plan.schemes), self.recipe.default_scheme
        seqlen, positions = self.recipe.seqlen, self.source.positions
        found = {
            f"calibration windows of {seqlen} tokens are longer than the {positions} positions that the model was made "
            "for: what it computes beyond them is not what it does in use": seqlen > (positions or seqlen),
            "this family stores its weights transposed (Conv1D), which compressed-tensors readers do not know: "
            "lowbit reads the checkpoint, transformers and vLLM will not": any(
                spec.transposed and spec.placement.expert is None for spec, _ in quantized
            ),
            f"transformers needs CompressedTensorsConfig(dequantize=True) to load it: {reader} reads weights "
            "of its linears itself": reader is not None,
            "static int8 activations lose much on models of this kind (2 to 3 times the perplexity has been seen on "
            "Llama 2): --activations token costs the engines next to nothing": default.static_inputs
            and default.number.is_integer,
            "transformers keeps experts fused and does not load those whose inputs are quantized; vLLM does": any(
                spec.placement.expert is not None and scheme.inputs is not None for spec, scheme in quantized
            ),
            "transformers has no names for this family's experts one by one and would run random ones: lowbit reads "
            "the checkpoint, and vLLM does where it knows the family": stacked_only(
                self.skeleton.model,
                {spec.name: spec.placement for spec, _ in quantized if spec.placement.expert is not None},
            ),
        }
        caveat = FORMATS[self.recipe.format].caveat(default)
        return [text for text, holds in found.items() if holds] + ([caveat] if caveat else [])


def prepare(source: Source, recipe: Recipe, device: str) -> Job:
    """Everything that can be decided, and refused, before a weight is read.

    Raises CheckpointError or RecipeError where the model is quantized already, damaged, or cannot be covered.
    """
    if source.checkpoint.quantization is not None:
        method = source.checkpoint.quantization.get("quant_method")
        raise CheckpointError(f"{source.directory}: already quantized ({method}); quantize the original model instead")
    fmt, scheme = FORMATS[recipe.format], recipe.default_scheme
    reason = fmt.reason_against(scheme) or fmt.risk_of(scheme)
    if reason:
        raise CheckpointError(f"format {fmt.name} cannot hold {scheme}: {reason}")
    skeleton = open_skeleton(source)
    plan = make_plan(skeleton, recipe)
    plan.require_coverage()
    job = Job(source, skeleton, recipe, plan, _dtype(source, recipe), device)
    require_fit(fmt, plan.schemes, {name: (spec.n, spec.k) for name, spec in job.linears.items()})
    return job


def _dtype(source: Source, recipe: Recipe) -> torch.dtype:
    if recipe.dtype != "auto":
        return DTYPES[recipe.dtype]
    return main_dtype(source)


def main_dtype(source: Source) -> torch.dtype:
    """The dtype of most of a model's weights, bfloat16 where that is none that weights are computed in."""
    counts: dict[torch.dtype, int] = {}
    for entry in source.checkpoint.entries.values():
        if entry.dtype in DTYPES.values():
            counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.bfloat16)
