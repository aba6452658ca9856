"""Multi-head latent attention: heads of q, k and v from two compressed rows of each token (DeepSeek-V2 and V3).

The cache holds whole heads, as of any other attention: v is padded to the width of k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Architecture, LatentSizes, Rope
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.weight import Linear

NORM_EPS = 1e-6  # of both norms, whatever the configuration says of the others


@dataclass(frozen=True)
class Latent:
    """The way from the outputs of the first product to heads.

    q, q_norm    product and norm of q's compressed row; None: the first product has q itself
    kv, kv_norm  product and norm of the compressed row of k and v: of each head k's part that is not rotated, and v
    order        (head_dim) int64: for each place in our head of k its place in the rotated part and the other behind it
    """

    q: Linear | None
    q_norm: Tensor | None
    kv: Linear
    kv_norm: Tensor
    order: Tensor
    architecture: Architecture

    @property
    def sizes(self) -> LatentSizes:
        """The widths of the compressed rows and of v."""
        assert self.architecture.latent is not None
        return self.architecture.latent

    @property
    def nbytes(self) -> int:
        """Bytes read by the products."""
        return self.kv.nbytes + (0 if self.q is None else self.q.nbytes)

    def heads(self, rows: Tensor) -> Tensor:
        """q, k and v (m, 3 * heads * head_dim), before rotation, of the first product's outputs."""
        a, sizes = self.architecture, self.sizes
        q, compressed, turned = rows.split([sizes.q_outputs(a), sizes.kv_rank, sizes.turned], -1)
        if self.q is not None and self.q_norm is not None:
            q = self.q(normed(q, self.q_norm))
        kv = self.kv(normed(compressed, self.kv_norm)).unflatten(-1, (a.heads, -1))
        still, v = kv.split([a.head_dim - sizes.turned, sizes.v_dim], -1)
        k = torch.cat([turned.unsqueeze(1).expand(-1, a.heads, -1), still], -1)[..., self.order]
        v = functional.pad(v, (0, a.head_dim - sizes.v_dim))
        return torch.cat([q, k.flatten(1), v.flatten(1)], -1)

    def values(self, out: Tensor) -> Tensor:
        """Attention's outputs (m, heads * head_dim) without the padding of v: (m, heads * v_dim)."""
        return out.unflatten(-1, (self.architecture.heads, -1))[..., : self.sizes.v_dim].flatten(1)


def normed(rows: Tensor, weight: Tensor) -> Tensor:
    """The RMS norm of rows."""
    return ops.normalize(Rows(rows.contiguous(), "rms", weight, None, NORM_EPS))


def query_order(head_dim: int, rope: Rope, order: Tensor) -> Tensor:
    """For each place in our head of q: the file's input there, whose rotated part is the last. `order` as in Latent."""
    turned = 2 * len(rope.frequencies)
    return torch.where(order < turned, order + head_dim - turned, order - turned)
