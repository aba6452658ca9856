"""A model without its weights, and the map from its file's tensors to the places where they belong."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.pytorch_utils import Conv1D

from lowbit.errors import CheckpointError
from lowbit.export.formats import LogicalTensors
from lowbit.models.source import Source
from lowbit.quant.scheme import Activations

Reader = Callable[[str], Tensor]

CHECK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Placement:
    """Where a file's tensor lies inside the model: all of a parameter, or a part of a fused one.

    parameter  the parameter's (or buffer's) name in the model
    expert     index in its first dimension, for experts that transformers fuses into one 3-dimensional parameter
    part       which of `parts` equal slices of the next dimension (gate and up share one parameter)
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def view(self, parameter: Tensor) -> Tensor:
        """The slice of `parameter` that the file's tensor fills."""
        inner = parameter if self.expert is None else parameter[self.expert]
        return inner.chunk(self.parts)[self.part]


@dataclass(frozen=True)
class LinearSpec:
    """A linear of a block, known from headers alone.

    name         as in the file, without ".weight"
    placement    where its weight lies in the model
    bias         the model's name of its bias, or None
    transposed   stored (k, n), as transformers' Conv1D does
    n, k         outputs and inputs
    """

    name: str
    placement: Placement
    bias: str | None
    transposed: bool
    n: int
    k: int


@dataclass
class Block:
    """One decoder block: its place in the model, the file's tensors that fill it, and its linears."""

    name: str
    module: nn.Module
    tensors: dict[str, Placement] = field(default_factory=dict)
    linears: list[LinearSpec] = field(default_factory=list)

    def signature(self) -> tuple[Any, ...]:
        """What two blocks have in common where one's structure is the other's."""
        shapes = tuple((name, tuple(p.shape)) for name, p in self.module.named_parameters())
        kinds = tuple((name, type(module).__name__) for name, module in self.module.named_modules())
        return shapes, kinds, getattr(self.module, "attention_type", None)

    def names_in(self, other: "Block") -> dict[str, str]:
        """For each linear and module of this block, what the same one is called in `other`, a block alike."""

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
    read     tensor of the file by its logical name
    inputs   linears whose inputs the file has quantized: the one scale of all tokens, or None for a scale per token
    """

    source: Source
    model: PreTrainedModel
    blocks: list[Block]
    others: dict[str, Placement]
    read: Reader
    inputs: dict[str, Tensor | None] = field(default_factory=dict)

    @contextmanager
    def loaded(
        self, module_name: str, tensors: dict[str, Placement], device: str, dtype: torch.dtype
    ) -> Iterator[nn.Module]:
        """The module `module_name` filled from the file for as long as the block lasts."""
        module = self.model.get_submodule(module_name)
        try:
            fill(self.model, module.modules(), tensors, self.read, device, dtype)
            yield module
        finally:
            empty(module.modules())


def open_skeleton(source: Source) -> Skeleton:
    """The skeleton of `source`, every tensor of its files placed; packed weights are dequantized as they are read.

    Raises CheckpointError where the model has no blocks, or where the file lacks or contradicts a parameter.
    """
    model = _empty_model(source)
    tensors = LogicalTensors(source.checkpoint)
    placements = place(model, tensors.names)
    blocks = [Block(name, module) for name, module in find_blocks(model)]
    others: dict[str, Placement] = {}
    for name, placement in placements.items():
        owner = next((block for block in blocks if placement.parameter.startswith(block.name + ".")), None)
        (others if owner is None else owner.tensors)[name] = placement
    for block in blocks:
        block.linears = list(_linears(model, block))
    _require_parameters(source, model, placements)
    dense = {name: at for name, at in placements.items() if name.removesuffix(".weight") not in tensors.schemes}
    _require_shapes(source, model, dense)
    # a packed weight is (n, k) whatever the module's own habit
    turned = {f"{spec.name}.weight" for block in blocks for spec in block.linears if spec.transposed}
    turned &= {f"{name}.weight" for name in tensors.schemes}

    def read(name: str) -> Tensor:
        return tensors.read(name).T if name in turned else tensors.read(name)

    return Skeleton(source, model, blocks, others, read, _quantized_inputs(tensors))


def _quantized_inputs(tensors: LogicalTensors) -> dict[str, Tensor | None]:
    return {
        name: tensors.qtensor(name).input_scale if scheme.activations is Activations.TENSOR else None
        for name, scheme in tensors.schemes.items()
        if scheme.activations is not None
    }


def _empty_model(source: Source) -> PreTrainedModel:
    config = source.config
    config._experts_implementation = "eager"  # one F.linear an expert: what calibration can see
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=source.trust_remote_code, dtype=torch.float32
        )
    return model.eval()


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the decoder blocks: the outermost ModuleList that holds the most parameters."""
    best: tuple[int, list[tuple[str, nn.Module]]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = size, [(f"{name}.{i}", child) for i, child in enumerate(module)]
    if not best[1]:
        raise CheckpointError(f"{type(model).__name__}: no list of decoder blocks found in it")
    return best[1]


def place(model: PreTrainedModel, names: list[str]) -> dict[str, Placement]:
    """The placement of each of a file's tensors; names the model has no use for are left out.

    transformers' own renamings are applied, and its two fusions of experts (stacking, and joining gate with up).
    """
    renamings, converters = _transforms(model)
    state = dict(model.state_dict(keep_vars=True))
    placements = {}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        converter = next((c for c in converters if pattern in c.source_patterns), None) if pattern else None
        if renamed in state:
            placements[name] = Placement(renamed) if converter is None else _fused(name, renamed, pattern, converter)
    return placements


def tensor_of(model: nn.Module, placement: Placement) -> Tensor:
    """The whole parameter or buffer that `placement` lies in."""
    owner, _, leaf = placement.parameter.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _transforms(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' renamings for this model, and its conversions of several tensors into one."""
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if hasattr(transform, "operations")]
    return [transform for transform in transforms if transform not in converters], converters


def _stacks(converter: Any) -> bool:
    """Whether a conversion stacks experts, one source each, or two that are joined first."""
    operations = [type(operation).__name__ for operation in converter.operations]
    return operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def _fused(name: str, renamed: str, pattern: str | None, converter: Any) -> Placement:
    numbers = re.findall(r"\.(\d+)\.", name)
    if not _stacks(converter) or not numbers:
        operations = " + ".join(type(operation).__name__ for operation in converter.operations)
        raise CheckpointError(
            f"{name}: transformers builds {renamed} from it by {operations}, which cannot be undone here"
        )
    return Placement(
        renamed, int(numbers[-1]), converter.source_patterns.index(pattern), len(converter.source_patterns)
    )


def experts_in(model: PreTrainedModel, name: str, placement: Placement) -> dict[str, Placement]:
    """The slices of a stack of experts that the file holds as one tensor `name`, by the names experts have alone.

    transformers' own mapping from single experts to the stack, read backwards, and believed where reading the names
    forwards leads to the same slices. Empty where the tensor is no such stack.
    """
    count = tensor_of(model, placement).shape[0]
    for converter in _transforms(model)[1]:
        target, sources = converter.target_patterns[0], converter.source_patterns
        if _stacks(converter) and name.endswith(target):
            slices = {
                name.removesuffix(target) + source.replace("*", str(expert)): Placement(
                    placement.parameter, expert, part, len(sources)
                )
                for expert in range(count)
                for part, source in enumerate(sources)
            }
            if place(model, list(slices)) == slices:
                return slices
    return {}


def _linears(model: PreTrainedModel, block: Block) -> Iterator[LinearSpec]:
    """The block's weights that multiply activations: of Linear and Conv1D modules, and of experts one by one."""
    for name, placement in _single(model, block.tensors):
        parameter = model.get_parameter(placement.parameter) if _is_parameter(model, placement.parameter) else None
        if parameter is None or (not name.endswith("weight") and parameter.ndim != 3):
            continue
        owner = model.get_submodule(placement.parameter.rpartition(".")[0])
        shape = tuple(placement.view(parameter).shape)
        if len(shape) != 2 or not (isinstance(owner, nn.Linear | Conv1D) or _multiplies(owner, placement)):
            continue
        transposed = isinstance(owner, Conv1D)
        bias = placement.parameter.removesuffix("weight") + "bias"
        n, k = reversed(shape) if transposed else shape
        has_bias = getattr(owner, "bias", None) is not None and placement.expert is None
        yield LinearSpec(name.removesuffix(".weight"), placement, bias if has_bias else None, transposed, n, k)


def _single(model: PreTrainedModel, tensors: dict[str, Placement]) -> Iterator[tuple[str, Placement]]:
    """`tensors`, stacks of experts taken apart."""
    for name, placement in tensors.items():
        stacked = placement.expert is None and tensor_of(model, placement).ndim == 3
        experts = experts_in(model, name, placement) if stacked else {}
        yield from (experts or {name: placement}).items()


def _multiplies(owner: nn.Module, placement: Placement) -> bool:
    """Experts' slices and bare 2-dimensional weights (routers) multiply too; embeddings are looked up."""
    return placement.expert is not None or not isinstance(owner, nn.Embedding | nn.Conv1d)


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(owner)._parameters


def _require_parameters(source: Source, model: PreTrainedModel, placements: dict[str, Placement]) -> None:
    placed = {placement.parameter for placement in placements.values()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or [])
    if not getattr(source.config.get_text_config(), "tie_word_embeddings", False):
        tied = set()
    missing = [name for name, _ in model.named_parameters() if name not in placed and name not in tied]
    if missing:
        raise CheckpointError(
            f"{source.directory}: {len(missing)} weights that {type(model).__name__} needs are in no file, "
            f"the first {missing[0]!r}: the download is incomplete, or config.json belongs to another model"
        )


def _require_shapes(source: Source, model: PreTrainedModel, placements: dict[str, Placement]) -> None:
    """Raise CheckpointError where a tensor's shape in its header contradicts config.json."""
    for name, placement in placements.items():
        entry = source.checkpoint.entries.get(name)
        wanted = tuple(placement.view(tensor_of(model, placement)).shape)
        if entry is not None and entry.shape != wanted:
            raise CheckpointError(
                f"{name}: {list(entry.shape)} in the file, {list(wanted)} in the model of config.json"
            )


def fill(
    model: nn.Module,
    modules: Iterable[nn.Module],
    tensors: dict[str, Placement],
    read: Reader,
    device: str,
    dtype: torch.dtype | None,
) -> None:
    """Give the parameters that `tensors` fill memory and their values, and move the buffers of `modules` to `device`.

    dtype None keeps the file's. Parameters without a tensor of their own (a tied head) stay on the meta device. Raises
    CheckpointError where a shape contradicts the model, or where a value is NaN or infinite.
    """
    for owner in modules:
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(device)
    for name, placement in tensors.items():
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
            # a parameter that one tensor fills is that tensor; one put together from several is allocated first
            alone = placement.expert is None
            kind = dtype or value.dtype
            filled = value.to(device, kind) if alone else torch.zeros(whole.shape, dtype=kind, device=device)
            whole = owner._parameters[leaf] = nn.Parameter(filled.contiguous(), requires_grad=False)
            if alone:
                continue
        placement.view(whole).data.copy_(value)


def checked(name: str, value: Tensor) -> Tensor:
    """`value`, which must be finite. CheckpointError names the tensor and counts what is not."""
    broken = count_broken(value)
    if broken:
        raise CheckpointError(
            f"{name}: {broken} of {value.numel()} values are NaN or infinite; the weights are damaged"
        )
    return value


def count_broken(value: Tensor) -> int:
    """How many values are NaN or infinite; counted in pieces, for the largest tensors barely fit once."""
    if not value.is_floating_point():
        return 0
    return sum(int((~torch.isfinite(part)).sum()) for part in value.flatten().split(CHECK_ELEMENTS))


def empty(modules: Iterable[nn.Module]) -> None:
    """Give back the memory of the parameters that `modules` own outright."""
    for owner in modules:
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
