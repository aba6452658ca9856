"""One request: its prompt and sampling, the tokens so far, and its end."""

import secrets
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lowbit.engine.sampler import Constraints
from lowbit.engine.sampling import Completion, Piece, Sampling, TokenLogprob
from lowbit.engine.text import TextStream
from lowbit.models.tokenizer import Tokenizer


class DraftCounts:
    """For each place in a step's drafts: how many were checked there, and how many were right."""

    def __init__(self) -> None:
        self.checked: list[int] = []
        self.right: list[int] = []

    def note(self, checked: int, right: int) -> None:
        """Count one step."""
        missing = [0] * (checked - len(self.checked))
        self.checked, self.right = self.checked + missing, self.right + missing
        for place in range(checked):
            self.checked[place] += 1
            self.right[place] += place < right


class Request:
    """A prompt with its sampling.

    room   most tokens to generate
    short  position after which the ropes change (longrope): the sequence is then read again; None: never
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        sampling: Sampling,
        words: tuple[tuple[int, ...], ...],
        stop_tokens: tuple[int, ...],
        tokenizer: Tokenizer | None,
        room: int,
        short: int | None = None,
    ) -> None:
        own = () if sampling.ignore_eos else stop_tokens
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        self.index, self.prompt, self.sampling = index, list(prompt), sampling
        self.fresh = Constraints(sampling, seed, self.prompt, (*own, *sampling.stop_tokens), words)
        self.most = min(sampling.max_new_tokens, room)
        self.short = None if short is None or len(prompt) > short or len(prompt) + self.most <= short + 1 else short
        self.goal = self.most
        self.stream = TextStream(tokenizer, sampling.stop, self.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.finish_reason: str | None = None
        self.steps = 0
        self.drafts = DraftCounts()
        self.score: float | None = None

    @property
    def sequence(self) -> list[int]:
        """The prompt and the generated tokens."""
        return self.prompt + self.tokens

    @property
    def constraints(self) -> Constraints:
        """The sampler's input for this request, at its start or after a restart."""
        return replace(self.fresh, written=tuple(self.tokens))

    @property
    def left(self) -> int:
        """Tokens still to generate before the sequence is finished or read again."""
        return 0 if self.finish_reason else self.goal - len(self.tokens)

    @property
    def before_turn(self) -> bool:
        """True if the sequence has not reached `short` yet, but may."""
        return self.short is not None and len(self.sequence) <= self.short

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True if the prompt's log-probabilities were requested and are not known yet."""
        return self.sampling.prompt_logprobs and self.prompt_logprobs is None

    def begin(self) -> None:
        """Set the goal: the length that one reading of the sequence allows."""
        self.goal = self.most
        if self.short is not None and self.before_turn:
            self.goal = self.short + 1 - len(self.prompt)

    def take(self, tokens: Sequence[int], steps: int = 1) -> Piece:
        """Append the tokens of a step, up to one that ends the request."""
        text, taken = "", 0
        self.steps += steps
        for token in tokens:
            self.tokens.append(token)
            taken += 1
            if token in self.fresh.stop_tokens:
                self.finish_reason = "stop"
            else:
                text += self.stream.push(token, len(self.tokens) > self.sampling.min_new_tokens)
                if self.stream.stopped:
                    self.finish_reason = "stop"
                elif len(self.tokens) >= self.most:
                    self.finish_reason = "length"
            if self.finish_reason:
                text += self.stream.finish()
                break
        return Piece(self.index, text, tuple(tokens[:taken]), self.finish_reason)

    def end(self, piece: Piece) -> Piece:
        """The last piece, with the rest of the text, of a request that ends before its own limits."""
        self.finish_reason = "stop"
        return replace(piece, text=piece.text + self.stream.finish(), finish_reason="stop")

    def note(self, token: int, logprobs: Tensor, top: Tensor) -> None:
        """Record log-probabilities of a token and its likeliest alternatives: logprobs (1 + n), top (n)."""
        wanted = self.sampling.logprobs
        if wanted is not None:
            self.logprobs.append(token_logprob(token, logprobs, top, wanted))

    def completion(self) -> Completion:
        """The finished request's result."""
        assert self.finish_reason is not None
        return Completion(
            text=self.stream.text,
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt),
            seed=self.fresh.seed,
            steps=self.steps,
            drafts=tuple(zip(self.drafts.checked, self.drafts.right, strict=True)),
            logprobs=tuple(self.logprobs) if self.sampling.logprobs is not None else None,
            prompt_logprobs=None if self.prompt_logprobs is None else tuple(self.prompt_logprobs),
            score=self.score,
        )


def token_logprob(token: int, logprobs: Tensor, top: Tensor, wanted: int) -> TokenLogprob:
    """A token's log-probability, and those of the first `wanted` alternatives."""
    alternatives = dict(zip(top[:wanted].tolist(), logprobs[1 : wanted + 1].tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[0]), alternatives)
