"""The products of few rows with the packed experts that they chose: csrc/wna16_gemv.cu.

All experts of a layer are one packed weight, the rows of expert e behind those of the experts before it. Two launches:
`up`, whose outputs are already multiplied with the weights of the experts, and `down`, which adds up a row's experts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels import reference, wna16_gemv
from lowbit.quant.kernels.extension import EXTENSION, launch, reason_against_device
from lowbit.quant.kernels.packed import CHUNK_K, TILE_ROWS, PackedWeight, dequantize_packed, padded
from lowbit.quant.kernels.pairs import Chosen, added
from lowbit.quant.kernels.pairs import products as pairs_of
from lowbit.quant.kernels.problem import (
    Deferred,
    NextNorm,
    PackedCall,
    Problem,
    check_alignment,
    place_of,
    reason_against_squares,
    reason_against_weight,
)
from lowbit.quant.kernels.wna16_args import NEXT_BYTES, args_of
from lowbit.quant.kernels.wna16_gemv import CROWD, MAX_WARPS, ROOM, WAVES, GemvCut

GATES = ("silu_mul", "gelu_tanh_mul", "clamped_mul")
MOST_UNITS = 65535  # largest grid
MANY_PARTS = 4  # of k
CHUNKS_AHEAD = 4  # of a warp in a ROOM, of weights in 4 bits
RAGGED_GROUPS = 4  # with as many scales to a chunk, or more, the kernel of up takes rows that end within a chunk
WHOLE_BITS = (4, 8)  # with the others the extension would compile for twice as long


@dataclass(frozen=True)
class Gate:
    """The activation of an expert's outputs, whose first half is the gate.

    activation  "silu_mul" or "gelu_tanh_mul": act(gate) * up; "clamped_mul": gate * sigmoid(alpha * gate) * (up + 1),
                gate at most `limit` and up within it on both sides (gpt-oss)
    """

    activation: str
    limit: float = 0.0
    alpha: float = 0.0


@dataclass(frozen=True)
class UpCall:
    """inner[i, s] = weight[i, s] * gate(x[i] W[e]^T + bias[e]), e the expert s of row i; in float32 up to there.

    x        (m, k)            float16 or bfloat16, contiguous
    weight   (count * n, k)    packed with pair_block n
    bias     (count, n)        x's dtype, or None
    deferred the norm still to finish on x
    dependent  launch without waiting for the previous kernel (programmatic dependent launch)
    next_weight  the words of down, of as many experts: the first bytes of the chosen ones are prefetched

    The result (m, top, n / 2) is padded with zeros to whole chunks of inputs of the next product.
    """

    x: Tensor
    weight: PackedWeight
    chosen: Chosen
    gate: Gate
    bias: Tensor | None = None
    deferred: Deferred | None = None
    dependent: bool = False
    next_weight: Tensor | None = None

    def empty(self) -> Tensor:
        """Memory for the result."""
        inner = self.weight.n // self.chosen.count // 2
        return self.x.new_empty(self.x.shape[0], self.chosen.top, padded(inner, CHUNK_K))

    def check(self) -> None:
        """ValueError, with numbers, if the tensors do not fit together."""
        reason = reason_against_experts(self.x, self.weight, self.chosen, self.bias)
        n = self.weight.n // self.chosen.count
        if reason is None and self.weight.pair_block != n:
            reason = f"gate and up of an expert need a weight packed with pair_block {n}, not {self.weight.pair_block}"
        if reason is None and self.gate.activation not in GATES:
            reason = f"activation {self.gate.activation!r} is none of {GATES}"
        if reason is None and tuple(self.x.shape) != (len(self.chosen.experts), self.weight.k):
            reason = f"x must have the shape {(len(self.chosen.experts), self.weight.k)}"
        ahead = self.next_weight
        if reason is None and ahead is not None and (len(ahead) % self.chosen.count or not ahead.is_contiguous()):
            reason = f"next_weight {tuple(ahead.shape)} does not hold as many experts, one after another"
        reason = reason or reason_against_squares(len(self.x), self.x.device, self.weight.k, self.deferred)
        if reason:
            raise ValueError(f"x of shape {tuple(self.x.shape)} with {self.chosen.count} experts: {reason}")


@dataclass(frozen=True)
class DownCall:
    """y[i] = residual[i] + sum over s of (x[i, s] W[e]^T + weight[i, s] * bias[e]), e the expert s of row i.

    x         (m, top, k)      what `up` returns: already multiplied with the experts' weights, k padded to whole chunks
    weight    (count * n, k)   packed with pair_block 16
    bias      (count, n)       x's dtype, or None
    residual  (m, n)           x's dtype, or None
    next_norm extra outputs that start the norm after y
    dependent  launch without waiting for `up`; the choice of experts must be older
    next_weight a tensor that the next product reads: its first bytes are prefetched
    """

    x: Tensor
    weight: PackedWeight
    chosen: Chosen
    bias: Tensor | None = None
    residual: Tensor | None = None
    dependent: bool = False
    next_weight: Tensor | None = None
    next_norm: NextNorm | None = None

    @property
    def n(self) -> int:
        return self.weight.n // self.chosen.count

    def empty(self) -> Tensor:
        """Memory for y."""
        return self.x.new_empty(self.x.shape[0], self.n)

    def check(self) -> None:
        """ValueError, with numbers, if the tensors do not fit together."""
        reason = reason_against_experts(self.x, self.weight, self.chosen, self.bias)
        shape, rows = (*self.chosen.experts.shape, padded(self.weight.k, CHUNK_K)), (len(self.x), self.n)
        if reason is None and self.weight.pair_block != TILE_ROWS:
            reason = f"a weight packed with pair_block {self.weight.pair_block} is for gate and up"
        if reason is None and tuple(self.x.shape) != shape:
            reason = f"x must have the shape {shape}"
        norm = self.next_norm
        halves = {"residual": self.residual} | ({} if norm is None else {"z": norm.z})
        for name, tensor in halves.items():
            if reason is None and tensor is not None and (tuple(tensor.shape), tensor.dtype) != (rows, self.x.dtype):
                reason = f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {rows} {self.x.dtype}"
        reason = reason or reason_against_squares(len(self.x), self.x.device, self.n, norm)
        if reason:
            raise ValueError(f"x of shape {tuple(self.x.shape)} with {self.chosen.count} experts: {reason}")


def reason_against_experts(x: Tensor, weight: PackedWeight, chosen: Chosen, bias: Tensor | None) -> str | None:
    """The reason why weight, choice and bias do not fit together, or None."""
    n, count = weight.n // max(chosen.count, 1), chosen.count
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return f"x is {x.dtype}, the weight is for {weight.dtype}: one half precision is needed"
    if count < 1 or weight.n % count or n % TILE_ROWS:
        return f"{weight.n} rows are not {count} experts of multiples of {TILE_ROWS} rows"
    reason = reason_against_weight(PackedCall(x.new_empty(0, weight.k), weight))
    if reason is not None:
        return reason
    shape, rows = tuple(chosen.experts.shape), len(x)
    if len(shape) != 2 or shape[0] != rows or tuple(chosen.weights.shape) != shape or not shape[1] >= 1:
        return f"experts and weights are {shape} and {tuple(chosen.weights.shape)} for {rows} rows"
    if chosen.experts.dtype != torch.int32 or chosen.weights.dtype != torch.float32:
        return f"experts and weights are {chosen.experts.dtype} and {chosen.weights.dtype}, not int32 and float32"
    if bias is not None and (tuple(bias.shape) != (count, n) or bias.dtype != x.dtype):
        return f"bias is {tuple(bias.shape)} {bias.dtype}, not {(count, n)} {x.dtype}"
    tensors = {"x": x, "words": weight.words, "bias": bias, "experts": chosen.experts, "weights": chosen.weights}
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.device != x.device or not tensor.is_contiguous()):
            return f"{name} is on {tensor.device} with strides {tensor.stride()}: contiguous and beside x is needed"
    return None


def up(call: UpCall) -> Tensor:
    """The result of `call` (m, top, padded n / 2). ValueError if its tensors do not fit together."""
    call.check()
    if not call.x.numel() or reason_against(call.x, call.weight, call.chosen):
        return reference_up(call)
    return run_up(call)


def down(call: DownCall) -> Tensor:
    """y (m, n) of `call`. ValueError if its tensors do not fit together."""
    call.check()
    if not call.x.numel() or reason_against(call.x, call.weight, call.chosen):
        return reference_down(call)
    return run_down(call)


def reason_against(x: Tensor, weight: PackedWeight, chosen: Chosen) -> str | None:
    """The reason why the kernel cannot run on these rows, or None."""
    if x.device.type != "cuda":
        return f"the tensors are on the {x.device.type}"
    if weight.bits not in WHOLE_BITS:
        return f"numbers of {weight.bits} bits: it has code for {WHOLE_BITS}"
    if chosen.top > CROWD:
        return f"{chosen.top} experts of a row: the kernel takes at most {CROWD}"
    if chosen.experts.numel() > MOST_UNITS:
        return f"{chosen.experts.numel()} pairs of a row and an expert: the kernel takes at most {MOST_UNITS}"
    return None if EXTENSION is None else reason_against_device(torch.cuda.get_device_capability(x.device))


def run_up(call: UpCall, cut: GemvCut | None = None, parts: int | None = None) -> Tensor:
    """The result of `call`, which `check` has passed, by the kernel.

    parts  of k, whose sums are added up in order; one row's are as many as the cut has warps along k
    """
    n, ahead = call.weight.n // call.chosen.count, call.next_weight
    product = PackedCall(call.x, replace(call.weight, n=n), dependent=call.dependent, deferred=call.deferred)
    if call.weight.k % CHUNK_K and call.weight.scale_groups < RAGGED_GROUPS:
        x = call.x if call.deferred is None else reference.divided(call.x, call.deferred)
        x = torch.nn.functional.pad(x, (0, padded(call.weight.k, CHUNK_K) - call.weight.k))
        product = replace(product, x=x, deferred=None)
    y = call.empty()
    args = {"gate": call.gate.activation.removesuffix("_mul"), "limit": call.gate.limit, "alpha": call.gate.alpha}
    args |= {"down": False, "y_pitch": y.shape[2], "next_stride": 0}
    if ahead is not None:
        check_alignment(next_weight=ahead)
        product = replace(product, next_weight=ahead)
        args["next_stride"] = ahead.nbytes // call.chosen.count
    if cut is None:
        cut = up_cut(product, call.chosen)
        parts, cut = cut.k_warps, cut if len(call.x) == 1 else rows_cut(cut, place_of(y.device)[3])
    args["parts"] = parts or cut.k_warps
    run(product, y, call.chosen, call.bias, args, cut)
    return y


def run_down(call: DownCall, cut: GemvCut | None = None) -> Tensor:
    """y of `call`, which `check` has passed, by the kernel."""
    weight = replace(call.weight, n=call.n)
    product = PackedCall(
        call.x.flatten(0, 1),
        weight,
        residual=call.residual,
        dependent=call.dependent,
        next_weight=call.next_weight,
        next_norm=call.next_norm,
    )
    y = call.empty()
    args = {"gate": "silu", "limit": 0.0, "alpha": 0.0, "down": True, "y_pitch": call.n, "next_stride": 0, "parts": 0}
    run(product, y, call.chosen, call.bias, args, cut or down_cut(product, call.chosen.top))
    return y


def run(
    product: PackedCall, y: Tensor, chosen: Chosen, bias: Tensor | None, args: dict[str, Any], cut: GemvCut
) -> None:
    """Run the kernel. `args` are the rest of its struct."""
    w, squares = product.weight, None if product.deferred is None else product.deferred.squares
    check_alignment(x=product.x, words=w.words, scales=w.scales, zeros=w.zeros, factors=w.factors, squares=squares)
    tiles = w.n // TILE_ROWS
    of_one = args_of(product, y) | {"m": len(chosen.experts), "k": product.x.shape[1], "tiles": tiles}
    if args["next_stride"]:
        distinct = min(chosen.experts.numel(), chosen.count)
        of_one["next_bytes"] = min(args["next_stride"], NEXT_BYTES // distinct) // 16 * 16
    args = args | {"product": of_one, "experts": chosen.experts, "weights": chosen.weights, "bias": bias}
    args |= {"count": chosen.count, "top": chosen.top}
    args |= {"words_stride": w.words.nbytes // 16 // chosen.count, "sides_stride": w.scales.nbytes // 4 // chosen.count}
    variant = product.x.dtype, w.variant
    launch(
        "wna16_experts",
        *variant,
        device=y.device,
        args=args,
        groups_per_chunk=w.scale_groups,
        dependent=product.dependent,
        **vars(cut),
    )


def up_cut(product: PackedCall, chosen: Chosen) -> GemvCut:
    """The launch of `up`: that of one product with the rows of one row's experts, so that a row's sums do not depend on
    the number of rows. With fast memory also of more waves than one: Mixtral 1 x 128 on an H200 2390 us, not 2439."""
    w, device = product.weight, product.x.device
    sizes = (1, w.n * chosen.top, w.k, w.bits, w.group_size, product.x.dtype)
    problem = Problem(*sizes, *place_of(device), is_float=w.is_float)
    tiles, chunks = -(-problem.n // TILE_ROWS), -(-w.k // CHUNK_K)
    if problem.fast_memory:  # one tile a warp: the kernel has no code for two, as wna16_gemv has
        crowded = [*wna16_gemv.cuts_of_room(problem, CROWD)[:1], *([WAVES] if chunks >= WAVES.k_warps else [])]
        if crowded:
            return crowded[0]
    k_warps = max(1, min(MAX_WARPS, chunks, ROOM * problem.processors // tiles))
    return GemvCut(1, {1: 4, 2: 2}.get(k_warps, 1), k_warps, 1)


def rows_cut(cut: GemvCut, fast: bool) -> GemvCut:
    """The launch of `up` for several rows. With fast memory blocks of four tiles, whose warps take all parts of k by
    turns: us a step of 8 rows on an H200, bfloat16, with half of one row's warps along k and with these:
    Qwen3-30B-A3B 3781 and 3716, gpt-oss-20b 4193 and 4125, Mixtral 7077 and 6995. Elsewhere half as many warps along k,
    if there are four or more."""
    if fast:
        return GemvCut(1, 4, 1, 1, CROWD)
    return replace(cut, k_warps=cut.k_warps // 2) if cut.k_warps >= MANY_PARTS else cut


def down_cut(product: PackedCall, top: int) -> GemvCut:
    """The launch of `down`: as many warps for each of a row's experts as let one row's blocks run in one wave.

    It does not depend on the number of rows, so that a row's sums do not either. With fast memory fewer warps ask for
    more, if each then asks for all its chunks at once: Qwen3-30B-A3B 1 x 128 on an H200 1535 us with 16, 1557 with 24.
    """
    w = product.weight
    _, _, processors, fast = place_of(product.x.device)
    tiles, chunks = -(-w.n // TILE_ROWS), -(-w.k // CHUNK_K)
    for room in (ROOM, CROWD) if fast or top > ROOM else (ROOM,):
        for each in range(min(room // top, chunks), 1, -1):
            whole = room == CROWD or not fast or (w.bits == 4 and -(-chunks // each) <= CHUNKS_AHEAD)
            if whole and tiles <= room // (top * each) * processors:
                return GemvCut(1, 1, top * each, 1, room)
    return GemvCut(1, max(1, MAX_WARPS // top), top, 1, room)


def products_of(x: Tensor, weight: PackedWeight, chosen: Chosen) -> Tensor:
    """(m, top, n) float32: x (m, top, k) with each row's experts."""
    w = dequantize_packed(weight).unflatten(0, (chosen.count, -1))
    pairs = pairs_of(x.flatten(0, 1).float(), w, chosen.experts.flatten())
    return pairs.unflatten(0, tuple(chosen.experts.shape))


def gated(sums: Tensor, gate: Gate) -> Tensor:
    """The activation of sums (..., n), float32 (..., n / 2)."""
    act, value = sums.chunk(2, -1)
    if gate.activation != "clamped_mul":
        return reference.activate(act, gate.activation.removesuffix("_mul")) * value
    act, value = act.clamp(max=gate.limit), value.clamp(-gate.limit, gate.limit)
    return act * torch.sigmoid(gate.alpha * act) * (value + 1)


def reference_up(call: UpCall) -> Tensor:
    """The result of `call` in plain torch."""
    chosen = call.chosen
    sums = products_of(call.x.unsqueeze(1).expand(-1, chosen.top, -1), call.weight, chosen)
    if call.deferred is not None:
        sums = sums * reference.inverse_deviation(call.deferred).unsqueeze(2)
    if call.bias is not None:
        sums = sums + call.bias[chosen.experts.long()].float()
    inner = (gated(sums, call.gate) * chosen.weights.unsqueeze(2)).to(call.x.dtype)
    return torch.nn.functional.pad(inner, (0, padded(inner.shape[2], CHUNK_K) - inner.shape[2]))


def reference_down(call: DownCall) -> Tensor:
    """y of `call` in plain torch, added up in the order of a row's experts."""
    chosen = call.chosen
    parts = products_of(call.x[..., : call.weight.k], call.weight, chosen)
    if call.bias is not None:
        parts = parts + chosen.weights.unsqueeze(2) * call.bias[chosen.experts.long()].float()
    y = added(parts, call.residual).to(call.x.dtype)
    if call.next_norm is not None:
        reference.begin_norm(y, call.next_norm)
    return y
