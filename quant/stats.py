"""Calibration statistics of a site."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stats:
    """Sums over the tokens that reached a site of width k; `a + b` merges two shards.

    tokens       number of tokens
    abs_sum      (k,)    float64  sum of |x|
    abs_max      (k,)    float32  max of |x|
    gram         (k, k)  float32  sum of x x^T over gram_tokens of the tokens; None if not requested
    gram_tokens  number of tokens in the Gram matrix
    """

    tokens: int
    abs_sum: Tensor
    abs_max: Tensor
    gram: Tensor | None = None
    gram_tokens: int = 0

    @property
    def abs_mean(self) -> Tensor:
        """Mean of |x| per input, float32 (k,); zeros without tokens."""
        return (self.abs_sum / max(self.tokens, 1)).float()

    def outlier_ratio(self) -> float:
        """Largest over median channel, by max |x|: the range that a scale per tensor or per token must cover."""
        median = float(self.abs_max.median())
        return float(self.abs_max.max()) / max(median, 1e-30)

    def second_moment(self) -> Tensor:
        """The Gram matrix per token, float32 (k, k)."""
        assert self.gram is not None
        return self.gram / max(self.gram_tokens, 1)

    def __add__(self, other: "Stats") -> "Stats":
        both = [gram for gram in (self.gram, other.gram) if gram is not None]
        gram = both[0] + both[1] if len(both) == 2 else (both[0] if both else None)
        return Stats(
            self.tokens + other.tokens,
            self.abs_sum + other.abs_sum,
            torch.maximum(self.abs_max, other.abs_max),
            gram,
            self.gram_tokens + other.gram_tokens,
        )

    def scaled(self, scales: Tensor) -> "Stats":
        """The statistics of x / scales."""
        gram = None if self.gram is None else self.gram / scales.outer(scales)
        return Stats(self.tokens, self.abs_sum / scales, self.abs_max / scales, gram, self.gram_tokens)


def nothing_seen(width: int, device: torch.device | str) -> Stats:
    """The statistics of no token."""
    zeros = torch.zeros(width, device=device)
    return Stats(0, zeros.double(), zeros)


def stats_of(x: Tensor, with_gram: bool) -> Stats:
    """The statistics of activations `x` (..., k); the Gram matrix is accumulated in float32."""
    flat = x.reshape(-1, x.shape[-1])
    wide = flat.float()
    magnitude = wide.abs()
    gram = _gram(flat) if with_gram else None
    abs_max = magnitude.amax(0) if len(flat) else magnitude.sum(0)
    return Stats(len(flat), magnitude.sum(0, dtype=torch.float64), abs_max, gram, len(flat) if with_gram else 0)


def output_energy(w: Tensor, moment: Tensor) -> float:
    """tr(w moment w^T): the mean squared norm of `x w^T` per token, for inputs with this second moment."""
    return float(output_energies(w[None, None], moment[None]))


def output_energies(w: Tensor, moments: Tensor) -> Tensor:
    """`output_energy` of each of `w` (e, r, n, k), r weights for each of e inputs with moments (e, k, k): (e, r)."""
    by_input = w.flatten(1, 2)
    return ((by_input @ moments) * by_input).view(w.shape).sum((-2, -1))


def weighed(values: Tensor, moments: Tensor) -> Tensor:
    """Rows of groups, `values` (n, g, size), times the second moments of the groups' inputs, (n, g, size).

    moments  (g, size, size); (e, g, size, size) if the rows are those of e weights of one shape, one behind the other
    """
    stacked = moments.view(-1, *moments.shape[-3:])
    by_group = values.unflatten(0, (len(stacked), -1)).transpose(1, 2)
    return (by_group @ stacked).transpose(1, 2).flatten(0, 1)


def _gram(flat: Tensor) -> Tensor:
    """x^T x in float32. Products of half-precision numbers are exact there, so a GPU multiplies them without a cast."""
    if flat.is_cuda and flat.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(flat.T, flat, out_dtype=torch.float32)
    wide = flat.float()
    return wide.T @ wide
