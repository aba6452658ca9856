"""The product with a packed weight: its tensors (PackedCall), and the properties that select a kernel (Problem)."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowbit.quant.kernels import panels
from lowbit.quant.kernels.packed import CHUNK_K, PackedWeight

NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("none", "silu_mul", "gelu", "gelu_tanh", "quick_gelu")


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of q and k, and the caches for k and v.

    positions       (m)                           int64    each row's position
    slots           (m)                           int64    each row's slot in the caches
    cosines, sines  (max position, head_dim / 2)  float32
    k_cache, v_cache  (slots, kv_heads, head_dim)  the activations' dtype; written in place
    """

    positions: Tensor
    slots: Tensor
    cosines: Tensor
    sines: Tensor
    k_cache: Tensor
    v_cache: Tensor

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k_cache.shape[1]


FAST_MEMORY = 30e9  # bytes per second and multiprocessor: an H200 has 37e9, an H100 25e9
PART = 16  # adjacent values of a row whose squares are summed together
PARTS = 4  # a row has a multiple of this many such parts


@dataclass(frozen=True)
class Deferred:
    """A half-applied RMS norm: x is already h * weight, and the product must still divide its sums by rms(h).

    squares  (m, k / 16)  float32: sums of 16 adjacent squares of h
    eps      rms(h) is sqrt(mean(h^2) + eps)
    """

    squares: Tensor
    eps: float


@dataclass(frozen=True)
class NextNorm:
    """Additional outputs of a product that start an RMS norm of y, which the next product finishes. y is rounded first.

    weight   (n)          y's dtype
    z        (m, n)       y's dtype; written: y * weight, clamped to the dtype's largest number for finite y; (m, n)
                          or in panels
    squares  (m, n / 16)  float32; written: sums of 16 adjacent squares
    """

    weight: Tensor
    z: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, x: Tensor, weight: Tensor, in_panels: bool = False) -> "NextNorm":
        """Memory for that of the product of x, in the dtype of `weight`; z in panels if requested."""
        m, n = panels.shape_of(x)[0], weight.shape[0]
        z = panels.empty(weight, m, n) if in_panels else weight.new_empty(m, n)
        return cls(weight, z, weight.new_empty(m, n // PART, dtype=torch.float32))


@dataclass(frozen=True)
class PackedCall:
    """y = activation(norm(x) W^T + bias) + residual, with everything between x and y in float32.

    x           (m, k)   float16 or bfloat16, contiguous; or in panels (panels.py)
    bias        (n)      x's dtype, or None
    residual    (m, n)   x's dtype, or None
    norm        "rms": x / sqrt(mean(x^2) + eps) * norm_weight; "layer": after subtracting the mean; rounded to x's
                dtype
    activation  "silu_mul": silu(first n / 2 outputs) * the other outputs, for a weight packed with pair_block = n
    rotary      the outputs are heads of q, k and v; q is returned, k and v are stored
    y_panels    y is returned in panels
    dependent   launch without waiting for the previous kernel (programmatic dependent launch): the weight must not be
                written by that kernel
    next_weight a tensor that the next product reads, of any dtype: its first bytes are prefetched if the kernel does
    so; no result depends on it
    deferred    the norm still to finish on x (excludes `norm`)
    next_norm   extra outputs that start the norm after y
    x_scales    (m) float32: x is in codes of int8, shuffled (packed.py), times these; half precision is the weight's
    """

    x: Tensor
    weight: PackedWeight
    bias: Tensor | None = None
    residual: Tensor | None = None
    norm: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float = 0.0
    activation: str = "none"
    rotary: Rotary | None = None
    float32_out: bool = False
    y_panels: bool = False
    dependent: bool = False
    next_weight: Tensor | None = None
    deferred: Deferred | None = None
    next_norm: NextNorm | None = None
    x_scales: Tensor | None = None

    @property
    def m(self) -> int:
        return panels.shape_of(self.x)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The half-precision type of everything but codes."""
        return self.x.dtype if self.x_scales is None else self.weight.dtype

    @property
    def y_shape(self) -> tuple[int, int]:
        """Rows and width of y."""
        if self.rotary is not None:
            return self.m, self.weight.n - 2 * self.rotary.kv_heads * self.rotary.head_dim
        return self.m, self.weight.n // 2 if self.activation == "silu_mul" else self.weight.n

    @property
    def y_dtype(self) -> torch.dtype:
        return torch.float32 if self.float32_out else self.dtype

    def empty(self) -> Tensor:
        """Memory for y."""
        if self.y_panels:
            return panels.empty(self.x, *self.y_shape)
        return self.x.new_empty(self.y_shape, dtype=self.y_dtype)

    def problem(self) -> "Problem":
        """The Problem of this call, for the choice of a kernel. Queries the GPU's capability."""
        w = self.weight
        sizes = (self.m, w.n, w.k, w.bits, w.group_size, self.dtype)
        return Problem(
            *sizes,
            *place_of(self.x.device),
            code_inputs=self.x_scales is not None,
            is_float=w.is_float,
            norm=self.norm != "none",
            panels=self.x.ndim == 3,
        )

    def check(self) -> None:
        """ValueError, with numbers, if the tensors do not fit together."""
        reason = reason_against_weight(self) or reason_against_tensors(self) or reason_against_epilogue(self)
        if reason:
            w = self.weight
            raise ValueError(f"x of shape {tuple(self.x.shape)} with a weight ({w.n}, {w.k}): {reason}")


@dataclass(frozen=True)
class Problem:
    """The properties that select a kernel."""

    m: int
    n: int
    k: int
    bits: int  # 16 for a dense weight of any dtype
    group_size: int
    dtype: torch.dtype
    device: str  # "cuda" or "cpu"
    capability: tuple[int, int] | None = None  # of the GPU
    processors: int = 0  # multiprocessors of the GPU
    fast_memory: bool = False  # has_fast_memory of the GPU
    code_inputs: bool = False
    is_float: bool = False  # the number of a weight of 4 or 8 bits
    norm: bool = False  # of x, before the product
    panels: bool = False  # x is in panels

    @property
    def is_stream(self) -> bool:
        """True for integers of a width that does not divide a word evenly: Stream in csrc/dequant.cuh."""
        return self.bits not in (4, 8, 16)

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        number = f"fp{self.bits}" if self.is_float else f"w{self.bits}"
        scheme = "dense" if self.bits == 16 else f"{number}{'a8' if self.code_inputs else ''} {group}"
        return f"m {self.m:>4}  {self.n} x {self.k}  {scheme} {str(self.dtype).removeprefix('torch.')}"


def place_of(device: torch.device) -> tuple[str, tuple[int, int] | None, int, bool]:
    """Device, capability, multiprocessors and fast_memory for a Problem."""
    if device.type != "cuda":
        return device.type, None, 0, False
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    return device.type, capability, properties.multi_processor_count, has_fast_memory(device)


@cache
def has_fast_memory(device: torch.device) -> bool:
    """True if memory bandwidth exceeds what the multiprocessors can consume in products of packed weights, as on an
    H200.

    Overlapping kernels then compete for memory instead of filling gaps. Kept, since the driver takes long to say a
    clock rate, and each launch asks.
    """
    properties = torch.cuda.get_device_properties(device)
    kilohertz, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    return 2e3 * kilohertz * bits / 8 > FAST_MEMORY * properties.multi_processor_count


def check_alignment(**tensors: Tensor | None) -> None:
    """ValueError for a tensor that does not start at a multiple of 16 bytes, the size of the kernels' reads."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(f"{name} starts at {tensor.data_ptr():#x}: the kernels read 16 bytes at a time, aligned")


def reason_against_weight(call: PackedCall) -> str | None:
    """The reason why the packed tensors do not match the weight's sizes, or None."""
    w = call.weight
    if call.x.ndim not in (2, 3) or panels.shape_of(call.x)[1] != w.k:
        return f"x must have the shape (m, {w.k})"
    if w.words.shape[2:] != (64 * w.bits,) or w.words.dtype != torch.int32:
        return f"words of shape {tuple(w.words.shape)} {w.words.dtype} are no packed {w.bits}-bit weight"
    tiles, chunks = -(-w.n // 16), -(-w.k // 128)
    if tuple(w.words.shape[:2]) != (tiles, chunks):
        return f"words hold {tuple(w.words.shape[:2])} tiles and chunks, the shape has ({tiles}, {chunks})"
    rows = {-1: 0 if w.is_float else 1, 256: w.k // 256}.get(w.group_size, chunks)
    sides = (tiles, rows, 8, 1 if w.group_size in (-1, 256) else 128 // w.group_size, 2)
    if w.factors is not None and (tuple(w.factors.shape) != (tiles, 8, 2) or w.factors.dtype != torch.float32):
        return f"factors of shape {tuple(w.factors.shape)} {w.factors.dtype}, not {(tiles, 8, 2)} torch.float32"
    if tuple(w.scales.shape) != sides:
        return f"scales of shape {tuple(w.scales.shape)} were not packed for groups of {w.group_size}: need {sides}"
    if w.zeros is not None and (tuple(w.zeros.shape) != sides or w.zeros.dtype != torch.uint8):
        return f"zeros of shape {tuple(w.zeros.shape)} {w.zeros.dtype}, not {sides} torch.uint8"
    return None


def reason_against_tensors(call: PackedCall) -> str | None:
    """The first mismatch in dtype, device or contiguity, or None. Half-precision tensors must share x's dtype."""
    x, w, m, n, k, dtype = call.x, call.weight, call.m, call.weight.n, call.weight.k, call.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x is {dtype}: torch.float16 or torch.bfloat16 are needed"
    if w.inputs not in (None, dtype):
        return f"the weight was packed for inputs in {w.inputs}, x is {dtype}"
    if reason := reason_against_codes(call):
        return reason
    halves: dict[str, tuple[Tensor | None, tuple[int, ...] | None]]
    halves = {
        "scales": (None if w.is_float and w.bits == 4 else w.scales, None),
        "bias": (call.bias, (n,)),
        "residual": (call.residual, (m, n)),
        "norm_weight": (call.norm_weight, (k,)),
        "norm_bias": (call.norm_bias, (k,)),
    }
    if call.rotary is not None:
        caches = tuple(call.rotary.k_cache.shape)
        halves |= {"k_cache": (call.rotary.k_cache, caches), "v_cache": (call.rotary.v_cache, caches)}
    if call.next_norm is not None:
        halves |= {"next_norm": (call.next_norm.weight, (n,))}
    for name, (tensor, shape) in halves.items():
        if tensor is not None and tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}, x is {dtype}: they must agree"
        if tensor is not None and shape is not None and tuple(tensor.shape) != shape:
            return f"{name} has the shape {tuple(tensor.shape)}, not {shape}"
    others = {"words": w.words, "zeros": w.zeros, "factors": w.factors, "next_weight": call.next_weight}
    others |= {"scales": w.scales, "x_scales": call.x_scales}
    others |= {name: tensor for name, (tensor, _) in halves.items()}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}: it must be contiguous"
    return (
        reason_against_inputs(call)
        or reason_against_squares(m, x.device, k, call.deferred)
        or reason_against_squares(m, x.device, n, call.next_norm)
    )


def reason_against_codes(call: PackedCall) -> str | None:
    """The reason why x in codes, if it is, does not fit the weight, or None."""
    scales, x, w = call.x_scales, call.x, call.weight
    if scales is None:
        return None
    if w.bits != 4 or w.is_float or w.zeros is not None:
        return f"codes of x are multiplied with int4, not with {w.number.name}"
    if w.group_size == 16 or call.norm != "none" or call.deferred is not None:
        return "codes of x are multiplied with groups of 32 or more, and have no norm to come"
    if x.dtype != torch.int8 or x.ndim != 2:
        return f"x with scales is {tuple(x.shape)} {x.dtype}, not rows of torch.int8"
    if tuple(scales.shape) != (len(x),) or scales.dtype != torch.float32:
        return f"x_scales is {tuple(scales.shape)} {scales.dtype}, not ({len(x)},) torch.float32"
    return None


def reason_against_inputs(call: PackedCall) -> str | None:
    """The reason why x or z are neither contiguous rows nor panels, or y cannot be panels, or None."""
    if call.y_panels and (call.rotary is not None or call.float32_out or not panels.fits(*call.y_shape)):
        return (
            f"y of shape {call.y_shape} in panels: of half precision, no heads, at most {panels.HEIGHTS[-1]} rows and "
            f"a multiple of {panels.WIDTH} outputs are needed"
        )
    if call.x.ndim == 3 and call.norm != "none":
        return f"norm {call.norm!r} is applied to rows, not to panels"
    if call.x.ndim == 3 and call.weight.k % CHUNK_K:
        return f"x in panels has a multiple of {CHUNK_K} inputs, not {call.weight.k}"
    named = {"x": (call.x, call.weight.k, call.x.dtype)}
    if call.next_norm is not None:
        named["z"] = call.next_norm.z, call.weight.n, call.dtype
    for name, (tensor, width, dtype) in named.items():
        if panels.shape_of(tensor) != (call.m, width) or tensor.dtype != dtype:
            return f"{name} has the shape {tuple(tensor.shape)} {tensor.dtype}, not {(call.m, width)} {dtype}"
        if tensor.device != call.x.device:
            return f"{name} is on {tensor.device}, x on {call.x.device}"
        if tensor.ndim == 3 and (reason := panels.reason_against(tensor)):
            return f"{name}: {reason}"
        if tensor.ndim == 2 and not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}: it must be contiguous"
    return None


def reason_against_squares(m: int, device: torch.device, width: int, norm: Deferred | NextNorm | None) -> str | None:
    """The reason why the sums of squares do not fit m rows of `width`, or None."""
    if norm is None:
        return None
    squares, shape = norm.squares, (m, width // PART)
    if width % (PART * PARTS):
        return f"a norm of rows of {width} cannot be deferred: multiples of {PART * PARTS} are needed"
    if tuple(squares.shape) != shape or squares.dtype != torch.float32 or squares.device != device:
        found = f"{tuple(squares.shape)} {squares.dtype} on {squares.device}"
        return f"sums of squares are {found}, not {shape} torch.float32 beside x"
    return None if squares.is_contiguous() else f"sums of squares have strides {squares.stride()}: contiguous is needed"


def reason_against_epilogue(call: PackedCall) -> str | None:
    """The reason why norm, activation, residual and rotary exclude each other, or None."""
    if call.norm not in NORMS or (call.norm == "none") != (call.norm_weight is None):
        return f"norm {call.norm!r} is one of {NORMS}, and has a norm_weight unless it is 'none'"
    if call.activation not in ACTIVATIONS:
        return f"activation {call.activation!r} is none of {ACTIVATIONS}"
    gated = call.activation == "silu_mul"
    if gated and call.weight.pair_block != call.weight.n:
        return f"silu_mul needs a weight packed with pair_block {call.weight.n}, not {call.weight.pair_block}"
    if (gated or call.rotary is not None) and (call.residual is not None or call.float32_out):
        return "silu_mul and rotary take no residual and no float32 output"
    if call.deferred is not None and call.norm != "none":
        return f"x has a deferred norm: norm {call.norm!r} cannot be applied too"
    if call.next_norm is not None and (gated or call.rotary is not None or call.float32_out):
        return "silu_mul, rotary and float32 output leave no y for a next norm"
    if call.rotary is not None:
        return reason_against_rotary(call, call.rotary)
    if not gated and call.weight.pair_block != 16:
        return f"a weight packed with pair_block {call.weight.pair_block} is for silu_mul or rotary"
    return None


def reason_against_rotary(call: PackedCall, rotary: Rotary) -> str | None:
    """The reason why heads, positions and caches do not fit the packed weight, or None."""
    if call.activation != "none":
        return f"rotary with activation {call.activation!r}: there is no such kernel"
    if call.weight.pair_block != rotary.head_dim:
        return f"heads of {rotary.head_dim} need a weight packed with that pair_block, not {call.weight.pair_block}"
    return reason_against_heads(call.m, call.x.device, call.weight.n, rotary)


def reason_against_caches(x: Tensor, dtype: torch.dtype, rotary: Rotary) -> str | None:
    """The reason why the caches are not contiguous, alike, of `dtype` and on x's device, or None."""
    for name, tensor in (("k_cache", rotary.k_cache), ("v_cache", rotary.v_cache)):
        if tensor.shape != rotary.k_cache.shape or tensor.dtype != dtype or tensor.device != x.device:
            found, wanted = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}", tuple(rotary.k_cache.shape)
            return f"{name} is {found}, not {wanted} {dtype} beside x"
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}: it must be contiguous"
    return None


def reason_against_heads(m: int, device: torch.device, n: int, rotary: Rotary) -> str | None:
    """The reason why heads, positions and caches do not fit n outputs of m rows, or None."""
    head_dim = rotary.head_dim
    if n % head_dim or n // head_dim <= 2 * rotary.kv_heads:
        return f"{n} outputs hold no q beside {rotary.kv_heads} heads of k and v"
    for name, tensor, shape, dtype in (
        ("positions", rotary.positions, (m,), torch.int64),
        ("slots", rotary.slots, (m,), torch.int64),
        ("cosines", rotary.cosines, (rotary.cosines.shape[0], head_dim // 2), torch.float32),
        ("sines", rotary.sines, tuple(rotary.cosines.shape), torch.float32),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            return f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, not {shape} {dtype} beside x"
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()}: it must be contiguous"
    return None
