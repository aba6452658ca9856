"""The engine: a decoder with its tokenizer and caches."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.arguments import typed
from lowbit.engine.beam import run_beams
from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.drafting import Drafting, run_drafted
from lowbit.engine.drafts.heads import MOST, Head
from lowbit.engine.drafts.suffix import Suffixes
from lowbit.engine.drafts.widths import MOST_SEQUENCES
from lowbit.engine.generate import run_batch
from lowbit.engine.options import Options
from lowbit.engine.passes import Reader
from lowbit.engine.prefill import shortage
from lowbit.engine.request import Request
from lowbit.engine.sampler import features_of
from lowbit.engine.sampling import LONGEST_BAD_WORD, Completion, Piece, Sampling
from lowbit.engine.workspace import Workspace, Workspaces
from lowbit.errors import CheckpointError, EngineError
from lowbit.models.chat import render_chat
from lowbit.models.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class Engine:
    """A loaded model. Any number of calls and threads may run at a time. An error leaves it usable."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        options: Options,
        head: Head | None = None,
    ) -> None:
        """`head` is that of a drafter, whose taps the decoder has."""
        self.decoder, self.tokenizer, self.options, self.head = decoder, tokenizer, options, head
        self.spaces, self.lock = Workspaces(decoder, options, head), threading.Lock()
        self.words = threading.Lock()  # of the tokenizer: a prompt is encoded while a step runs

    @typed(EngineError)
    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, **changes: Any
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids). `sampling` is for all or one per prompt; `changes` override its
        fields.

        EngineError for an invalid prompt or setting; the engine stays usable.
        """
        requests = self.requests(prompts, sampling, **changes)
        for _ in self.serve(requests):
            pass
        return [request.completion() for request in requests]

    @typed(EngineError)
    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, **changes: Any
    ) -> Iterator[Piece]:
        """The results of `generate`, token by token. The iterator may be abandoned at any point."""
        return self.serve(self.requests(prompts, sampling, **changes))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling | None = None, **changes: Any
    ) -> Completion:
        """The assistant's answer to a conversation, using the model's chat template.

        messages  [{"role": "user", "content": "..."}]
        """
        [answer] = self.generate(self.encode_chat(messages), sampling, **changes)
        return answer

    @typed(EngineError)
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt."""
        return self._tokens(text, add_special_tokens)

    @typed(EngineError)
    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation in the model's chat template, up to the start of the assistant's turn.

        messages  [{"role": "user", "content": "..."}]
        tools     functions that the model may call: [{"type": "function", "function": {"name": ...}}]
        variables  more of the template's variables, such as enable_thinking
        EngineError if the template rejects the messages, or exceeds its limits of time or memory.
        """
        tokenizer = self.require_tokenizer()
        if not tokenizer.chat_template:
            raise EngineError("the model has no chat template: give it a plain prompt")
        try:
            text = render_chat(tokenizer, messages, tools, add_generation_prompt=True, variables=variables)
        except CheckpointError as error:
            raise EngineError(str(error)) from error
        return self._tokens(text, add_special_tokens=False)

    def _tokens(self, text: str, add_special_tokens: bool) -> list[int]:
        """The token ids of `text`. EngineError for half a surrogate pair, which a terminal may pass for invalid
        bytes."""
        tokenizer = self.require_tokenizer()
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EngineError(
                f"character {error.start} of {text[:60]!r} is half a surrogate pair, not valid Unicode"
            ) from error
        with self.words:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. EngineError if the model has none."""
        if self.tokenizer is None:
            raise EngineError("the model has no tokenizer that can be loaded: give token ids instead of strings")
        return self.tokenizer

    def requests(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None, **changes: Any
    ) -> list[Request]:
        """The prompts with their settings, all checked before anything is computed."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        each: list[Any] = [prompts] if single else list(prompts)
        if not each:
            raise EngineError("no prompt: give at least one")
        settings = list(sampling) if isinstance(sampling, Sequence) else [sampling or Sampling()] * len(each)
        if len(settings) != len(each):
            raise EngineError(f"{len(each)} prompts and {len(settings)} samplings: give one for all, or one each")
        try:
            settings = [replace(one, **changes) for one in settings]
        except TypeError as error:
            raise EngineError(f"{error}; a Sampling has {', '.join(Sampling.__dataclass_fields__)}") from error
        return [self.request(i, prompt, one) for i, (prompt, one) in enumerate(zip(each, settings, strict=True))]

    def request(self, index: int, prompt: Prompt, sampling: Sampling) -> Request:
        """One prompt with its settings."""
        tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.check_prompt(tokens, room=1)
        vocabulary = self.decoder.architecture.vocabulary
        for kind, tokens_given in (("stop", sampling.stop_tokens), ("biased", [token for token, _ in sampling.bias])):
            wrong = next((token for token in tokens_given if not 0 <= token < vocabulary), None)
            if wrong is not None:
                raise EngineError(f"{kind} token {wrong} is none of the model's {vocabulary}")
        if sampling.stop:
            self.require_tokenizer()
        room, short = self.options.context - len(tokens), self.decoder.short
        words = self.bad_words(sampling)
        request = Request(index, tokens, sampling, words, self.options.stop_tokens, self.tokenizer, room, short)
        if sampling.beams > 1 and request.short is not None:
            raise EngineError(
                f"{len(tokens)} tokens and {request.most} more pass position {short}, where this model's rope changes: "
                f"beam search does not; ask for at most {request.short + 1 - len(tokens)} tokens"
            )
        return request

    def bad_words(self, sampling: Sampling) -> tuple[tuple[int, ...], ...]:
        """The bad words as tokens; a string is tokenized with and without a space before it."""
        words: list[tuple[int, ...]] = []
        for word in sampling.bad_words:
            if not isinstance(word, str):
                words.append(tuple(word))
                continue
            forms = [self._tokens(form, add_special_tokens=False) for form in (word, f" {word}")]
            words += [tuple(tokens) for tokens in forms if tokens]
        for tokens in words:
            if len(tokens) > LONGEST_BAD_WORD:
                raise EngineError(f"bad word {tokens} has {len(tokens)} tokens; at most {LONGEST_BAD_WORD} are watched")
        vocabulary = self.decoder.architecture.vocabulary
        for token in (token for tokens in words for token in tokens if not 0 <= token < vocabulary):
            raise EngineError(f"token {token} of a bad word is none of the model's {vocabulary}")
        return tuple(dict.fromkeys(words))

    def serve(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """The pieces of all requests. Only one piece is computed at a time, for all threads."""
        with self.spaces.lent() as space:
            pieces = self.pieces(requests, space)
            while (piece := self.advance(pieces, requests)) is not None:
                yield piece

    def advance(self, pieces: Iterator[Piece], requests: Sequence[Request]) -> Piece | None:
        """The next piece, or None after the last. EngineError if memory is short."""
        with self.lock, torch.inference_mode():
            try:
                return next(pieces, None)
            except torch.OutOfMemoryError as error:
                raise EngineError(f"{len(requests)} sequences do not fit: {shortage(error)}") from None

    def pieces(self, requests: Sequence[Request], space: Workspace) -> Iterator[Piece]:
        """The pieces of all requests: plain ones and those with drafts in batches, those with beams one by one."""
        waiting = [request for request in requests if request.sampling.beams == 1 and not self.drafts_of(request)]
        while waiting:
            batch = waiting[: self.options.batch]
            features = features_of([request.constraints for request in batch])
            runner = space.runner(len(batch), len(batch), longest(batch), features)
            assert runner.sampler is not None
            yield from run_batch(runner, runner.sampler, batch)
            waiting = [request for request in batch if request.finish_reason is None] + waiting[len(batch) :]
        for request in requests:
            beams = request.sampling.beams
            if beams > 1:
                sampler = space.sampler(features_of([request.constraints]), beams)
                yield from run_beams(space.runner(beams, beams, longest([request])), sampler, request)
        yield from self.drafted(requests, space)

    def drafted(self, requests: Sequence[Request], space: Workspace) -> Iterator[Piece]:
        """The pieces of the requests with drafts, in batches."""
        waiting = [request for request in requests if self.drafts_of(request)]
        while waiting:
            batch = waiting[:MOST_SEQUENCES]
            space.roomy_reader(len(batch), longest(batch))
            looked_up = all(request.sampling.lookup for request in batch)
            drafter = Suffixes() if looked_up else space.drafter()
            yield from run_drafted(Drafting(space, drafter, max(map(self.drafts_of, batch))), batch)
            waiting = [request for request in batch if request.finish_reason is None] + waiting[len(batch) :]

    def drafts_of(self, request: Request) -> int:
        """The most drafts of a step for a request; 0 for none."""
        sampling = request.sampling
        if sampling.lookup or self.head is None or sampling.beams > 1:
            return sampling.lookup
        return MOST if sampling.drafts is None else sampling.drafts

    @torch.inference_mode()
    @typed(EngineError)
    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, T, vocabulary) float32 for token ids (B, T). Row t predicts the token after tokens 0 to t.

        EngineError if T exceeds the engine's context, or if an id is not in the vocabulary.
        """
        if isinstance(ids, Tensor) and (ids.ndim != 2 or ids.is_floating_point()):
            raise EngineError(f"token ids of shape (B, T) are needed, not {ids.dtype} of shape {list(ids.shape)}")
        rows = ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]
        if not rows or len({len(row) for row in rows}) != 1:
            raise EngineError(f"token ids of shape (B, T) are needed, not {len(rows)} rows of different lengths")
        for row in rows:
            self.check_prompt(row)
        with self.spaces.lent() as space, self.lock:
            try:
                return self.read_logits(rows, space.roomy_reader(1, len(rows[0])))
            except torch.OutOfMemoryError as error:
                asked = f"logits of {len(rows)} x {len(rows[0])} tokens"
                raise EngineError(f"{asked} do not fit: {shortage(error)}") from None

    def read_logits(self, rows: list[list[int]], reader: Reader) -> Tensor:
        """Logits (B, T, vocabulary) float32 for rows of equal length, each computed as the cache's sequence 0."""
        shape = len(rows), len(rows[0]), self.decoder.architecture.vocabulary
        logits = torch.empty(shape, dtype=torch.float32, device=self.decoder.weights.device)
        for row, into in zip(rows, logits, strict=True):
            start = 0
            for hidden in reader.read(0, row):
                into[start : start + len(hidden)] = self.decoder.logits(hidden)
                start += len(hidden)
        return logits

    def check_prompt(self, prompt: Sequence[int], room: int = 0) -> None:
        """EngineError for a prompt that is empty, too long for the context, or has ids outside the vocabulary."""
        vocabulary, context = self.decoder.architecture.vocabulary, self.options.context
        if not prompt:
            raise EngineError("the prompt is empty: give it at least one token")
        if len(prompt) + room > context:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens, the engine's context is {context}: load it with a larger "
                "context, or shorten the prompt"
            )
        wrong = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise EngineError(f"token {wrong} is none of the model's {vocabulary}")


def longest(requests: Sequence[Request]) -> int:
    """The most positions that any of the requests may need."""
    return max(len(request.prompt) + request.most for request in requests)
