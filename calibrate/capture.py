"""Seeing every multiplication by a weight while a block runs, whatever module or function performs it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.skeleton import Block, LinearSpec
from quant.site import Site
from quant.stats import Stats, stats_of

# Modules call one of these in the end: Linear, Conv1D (addmm), experts' slices, weights multiplied with @.
MULTIPLICATIONS = {
    torch.nn.functional.linear,
    torch.addmm,
    torch.mm,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}

OnInput = Callable[[tuple[str, ...], Tensor], None]


class LinearInputs(TorchFunctionMode):
    """Calls `on_input(names, x)` for each product of activations `x` (..., k) with a weight of the block.

    names  linears that lie in the weight: one, or gate and up where a fused expert multiplies both at once

    Weights are told apart by their address, so they must stay where they are while the mode is active.
    """

    def __init__(self, block: Block, parameter: Callable[[str], Tensor], on_input: OnInput) -> None:
        super().__init__()
        self._on_input = on_input
        self._names: dict[int, list[str]] = {}
        for spec in block.linears:
            place = spec.placement
            whole = parameter(place.parameter)
            address = (whole if place.expert is None else whole[place.expert]).data_ptr()
            self._names.setdefault(address, []).append(spec.name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MULTIPLICATIONS:
            tensors = [value for value in args if isinstance(value, Tensor)]
            tensors += [value for value in (kwargs or {}).values() if isinstance(value, Tensor)]
            self._see(tensors)
        return func(*args, **(kwargs or {}))

    def _see(self, tensors: list[Tensor]) -> None:
        for i, weight in enumerate(tensors):
            names = self._names.get(weight.data_ptr()) if weight.ndim == 2 else None
            if names:
                # addmm(bias, x, weight): the activations stand just before the weight
                self._on_input(tuple(names), tensors[i - 1] if i else tensors[1])
                return


def weight_view(parameter: Tensor, spec: LinearSpec) -> Tensor:
    """The weight (n, k) of `spec` inside its parameter; writing to the view writes to the model."""
    view = spec.placement.view(parameter)
    return view.T if spec.transposed else view


def sites_of(calls: Iterable[tuple[tuple[str, ...], Tensor]]) -> list[Site]:
    """Linears grouped by the input they were seen with, in order of first use.

    calls  names and inputs as LinearInputs reported them; the inputs must all still be alive, or addresses repeat
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    widths: dict[tuple[Any, ...], int] = {}
    for names, x in calls:
        key = (x.data_ptr(), x.shape[-1], x.numel())
        groups.setdefault(key, []).extend(name for name in names if name not in groups.get(key, []))
        widths[key] = x.shape[-1]
    return [Site(tuple(names), widths[key]) for key, names in groups.items()]


class SiteStats:
    """Statistics of every site, gathered while batches run under `LinearInputs`.

    gram_tokens  how many tokens the Gram matrix of a site should see; later tokens add to the other sums alone
    """

    def __init__(self, sites: list[Site], gram_tokens: int) -> None:
        self.by_linear: dict[str, Stats] = {}
        self._first = {site.linears[0]: site for site in sites}
        self._gram_tokens = gram_tokens
        self._stats: dict[str, Stats] = {}

    def see(self, names: tuple[str, ...], x: Tensor) -> None:
        """Add the tokens of `x`; linears of a site after the first see the same tokens and are passed over."""
        for name in names:
            if name in self._first:
                known = self._stats.get(name)
                with_gram = known is None or known.gram_tokens < self._gram_tokens
                fresh = stats_of(x, with_gram)
                self._stats[name] = fresh if known is None else known + fresh

    def of(self, linear: str) -> Stats | None:
        """The statistics of the site that `linear` belongs to; None where no token reached it."""
        for first, site in self._first.items():
            if linear in site.linears:
                return self._stats.get(first)
        return None
