"""Prefill: prompts are read one sequence at a time, in chunks, so that no tensor grows with the square of the
prompt."""

import re
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from lowbit.engine.cache import Cache
from lowbit.engine.decoder import Decoder
from lowbit.engine.step import Step
from lowbit.errors import EngineError

CHUNK = 8192  # rows per pass through the layers; docs/kernels/wna16_dequantize.md has the times
LEAST = 128  # smallest chunk if memory is short


def read_prompt(
    decoder: Decoder, cache: Cache, sequence: int, tokens: Sequence[int], chunk: int = CHUNK, end: bool = False
) -> Iterator[Tensor]:
    """Hidden states (rows, hidden), chunk by chunk. Afterwards the cache holds the sequence's first len(tokens)
    positions.

    end  True: of the chunk that ends the prompt, the last row alone
    """
    first = 0
    while first < len(tokens):
        hidden = read_chunk(decoder, cache, sequence, tokens, (first, chunk), end)
        yield hidden
        if end and len(hidden) == 1 and first + chunk >= len(tokens):
            return  # a chunk that was cut for want of memory has more rows
        first, chunk = first + len(hidden), len(hidden)


def read_chunk(
    decoder: Decoder, cache: Cache, sequence: int, tokens: Sequence[int], part: tuple[int, int], end: bool = False
) -> Tensor:
    """Hidden states (rows, hidden) of one chunk of a prompt: `chunk_by_layers` to its end."""
    work = chunk_by_layers(decoder, cache, sequence, tokens, part, end)
    while True:
        try:
            next(work)
        except StopIteration as end:
            hidden: Tensor = end.value
            return hidden


def chunk_by_layers(
    decoder: Decoder, cache: Cache, sequence: int, tokens: Sequence[int], part: tuple[int, int], end: bool = False
) -> Generator[None, None, Tensor]:
    """A generator that computes one chunk of a prompt, with a pause after each layer, and returns the hidden states
    (rows, hidden). The cache holds the positions before it.

    part  the chunk's first position, and its most rows: there are fewer at the prompt's end, and if memory is short
    end   True: of a chunk that ends the prompt, the last row alone is returned
    """
    (first, rows), device = part, decoder.weights.device
    while True:
        ids = torch.tensor(list(tokens[first : first + rows]), dtype=torch.int64, device=device)
        positions = torch.arange(first, first + len(ids), device=device)
        starts = torch.full_like(positions, cache.start(sequence))
        turns, slots = decoder.turns_at(positions, len(tokens)), starts + positions
        prefix = cache.prefix(sequence, first + len(ids))
        ends = end and first + len(ids) == len(tokens) and not decoder.taps_last
        wanted = torch.tensor([len(ids) - 1], device=device) if ends else None
        step = Step(ids, positions, turns, starts, slots, prefix=prefix, wanted=wanted)
        hidden = yield from hidden_if_it_fits(decoder, step, cache, first)
        if hidden is not None:
            return hidden
        rows = len(ids) // 2


def hidden_if_it_fits(decoder: Decoder, step: Step, cache: Cache, first: int) -> Generator[None, None, Tensor | None]:
    """A generator with a pause after each layer, which returns the rows' hidden states, or None if memory is short and
    fewer rows may fit. EngineError if even LEAST rows do not fit.

    first  position of the first row
    """
    try:
        for hidden in decoder.layers(step, cache):
            last = hidden
            yield
        return last.h
    except torch.OutOfMemoryError as error:
        if len(step.tokens) >= 2 * LEAST:
            return None
        raise EngineError(
            f"a prompt does not fit: {len(step.tokens)} of its tokens after {first}: {shortage(error)}"
        ) from None


def shortage(error: torch.OutOfMemoryError) -> str:
    """The requested and free memory from torch's error, with advice."""
    said = re.search(r"Tried to allocate ([\d.]+ \w+).*?([\d.]+ \w+) is free", " ".join(str(error).split()))
    numbers = f"{said[1]} more were asked for, {said[2]} are free" if said else "the device has no memory left"
    return f"{numbers}; shorten the prompts, serve fewer at once, or load with a smaller context or cache='int8'"
