"""llama.cpp's mixtures of block types, by their names: the type of most linears, and of those that matter more.

A mixture raises the type of some linears by their part and their block. Sources: llama_tensor_get_type_impl in
src/llama-quant.cpp of llama.cpp, for models of neither Falcon nor 70B.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that a mixture asks for: blocks, query heads per key head, and experts of a layer."""

    layers: int
    grouped: int
    experts: int = 0


# A scheme for a linear in the block `layer`, or None for the mixture's own.
Rule = Callable[[int, Shape], str | None]


def _more_bits(layer: int, shape: Shape) -> bool:
    """True for the first and the last eighth of the blocks, and each third one between them."""
    eighth = shape.layers // 8
    return layer < eighth or layer >= 7 * shape.layers // 8 or (layer - eighth) % 3 == 2


def _always(scheme: str) -> Rule:
    return lambda layer, shape: scheme


def _where_it_matters(layer: int, shape: Shape) -> str | None:
    return "q6_k" if _more_bits(layer, shape) else None


def _first(blocks: int, scheme: str, other: str | None = None) -> Rule:
    return lambda layer, shape: scheme if layer < blocks else other


def _first_part(divisor: int, scheme: str, other: str | None = None) -> Rule:
    return lambda layer, shape: scheme if layer < shape.layers // divisor else other


def _grouped(many: str, few: str) -> Rule:
    return lambda layer, shape: many if shape.grouped >= 4 else few


RAISED = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")  # mixtures whose attn_output is q5_k beside 8 experts


@dataclass(frozen=True)
class Mixture:
    """A mixture.

    name   llama.cpp's, in small letters
    kind   its number in `general.file_type`
    base   scheme of most linears and of untied embeddings
    rules  by part: other schemes
    head   scheme of the head, and of embeddings that serve as the head
    """

    name: str
    kind: int
    base: str
    rules: dict[str, Rule] = field(default_factory=dict)
    head: str = "q6_k"

    @property
    def embeddings(self) -> str:
        """The scheme of embeddings beside a head."""
        return self.head if self.base.endswith("-a16") else self.base

    def scheme_of(self, part: str, layer: int, shape: Shape) -> str:
        """The scheme of a linear: part `attn_v` or the like of a block."""
        if shape.experts == 8 and part in ("attn_k", "attn_v"):
            return "int8-g32"
        if shape.experts == 8 and part == "attn_output":
            return "q5_k" if self.name in RAISED else self.base
        part = {"ffn_down_exps": "ffn_down"}.get(part, part)
        rule = self.rules.get(part)
        return (rule(layer, shape) if rule else None) or self.base


MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture("q4_0", 2, "int4-g32"),
        Mixture("q4_1", 3, "q4_1"),
        Mixture("q5_0", 8, "int5-g32"),
        Mixture("q5_1", 9, "q5_1"),
        Mixture("q8_0", 7, "int8-g32", head="int8-g32"),
        Mixture(
            *("q2_k", 10, "q2_k"),
            {"attn_v": _grouped("q4_k", "q3_k"), "ffn_down": _always("q3_k"), "attn_output": _always("q3_k")},
        ),
        Mixture(
            *("q2_k_s", 21, "q2_k"),
            {"attn_v": _grouped("q4_k", "q2_k"), "ffn_down": _first_part(8, "q4_k")},
        ),
        Mixture("q3_k_s", 11, "q3_k"),
        Mixture(
            *("q3_k_m", 12, "q3_k"),
            {
                "attn_v": _first(2, "q5_k", "q4_k"),
                "ffn_down": _first_part(16, "q5_k", "q4_k"),
                "attn_output": _always("q4_k"),
                "attn_qkv": _always("q4_k"),
            },
        ),
        Mixture(
            *("q3_k_l", 13, "q3_k"),
            {
                "attn_v": _always("q5_k"),
                "ffn_down": _always("q5_k"),
                "attn_output": _always("q5_k"),
                "attn_qkv": _always("q4_k"),
            },
        ),
        Mixture("q4_k_s", 14, "q4_k", {"attn_v": _first(4, "q5_k"), "ffn_down": _first_part(8, "q5_k")}),
        Mixture(
            *("q4_k_m", 15, "q4_k"),
            {"attn_v": _where_it_matters, "ffn_down": _where_it_matters, "attn_qkv": _always("q5_k")},
        ),
        Mixture("q5_k_s", 16, "q5_k"),
        Mixture(
            *("q5_k_m", 17, "q5_k"),
            {"attn_v": _where_it_matters, "ffn_down": _where_it_matters, "attn_qkv": _always("q6_k")},
        ),
        Mixture("q6_k", 18, "q6_k"),
        Mixture("mxfp4", 38, "mxfp4-a16", head="int8-g32"),
        Mixture("nvfp4", 39, "nvfp4-a16", head="int8-g32"),
    )
}
# Other names of the same: those of llama-quantize, and ours.
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "mxfp4-a16": "mxfp4", "nvfp4-a16": "nvfp4"}
MIXTURES |= {alias: MIXTURES[name] for alias, name in ALIASES.items()}
