"""An engine: a decoder, its tokenizer and its caches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from engine.cache import Cache, cache_nbytes, make_cache
from engine.decoder import Decoder
from engine.errors import EngineError
from engine.prefill import read_prompt


@dataclass(frozen=True)
class Options:
    """context: positions of a sequence; int8_cache: keys and values with 8 bits; stop_tokens: the model's own."""

    context: int
    int8_cache: bool = False
    stop_tokens: tuple[int, ...] = ()


class Engine:
    """A loaded model. One thread uses it at a time; an error leaves it as it was."""

    def __init__(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, options: Options) -> None:
        self.decoder, self.tokenizer, self.options = decoder, tokenizer, options

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
        cache = self.make_cache(1, len(rows[0]))
        logits = [[self.decoder.logits(h) for h in read_prompt(self.decoder, cache, 0, row)] for row in rows]
        return torch.stack([torch.cat(parts) for parts in logits])

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
