"""Tokens to text as they come: characters that are whole, and nothing that may yet become a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer makes of bytes that are no whole character yet
CONTEXT = 5  # tokens before new ones that are decoded with them: some tokenizers write a token by its neighbours


class TextStream:
    """The text of one request. `text` is all so far, without what follows a stop string."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens = list(prompt[-CONTEXT:])
        self.decoded = len(self.tokens)  # the prompt's, and those whose text is in `text`
        self.text = ""
        self.given = 0  # characters of `text` that were handed out
        self.ignored = 0  # characters of `text` in which a stop string may end
        self.stopped = False

    def push(self, token: int, stopping: bool = True) -> str:
        """Takes a token, gives the text that is now final. Not `stopping`: a stop string may end in its text."""
        self.tokens.append(token)
        if self.tokenizer is None or self.stopped:
            return ""
        before = self.tokens[max(self.decoded - CONTEXT, 0) : self.decoded]
        known, whole = self.decode(before), self.decode(before + self.tokens[self.decoded :])
        if whole.endswith(UNFINISHED) or len(whole) < len(known):
            return ""
        self.decoded = len(self.tokens)
        self.text += whole[len(known) :]
        if not stopping:
            self.ignored = len(self.text)
        return self.release()

    def decode(self, tokens: list[int]) -> str:
        """The tokenizer's text of `tokens`."""
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def release(self) -> str:
        """What of `text` is final: up to a stop string, or to what may be the beginning of one."""
        places = (self.text.find(stop, max(self.ignored + 1 - len(stop), 0)) for stop in self.stop)
        found = [at for at in places if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.hand_out(len(self.text))
        held = max((overlap(self.text, stop) for stop in self.stop), default=0)
        return self.hand_out(len(self.text) - held)

    def hand_out(self, end: int) -> str:
        """The text from where it was last handed out up to `end`."""
        new, self.given = self.text[self.given : end], max(end, self.given)
        return new

    def finish(self) -> str:
        """The rest: bytes that never became a character, and what was held back."""
        if self.tokenizer is not None and not self.stopped and self.decoded < len(self.tokens):
            before = self.tokens[max(self.decoded - CONTEXT, 0) : self.decoded]
            self.text += self.decode(before + self.tokens[self.decoded :])[len(self.decode(before)) :]
            self.decoded = len(self.tokens)
        return self.hand_out(len(self.text))


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
