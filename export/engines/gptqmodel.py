"""Rules of gptqmodel, whose kernels transformers uses for GPTQ and AWQ files."""

from lowbit.export.engines.engine import Engine, EngineKernel, FusedLinear

NAME = "gptqmodel"


def _reads(layer: FusedLinear, capability: int | None) -> str | None:
    return None if layer.fmt.package == NAME else "another format"


GPTQMODEL = Engine(NAME, "7.7", (EngineKernel(NAME, _reads),))
