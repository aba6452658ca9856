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
    for name, width in list(widths(module)):
        if width < experts:
            part = module.get_submodule(name)
            changed.append((part, width))
            setattr(part, WIDTH, experts)
    try:
        yield
    finally:
        for part, width in changed:
            setattr(part, WIDTH, width)


def widest(module: nn.Module) -> int:
    """The largest number of a token's experts in the routers of `module`; 0 if none tells."""
    return max((width for _, width in widths(module)), default=0)


def widths(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The routers within `module` that tell it, by name, and the number of a token's experts in each."""
    for name, part in module.named_modules():
        width = getattr(part, WIDTH, None)
        if isinstance(width, int):
            yield name, width
