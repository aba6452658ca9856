"""The torch operators of `lowbit`, each derived from the dataclass that it takes.

An operator's schema, and the conversion of a call to torch's arguments and back, follow from the dataclass's fields.
Fields of a nested dataclass take its place, under both names. There is one implementation for all devices. On a CPU the
registry's last kernel runs, the plain-torch reference, so that a kernel is tested by running one operator on two
devices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from lowbit.quant.kernels import (
    choose_tokens,
    decode_attention,
    gptq_block,
    latent_attention,
    row_norm,
    wna16_dequantize,
    wna16_experts,
)
from lowbit.quant.kernels.choose_tokens import ChoiceCall
from lowbit.quant.kernels.decode_attention import AppendCall, AttentionCall, NewCall
from lowbit.quant.kernels.dense import DenseCall
from lowbit.quant.kernels.gptq_block import BlockCall
from lowbit.quant.kernels.latent_attention import LatentCall
from lowbit.quant.kernels.packed import PackedWeight
from lowbit.quant.kernels.problem import NextNorm, PackedCall
from lowbit.quant.kernels.registry import compute
from lowbit.quant.kernels.route_experts import RouteCall, route
from lowbit.quant.kernels.row_norm import Rows
from lowbit.quant.kernels.w8a8 import W8a8Call
from lowbit.quant.kernels.wna16_experts import DownCall, UpCall
from lowbit.quant.numbers import Number

LIBRARY = torch.library.Library("lowbit", "DEF")
SCHEMA_TYPES = {
    Tensor: "Tensor",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    NoneType: "()",
}

C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True)
class CallField:
    """A field of a call: one argument of the operator or, for a nested dataclass, those of its `parts`.

    name      of the field
    argument  name in the schema
    schema    type in the schema; "" for a dataclass
    kind      the nested dataclass, or None
    count     number of arguments
    """

    name: str
    argument: str
    schema: str
    kind: type | None = None
    parts: tuple["CallField", ...] = ()
    count: int = 1


def parts_of(kind: type, without: tuple[str, ...] = (), prefix: str = "", absent: bool = False) -> Iterator[CallField]:
    """The parts of a dataclass, except the fields `without`. All are optional if the dataclass may be absent."""
    hints = get_type_hints(kind)
    for name in (field.name for field in fields(kind) if field.name not in without):
        optional = absent or NoneType in get_args(hints[name])
        inner: type = next(each for each in get_args(hints[name]) or (hints[name],) if each is not NoneType)
        if is_dataclass(inner):
            parts = tuple(parts_of(inner, (), f"{prefix}{name}_", optional))
            yield CallField(name, prefix + name, "", inner, parts, sum(part.count for part in parts))
        else:
            yield CallField(name, prefix + name, SCHEMA_TYPES[inner] + "?" * optional)


def leaves_of(parts: tuple[CallField, ...]) -> Iterator[CallField]:
    """The parts that are one argument each, in order."""
    for part in parts:
        yield from leaves_of(part.parts) if part.parts else (part,)


def arguments_of(call: Any, parts: tuple[CallField, ...]) -> list[Any]:
    """The arguments for `call`; None for every field of an absent dataclass."""
    found: list[Any] = []
    for part in parts:
        value = getattr(call, part.name)
        if not part.parts:
            found.append(value)
        else:
            found += [None] * part.count if value is None else arguments_of(value, part.parts)
    return found


def call_of(kind: type[C], parts: tuple[CallField, ...], arguments: Sequence[Any], place: int = 0) -> C:
    """The call from `arguments`, from `place` on. A nested dataclass is absent if its first field, a tensor, is."""
    found: dict[str, Any] = {}
    for part in parts:
        found[part.name] = arguments[place]
        if part.kind is not None and arguments[place] is not None:
            found[part.name] = call_of(part.kind, part.parts, arguments, place)
        place += part.count
    return kind(**found)


class Operator(Generic[C, R]):
    """lowbit::`name`, called with a `kind`.

    run      the implementation, for all devices
    fake     shape function for torch.compile (fake tensor)
    writes   arguments written in place, by their names in the schema
    without  fields of `kind` that it does not take and that must be None
    """

    def __init__(
        self,
        name: str,
        kind: type[C],
        run: Callable[[C], R],
        fake: Callable[[C], Any],
        writes: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
    ) -> None:
        self.name, self.kind, self.without = name, kind, without
        self.parts = tuple(parts_of(kind, without))
        LIBRARY.define(f"{name}({', '.join(self.schema_of(writes))}) -> {returned(run)}")
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, lambda *arguments: run(self.call(*arguments)), device)
        torch.library.register_fake(f"lowbit::{name}", lambda *arguments: fake(self.call(*arguments)), lib=LIBRARY)
        self.torch: Any = getattr(torch.ops.lowbit, name).default

    def __call__(self, call: C) -> R:
        return self.torch(*self.arguments(call))

    def arguments(self, call: C) -> list[Any]:
        """torch's arguments for `call`. ValueError for a field that this operator does not take."""
        for name in self.without:
            if getattr(call, name) is not None:
                raise ValueError(f"lowbit::{self.name} takes no {name}")
        return arguments_of(call, self.parts)

    def call(self, *arguments: Any) -> C:
        """The call from torch's arguments."""
        return call_of(self.kind, self.parts, arguments)

    def schema_of(self, writes: tuple[str, ...]) -> Iterator[str]:
        """Type and name of each argument; "Tensor(a!)" for those that are written."""
        alias = {name: f"({chr(ord('a') + place)}!)" for place, name in enumerate(writes)}
        for leaf in leaves_of(self.parts):
            written = leaf.schema.replace("Tensor", f"Tensor{alias.pop(leaf.argument, '')}")
            yield f"{written} {leaf.argument}"
        assert not alias, f"{self.name} has no {[*alias]}"


def composite(name: str, schema: str, run: Callable[..., R]) -> Callable[..., R]:
    """lowbit::`name`, made of other operators by `run`: torch.compile keeps those in its place."""
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, run, "CompositeImplicitAutograd")
    found: Callable[..., R] = getattr(torch.ops.lowbit, name).default
    return found


def returned(run: Callable[..., Any]) -> str:
    """The schema's result, from the return annotation of `run`: a tensor, several, or nothing."""
    hint = get_type_hints(run)["return"]
    return f"({', '.join(SCHEMA_TYPES[each] for each in get_args(hint))})" if get_args(hint) else SCHEMA_TYPES[hint]


def checked(call: PackedCall | W8a8Call | DenseCall) -> Tensor:
    """Memory for y of `call`. ValueError if its tensors do not fit together."""
    call.check()
    return call.empty()


def products_of(name: str, turning: str, kind: type) -> tuple[Operator[Any, Tensor], ...]:
    """Three operators of one call: a product, one that begins the next norm, and one that turns heads and caches them.

    torch.compile copies the arguments that an operator writes, so most products use the one that writes none.
    """
    norm, caches = ("next_norm_z", "next_norm_squares"), ("rotary_k_cache", "rotary_v_cache")
    return (
        Operator(name, kind, compute, checked, without=("rotary", "next_norm")),
        Operator(f"{name}_deferring", kind, compute, checked, writes=norm, without=("rotary",)),
        Operator(turning, kind, compute, checked, writes=caches, without=("next_norm",)),
    )


plain_linear, deferring_linear, turning_linear = products_of("linear", "qkv_rotary_append", PackedCall)
# y = x W^T + bias + residual (m, n), x and W in int8: the sums are exact, and rounded once. See W8a8Call.
w8a8_linear = Operator("w8a8_linear", W8a8Call, compute, checked)
# activation(x W^T + bias) + residual, of a weight (n, k) as torch.nn.Linear holds it. Few rows in half precision on
# Hopper are one kernel, in float32 between x and y; all others are torch's functions. See DenseCall.
plain_dense_linear, deferring_dense_linear, turning_dense_linear = products_of(
    "dense_linear", "dense_qkv_rotary_append", DenseCall
)
LINEARS = {
    PackedCall: (plain_linear, deferring_linear, turning_linear),
    DenseCall: (plain_dense_linear, deferring_dense_linear, turning_dense_linear),
}
# The dense weight (n, k) in the packed scales' dtype.
dequantize = Operator("dequantize", PackedWeight, wna16_dequantize.dequantize, wna16_dequantize.empty)
# Rows after norm, and int8 rounding if requested, (m, k) in x's dtype. See Rows.
normalize = Operator("row_norm", Rows, row_norm.run, Rows.empty)
# Rows as codes (m, k) int8 with a scale each, (m) float32, to be shared by several products. See Rows.
quantize_rows = Operator("quantize_rows", Rows, row_norm.quantize, Rows.empty_codes)
# q (m, heads * head_dim), normed and rotated; k, normed and rotated, and v are written to the cache. See AppendCall.
append_heads = Operator(
    "append_heads",
    AppendCall,
    decode_attention.append,
    AppendCall.empty,
    writes=("cache_k", "cache_v", "cache_k_scales", "cache_v_scales"),
)
# Attention of few tokens over their sequences' cache, (m, heads * head_dim). See AttentionCall.
attend = Operator("decode_attention", AttentionCall, decode_attention.attend, AttentionCall.empty)
# Both in one launch, of rows that have a sequence each. See NewCall.
attend_new = Operator(
    "append_and_attend",
    NewCall,
    decode_attention.attend_new,
    NewCall.empty,
    writes=("append_cache_k", "append_cache_v", "append_cache_k_scales", "append_cache_v_scales"),
)
# The mean compressed rows (heads, m, rank) of heads that share them; the tokens' own are stored first. See LatentCall.
attend_latent = Operator(
    "latent_attention",
    LatentCall,
    latent_attention.attend,
    LatentCall.empty,
    writes=("cache_k", "cache_v", "cache_k_scales", "cache_v_scales"),
)
# Writes each row's token and advances the row. See ChoiceCall.
choose = Operator(
    "choose_tokens",
    ChoiceCall,
    choose_tokens.choose,
    choose_tokens.check,
    writes=("tokens", "written", "cursor_positions", "cursor_slots", "mailbox_tokens", "mailbox_turns"),
)
# Experts (m, top) int32 and their weights (m, top) float32. See RouteCall.
route_experts = Operator("route_experts", RouteCall, route, RouteCall.empty)
# inner (m, top, n / 2 padded) of each row's experts, and the sum (m, n) over them. See UpCall and DownCall.
experts_up = Operator("experts_up", UpCall, wna16_experts.up, UpCall.empty)
plain_experts_down = Operator("experts_down", DownCall, wna16_experts.down, DownCall.empty, without=("next_norm",))
deferring_experts_down = Operator(
    "experts_down_deferring",
    DownCall,
    wna16_experts.down,
    DownCall.empty,
    writes=("next_norm_z", "next_norm_squares"),
)
# Codes and scaled errors (e, n, b) of a block of columns, rounded by GPTQ. See BlockCall.
gptq = Operator("gptq_block", BlockCall, gptq_block.run, BlockCall.empty)


def linear(call: PackedCall | DenseCall) -> Tensor:
    """y of `call`, with everything between x and y in float32. ValueError if its tensors do not fit together."""
    plain, deferring, turning = LINEARS[type(call)]
    if call.rotary is not None:
        return turning(call)
    return plain(call) if call.next_norm is None else deferring(call)


def experts_down(call: DownCall) -> Tensor:
    """y of `call`. ValueError if its tensors do not fit together."""
    return plain_experts_down(call) if call.next_norm is None else deferring_experts_down(call)


def experts_down_deferring(call: DownCall, norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h of `call`, and the inputs with which the next product applies rms_norm(h): see linear_deferring."""
    norm = NextNorm.empty(call.x.flatten(1), norm_weight)
    return experts_down(replace(call, next_norm=norm)), norm.z, norm.squares


def linear_deferring(
    call: PackedCall | DenseCall, norm_weight: Tensor, in_panels: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """h of `call`, and the inputs with which the next product applies rms_norm(h), without a launch in between.

    n a multiple of 64, norm_weight (n). Returns h (m, n), z = h * norm_weight (m, n), in panels if requested, and sums
    of h's squares (m, n / 16) float32: the next product's x and Deferred. problem.NextNorm says more.
    """
    norm = NextNorm.empty(call.x, norm_weight, in_panels)
    return linear(replace(call, next_norm=norm)), norm.z, norm.squares


def round_block(w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, number: Number) -> tuple[Tensor, Tensor]:
    """Codes and scaled errors (e, n, b) of a block of columns, rounded to `number` by GPTQ. See BlockCall."""
    return gptq(BlockCall(w, factor, scales, zeros, *number.grid))
