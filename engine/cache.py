"""The static key-value cache: memory for all positions of all sequences, allocated once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.engine.architecture import Architecture
from lowbit.quant.kernels.kv_cache import SAME, CacheNumber, KVCache, empty_cache, loaded


@dataclass(frozen=True)
class CacheKind:
    """The form in which all layers' keys and values are stored.

    scales  of each layer's keys and values, (kv_heads) float32; none for a number type without scales per head
    """

    number: CacheNumber = SAME
    scales: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Cache:
    """Keys and values of `batch` sequences of at most `context` positions. Sequence b has slots [b context, ...).

    layers    one KVCache per layer, of one number type. Of latent attention it has one head, whose k is the compressed
              row, and v the rotated part of the keys
    features  (batch * context, n): what a drafter reads of each position, or None; see Decoder.taps
    """

    layers: tuple[KVCache, ...]
    batch: int
    context: int
    features: Tensor | None = None

    @property
    def nbytes(self) -> int:
        kept = 0 if self.features is None else self.features.nbytes
        return kept + sum(part.numel() * part.element_size() for layer in self.layers for part in parts_of(layer))

    def start(self, sequence: int) -> int:
        """The slot of a sequence's position 0."""
        return sequence * self.context

    def prefix(self, sequence: int, length: int) -> slice:
        """The slots of a sequence's first positions."""
        return slice(self.start(sequence), self.start(sequence) + length)

    def heads_at(self, layer: int, slots: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (slots, kv_heads, head_dim) in `dtype`; keys in the basis of the queries."""
        kv = self.layers[layer]
        if kv.k_scales is None or kv.v_scales is None:
            return kv.k[slots], kv.v[slots]
        return loaded(kv.k, kv.k_scales, slots).to(dtype), loaded(kv.v, kv.v_scales, slots).to(dtype)

    def copy(self, source: int, sequence: int, length: int) -> None:
        """Copy the first `length` positions of sequence `source` to another sequence."""
        for layer in self.layers:
            for part in parts_of(layer):
                part[self.prefix(sequence, length)] = part[self.prefix(source, length)]
        if self.features is not None:
            self.features[self.prefix(sequence, length)] = self.features[self.prefix(source, length)]

    def reorder(self, sequences: Tensor) -> None:
        """Replace sequence b by a copy of sequence `sequences[b]`, for beam search.

        sequences  one per beam, from the cache's first sequence on
        """
        for layer in self.layers:
            for part in parts_of(layer):
                rows = part.unflatten(0, (self.batch, -1))[: len(sequences)]
                rows.copy_(rows[sequences])


def parts_of(layer: KVCache) -> list[Tensor]:
    """The layer's tensors with something for every slot."""
    sides = (layer.k_scales, layer.v_scales) if layer.number.scales == "token" else ()
    return [part for part in (layer.k, layer.v, *sides) if part is not None]


def cache_nbytes(architecture: Architecture, batch: int, context: int, dtype: torch.dtype, number: CacheNumber) -> int:
    """The bytes that `make_cache` allocates."""
    heads, *widths = sides_of(architecture)
    per_head = sum(number.head_nbytes(width, dtype) for width in widths)
    return len(architecture.layers) * batch * context * heads * per_head


def sides_of(architecture: Architecture) -> tuple[int, int, int]:
    """The heads of a layer's cache, and the widths of their k and v."""
    latent = architecture.latent
    if latent is not None:
        return 1, latent.kv_rank, latent.turned
    return architecture.kv_heads, architecture.head_dim, architecture.head_dim


def make_cache(architecture: Architecture, batch: int, context: int, kind: CacheKind, like: Tensor) -> Cache:
    """An empty cache, filled with zeros, for activations with the dtype and device of `like`."""
    heads, *widths = sides_of(architecture)

    def layer(scales: tuple[Tensor, Tensor] | None) -> KVCache:
        k, v = (empty_cache(kind.number, (batch * context, heads, width), like, scales) for width in widths)
        return KVCache(k.k, v.v, k.k_scales, v.v_scales)

    scales = kind.scales or (None,) * len(architecture.layers)
    return Cache(tuple(layer(each) for each in scales), batch, context)
