"""Backends that compute logits for evaluations: one small interface, and a table of implementations.

Evaluations do not depend on the backend. They pass batches of token ids and receive float32 logits, or only
log-likelihoods if a backend has nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowbit import engine
from lowbit.engine.engine import Engine
from lowbit.engine.loader import stop_tokens_of
from lowbit.errors import UsageError, nearest
from lowbit.evaluation.vllm_backend import VllmModel
from lowbit.models.cached import rounded_cache
from lowbit.models.devices import free_bytes
from lowbit.models.products import rounded_inputs
from lowbit.models.skeleton import Block, Skeleton, fill_all, open_skeleton
from lowbit.models.source import Source
from lowbit.models.walk import Walk

LONGEST_CONTEXT = 16384  # longest context that the engine is loaded with
MEMORY_SHARE = 0.6  # of free memory that weights may use; the rest is for logits
HIDDEN_BYTES = 1 << 30  # hidden states kept at once during a walk through the blocks
LOSS_ROWS = 256  # tokens per call of the loss: more falls out of the processor's cache


class Backend(ABC):
    """A model under evaluation.

    source   its files
    device   device it computes on
    dtype    of weights and activations; logits are always float32
    on_block  called with (blocks done, blocks in total) by backends that hold one block at a time
    """

    name: ClassVar[str]

    def __init__(self, source: Source, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.on_block: Callable[[int, int], None] = lambda done, total: None

    @abstractmethod
    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """float32 logits (B, T, vocabulary) for each batch of ids (B, T) int64, in order, yielded as computed."""

    @abstractmethod
    def generate(self, prompt: Sequence[int], tokens: int, stops: Sequence[str] = ()) -> list[int]:
        """The greedy continuation of `prompt`, at most `tokens` ids, without the end token.

        stops  generation may stop after one of these strings; some backends ignore them, so the caller must cut
        """

    def log_likelihoods(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """float32 log-likelihoods (B, T - 1) in nats, on the CPU, of each batch's ids (B, T) after the first."""
        kept: list[Tensor] = []
        for logits in self.logits(_remembered(batches, kept)):
            yield token_log_likelihoods(logits, kept.pop(0).to(logits.device)).cpu()

    def known(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches. CheckpointError for an id outside the vocabulary."""
        for ids in batches:
            self.source.require_known(ids)
            yield ids

    def end_tokens(self) -> frozenset[int]:
        """Ids of end tokens, from the generation config, the configuration and the tokenizer."""
        own = getattr(self.source.config.get_text_config(), "eos_token_id", None)
        ends = [*stop_tokens_of(self.source.checkpoint, self.source.vocabulary), self.source.tokenizer().eos_token_id]
        ends += own if isinstance(own, list) else [own]
        return frozenset(end for end in ends if end is not None)


class TransformersBackend(Backend):
    """transformers' model with all weights in memory. Packed weights are dequantized, inputs are rounded."""

    name = "transformers"

    @cached_property
    def _skeleton(self) -> Skeleton:
        return fill_all(open_skeleton(self.source), self.device, self.dtype)

    @torch.no_grad()
    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for ids in self.known(batches):
            with _as_stored(self._skeleton):
                logits = self._skeleton.model(input_ids=ids.to(self.device), use_cache=False).logits
            yield logits.float()

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], tokens: int, stops: Sequence[str] = ()) -> list[int]:
        [ids] = self.known([torch.tensor([list(prompt)], device=self.device)])
        ends = self.end_tokens()
        # Only greedy decoding is requested; a model's own sampling settings would cause warnings.
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_length": None}
        stopping = {"stop_strings": list(stops), "tokenizer": self.source.tokenizer()} if stops else {}
        with _as_stored(self._skeleton):
            output = self._skeleton.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                pad_token_id=min(ends, default=0),
                eos_token_id=sorted(ends) or None,
                **greedy,
                **stopping,
            )
        return until_end(output[0, ids.shape[1] :].tolist(), ends)


class BlocksBackend(Backend):
    """transformers' model one block at a time, straight from the files: slower, but for models of any size."""

    name = "blocks"

    @torch.no_grad()
    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        walk = Walk(open_skeleton(self.source), self.device, self.dtype)
        remaining = self.known(batches)
        while begun := walk.start_some(remaining, HIDDEN_BYTES):
            piece, hidden = [ids for ids, _ in begun], [states for _, states in begun]
            del begun
            total = len(walk.skeleton.blocks)
            for index in range(total):
                with walk.loaded(index):
                    hidden = [walk.run(index, states) for states in hidden]
                self.on_block(index + 1, total)
            yield from (logits.float() for logits in walk.logits(piece, hidden))

    def generate(self, prompt: Sequence[int], tokens: int, stops: Sequence[str] = ()) -> list[int]:
        raise UsageError(
            "the backend 'blocks' reads all weights again for every token: generate with --backend transformers"
        )


class EngineBackend(Backend):
    """lowbit's own engine, which computes with packed weights and 8-bit activations directly."""

    name = "engine"

    @cached_property
    def _engine(self) -> Engine:
        positions = self.source.positions
        context = None if positions is None else min(positions, LONGEST_CONTEXT)
        return engine.load(str(self.source.directory), self.device, self.dtype, context)

    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for ids in self.known(batches):
            yield self._engine.logits(ids)

    def generate(self, prompt: Sequence[int], tokens: int, stops: Sequence[str] = ()) -> list[int]:
        [written] = self._engine.generate([list(prompt)], max_new_tokens=tokens, stop=tuple(stops))
        return until_end(list(written.tokens), self.end_tokens())


class VllmBackend(Backend):
    """vLLM, which returns log-likelihoods of given tokens but no distributions."""

    name = "vllm"

    @cached_property
    def _model(self) -> VllmModel:
        return VllmModel(self.source.directory, self.dtype)

    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        raise UsageError(
            "vLLM gives log-likelihoods of given tokens, not whole distributions: "
            "use --backend engine or transformers here"
        )

    def log_likelihoods(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for ids in batches:
            yield self._model.log_likelihoods(ids)

    def generate(self, prompt: Sequence[int], tokens: int, stops: Sequence[str] = ()) -> list[int]:
        return until_end(self._model.generate(list(prompt), tokens, list(stops)), self.end_tokens())


BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (TransformersBackend, BlocksBackend, EngineBackend, VllmBackend)
}


def open_backend(name: str, source: Source, device: str, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend `name` for `source`. Weights are loaded on first use."""
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; {nearest(name, BACKENDS)}")
    return BACKENDS[name](source, device, dtype)


def choose_backend(source: Source, device: str, dtype: torch.dtype, together: int = 1) -> str:
    """ "transformers" if `together` such models fit the free memory of `device`, otherwise "blocks"."""
    parameters = sum(entry.numel for entry in source.checkpoint.entries.values())
    packed = 8 if source.checkpoint.quantization else 1  # an int32 word holds up to eight weights
    need = parameters * packed * dtype.itemsize * together
    return "transformers" if need < MEMORY_SHARE * free_bytes(device) else "blocks"


def load_dense(source: Source, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model with all weights in memory, packed ones dequantized."""
    return fill_all(open_skeleton(source), device, dtype).model


@contextmanager
def _as_stored(skeleton: Skeleton) -> Iterator[None]:
    """A context in which the filled model rounds its linears' inputs, and its keys and values, if the file says so."""
    linears = [spec for block in skeleton.blocks for spec in block.linears]
    every = Block("", skeleton.model, linears=linears)
    with rounded_inputs(every, skeleton.model, skeleton.inputs), rounded_cache(skeleton, skeleton.cache):
        yield


def token_log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """float32 (B, T - 1): log-likelihoods of all ids (B, T) but the first, from logits (B, T, vocabulary)."""
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    targets = ids[:, 1:].reshape(-1)
    parts = zip(rows.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
    losses = [-torch.nn.functional.cross_entropy(part, target, reduction="none") for part, target in parts]
    return torch.cat(losses).view(ids.shape[0], -1)


def until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    """`ids` before the first of `ends`."""
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)


def _remembered(batches: Iterable[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        kept.append(batch)
        yield batch
