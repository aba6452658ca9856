"""A rotation between two linears: channels of a head mixed by the first, unmixed by the second, and no one the wiser.

Attention adds up a head's values over tokens, each channel with the same weights, so an orthogonal matrix passes
through it. Values turned by R^T, and an output projection whose columns are turned by R, compute what they did; but a
channel's outliers are spread over all channels of its head, and rounding has less to span (Ashkboos et al., QuaRot,
NeurIPS 2024, section 4.2; Liu et al., SpinQuant, ICLR 2025, R2).
"""

import math

import torch
from torch import Tensor

SEED = 0  # of the part of a rotation that is no Hadamard matrix


def rotation(size: int) -> Tensor:
    """An orthogonal matrix (size, size) float64 that mixes all channels: Hadamard's for powers of two.

    For others it is the Kronecker product of the largest Hadamard matrix whose size divides and a random rotation of
    the rest, always the same: 80 is 16 x 5.
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
    """`w` with the outputs of each head turned: R^T w[head].

    w       (n, k) or (n,)  a weight, or a bias
    heads   (h, size)  int64, on any device: the outputs of each head; no output twice, those in none stay
    matrix  (size, size)  R
    """
    turned, heads = w.clone(), heads.to(w.device)
    rows = w[heads].flatten(2) if w.ndim == 2 else w[heads].unsqueeze(-1)
    turned[heads] = (matrix.T.to(w) @ rows).view(*heads.shape, *w.shape[1:])
    return turned


def turned_inputs(w: Tensor, matrix: Tensor) -> Tensor:
    """`w` (n, k) with each run of `size` inputs turned, as suits inputs turned by `turned_outputs`: w[:, run] R."""
    n, k = w.shape
    return (w.reshape(n, k // len(matrix), len(matrix)) @ matrix.to(w)).reshape(n, k)
