"""The interface of a format of quantized checkpoints. Each dialect is one file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.container import Container
from lowbit.export.engines.engine import Engine
from lowbit.export.sharded import SAFETENSORS
from lowbit.export.tensorfile import Spec, nbytes_of
from lowbit.quant.naming import fused_set
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

TensorReader = Callable[[str], Tensor]
BLOCKS_ELSEWHERE = "its files hold neither super-blocks nor minima; those of format gguf do"
ShapeReader = Callable[[str], tuple[int, ...]]


@contextmanager
def reading(name: str) -> Iterator[None]:
    """A context that reads the tensors of the linear `name`: a ValueError becomes a CheckpointError with the name."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


@contextmanager
def following(advice: str = "") -> Iterator[None]:
    """A context that reads a quantization_config: absent keys and wrong values become a CheckpointError.

    advice  end of its message
    """
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"config.json: its quantization_config cannot be followed ({error!r}){advice}") from error


class Format(ABC):
    """A dialect of quantized checkpoints. The defaults suit a dialect without limits.

    method               quant_method in config.json
    library              library_name of its repositories on the hub
    package              package that transformers needs to read it
    suffixes             names of a linear's tensors
    marker               the suffix that every quantized linear has
    loading              sentence for the model card about programs that load it
    through_marlin       True if vLLM loads it on GPUs only through its Marlin configuration, whose limits then apply to
                         all kernels
    uniform              True if all linears must have the same scheme
    scale_dtype          fixed dtype of scales, or None for the model's
    sidecar              name of an extra file that repeats the quantization_config
    holds_head           readers take a quantized head
    by_rows              codes are stored row after row of the weight
    grouping             the suffix of a tensor that a linear may have: the group of each input (k), in any order
    ties_head            a quantized table of embeddings serves as the head of a model that ties the two
    caches               key-value caches that it can declare
    container            container of its files
    """

    name: str
    method: str
    package: str
    suffixes: tuple[str, ...]
    marker: str
    loading: str
    library: str = "transformers"
    through_marlin: bool = False
    uniform: bool = False
    scale_dtype: torch.dtype | None = None
    sidecar: str | None = None
    holds_head: bool = False
    by_rows: bool = False
    grouping: str | None = None
    ties_head: bool = False
    caches: tuple[str, ...] = ()
    container: Container = SAFETENSORS

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the files that hold its weights."""
        return self.container.weights

    @abstractmethod
    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why the format cannot hold a scheme, or None."""

    @abstractmethod
    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`. Scales must have `scale_dtype`."""

    @abstractmethod
    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`. CheckpointError if its tensors contradict each other."""

    @abstractmethod
    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`, from the shapes of its tensors, a tensor reader and its scheme."""

    @abstractmethod
    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json."""

    @abstractmethod
    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each linear, from the quantization_config."""

    def divisor(self, name: str, tensor: TensorReader) -> float | None:
        """The parent of the scales of the linear `name`, as the file has it; None if scales have none."""
        return None

    def cached(self, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The cache scales of `scales` (export.cache) by this format's names, which it can hold."""
        return dict(scales)

    def with_cache(self, config: Mapping[str, Any], cache: str) -> dict[str, Any]:
        """A quantization_config with a key-value cache declared: "fp8", or "fp8-head" with a scale per head."""
        raise NotImplementedError("caches is empty")

    def cache_of(self, config: Mapping[str, Any]) -> str | None:
        """The key-value cache that a quantization_config declares, or None."""
        return None

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """True for a quantization_config of this dialect."""
        return config.get("quant_method") == self.method

    def linears(self, names: Iterable[str], shapes: ShapeReader | None = None) -> list[str]:
        """The quantized linears among a file's tensor names; `shapes` are needed where a tensor holds several."""
        suffix = f".{self.marker}"
        return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]

    def parts(self, linear: str) -> list[str]:
        """Names of the file's tensors that may hold the quantized linear `linear`."""
        return [f"{linear}.{suffix}" for suffix in self.suffixes]

    def stack_of(self, linear: str) -> str | None:
        """The name in 16 bits of the tensor (e, k, n) with the weights of the same linear in all experts, where the
        file has one for all of them; None elsewhere."""
        return None

    def reason_against_model(self, config: Mapping[str, Any], companions: Path) -> str | None:
        """The reason why the format cannot hold the model with this config.json, whose tokenizer's files are in the
        directory `companions`, or None. CheckpointError for damaged files."""
        return None

    def kept(self, name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor | None:
        """The unquantized tensor `name` as the files give it back; None if they leave it out."""
        return tensor

    def alike(self, scheme: Scheme) -> Scheme:
        """The scheme in which the format holds the same weights, where it has another for them; else `scheme`."""
        return scheme

    def set_of(self, linear: str) -> str:
        """A key shared by the linears that need one scheme: those that engines fuse."""
        return fused_set(linear)

    def mixed(self, scheme: str | None, linears: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
        """The scheme of each of `linears` that has another one than most, where `scheme` is the name of a mixture."""
        return {}

    def vocabulary(self, scheme: str | None) -> dict[str, str]:
        """The schemes of `head` and `embeddings`, where `scheme` is the name of a mixture that has any."""
        return {}

    def reason_against_shape(self, scheme: Scheme, n: int, k: int) -> str | None:
        """The reason why the format cannot hold a weight (n, k) of this scheme, or None."""
        return None

    def risk_of(self, scheme: Scheme) -> str | None:
        """The reason why freshly rounded weights of a scheme may not fit the format, or None."""
        return None

    def caveat(self, scheme: Scheme) -> str | None:
        """A warning about loading a scheme in other programs, or None."""
        return None

    def caveat_of_model(self, config: Mapping[str, Any]) -> str | None:
        """A warning about what other programs make of the model of config.json in this format, or None."""
        return None

    def reason_in(self, engine: Engine, scheme: Scheme) -> str | None:
        """The reason why an engine cannot load weights of a scheme in this format, or None."""
        return None


def require_words(words: Tensor, what: str, shape: tuple[int | None, int | None]) -> None:
    """ValueError if `words` is not an int32 matrix of `shape`, in which None allows any size."""
    fits = words.ndim == 2 and all(want in (None, size) for want, size in zip(shape, words.shape, strict=True))
    if words.dtype != torch.int32 or not fits:
        sizes = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} is {words.dtype} {list(words.shape)}; int32 {sizes} fits")


def in_groups(weight: QTensor, g_idx: Tensor) -> QTensor:
    """`weight`, whose inputs belong to the groups `g_idx` (k), with its codes sorted by them and the order of its
    inputs known; as it is if they are sorted already.

    ValueError if g_idx does not give each of the groups as many inputs.
    """
    k, groups = weight.shape[1], weight.scales.shape[1]
    wanted = torch.arange(k, device=g_idx.device) // (k // groups)
    if g_idx.shape == (k,) and torch.equal(g_idx.long(), wanted):
        return weight
    if g_idx.shape != (k,) or not torch.equal(g_idx.long().sort().values, wanted):
        sizes = f"[{int(g_idx.min())}, {int(g_idx.max())}]" if g_idx.numel() else "nothing"
        raise ValueError(
            f"g_idx {list(g_idx.shape)} with values in {sizes} does not divide {k} inputs into {groups} groups of "
            f"{k // groups}"
        )
    order = g_idx.long().argsort(stable=True)
    return replace(weight, codes=weight.codes[:, order], order=order)


@cache
def tensors_written(fmt: Format, scheme: Scheme, n: int, k: int, scale_dtype: torch.dtype) -> dict[str, Spec]:
    """Dtypes and shapes of the tensors that `fmt` writes for a weight (n, k), by suffix: its codes first."""
    codes = torch.empty(n, k, dtype=scheme.number.storage, device="meta")
    scales = torch.empty(scheme.sides(n, k), dtype=scale_dtype, device="meta")
    zeros = None if scheme.symmetric else torch.empty(scales.shape, dtype=torch.int32, device="meta")
    one = torch.ones((), dtype=torch.float32)
    inputs, divisor = (one if needed else None for needed in (scheme.static_inputs, scheme.weights.parent))
    found = fmt.write("", QTensor(codes, scales, zeros, scheme, inputs, divisor))
    first = max(found, key=lambda key: found[key].nbytes)
    return {key[1:]: (found[key].dtype, tuple(found[key].shape)) for key in dict.fromkeys((first, *found))}


def bytes_written(fmt: Format, scheme: Scheme, n: int, k: int, scale_dtype: torch.dtype) -> int:
    """Bytes of those tensors."""
    return sum(map(nbytes_of, tensors_written(fmt, scheme, n, k, scale_dtype).values()))
