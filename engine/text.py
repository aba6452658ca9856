"""Incremental detokenization: whole characters only, and nothing that may still become a stop string."""

from collections.abc import Sequence

from lowbit.models.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # a tokenizer's text for an incomplete character
CONTEXT = 5  # tokens decoded together with new ones: some tokenizers' text depends on neighbouring tokens


class TextStream:
    """The text of one request. `text` is all text so far, cut at a stop string."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens = list(prompt[-CONTEXT:])
        self.decoded = len(self.tokens)  # tokens of the prompt, and those with their text in `text`
        self.text = ""
        self.given = 0  # number of characters of `text` that were returned
        self.ignored = 0  # number of characters of `text` in which a stop string is ignored
        self.stopped = False
        self.hidden: frozenset[int] | None = None  # tokens left out of the text; None for all special ones

    def push(self, token: int, stopping: bool = True) -> str:
        """Add a token, return the text that is now final. With `stopping` False, stop strings in its text are
        ignored."""
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
        """The tokenizer's text for `tokens`."""
        assert self.tokenizer is not None
        special = self.hidden is None
        kept = tokens if self.hidden is None else [token for token in tokens if token not in self.hidden]
        return str(self.tokenizer.decode(kept, skip_special_tokens=special, clean_up_tokenization_spaces=False))

    def release(self) -> str:
        """The final part of `text`: up to a stop string, or up to a possible beginning of one."""
        places = (self.text.find(stop, max(self.ignored + 1 - len(stop), 0)) for stop in self.stop)
        found = [at for at in places if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.hand_out(len(self.text))
        held = max((overlap(self.text, stop) for stop in self.stop), default=0)
        return self.hand_out(len(self.text) - held)

    def hand_out(self, end: int) -> str:
        """The text from the last returned character up to `end`."""
        new, self.given = self.text[self.given : end], max(end, self.given)
        return new

    def finish(self) -> str:
        """The rest: bytes that never became a character, and text held back for a stop string."""
        if self.tokenizer is not None and not self.stopped and self.decoded < len(self.tokens):
            before = self.tokens[max(self.decoded - CONTEXT, 0) : self.decoded]
            self.text += self.decode(before + self.tokens[self.decoded :])[len(self.decode(before)) :]
            self.decoded = len(self.tokens)
        return self.hand_out(len(self.text))


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
