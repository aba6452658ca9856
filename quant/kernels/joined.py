"""Weights that share an input, joined to one: stacked, their rows reordered, and a process's share of their inputs.

The decode engine joins what it multiplies together, and the plugin in vLLM what vLLM does.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.quant.kernels.packed import reason_against_kernel
from lowbit.quant.kernels.row_norm import GROUP
from lowbit.quant.kernels.row_scaled import RowScaled, row_scaled, stacked_rows
from lowbit.quant.kernels.weight import RoundedInputs, inputs_of, is_in_blocks, takes_codes
from lowbit.quant.qtensor import QTensor


def len_of(matrix: QTensor | Tensor) -> int:
    """Rows of a weight."""
    return matrix.shape[0]


def stacked(matrices: list[QTensor | Tensor], dtype: torch.dtype) -> QTensor | RowScaled | Tensor:
    """The matrices stacked; dense if their schemes differ, or if a kernel lacks one."""
    if len(matrices) == 1:
        return matrices[0]
    quantized = [matrix for matrix in matrices if isinstance(matrix, QTensor) and not reason_against_kernel(matrix)]
    if len(quantized) < len(matrices) or len({str(matrix.scheme) for matrix in quantized}) > 1:
        return torch.cat([matrix.dequantize(dtype) if isinstance(matrix, QTensor) else matrix for matrix in matrices])
    apart = is_in_blocks(quantized[0]) and any(len_of(matrix) % GROUP for matrix in quantized[:-1])
    if apart or not takes_codes(quantized[0]):
        return stacked_rows([row_scaled(matrix) for matrix in quantized])
    codes, scales = (torch.cat(list(parts)) for parts in zip(*((m.codes, m.scales) for m in quantized), strict=True))
    inputs = shared_inputs(matrices)
    return QTensor(codes, scales, None, quantized[0].scheme, None if inputs is None else inputs.scale)


def shared_inputs(matrices: list[QTensor | Tensor]) -> RoundedInputs | None:
    """The rounding of the input that the matrices share: by the largest of their scales, as in vLLM.

    CheckpointError if they round it differently, since the fused product has one input.
    """
    found = [inputs_of(matrix) for matrix in matrices]
    if len({None if inputs is None else inputs.side for inputs in found}) > 1:
        raise CheckpointError(
            "linears with one input (q, k and v; gate and up) round it differently here, but the engine multiplies "
            "them together; quantize the model again with one scheme for them"
        )
    scales = [inputs.scale for inputs in found if inputs is not None and inputs.scale is not None]
    if found[0] is None or not scales:
        return found[0]
    every = torch.stack(scales)
    return RoundedInputs(found[0].side, every.min() if found[0].side.parent else every.max())


def moved(weight: QTensor | RowScaled | Tensor, rows: Tensor, dtype: torch.dtype) -> QTensor | RowScaled | Tensor:
    """`weight` with row i taken from row `rows[i]`; dense if it has no kernel."""
    if isinstance(weight, Tensor):
        return weight[rows]
    if isinstance(weight, RowScaled):
        return weight.taking(rows)
    if reason_against_kernel(weight):
        return weight.dequantize(dtype)[rows]
    sides = blocks_of(rows) if is_in_blocks(weight) else rows
    if sides is None or not takes_codes(weight):
        return row_scaled(weight).taking(rows)
    return replace(weight, codes=weight.codes[rows], scales=weight.scales[sides])


def blocks_of(rows: Tensor) -> Tensor | None:
    """The block of each GROUP of `rows`; None if one has rows of several blocks."""
    blocks = rows // GROUP
    firsts = blocks[::GROUP]
    return firsts if torch.equal(blocks, firsts.repeat_interleave(GROUP)[: len(rows)]) else None


def columns_of(weight: QTensor | Tensor, first: int, count: int) -> QTensor | Tensor:
    """`weight` with the inputs from `first` on, `count` of them; dense if its inputs are in another order.

    ValueError if that cuts a group of inputs with one scale.
    """
    if isinstance(weight, Tensor):
        return weight[:, first : first + count]
    if (first, count) == (0, weight.shape[1]):
        return weight
    if weight.order is not None:
        return weight.dequantize(weight.scales.dtype)[:, first : first + count]
    size = weight.scheme.group_size
    if size == -1:
        return replace(weight, codes=weight.codes[:, first : first + count])
    if first % size or count % size:
        raise ValueError(f"its {weight.shape[1]} inputs in groups of {size} do not split into parts of {count}")
    groups = slice(first // size, (first + count) // size)
    zeros = None if weight.zeros is None else weight.zeros[:, groups]
    return replace(weight, codes=weight.codes[:, first : first + count], scales=weight.scales[:, groups], zeros=zeros)
