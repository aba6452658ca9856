"""Recording a CUDA graph."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
