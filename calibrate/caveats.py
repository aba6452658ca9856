"""Limits of other programs with the result of a run: one function a limit, listed in LIMITS."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from lowbit.calibrate.plan import Plan
from lowbit.export.dialects import FORMATS
from lowbit.export.engines.table import engines_for
from lowbit.export.engines.transformers import TRANSFORMERS
from lowbit.export.engines.vllm import VLLM
from lowbit.export.format import Format
from lowbit.export.formats import describe_schemes
from lowbit.models.placement import JOINED, Placement, stacked_only
from lowbit.models.rehearsal import reader_of_weights
from lowbit.models.skeleton import LinearSpec, Skeleton
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme


@dataclass(frozen=True)
class Intent:
    """The checkpoint that a run will write.

    positions  the most that the model supports; None if unknown
    """

    skeleton: Skeleton
    recipe: Recipe
    plan: Plan
    positions: int | None

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.format]

    @cached_property
    def quantized(self) -> list[tuple[LinearSpec, Scheme]]:
        """The linears that get a scheme."""
        schemes = self.plan.schemes
        blocks = self.skeleton.blocks
        return [(spec, schemes[spec.name]) for block in blocks for spec in block.linears if spec.name in schemes]

    @cached_property
    def experts(self) -> dict[str, Placement]:
        """The places of quantized experts in the model, by name."""
        return {spec.name: spec.placement for spec, _ in self.quantized if spec.placement.expert is not None}


# A sentence, and the names of the engines (export/engines) that therefore cannot load the result.
Limit = tuple[str, tuple[str, ...]]


def _untied(this: Intent) -> Limit | None:
    if not this.plan.unties:
        return None
    return (
        "head and embeddings are one tensor in the model and two in the checkpoint, since no engine ties quantized "
        "ones: config.json says so"
    ), ()


def _embeddings_in_transformers(this: Intent) -> Limit | None:
    if this.plan.embeddings is None:
        return None
    return ("transformers 5.23 does not load quantized embeddings: it stops, or runs random ones (dequantize=True)"), (
        TRANSFORMERS.name,
    )


def _embeddings_in_vllm(this: Intent) -> Limit | None:
    if this.plan.embeddings is None or not VLLM.opens(this.format):
        return None
    return (
        "vLLM 0.32 loads quantized embeddings only of the model classes that name them to it (Qwen2 and 3, Gemma, "
        "DeepSeek, gpt-oss, ...; not Llama): others stop while loading"
    ), ()


def _quantized_source(this: Intent) -> Limit | None:
    held = this.skeleton.tensors.schemes
    if not held:
        return None
    said = f"the model is quantized itself, as {describe_schemes(held)}"
    return f"{said}: its dequantized weights are the original here", ()


def _long_windows(this: Intent) -> Limit | None:
    seqlen, positions = this.recipe.seqlen, this.positions
    if positions is None or seqlen <= positions:
        return None
    return (
        f"calibration windows of {seqlen} tokens are longer than the {positions} positions that the model supports; "
        "statistics beyond them do not match real use"
    ), ()


def _transposed(this: Intent) -> Limit | None:
    """vLLM turns what is called a weight, and nothing else."""
    schemes = [scheme for spec, scheme in this.quantized if spec.transposed and spec.placement.expert is None]
    if not schemes:
        return None
    known = "this family stores its weights transposed (Conv1D), which compressed-tensors readers do not know"
    if any(scheme.inputs is not None or not scheme.number.is_integer for scheme in schemes):
        neither = "lowbit reads the checkpoint, transformers and vLLM will not"
        return f"{known}: {neither}", (TRANSFORMERS.name, VLLM.name)
    return f"{known}: lowbit and vLLM read the checkpoint, transformers will not", (TRANSFORMERS.name,)


def _reads_weights(this: Intent) -> Limit | None:
    reader = reader_of_weights(this.skeleton, this.plan.schemes)
    if reader is None:
        return None
    return (
        f"transformers needs CompressedTensorsConfig(dequantize=True) to load it: {reader} reads weights of its "
        "linears itself"
    ), (TRANSFORMERS.name,)


def _static_inputs(this: Intent) -> Limit | None:
    scheme = this.recipe.default_scheme
    if not (scheme.static_inputs and scheme.number.is_integer):
        return None
    return (
        "static int8 activations lose much quality on such models (2 to 3 times the perplexity, measured on Llama 2): "
        "--activations token is almost as fast"
    ), ()


def _fused_experts(this: Intent) -> Limit | None:
    if not any(spec.placement.expert is not None and scheme.inputs is not None for spec, scheme in this.quantized):
        return None
    return ("transformers keeps experts fused and does not load those whose inputs are quantized; vLLM does"), (
        TRANSFORMERS.name,
    )


def _stacked_experts(this: Intent) -> Limit | None:
    if not stacked_only(this.skeleton.model, this.experts):
        return None
    return (
        "transformers has no names for this family's experts one by one and would run random ones: lowbit reads the "
        "checkpoint, and vLLM does where it knows the family"
    ), (TRANSFORMERS.name,)


def _joined_experts(this: Intent) -> Limit | None:
    if not any(name.endswith(f".{JOINED}") for name in this.experts):
        return None
    return (
        "vLLM 0.32 skips packed experts whose gate and up share a matrix (gpt-oss) and would run random ones: lowbit "
        "reads the checkpoint; --ignore 're:\\.experts\\.' leaves them in 16 bits, which vLLM loads"
    ), (VLLM.name,)


def _converted_weights(this: Intent) -> Limit | None:
    conversions = (place.conversion for place in this.skeleton.placed().values())
    if this.format.package != "compressed-tensors" or not any(
        each is not None and each.of_weights for each in conversions
    ):
        return None
    return (
        "transformers joins or splits weights of this family as it loads them, and cannot where any is packed: lowbit "
        "reads the checkpoint, and vLLM does where it knows the family"
    ), (TRANSFORMERS.name,)


def _of_the_format(this: Intent) -> Limit | None:
    caveat = this.format.caveat(this.recipe.default_scheme)
    return (caveat, ()) if caveat else None


def _of_the_model(this: Intent) -> Limit | None:
    caveat = this.format.caveat_of_model(this.skeleton.tensors.checkpoint.config)
    return (caveat, ()) if caveat else None


LIMITS: tuple[Callable[[Intent], Limit | None], ...] = (
    _untied,
    _embeddings_in_transformers,
    _embeddings_in_vllm,
    _quantized_source,
    _long_windows,
    _transposed,
    _reads_weights,
    _static_inputs,
    _fused_experts,
    _stacked_experts,
    _joined_experts,
    _converted_weights,
    _of_the_format,
    _of_the_model,
)


def caveats_of(intent: Intent) -> dict[str, tuple[str, ...]]:
    """The limits that hold, as sentences, each with the names of the engines that therefore cannot load the result.

    Engines that do not open files of the format have no limits with it.
    """
    opening = {engine.name for engine in engines_for(intent.format)}
    found = filter(None, (limit(intent) for limit in LIMITS))
    return {text: engines for text, engines in found if not engines or opening.intersection(engines)}
