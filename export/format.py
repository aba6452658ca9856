"""What a format of quantized checkpoint is: a class, and one file for each dialect."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.export.container import Container
from lowbit.export.sharded import SAFETENSORS
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

Reader = Callable[[str], Tensor]
Shapes = Callable[[str], tuple[int, ...]]


class Format(ABC):
    """A dialect of quantized checkpoint. One file is one subclass; the defaults suit dialects without limits.

    method               the quant_method by which config.json and other libraries know it
    package              the package that transformers reads it with
    suffixes             names of a linear's tensors
    marker               the suffix that every quantized linear has
    loading              a sentence for the model card: what loads it
    through_marlin       vLLM loads it on GPUs by its Marlin configuration alone: Marlin's limits hold for every kernel
    uniform              one scheme serves all linears
    scale_dtype          the one type that scales have, or None where they have the model's
    sidecar              a file beside config.json that repeats the block
    container            the files that it is stored in
    """

    name: str
    method: str
    package: str
    suffixes: tuple[str, ...]
    marker: str
    loading: str
    through_marlin: bool = False
    uniform: bool = False
    scale_dtype: torch.dtype | None = None
    sidecar: str | None = None
    container: Container = SAFETENSORS

    @abstractmethod
    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why it cannot hold a scheme, or None."""

    @abstractmethod
    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`; the scales must have `scale_dtype`."""

    @abstractmethod
    def read(self, name: str, tensor: Reader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`. CheckpointError where its tensors contradict one another."""

    @abstractmethod
    def shape(self, name: str, shapes: Shapes, tensor: Reader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`, from its tensors' shapes by name, a tensor reader and its scheme."""

    @abstractmethod
    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The block in config.json for schemes and unquantized linears."""

    @abstractmethod
    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme that the block gives each of the linears."""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """True if a quantization_config is of this dialect."""
        return config.get("quant_method") == self.method

    def linears(self, names: Iterable[str]) -> list[str]:
        """The quantized linears among a file's tensor names."""
        suffix = f".{self.marker}"
        return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]

    def reason_against_shape(self, scheme: Scheme, n: int, k: int) -> str | None:
        """The reason why it cannot hold a scheme's weight of (n, k), or None."""
        return None

    def risk_of(self, scheme: Scheme) -> str | None:
        """The reason why freshly rounded weights of a scheme may turn out not to fit, or None."""
        return None

    def caveat(self, scheme: Scheme) -> str | None:
        """A warning for loading a scheme's weights elsewhere, or None."""
        return None

    def reason_in(self, engine: str, scheme: Scheme) -> str | None:
        """The reason why an engine, by name, loads no weights of a scheme from it, or None."""
        return None


def require_words(words: Tensor, what: str, shape: tuple[int | None, int | None]) -> None:
    """ValueError where `words` are no int32 matrix of `shape`, None standing for any size."""
    fits = words.ndim == 2 and all(want in (None, size) for want, size in zip(shape, words.shape, strict=True))
    if words.dtype != torch.int32 or not fits:
        sizes = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} is {words.dtype} {list(words.shape)}; int32 {sizes} fits")
