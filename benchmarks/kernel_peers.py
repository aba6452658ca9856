"""Other libraries' products with a quantized weight, each on random weights of a shape; missing libraries are left out.
A peer gives the calls that time_calls rotates over, or None if it does not take the problem."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import copies_for

try:
    from vllm import _custom_ops as vllm_ops
    from vllm.scalar_type import scalar_types
except ImportError:
    vllm_ops = scalar_types = None

try:
    import gemlite as gemlite_package
    from gemlite import helper as gemlite

    # its own launches for an H100: it has none for an H200, and would tune itself to every shape
    gemlite_package.load_config(str(Path(gemlite_package.__file__).with_name("configs") / "h100.json"))
except ImportError:
    gemlite = None

try:
    from humming.layer import HummingLayer
except ImportError:
    HummingLayer = None

GROUP = 128
E8M0 = torch.float8_e8m0fnu
REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # of what one cannot do
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


def marlin(kind: str, group: int | None, scale: torch.dtype | None = None) -> Callable[[int, int, int], Calls]:
    """Marlin's product in bfloat16 with a weight of vLLM's type `kind`: a scale of `scale`, bfloat16 if None, for each
    `group` inputs of an output, or for each output if None."""

    def calls(m: int, n: int, k: int) -> Calls:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        weight_type = getattr(scalar_types, kind)
        bits, groups = weight_type.size_bits, k // group if group else 1
        whole = torch.ones(1, device="cuda") if scale == torch.float8_e4m3fn else None  # NVFP4's scale of all
        none = torch.empty(0, dtype=torch.int, device="cuda")
        workspace = torch.zeros(528, dtype=torch.int, device="cuda")
        copies = range(copies_for(n * k * bits // 8))
        weights = [
            (random_words(k // 16, n * bits // 2), random_scales(groups, n, dtype=scale or x.dtype)) for _ in copies
        ]
        tail = (None, whole, none, none, none, workspace, weight_type, m, n, k, True, False, True, False)
        return [lambda w=w, s=s: vllm_ops.marlin_gemm(x, None, w, None, s, *tail) for w, s in weights]

    return calls


def marlin_int8(m: int, n: int, k: int) -> Calls:
    """Marlin's product in bfloat16 of int4 in groups of GROUP with x in int8, rounded in advance."""
    x, x_scales = random_words(m, k, dtype=torch.int8), random_scales(m, 1, dtype=torch.float32)
    none, workspace = (torch.empty(count, dtype=torch.int, device="cuda").zero_() for count in (0, 528))
    weights = []
    for _ in range(copies_for(n * k // 2)):
        scales = torch.randint(1, 4097, (k // GROUP, n), dtype=torch.int16, device="cuda").view(torch.bfloat16)
        weights.append((random_words(k // 16, 2 * n), scales))
    tail = (x_scales, None, none, none, none, workspace, scalar_types.uint4b8, m, n, k, True, False, True, False)
    return [lambda w=w, s=s: vllm_ops.marlin_gemm(x, None, w, None, s, *tail) for w, s in weights]


def cutlass_fp8(m: int, n: int, k: int) -> Calls:
    """CUTLASS's product of int4 in groups of GROUP with x in FP8, rounded in advance, as vLLM calls it."""
    x, x_scales = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn), random_scales(m, 1, dtype=torch.float32)
    weights = []
    for _ in range(copies_for(n * k // 2)):
        words = vllm_ops.cutlass_encode_and_reorder_int4b(random_words(n, k // 8).t())
        scales = random_scales(k // GROUP, n, dtype=torch.float8_e4m3fn)
        weights.append((words, vllm_ops.cutlass_pack_scale_fp8(scales), random_scales(n, 1, dtype=torch.float32)))
    return [
        lambda w=w, s=s, each=each: vllm_ops.cutlass_w4a8_mm(x, w, s, GROUP, each, x_scales) for w, s, each in weights
    ]


def machete(kind: str, group: int | None) -> Callable[[int, int, int], Calls]:
    """Machete's product in bfloat16 with a weight of vLLM's type `kind`: a scale for each `group` inputs of an output,
    or for each output if None."""

    def calls(m: int, n: int, k: int) -> Calls:
        x, weight_type = torch.randn(m, k, dtype=torch.bfloat16, device="cuda"), getattr(scalar_types, kind)
        bits = weight_type.size_bits
        plain = random_words(k * bits // 32, n).t().contiguous().t()
        packed = vllm_ops.machete_prepack_B(plain, a_type=x.dtype, b_type=weight_type, group_scales_type=x.dtype)
        weights = []
        for _ in range(copies_for(n * k * bits // 8)):
            words = torch.empty_strided(packed.shape, packed.stride(), dtype=packed.dtype, device="cuda").copy_(packed)
            weights.append((words, random_scales(k // group if group else 1, n, dtype=x.dtype)))
        more = {"b_type": weight_type, "b_group_zeros": None, "b_group_size": group or -1}
        return [lambda w=w, s=s: vllm_ops.machete_mm(a=x, b_q=w, b_group_scales=s, **more) for w, s in weights]

    return calls


def humming(inputs: str | None = None, **weight: object) -> Callable[[int, int, int], Calls]:
    """Humming's product in bfloat16, its rows of x rounded to `inputs` before it; `weight` is its weight_config."""

    @lru_cache(maxsize=1)
    def layers(n: int, k: int) -> list[torch.nn.Module]:
        more = {"input_config": {"dtype": inputs}} if inputs else {}
        config = {"weight_config": dict(weight), "torch_dtype": torch.bfloat16, **more}
        layer = HummingLayer(shape_n=n, shape_k=k, **config).cuda()
        dense = torch.randn(n, k, dtype=torch.bfloat16, device="cuda") * 0.02
        layer.load_from_unquantized(dense)
        layer.transform()
        x = torch.randn(16, k, dtype=torch.bfloat16, device="cuda")
        wanted = torch.nn.functional.linear(x, dense)
        if not (layer(x) - wanted).norm() < 0.9 * wanted.norm():  # 2 bits are 0.6 off, and unrelated numbers 1.4
            raise ValueError(f"Humming's y is not x W^T for {weight}")
        count = copies_for(sum(each.nbytes for each in layer.parameters()))
        return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]

    def calls(m: int, n: int, k: int) -> Calls:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        return [lambda layer=layer: layer(x) for layer in layers(n, k)]

    return calls


def gemlite_hqq(name: str, bits: int) -> Callable[[int, int, int], Calls]:
    """gemlite's product of integers of `bits` bits, by the helper of this name."""

    def calls(m: int, n: int, k: int) -> Calls:
        x = torch.randn(m, k, dtype=torch.float16, device="cuda")
        layers = []
        for _ in range(copies_for(n * k * bits // 8)):
            codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, device="cuda")
            scales = random_scales(n * k // GROUP, 1, dtype=x.dtype)
            zeros = torch.full_like(scales, 1 << bits - 1)
            layers.append(getattr(gemlite, name)(device="cuda").from_weights(codes, scales, zeros))
        return [lambda layer=layer: layer(x) for layer in layers]

    return calls


def gemlite_channel(name: str, dtype: torch.dtype) -> Callable[[int, int, int], Calls]:
    """gemlite's product of 8-bit codes of `dtype` with a scale for each output, by the helper of this name."""

    def calls(m: int, n: int, k: int) -> Calls:
        x = torch.randn(m, k, dtype=torch.float16, device="cuda")
        layers = []
        for _ in range(copies_for(n * k)):
            codes = random_words(n, k, dtype=torch.int8)
            codes = codes if dtype == torch.int8 else codes.float().to(dtype)
            scales = random_scales(n, 1, dtype=x.dtype)
            layers.append(getattr(gemlite, name)(device="cuda").from_weights(codes, scales=scales))
        return [lambda layer=layer: layer(x) for layer in layers]

    return calls


PEERS = (
    Peer("cublas", 16, torch.float16, cublas),
    Peer("tinygemm", 4, torch.bfloat16, tinygemm, most_rows=4),
    Peer("torch._int_mm", 8, torch.int8, int_mm),
    Peer("inductor int8", 8, torch.bfloat16, inductor_int8, most_rows=1, most_shapes=3),
)
if vllm_ops is not None:
    PEERS += (
        Peer("vllm marlin w4", 4, torch.bfloat16, marlin("uint4b8", GROUP)),
        Peer("vllm marlin w8", 8, torch.bfloat16, marlin("uint8b128", None)),
        Peer("vllm machete w4", 4, torch.bfloat16, machete("uint4b8", GROUP)),
    )
if gemlite is not None:  # it tunes itself to shapes that its table lacks
    PEERS += (
        Peer("gemlite w4", 4, torch.float16, gemlite_hqq("A16W4_HQQ_INT", 4), most_shapes=3),
        Peer("gemlite w8", 8, torch.float16, gemlite_channel("A16W8_INT8", torch.int8), most_shapes=3),
    )
