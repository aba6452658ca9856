"""What quantizing a block came to, and the block as it will be stored."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.report import BlockReport
from lowbit.models.products import rounded_inputs, weight_view
from lowbit.models.states import States
from lowbit.models.walk import Walk
from lowbit.quant.numerics import input_rounding
from lowbit.quant.qtensor import QTensor


@dataclass(frozen=True)
class BlockOutcome:
    """A quantized block, on the CPU.

    weights  its quantized linears
    kept     its other tensors, as transforms left them, in the job's dtype
    """

    weights: dict[str, QTensor]
    kept: dict[str, Tensor]
    report: BlockReport


def hold(walk: Walk, index: int, weights: Mapping[str, QTensor], kept: Mapping[str, Tensor]) -> None:
    """Let block `index`, which must be loaded, compute with these weights and other tensors, by their file's names."""
    model, block = walk.skeleton.model, walk.skeleton.blocks[index]
    specs = {spec.name: spec for spec in block.linears}
    for name, value in kept.items():
        place = block.tensors[name]
        place.view(model.get_parameter(place.parameter).data).copy_(value)
    for name, weight in weights.items():
        parameter = model.get_parameter(specs[name].placement.parameter).data
        weight_view(parameter, specs[name]).copy_(weight.to(parameter.device).dequantize())


def quantized_inputs(walk: Walk, index: int, weights: Mapping[str, QTensor]) -> AbstractContextManager[None]:
    """A context in which block `index` rounds the inputs of those `weights` whose schemes say so."""
    rounds = {
        name: input_rounding(weight.scheme.inputs, weight.input_scale)
        for name, weight in weights.items()
        if weight.scheme.inputs is not None
    }
    return rounded_inputs(walk.skeleton.blocks[index], walk.skeleton.model, rounds)


def run_shared(walk: Walk, index: int, batches: list[States]) -> list[States]:
    """What block `index`, which must be loaded, makes of `batches`, which the run's processes share out."""
    found = ranks.each_several(batches, lambda states: walk.run(index, states).packed())
    return [states.unpacked(parts) for states, parts in zip(batches, found, strict=True)]


def run_stored(walk: Walk, index: int, outcome: BlockOutcome, batches: list[States]) -> list[States]:
    """What block `index`, which must be loaded, makes of `batches` once it holds `outcome`.

    The block holds it from then on, rounded as on disk: a run that goes on from the files sees the same numbers.
    """
    hold(walk, index, outcome.weights, outcome.kept)
    with quantized_inputs(walk, index, outcome.weights):
        return run_shared(walk, index, batches)
