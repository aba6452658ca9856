"""What quantizing a block came to, and the block as it will be stored."""

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from calibrate.report import BlockReport
from models.products import QuantizedInputs, input_rounding, weight_view
from models.walk import Walk
from quant.qtensor import QTensor


@dataclass(frozen=True)
class BlockOutcome:
    """A quantized block, on the CPU.

    weights  its quantized linears
    kept     its other tensors, as transforms left them, in the job's dtype
    """

    weights: dict[str, QTensor]
    kept: dict[str, Tensor]
    report: BlockReport


def run_stored(walk: Walk, index: int, outcome: BlockOutcome, hidden: list[Tensor]) -> list[Tensor]:
    """What block `index`, which must be loaded, returns for batches of hidden states once it holds `outcome`.

    The block holds it from then on, rounded as on disk: a run that goes on from the files sees the same numbers.
    """
    model, block = walk.skeleton.model, walk.skeleton.blocks[index]
    specs = {spec.name: spec for spec in block.linears}

    def parameter(name: str) -> Tensor:
        return model.get_parameter(name).data

    for name, value in outcome.kept.items():
        place = block.tensors[name]
        place.view(parameter(place.parameter)).copy_(value)
    rounds = {}
    for name, weight in outcome.weights.items():
        there = weight.to(walk.device)
        weight_view(parameter(specs[name].placement.parameter), specs[name]).copy_(there.dequantize())
        if weight.scheme.activations is not None:
            rounds[name] = input_rounding(there.input_scale)
    with QuantizedInputs(block, parameter, rounds) if rounds else nullcontext():
        return [walk.run(index, states) for states in hidden]
