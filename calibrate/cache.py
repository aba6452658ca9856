"""Calibrated scales of an FP8 key-value cache.

The relative error of a float does not depend on its scale on the whole, but that of a single value does: a value just
above a power of two has a step of an eighth of itself, one just below it half as much. Keys of real models have
channels that are large and nearly constant, in pairs that the rotary embedding hardly turns, and most of what is lost
by rounding keys is lost there. So the keys' scale is chosen between one power of two and the next: the one that changes
attention least.

With p the attention of a query over the keys up to its own position, and d the changes of its logits by rounding, the
divergence of the changed attention from p is half of the variance of d under p, to second order.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lowbit.calibrate import ranks
from lowbit.calibrate.rounding import spread
from lowbit.export.cache import PER_HEAD
from lowbit.models.cached import attending
from lowbit.models.states import States
from lowbit.models.walk import Walk
from lowbit.quant.numbers import FP8
from lowbit.quant.numerics import fake_quantize_inputs

# The largest magnitude seen gets half of FP8's largest value, or down to a quarter: a float loses nothing by a larger
# scale on the whole, and keys of other texts may be larger.
TOP = FP8.high / 2
STEPS = 16  # scales of keys that are tried, from one power of two to below the next
KEYS, QUERIES = 512, 128  # at most, of a sequence, in the search
PARTS = ("q", "k", "v")
Look = Callable[[str, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def cache_scales(
    walk: Walk, index: int, batches: list[States], attentions: Mapping[str, str], cache: str
) -> dict[str, Tensor]:
    """The scales of queries, keys and values of block `index`, which must be loaded, by their names in the file.

    attentions  the model's attention modules, with their names in the file
    cache       "fp8" for one scale, "fp8-head" for one per head
    """
    inside = [name for name in attentions if name.startswith(f"{walk.skeleton.blocks[index].name}.")]
    if not inside:
        return {}
    modules = {walk.skeleton.model.get_submodule(name): name for name in inside}
    largest = _looked(walk, index, batches, modules, lambda _, *parts: tuple(map(_largest, parts)))
    scales = {name: [_scale(each.amax(0), cache) for each in parts] for name, parts in largest.items()}
    errors = _looked(
        walk, index, spread(batches), modules, lambda name, q, k, _: (key_errors(q, k, scales[name][1], cache),)
    )
    for name, (error,) in errors.items():
        scales[name][1] *= 2 ** (error.sum(0).argmin(0).view_as(scales[name][1]) / STEPS)
    return {
        f"{attentions[name]}.{part}_scale": value.cpu()
        for name, parts in scales.items()
        for part, value in zip(PARTS, parts, strict=True)
    }


def scales_by_module(cache: Mapping[str, Tensor], attentions: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The scales of keys and of values of each attention module, from those that `cache_scales` returned."""
    inside = {module: name for module, name in attentions.items() if f"{name}.k_scale" in cache}
    return {module: (cache[f"{name}.k_scale"], cache[f"{name}.v_scale"]) for module, name in inside.items()}


def key_errors(query: Tensor, key: Tensor, scale: Tensor, cache: str) -> Tensor:
    """The divergence of attention, summed, by keys rounded with STEPS scales from `scale` on: (STEPS, kv_heads), or
    (STEPS, 1) with one scale.

    query, key  (B, heads, T, D), (B, kv_heads, T, D)
    scale       (1,), or (kv_heads, 1, 1)
    """
    query, key = query[..., :KEYS, :].float(), key[..., :KEYS, :].float()
    kept = torch.arange(key.shape[2] - 1, -1, -max(key.shape[2] // QUERIES, 1), device=key.device)
    query = query[:, :, kept].unflatten(1, (key.shape[1], -1)) / math.sqrt(key.shape[-1])
    hidden = torch.arange(key.shape[2], device=key.device) > kept[:, None]
    found = key.new_zeros(STEPS, key.shape[1])
    for q, k in zip(query, key.unsqueeze(2), strict=True):  # (kv_heads, group, queries, D), (kv_heads, 1, T, D)
        weights = (q @ k.mT).masked_fill_(hidden, -math.inf).softmax(-1)
        for step in range(STEPS):
            rounded = fake_quantize_inputs(k, FP8, (scale * 2 ** (step / STEPS)).unsqueeze(-1))
            change = q @ (rounded - k).mT
            mean = (weights * change).sum(-1, keepdim=True)
            found[step] += (weights * (change - mean).square_()).sum((-3, -2, -1)) / 2
    return found if cache == PER_HEAD else found.sum(1, keepdim=True)


def _looked(
    walk: Walk, index: int, batches: list[States], modules: Mapping[nn.Module, str], look: Look
) -> dict[str, list[Tensor]]:
    """The results of `look` for the queries, keys and values of each of `modules`, stacked over the batches."""

    def one(states: States) -> tuple[Tensor, ...]:
        seen: dict[str, tuple[Tensor, ...]] = {}

        def see(module: nn.Module, *parts: Tensor) -> tuple[Tensor, Tensor]:
            if module in modules:
                seen[modules[module]] = look(modules[module], *parts)
            return parts[1], parts[2]

        with attending(see):
            walk.run(index, states)
        return tuple(value for name in modules.values() for value in seen[name])

    found = [torch.stack(values) for values in zip(*ranks.each_several(batches, one), strict=True)]
    each = len(found) // len(modules)
    return {name: found[at * each : (at + 1) * each] for at, name in enumerate(modules.values())}


def _largest(part: Tensor) -> Tensor:
    return part.float().abs().amax((0, 2, 3))


def _scale(largest: Tensor, cache: str) -> Tensor:
    """(1,), or (heads, 1, 1) with one scale per head, from the largest magnitudes (heads); 1 for a head of zeros."""
    wanted = largest.view(-1, 1, 1) if cache == PER_HEAD else largest.amax().reshape(1)
    return torch.where(wanted > 0, wanted / TOP, torch.ones_like(wanted)).clamp(min=torch.finfo(torch.float32).tiny)
