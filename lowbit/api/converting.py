"""`lowbit.convert`: rewrite a checkpoint in another format, without requantizing."""

from dataclasses import dataclass
from pathlib import Path

from lowbit.api.shared import PAPERS_BYTES
from lowbit.arguments import typed
from lowbit.calibrate.plan import unquantized_linears
from lowbit.errors import RecipeError
from lowbit.evaluation.report.card import convert_card
from lowbit.export.checkpoint import open_checkpoint, seal, verify_checksums
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.export.convert import Conversion
from lowbit.export.convert import convert as convert_weights
from lowbit.export.dialects import FORMATS, format_of, named_format
from lowbit.export.format import Format
from lowbit.export.formats import LogicalTensors
from lowbit.export.staging import refuse_output, refuse_to_replace, require_space, staged
from lowbit.export.writer import carry_along
from lowbit.models.skeleton import open_skeleton
from lowbit.models.source import open_source
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import Scheme, parse_scheme

MARGIN = 1.1  # a target format may store more bytes per weight: zeros, shapes, wider scales


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    output            the new checkpoint's directory
    format            its format
    source            the directory that was read
    source_format, source_schemes  of the checkpoint that was read
    conversion        exact, rounded and rewritten linears
    """

    output: Path
    format: str
    source: Path
    source_format: str
    source_schemes: dict[str, Scheme]
    conversion: Conversion


@typed()
def convert(
    checkpoint: str | Path,
    output: str | Path,
    *,
    format: str | None = None,
    scheme: str | None = None,
    max_shard_size: int = Recipe.max_shard_size,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Converted:
    """Write `checkpoint`, a quantized model, to `output` in another format or scheme. No weight changes its value.

    >>> import lowbit
    >>> done = lowbit.quantize("my-model", "my-model-w4", method="rtn", group_size=32, eval_windows=0)
    >>> lowbit.convert("my-model-w4", "my-model-gptq", format="gptq").conversion.exact
    14

    output          the directory to write, or the file NAME.gguf
    format          "compressed-tensors", "gptq", "awq", "fp8", ...; None for what `output` asks for, or its own, or
                    "compressed-tensors"
    scheme          of all quantized linears ("nvfp4-a16" for an MXFP4 model); None for their own
    max_shard_size  bytes of the largest weight file
    revision        branch, tag or commit of a hub id

    Raises RecipeError for an unknown format or scheme, CheckpointError if the format cannot hold a weight, or if the
    scheme has no such values.
    """
    target = Path(output)
    named = named_format(target, format)
    wanted = _scheme_of(scheme)
    refuse_output(target, overwrite, format_of(target) is not None)
    source = open_source(str(checkpoint), trust_remote_code, revision)
    refuse_to_replace(target, source.directory, Path(checkpoint))
    logical = LogicalTensors(source.checkpoint)
    fmt = FORMATS[named] if named else _default_format(logical, scheme, Path(checkpoint).is_file())
    left = unquantized_linears(open_skeleton(source), logical.schemes)
    require_space(target, int(source.checkpoint.nbytes * MARGIN) + PAPERS_BYTES)
    verify_checksums(source.checkpoint)
    with staged(target, overwrite, fmt.container.alone(target)) as staging:
        carry_along(source.checkpoint, staging, with_code=trust_remote_code)
        done = convert_weights(logical, fmt, left, staging, max_shard_size, finished=False, scheme=wanted)
        assert logical.format is not None
        written = LogicalTensors(open_checkpoint(staging, finished=False))
        convert_card(staging, target.resolve().name, source.directory, written, logical.format.name)
        seal(staging, fmt.container)
    return Converted(target, fmt.name, source.directory, logical.format.name, logical.schemes, done)


def _default_format(logical: LogicalTensors, scheme: str | None, unpacked: bool) -> Format:
    """The format of a conversion to a `scheme` alone: its own, if that is written; for a file that is a whole model,
    compressed-tensors."""
    if unpacked:
        return COMPRESSED_TENSORS
    if scheme is None:
        raise RecipeError("say what to convert to: --format, --scheme or both, or an output called NAME.gguf")
    own = None if logical.format is None else FORMATS.get(logical.format.name)
    return own or COMPRESSED_TENSORS


def _scheme_of(text: str | None) -> Scheme | None:
    """The scheme with this name. RecipeError for an unknown one."""
    try:
        return None if text is None else parse_scheme(text)
    except ValueError as error:
        raise RecipeError(str(error)) from error
