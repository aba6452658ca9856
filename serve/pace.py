"""The pace of prompts: how many of a prompt's tokens are read between two decode steps."""

from dataclasses import dataclass

from lowbit.engine.prefill import CHUNK

BETWEEN_STEPS = 0.03  # seconds for a chunk while other requests write
ALONE = 0.25  # seconds for a chunk otherwise: new and cancelled requests wait that long
FIRST = {"cpu": 64, "cuda": 512}  # tokens of the first chunk, before any was timed
LEAST = 16


@dataclass
class Pace:
    """The size of the next chunk, from the measured time of earlier ones.

    device  its type
    speed   tokens per second; 0 before the first measurement
    """

    device: str
    speed: float = 0.0

    def rows(self, writing: bool) -> int:
        """Tokens of the next chunk: a power of two, so that few shapes occur. `writing` True if other requests wait."""
        wanted = self.speed * (BETWEEN_STEPS if writing else ALONE) if self.speed else FIRST[self.device]
        return 1 << (max(LEAST, min(int(wanted), CHUNK)).bit_length() - 1)

    def note(self, rows: int, seconds: float) -> None:
        """Take the time of one whole chunk into account. The rest of a prompt takes longer per token."""
        measured = rows / max(seconds, 1e-6)
        self.speed = measured if not self.speed else (self.speed + measured) / 2
