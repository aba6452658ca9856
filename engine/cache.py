"""The static key-value cache: memory for all positions of all sequences, allocated once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture
from lowbit.quant.kernels.decode_attention import KVCache, loaded


@dataclass(frozen=True)
class Cache:
    """Keys and values of `batch` sequences of at most `context` positions. Sequence b has slots [b context, ...).

    layers  one KVCache per layer, in the activations' dtype, or int8 with one scale per token and head
    """

    layers: tuple[KVCache, ...]
    batch: int
    context: int

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for layer in self.layers for part in parts_of(layer))

    def start(self, sequence: int) -> int:
        """The slot of a sequence's position 0."""
        return sequence * self.context

    def prefix(self, sequence: int, length: int) -> slice:
        """The slots of a sequence's first positions."""
        return slice(self.start(sequence), self.start(sequence) + length)

    def heads_at(self, layer: int, slots: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (slots, kv_heads, head_dim) in `dtype`."""
        kv = self.layers[layer]
        if kv.k_scales is None or kv.v_scales is None:
            return kv.k[slots], kv.v[slots]
        return loaded(kv.k[slots], kv.k_scales[slots]).to(dtype), loaded(kv.v[slots], kv.v_scales[slots]).to(dtype)

    def copy(self, source: int, sequence: int, length: int) -> None:
        """Copy the first `length` positions of sequence `source` to another sequence."""
        for layer in self.layers:
            for part in parts_of(layer):
                part[self.prefix(sequence, length)] = part[self.prefix(source, length)]

    def reorder(self, sequences: Tensor) -> None:
        """Replace sequence b by a copy of sequence `sequences[b]`, for beam search.

        sequences  one per beam, from the cache's first sequence on
        """
        for layer in self.layers:
            for part in parts_of(layer):
                rows = part.view(self.batch, -1)[: len(sequences)]
                rows.copy_(rows[sequences])


def parts_of(layer: KVCache) -> list[Tensor]:
    """The layer's tensors that are not None."""
    return [part for part in (layer.k, layer.v, layer.k_scales, layer.v_scales) if part is not None]


def cache_nbytes(architecture: Architecture, batch: int, context: int, dtype: torch.dtype, int8: bool) -> int:
    """The bytes that `make_cache` allocates."""
    per_head = architecture.head_dim + dtype.itemsize if int8 else architecture.head_dim * dtype.itemsize
    return 2 * len(architecture.layers) * batch * context * architecture.kv_heads * per_head


def make_cache(
    architecture: Architecture, batch: int, context: int, dtype: torch.dtype, int8: bool, device: torch.device
) -> Cache:
    """An empty cache, filled with zeros."""
    sides = (batch * context, architecture.kv_heads)

    def layer() -> KVCache:
        kind = torch.int8 if int8 else dtype
        k, v = (torch.zeros(*sides, architecture.head_dim, dtype=kind, device=device) for _ in range(2))
        if not int8:
            return KVCache(k, v)
        return KVCache(k, v, *(torch.zeros(sides, dtype=dtype, device=device) for _ in range(2)))

    return Cache(tuple(layer() for _ in architecture.layers), batch, context)
