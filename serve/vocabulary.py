"""Tokens as text and bytes, for log-probabilities."""

import json
from collections.abc import Iterable, Sequence
from copy import copy
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer

from lowbit.engine.engine import Engine
from lowbit.engine.sampling import TokenLogprob
from lowbit.models.tokenizer import Tokenizer
from lowbit.serve.trial import Trial


class Vocabulary:
    """The tokens of an engine's model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @cached_property
    def masks(self) -> LLTokenizer | None:
        """The vocabulary as masks of grammars need it; None if the model has no tokenizer that llguidance reads."""
        if getattr(self.engine.tokenizer, "backend_tokenizer", None) is None:
            return None
        found = self._greeting()
        try:
            return LLTokenizer(found["tokenizer"], n_vocab=found["tokens"], eos_token=found["ends"])
        except ValueError:
            return None

    @cached_property
    def trial(self) -> Trial:
        """Processes that try grammars over this vocabulary."""
        return Trial(lambda: json.dumps(self._greeting()))

    def _greeting(self) -> dict[str, Any]:
        """The vocabulary as llguidance reads it."""
        tokenizer: Any = self.engine.require_tokenizer()
        plain = copy(tokenizer.backend_tokenizer)
        plain.no_padding()
        plain.no_truncation()
        ends = list(self.engine.options.stop_tokens) or tokenizer.eos_token_id
        tokens = self.engine.decoder.architecture.vocabulary
        return {"tokenizer": plain.to_str(), "tokens": tokens, "ends": ends}

    def literal(self, text: str) -> str:
        """A text in a grammar: the token that it is, or its characters."""
        tokenizer = self.engine.require_tokenizer()
        token = tokenizer.get_added_vocab().get(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        if self.masks is not None:
            return bytes(self.masks.decode_bytes([token]))
        tokenizer = self.engine.tokenizer
        return b"" if tokenizer is None else decoded(tokenizer, [token]).encode()

    def text_of(self, token: int) -> str:
        """A token's text; `bytes:` and its bytes in hexadecimal if they are no text."""
        found = self.bytes_of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def in_chat(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities in the form of chat completions."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self.text_of(token), "logprob": finite(logprob), "bytes": list(self.bytes_of(token))}

        return {
            "content": [
                entry(each.token, each.logprob)
                | {"top_logprobs": [entry(*alternative) for alternative in each.top.items()]}
                for each in logprobs
            ]
        }

    def in_text(self, logprobs: Iterable[TokenLogprob | int], offset: int) -> dict[str, list[Any]]:
        """Log-probabilities in the form of completions. A bare token is the first of a prompt, which has none.

        offset  characters before the first token
        """
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in logprobs:
            bare = isinstance(each, int)
            text = self.text_of(each if isinstance(each, int) else each.token)
            top = None if isinstance(each, int) else {self.text_of(t): finite(p) for t, p in each.top.items()}
            found["tokens"].append(text)
            found["token_logprobs"].append(None if isinstance(each, int) else finite(each.logprob))
            found["top_logprobs"].append(None if bare else top)
            found["text_offset"].append(offset)
            offset += len(text)
        return found


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(logprob, -9999.0)


def decoded(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones included."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
