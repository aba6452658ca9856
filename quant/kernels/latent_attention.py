"""Attention of single tokens over compressed rows of keys and values (multi-head latent attention): one kernel,
csrc/latent_attention.cu, that also makes the tokens' own rows and stores them, or plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.kernels.decode_attention import normed, rotate
from lowbit.quant.kernels.extension import launch, reason_against_device
from lowbit.quant.kernels.kv_cache import SAME, KVCache, check_tensors, loaded, store

# The widths that the kernel has code for, those of DeepSeek-V2 and V3: of compressed rows and of rotated ones.
RANK, TURNED = 512, 64
TILE, MAX_SPLITS = 64, 8  # positions that a block takes at a time, blocks of a cluster
ALIGNMENT = 8  # elements


@dataclass(frozen=True)
class LatentCall:
    """softmax(scale (q c^T + q_turned t^T)) c of each head: over the compressed rows c and the rotated rows t of its
    sequence, up to and including its own position. Its own rows are made and stored first.

    q           (heads, m, rank)    each head's q, times the weight of its keys
    q_turned    (m, heads, turned)  a view, last stride 1; to be rotated
    compressed  (m, rank)           a view, last stride 1
    turned      (m, turned)         a view, last stride 1; to be rotated
    norm        (rank)              weight of an RMS norm of compressed, with norm_eps, or None
    cosines, sines  (places, at least turned / 2) float32, of which the first turned / 2 are used
    turns       (m) int64           each token's place in these tables
    starts      (m) int64           slot of position 0 of each token's sequence
    positions   (m) int64
    cache       k (slots, 1, rank) has compressed rows, v (slots, 1, turned) rotated ones
    longest     upper bound on every sequence's length; 0 if unknown
    alone       True: each token has a sequence of its own
    dependent   as in AttentionCall; only q, q_turned, compressed and turned may be what a kernel writes that this
                launch overlaps
    """

    q: Tensor
    q_turned: Tensor
    compressed: Tensor
    turned: Tensor
    norm: Tensor | None
    cosines: Tensor
    sines: Tensor
    turns: Tensor
    starts: Tensor
    positions: Tensor
    cache: KVCache
    scale: float
    norm_eps: float
    longest: int = 0
    alone: bool = True
    dependent: bool = False

    def empty(self) -> Tensor:
        """Memory for the result (heads, m, rank)."""
        return torch.empty_like(self.q)

    def check(self) -> None:
        """ValueError, with numbers, if the tensors do not fit together."""
        heads, m, rank = self.q.shape if self.q.ndim == 3 else (0, 0, 0)
        turned, (k, v), dtype = self.turned.shape[-1], (self.cache.k, self.cache.v), self.q.dtype
        whole = {"q": (self.q, (heads, m, rank), dtype), "norm": (self.norm, (rank,), dtype)}
        whole |= {name: (getattr(self, name), (m,), torch.int64) for name in ("turns", "starts", "positions")}
        tables = tuple(self.cosines.shape)
        whole |= {name: (getattr(self, name), tables, torch.float32) for name in ("cosines", "sines")}
        check_tensors(whole, self.q.device)
        views = {"q_turned": (m, heads, turned), "compressed": (m, rank), "turned": (m, turned)}
        for name, shape in views.items():
            view = getattr(self, name)
            if tuple(view.shape) != shape or view.dtype != dtype or view.stride(-1) != 1:
                raise ValueError(
                    f"{name} is {view.dtype} {tuple(view.shape)}, strides {view.stride()}; {dtype} {shape}"
                )
        if heads < 1 or turned % 2 or len(tables) != 2 or tables[1] < turned // 2:
            raise ValueError(f"{heads} heads with {turned} rotated inputs, tables {tables}: half of these are needed")
        if k.shape[1:] != (1, rank) or v.shape != (len(k), 1, turned):
            raise ValueError(f"a cache of {tuple(k.shape)} and {tuple(v.shape)} for rows of {rank} and {turned}")


def attend(call: LatentCall) -> Tensor:
    """The mean compressed rows (heads, m, rank) of `call`. ValueError if its tensors do not fit together."""
    call.check()
    return reference(call) if not call.q.shape[1] or reason_against(call) else run_kernel(call)


def reason_against(call: LatentCall) -> str | None:
    """The reason why the kernel cannot run on these tensors, or None."""
    if call.q.device.type != "cuda":
        return f"the tensors are on the {call.q.device.type}"
    if call.q.dtype not in (torch.float16, torch.bfloat16) or call.cache.number != SAME:
        return f"q is {call.q.dtype}, the cache {call.cache.number.name}: it takes halves and a cache of the same"
    if (call.q.shape[2], call.turned.shape[1]) != (RANK, TURNED):
        return f"rows of {call.q.shape[2]} and {call.turned.shape[1]}: it has code for {RANK} and {TURNED}"
    if not call.alone:
        return "tokens that share a sequence read each other's rows"
    for name, tensor in (("q", call.q), ("k", call.cache.k), ("v", call.cache.v)):
        if tensor.data_ptr() % (2 * ALIGNMENT):
            return f"{name} at {tensor.data_ptr():#x}: it reads 16 bytes at a time"
    return reason_against_device(torch.cuda.get_device_capability(call.q.device))


def choose_splits(call: LatentCall) -> int:
    """Blocks that share a sequence: one tile each, where the longest sequence has so few. The number of rows does not
    matter, so that a row's sums do not depend on it."""
    if torch.cuda.get_device_capability(call.q.device) < (9, 0):
        return 1
    return min(MAX_SPLITS, -(-call.longest // TILE)) if call.longest else MAX_SPLITS


def run_kernel(call: LatentCall) -> Tensor:
    """The result of `call`, which `check` has passed, by csrc/latent_attention.cu."""
    out, names = call.empty(), ("q", "q_turned", "compressed", "turned", "norm", "cosines", "sines", "turns", "starts")
    args = {name: getattr(call, name) for name in (*names, "positions", "norm_eps", "scale")}
    args |= {"k": call.cache.k, "v": call.cache.v, "out": out, "m": out.shape[1], "heads": out.shape[0]}
    args |= {"q_row_pitch": call.q_turned.stride(0), "q_head_pitch": call.q_turned.stride(1)}
    args |= {"compressed_pitch": call.compressed.stride(0), "turned_pitch": call.turned.stride(0)}
    args |= {"table_pitch": call.cosines.shape[1]}
    cut = {"splits": choose_splits(call), "dependent": call.dependent}
    launch("latent_attention", out.dtype, device=out.device, args=args, **cut)
    return out


def append(call: LatentCall) -> None:
    """Store the tokens' own rows, in plain torch."""
    slots, (cosines, sines) = call.starts + call.positions, angles(call)
    compressed = normed(call.compressed.float(), call.norm, call.norm_eps).to(call.q.dtype)
    store(call.cache.k, call.cache.k_scales, slots, compressed.float().unsqueeze(1))
    store(call.cache.v, call.cache.v_scales, slots, rotate(call.turned.float().unsqueeze(1), cosines, sines))


def angles(call: LatentCall) -> tuple[Tensor, Tensor]:
    """Cosines and sines (m, 1, turned / 2) of the tokens."""
    half = call.turned.shape[1] // 2
    return call.cosines[call.turns, :half].unsqueeze(1), call.sines[call.turns, :half].unsqueeze(1)


def reference(call: LatentCall) -> Tensor:
    """The result of `call` in plain torch, computed in float32.

    On a GPU all positions up to `longest` are read, so that it can be captured.
    """
    append(call)
    device, cache = call.q.device, call.cache
    bounded = call.q.is_cuda and call.longest > 0
    positions = torch.arange(call.longest if bounded else int(call.positions.max()) + 1, device=device)
    slots = (call.starts.unsqueeze(1) + positions).clamp(max=len(cache.k) - 1)
    compressed, keys = (
        loaded(part, scales, slots)[:, :, 0] for part, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales))
    )
    turned = rotate(call.q_turned.float(), *angles(call))
    scores = torch.einsum("hmr,mtr->mht", call.q.float(), compressed) + torch.einsum("mhd,mtd->mht", turned, keys)
    seen = positions <= call.positions.unsqueeze(1)
    weights = (scores * call.scale).masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.einsum("mht,mtr->hmr", weights, compressed).to(call.q.dtype).contiguous()
