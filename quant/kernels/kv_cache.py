"""A layer's key-value cache in each of its number types, and plain torch's way to store heads in it and read them.

csrc/cache_codes.cuh has the kernels' side of the same types.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lowbit.quant.numbers import FP8

INT8_LIMIT, INT4_LIMIT = 127, 8
MAX_HEAD_DIM, WIDE_HEAD_DIM = 256, 512  # of the kernels: no width between them
# Bits by which the elements of a word of int4 are shifted: a kernel's mask takes two adjacent ones at once.
NIBBLES = (0, 16, 4, 20, 8, 24, 12, 28)


@dataclass(frozen=True)
class CacheNumber:
    """A number type of keys and values.

    name     in options, and in the kernels' names
    storage  dtype of the cache's tensors; None: the activations'
    codes    elements in one of the storage
    scales   "token": one per token and head, in the activations' dtype; "head": one per head, of all tokens, float32;
             "": none
    rotated  True if keys and queries are turned by a Hadamard matrix first, which spreads a key's outliers
    step     divisor of the width of heads
    apart    True if each head's slots are adjacent in memory. A token's heads of few bytes each, read by many blocks at
             different times, cost memory more than those bytes: 8 x 2048 of 32 heads in int4, one layer on an H200,
             20.5 us, otherwise 23.8; FP8 34.7 and 34.5
    """

    name: str
    storage: torch.dtype | None = None
    codes: int = 1
    scales: str = ""
    rotated: bool = False
    step: int = 8
    apart: bool = False

    def head_nbytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one head of keys, or of values, of a token."""
        scale = dtype.itemsize if self.scales == "token" else 0
        return head_dim // self.codes * (self.storage or dtype).itemsize + scale


SAME = CacheNumber("same")
INT8_CACHE = CacheNumber("int8", torch.int8, scales="token", step=16)
FP8_CACHE = CacheNumber("fp8", torch.float8_e4m3fn, scales="head", step=16)
INT4_CACHE = CacheNumber("int4", torch.int32, codes=8, scales="token", rotated=True, step=64, apart=True)
CACHE_NUMBERS = {number.name: number for number in (SAME, INT8_CACHE, FP8_CACHE, INT4_CACHE)}


@dataclass(frozen=True)
class KVCache:
    """One layer's keys and values. A sequence has consecutive slots, one per position.

    k, v                (slots, kv_heads, head_dim)  the activations' dtype, or a CacheNumber's storage: of int4
                                                     head_dim / 8 words
    k_scales, v_scales  (slots, kv_heads) or (kv_heads); None without scales: see CacheNumber

    In memory either slots or heads are behind one another, of all tensors with slots alike.
    """

    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    @property
    def number(self) -> CacheNumber:
        """The number type, told by the tensors' dtype."""
        return next((each for each in CACHE_NUMBERS.values() if each.storage == self.k.dtype), SAME)

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k.shape[2] * self.number.codes

    @property
    def apart(self) -> bool:
        """True if each head's slots are adjacent in memory, False if the heads of each slot are."""
        return not self.k.is_contiguous()

    @property
    def without_heads(self) -> "KVCache":
        """A cache like this one that keeps nothing, for heads of q alone."""
        scales = (each if each is None else each[..., :0] for each in (self.k_scales, self.v_scales))
        return KVCache(self.k[:, :0], self.v[:, :0], *scales)

    def check(self, heads: Tensor) -> None:
        """ValueError if the cache is inconsistent, or does not fit the dtype of `heads`."""
        number, dtype = self.number, self.number.storage or heads.dtype
        scaled = (self.k_scales is not None, self.v_scales is not None)
        if self.k.dtype != dtype or self.v.dtype != dtype or scaled != (bool(number.scales),) * 2:
            raise ValueError(
                f"a cache of {self.k.dtype} and {self.v.dtype} {'with' if any(scaled) else 'without'} scales beside "
                f"{heads.dtype}: int8 has scales, and fp8 and int4 have; every other cache is of the heads' dtype"
            )
        parts = {"k": self.k, "v": self.v, "k_scales": self.k_scales, "v_scales": self.v_scales}
        if self.apart:
            parts = {
                name: part if part is None or part.ndim == 1 else part.transpose(0, 1) for name, part in parts.items()
            }
        whole = tuple(self.k.transpose(0, 1).shape if self.apart else self.k.shape)
        sides = whole[:2] if number.scales == "token" else (self.kv_heads,)
        kept = heads.dtype if number.scales == "token" else torch.float32
        shapes = {"k": (whole, dtype), "v": (whole, dtype), "k_scales": (sides, kept), "v_scales": (sides, kept)}
        wanted = {name: (parts[name], *shape) for name, shape in shapes.items()}
        check_tensors(wanted, heads.device)


def check_tensors(
    wanted: Mapping[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]], device: torch.device
) -> None:
    """ValueError for a tensor that is not contiguous, on `device`, and of the shape and dtype given with it."""
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}, strides {tensor.stride()}; contiguous {shape} is needed"
            )
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; {dtype} on {device} is needed")


def reason_against_width(number: CacheNumber, head_dim: int) -> str | None:
    """The reason why heads of this width cannot be stored in `number`, or None."""
    if number.rotated and (not number.step <= head_dim <= MAX_HEAD_DIM or head_dim & (head_dim - 1)):
        return f"heads of {head_dim}: an {number.name} cache takes powers of two from {number.step} to {MAX_HEAD_DIM}"
    return None


def reason_against_heads(cache: KVCache) -> str | None:
    """The reason why the kernels cannot run on heads of the cache's width, or None."""
    if cache.head_dim == WIDE_HEAD_DIM and not cache.number.rotated:
        return None
    if cache.head_dim % cache.number.step or cache.head_dim > MAX_HEAD_DIM:
        wide = "" if cache.number.rotated else f", and {WIDE_HEAD_DIM}"
        return f"heads of {cache.head_dim}: multiples of {cache.number.step} up to {MAX_HEAD_DIM}{wide} are taken"
    return None


def empty_cache(
    number: CacheNumber, sides: tuple[int, int, int], like: Tensor, scales: tuple[Tensor, Tensor] | None
) -> KVCache:
    """A cache full of zeros.

    sides   slots, kv_heads, head_dim
    like    has the activations' dtype, and the device
    scales  (kv_heads) float32 of keys and of values, if the number has them per head
    """
    slots, kv_heads, head_dim = sides

    def zeros(dtype: torch.dtype, *width: int) -> Tensor:
        if number.apart:
            return like.new_zeros(kv_heads, slots, *width, dtype=dtype).transpose(0, 1)
        return like.new_zeros(slots, kv_heads, *width, dtype=dtype)

    k, v = (zeros(number.storage or like.dtype, head_dim // number.codes) for _ in range(2))
    if number.scales == "token":
        return KVCache(k, v, *(zeros(like.dtype) for _ in range(2)))
    return KVCache(k, v, *(scales or ())) if number.scales == "head" else KVCache(k, v)


@lru_cache
def hadamard(width: int, device: torch.device) -> Tensor:
    """The Hadamard matrix of a power of two, over its square root: orthogonal, and its own inverse."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / width**0.5


def rotated(heads: Tensor) -> Tensor:
    """Heads (..., head_dim) float32 times the Hadamard matrix."""
    return heads @ hadamard(heads.shape[-1], heads.device)


def store(into: Tensor, scales: Tensor | None, slots: Tensor, heads: Tensor) -> None:
    """Store `heads` (m, kv_heads, head_dim) float32 in their slots, in the number type of `into`.

    int8 by absmax / 127, and int4 by the number of largest magnitude over -8, each rounded first; fp8 by its scales.
    """
    if scales is None:
        into[slots] = heads.to(into.dtype)
        return
    if into.dtype == FP8.storage:
        limit = FP8.high
        into[slots] = (heads / scales.unsqueeze(-1)).clamp(-limit, limit).to(into.dtype)
        return
    if into.dtype == torch.int8:
        scale = heads.abs().amax(-1) / INT8_LIMIT
    else:
        most, least = heads.amax(-1), heads.amin(-1)
        scale = torch.where(most >= -least, most, least) / -INT4_LIMIT
    stored = within_normal(scale.to(scales.dtype))
    scales[slots] = stored
    steps = (heads / stored.float().unsqueeze(-1)).round()
    if into.dtype == torch.int8:
        into[slots] = steps.clamp(-INT8_LIMIT, INT8_LIMIT).to(torch.int8)
    else:
        into[slots] = words_of(steps.clamp(-INT4_LIMIT, INT4_LIMIT - 1))


def within_normal(scale: Tensor) -> Tensor:
    """Scales whose magnitude is at least their dtype's least normal number. NaN stays."""
    return torch.copysign(scale.abs().clamp(min=torch.finfo(scale.dtype).tiny), scale)


def words_of(codes: Tensor) -> Tensor:
    """Codes of int4 (..., head_dim) as words (..., head_dim / 8) int32."""
    nibbles = codes.nan_to_num().to(torch.int32).unflatten(-1, (-1, len(NIBBLES))) + INT4_LIMIT
    return (nibbles << torch.tensor(NIBBLES, dtype=torch.int32, device=codes.device)).sum(-1, dtype=torch.int32)


def loaded(stored: Tensor, scales: Tensor | None, slots: slice | Tensor = slice(None)) -> Tensor:
    """The values stored in `slots`, float32: of int4 keys, in the basis to which queries are turned too."""
    taken = stored[slots]
    if scales is None:
        return taken.float()
    if stored.dtype == torch.int32:
        shifts = torch.tensor(NIBBLES, dtype=torch.int32, device=stored.device)
        taken = (taken.unsqueeze(-1) >> shifts & 15).flatten(-2) - INT4_LIMIT
    sides = scales if scales.ndim == 1 else scales[slots]
    return taken.float() * sides.float().unsqueeze(-1)
