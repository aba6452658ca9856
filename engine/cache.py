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

    layers    one KVCache per layer, of one number type; layers that share keys and values have the same. Of latent
              attention it has one head, whose k is the compressed row, and v the rotated part of the keys
    features  (batch * context, n): what a drafter reads of each position, or None; see Decoder.taps
    """

    layers: tuple[KVCache, ...]
    batch: int
    context: int
    features: Tensor | None = None

    @property
    def parts(self) -> list[Tensor]:
        """The tensors of all layers with something for every slot, each once."""
        return [part for layer in {id(each): each for each in self.layers}.values() for part in parts_of(layer)]

    @property
    def nbytes(self) -> int:
        kept = 0 if self.features is None else self.features.nbytes
        return kept + sum(part.numel() * part.element_size() for part in self.parts)

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
        for part in self.parts:
            part[self.prefix(sequence, length)] = part[self.prefix(source, length)]
        if self.features is not None:
            self.features[self.prefix(sequence, length)] = self.features[self.prefix(source, length)]

    def reorder(self, sequences: Tensor) -> None:
        """Replace sequence b by a copy of sequence `sequences[b]`, for beam search.

        sequences  one per beam, from the cache's first sequence on
        """
        for part in self.parts:
            rows = part.unflatten(0, (self.batch, -1))[: len(sequences)]
            rows.copy_(rows[sequences])


def parts_of(layer: KVCache) -> list[Tensor]:
    """The layer's tensors with something for every slot."""
    sides = (layer.k_scales, layer.v_scales) if layer.number.scales == "token" else ()
    return [part for part in (layer.k, layer.v, *sides) if part is not None]


def cache_nbytes(architecture: Architecture, batch: int, context: int, dtype: torch.dtype, number: CacheNumber) -> int:
    """The bytes that `make_cache` allocates."""
    own = (index for index, layer in enumerate(architecture.layers) if layer.source is None)
    return batch * context * sum(position_nbytes(architecture, index, dtype, number) for index in own)


def position_nbytes(architecture: Architecture, index: int, dtype: torch.dtype, number: CacheNumber) -> int:
    """The bytes of a position's keys and values that a layer reads."""
    heads, *widths = sides_of(architecture, index)
    return heads * sum(number.head_nbytes(width, dtype) for width in widths)


def sides_of(architecture: Architecture, index: int) -> tuple[int, int, int]:
    """The heads of a layer's cache, and the widths of their k and v."""
    latent, sizes = architecture.latent, architecture.heads_of(index)
    if latent is not None:
        return 1, latent.kv_rank, latent.turned
    return sizes.kv_heads, sizes.head_dim, sizes.head_dim


def make_cache(architecture: Architecture, batch: int, context: int, kind: CacheKind, like: Tensor) -> Cache:
    """An empty cache, filled with zeros, for activations with the dtype and device of `like`."""
    layers: list[KVCache] = []
    for index, layer in enumerate(architecture.layers):
        if layer.source is not None:
            layers.append(layers[layer.source])
            continue
        heads, *widths = sides_of(architecture, index)
        scales = kind.scales[index] if kind.scales else None
        k, v = (empty_cache(kind.number, (batch * context, heads, width), like, scales) for width in widths)
        layers.append(KVCache(k.k, v.v, k.k_scales, v.v_scales))
    return Cache(tuple(layers), batch, context)
