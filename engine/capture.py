"""Recording CUDA graphs."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

WARM_UP = 2  # runs before a capture, in which kernels are loaded and libraries allocate workspaces


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, pool: "torch.cuda._POOL_HANDLE | None" = None) -> Iterator[None]:
    """A capture into `graph`, without garbage collection: it may free another engine's graphs, which a capture forbids.

    pool  memory that the graph shares with others
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    finally:
        if collects:
            gc.enable()


def capture(
    parts: Sequence[Callable[[], None]], kept: Sequence[Tensor], warm_up: int = WARM_UP
) -> list[torch.cuda.CUDAGraph]:
    """One graph of each of the parts, which run one after another on fixed tensors.

    kept     the tensors that a run changes and whose values are needed: they are restored
    warm_up  runs before the capture
    """
    before = [tensor.clone() for tensor in kept]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            for part in parts:
                part()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in parts]
    for graph, part in zip(graphs, parts, strict=True):
        with captured(graph):
            part()
    for tensor, value in zip(kept, before, strict=True):
        tensor.copy_(value)
    return graphs
