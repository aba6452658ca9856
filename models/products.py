"""Hooks on the inputs of every product with a weight, whatever module or function computes it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lowbit.models.skeleton import Block, LinearSpec

# Functions that modules finally call: Linear, Conv1D (addmm), slices of experts, weights multiplied with @.
MULTIPLICATIONS = {
    torch.nn.functional.linear,
    torch.addmm,
    torch.mm,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}
STACKED = {torch.bmm, torch.matmul, torch.Tensor.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__}

OnInput = Callable[[tuple[str, ...], Tensor], Tensor | None]


class LinearInputs(TorchFunctionMode):
    """Calls `on_input(names, x)` before each product of activations `x` (..., k) with a weight of the block.

    names  linears in the weight: one, or gate and up if a fused expert multiplies both at once

    A returned tensor replaces `x`. Weights are identified by their addresses, so they must not move while the mode is
    active.
    """

    def __init__(self, block: Block, parameter: Callable[[str], Tensor], on_input: OnInput) -> None:
        super().__init__()
        self._on_input = on_input
        self._names: dict[int, list[str]] = {}
        self._stacks: dict[int, list[int]] = {}  # addresses of all matrices of a stack, by the stack's own address
        for spec in block.linears:
            place = spec.placement
            whole = parameter(place.parameter)
            address = whole.data_ptr()
            if place.expert is not None:
                pitch = whole.stride(0) * whole.element_size()
                if address not in self._stacks:
                    self._stacks[address] = [address + i * pitch for i in range(len(whole))]
                address += place.expert * pitch
            self._names.setdefault(address, []).append(spec.name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in STACKED and len(args) == 2 and args[1].ndim == 3 and args[1].data_ptr() in self._stacks:
            args = (self._seen_by_each(args[0], self._stacks[args[1].data_ptr()]), args[1])
        elif func in MULTIPLICATIONS:
            args, kwargs = self._seen(func, args, kwargs)
        return func(*args, **kwargs)

    def _seen_by_each(self, x: Tensor, weights: list[int]) -> Tensor:
        """`x` (experts, tokens, k) with `on_input` applied to each expert's own tokens; all other rows are zero."""
        parts = list(x)
        for expert, (part, address) in enumerate(zip(x, weights, strict=True)):
            routed = part.any(-1)
            if address in self._names and bool(routed.any()):
                changed = self._on_input(tuple(self._names[address]), part[routed])
                if changed is not None:
                    parts[expert] = part.masked_scatter(routed[:, None], changed)
        return torch.stack(parts)

    def _seen(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments, with the activations replaced if `on_input` returns a tensor."""
        values: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        tensors = [key for key, value in values.items() if isinstance(value, Tensor)]
        left, right = tensors[-2:] if func is torch.addmm else tensors[:2]  # addmm(bias, x, weight)
        if names := self._names_of(values[right]):
            changed = self._on_input(names, values[left])
            values[left] = values[left] if changed is None else changed
        elif names := self._names_of(values[left]):
            # weight @ x: tokens are in the last dimension
            changed = self._on_input(names, values[right].mT)
            values[right] = values[right] if changed is None else changed.mT
        return tuple(values[i] for i in range(len(args))), {key: values[key] for key in kwargs}

    def _names_of(self, factor: Tensor) -> tuple[str, ...]:
        return tuple(self._names.get(factor.data_ptr(), ())) if factor.ndim == 2 else ()


InputRounding = Mapping[str, Callable[[Tensor], Tensor]]  # linear's name -> rounding function of its inputs


class QuantizedInputs(LinearInputs):
    """A context in which the linears named in `rounds` compute with rounded inputs, as an engine would.

    In the backward pass rounding counts as the identity.
    """

    def __init__(self, block: Block, parameter: Callable[[str], Tensor], rounds: InputRounding) -> None:
        super().__init__(block, parameter, self._rounded)
        self._rounds = rounds

    def _rounded(self, names: tuple[str, ...], x: Tensor) -> Tensor | None:
        name = next((name for name in names if name in self._rounds), None)
        return None if name is None else straight_through(self._rounds[name], x)


def straight_through(rounds: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`x` rounded. In the backward pass rounding counts as the identity."""
    rounded = rounds(x.detach())
    return x + (rounded - x).detach() if x.requires_grad else rounded


def rounded_inputs(block: Block, model: nn.Module, rounds: InputRounding) -> AbstractContextManager[Any]:
    """A context in which the linears of `block` named in `rounds` round their inputs; a null context if there are none.

    model  owner of the block's parameters
    """
    return QuantizedInputs(block, model.get_parameter, rounds) if rounds else nullcontext()


@contextmanager
def taped(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context that records gradients of `parameters`, and deletes them at the end."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def weight_view(parameter: Tensor, spec: LinearSpec) -> Tensor:
    """The weight (n, k) of `spec` as a view of its parameter: writing to the view writes to the model."""
    view = spec.placement.view(parameter)
    return view.T if spec.transposed else view


def bias_view(parameter: Callable[[str], Tensor], spec: LinearSpec) -> Tensor | None:
    """The bias (n,) of `spec` as a view of its parameter, found by name; None without a bias."""
    return None if spec.bias is None else spec.bias.view(parameter(spec.bias.parameter))
