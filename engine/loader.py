"""Loading: from a checkpoint directory to an engine."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from lowbit.arguments import typed
from lowbit.engine.architecture import Architecture
from lowbit.engine.decoder import Decoder
from lowbit.engine.drafts.heads import SPARE, Head, Model
from lowbit.engine.drafts.kinds import Drafter, kind_of, load_head, taps_for
from lowbit.engine.drafts.mtp import OWN, load_own
from lowbit.engine.engine import Engine
from lowbit.engine.families import FAMILIES, Family
from lowbit.engine.fields import Fields, NotComputed
from lowbit.engine.options import Options
from lowbit.engine.weights import CACHES, Settings, load_weights
from lowbit.errors import CheckpointError, DeviceError, UsageError
from lowbit.export.checkpoint import Checkpoint, open_checkpoint
from lowbit.export.plain import read_json
from lowbit.export.sizes import SLACK
from lowbit.export.untrusted import untrusted
from lowbit.models.devices import check_device
from lowbit.models.files import model_directory, refuse_negative_epsilon, refuse_scaled_float8
from lowbit.models.tokenizer import Tokenizer, load_tokenizer
from lowbit.progress import Step, tell
from lowbit.quant.kernels.extension import reason_against_device
from lowbit.quant.kernels.packed import HALF

LOG = logging.getLogger("lowbit.engine")
DEFAULT_CONTEXT = 4096


@typed()
def load(
    name: str | Path,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    context: int | None = None,
    cache: str = "auto",
    head: str = "dense",
    revision: str | None = None,
    drafter: str | Path | Drafter | None = None,
) -> Engine:
    """An engine for the checkpoint `name`: a directory, `demo`, or an id on the hub.

    >>> import lowbit
    >>> model = lowbit.load("my-model", device="cpu")
    >>> [completion] = model.generate(["Once"], max_new_tokens=4)
    >>> len(completion.tokens)
    4

    device   "auto" uses the GPU if there is one
    dtype    of activations; default: float32 on a CPU, the model's own half precision on a GPU
    context  longest sequence, prompt and output; default: 4096, or the model's limit if that is less
    cache    keys and values as "same" (dtype), "int8", "fp8" (by the checkpoint's scales) or "int4"; "auto" is "fp8" if
             the checkpoint declares such a cache, else "same"
    revision  branch, tag or commit of a hub id
    head     "dense", or a scheme ("int8") to round the head to while loading
    drafter  directory or hub id of a head that drafts for this model, or "mtp" for the one that the model's own files
             carry; None for none. A Drafter names a scheme to round it to as well

    CheckpointError for an unknown family (known ones are listed), and for files that are damaged or contradict their
    configuration.
    """
    if dtype is not None and dtype not in (torch.float32, *HALF):
        raise UsageError(f"dtype {dtype}: float32, float16 or bfloat16 is what activations are computed in")
    tell(Step("files", 0, None))
    directory = model_directory(str(name), revision=revision)
    checkpoint = open_checkpoint(directory)
    family = family_of(checkpoint)
    tell(Step("device", 0, None))
    place = torch.device(check_device(device))
    kind = dtype or default_dtype(checkpoint, place)
    require_build(place)
    require_memory(checkpoint, place)
    if cache not in CACHES:
        raise UsageError(f"cache {cache!r}: write {', '.join(CACHES[:-1])} or {CACHES[-1]}")
    refuse_negative_epsilon(checkpoint.head, checkpoint.config)
    refuse_scaled_float8(checkpoint)
    architecture = architecture_of(family, checkpoint)
    require_rows(architecture, checkpoint)
    positions = context_of(architecture, directory, context)
    settings = Settings(place, kind, cache, head)
    tell(Step("weights", 0, None))
    with untrusted(directory / "config.json", f"no {family.name} that the engine can run"):
        weights = load_weights(checkpoint, family.names, architecture, settings)
    drafts = None
    if drafter is not None:
        named = drafter if isinstance(drafter, Drafter) else Drafter(str(drafter))
        drafts = head_of(
            named,
            Model(architecture, weights.embedding, positions + SPARE, weights.head),
            (checkpoint, settings),
        )
    decoder = Decoder(architecture, weights, positions, () if drafts is None else drafts.taps)
    tell(Step("tokenizer", 0, None))
    tokenizer = tokenizer_of(checkpoint)
    stop_tokens = stop_tokens_of(checkpoint, architecture.vocabulary)
    required = not isinstance(drafter, Drafter) or drafter.required
    options = Options(context=positions, stop_tokens=stop_tokens, drafter_required=required)
    return Engine(decoder, tokenizer, options, drafts)


def head_of(drafter: Drafter, model: Model, own: tuple[Checkpoint, Settings]) -> Head | None:
    """The head of a drafter; None, with a warning, for one that is not required and cannot be loaded.

    own  the model's checkpoint, and the settings of its weights
    CheckpointError if a required one is none, is damaged, or was made for another model; torch.OutOfMemoryError
    """
    try:
        return any_head_of(drafter, model, own)
    except (CheckpointError, torch.OutOfMemoryError) as error:
        if drafter.required:
            raise
        LOG.warning("%s; texts are written without the drafter", error)
        return None


def any_head_of(drafter: Drafter, model: Model, own: tuple[Checkpoint, Settings]) -> Head:
    """As head_of, for a required drafter."""
    carrier, settings = own[0], replace(own[1], cache="same", head="dense", linears=drafter.scheme)
    if drafter.name == OWN:
        return load_own(carrier, family_of(carrier).names, model, settings)
    return head_in(model_directory(drafter.name), model, settings)


def head_in(directory: Path, model: Model, settings: Settings) -> Head:
    """The head of the drafter in a directory. CheckpointError if it is none, or made for another model."""
    checkpoint, architecture = drafter_in(directory)
    with untrusted(checkpoint.head, "no drafter that the engine can run"):
        return load_head(checkpoint, architecture, model, settings)


def drafter_in(directory: Path) -> tuple[Checkpoint, Architecture]:
    """The drafter in a directory, and its architecture."""
    checkpoint = open_checkpoint(directory)
    refuse_negative_epsilon(checkpoint.head, checkpoint.config)
    architecture = architecture_of(FAMILIES[kind_of(checkpoint).family], checkpoint)
    require_rows(architecture, checkpoint)
    return checkpoint, architecture


def with_drafter(model: Engine, directory: Path) -> Engine:
    """An engine of the same weights with the drafter in a directory."""
    decoder, weights = model.decoder, model.decoder.weights
    whole = Model(decoder.architecture, weights.embedding, decoder.context + SPARE, weights.head)
    head = head_in(directory, whole, Settings(weights.device, weights.dtype, cache="same"))
    tapped = Decoder(decoder.architecture, weights, decoder.context, head.taps)
    return Engine(tapped, model.tokenizer, model.options, head)


def require_drafter(directory: Path, drafter: Path) -> Checkpoint:
    """The drafter in a directory. CheckpointError if it was made for another model than that of `directory`."""
    model, (checkpoint, architecture) = open_checkpoint(directory), drafter_in(drafter)
    with untrusted(checkpoint.head, "no drafter that the engine can run"):
        taps_for(checkpoint, architecture, architecture_of(family_of(model), model))
    return checkpoint


def require_build(device: torch.device) -> None:
    """DeviceError if the extension has no code for this GPU."""
    reason = reason_against_device(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    if reason is not None:
        raise DeviceError(f"{device}: {reason}; or use device='cpu'")


def require_memory(checkpoint: Checkpoint, device: torch.device) -> None:
    """CheckpointError if a GPU lacks the memory for the weights as stored."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if checkpoint.nbytes > free:
        raise CheckpointError(
            f"{checkpoint.directory}: its weights take {checkpoint.nbytes / 2**30:.1f} GiB, {device} has "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free: free some, quantize the model to fewer bits, or use "
            "device='cpu'"
        )


def family_of(checkpoint: Checkpoint) -> Family:
    """The row of FAMILIES for a checkpoint. CheckpointError for an unknown one lists the known ones."""
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{checkpoint.directory}: the engine has no family {kind!r}; it knows {', '.join(FAMILIES)}. Other "
            "models are quantized and exported all the same: transformers and vLLM load them"
        )
    return FAMILIES[kind]


def architecture_of(family: Family, checkpoint: Checkpoint) -> Architecture:
    """The architecture for config.json. CheckpointError if it is invalid, or if it needs more than the engine
    computes."""
    where = checkpoint.directory / "config.json"
    with untrusted(where, f"no {family.name}"):
        try:
            read = Fields(family.config.read(checkpoint.config))
            architecture = family.architecture(read)
            read.refuse_unread()
        except NotComputed as error:
            raise CheckpointError(f"{where}: no {family.name} ({error})") from error
    reason = architecture.reason_against()
    if reason is not None:
        raise CheckpointError(f"{where}: no {family.name} ({reason})")
    return architecture


def require_rows(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """CheckpointError if q, k and v would have more rows than any tensor of the files can hold."""
    widest = max((size for entry in checkpoint.entries.values() for size in entry.shape), default=0)
    rows = max(architecture.heads_of(index).qkv_rows for index in range(len(architecture.layers)))
    if rows > 3 * SLACK * widest:
        raise CheckpointError(
            f"{checkpoint.head}: {rows} rows of q, k and v, but no tensor of the files has more than {widest}"
        )


def context_of(architecture: Architecture, directory: Path, wanted: int | None) -> int:
    """The engine's context: the wanted one, within the model's limit."""
    most = architecture.max_positions
    if wanted is not None and not 1 <= wanted <= most:
        raise UsageError(
            f"context {wanted}: {directory} has positions for 1 to {most} tokens; pass a shorter --context, or in "
            "bench fewer --prompt-tokens or --new-tokens"
        )
    return wanted or min(DEFAULT_CONTEXT, most)


def default_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """float32 on a CPU. On a GPU, the configuration's dtype if that is half precision, otherwise float16."""
    if device.type == "cpu":
        return torch.float32
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return {str(dtype).removeprefix("torch."): dtype for dtype in HALF}.get(str(name), torch.float16)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """The model's tokenizer, or None: an engine without one takes and returns token ids."""
    try:
        return load_tokenizer(checkpoint)
    except CheckpointError:
        return None


def stop_tokens_of(checkpoint: Checkpoint, vocabulary: int) -> tuple[int, ...]:
    """The end tokens: from generation_config.json, or else config.json, within the vocabulary.

    CheckpointError if they are not token ids.
    """
    with checkpoint.companions() as companions:
        path = companions / "generation_config.json"
        generation = read_json(path) if path.exists() else {}
    named = path if "eos_token_id" in generation else checkpoint.head
    found = generation.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in tokens):  # isinstance would accept a bool
        raise CheckpointError(f"{named}: eos_token_id is {found!r}; a token id or a list of them is needed")
    return tuple(token for token in tokens if 0 <= token < vocabulary)
