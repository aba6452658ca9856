"""Requests and their results: sampling settings, pieces and completions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowbit.arguments import require_types
from lowbit.errors import EngineError

LONGEST_BAD_WORD = 8  # tokens
MOST_LOGPROBS = 100  # alternatives of a token
LEAST_TEMPERATURE = 1e-30  # but for 0: a logit divided by less is beyond float32, and all would be alike


@dataclass(frozen=True)
class Sampling:
    """Settings for the continuation of a prompt. The defaults are greedy decoding without penalties.

    temperature         0 is greedy
    top_k, top_p, min_p sample from the k likeliest tokens; from the smallest set with total probability p; from tokens
    with at least p times the likeliest's probability. Applied in this order, each to the rest of the one before
    repetition_penalty  divides positive and multiplies negative logits of tokens in prompt or output
    presence_penalty    subtracted from the logits of tokens in the output; frequency_penalty once per occurrence
    bias                (token, added to its logit) pairs: -100 bans a token, 100 all others
    min_new_tokens      before it, stop tokens are not chosen, and stop strings do not end the text
    stop, stop_tokens   strings (not part of the text) and tokens that end the text, besides the model's own stop tokens
    ignore_eos          True: the model's own stop tokens do not end the text
    bad_words           sequences of tokens to avoid; a string is tokenized alone and after a space. The same letters
                        may still appear through other tokens, as a part of a longer word
    seed                same seed, same tokens, whatever else is in the batch; None for a random one
    beams               number of beams of beam search; length_penalty is its exponent of the length
    logprobs            number of alternatives with log-probabilities, besides each generated token; None for none
    prompt_logprobs     True for the log-probability of each token of the prompt but the first
    drafts              most draft tokens per step of the engine's drafter; None for as many as pay, 0 for none
    lookup              most draft tokens per step, looked up in the text so far. They change no token
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Sequence[tuple[int, float]] = ()
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    ignore_eos: bool = False
    bad_words: Sequence[str | Sequence[int]] = ()
    seed: int | None = None
    beams: int = 1
    length_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    lookup: int = 0
    drafts: int | None = None

    def __post_init__(self) -> None:
        require_types(vars(self), Sampling, EngineError)
        reason = self.reason_against()
        if reason:
            raise EngineError(reason)

    def reason_against(self) -> str | None:
        """The reason why these settings are invalid, or None."""
        ranges = {
            "max_new_tokens": (self.max_new_tokens, 1, math.inf),
            "min_new_tokens": (self.min_new_tokens, 0, self.max_new_tokens),
            "temperature": (self.temperature, 0, 100),
            "top_k": (self.top_k, 0, math.inf),
            "top_p": (self.top_p, 1e-6, 1),
            "min_p": (self.min_p, 0, 1),
            "repetition_penalty": (self.repetition_penalty, 1e-3, 1e3),
            "presence_penalty": (self.presence_penalty, -100, 100),
            "frequency_penalty": (self.frequency_penalty, -100, 100),
            "beams": (self.beams, 1, 64),
            "logprobs": (self.logprobs or 0, 0, MOST_LOGPROBS),
            "lookup": (self.lookup, 0, 7),
            "drafts": (self.drafts or 0, 0, 7),
            "seed": (self.seed or 0, -(1 << 63), (1 << 63) - 1),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:  # false for a NaN
                return f"{name} is {value}: it must lie between {low} and {high}"
        if 0 < self.temperature < LEAST_TEMPERATURE:
            return f"temperature is {self.temperature}: it must be 0, or at least {LEAST_TEMPERATURE}"
        for token, value in self.bias:
            if not -100 <= value <= 100:
                return f"the bias of token {token} is {value}: it must lie between -100 and 100"
        for name, words in (("stop", self.stop), ("bad_words", self.bad_words)):
            if not isinstance(words, tuple | list) or not all(words):
                return f"{name} is {words!r}: a list of strings that are not empty is needed"
        blank = next((word for word in self.bad_words if isinstance(word, str) and not word.strip()), None)
        if blank is not None:
            return f"bad word {blank!r} is white space, which stands within most tokens: give tokens instead"
        if self.lookup and self.beams > 1:
            return f"beam search checks no drafts: leave out lookup, which is {self.lookup}, or the {self.beams} beams"
        if self.beams > 1 and (self.temperature or self.logprobs is not None):
            return "beam search samples nothing and keeps no logprobs: leave temperature at 0 and logprobs out"
        return None

    @property
    def penalized(self) -> bool:
        """True if generated, forbidden or biased tokens change the logits."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not neutral or bool(self.bad_words) or bool(self.bias) or self.min_new_tokens > 0

    @property
    def truncated(self) -> bool:
        """True if unlikely tokens are left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability before penalties and temperature, and those of the likeliest alternatives."""

    token: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """The result of one step for one request: final text, tokens, and the reason if it ended."""

    request: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None = None


@dataclass(frozen=True)
class Completion:
    """A finished request.

    text             without stop strings and special tokens
    tokens           all generated tokens, including a stop token
    finish_reason    "stop", or "length" at max_new_tokens or the engine's context
    steps            number of decode steps: fewer than tokens if drafts were accepted
    drafts           (checked, right) by place in a step's drafts
    score            beam search only: the sum of log-probabilities / length^length_penalty
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    seed: int
    steps: int
    drafts: tuple[tuple[int, int], ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
