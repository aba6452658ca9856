"""AutoAWQ's GEMM layout, read by vLLM, SGLang and transformers (with gptqmodel).

For a linear P with weight (n, k), 4 bits and g groups; all tensors are transposed relative to nn.Linear:

    P.qweight  int32    (k, n / 8)  unsigned codes, packed along the outputs, interleaved
    P.qzeros   int32    (g, n / 8)  zeros, packed and interleaved alike
    P.scales   float16  (g, n)

Nibble i of a word, from the lowest bits, holds output 8 word + ORDER[i].
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import CheckpointError
from lowbit.export.format import BLOCKS_ELSEWHERE, Format, ShapeReader, TensorReader, following, reading, require_words
from lowbit.quant.packing import pack, unpack
from lowbit.quant.qtensor import QTensor
from lowbit.quant.scheme import Scheme, make_scheme

NAME = "awq"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = tuple(ORDER.index(i) for i in range(8))
SUFFIXES = ("qweight", "qzeros", "scales")


def _interleave(values: Tensor) -> Tensor:
    """Packed words (rows, n / 8) of `values` (rows, n), in AutoAWQ's order."""
    return pack(values.unflatten(-1, (-1, 8))[..., ORDER].flatten(-2), BITS)


def _deinterleave(words: Tensor) -> Tensor:
    """Values (rows, n) uint8 of packed words. The inverse of _interleave."""
    return unpack(words, BITS, words.shape[1] * 8).unflatten(-1, (-1, 8))[..., INVERSE].flatten(-2)


class Awq(Format):
    """The format `awq`."""

    name = NAME
    method = NAME
    package = "gptqmodel"
    suffixes = SUFFIXES
    marker = "qweight"
    loading = (
        "The files follow AutoAWQ's GEMM layout. vLLM and SGLang load the directory as it is; transformers does with "
        "the package `gptqmodel` installed."
    )
    through_marlin = True
    uniform = True
    scale_dtype = torch.float16

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """True for a quantization_config of AutoAWQ's GEMM version, the default if no version is given."""
        return config.get("quant_method") == NAME and str(config.get("version", "gemm")).lower() == "gemm"

    def reason_against(self, scheme: Scheme) -> str | None:
        """The reason why AWQ files cannot hold a scheme, or None."""
        if not scheme.number.is_integer or scheme.bits != BITS or scheme.inputs is not None:
            return "AWQ files hold only 4-bit weights"
        if scheme.weights.blocks:
            return BLOCKS_ELSEWHERE
        if scheme.symmetric:
            return "AWQ files hold asymmetric codes: engines ignore zero_point: false; use --asym"
        return None

    def reason_against_shape(self, scheme: Scheme, n: int, k: int) -> str | None:
        """The reason why a weight of this shape (n, k) cannot be packed, or None."""
        return f"{n} outputs: AWQ files take multiples of 8" if n % 8 else None

    def write(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """The file's tensors for the linear `name`."""
        assert weight.zeros is not None
        return {
            f"{name}.qweight": _interleave(weight.codes.T),
            f"{name}.qzeros": _interleave(weight.zeros.T),
            f"{name}.scales": weight.scales.T.contiguous(),
        }

    def read(self, name: str, tensor: TensorReader, scheme: Scheme) -> QTensor:
        """The weight of the linear `name`. CheckpointError if its tensors contradict each other or the scheme."""
        with reading(name):
            words, zeros = tensor(f"{name}.qweight"), tensor(f"{name}.qzeros")
            require_words(words, "qweight", (None, None))
            require_words(zeros, "qzeros", (scheme.groups(words.shape[0]), words.shape[1]))
            codes, scales = _deinterleave(words).T.contiguous(), tensor(f"{name}.scales").T.contiguous()
            return QTensor(codes, scales, _deinterleave(zeros).T.to(torch.int32), scheme)

    def shape(self, name: str, shapes: ShapeReader, tensor: TensorReader, scheme: Scheme) -> tuple[int, int]:
        """(n, k) of the linear `name`."""
        k, words = shapes(f"{name}.qweight")
        return words * 8, k

    def quantization_config(self, schemes: Mapping[str, Scheme], unquantized: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json.

        schemes      the scheme of every quantized linear, by its name in the file; all are equal
        unquantized  names of linears left in 16 bits

        Engines treat a linear as unquantized if its name contains an entry of modules_to_not_convert. CheckpointError
        if that would affect a quantized linear.
        """
        (scheme,) = set(schemes.values())
        left = sorted(set(unquantized))
        for name in left:
            caught = next((other for other in schemes if name in other), None)
            if caught is not None:
                raise CheckpointError(
                    f"AWQ files cannot leave {name} alone: engines would leave {caught} alone with it"
                )
        return {
            "quant_method": NAME,
            "bits": BITS,
            "group_size": scheme.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left,
        }

    def schemes_of(self, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each quantized linear. CheckpointError for a configuration that is not supported.

        `zero_point: false` is ignored: GPTQModel writes it if all zeros are 8, but writes the zeros too.
        """
        with following():
            bits = config["w_bit"] if "w_bit" in config else config["bits"]
            size = config["q_group_size"] if "q_group_size" in config else config["group_size"]
            if bits != BITS:
                raise ValueError(f"{bits} bits; AWQ files hold {BITS}")
            return dict.fromkeys(names, make_scheme(bits, size, False))


AWQ = Awq()
