"""Prefill: prompts are read one sequence at a time, in chunks, so that no tensor grows with the square of the
prompt."""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit.engine.cache import Cache
from lowbit.engine.decoder import Decoder
from lowbit.engine.step import Step
from lowbit.errors import EngineError

CHUNK = 4096  # rows per pass through the layers; docs/kernels/wna16_dequantize.md has the times
LEAST = 128  # smallest chunk if memory is short


def read_prompt(
    decoder: Decoder, cache: Cache, sequence: int, tokens: Sequence[int], start: int = 0, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Hidden states (rows, hidden), chunk by chunk. Afterwards the cache holds positions start to start +
    len(tokens)."""
    device = decoder.weights.device
    ids = torch.tensor(list(tokens), dtype=torch.int64, device=device)
    first = 0
    while first < len(ids):
        part = ids[first : first + chunk]
        begin = start + first
        positions = torch.arange(begin, begin + len(part), device=device)
        starts = torch.full_like(positions, cache.start(sequence))
        turns, slots = decoder.turns_at(positions, start + len(tokens)), starts + positions
        step = Step(part, positions, turns, starts, slots, prompt=(sequence, begin + len(part)))
        hidden = hidden_if_it_fits(decoder, step, cache)
        if hidden is None:
            chunk = len(part) // 2
            continue
        yield hidden
        first += len(part)


def hidden_if_it_fits(decoder: Decoder, step: Step, cache: Cache) -> Tensor | None:
    """The rows' hidden states, or None if memory is short and fewer rows may fit. EngineError if even LEAST rows do not
    fit."""
    try:
        return decoder.hidden(step, cache).h
    except torch.OutOfMemoryError as error:
        if len(step.tokens) >= 2 * LEAST:
            return None
        assert step.prompt is not None
        raise EngineError(
            f"a prompt does not fit: {len(step.tokens)} of its tokens after {step.prompt[1] - len(step.tokens)}: "
            f"{shortage(error)}"
        ) from None


def shortage(error: torch.OutOfMemoryError) -> str:
    """The requested and free memory from torch's error, with advice."""
    said = re.search(r"Tried to allocate ([\d.]+ \w+).*?([\d.]+ \w+) is free", " ".join(str(error).split()))
    numbers = f"{said[1]} more were asked for, {said[2]} are free" if said else "the device has no memory left"
    return f"{numbers}; shorten the prompts, serve fewer at once, or load with a smaller context or cache='int8'"


def last_logits(decoder: Decoder, cache: Cache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits (len(prompts), vocabulary) after each prompt's last token. Prompt b becomes sequence b of the cache."""
    rows = []
    for sequence, prompt in enumerate(prompts):
        *_, last = read_prompt(decoder, cache, sequence, prompt)
        rows.append(last[-1:])
    return decoder.logits(torch.cat(rows))
