"""The dialects of quantized checkpoints, one line each, and what follows from them."""

from lowbit.export.awq import AWQ
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.export.container import Container
from lowbit.export.format import Format
from lowbit.export.fp8 import BLOCK_FP8
from lowbit.export.gguf.format import GGUF_FORMAT
from lowbit.export.gptq import GPTQ, GPTQ_V2
from lowbit.export.modelopt import MODELOPT
from lowbit.export.mxfp4 import GPT_OSS

WRITTEN = (COMPRESSED_TENSORS, GPTQ, GPTQ_V2, AWQ, BLOCK_FP8, MODELOPT, GGUF_FORMAT)
FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in WRITTEN}


def readable() -> tuple[Format, ...]:
    """Every format that is read. The last one is not written."""
    return (*FORMATS.values(), GPT_OSS)


def containers() -> tuple[Container, ...]:
    """All containers of the formats, each once. The first that recognises a directory reads it."""
    return tuple(dict.fromkeys(fmt.container for fmt in readable()))


def weight_files() -> tuple[str, ...]:
    """Patterns of the names of files that hold tensors, in any container."""
    return tuple(pattern for container in containers() for pattern in container.weights)


def sidecars() -> dict[str, str]:
    """File name -> quant_method. Old tools wrote such a file and no quantization_config in config.json."""
    return {fmt.sidecar: fmt.method for fmt in readable() if fmt.sidecar}
