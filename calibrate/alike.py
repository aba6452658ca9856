"""Linears that are handled together: those of experts with one shape and scheme, as many at once as memory allows.

A mixture has hundreds of linears in a block, and an operator on one of them costs the host as much as one on all.
Scales and codes belong to rows of weights, so rows of all experts stand one behind the other. Second moments belong to
inputs: they have a first dimension more.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lowbit.calibrate import ranks
from lowbit.calibrate.block import BlockWork
from lowbit.quant.algos.gptq import COPIES
from lowbit.quant.naming import EXPERT, expert_of, expert_role, parent_set

Item = TypeVar("Item")
Result = TypeVar("Result")
Names = tuple[str, ...]
Tensors = tuple[Tensor, ...]

# Bytes of temporaries. On a GPU some ten experts of Qwen3-30B-A3B's shape, which take it longer than the host needs to
# launch. On a CPU a core's cache counts, and only small experts are worth a batch.
GPU_ROOM, CPU_ROOM = 4 << 30, 64 << 20


def room_on(device: torch.device) -> int:
    """The bytes that temporaries of a batch may take. On a GPU at most half of what is free."""
    if device.type == "cpu":
        return CPU_ROOM
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(GPU_ROOM, (torch.cuda.mem_get_info(device)[0] + unused) // 2)


def in_batches(
    items: Sequence[Item], kind: Callable[[Item], Hashable], most: Callable[[Item], int],
    work: Callable[[list[Item]], list[Result]],
) -> list[Result]:  # fmt: skip
    """The results of `work` for `items`, in their order. It takes items of one kind, as many at once as `most` says of
    the first."""
    found: dict[int, Result] = {}
    for places in batches(items, kind, most):
        found |= zip(places, work([items[place] for place in places]), strict=True)
    return [found[place] for place in range(len(items))]


def batches(
    items: Sequence[Item], kind: Callable[[Item], Hashable], most: Callable[[Item], int]
) -> Iterator[list[int]]:
    """The places of items of one kind, as many at once as `most` says of the first."""
    kinds: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        kinds.setdefault(kind(item), []).append(place)
    for places in kinds.values():
        size = most(items[places[0]])
        for first in range(0, len(places), size):
            yield places[first : first + size]


def alike(work: BlockWork, names: Sequence[str]) -> list[Names]:
    """The linears `names`, those of experts together that have a role, shape and scheme in common, and enough
    calibration tokens or not."""

    def kind(name: str) -> Hashable:
        known = work.energy(name) is not None
        return expert_role(name), work.masters[name].shape, work.schemes[name], known, name in work.scarce

    found = batches(names, kind, lambda name: most_at_once(work.masters[name]))
    return [tuple(names[place] for place in places) for places in found]


def most_at_once(weight: Tensor, linears: int = 1) -> int:
    """The number of sites to handle at once, each with so many `linears` whose weights (n, k) are like `weight`."""
    k = weight.shape[1]
    return max(room_on(weight.device) // (4 * COPIES * (linears * weight.numel() + k * k)), 1)


def together(work: BlockWork, names: Sequence[str], one: Callable[[list[Names]], list[Tensors]]) -> dict[str, Tensors]:
    """The results of `one` for the linears `names`, split over the ranks.

    one  takes sites: for each of several inputs the linears that share it, as many for each, all of one shape and
         scheme, with statistics or all without. Returns tensors for each linear, in that order
    """
    sites = _sites(work, names)

    def kind(site: Names) -> Hashable:
        name = site[0]
        return tuple(map(expert_role, site)), work.masters[name].shape, work.schemes[name], name in work.stats

    def of_each_site(some: list[Names]) -> list[Tensors]:
        found, width = one(some), len(some[0])
        return [sum(found[first : first + width], ()) for first in range(0, len(found), width)]

    def most(site: Names) -> int:
        return most_at_once(work.masters[site[0]], len(site))

    found = ranks.each_together(sites, lambda own: in_batches(own, kind, most, of_each_site))
    results: dict[str, Tensors] = {}
    for site, tensors in zip(sites, found, strict=True):
        size = len(tensors) // len(site)
        results |= {name: tensors[place * size : (place + 1) * size] for place, name in enumerate(site)}
    return {name: results[name] for name in names}


def _sites(work: BlockWork, names: Sequence[str]) -> list[Names]:
    """`names`, those of an expert together that share statistics, shape, scheme and divisor; all others alone."""
    sites: dict[Hashable, Names] = {}
    for name in names:
        key: Hashable = name
        if EXPERT.search(name) and name in work.stats:
            scheme = work.schemes[name]
            parent = parent_set(name) if scheme.weights.parent else ""
            key = expert_of(name), id(work.stats[name]), work.masters[name].shape, scheme, parent
        sites[key] = (*sites.get(key, ()), name)
    return list(sites.values())


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape in a tensor with a first dimension more; a view of the only one."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
