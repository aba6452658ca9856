"""The pace of prompts: how many of a prompt's tokens are read between two decode steps."""

from dataclasses import dataclass

from lowbit.engine.prefill import CHUNK

BETWEEN_STEPS = 0.03  # seconds for a chunk while other requests write
ALONE = 0.25  # seconds for a chunk otherwise: new and cancelled requests wait that long
FIRST = {"cpu": 64, "cuda": 512}  # tokens of the first chunk, before any was timed
LEAST = {"cpu": 16, "cuda": 256}
# Seconds that a chunk takes however few tokens it has: the host launches one kernel after another. Llama-2-7B on an
# H200: 24 ms with 32 to 512 tokens, 34 ms with 1024. Without this a slow chunk made the next ones smaller, not faster.
LAUNCHES = {"cpu": 0.0, "cuda": 0.02}


@dataclass
class Pace:
    """The size of the next chunk, from the measured time of earlier ones.

    device  its type
    speed   tokens per second after the launches; 0 before the first measurement
    """

    device: str
    speed: float = 0.0

    def rows(self, writing: bool) -> int:
        """Tokens of the next chunk: a power of two, so that few shapes occur. `writing` True if other requests wait."""
        seconds = (BETWEEN_STEPS if writing else ALONE) - LAUNCHES[self.device]
        wanted = self.speed * seconds if self.speed else FIRST[self.device]
        return 1 << (max(LEAST[self.device], min(int(wanted), CHUNK)).bit_length() - 1)

    def note(self, rows: int, seconds: float) -> None:
        """Take the time of one whole chunk into account. The rest of a prompt takes longer per token."""
        measured = rows / max(seconds - LAUNCHES[self.device], seconds / 8, 1e-6)
        self.speed = measured if not self.speed else (self.speed + measured) / 2
