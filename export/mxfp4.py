"""The layout `mxfp4` of gpt-oss, which is read and not written: experts in MXFP4, all those of a layer in two tensors.

For a stack of e experts S (`...experts.gate_up_proj`, rows of gate and up by turns), weights (n, k) each:

    S_blocks  uint8  (e, n, k / 32, 16)  fp4: element 2 j of a group in the low half of byte j
    S_scales  uint8  (e, n, k / 32)      e8m0
    S_bias    float  (e, n)              not quantized

The same stack in 16 bits, S, is (e, k, n): inputs before outputs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.format import Format, ShapeReader, TensorReader, reading
from lowbit.export.microscaling import weight_of
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, parse_scheme

NAME = "mxfp4"
EXPERTS = parse_scheme("mxfp4-a16")
BLOCKS, SCALES = "_blocks", "_scales"


class Mxfp4(Format):
    """The format `mxfp4`."""

    name = NAME
    method = NAME
    package = "kernels"
    suffixes = ()
    marker = BLOCKS
    loading = "The files follow the layout of gpt-oss."
    uniform = True

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why the layout cannot hold a scheme."""
        return "the layout mxfp4 of gpt-oss is read and not written"

    def linears(self, names: Iterable[str], shapes: ShapeReader | None = None) -> list[str]:
        """The quantized linears: every expert of every stack, as `...experts.3.gate_up_proj`."""
        stacks = [name.removesuffix(BLOCKS).rpartition(".") for name in names if name.endswith(BLOCKS)]
        assert shapes is not None
        return [
            f"{home}.{expert}.{leaf}"
            for home, _, leaf in stacks
            for expert in range(_experts(f"{home}.{leaf}", shapes))
        ]

    def parts(self, linear: str) -> list[str]:
        """The file's tensors of the linear's stack."""
        stack = self.stack_of(linear)
        return [f"{stack}{BLOCKS}", f"{stack}{SCALES}"]

    def stack_of(self, linear: str) -> str | None:
        """The name of the stack that holds an expert's weight."""
        return _place(linear)[0]

    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """Not supported."""
        raise NotImplementedError("reason_against says no")

    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of one expert. CheckpointError if the stack's tensors contradict each other."""
        stack, expert = _place(name)
        with reading(name):
            blocks, scales = tensor(f"{stack}{BLOCKS}"), tensor(f"{stack}{SCALES}")
            if blocks.ndim != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
                raise ValueError(
                    f"its blocks have the shape {list(blocks.shape)} and its scales {list(scales.shape)}; experts, "
                    "outputs and groups must agree, and 16 bytes be a block"
                )
            return weight_of(blocks[expert].flatten(1), scales[expert], scheme)

    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of one expert."""
        _, n, groups, _ = shapes(f"{_place(name)[0]}{BLOCKS}")
        return n, groups * scheme.group_size

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """Not supported."""
        raise NotImplementedError("reason_against says no")

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each linear."""
        return dict.fromkeys(names, EXPERTS)


def _experts(stack: str, shapes: ShapeReader) -> int:
    """The number of experts in a stack. CheckpointError if its blocks are none."""
    sizes = shapes(f"{stack}{BLOCKS}")
    if len(sizes) != 4 or 0 in sizes:
        raise CheckpointError(f"{stack}{BLOCKS}: its shape is {list(sizes)}, not experts, outputs, groups and 16 bytes")
    return sizes[0]


def _place(linear: str) -> tuple[str, int]:
    """The stack of an expert's linear, and the expert's number."""
    rest, _, leaf = linear.rpartition(".")
    home, _, expert = rest.rpartition(".")
    return f"{home}.{leaf}", int(expert)


GPT_OSS = Mxfp4()
