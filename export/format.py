"""What a format of quantized checkpoint is: a value, one for each dialect's file."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme

Reader = Callable[[str], Tensor]
Shapes = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Format:
    """A dialect of quantized checkpoint.

    method               the quant_method by which config.json and other libraries know it
    package              the package that transformers reads it with
    recognizes           whether a quantization_config is of this dialect
    reason_against       why it cannot hold a scheme, or None
    reason_against_shape  why it cannot hold a scheme's weight of (n, k), or None
    risk_of              why freshly rounded weights of a scheme may turn out not to fit, or None
    caveat               what one should know before loading a scheme's weights elsewhere, or None
    write                linear name and weight -> the file's tensors; the scales must have `scale_dtype`
    read                 linear name, tensor reader, scheme -> weight; CheckpointError where the tensors contradict
                         one another
    shape                (n, k) of a linear, from its name, its tensors' shapes by name, a tensor reader and its scheme
    linears              tensor names -> names of the quantized linears
    quantization_config  schemes and unquantized linears -> the block in config.json
    schemes_of           that block and linear names -> scheme of each
    suffixes             what the tensors of a linear are called
    reason_in            why an engine, by name, loads no weights of a scheme from it, or None
    through_marlin       vLLM loads it on GPUs by its Marlin configuration alone: Marlin's limits hold for every kernel
    loading              a sentence for the model card: what loads it
    uniform              one scheme serves all linears
    scale_dtype          the one type that scales have, or None where they have the model's
    sidecar              a file beside config.json that repeats the block
    """

    name: str
    method: str
    package: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    reason_against: Callable[[Scheme], str | None]
    write: Callable[[str, QTensor], dict[str, Tensor]]
    read: Callable[[str, Reader, Scheme], QTensor]
    shape: Callable[[str, Shapes, Reader, Scheme], tuple[int, int]]
    linears: Callable[[Iterable[str]], list[str]]
    quantization_config: Callable[[Mapping[str, Scheme], Iterable[str]], dict[str, Any]]
    schemes_of: Callable[[Mapping[str, Any], Iterable[str]], dict[str, Scheme]]
    suffixes: tuple[str, ...]
    loading: str
    reason_against_shape: Callable[[Scheme, int, int], str | None] = lambda scheme, n, k: None
    risk_of: Callable[[Scheme], str | None] = lambda scheme: None
    caveat: Callable[[Scheme], str | None] = lambda scheme: None
    reason_in: Callable[[str, Scheme], str | None] = lambda engine, scheme: None
    through_marlin: bool = False
    uniform: bool = False
    scale_dtype: torch.dtype | None = None
    sidecar: str | None = None


def require_words(words: Tensor, what: str, shape: tuple[int | None, int | None]) -> None:
    """ValueError where `words` are no int32 matrix of `shape`, None standing for any size."""
    fits = words.ndim == 2 and all(want in (None, size) for want, size in zip(shape, words.shape, strict=True))
    if words.dtype != torch.int32 or not fits:
        sizes = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} is {words.dtype} {list(words.shape)}; int32 {sizes} fits")
