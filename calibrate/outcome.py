"""The outcome of quantizing a block, and the block as it will be stored."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

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

    weights     quantized linears
    kept        all other tensors, after transforms, in the dtype they are written in
    cache       scales of a key-value cache, if the recipe asks for one (calibrate.cache)
    remainders  (n, k) int8  what rounding took from each weight (QTensor.remainder); empty if codes are not tuned
    """

    weights: dict[str, QTensor]
    kept: dict[str, Tensor]
    report: BlockReport
    cache: dict[str, Tensor] = field(default_factory=dict)
    remainders: dict[str, Tensor] = field(default_factory=dict)


def hold(walk: Walk, index: int, weights: Mapping[str, QTensor], kept: Mapping[str, Tensor]) -> None:
    """Load these weights and other tensors, by their file names, into block `index`, which must be loaded."""
    model, block = walk.skeleton.model, walk.skeleton.blocks[index]
    specs = {spec.name: spec for spec in block.linears}
    for name, value in kept.items():
        place = block.tensors[name]
        place.view(model.get_parameter(place.parameter).data).copy_(value)
    for name, weight in weights.items():
        parameter = model.get_parameter(specs[name].placement.parameter).data
        weight_view(parameter, specs[name]).copy_(weight.to(parameter.device).dequantize())


def quantized_inputs(walk: Walk, index: int, weights: Mapping[str, QTensor]) -> AbstractContextManager[None]:
    """A context in which block `index` rounds the inputs of `weights` with quantized inputs."""
    rounds = {
        name: input_rounding(weight.scheme.inputs, weight.input_scale)
        for name, weight in weights.items()
        if weight.scheme.inputs is not None
    }
    return rounded_inputs(walk.skeleton.blocks[index], walk.skeleton.model, rounds)


def run_shared(walk: Walk, index: int, batches: list[States]) -> list[States]:
    """Outputs of block `index`, which must be loaded, for `batches`; the batches are split over the ranks."""
    found = ranks.each_several(batches, lambda states: walk.run(index, states).packed())
    return [states.unpacked(parts) for states, parts in zip(batches, found, strict=True)]


def run_stored(walk: Walk, index: int, outcome: BlockOutcome, batches: list[States]) -> list[States]:
    """Outputs of block `index`, which must be loaded, for `batches`, after loading `outcome` into it.

    The block keeps `outcome`, rounded as on disk, so that a resumed run sees the same numbers.
    """
    hold(walk, index, outcome.weights, outcome.kept)
    with quantized_inputs(walk, index, outcome.weights):
        return run_shared(walk, index, batches)
