"""An engine: a decoder, its tokenizer and its caches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lowbit.engine.beam import run_beams
from lowbit.engine.cache import Cache, cache_nbytes, make_cache
from lowbit.engine.decoder import Decoder
from lowbit.engine.generate import run_batch
from lowbit.engine.lookup import run_lookup
from lowbit.engine.prefill import read_prompt
from lowbit.engine.request import Request
from lowbit.engine.runner import Runner
from lowbit.engine.sampler import Features, Sampler, features_of
from lowbit.engine.sampling import LONGEST_BAD_WORD, Completion, Piece, Sampling
from lowbit.errors import EngineError
from lowbit.quant.kernels.decode_attention import SHORT

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Options:
    """How an engine serves.

    context      positions of a sequence
    int8_cache   keys and values with 8 bits
    stop_tokens  the model's own
    batch        requests served together; more are served in turn
    """

    context: int
    int8_cache: bool = False
    stop_tokens: tuple[int, ...] = ()
    batch: int = 16


class Engine:
    """A loaded model. One thread uses it at a time; an error leaves it as it was."""

    def __init__(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, options: Options) -> None:
        self.decoder, self.tokenizer, self.options = decoder, tokenizer, options
        self.cache: Cache | None = None
        self.runners: dict[tuple[int, Features | None, int], Runner] = {}

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, **changes: Any
    ) -> list[Completion]:
        """Continues each prompt (text, or token ids); `sampling` for all or one each, `changes` are fields of it.

        EngineError for a prompt or a setting that cannot be served; the engine stays usable.
        """
        requests = self.requests(prompts, sampling, **changes)
        for _ in self.serve(requests):
            pass
        return [request.completion() for request in requests]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, **changes: Any
    ) -> Iterator[Piece]:
        """What `generate` writes, as it is written. The iterator may be dropped at any piece."""
        return self.serve(self.requests(prompts, sampling, **changes))

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, as the tokenizer makes them."""
        return list(self.require_tokenizer()(text, verbose=False).input_ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation by the model's chat template, the assistant's turn begun.

        messages  [{"role": "user", "content": "..."}]
        """
        tokenizer = self.require_tokenizer()
        if not tokenizer.chat_template:
            raise EngineError("the model has no chat template: give it a plain prompt")
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. EngineError where the model came without one."""
        if self.tokenizer is None:
            raise EngineError("the model has no tokenizer that can be loaded: give token ids, and no strings")
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
        for token in sampling.stop_tokens:
            if not 0 <= token < vocabulary:
                raise EngineError(f"stop token {token} is none of the model's {vocabulary}")
        if sampling.stop:
            self.require_tokenizer()
        room = self.options.context - len(tokens)
        words = self.bad_words(sampling)
        return Request(index, tokens, sampling, words, self.options.stop_tokens, self.tokenizer, room)

    def bad_words(self, sampling: Sampling) -> tuple[tuple[int, ...], ...]:
        """The bad words as tokens; a string with and without a space before it, as a text may have it."""
        words: list[tuple[int, ...]] = []
        for word in sampling.bad_words:
            if not isinstance(word, str):
                words.append(tuple(word))
                continue
            tokenizer = self.require_tokenizer()
            forms = (tokenizer.encode(form, add_special_tokens=False) for form in (word, f" {word}"))
            words += [tuple(tokens) for tokens in forms if tokens]
        for tokens in words:
            if len(tokens) > LONGEST_BAD_WORD:
                raise EngineError(f"bad word {tokens} has {len(tokens)} tokens; at most {LONGEST_BAD_WORD} are watched")
        vocabulary = self.decoder.architecture.vocabulary
        for token in (token for tokens in words for token in tokens if not 0 <= token < vocabulary):
            raise EngineError(f"token {token} of a bad word is none of the model's {vocabulary}")
        return tuple(dict.fromkeys(words))

    @torch.inference_mode()
    def serve(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Pieces of all requests: plain ones in batches, those with beams or drafts one by one."""
        plain = [request for request in requests if request.sampling.beams == 1 and not request.sampling.lookup]
        for first in range(0, len(plain), self.options.batch):
            batch = plain[first : first + self.options.batch]
            features = features_of([request.constraints for request in batch])
            runner = self.runner(len(batch), len(batch), longest(batch), features)
            assert runner.sampler is not None
            yield from run_batch(runner, runner.sampler, batch)
        for request in requests:
            beams, drafts = request.sampling.beams, request.sampling.lookup
            if beams > 1:
                runner = self.runner(beams, beams, longest([request]))
                features = features_of([request.constraints])
                yield from run_beams(runner, self.sampler(features, beams), request)
            elif drafts:
                length = longest([request])
                yield from run_lookup(self.runner(1, 1, length), self.runner(1 + drafts, 1, length), request)

    def sampler(self, features: Features, rows: int) -> Sampler:
        """An empty sampler."""
        return Sampler(features, rows, self.decoder.architecture.vocabulary, self.decoder.weights.device)

    def runner(self, rows: int, batch: int, length: int, features: Features | None = None) -> Runner:
        """The runner of `rows` rows over a cache for `batch` sequences of at least `length` positions, kept.

        Sequences of up to SHORT positions have a runner of their own, whose attention is cut for them.
        """
        cache = self.roomy_cache(batch, length)
        reach = SHORT if length <= SHORT else cache.context
        key = rows, features, reach
        if key not in self.runners:
            sampler = None if features is None else self.sampler(features, rows)
            self.runners[key] = Runner(self.decoder, cache, rows, reach, sampler)
        return self.runners[key]

    def roomy_cache(self, batch: int, length: int) -> Cache:
        """The engine's cache, made anew where it is smaller than asked: on a GPU for the whole context at once."""
        if self.cache is None or self.cache.batch < batch or self.cache.context < length:
            self.cache = None
            self.runners.clear()  # their graphs hold the old cache's addresses
            on_gpu = self.decoder.weights.device.type == "cuda"
            self.cache = self.make_cache(batch, self.options.context if on_gpu else length)
        return self.cache

    @torch.inference_mode()
    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, T, vocabulary) float32 for token ids (B, T): row t is what follows tokens 0 to t.

        EngineError where T exceeds the engine's context, or where an id is no token.
        """
        rows = ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]
        if not rows or len({len(row) for row in rows}) != 1:
            raise EngineError(f"token ids of shape (B, T) are needed, not {len(rows)} rows of different lengths")
        for row in rows:
            self.check_prompt(row)
        cache, weights = self.roomy_cache(1, len(rows[0])), self.decoder.weights
        shape = len(rows), len(rows[0]), self.decoder.architecture.vocabulary
        logits = torch.empty(shape, dtype=torch.float32, device=weights.device)
        for row, into in zip(rows, logits, strict=True):
            start = 0
            for hidden in read_prompt(self.decoder, cache, 0, row):
                into[start : start + len(hidden)] = self.decoder.logits(hidden)
                start += len(hidden)
        return logits

    def check_prompt(self, prompt: Sequence[int], room: int = 0) -> None:
        """Raises EngineError for a prompt that is empty, too long for the context, or holds what is no token."""
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

    def make_cache(self, batch: int, context: int) -> Cache:
        """A cache for `batch` sequences. EngineError where the GPU has no room for it."""
        weights, architecture = self.decoder.weights, self.decoder.architecture
        need = cache_nbytes(architecture, batch, context, weights.dtype, self.options.int8_cache)
        if weights.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(weights.device)
            if need > free:
                raise EngineError(
                    f"{batch} sequences of {context} positions need {need / 2**30:.1f} GiB for keys and values, the "
                    f"GPU has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: use fewer sequences, a smaller "
                    "context, or cache='int8'"
                )
        return make_cache(architecture, batch, context, weights.dtype, self.options.int8_cache, weights.device)


def longest(requests: Sequence[Request]) -> int:
    """Positions that the longest of the requests may come to."""
    return max(len(request.prompt) + request.most for request in requests)
