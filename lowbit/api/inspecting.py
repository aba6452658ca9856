"""`lowbit.inspect`: the contents of a quantized checkpoint, and the engines that run it."""

from dataclasses import replace
from pathlib import Path

from lowbit.arguments import typed
from lowbit.calibrate.plan import unquantized_linears
from lowbit.export.checkpoint import verify_checksums
from lowbit.export.formats import LogicalTensors
from lowbit.export.inspection import Inspection, inspect_checkpoint
from lowbit.models.skeleton import Skeleton, open_skeleton
from lowbit.models.source import Source, open_source


@typed()
def inspect(
    checkpoint: str | Path, *, check: bool = False, revision: str | None = None, trust_remote_code: bool = False
) -> Inspection:
    """Schemes, sizes and coverage of `checkpoint`, and the kernels with which each engine runs it.

    >>> import lowbit
    >>> done = lowbit.quantize("my-model", "my-model-w4", method="rtn", group_size=32, eval_windows=0)
    >>> found = lowbit.inspect("my-model-w4")
    >>> found.format, len(found.linears), round(found.bits_per_weight, 2)
    ('compressed-tensors', 14, 4.5...)

    revision  branch, tag or commit of a hub id
    check     also read every weight and verify every checksum; otherwise only headers are read

    Raises CheckpointError for a checkpoint that is damaged or not quantized.
    """
    source = open_source(str(checkpoint), trust_remote_code, revision)
    logical = LogicalTensors(source.checkpoint)
    skeleton = open_skeleton(source)
    found = inspect_checkpoint(logical, _linears(skeleton, logical), _heads(source))
    return replace(found, checked_files=_check(logical)) if check else found


def _linears(skeleton: Skeleton, logical: LogicalTensors) -> dict[str, int]:
    """Parameters of every linear by its name in the file; 0 for a linear without a tensor of its own (a tied head)."""
    sizes = {spec.name: spec.n * spec.k for block in skeleton.blocks for spec in block.linears}
    entries = logical.checkpoint.entries
    for name in unquantized_linears(skeleton, logical.schemes):
        entry = entries.get(f"{name}.weight")
        sizes.setdefault(name, 0 if entry is None else entry.numel)
    return sizes


def _heads(source: Source) -> tuple[int, int] | None:
    """(query heads, key and value heads) from the configuration, the fewest of any layer, or None."""
    queries = source.of_layers("num_attention_heads")
    if not queries:
        return None
    return min(queries), min(source.of_layers("num_key_value_heads") or queries)


def _check(logical: LogicalTensors) -> int:
    """The number of files with a known, correct checksum. CheckpointError for a wrong one or a damaged weight."""
    for name in logical.schemes:
        logical.qtensor(name)
    return verify_checksums(logical.checkpoint)
