"""A model without its weights, with the placement of every tensor of its files."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.pytorch_utils import Conv1D

from lowbit.errors import CheckpointError
from lowbit.export.format import TensorReader
from lowbit.export.formats import LogicalTensors
from lowbit.export.sizes import SLACK
from lowbit.export.survey import checked
from lowbit.export.untrusted import untrusted
from lowbit.models.placement import Conversion, Placement, bias_of, experts_in, place, tensor_of
from lowbit.models.routing import groups_of, widths
from lowbit.models.source import Source
from lowbit.quant.kernels.route_experts import Rule
from lowbit.quant.naming import EXPERT, expert_of
from lowbit.quant.numerics import input_rounding

SMALL = 1 << 24  # parameters that are harmless to allocate, whatever the files hold
MOST_BUFFERS = 256 << 20  # bytes; a table of a million positions takes half of it


@dataclass(frozen=True)
class LinearSpec:
    """A linear of a block, known from file headers alone.

    name         its name in the file, without ".weight"
    placement    placement of its weight in the model
    bias         placement of its bias, or None
    transposed   True if stored as (k, n), like transformers' Conv1D and some stacks of experts
    n, k         outputs and inputs
    """

    name: str
    placement: Placement
    bias: Placement | None
    transposed: bool
    n: int
    k: int


@dataclass
class Block:
    """One decoder block: its module, the file's tensors for it, and its linears."""

    name: str
    module: nn.Module
    tensors: dict[str, Placement] = field(default_factory=dict)
    linears: list[LinearSpec] = field(default_factory=list)

    def signature(self) -> tuple[Any, ...]:
        """A key that is equal for blocks of the same structure."""
        shapes = tuple((name, tuple(p.shape)) for name, p in self.module.named_parameters())
        kinds = tuple((name, type(module).__name__) for name, module in self.module.named_modules())
        return shapes, kinds, getattr(self.module, "attention_type", None)

    def names_in(self, other: "Block") -> dict[str, str]:
        """For each linear and module of this block, its counterpart's name in the similar block `other`."""

        def seat(block: Block, spec: LinearSpec) -> Placement:
            return replace(spec.placement, parameter=spec.placement.parameter.removeprefix(block.name))

        there = {seat(other, spec): spec.name for spec in other.linears}
        names = {f"{self.name}.{name}": f"{other.name}.{name}" for name, _ in self.module.named_modules()}
        return names | {spec.name: there[seat(self, spec)] for spec in self.linears}


@dataclass
class Skeleton:
    """A model on the meta device, in blocks.

    source   the model's files
    model    transformers' model; parameters have shapes but no memory
    blocks   its decoder blocks, in order
    others   the file's tensors outside the blocks, by name
    read     reads a tensor of the file by its logical name
    tensors  the file's tensors by logical name
    inputs   linear -> rounding function of its inputs, if they are quantized in the file
    cache    attention module -> scales of its keys and values, if the file declares a key-value cache of few bits
    """

    source: Source
    model: PreTrainedModel
    blocks: list[Block]
    others: dict[str, Placement]
    read: TensorReader
    tensors: LogicalTensors
    inputs: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    cache: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def towers(self) -> list[str]:
        """Names of submodels next to the decoder (vision, audio), which text alone never runs."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, PreTrainedModel) and not self.blocks[0].name.startswith(f"{name}." if name else "")
        ]

    def placed(self) -> dict[str, Placement]:
        """Every tensor of the file with a place in the model, by name."""
        return self.others | {name: at for block in self.blocks for name, at in block.tensors.items()}

    @contextmanager
    def loaded(
        self, module_name: str, tensors: dict[str, Placement], device: str, dtype: torch.dtype
    ) -> Iterator[nn.Module]:
        """A context with the module `module_name` filled from the file."""
        module = self.model.get_submodule(module_name)
        try:
            fill(self.model, module.modules(), tensors, self.read, device, dtype)
            yield module
        finally:
            empty(module.modules())


def open_skeleton(source: Source, original: bool = False) -> Skeleton:
    """The skeleton of `source`, with every tensor of its files placed. Packed weights are dequantized when read.

    original  True if the model will be quantized again: packed weights are read in float32, inputs are not rounded

    CheckpointError if the model has no blocks, or if the file lacks a parameter or contradicts it.
    """
    model = _empty_model(source)
    tensors = LogicalTensors(source.checkpoint)
    placements = place(model, tensors.names, {name: entry.shape for name, entry in source.checkpoint.entries.items()})
    _untie(model, placements, tensors.read)
    _require_experts(model, placements)
    blocks = [Block(name, module) for name, module in find_blocks(model)]
    others: dict[str, Placement] = {}
    for name, placement in placements.items():
        owner = next((block for block in blocks if placement.parameter.startswith(block.name + ".")), None)
        (others if owner is None else owner.tensors)[name] = placement
    for block in blocks:
        block.linears = list(_linears(model, block))
        _require_width(block)
    _require_parameters(source, model, placements, blocks)
    dense = {name: at for name, at in placements.items() if not tensors.is_quantized(name)}
    _require_shapes(source, model, dense)
    # a packed weight is (n, k), whatever the layout of the module's own weight
    turned = {f"{spec.name}.weight" for block in blocks for spec in block.linears if spec.transposed}
    turned &= {f"{name}.weight" for name in tensors.schemes}

    plain = tensors.exact if original else tensors.read

    def read(name: str) -> Tensor:
        return plain(name).T if name in turned else plain(name)

    if original:
        return Skeleton(source, model, blocks, others, read, tensors)
    inputs, cache = _quantized_inputs(tensors), _quantized_cache(tensors, blocks)
    return Skeleton(source, model, blocks, others, read, tensors, inputs, cache)


def _quantized_cache(tensors: LogicalTensors, blocks: list[Block]) -> dict[str, tuple[Tensor, Tensor]]:
    """The scales of keys and values by the modules that may attend; a scale that the file lacks is 1, as for engines.
    Empty if the file declares no cache."""
    scales = tensors.cache_scales()
    homes = {spec.name.rpartition(".")[0]: spec.placement for block in blocks for spec in block.linears}
    lost = {name.rpartition(".")[0] for name in scales} - homes.keys()
    if lost:
        raise CheckpointError(f"{min(lost)}: the file has scales of its cache, the model has no such attention")
    found = {}
    for home, placement in homes.items() if tensors.cache is not None else ():
        module = placement.parameter.removesuffix(".weight").rpartition(".")[0]
        key, value = (scales.get(f"{home}.{part}_scale", torch.ones(1)) for part in "kv")
        found[module] = key, value
    return found


def _quantized_inputs(tensors: LogicalTensors) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        name: input_rounding(scheme.inputs, tensors.qtensor(name).input_scale if scheme.static_inputs else None)
        for name, scheme in tensors.schemes.items()
        if scheme.inputs is not None
    }


def _empty_model(source: Source) -> PreTrainedModel:
    config = source.config
    config._experts_implementation = "eager"  # one F.linear per expert, visible to calibration
    auto = AutoModelForImageTextToText if source.sees else AutoModelForCausalLM
    with untrusted(source.directory, "transformers cannot make the model of this configuration"):
        _require_held(source, auto)
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config, trust_remote_code=source.trust_remote_code, dtype=torch.float32)
    _require_frequencies(source, model)
    return model.eval()


def _require_frequencies(source: Source, model: PreTrainedModel) -> None:
    """CheckpointError if a rotary frequency is infinite or NaN, and with it every product of attention."""
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and not bool(buffer.isfinite().all()):
            raise CheckpointError(
                f"{source.checkpoint.head}: the rotary frequencies of {name.rpartition('.')[0]} are infinite or NaN; "
                "rope_theta must be above 0"
            )


def _require_held(source: Source, auto: type[_BaseAutoModelClass]) -> None:
    """Raise CheckpointError if the model of config.json is far larger than its files.

    The model is built without memory, buffers included (tables of positions). If a class cannot be built so, only the
    sizes in config.json are checked against the files (`export.sizes`).
    """
    parameters = buffers = 0
    with suppress(Exception), torch.device("meta"), init_empty_weights():
        model = auto.from_config(source.config, trust_remote_code=source.trust_remote_code, dtype=torch.float32)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        buffers = sum(buffer.nbytes for buffer in model.buffers())
    held = sum(entry.numel for entry in source.checkpoint.entries.values())
    if parameters > SLACK * held + SMALL or buffers > source.checkpoint.nbytes + MOST_BUFFERS:
        raise CheckpointError(
            f"{source.directory}: the model of config.json has {parameters} parameters and {buffers} bytes of tables, "
            f"the files hold {held} values: config.json belongs to another model"
        )


def find_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Names and modules of the decoder blocks.

    Chosen from the text decoder's ModuleLists: first one as long as the configuration's depth, then the outermost, then
    the one with the most parameters.
    """
    decoder, depth = model.get_decoder(), getattr(model.config.get_text_config(), "num_hidden_layers", None)
    every = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    # in some classes get_decoder() returns the head
    lists = [found for found in every if any(found[1] is inner for inner in decoder.modules())] or every
    if not lists:
        raise CheckpointError(f"{type(model).__name__}: no list of decoder blocks found in it")

    def fitness(found: tuple[str, nn.ModuleList]) -> tuple[bool, int, int]:
        name, module = found
        return len(module) == depth, -name.count("."), sum(parameter.numel() for parameter in module.parameters())

    name, module = max(lists, key=fitness)
    return [(f"{name}.{i}", child) for i, child in enumerate(module)]


def _linears(model: PreTrainedModel, block: Block) -> Iterator[LinearSpec]:
    """The block's weights that multiply activations: of Linear and Conv1D modules, and of single experts."""
    for name, placement in _single(model, block.tensors):
        parameter = model.get_parameter(placement.parameter) if _is_parameter(model, placement.parameter) else None
        if parameter is None or placement.conversion or (not name.endswith("weight") and parameter.ndim != 3):
            continue
        owner = model.get_submodule(placement.parameter.rpartition(".")[0])
        shape = tuple(placement.view(parameter).shape)
        if len(shape) != 2 or not (isinstance(owner, nn.Linear | Conv1D) or _multiplies(owner, placement)):
            continue
        transposed = isinstance(owner, Conv1D) or placement.axis == 1 or placement.swapped
        n, k = reversed(shape) if transposed else shape
        yield LinearSpec(name.removesuffix(".weight"), placement, bias_of(model, placement), transposed, n, k)


def _single(model: PreTrainedModel, tensors: dict[str, Placement]) -> Iterator[tuple[str, Placement]]:
    """`tensors`, with stacks of experts split."""
    for name, placement in tensors.items():
        whole = placement.conversion is None or len(placement.conversion.converter.target_patterns) == 1
        stacked = placement.expert is None and tensor_of(model, placement).ndim == 3 and whole
        experts = experts_in(model, name, placement) if stacked else {}
        yield from (experts or {name: placement}).items()


def _multiplies(owner: nn.Module, placement: Placement) -> bool:
    """True for slices of experts and bare 2-dimensional weights (routers).

    False for embeddings, convolutions, and norms, some of which have a row of values for each head.
    """
    scales = "norm" in type(owner).__name__.lower()
    return placement.expert is not None or not (scales or isinstance(owner, nn.Embedding | nn.Conv1d))


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._parameters


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Tied parameters: the name of each, and of the parameter that it equals."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _untie(model: PreTrainedModel, placements: dict[str, Placement], read: TensorReader) -> None:
    """Untie weights that config.json declares tied, if the file holds two different values for them.

    transformers does the same. The configuration is changed accordingly.
    """
    names = {place.parameter: name for name, place in placements.items()}
    for target, origin in list(tied_weights(model).items()):
        if target in names and origin in names and not torch.equal(read(names[target]), read(names[origin])):
            del model.all_tied_weights_keys[target]
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _require_parameters(
    source: Source, model: PreTrainedModel, placements: dict[str, Placement], blocks: list[Block]
) -> None:
    """CheckpointError if the file lacks a parameter, or a buffer of a block that files hold: a router's correction."""
    placed = {placement.parameter for placement in placements.values()}
    for conversion in _conversions(placements):
        placed |= conversion.parameters(model, lambda name: _unread(source, name)).keys()
    tied = tied_weights(model)
    missing = [name for name, _ in model.named_parameters() if name not in placed and name not in tied]
    missing += [name for name in _stored_buffers(model, blocks) if name not in placed]
    missing += _absent_parts(model, placements)
    if missing:
        raise CheckpointError(
            f"{source.directory}: {len(missing)} weights that {type(model).__name__} needs are in no file, "
            f"the first {missing[0]!r}: the download is incomplete, or config.json belongs to another model"
        )


def _stored_buffers(model: PreTrainedModel, blocks: list[Block]) -> Iterator[str]:
    """The buffers of blocks that files hold, without those that the family's class can do without."""
    optional, parameters = model._keys_to_ignore_on_load_missing or (), dict(model.named_parameters())
    for block in blocks:
        for leaf in block.module.state_dict(keep_vars=True):
            name = f"{block.name}.{leaf}"
            if name not in parameters and not any(re.search(pattern, name) for pattern in optional):
                yield name


def _absent_parts(model: PreTrainedModel, placements: dict[str, Placement]) -> Iterator[str]:
    """The tensors that the file lacks among those that make up one parameter: experts, gates and ups."""
    seats: dict[str, dict[tuple[int | None, int], str]] = {}
    for name, at in placements.items():
        if at.conversion is None and (at.expert is not None or at.parts > 1):
            seats.setdefault(at.parameter, {})[at.expert, at.part] = name
    for taken in seats.values():
        first = placements[next(iter(taken.values()))]
        experts = [None] if first.expert is None else range(tensor_of(model, first).shape[0])
        for expert, part in product(experts, range(first.parts)):
            if (expert, part) not in taken:
                alike = next((name for (_, other), name in taken.items() if other == part), first.parameter)
                yield EXPERT.sub(f".experts.{expert}.", alike)


def _require_width(block: Block) -> None:
    """CheckpointError if a router chooses no expert for a token, more than there are, or groups that do not exist."""
    experts = {expert_of(spec.name) for spec in block.linears if EXPERT.search(spec.name)}
    for name, width in widths(block.module):
        groups = groups_of(block.module.get_submodule(name))
        reason = Rule(width, groups=groups[0], used_groups=groups[1]).reason_against(len(experts)) if experts else None
        if reason is not None:
            raise CheckpointError(f"{block.name}.{name}: {reason}")


def _conversions(placements: dict[str, Placement]) -> list[Conversion]:
    """The conversions among `placements`, each once."""
    return list(dict.fromkeys(at.conversion for at in placements.values() if at.conversion is not None))


def _unread(source: Source, name: str) -> Tensor:
    """A tensor of the file on the meta device, without its values."""
    return torch.empty(source.checkpoint.entries[name].shape, device="meta")


def _require_experts(model: PreTrainedModel, placements: dict[str, Placement]) -> None:
    """Raise CheckpointError if the file has more experts than config.json."""
    for name, placement in placements.items():
        experts = tensor_of(model, placement).shape[:1]
        if placement.expert is not None and placement.expert >= experts[0]:
            raise CheckpointError(f"{name}: the model of config.json has {experts[0]} experts, the file has more")


def _require_shapes(source: Source, model: PreTrainedModel, placements: dict[str, Placement]) -> None:
    """Raise CheckpointError if a tensor's shape in the file contradicts config.json."""
    for name, placement in placements.items():
        entry = source.checkpoint.entries.get(name)
        wanted = tuple(placement.view(tensor_of(model, placement)).shape)
        if entry is not None and placement.conversion is None and entry.shape != wanted:
            raise CheckpointError(
                f"{name}: {list(entry.shape)} in the file, {list(wanted)} in the model of config.json"
            )


def fill(
    model: nn.Module,
    modules: Iterable[nn.Module],
    tensors: dict[str, Placement],
    read: TensorReader,
    device: str,
    dtype: torch.dtype | None,
) -> None:
    """Fill the parameters with a place in `tensors`, and move the buffers of `modules` to `device`.

    dtype None keeps the file's dtype. Parameters without a tensor (a tied head) stay on the meta device.
    CheckpointError if a shape contradicts the model, or if a value is NaN or infinite.
    """
    for owner in modules:
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(device)
    for conversion in _conversions(tensors):
        for parameter, value in conversion.parameters(model, lambda name: checked(name, read(name))).items():
            owner_name, _, leaf = parameter.rpartition(".")
            _put(model.get_submodule(owner_name), leaf, value, device, dtype)
    for name, placement in tensors.items():
        if placement.conversion is not None:
            continue
        owner_name, _, leaf = placement.parameter.rpartition(".")
        owner = model.get_submodule(owner_name)
        whole = getattr(owner, leaf)
        value = checked(name, read(name))
        expected = placement.view(whole).shape
        if expected != value.shape:
            raise CheckpointError(
                f"{name}: {list(value.shape)} in the file, {list(expected)} in the model of config.json"
            )
        if leaf in owner._parameters and whole.is_meta:
            # a parameter from a single tensor becomes that tensor; one assembled from several is allocated first
            if placement.expert is None:
                _put(owner, leaf, value.mT if placement.swapped else value, device, dtype)
                continue
            whole = _put(owner, leaf, torch.zeros(whole.shape, dtype=dtype or value.dtype), device, dtype)
        placement.view(whole).data.copy_(value)


def fill_all(skeleton: Skeleton, device: str, dtype: torch.dtype) -> Skeleton:
    """`skeleton` with all weights of its model in memory, in `dtype` on `device`."""
    tensors = dict(skeleton.others)
    for block in skeleton.blocks:
        tensors |= block.tensors
    fill(skeleton.model, skeleton.model.modules(), tensors, skeleton.read, device, dtype)
    skeleton.model.tie_weights(recompute_mapping=False)
    return skeleton


def share(model: PreTrainedModel, owners: Mapping[str, nn.Module]) -> None:
    """Give the tied parameters of `owners`, modules by name, the values that they are tied to.

    ProphetNet's decoder has its embeddings from the module around it.
    """
    for target, origin in tied_weights(model).items():
        owner, _, leaf = target.rpartition(".")
        if owner in owners and model.get_parameter(target).is_meta:
            owners[owner]._parameters[leaf] = model.get_parameter(origin)


def _put(owner: nn.Module, leaf: str, value: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    """Set the parameter or buffer `leaf` of `owner` to `value`, and return it."""
    held = value.to(device, dtype or value.dtype).contiguous()
    if leaf in owner._buffers:
        owner._buffers[leaf] = held
    else:
        held = owner._parameters[leaf] = nn.Parameter(held, requires_grad=False)
    return held


def hollow(modules: Iterable[nn.Module], device: str, dtype: torch.dtype) -> None:
    """Fill the parameters of `modules` with expanded zeros without memory, so that a forward pass finds their
    device."""
    for owner in modules:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=dtype, device=device)
                owner._parameters[leaf] = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)


def empty(modules: Iterable[nn.Module]) -> None:
    """Free the memory of the parameters that `modules` own directly."""
    for owner in modules:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
