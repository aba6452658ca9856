"""Reading prompts: one sequence at a time, in chunks, so that no tensor grows with the square of the prompt."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit.engine.cache import Cache
from lowbit.engine.decoder import Decoder, make_step

CHUNK = 4096  # rows that go through the layers together; docs/LOG.md, section 31


def read_prompt(
    decoder: Decoder, cache: Cache, sequence: int, tokens: Sequence[int], start: int = 0, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Hidden states (rows, hidden) chunk by chunk; the cache then holds positions start to start + len(tokens)."""
    device = decoder.weights.device
    ids = torch.tensor(list(tokens), dtype=torch.int64, device=device)
    for first in range(0, len(ids), chunk):
        part = ids[first : first + chunk]
        begin = start + first
        positions = torch.arange(begin, begin + len(part), device=device)
        starts = torch.full_like(positions, cache.start(sequence))
        yield decoder.hidden(make_step(part, positions, starts, (sequence, begin + len(part))), cache).h


def last_logits(decoder: Decoder, cache: Cache, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits (len(prompts), vocabulary) after each prompt's last token; prompt b becomes sequence b of the cache."""
    rows = []
    for sequence, prompt in enumerate(prompts):
        *_, last = read_prompt(decoder, cache, sequence, prompt)
        rows.append(last[-1:])
    return decoder.logits(torch.cat(rows))
