"""An engine under mixed load for a while: every text equals that of the request alone, and memory stays flat.

    python -m tests.engine.soak --minutes 60 --device auto

Batches, open streams, streams that are dropped, threads and requests that are refused, drawn with a seed.
"""

import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil
import torch

from lowbit import engine
from lowbit.engine.engine import Engine
from lowbit.engine.sampling import Sampling
from lowbit.errors import EngineError
from tests.builders import save_family

COMMON = {"ignore_eos": True, "max_new_tokens": 12}
SETTINGS = (
    Sampling(**COMMON),
    Sampling(**COMMON, temperature=0.9, top_p=0.9, seed=7),
    Sampling(**COMMON, temperature=1.3, top_k=30, min_p=0.01, seed=1),
    Sampling(**COMMON, repetition_penalty=1.3, frequency_penalty=0.5),
    Sampling(**COMMON, bad_words=((101,), (3, 7)), min_new_tokens=4, stop=("e",)),
    Sampling(**COMMON, logprobs=5, prompt_logprobs=True),
    Sampling(**COMMON, beams=3),
    Sampling(**COMMON, lookup=4),
)
REFUSED = ({"prompts": [[9999]]}, {"prompts": [[1] * 500]}, {"prompts": [[1]], "top_p": 7.0}, {"prompts": [""]})
GROWTH = 8 << 20  # bytes beyond what the first part of a run took: allocators and caches of other people's code


@dataclass
class Soak:
    """One run. `expected` has the text of each (prompt, settings) alone."""

    model: Engine
    seed: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    expected: dict[tuple[int, int], str] = field(default_factory=dict)
    checked: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        lengths = (1, 4, 11, 30, 60)
        self.prompts = [[self.random.randrange(256) for _ in range(length)] for length in lengths]
        self.expected = {
            (p, s): self.model.generate([prompt], sampling)[0].text
            for p, prompt in enumerate(self.prompts)
            for s, sampling in enumerate(SETTINGS)
        }

    def draw(self) -> tuple[int, int]:
        """A prompt and settings."""
        return self.random.randrange(len(self.prompts)), self.random.randrange(len(SETTINGS))

    def check(self, at: tuple[int, int], text: str) -> None:
        """Raises AssertionError if a request's text differs from its text alone."""
        assert text == self.expected[at], (at, text, self.expected[at])
        self.checked += 1

    def batch(self) -> None:
        """Some requests together."""
        drawn = [self.draw() for _ in range(self.random.randint(1, 8))]
        done = self.model.generate([self.prompts[p] for p, _ in drawn], [SETTINGS[s] for _, s in drawn])
        for at, completion in zip(drawn, done, strict=True):
            self.check(at, completion.text)

    def streams(self) -> None:
        """Open streams in turns; some are dropped on the way."""
        drawn = [self.draw() for _ in range(self.random.randint(2, 5))]
        open_ = [(at, self.model.stream([self.prompts[at[0]]], SETTINGS[at[1]]), [""]) for at in drawn]
        while open_:
            at, stream, texts = entry = self.random.choice(open_)
            piece = next(stream, None)
            if piece is None:
                self.check(at, "".join(texts))
            elif self.random.random() > 0.01:
                texts.append(piece.text)
                continue
            open_.remove(entry)

    def threads(self) -> None:
        """Requests from several threads."""
        drawn = [self.draw() for _ in range(6)]
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(self.model.generate, [self.prompts[p]], SETTINGS[s]) for p, s in drawn]
            for at, future in zip(drawn, asked, strict=True):
                self.check(at, future.result()[0].text)

    def refused(self) -> None:
        """A request that cannot be served."""
        settings = dict(self.random.choice(REFUSED))
        try:
            self.model.generate(settings.pop("prompts"), **settings)
        except EngineError:
            return
        raise AssertionError(f"served: {settings}")

    def memory(self) -> int:
        """Bytes of the process; on a GPU also torch's memory there."""
        device = self.model.decoder.weights.device
        taken = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        return psutil.Process().memory_info().rss + taken

    def run(self, seconds: float) -> tuple[int, int]:
        """Bytes after the first fifth of the time and at the end."""
        acts: list[Callable[[], None]] = [self.batch, self.streams, self.threads, self.refused]
        begin, early = time.monotonic(), 0
        while (passed := time.monotonic() - begin) < seconds:
            self.random.choice(acts)()
            if not early and passed > seconds / 5:
                early = self.memory()
        return early, self.memory()


@click.command(help=__doc__.splitlines()[0])
@click.option("--minutes", type=float, default=60.0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(minutes: float, device: str, seed: int) -> None:
    """One run over a tiny model; exit status 1 if memory grew."""
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(engine.load(save_family("llama", Path(directory)), device, context=128), seed)
        early, late = soak.run(60 * minutes)
    flat = late <= early + GROWTH
    verdict = "flat" if flat else "GREW"
    click.echo(f"{soak.checked} texts equal in {minutes} minutes; memory {early >> 20} to {late >> 20} MiB: {verdict}")
    raise SystemExit(0 if flat else 1)


if __name__ == "__main__":
    main()
