"""Multi-head latent attention: heads of q, k and v from two compressed rows of each token (DeepSeek-V2 and V3).

The cache holds a token's compressed row of k and v, and the rotated part of k that all heads share. A prompt's heads of
k and v are computed from these. A step computes none: a head's q is multiplied with the weight of its k, so that it
scores compressed rows, and the weighted mean of these is multiplied with the weight of its v.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Architecture, LatentSizes
from lowbit.engine.attention import prompt_attention
from lowbit.engine.cache import Cache
from lowbit.engine.step import Step, Turns
from lowbit.quant.kernels import ops
from lowbit.quant.kernels.decode_attention import rotate
from lowbit.quant.kernels.latent_attention import LatentCall, angles, append
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.weight import Linear, RoundedInputs, prepared

NORM_EPS = 1e-6  # of both norms, whatever the configuration says of the others


@dataclass(frozen=True)
class Latent:
    """Attention from the outputs of the first product: q or its compressed row, the compressed row of k and v, and k's
    rotated part. Of each head of q the part that is not rotated comes first.

    q, q_norm  product and norm of q's compressed row; None: the first product has q itself
    kv_norm    norm of the compressed row of k and v
    keys       (heads, inputs that are not rotated, kv_rank)
    values     (heads, v_dim, kv_rank)
    inputs     the rounding of compressed rows before these two, or None
    """

    q: Linear | None
    q_norm: Tensor | None
    kv_norm: Tensor
    keys: Tensor
    values: Tensor
    inputs: RoundedInputs | None
    architecture: Architecture

    @property
    def sizes(self) -> LatentSizes:
        """The widths of the compressed rows and of v."""
        assert self.architecture.latent is not None
        return self.architecture.latent

    @property
    def nbytes(self) -> int:
        """Bytes read by the products."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.q is None else self.q.nbytes)

    def __call__(self, rows: Tensor, step: Step, turns: Turns, cache: Cache, index: int) -> Tensor:
        """Attention's outputs (m, heads * v_dim). Also writes the rows to the cache's layer `index`.

        rows  (m, outputs)  of the first product
        """
        a, sizes, kv = self.architecture, self.sizes, cache.layers[index]
        q, compressed, turned = rows.split([sizes.q_outputs(a), sizes.kv_rank, sizes.turned], -1)
        if self.q is not None and self.q_norm is not None:
            q = self.q(normed(q, self.q_norm))
        norm: Tensor | None = self.kv_norm
        if self.inputs is not None:
            norm, compressed = None, prepared(self.inputs.of(Rows(normed(compressed, self.kv_norm))))
        still, q_turned = q.unflatten(-1, (a.heads, -1)).split([a.head_dim - sizes.turned, sizes.turned], -1)
        absorbed = torch.bmm(still.transpose(0, 1), self.keys)
        places = turns.cosines, turns.sines, step.turns, step.starts, step.positions
        tail = a.layers[index].scale, NORM_EPS, step.longest, step.alone
        call = LatentCall(absorbed, q_turned, compressed, turned, norm, *places, kv, *tail)
        if step.prefix is None:
            mean = ops.attend_latent(call)
            return torch.bmm(mean, self.values.mT).transpose(0, 1).flatten(1)
        append(call)
        q = torch.cat([still, rotate(q_turned.float(), *angles(call)).to(q.dtype)], -1)
        return self.attend_prompt(q, *cache.heads_at(index, step.prefix, q.dtype), index, step.prompts)

    def attend_prompt(self, q: Tensor, compressed: Tensor, turned: Tensor, index: int, prompts: int) -> Tensor:
        """The outputs for the last T of L positions of each prompt: q (prompts * T, heads, head_dim), the cache's rows
        (prompts * L, 1, ...)."""
        a, sizes = self.architecture, self.sizes
        still, v = (
            functional.linear(compressed[:, 0], weight.flatten(0, 1)).unflatten(-1, (a.heads, -1))
            for weight in (self.keys, self.values)
        )
        k = torch.cat([still, turned.expand(-1, a.heads, -1)], -1)
        v = functional.pad(v, (0, a.head_dim - sizes.v_dim))  # as wide as k, as torch's fused attention needs it
        out = prompt_attention(q.flatten(1), k, v, a, a.layers[index], prompts=prompts)
        return out.unflatten(-1, (a.heads, -1))[..., : sizes.v_dim].flatten(1)


def normed(rows: Tensor, weight: Tensor) -> Tensor:
    """The RMS norm of rows."""
    return ops.normalize(Rows(rows.contiguous(), "rms", weight, None, NORM_EPS))
