"""Workspaces: a cache and runners for each call in progress."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lowbit.engine.cache import Cache, cache_nbytes, make_cache
from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.check import Check
from lowbit.engine.drafts.drafter import Drafter
from lowbit.engine.drafts.gauge import Costs
from lowbit.engine.drafts.heads import Head, Heads
from lowbit.engine.drafts.round import Round
from lowbit.engine.drafts.suffix import Suffixes
from lowbit.engine.options import Options
from lowbit.engine.passes import Reader
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import Features, Sampler
from lowbit.errors import EngineError
from lowbit.quant.kernels.decode_attention import SHORT

LOG = logging.getLogger("lowbit.engine")
RUNNERS = 16  # per workspace: on a GPU each has a captured graph and its memory
IDLE = 4  # workspaces kept for later calls


@dataclass(frozen=True)
class Kind:
    """A kind of runner: its rows, as in Workspace.runner.

    checked  sequences whose drafts it checks; 0: it checks none
    drafted  True if it writes their next drafts, too
    """

    rows: int
    features: Features | None = None
    adjacent: int = 1
    checked: int = 0
    drafted: bool = False

    @property
    def source(self) -> "Kind | None":
        """The kind of the runner that computes the logits for it, if it is another one."""
        shares = self.features is not None and not self.features.fused and self.adjacent == 1 and not self.checked
        return Kind(self.rows) if shares else None


class Workspace:
    """A cache that grows on demand, and runners for it. The least recently used runners beyond `most` are dropped."""

    def __init__(self, pool: "Workspaces", most: int = RUNNERS) -> None:
        self.most, self.pool, self.decoder, self.options = most, pool, pool.decoder, pool.options
        self.reader: Reader | None = None
        self.runners: OrderedDict[tuple[Kind, int], Runner] = OrderedDict()
        self.bases: dict[tuple[Features, int], Sampler] = {}
        self.drafts: Drafter | None = None

    def runner(self, rows: int, batch: int, length: int, features: Features | None = None, adjacent: int = 1) -> Runner:
        """The runner with `rows` rows, for a cache of `batch` sequences of at least `length` positions.

        So many `adjacent` rows are consecutive positions of one sequence (drafts); otherwise each row has its own.
        Sequences of up to SHORT positions get their own runner, with an attention kernel split for them.
        """
        return self.kept(Kind(rows, features, adjacent), batch, length)

    def checking(self, sequences: int, width: int, batch: int, length: int, features: Features) -> Runner:
        """The runner that checks drafts of so many sequences, with `width` adjacent rows for each."""
        return self.kept(Kind(sequences * width, features, width, sequences), batch, length)

    def round(self, sequences: int, width: int, batch: int, length: int, features: Features) -> Round:
        """The runner that also writes the next drafts of these sequences, by the drafter's head."""
        found = self.kept(Kind(sequences * width, features, width, sequences, True), batch, length)
        assert isinstance(found, Round)
        return found

    def kept(self, kind: Kind, batch: int, length: int) -> Runner:
        """The runner of this kind, made if there is none."""
        reader = self.roomy_reader(batch, length)
        reach = SHORT if length <= SHORT else reader.cache.context
        key = kind, reach
        source = None if kind.source is None else self.kept(kind.source, batch, length)
        if key not in self.runners:
            while len(self.runners) >= self.most:
                self.runners.popitem(last=False)
            self.runners[key] = self.made(kind, reader, reach, source)
        self.runners.move_to_end(key)
        return self.runners[key]

    def made(self, kind: Kind, reader: Reader, reach: int, source: Runner | None) -> Runner:
        """A new runner."""
        sampler = self.sampler_for(kind)
        if not kind.drafted:
            return Runner(reader, kind.rows, reach, sampler, kind.adjacent, source)
        assert isinstance(sampler, Check)
        assert isinstance(self.drafts, Heads)
        return Round(reader, reach, sampler, self.drafts)

    def sampler_for(self, kind: Kind) -> Sampler | None:
        """The sampler of a runner."""
        if kind.features is None:
            return None
        if kind.checked:
            return Check(self.base(kind.features, kind.checked), kind.adjacent)
        return self.sampler(kind.features, kind.rows)

    def base(self, features: Features, sequences: int) -> Sampler:
        """The state of sequences with drafts, which runners of every width share."""
        key = features, sequences
        if key not in self.bases:
            self.bases[key] = self.sampler(features, sequences)
        return self.bases[key]

    def sampler(self, features: Features, rows: int) -> Sampler:
        """An empty sampler."""
        return Sampler(features, rows, self.decoder.architecture.vocabulary, self.decoder.weights.device)

    @property
    def cache(self) -> Cache | None:
        """The cache, or None before its first use."""
        return None if self.reader is None else self.reader.cache

    def drafter(self) -> Drafter:
        """The drafter of the engine's head, for the cache. If memory is short, an EngineError, or drafts from the text
        where the head is not required."""
        assert self.reader is not None
        head, cache, weights = self.pool.head, self.reader.cache, self.decoder.weights
        assert head is not None
        if self.drafts is None:
            try:
                self.drafts = Heads(head, cache.batch, cache.context, weights.embedding)
            except torch.OutOfMemoryError as error:
                reason = (
                    f"the drafter's keys and values of {cache.batch} sequences of {cache.context} positions do not fit"
                )
                if self.options.drafter_required:
                    raise EngineError(f"{reason}: leave it out, or use fewer sequences or a smaller context") from error
                LOG.warning("%s: texts are written without it", reason)
                self.drafts = Suffixes()
        return self.drafts

    def roomy_reader(self, batch: int, length: int) -> Reader:
        """The reader of the cache, reallocated if too small. On a GPU it has the whole context from the start."""
        if self.reader is None or self.reader.cache.batch < batch or self.reader.cache.context < length:
            self.clear()  # graphs contain the old cache's addresses
            whole = on_gpu(self.decoder.weights.device)
            cache = self.pool.make_cache(batch, self.options.context if whole else length)
            self.reader = Reader(self.decoder, cache)
        return self.reader

    def clear(self) -> None:
        """Free the memory."""
        self.reader = None
        self.runners.clear()
        self.bases.clear()
        self.drafts = None


class Workspaces:
    """The workspaces of an engine.

    head   of the drafter, or None
    costs  of steps with drafts, measured in any of them
    """

    def __init__(self, decoder: Decoder, options: Options, head: Head | None = None) -> None:
        self.decoder, self.options = decoder, options
        self.head = head.planned() if head is not None and decoder.dependent else head
        self.idle: list[Workspace] = []
        self.costs = Costs()
        self.lock = threading.Lock()

    @contextmanager
    def lent(self) -> Iterator[Workspace]:
        """A context with a workspace for exclusive use."""
        with self.lock:
            space = self.idle.pop() if self.idle else Workspace(self)
        try:
            yield space
        finally:
            with self.lock:
                self.idle = [*self.idle, space][-IDLE:]

    def make_cache(self, batch: int, context: int) -> Cache:
        """A cache for `batch` sequences. Frees idle workspaces if needed. EngineError if the GPU has too little
        memory."""
        weights, architecture = self.decoder.weights, self.decoder.architecture
        need = self.cache_nbytes(batch, context)
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
        cache = make_cache(architecture, batch, context, weights.cache, weights.embedding)
        if not self.decoder.taps:
            return cache
        width = len(self.decoder.taps) * architecture.hidden
        return replace(cache, features=weights.embedding.new_zeros(batch * context, width))

    def cache_nbytes(self, batch: int, context: int) -> int:
        """The bytes of a cache for `batch` sequences, with the features for a drafter."""
        decoder = self.decoder
        architecture, dtype = decoder.architecture, decoder.weights.dtype
        features = batch * context * len(decoder.taps) * architecture.hidden * dtype.itemsize
        return features + cache_nbytes(architecture, batch, context, dtype, decoder.weights.cache.number)


def on_gpu(device: torch.device) -> bool:
    """True for a GPU, whose memory is scarce and can be queried."""
    return device.type == "cuda"


def free_nbytes(device: torch.device) -> tuple[int, int]:
    """Free bytes of a GPU after releasing torch's cached memory, and its total bytes."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)
