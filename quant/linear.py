"""A linear layer with a quantized weight."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.quant.kernels.weight import ALONE, Linear, inputs_of, pack, with_tensors
from lowbit.quant.qtensor import QTensor


class QLinear(nn.Module):
    """A linear module with a packed weight, in the place of nn.Linear: y = x W^T + bias.

    x is (..., k) in float16 or bfloat16, the dtype that the weight was packed for; y is (..., n). The tensors are
    buffers without gradients, so that they move with the module.
    """

    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear
        held = {name: value for name, value in vars(linear.weight).items() if value is None or torch.is_tensor(value)}
        self.held = tuple(held)
        scale = None if linear.inputs is None else linear.inputs.scale
        for name, tensor in (held | {"bias": linear.bias, "input_scale": scale}).items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_qtensor(cls, weight: QTensor, bias: Tensor | None, dtype: torch.dtype) -> "QLinear":
        """The layer for activations in `dtype`. ValueError if the kernels cannot pack the weight."""
        return cls(Linear(pack(weight, dtype), None if bias is None else bias.to(dtype), inputs_of(weight)))

    def forward(self, x: Tensor) -> Tensor:
        weight = with_tensors(self.linear.weight, {name: getattr(self, name) for name in self.held})
        inputs = self.linear.inputs
        if inputs is not None:
            inputs = replace(inputs, scale=self.input_scale)
        # torch.compile cannot trace a dataclass's default
        return Linear(weight, self.bias, inputs, ALONE)(x)
