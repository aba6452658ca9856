"""Other libraries' products with a quantized weight, each on random weights of a shape; missing libraries are left out.
A peer gives the calls that time_calls rotates over, or None if it does not take the problem."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import copies_for

try:
    from vllm import _custom_ops as vllm_ops
    from vllm.scalar_type import scalar_types
except ImportError:
    vllm_ops = scalar_types = None

try:
    from gemlite.helper import A16W4_HQQ_INT, A16W8_INT8
except ImportError:
    A16W4_HQQ_INT = A16W8_INT8 = None

GROUP = 128
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Peer:
    """A kernel of another library: its name, the width of its weight, its dtype, and its calls for (m, n, k).

    most_shapes  number of shapes that it is timed on: few if it compiles for each
    """

    name: str
    bits: int
    dtype: torch.dtype
    calls: Callable[[int, int, int], Calls]
    most_rows: int = 64
    most_shapes: int = 1000


def random_words(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, dtype=dtype, device="cuda")


def random_scales(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, device="cuda") * 0.01 + 0.001).to(dtype)


def cublas(m: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> Calls:
    x = torch.randn(m, k, dtype=dtype, device="cuda")
    weights = [torch.randn(n, k, dtype=dtype, device="cuda") for _ in range(copies_for(2 * n * k))]
    return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]


def tinygemm(m: int, n: int, k: int) -> Calls:
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    copies = range(copies_for(n * k // 2))
    weights = [(random_words(n // 8, k // 128, 32, 4), random_scales(k // GROUP, n, 2, dtype=x.dtype)) for _ in copies]
    return [lambda w=w, s=s: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, s) for w, s in weights]


def int_mm(m: int, n: int, k: int) -> Calls:
    """int8 activations, already quantized; padded to the 32 rows it needs."""
    x = random_words(max(m, 32), k, dtype=torch.int8)
    weights = [random_words(n, k, dtype=torch.int8).t() for _ in range(copies_for(n * k))]
    return [lambda w=w: torch._int_mm(x, w) for w in weights]


def inductor_int8(m: int, n: int, k: int) -> Calls:
    # Written as a reduction: torch 2.11 does not fuse the conversion into linear(), which is three times slower.
    @torch.compile(dynamic=False)
    def product(x: Tensor, w: Tensor, scales: Tensor) -> Tensor:
        return (w.float() * x.float()).sum(-1).to(x.dtype) * scales

    x, scales = torch.randn(m, k, dtype=torch.bfloat16, device="cuda"), random_scales(n, dtype=torch.bfloat16)
    weights = [random_words(n, k, dtype=torch.int8) for _ in range(copies_for(n * k))]
    return [lambda w=w: product(x, w, scales) for w in weights]


def marlin(bits: int) -> Callable[[int, int, int], Calls]:
    def calls(m: int, n: int, k: int) -> Calls:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        kind = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
        groups = k // GROUP if bits == 4 else 1
        none = torch.empty(0, dtype=torch.int, device="cuda")
        workspace = torch.zeros(528, dtype=torch.int, device="cuda")
        copies = range(copies_for(n * k * bits // 8))
        weights = [(random_words(k // 16, n * bits // 2), random_scales(groups, n, dtype=x.dtype)) for _ in copies]
        tail = (None, None, none, none, none, workspace, kind, m, n, k, True, False, True, False)
        return [lambda w=w, s=s: vllm_ops.marlin_gemm(x, None, w, None, s, *tail) for w, s in weights]

    return calls


def machete(m: int, n: int, k: int) -> Calls:
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    kind = scalar_types.uint4b8
    plain = random_words(k // 8, n).t().contiguous().t()
    packed = vllm_ops.machete_prepack_B(plain, a_type=x.dtype, b_type=kind, group_scales_type=x.dtype)
    weights = []
    for _ in range(copies_for(n * k // 2)):
        words = torch.empty_strided(packed.shape, packed.stride(), dtype=packed.dtype, device="cuda").copy_(packed)
        weights.append((words, random_scales(k // GROUP, n, dtype=x.dtype)))
    return [
        lambda w=w, s=s: vllm_ops.machete_mm(
            a=x, b_q=w, b_type=kind, b_group_zeros=None, b_group_scales=s, b_group_size=GROUP
        )
        for w, s in weights
    ]


def gemlite_w4(m: int, n: int, k: int) -> Calls:
    x = torch.randn(m, k, dtype=torch.float16, device="cuda")
    layers = []
    for _ in range(copies_for(n * k // 2)):
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
        scales = random_scales(n * k // GROUP, 1, dtype=x.dtype)
        layers.append(A16W4_HQQ_INT(device="cuda").from_weights(codes, scales, torch.full_like(scales, 8)))
    return [lambda layer=layer: layer(x) for layer in layers]


def gemlite_w8(m: int, n: int, k: int) -> Calls:
    x = torch.randn(m, k, dtype=torch.float16, device="cuda")
    layers = []
    for _ in range(copies_for(n * k)):
        codes, scales = random_words(n, k, dtype=torch.int8), random_scales(n, 1, dtype=x.dtype)
        layers.append(A16W8_INT8(device="cuda").from_weights(codes, scales=scales))
    return [lambda layer=layer: layer(x) for layer in layers]


PEERS = (
    Peer("cublas", 16, torch.float16, cublas),
    Peer("tinygemm", 4, torch.bfloat16, tinygemm, most_rows=4),
    Peer("torch._int_mm", 8, torch.int8, int_mm),
    Peer("inductor int8", 8, torch.bfloat16, inductor_int8, most_rows=1, most_shapes=3),
)
if vllm_ops is not None:
    PEERS += (
        Peer("vllm marlin w4", 4, torch.bfloat16, marlin(4)),
        Peer("vllm marlin w8", 8, torch.bfloat16, marlin(8)),
        Peer("vllm machete w4", 4, torch.bfloat16, machete),
    )
if A16W4_HQQ_INT is not None:  # it tunes itself to every shape
    PEERS += (
        Peer("gemlite w4", 4, torch.float16, gemlite_w4, most_shapes=3),
        Peer("gemlite w8", 8, torch.float16, gemlite_w8, most_shapes=3),
    )
