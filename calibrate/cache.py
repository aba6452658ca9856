"""Calibrated scales of an FP8 key-value cache."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowbit.calibrate import ranks
from lowbit.export.cache import PER_HEAD
from lowbit.models.cached import attending
from lowbit.models.states import States
from lowbit.models.walk import Walk
from lowbit.quant.numbers import FP8

# The largest magnitude seen gets half of FP8's largest value: a float loses nothing by a larger scale, and keys of
# other texts may be larger.
TOP = FP8.high / 2
PARTS = ("q", "k", "v")


def cache_scales(
    walk: Walk, index: int, batches: list[States], attentions: Mapping[str, str], cache: str
) -> dict[str, Tensor]:
    """The scales of queries, keys and values of block `index`, which must be loaded, by their names in the file.

    attentions  the model's attention modules, with their names in the file
    cache       "fp8" for one scale, "fp8-head" for one per head
    """
    inside = [name for name in attentions if name.startswith(f"{walk.skeleton.blocks[index].name}.")]
    modules = {walk.skeleton.model.get_submodule(name): name for name in inside}

    def largest(states: States) -> tuple[Tensor, ...]:
        seen: dict[str, list[Tensor]] = {}

        def see(module: nn.Module, *parts: Tensor) -> tuple[Tensor, Tensor]:
            if module in modules:
                seen[modules[module]] = [part.float().abs().amax((0, 2, 3)) for part in parts]
            return parts[1], parts[2]

        with attending(see):
            walk.run(index, states)
        return tuple(value for name in inside for value in seen[name])

    found = ranks.each_several(batches, largest) if inside else []
    heads = [torch.stack(values).amax(0) for values in zip(*found, strict=True)]
    names = [f"{attentions[name]}.{part}_scale" for name in inside for part in PARTS]
    return {name: _scale(value, cache).cpu() for name, value in zip(names, heads, strict=True)}


def _scale(largest: Tensor, cache: str) -> Tensor:
    """(1,), or (heads, 1, 1) with one scale per head, from the largest magnitudes (heads); 1 for a head of zeros."""
    wanted = largest.view(-1, 1, 1) if cache == PER_HEAD else largest.amax().reshape(1)
    return torch.where(wanted > 0, wanted / TOP, torch.ones_like(wanted)).clamp(min=torch.finfo(torch.float32).tiny)
