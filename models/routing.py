"""Wider choices of experts, for runs whose outputs nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

WIDTH = "top_k"  # the number of a token's experts in transformers' routers


@contextmanager
def widened(module: nn.Module, experts: int) -> Iterator[None]:
    """A context in which the routers of `module` choose as many experts for each token, if they choose fewer.

    A router that has no such number, or does not read it, goes on as before: the tokens that experts see tell.
    """
    changed = []
    for part in module.modules():
        width = getattr(part, WIDTH, None)
        if isinstance(width, int) and width < experts:
            changed.append((part, width))
            setattr(part, WIDTH, experts)
    try:
        yield
    finally:
        for part, width in changed:
            setattr(part, WIDTH, width)


def widest(module: nn.Module) -> int:
    """The largest number of a token's experts in the routers of `module`; 0 if none tells."""
    widths = (getattr(part, WIDTH, None) for part in module.modules())
    return max((width for width in widths if isinstance(width, int)), default=0)
