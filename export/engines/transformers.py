"""Rules of transformers, from its `quantizers`: each format is read by a package."""

from lowbit.export.engines.engine import EXPANDED, Engine, EngineKernel, FusedLinear
from lowbit.export.engines.gptqmodel import GPTQMODEL


def _expanded(layer: FusedLinear, capability: int | None) -> str | None:
    """compressed-tensors: expanded to dense weights on the first forward pass."""
    return None if layer.fmt.package == "compressed-tensors" else "another format"


def _fine_grained(layer: FusedLinear, capability: int | None) -> str | None:
    """Block FP8: its own kernels on GPUs from Ada on, expanded elsewhere."""
    return None if layer.fmt.method == "fp8" else "another format"


TRANSFORMERS = Engine(
    "transformers",
    "5.23 with compressed-tensors 0.20 and optimum 2.3",
    (
        EngineKernel("expanded to 16 bits", _expanded, EXPANDED),
        EngineKernel("fine-grained fp8", _fine_grained),
        *GPTQMODEL.kernels,
    ),
)
