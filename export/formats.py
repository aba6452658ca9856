"""The formats that quantized weights are written in and read from, one line each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from export import compressed_tensors
from export.checkpoint import Checkpoint
from export.errors import CheckpointError
from quant.qtensor import QTensor
from quant.scheme import Scheme


@dataclass(frozen=True)
class Format:
    """A dialect of quantized checkpoint.

    reason_against       why it cannot hold a scheme, or None
    write                linear name and weight -> the file's tensors
    read                 linear name, tensor reader, scheme -> weight
    linears              tensor names -> names of the quantized linears
    quantization_config  schemes and unquantized linears -> the block in config.json
    schemes_of           that block and linear names -> scheme of each
    suffixes             what the tensors of a linear are called
    """

    name: str
    reason_against: Callable[[Scheme], str | None]
    write: Callable[[str, QTensor], dict[str, Tensor]]
    read: Callable[[str, Callable[[str], Tensor], Scheme], QTensor]
    linears: Callable[[Iterable[str]], list[str]]
    quantization_config: Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]
    schemes_of: Callable[[Mapping[str, Any], Iterable[str]], dict[str, Scheme]]
    suffixes: tuple[str, ...]


def _format(module: Any) -> Format:
    """The Format whose functions a dialect's module defines under these names."""
    functions = {
        field: getattr(module, field)
        for field in ("reason_against", "write", "read", "linears", "quantization_config", "schemes_of")
    }
    return Format(name=module.NAME, suffixes=module.SUFFIXES, **functions)


FORMATS = {fmt.name: fmt for fmt in (_format(compressed_tensors),)}


class LogicalTensors:
    """A checkpoint's tensors under the names an unquantized model has: `P.weight` whether packed or not."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.format = _format_of(checkpoint)
        packed = self.format.linears(checkpoint.entries) if self.format else []
        self.schemes = self.format.schemes_of(checkpoint.quantization or {}, packed) if self.format else {}

    @property
    def names(self) -> list[str]:
        """Names of all tensors, `P.weight` standing for a quantized linear's several."""
        hidden = {
            f"{name}.{suffix}" for name in self.schemes for suffix in (self.format.suffixes if self.format else ())
        }
        return [name for name in self.checkpoint.entries if name not in hidden] + [
            f"{name}.weight" for name in self.schemes
        ]

    def qtensor(self, linear: str) -> QTensor:
        """The quantized weight of `linear`."""
        assert self.format is not None
        return self.format.read(linear, self.checkpoint.read, self.schemes[linear])

    def read(self, name: str) -> Tensor:
        """The tensor called `name`; a quantized weight comes dequantized, in its scales' dtype."""
        linear = name.removesuffix(".weight")
        if linear not in self.schemes or linear == name:
            return self.checkpoint.read(name)
        weight = self.qtensor(linear)
        return weight.dequantize(weight.scales.dtype)


def _format_of(checkpoint: Checkpoint) -> Format | None:
    config = checkpoint.quantization
    if config is None:
        return None
    method = config.get("quant_method")
    if method not in FORMATS:
        raise CheckpointError(
            f"{checkpoint.directory}: quantized as {method!r}, which is not read here; known: {', '.join(FORMATS)}"
        )
    return FORMATS[method]
