"""The dialects of quantized checkpoints, one line each, and what follows from them."""

from pathlib import Path

from lowbit.errors import RecipeError, nearest
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


def format_of(output: Path) -> Format | None:
    """The format that the name of `output` asks for, as one file; None if it is a directory's."""
    return next((fmt for fmt in WRITTEN if fmt.container.alone(output)), None)


def named_format(output: Path | None, name: str | None) -> str | None:
    """The name of the format to write: `name`, or what the name of `output` asks for. None if neither says one.

    RecipeError for an unknown name, and if the two contradict each other.
    """
    asked = None if output is None else format_of(output)
    if name is not None and name not in FORMATS:
        raise RecipeError(f"unknown format {name!r}; {nearest(name, FORMATS)}")
    if asked is not None and name not in (None, asked.name):
        raise RecipeError(f"{output}: a file of format {asked.name}, but the format is to be {name}; name a directory")
    return name if asked is None else asked.name


def weight_files() -> tuple[str, ...]:
    """Patterns of the names of files that hold tensors, in any container."""
    return tuple(pattern for container in containers() for pattern in container.weights)


def sidecars() -> dict[str, str]:
    """File name -> quant_method. Old tools wrote such a file and no quantization_config in config.json."""
    return {fmt.sidecar: fmt.method for fmt in readable() if fmt.sidecar}
