"""The pace of prompts: how many tokens of a prompt a chunk has, and how long it is read between two decode steps."""

import time
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.prefill import CHUNK

BETWEEN_STEPS = 0.03  # seconds that a chunk is read while other requests write
WHOLE = 0.25  # seconds for a chunk; without other requests nothing interrupts it
FIRST = {"cpu": 64, "cuda": 512}  # tokens of the first chunk, before any was timed
LEAST = {"cpu": 16, "cuda": 256}
# Seconds that a chunk takes however few tokens it has: the host launches one kernel after another. Llama-2-7B on an
# H200: 24 ms with 32 to 512 tokens, 34 ms with 1024, on a machine with other work 60 ms with 256.
LAUNCHES = {"cpu": 0.0, "cuda": 0.02}


@dataclass
class Pace:
    """The size of the next chunk, from the measured time of earlier ones.

    device  its type
    speed   tokens per second after the launches; 0 before the first measurement
    """

    device: str
    speed: float = 0.0

    def rows(self) -> int:
        """Tokens of the next chunk: a power of two, so that few shapes occur."""
        wanted = self.speed * (WHOLE - LAUNCHES[self.device]) if self.speed else FIRST[self.device]
        return 1 << (max(LEAST[self.device], min(int(wanted), CHUNK)).bit_length() - 1)

    def note(self, rows: int, seconds: float) -> None:
        """Take the time of one whole chunk into account. The rest of a prompt takes longer per token."""
        measured = rows / max(seconds - LAUNCHES[self.device], seconds / 8, 1e-6)
        self.speed = measured if not self.speed else (self.speed + measured) / 2


@dataclass
class Part:
    """A chunk of a prompt that is read layer by layer, so that decode steps of others come between.

    work     a chunk_by_layers
    rows     the most tokens that it may have
    device   of the model
    seconds  spent on it
    """

    work: Generator[None, None, Tensor]
    rows: int
    device: torch.device
    seconds: float = 0.0

    def advance(self, most: float | None) -> Tensor | None:
        """The hidden states (rows, hidden) of the chunk; None if it is not read after `most` seconds, and a layer."""
        begin, hidden = time.perf_counter(), None
        before: torch.cuda.Event | None = None
        try:
            next(self.work)
            while most is None or time.perf_counter() - begin < most:
                before = self.kept_up(before) if most is not None and self.device.type == "cuda" else None
                next(self.work)
        except StopIteration as end:
            hidden = end.value
            if hidden.is_cuda:
                torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - begin
        return hidden

    def kept_up(self, before: torch.cuda.Event | None) -> torch.cuda.Event:
        """An event behind all that is launched. Waits for the one before, so that the clock tells the device's time:
        the host launches a layer while the one before is computed, and no more."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        if before is not None:
            before.synchronize()
        return event
