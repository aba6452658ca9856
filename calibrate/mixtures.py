"""Mixtures of schemes: those with a name, and the schemes that a budget is distributed over."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lowbit.quant.numbers import NUMBERS
from lowbit.quant.scheme import KEPT, NAMED, USUAL_GROUPS, Scheme, Side, granularity_of, name_of, parse_scheme

ATTENTION = r"re:(^|[._])(self_)?(attn|attention)\."  # linears inside a module of attention
EXPERTS = r"re:\.experts\."


@dataclass(frozen=True)
class Mixture:
    """A mixture that people ask for by name: the scheme of most linears, and those of others by pattern."""

    name: str
    scheme: str
    schemes: dict[str, str]

    def as_values(self) -> dict[str, Any]:
        """The mixture as keys of a recipe."""
        return {"scheme": self.scheme, "schemes": self.schemes}


MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture("attention-16-mlp-int4", "int4-g128", {ATTENTION: KEPT}),
        Mixture("attention-16-experts-int4", "int4-g128", {EXPERTS: "int4-g128", "re:.": KEPT}),
        Mixture("attention-int8-mlp-int4", "int4-g128", {ATTENTION: "int8"}),
        Mixture("attention-fp8-mlp-nvfp4", "nvfp4", {ATTENTION: "fp8"}),
        Mixture("attention-fp8-mlp-nvfp4-a16", "nvfp4-a16", {ATTENTION: "fp8-a16"}),
        Mixture("attention-fp8-experts-nvfp4", "nvfp4", {EXPERTS: "nvfp4", "re:.": "fp8"}),
    )
}
# The candidates beside a scheme of floats, or of quantized inputs: those that run on the same GPUs.
KIN = (
    ("nvfp4-a16", "mxfp4-a16", "fp8-a16", "mxfp8-a16"),
    ("nvfp4", "fp8"),
    ("mxfp4", "mxfp8"),
    ("int4-g128", "int8-a8"),
)


def candidates_beside(scheme: Scheme) -> list[Scheme | None]:
    """The schemes that a budget is distributed over unless the recipe names others: `scheme`, its kin, and 16 bits."""
    if scheme.number.is_integer and scheme.inputs is None:
        return [*_integers(scheme), None]
    kin = next((names for names in KIN if str(scheme) in names), ())
    return [scheme, *(parse_scheme(name) for name in kin if name != str(scheme)), None]


def _integers(scheme: Scheme) -> Iterator[Scheme]:
    """Integers of 4 bits, which all engines run, and those of `scheme`, each with the usual groups; and int8."""
    for number in NUMBERS.values():
        wanted = number.is_integer and number.bits in (4, scheme.bits) and number.signed == scheme.symmetric
        if wanted and number.coarse:
            yield from (Scheme(Side(number, granularity_of(size))) for size in USUAL_GROUPS)
    if scheme.group_size not in (-1, *USUAL_GROUPS):
        yield scheme
    yield NAMED["int8"]


@dataclass(frozen=True)
class Option:
    """A scheme of a fused set (None: 16 bits): its price, and its divergence in nats per token with standard error."""

    scheme: Scheme | None
    price: int
    divergence: float
    error: float = 0.0


@dataclass(frozen=True)
class Mixed:
    """A budget distributed over fused sets.

    unit      of the numbers below
    target    the budget
    reached   its part that the choice takes, and all that has no choice
    least     the smallest budget that the candidates allow
    divergence, error  of the whole choice in nats per token, if effects add up, and its standard error
    chosen    option of each set
    options   all options of each set
    """

    unit: str
    target: float
    reached: float
    least: float
    divergence: float
    error: float
    chosen: dict[str, Option]
    options: dict[str, list[Option]]

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values: one row for each set, with the chosen scheme and every option."""
        numbers = {key: getattr(self, key) for key in ("unit", "target", "reached", "least", "divergence", "error")}
        return numbers | {
            "sets": {
                key: {"scheme": name_of(self.chosen[key].scheme), "options": [_row(option) for option in options]}
                for key, options in self.options.items()
            }
        }


def _row(option: Option) -> dict[str, Any]:
    return vars(option) | {"scheme": name_of(option.scheme)}
