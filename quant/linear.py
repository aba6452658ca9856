"""A linear layer with a quantized weight."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.packed import PackedWeight, prepack
from lowbit.quant.qtensor import QTensor


class QLinear(nn.Module):
    """y = x W^T + bias with a packed weight: nn.Linear's place in a model that was loaded for the kernels.

    x (..., k) float16 or bfloat16, the dtype the weight was packed for; returns (..., n). The weight's tensors are
    buffers, so that they move with the module; they hold no gradient.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = weight
        tensors = {"words": weight.words, "scales": weight.scales, "zeros": weight.zeros, "bias": bias}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_qtensor(cls, weight: QTensor, bias: Tensor | None, dtype: torch.dtype) -> "QLinear":
        """The layer for activations in `dtype`; ValueError where the kernels cannot pack the weight."""
        return cls(prepack(weight, dtype), None if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = replace(self.packed, words=self.words, scales=self.scales, zeros=self.zeros)
        rows = x.reshape(-1, weight.k).contiguous()
        return ops.linear(rows, weight, self.bias).view(*x.shape[:-1], weight.n)
