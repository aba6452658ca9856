"""What names of linears say of a model's structure: which are experts, and which run as one matrix."""

import re
from collections.abc import Iterable, Mapping

from lowbit.quant.scheme import Scheme

# Linears that engines fuse into one matrix, by the last part of their names: they must share a scheme.
ENGINE_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# Every expert of a layer runs in one kernel, so all their linears share a scheme.
EXPERT = re.compile(r"\.experts\.\d+\.")
# Linears whose inputs are split between GPUs; the outputs of the others are.
ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "wo", "w2", "fc2", "c_proj", "dense", "dense_4h_to_h")


def expert_role(name: str) -> str:
    """`name` without the expert's number: the same for linears that play the same part in all experts of a layer."""
    return EXPERT.sub(".experts.*.", name)


def fused_set(name: str) -> str:
    """A key that linears share where engines run them as one matrix."""
    if EXPERT.search(name):
        return EXPERT.split(name)[0] + ".experts"
    parent, _, leaf = name.rpartition(".")
    return next((f"{parent}.{'+'.join(group)}" for group in ENGINE_FUSED if leaf in group), name)


def split_sets(names: Iterable[str], schemes: Mapping[str, Scheme]) -> dict[str, list[str]]:
    """The fused sets of `names` whose members differ in scheme, some having none: engines refuse those."""
    sets: dict[str, list[str]] = {}
    for name in names:
        sets.setdefault(fused_set(name), []).append(name)
    return {key: members for key, members in sets.items() if len({schemes.get(name) for name in members}) > 1}
