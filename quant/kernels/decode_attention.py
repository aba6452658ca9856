"""Decode attention: new heads are appended to the key-value cache, then attend to it.

`append` applies norm and rotation to the heads of new tokens and stores them; `attend` is softmax(q k^T) v for few
tokens and a long cache. A GPU runs csrc/decode_attention.cu. Elsewhere plain torch runs, which is also the reference
for the kernels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import panels
from lowbit.quant.kernels.extension import launch, reason_against_device
from lowbit.quant.kernels.kv_cache import (
    SAME,
    WIDE_HEAD_DIM,
    KVCache,
    check_tensors,
    loaded,
    reason_against_heads,
    rotated,
    store,
)
from lowbit.quant.kernels.problem import Rotary, check_alignment, has_fast_memory

BLOCK_HEADS = 8  # query heads of one key head per block, of all adjacent rows
MAX_SPLITS = 8  # blocks of a cluster: 8 fit on every GPU with clusters
# More splits help long sequences and hurt short ones (docs/kernels/decode_attention.md). Times with a split tuned at
# 128 and one tuned at 2048 positions are linear in the length; the lines for few and many splits cross near SHORT.
SHORT = 1024  # positions
SHORT_SPLITS = 4  # most splits of a short sequence
# With fast memory and more bytes of cache than this, attention is launched without overlap: it reads for longer than a
# launch takes, and next to the previous product many of its blocks would start late. Llama-2-7B on an H200, 8 x 2048,
# 285 MB per layer: 3.837 ms per step, 4.063 with overlap; 143 MB in int8: 2.816 and 2.876; 1 x 2048, 36 MB: 1.970 and
# 1.886. The graphs of up to SHORT positions serve shorter sequences too, and are faster with overlap behind a packed
# weight: W4 8 x 128 1.481 ms, plainly 1.568; 8 x 890 2.218 and 2.288; 16 x 128 2.066 and 2.155. Not between products
# with rings: bfloat16 8 x 384 4.179 and 4.122, 8 x 890 4.934 and 4.536, though 8 x 128 3.785 and 3.850.
PLAIN_BYTES = 100e6
# An int8 cache, the same at 8 x 2048: 2.876 ms per step with 8 warps per block, 3.501 with 4; 8 x 128: 1.884 and
# 1.705. Other quantized caches have no more bytes.
WARPS, MANY_WARPS, MOST_WARPS = 4, 8, 16
MANY_WARPS_DIM = 128  # widest heads whose chunks fit in the registers of so many warps
# Of each warp of a long sequence, and where a cluster's blocks share multiprocessors with one another's. 32 heads on an
# H200 in int4: 54 us at 1 x 32768 with 7 splits, 60 with 6; 10.4 and 9.4 at 1 x 2048.
LEAST_POSITIONS, CROWDED_POSITIONS = 32, 64
PARTS = 8  # of a GPU: a cluster runs in one of them
# Bytes of shared memory, at least, of a block that has a sequence alone: fewer share a multiprocessor. A step of
# Llama-2-7B on an H200, 8 x 128: 1.596 ms, 1.612 without; 8 x 2048: 3.412 and 3.428. Where blocks share a sequence, at
# 1 x 128: 1.362 and 1.349.
LEAST_SHARED = 25 << 10
MANY_ROWS, VECTOR_DIMS = 128, (64, 128, 256, 512)  # of an append by rows, which memory bounds
SHORT_BLOCKS, LONG_BLOCKS = 1.95, 2.5  # most blocks per multiprocessor after splitting
MADE_FIELDS = ("qkv", "positions", "cosines", "sines", "q_norm", "k_norm", "v_normed", "norm_eps")
ATTENTION_FIELDS = ("q", "starts", "positions", "scale", "window", "softcap", "sinks", "adjacent")


@dataclass(frozen=True)
class AppendCall:
    """New tokens' heads, to be appended to the cache.

    qkv             (m, (heads + 2 kv_heads) * head_dim)  the heads of q, of k, of v; of a cache without heads, of q
    positions       (m) int64            slots (m) int64, each token's slot in the cache
    cosines, sines  (max position, head_dim / 2) float32; inputs j and j + head_dim / 2 of a head are rotated together
    q_norm, k_norm  (head_dim)           weights of an RMS norm on each head of q and k before rotation, or None
    v_normed        True: an RMS norm without a weight on each head of v
    dependent       as in problem.PackedCall. positions and slots are read before the previous kernel has finished, so
                    no kernel that this launch may overlap may write them
    """

    qkv: Tensor
    positions: Tensor
    slots: Tensor
    cosines: Tensor
    sines: Tensor
    cache: KVCache
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 0.0
    dependent: bool = False
    v_normed: bool = False

    @property
    def heads(self) -> int:
        return self.qkv.shape[1] // self.cache.head_dim - 2 * self.cache.kv_heads

    def empty(self) -> Tensor:
        """Memory for q."""
        return self.qkv.new_empty(self.qkv.shape[0], self.heads * self.cache.head_dim)


@dataclass(frozen=True)
class AttentionCall:
    """softmax(scale q k^T) v: each token attends to its own sequence, up to and including its own position.

    q          (m, heads * head_dim)
    starts     (m) int64  the slot of position 0 of each token's sequence
    positions  (m) int64
    window     number of positions attended to, including the token's own; 0 for all
    softcap    scores become softcap * tanh(score / softcap); 0 for none
    longest    upper bound on every sequence's length, which determines the splits; 0 if unknown
    sinks      (heads) q's dtype: a score of one more position without a value, or None
    dependent  as in problem.PackedCall. starts, positions and all of a sequence's cache but its last m positions are
               read before the previous kernel has finished, so no kernel that this launch may overlap may write them
    adjacent   m is a multiple of this: so many adjacent rows are consecutive positions of one sequence, whose keys and
               values are then read once for all of them. 1 with a window
    in_panels  the output is returned in panels
    by_rings   True between products that keep rings in shared memory
    """

    q: Tensor
    cache: KVCache
    starts: Tensor
    positions: Tensor
    scale: float
    window: int = 0
    softcap: float = 0.0
    longest: int = 0
    dependent: bool = False
    sinks: Tensor | None = None
    adjacent: int = 1
    in_panels: bool = False
    by_rings: bool = False

    @property
    def heads(self) -> int:
        return self.q.shape[1] // self.cache.head_dim

    @property
    def sequences(self) -> int:
        """Number of runs of adjacent rows."""
        return self.q.shape[0] // self.adjacent

    def empty(self) -> Tensor:
        """Memory for the output."""
        return panels.empty(self.q, *self.q.shape) if self.in_panels else torch.empty_like(self.q)


@dataclass(frozen=True)
class NewCall:
    """AttentionCall of heads that are appended first, in one launch.

    append     its slots are starts + positions, each in a sequence of its own; its positions are those of the tables
    positions  (m) int64  in the sequences
    Other fields are AttentionCall's.
    """

    append: AppendCall
    starts: Tensor
    positions: Tensor
    scale: float
    window: int = 0
    softcap: float = 0.0
    longest: int = 0
    sinks: Tensor | None = None
    in_panels: bool = False
    by_rings: bool = False

    def after(self, q: Tensor) -> AttentionCall:
        """The attention of q (m, heads * head_dim), which `append` returned."""
        own = {name: value for name, value in vars(self).items() if name != "append"}
        return AttentionCall(q, self.append.cache, dependent=self.append.dependent, **own)

    def empty(self) -> Tensor:
        """Memory for the output."""
        return self.after(self.append.empty()).empty()


def check_append(call: AppendCall) -> None:
    """ValueError, with numbers, if the tensors do not fit together."""
    cache, m, qkv = call.cache, call.qkv.shape[0], call.qkv
    cache.check(qkv)
    angles = (call.cosines.shape[0], cache.head_dim // 2)
    wanted = {
        "qkv": (qkv, tuple(qkv.shape), qkv.dtype),
        "positions": (call.positions, (m,), torch.int64),
        "slots": (call.slots, (m,), torch.int64),
        "cosines": (call.cosines, angles, torch.float32),
        "sines": (call.sines, angles, torch.float32),
        "q_norm": (call.q_norm, (cache.head_dim,), qkv.dtype),
        "k_norm": (call.k_norm, (cache.head_dim,), qkv.dtype),
    }
    check_tensors(wanted, qkv.device)
    if qkv.ndim != 2 or qkv.shape[1] % cache.head_dim or call.heads < 1:
        raise ValueError(
            f"qkv of shape {tuple(qkv.shape)} holds no q beside {cache.kv_heads} heads for k and as many for v, "
            f"{cache.head_dim} wide"
        )


def check_attention(call: AttentionCall) -> None:
    """ValueError, with numbers, if the tensors do not fit together."""
    cache, m, q = call.cache, call.q.shape[0], call.q
    cache.check(q)
    wanted = {
        "q": (q, tuple(q.shape), q.dtype),
        "starts": (call.starts, (m,), torch.int64),
        "positions": (call.positions, (m,), torch.int64),
        "sinks": (call.sinks, (call.heads,), q.dtype),
    }
    check_tensors(wanted, q.device)
    if q.ndim != 2 or q.shape[1] % (cache.head_dim * cache.kv_heads):
        raise ValueError(f"q of shape {tuple(q.shape)} is no multiple of {cache.kv_heads} heads of {cache.head_dim}")
    if call.adjacent < 1 or m % call.adjacent or (call.adjacent > 1 and call.window):
        raise ValueError(
            f"{call.adjacent} adjacent rows of {m}, a window of {call.window}: they divide the rows, and have no window"
        )
    if call.in_panels and not panels.fits(m, q.shape[1]):
        raise ValueError(
            f"an output of shape {tuple(q.shape)} in panels: at most {panels.HEIGHTS[-1]} rows and a multiple of "
            f"{panels.WIDTH} are needed"
        )


def append(call: AppendCall) -> Tensor:
    """q (m, heads * head_dim), normalized and rotated. k (treated alike) and v are written to the cache."""
    check_append(call)
    if len(call.qkv) == 0 or reason_against(call.qkv, call.cache):
        return append_reference(call)
    q = call.empty()
    args = {"made": made_fields(call), "slots": call.slots}
    args |= {"q": q, "m": q.shape[0], "heads": call.heads, "cache": cache_fields(call.cache)}
    cut = {"by_rows": len(q) >= MANY_ROWS and fits_vectors(call), "dependent": call.dependent}
    launch("append_heads", q.dtype, call.cache.number.name, device=q.device, args=args, **cut)
    return q


def fits_vectors(call: AppendCall) -> bool:
    """True if a row's heads can be read, turned and stored 16 bytes at a time."""
    cache, made = call.cache, (call.qkv, call.cosines, call.sines, call.q_norm, call.k_norm)
    aligned = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in (*made, cache.k, cache.v))
    return aligned and cache.number == SAME and cache.head_dim in VECTOR_DIMS


def appended(qkv: Tensor, rotary: Rotary) -> AppendCall:
    """The append of the heads `qkv` to the caches of `rotary`."""
    cache = KVCache(rotary.k_cache, rotary.v_cache)
    return AppendCall(qkv, rotary.positions, rotary.slots, rotary.cosines, rotary.sines, cache)


def attend(call: AttentionCall) -> Tensor:
    """The attention's output (m, heads * head_dim) in q's dtype.

    ValueError if the tensors do not fit together, or, on a GPU, if q, k or v is not aligned to 16 bytes.
    """
    check_attention(call)
    if len(call.q) == 0:
        return call.empty()
    if reason_against(call.q, call.cache):
        return attend_reference(call)
    check_alignment(q=call.q)
    return run_attention(call, made_fields(None))


def attend_new(call: NewCall) -> Tensor:
    """The same for heads that are appended to the cache first."""
    new = call.append
    check_append(new)
    attention = call.after(new.empty())
    check_attention(attention)
    if len(new.qkv) == 0:
        return call.empty()
    if reason_against(new.qkv, new.cache):
        return attend_reference(call.after(append_reference(new)))
    if new.cache.head_dim == WIDE_HEAD_DIM:  # its registers have no room for new heads
        return attend(call.after(append(new)))
    return run_attention(attention, made_fields(new))


def run_attention(call: AttentionCall, made: dict[str, Any]) -> Tensor:
    """The result of `call` by the kernel, which makes q itself if `made` has heads."""
    check_alignment(k=call.cache.k, v=call.cache.v)
    out = call.empty()
    args = {name: getattr(call, name) for name in ATTENTION_FIELDS}
    args |= {"out": out, "out_panel": panels.height_of(out), "m": len(call.q), "heads": call.heads}
    args |= {"cache": cache_fields(call.cache), "made": made}
    if made["qkv"] is not None:
        args["q"] = None
    properties = torch.cuda.get_device_properties(out.device)
    clusters_exist = (properties.major, properties.minor) >= (9, 0)
    fast = has_fast_memory(out.device)
    splits, warps = choose_cut(call, properties.multi_processor_count if clusters_exist else 0, fast)
    dependent = call.dependent and not (fast and reads_long(call))
    least = LEAST_SHARED if splits == 1 else 0
    args["columns"] = choose_columns(call, splits, properties.multi_processor_count)
    cut = {"splits": splits, "warps": warps, "least_shared": least, "dependent": dependent}
    launch("decode_attention", out.dtype, call.cache.number.name, device=out.device, args=args, **cut)
    return out


def most_positions(call: AttentionCall) -> int:
    """Upper bound on the positions that a row sees; 0 if unknown."""
    return min([bound for bound in (call.longest, call.window) if bound], default=0)


def most_bytes(call: AttentionCall) -> int:
    """Bytes of keys and values that a call reads at most; 0 if unknown."""
    row = call.cache.k[0].numel() * call.cache.k.element_size()
    return 2 * row * call.sequences * most_positions(call)


def reads_long(call: AttentionCall) -> bool:
    """True if the call reads for longer than a launch takes, and gains nothing by beginning early."""
    return most_bytes(call) > PLAIN_BYTES and (call.by_rings or not 0 < most_positions(call) <= SHORT)


def blocks_of(call: AttentionCall) -> int:
    """Blocks without splits, of a single row of each sequence: adjacent rows are cut as it is."""
    columns = call.heads // call.cache.kv_heads
    return call.sequences * call.cache.kv_heads * -(-columns // BLOCK_HEADS)


def choose_cut(call: AttentionCall, processors: int, fast: bool) -> tuple[int, int]:
    """Splits of a sequence, and warps of a block.

    A warp asks for fewer bytes of a quantized cache, and is bound by their latency. So with fast memory (`fast`) long
    sequences get as many warps as run in one wave, if their chunks fit in the registers: of a multiprocessor two blocks
    of MANY_WARPS, or one of MOST_WARPS. All blocks of a cluster are on other multiprocessors, of one part of the GPU.
    """
    splits, blocks, most = choose_splits(call, processors), blocks_of(call), most_positions(call)
    if not fast or 0 < most <= SHORT or call.cache.number == SAME or call.cache.head_dim > MANY_WARPS_DIM:
        return splits, WARPS
    fitting = [
        (count, warps)
        for warps in (MANY_WARPS, MOST_WARPS)
        for count in range(1, MAX_SPLITS + 1)
        if (least := least_positions(count, blocks, processors, MOST_WARPS // warps))
        and (not most or count * warps * least <= most)
    ]
    return max(fitting, key=lambda cut: cut[0] * cut[1], default=(splits, MANY_WARPS))


def least_positions(size: int, blocks: int, processors: int, places: int) -> int:
    """The fewest positions of a warp for which `blocks` clusters of `size` blocks are worth it; 0 if they do not run at
    once on multiprocessors with `places` for a block each."""
    if blocks <= places * clusters_in_a_wave(size, processors):
        return LEAST_POSITIONS
    return CROWDED_POSITIONS if blocks <= clusters_in_a_wave(size, places * processors) else 0


def clusters_in_a_wave(size: int, places: int) -> int:
    """Clusters of `size` blocks that run at once, if the GPU has room for `places` blocks. In each part of it half a
    cluster is left over, on average: of an H200's 264 places for two blocks each, 32 clusters of 7 take 224 at once,
    but 32 of 8 need two waves."""
    return (places - PARTS * (size - 1) // 2) // size


def choose_splits(call: AttentionCall, processors: int) -> int:
    """Number of blocks that share a sequence, independent of its position: a captured graph serves all up to `longest`.

    If whole sequences do not all run in one wave, at least two splits even out the last wave. Adjacent rows have the
    splits of a single row, so that they add up in the same order. processors 0 means a GPU without clusters: no splits.
    """
    blocks = blocks_of(call)
    if processors == 0:
        return 1
    if 0 < most_positions(call) <= SHORT:
        return min(SHORT_SPLITS, max(1, int(SHORT_BLOCKS * processors) // blocks))
    least = 2 if blocks > 2 * processors else 1
    return min(MAX_SPLITS, max(least, int(LONG_BLOCKS * processors) // blocks))


def choose_columns(call: AttentionCall, splits: int, processors: int) -> int:
    """Query heads of a block, of all adjacent rows. Of a short sequence as few as leave half of the multiprocessors
    without a block: a block then makes, sends and merges fewer, and reads no more of the cache. No sum depends on it.

    Us a step at 1 x 128 on an H200, before and after: Qwen3-30B-A3B 1535 and 1507, ChatGLM2-6B 1226 and 1211,
    Llama-3-8B 1422 and 1414, Mixtral 2405 and 2394, gpt-oss-20b 1745 and 1749; at 1 x 800 1714 and 1697, 1313 and
    1304, 1535 and 1527.
    """
    heads = call.heads // call.cache.kv_heads * call.adjacent
    if not 0 < most_positions(call) <= SHORT:
        return BLOCK_HEADS
    clusters = call.sequences * call.cache.kv_heads * splits
    fitting = (count for count in (1, 2, 4) if clusters * -(-heads // count) <= processors // 2)
    return next(fitting, BLOCK_HEADS)


def reason_against(heads: Tensor, cache: KVCache) -> str | None:
    """The reason why the kernels cannot run on these tensors, or None."""
    if heads.device.type != "cuda":
        return f"the tensors are on the {heads.device.type}"
    if heads.dtype not in (torch.float16, torch.bfloat16):
        return f"the heads are {heads.dtype}: torch.float16 or torch.bfloat16 are needed"
    if reason := reason_against_heads(cache):
        return reason
    properties = torch.cuda.get_device_properties(heads.device)
    return reason_against_device((properties.major, properties.minor))


def cache_fields(cache: KVCache) -> dict[str, Any]:
    """The kernels' struct of a cache."""
    steps = (1, len(cache.k)) if cache.apart else (cache.kv_heads, 1)
    sizes = {"kv_heads": cache.kv_heads, "head_dim": cache.head_dim, "slot_step": steps[0], "head_step": steps[1]}
    return vars(cache) | sizes


def made_fields(call: AppendCall | None) -> dict[str, Any]:
    """The kernels' struct of new heads; None: of none."""
    return (
        {name: getattr(call, name) for name in MADE_FIELDS}
        if call
        else dict.fromkeys(MADE_FIELDS) | {"v_normed": False, "norm_eps": 0.0}
    )


def append_reference(call: AppendCall) -> Tensor:
    """`append` in plain torch, computed in float32."""
    cache, dtype = call.cache, call.qkv.dtype
    heads = call.qkv.float().unflatten(-1, (-1, cache.head_dim))
    q, k, v = heads.split([call.heads, cache.kv_heads, cache.kv_heads], dim=1)
    cosines, sines = call.cosines[call.positions].unsqueeze(1), call.sines[call.positions].unsqueeze(1)
    q = rotate(normed(q, call.q_norm, call.norm_eps), cosines, sines)
    k = rotate(normed(k, call.k_norm, call.norm_eps), cosines, sines)
    if call.v_normed:
        v = torch.nn.functional.rms_norm(v, v.shape[-1:], None, call.norm_eps)
    if cache.number.rotated:
        q, k = rotated(q), rotated(k)
    store(cache.k, cache.k_scales, call.slots, k)
    store(cache.v, cache.v_scales, call.slots, v)
    return q.to(dtype).flatten(1)


def normed(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The RMS norm of each head, or the heads if `weight` is None."""
    if weight is None:
        return heads
    return torch.nn.functional.rms_norm(heads, heads.shape[-1:], weight.float(), eps)


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Heads (m, h, head_dim) with inputs j and j + head_dim / 2 rotated by angle j of (m, 1, head_dim / 2)."""
    low, high = heads.chunk(2, -1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], -1)


def attend_reference(call: AttentionCall) -> Tensor:
    """`attend` in plain torch: slots of all sequences up to the longest position, gathered and masked, in float32."""
    cache = call.cache
    positions = torch.arange(int(call.positions.max()) + 1, device=call.q.device)
    slots = (call.starts.unsqueeze(1) + positions).clamp(max=cache.k.shape[0] - 1)
    k, v = loaded(cache.k, cache.k_scales, slots), loaded(cache.v, cache.v_scales, slots)
    q = call.q.float().view(-1, cache.kv_heads, call.heads // cache.kv_heads, cache.head_dim)
    scores = torch.einsum("mhgd,mthd->mhgt", q, k) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    behind = call.positions.unsqueeze(1) - positions
    seen = (behind >= 0) & (behind < call.window) if call.window else behind >= 0
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    weights = scores.softmax(-1)
    if call.sinks is not None:
        column = call.sinks.float().view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    out = torch.einsum("mhgt,mthd->mhgd", weights, v)
    out = out.to(call.q.dtype).flatten(1)
    return panels.panels_of(out) if call.in_panels else out
