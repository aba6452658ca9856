"""What a call works in: a cache and runners over it. Each call that is under way has its own."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowbit.engine.cache import Cache, cache_nbytes, make_cache
from lowbit.engine.decoder import Decoder
from lowbit.engine.options import Options
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import Features, Sampler
from lowbit.errors import EngineError
from lowbit.quant.kernels.decode_attention import SHORT

RUNNERS = 16  # of a workspace: on a GPU each holds a captured graph and its memory
IDLE = 4  # workspaces that are kept for later calls


class Workspace:
    """A cache that grows with what is asked, and the runners over it; the least recently used runners go."""

    def __init__(self, pool: "Workspaces") -> None:
        self.pool, self.decoder, self.options = pool, pool.decoder, pool.options
        self.cache: Cache | None = None
        self.runners: OrderedDict[tuple[int, Features | None, int], Runner] = OrderedDict()

    def runner(self, rows: int, batch: int, length: int, features: Features | None = None) -> Runner:
        """The runner of `rows` rows over a cache for `batch` sequences of at least `length` positions.

        Sequences of up to SHORT positions have a runner of their own, whose attention is cut for them.
        """
        cache = self.roomy_cache(batch, length)
        reach = SHORT if length <= SHORT else cache.context
        key = rows, features, reach
        if key not in self.runners:
            while len(self.runners) >= RUNNERS:
                self.runners.popitem(last=False)
            sampler = None if features is None else self.sampler(features, rows)
            self.runners[key] = Runner(self.decoder, cache, rows, reach, sampler)
        self.runners.move_to_end(key)
        return self.runners[key]

    def sampler(self, features: Features, rows: int) -> Sampler:
        """An empty sampler."""
        return Sampler(features, rows, self.decoder.architecture.vocabulary, self.decoder.weights.device)

    def roomy_cache(self, batch: int, length: int) -> Cache:
        """The cache, made anew where it is smaller than asked: on a GPU for the whole context at once."""
        if self.cache is None or self.cache.batch < batch or self.cache.context < length:
            self.clear()  # the runners' graphs hold the old cache's addresses
            whole = on_gpu(self.decoder.weights.device)
            self.cache = self.pool.make_cache(batch, self.options.context if whole else length)
        return self.cache

    def clear(self) -> None:
        """Gives the memory back."""
        self.cache = None
        self.runners.clear()


class Workspaces:
    """The workspaces of an engine."""

    def __init__(self, decoder: Decoder, options: Options) -> None:
        self.decoder, self.options = decoder, options
        self.idle: list[Workspace] = []
        self.lock = threading.Lock()

    @contextmanager
    def lent(self) -> Iterator[Workspace]:
        """A workspace that nobody else has meanwhile."""
        with self.lock:
            space = self.idle.pop() if self.idle else Workspace(self)
        try:
            yield space
        finally:
            with self.lock:
                self.idle = [*self.idle, space][-IDLE:]

    def make_cache(self, batch: int, context: int) -> Cache:
        """A cache for `batch` sequences. EngineError where the GPU has no room for it, idle workspaces given back."""
        weights, architecture = self.decoder.weights, self.decoder.architecture
        need = cache_nbytes(architecture, batch, context, weights.dtype, self.options.int8_cache)
        if on_gpu(weights.device) and need > free_nbytes(weights.device)[0]:
            with self.lock:
                self.idle.clear()
            free, total = free_nbytes(weights.device)
            if need > free:
                raise EngineError(
                    f"{batch} sequences of {context} positions need {need / 2**30:.1f} GiB for keys and values, the "
                    f"GPU has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: use fewer sequences, a smaller "
                    "context, or cache='int8'"
                )
        return make_cache(architecture, batch, context, weights.dtype, self.options.int8_cache, weights.device)


def on_gpu(device: torch.device) -> bool:
    """True if memory is that of a GPU: scarce, and torch says how much there is."""
    return device.type == "cuda"


def free_nbytes(device: torch.device) -> tuple[int, int]:
    """Bytes that a GPU has free, what torch keeps for later given back, and its memory in all."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)
