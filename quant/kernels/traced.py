"""A linear as one torch operator, for programs that compile their models.

torch.compile sees a call with tensors and a text. It decomposes the operator by running its Python: the rounding of
inputs is fused with what surrounds it, and its tracer meets none of our dataclasses. That of torch 2.11 fails at a
default that is one.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lowbit.quant.kernels import ops
from lowbit.quant.kernels.weight import Hints, Linear, RoundedInputs
from lowbit.quant.scheme import Side

TENSORS = ("words", "scales", "zeros", "factors", "codes", "matrix")  # of a weight of any kind


@dataclass(frozen=True)
class Form:
    """A linear without its tensors.

    kind    of its weight
    held    the names of the weight's tensors
    sizes   its other fields
    side    the grid that inputs are rounded to, or None
    hints   of its launches
    """

    kind: type[Any]
    held: tuple[str, ...]
    sizes: tuple[tuple[str, Any], ...]
    side: Side | None
    hints: Hints

    def linear(
        self, tensors: list[Tensor | None], bias: Tensor | None, input_scale: Tensor | None, following: Tensor | None
    ) -> Linear:
        """The linear with the weight's tensors, in the order of `held`, and the tensor to prefetch."""
        weight = self.kind(**dict(zip(self.held, tensors, strict=True)), **dict(self.sizes))
        inputs = None if self.side is None else RoundedInputs(self.side, input_scale)
        return Linear(weight, bias, inputs, replace(self.hints, next_weight=following))


FORMS: dict[str, Form] = {}  # by their text, which says all of a form: a compiled graph that outlives a process has it


def form_of(linear: Linear) -> tuple[str, dict[str, Tensor | None]]:
    """The text of a linear's form, and the tensors of its weight by name."""
    values = vars(linear.weight)
    tensors = {name: value for name, value in values.items() if name in TENSORS}
    sizes = tuple((name, value) for name, value in values.items() if name not in TENSORS)
    side = None if linear.inputs is None else linear.inputs.side
    form = Form(type(linear.weight), tuple(tensors), sizes, side, linear.hints)
    FORMS[repr(form)] = form
    return repr(form), tensors


def _multiply(
    x: Tensor,
    tensors: list[Tensor | None],
    bias: Tensor | None,
    input_scale: Tensor | None,
    following: Tensor | None,
    form: str,
) -> Tensor:
    return FORMS[form].linear(tensors, bias, input_scale, following)(x)


# x W^T + bias (..., n) of x (..., k), for the tensors and the form of form_of; `following`: the tensor with most bytes
# of the next product's weight, to be prefetched.
multiply = ops.composite(
    "traced_linear",
    "(Tensor x, Tensor?[] tensors, Tensor? bias, Tensor? input_scale, Tensor? following, str form) -> Tensor",
    _multiply,
)
