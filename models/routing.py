"""Wider choices of experts, for runs whose outputs nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# The number of a token's experts in transformers' routers, and in the configuration that Gemma 4's read
WIDTH, FIELD = "top_k", "top_k_experts"
GROUPS = "num_group", "topk_group"


@contextmanager
def widened(module: nn.Module, experts: int) -> Iterator[None]:
    """A context in which the routers of `module` choose as many experts for each token, if they choose fewer.

    A router that has no such number, or does not read it, goes on as before: the tokens that experts see tell.
    """
    changed = []
    for name, width in list(widths(module)):
        found = holder_of(module.get_submodule(name))
        if found is not None and width < experts:
            changed.append((*found, width))
            setattr(*found, experts)
    try:
        yield
    finally:
        for holder, name, width in changed:
            setattr(holder, name, width)


def widest(module: nn.Module) -> int:
    """The largest number of a token's experts in the routers of `module`; 0 if none tells."""
    return max((width for _, width in widths(module)), default=0)


def widths(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The routers within `module` that tell it, by name, and the number of a token's experts in each."""
    for name, part in module.named_modules():
        found = holder_of(part)
        if found is not None:
            yield name, getattr(*found)


def holder_of(part: nn.Module) -> tuple[object, str] | None:
    """The object that tells a router how many experts a token has, and the name of the number there: the router itself,
    or its configuration, which all routers share. None if `part` is none of either."""
    if isinstance(getattr(part, WIDTH, None), int):
        return part, WIDTH
    config = getattr(part, "config", None)
    count = getattr(config, "num_experts", None)
    chooses = any(isinstance(child, nn.Linear) and child.out_features == count for child in part.children())
    return (config, FIELD) if chooses and isinstance(getattr(config, FIELD, None), int) else None


def groups_of(router: nn.Module) -> tuple[int, int]:
    """The groups of neighbouring experts of a router, and how many of them a token uses; 1 and 1 without groups."""
    groups, used = (getattr(router, name, None) for name in GROUPS)
    return (groups, used) if isinstance(groups, int) and isinstance(used, int) else (1, 1)
