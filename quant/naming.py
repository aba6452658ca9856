"""Model structure that follows from the names of linears: experts, fused sets, tensor-parallel direction."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowbit.quant.scheme import Scheme

# Linears that engines fuse into one matrix, by the last part of their names. They must share a scheme.
ENGINE_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# One kernel runs all experts of a layer, so all their linears share a scheme.
EXPERT = re.compile(r"\.experts\.\d+\.")
# Row-parallel linears: tensor parallelism splits their inputs. All others are column-parallel.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "wo", "w2", "fc2", "c_proj", "dense", "dense_4h_to_h")


def expert_role(name: str) -> str:
    """`name` without the expert's number: linears with the same role in all experts of a layer share it."""
    return EXPERT.sub(".experts.*.", name)


def expert_of(name: str) -> str:
    """The part of an expert's name that all its linears share."""
    found = EXPERT.search(name)
    return name if found is None else name[: found.end()]


def joined_set(name: str) -> str:
    """A key shared by all linears that engines join into one matrix: q, k and v; gate and up, of one expert too."""
    parent, _, leaf = name.rpartition(".")
    group = _fused_leaf(leaf)
    return name if group == leaf else f"{parent}.{group}"


def fused_set(name: str) -> str:
    """A key shared by all linears that one kernel of engines runs: those of `joined_set`, and all experts of a
    layer."""
    return EXPERT.split(name)[0] + ".experts" if EXPERT.search(name) else joined_set(name)


def parent_set(name: str) -> str:
    """A key shared by all linears whose scales have the same parent: joined ones, in all experts of a layer."""
    return expert_role(joined_set(name))


def largest_by_parent(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The largest magnitude () float32 among named weights whose scales have the same parent, by `parent_set`."""
    largest: dict[str, Tensor] = {}
    for name, w in weights:
        found, key = w.float().abs().amax(), parent_set(name)
        largest[key] = torch.maximum(largest.get(key, found), found)
    return largest


def _fused_leaf(leaf: str) -> str:
    """The last part of a linear's name, with those of the linears that engines fuse it with."""
    return next(("+".join(group) for group in ENGINE_FUSED if leaf in group), leaf)


def split_sets(names: Iterable[str], schemes: Mapping[str, Scheme]) -> dict[str, list[str]]:
    """Fused sets of `names` whose members have different schemes, or partly none. Engines reject them."""
    sets: dict[str, list[str]] = {}
    for name in names:
        sets.setdefault(fused_set(name), []).append(name)
    return {key: members for key, members in sets.items() if len({schemes.get(name) for name in members}) > 1}
