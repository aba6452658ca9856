"""Rotation between two linears: the first mixes the channels of each head, the second unmixes them; the output is
equal.

Attention sums a head's values over tokens with the same weights for each channel, so an orthogonal matrix commutes with
it. Values rotated by R^T, and an output projection whose columns are rotated by R, compute the same result. But a
channel's outliers are spread over all channels of its head, so that the range to round is smaller (Ashkboos et al.,
QuaRot, NeurIPS 2024, section 4.2; Liu et al., SpinQuant, ICLR 2025, R2).
"""

import math

import torch
from torch import Tensor

SEED = 0  # of the random factor for sizes that are no power of two


def rotation(size: int) -> Tensor:
    """An orthogonal matrix (size, size) float64 that mixes all channels: a Hadamard matrix if size is a power of two.

    For other sizes it is the Kronecker product of the largest Hadamard matrix that divides the size and a fixed random
    rotation of the rest: 80 is 16 x 5.
    """
    odd = size // (size & -size)
    matrix = _random_rotation(odd)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix


def _random_rotation(size: int) -> Tensor:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def turned_outputs(w: Tensor, heads: Tensor, matrix: Tensor) -> Tensor:
    """`w` with the outputs of each head rotated: R^T w[head].

    w       (n, k) or (n,)  a weight, or a bias
    heads   (h, size)  int64, on any device: the outputs of each head, each output at most once; others stay unchanged
    matrix  (size, size)  R
    """
    turned, heads = w.clone(), heads.to(w.device)
    rows = w[heads].flatten(2) if w.ndim == 2 else w[heads].unsqueeze(-1)
    turned[heads] = (matrix.T.to(w) @ rows).view(*heads.shape, *w.shape[1:])
    return turned


def turned_inputs(w: Tensor, matrix: Tensor) -> Tensor:
    """`w` (n, k) with each run of `size` inputs rotated, w[:, run] R: the counterpart of `turned_outputs`."""
    n, k = w.shape
    return (w.reshape(n, k // len(matrix), len(matrix)) @ matrix.to(w)).reshape(n, k)
