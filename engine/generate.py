"""The generation loop: from prompts to pieces of text, one batch of requests at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit.engine.decoder import Decoder
from lowbit.engine.passes import Reader
from lowbit.engine.request import Request, token_logprob
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import Chosen, Sampler
from lowbit.engine.sampling import Piece, TokenLogprob

SCORED_ROWS = 256  # prompt positions with logits in memory at a time


def run_batch(runner: Runner, sampler: Sampler, requests: Sequence[Request]) -> Iterator[Piece]:
    """Serve `requests`, one per row of the runner, until each is finished or must be read again."""
    cache = runner.cache
    yield from begin_batch(runner.reader, sampler, requests)
    runner.place(
        [request.tokens[-1] for request in requests],
        [len(request.sequence) - 1 for request in requests],
        [cache.start(b) for b in range(len(requests))],
    )
    for chosen in runner.steps(max(request.left for request in requests)):
        yield from deliver(requests, chosen)
        if not any(request.left for request in requests):
            return


def begin_batch(reader: Reader, sampler: Sampler, requests: Sequence[Request]) -> Iterator[Piece]:
    """Read the sequences of `requests` into the cache, and write the first token of each."""
    for request in requests:
        request.begin()
    sampler.start([request.constraints for request in requests])
    yield from deliver(requests, sampler(read_prompts(reader, requests)))


def deliver(requests: Sequence[Request], chosen: Chosen) -> Iterator[Piece]:
    """Pass a step's tokens to the requests that still need one."""
    for row, (request, token) in enumerate(zip(requests, chosen.tokens.tolist(), strict=True)):
        if request.left:
            if chosen.logprobs is not None and chosen.top is not None:
                request.note(token, chosen.logprobs[row], chosen.top[row])
            yield request.take([token])


def read_prompts(reader: Reader, requests: Sequence[Request]) -> Tensor:
    """Logits (B, vocabulary) after each sequence. Also sets the prompts' log-probabilities if requested."""
    if not any(request.wants_prompt_logprobs for request in requests):
        return reader.last_logits([request.sequence for request in requests])
    rows = []
    for sequence, request in enumerate(requests):
        scores, last = scored_prompt(reader, sequence, request.sequence, request.sampling.logprobs or 0)
        if request.wants_prompt_logprobs:
            request.prompt_logprobs = scores
        rows.append(last)
    return torch.stack(rows)


def scored_prompt(
    reader: Reader, sequence: int, prompt: Sequence[int], wanted: int
) -> tuple[list[TokenLogprob], Tensor]:
    """The log-probabilities of all prompt tokens but the first, and the logits (vocabulary) after the last."""
    scores: list[TokenLogprob] = []
    logits = torch.empty(0)
    for hidden in reader.read(sequence, prompt):
        logits = score_rows(reader.decoder, hidden, prompt, wanted, scores)
    return scores, logits


def score_rows(
    decoder: Decoder, hidden: Tensor, prompt: Sequence[int], wanted: int, scores: list[TokenLogprob]
) -> Tensor:
    """The logits (vocabulary) of the last of the prompt's next rows. Appends the log-probabilities that these rows
    give to the tokens after them to `scores`, which has those of the rows before."""
    logits = torch.empty(0)
    for rows in hidden.split(SCORED_ROWS):
        logits = decoder.logits(rows)
        logprobs = logits.log_softmax(-1)
        best, top = logprobs.topk(min(wanted, logprobs.shape[1]))
        first = len(scores) + 1
        for row, token in enumerate(prompt[first : first + len(rows)]):
            own = logprobs[row, token].view(1)
            scores.append(token_logprob(token, torch.cat([own, best[row]]), top[row], wanted))
    return logits[-1]
