"""A plan from the names and shapes of a file's tensors alone, for models without a class."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from lowbit.calibrate.plan import Left, Plan, ignored_by, plan_of, require_fits
from lowbit.calibrate.vocabulary import VocabularyWeight
from lowbit.errors import CheckpointError
from lowbit.export.formats import LogicalTensors
from lowbit.models.placement import Placement
from lowbit.models.skeleton import Block, LinearSpec
from lowbit.quant.recipe import Recipe
from lowbit.quant.scheme import parse_scheme

BLOCK = re.compile(r"^(.+?\.\d+)\.")  # a name up to its first number: a decoder block, unless it is in a tower
TOWERS = re.compile(r"(^|[._])(visual|vision|image|audio|speech|video|siglip|clip|mtp|nextn|draft|eagle)[\w]*\.")
EMBEDDINGS = re.compile(r"(^|[._])(embed\w*|embeddings?|wte|wpe|word_emb\w*|pos_emb\w*|rotary\w*|inv_freq)($|[._])")
NORMS = re.compile(r"norm|(^|[._])ln($|[._])|(^|[._])ln_")
ROUTERS = re.compile(r"(^|\.)(gate|router|\w*_gate|router\.\w+|wg)$")  # gate_proj is none
SMALL = re.compile(r"(^|\.)(conv1d|in_proj_[ab]|in_proj_ba|dt_proj|x_proj|A_log)$")  # of state-space layers
HEADS = ("lm_head", "output", "embed_out", "output_layer", "head")
TIED = ("model.embed_tokens.weight", "transformer.wte.weight")  # embeddings of models whose head is lm_head
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # model types with Conv1D weights (k, n)


def plan_by_names(tensors: LogicalTensors, recipe: Recipe) -> Plan:
    """The plan for the matrices of `tensors`: those inside numbered blocks are linears, unless their name says what
    else they are. CheckpointError for a family that stores its weights transposed."""
    kind = tensors.checkpoint.config.get("model_type")
    if kind in TRANSPOSED:
        raise CheckpointError(f"model type {kind} stores its weights transposed: quantize it without --model-free")
    matrices = dict(_matrices(tensors))
    blocks: dict[str, Block] = {}
    left: dict[str, Left] = {}
    for name, shape in matrices.items():
        outside = _reason_outside(name)
        reason = outside or _reason_against(tensors, name)
        if reason is not None:
            pattern = ignored_by(name, recipe.ignore)
            exempt = pattern is not None or outside is not None
            left[name] = Left(shape[0] * shape[1], f"ignored by {pattern!r}" if pattern else reason, exempt)
            continue
        home = BLOCK.match(name)[1]  # type: ignore[index]  # or there would be a reason
        block = blocks.setdefault(home, Block(home, nn.Module()))
        block.linears.append(LinearSpec(name, Placement(f"{name}.weight"), None, False, *shape))
    names = [spec.name for block in blocks.values() for spec in block.linears]
    require_fits(recipe.ignore, names, (name.rpartition(".")[0] for name in tensors.names))
    roles = {name: "router" for name in names if ROUTERS.search(name)}
    roles |= {name: "small part of a state-space layer" for name in names if SMALL.search(name)}
    plan = plan_of(list(blocks.values()), recipe, roles)
    head = _head(tensors, matrices, recipe)
    if head is not None:
        left.pop(head.name, None)
    return replace(plan, left=left | plan.left | dict(_stacks(tensors)), head=head)


def _matrices(tensors: LogicalTensors) -> Iterator[tuple[str, tuple[int, int]]]:
    """Outputs and inputs of every matrix that may be a linear, by its name without `.weight`."""
    entries = tensors.checkpoint.entries
    for name in tensors.names:
        linear = name.removesuffix(".weight")
        if linear == name or EMBEDDINGS.search(linear) or NORMS.search(linear):
            continue
        shape = tensors.shape(linear) if linear in tensors.schemes else entries[name].shape
        if len(shape) == 2:
            yield linear, (shape[0], shape[1])


def _reason_outside(name: str) -> str | None:
    """The reason why a matrix is no linear of a decoder block, or None."""
    tower = TOWERS.search(name)
    if tower:
        return f"in {tower[0].strip('._')}, not in the decoder"
    return None if BLOCK.match(name) else "outside the decoder blocks"


def _reason_against(tensors: LogicalTensors, name: str) -> str | None:
    """The reason why a matrix of the decoder has no values that can be rounded, or None."""
    if name in tensors.schemes:
        return None
    entry = tensors.checkpoint.entries[f"{name}.weight"]
    if not entry.numel:
        return "no elements"
    return None if entry.dtype.is_floating_point else f"{entry.dtype}, whose meaning config.json does not say"


def _stacks(tensors: LogicalTensors) -> Iterator[tuple[str, Left]]:
    """Experts in one tensor: without a model class the order of their inputs and outputs is unknown."""
    for name in tensors.names:
        entry = tensors.checkpoint.entries.get(name)
        if entry is not None and len(entry.shape) == 3 and ".experts." in name and not name.endswith("bias"):
            yield name, Left(entry.numel, "experts in one tensor, whose order only a model class tells", exempt=False)


def _head(tensors: LogicalTensors, matrices: Mapping[str, tuple[int, int]], recipe: Recipe) -> VocabularyWeight | None:
    """The head that the recipe has quantized, or None: a tensor of its own, or the embeddings that are tied to it.
    CheckpointError if no file has either."""
    if recipe.head is None:
        return None
    scheme = parse_scheme(recipe.head)
    name = next((name for name in matrices if name.rpartition(".")[2] in HEADS and not BLOCK.match(name)), None)
    tensor, tied = f"{name}.weight", name is None
    if name is None:
        name, tensor = HEADS[0], _tied_embeddings(tensors)
    n, k = matrices[name] if not tied else tensors.checkpoint.entries[tensor].shape
    reason = _reason_against(tensors, tensor.removesuffix(".weight")) or scheme.reason_against_shape(n, k)
    if reason is not None:
        raise CheckpointError(f"head {name} as {scheme}: {reason}")
    return VocabularyWeight(name, tensor, scheme, n, k, tied=tied, asked=scheme)


def _tied_embeddings(tensors: LogicalTensors) -> str:
    """The name of the embeddings that are the head too. CheckpointError if nothing says so."""
    config = tensors.checkpoint.config
    inner = config.get("text_config")
    tied = config.get("tie_word_embeddings", isinstance(inner, dict) and inner.get("tie_word_embeddings"))
    found = [name for name in TIED if name in tensors.checkpoint.entries]
    if not tied or len(found) != 1 or tensors.is_quantized(found[0]):
        raise CheckpointError(
            f"{tensors.checkpoint.directory}: no tensor of a head, and none of {', '.join(TIED)} with "
            "tie_word_embeddings in config.json: quantize the head with a model class, without --model-free"
        )
    return found[0]
