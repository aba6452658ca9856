"""The GPTQ layouts `gptq` (v1) and `gptq_v2`, read by GPTQModel, vLLM, SGLang and transformers.

For a linear P with weight (n, k), b bits (2, 3, 4 or 8) and g groups; all tensors are transposed relative to nn.Linear:

    P.qweight  int32    (k b / 32, n)  unsigned codes, packed along the inputs, lowest bits first
    P.qzeros   int32    (g, n b / 32)  zeros, packed along the outputs, lowest bits first; v1 stores zero - 1
    P.scales   float16  (g, n)
    P.g_idx    int32    (k)            the group of each input: i // group_size, or any order (act-order)

All four are always present. Another order is read and never written: codes are sorted by their groups, and a weight
knows the order of its inputs. A symmetric weight's codes are shifted by 2^(b-1), which becomes its zero. In v1 a zero
of 0 would be stored as -1 and borrow from its neighbour in the word, so only v2 can hold it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit import __version__
from lowbit.errors import CheckpointError
from lowbit.export.engines.engine import Engine
from lowbit.export.engines.vllm import VLLM
from lowbit.export.format import (
    BLOCKS_ELSEWHERE,
    Format,
    ShapeReader,
    TensorReader,
    following,
    in_groups,
    reading,
    require_words,
)
from lowbit.export.patterns import Patterns
from lowbit.quant.packing import WORD, pack, unpack, words_of
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, make_scheme

METHOD = "gptq"
V1, V2 = "gptq", "gptq_v2"
STORED_LESS = {V1: 1, V2: 0}  # zero minus stored zero
SYMMETRIC_ONLY = "vLLM loads only symmetric GPTQ files"
BITS = (2, 3, 4, 8)
# gptqmodel's convert_gptq_v1_to_v2_format adds 4 to the first ten zeros of a run of three words, other loaders add 1.
DISPUTED = "programs disagree on what version 1 stores for zeros of 3 bits; use --format gptq_v2"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def _read(version: str, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
    words = tensor(f"{name}.qweight")
    require_words(words, "qweight", (None, None))
    k, n = words.shape[0] * WORD // scheme.bits, words.shape[1]
    groups = scheme.groups(k)
    packed_zeros = tensor(f"{name}.qzeros")
    require_words(packed_zeros, "qzeros", (groups, words_of(n, scheme.bits)))
    stored = unpack(packed_zeros, scheme.bits, n).T.to(torch.int32)
    zeros: Tensor | None = stored + STORED_LESS[version]
    codes = unpack(words.T.contiguous(), scheme.bits, k)
    scales = tensor(f"{name}.scales").T.contiguous()
    if scheme.symmetric:
        bias = scheme.number.bias
        _require_middle(version, stored + STORED_LESS[version], bias)
        codes, zeros = (codes.to(torch.int16) - bias).to(torch.int8), None
    return in_groups(QTensor(codes, scales, zeros, scheme), tensor(f"{name}.g_idx"))


def _require_middle(version: str, zeros: Tensor, bias: int) -> None:
    """ValueError if a symmetric file has zeros other than the middle of the codes."""
    if bool((zeros == bias).all()):
        return
    other = {V1: bias + 1, V2: bias - 1}[version]
    if bool((zeros == other).all()):
        actual = V2 if version == V1 else V1
        raise ValueError(f"its zeros are those of {actual}, but checkpoint_format says {version}; correct config.json")
    low, high = int(zeros.min()), int(zeros.max())
    raise ValueError(f"symmetric by config.json, but its zeros run from {low} to {high} instead of being {bias}")


def _scheme_from(config: Mapping[str, Any]) -> Scheme:
    if config.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"words of {config['pack_dtype']}; only int32 is supported")
    return make_scheme(config["bits"], config["group_size"], config["sym"])


def _overrides(dynamic: Mapping[str, Any], patterns: Patterns, name: str) -> dict[str, Any]:
    """The overrides of the first positive pattern that matches `name`."""
    for pattern, changes in dynamic.items():
        if not pattern.startswith("-:") and patterns.begins(pattern.removeprefix("+:"), name):
            return dict(changes)
    return {}


class Gptq(Format):
    """The formats `gptq` and `gptq_v2`, named after their checkpoint_format."""

    method = METHOD
    package = "gptqmodel"
    suffixes = SUFFIXES
    marker = "qweight"
    through_marlin = True
    uniform = True
    scale_dtype = torch.float16
    sidecar = "quantize_config.json"

    def __init__(self, version: str) -> None:
        self.name = version
        self.loading = (
            f"The files follow the GPTQ layout, checkpoint_format `{version}`. GPTQModel loads the directory, vLLM "
            "where the scheme is symmetric, transformers with the packages `gptqmodel` and `optimum` installed."
        )

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """True for a quantization_config of this version; version 1 is the default."""
        return config.get("quant_method") == METHOD and config.get("checkpoint_format", V1) == self.name

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why GPTQ files cannot hold a scheme, or None."""
        if not scheme.number.is_integer or scheme.inputs is not None:
            return "GPTQ files hold only integer weights: no floats, no quantized activations"
        if scheme.weights.blocks:
            return BLOCKS_ELSEWHERE
        if scheme.bits not in BITS:
            return f"GPTQ files hold {', '.join(map(str, BITS))} bits, not {scheme.bits}"
        return DISPUTED if scheme.bits == 3 and self.name == V1 else None

    def reason_against_shape(self, scheme: Scheme, n: int, k: int) -> str | None:
        """The reason why a weight of this shape (n, k) cannot be packed, or None."""
        whole = WORD // math.gcd(WORD, scheme.bits)
        if k % 32 or n % whole:
            return f"{n} outputs and {k} inputs: GPTQ files take multiples of {whole} and of 32"
        return None

    def risk_of(self, scheme: Scheme) -> str | None:
        """The reason why rounded weights may not fit, or None. A group without negative weights gets a zero of 0."""
        if self.name == V1 and not scheme.symmetric:
            return "version 1 cannot store a zero of 0, which rounding may choose; use --format gptq_v2, or --sym"
        return None

    def caveat(self, scheme: Scheme) -> str | None:
        """A warning about loading the scheme in other programs, or None."""
        return None if scheme.symmetric else f"{SYMMETRIC_ONLY}; GPTQModel takes these"

    def reason_in(self, engine: Engine, scheme: Scheme) -> str | None:
        """The reason why an engine cannot load weights of a scheme, or None."""
        return SYMMETRIC_ONLY if engine is VLLM and not scheme.symmetric else None

    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`. CheckpointError for a zero of 0 in version 1."""
        scheme, k = weight.scheme, weight.shape[1]
        bits, bias = scheme.bits, scheme.number.bias
        zeros = torch.full_like(weight.scales, bias, dtype=torch.int32) if weight.zeros is None else weight.zeros
        stored = zeros - STORED_LESS[self.name]
        if bool((stored < 0).any()):
            count = int((stored < 0).sum())
            raise CheckpointError(
                f"{name}: {count} of {stored.numel()} zeros are 0, which version 1 of GPTQ cannot store: it holds "
                "zero - 1, and -1 would borrow from the next one; use --format gptq_v2"
            )
        group_size = k if scheme.group_size == -1 else scheme.group_size
        return {
            f"{name}.qweight": pack(weight.codes, bits, bias).T.contiguous(),
            f"{name}.qzeros": pack(stored.T, bits),
            f"{name}.scales": weight.scales.T.contiguous(),
            f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // group_size,
        }

    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`. CheckpointError if its tensors contradict each other or the scheme."""
        with reading(name):
            return _read(self.name, name, tensor, scheme)

    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`."""
        rows, n = shapes(f"{name}.qweight")
        return n, rows * WORD // scheme.bits

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json, which is also the content of quantize_config.json.

        schemes      the scheme of every quantized linear, by its name in the file; all are equal
        unquantized  names of linears left in 16 bits

        If a linear inside a list of blocks (the decoder's or a tower's) is unquantized, all unquantized linears are
        declared twice: transformers and vLLM read the list of quantized ones, GPTQModel reads negative patterns.
        """
        (scheme,) = set(schemes.values())
        config: dict[str, Any] = {
            "quant_method": METHOD,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "desc_act": False,
            "sym": scheme.symmetric,
            "lm_head": False,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"lowbit:{__version__}"]},
        }
        left = sorted(unquantized)
        if any(re.search(r"\.\d+\.", name) for name in left):
            config["modules_in_block_to_quantize"] = [sorted(schemes)]
            config["dynamic"] = {rf"-:^{re.escape(name)}$": {} for name in left}
        return config

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each quantized linear, including GPTQModel's `dynamic` overrides.

        CheckpointError if a number is missing, or for a configuration that is not supported.
        """
        with following():
            _scheme_from(config)
            dynamic, patterns = config.get("dynamic") or {}, Patterns()
            return {name: _scheme_from(dict(config) | _overrides(dynamic, patterns, name)) for name in names}


GPTQ, GPTQ_V2 = Gptq(V1), Gptq(V2)
