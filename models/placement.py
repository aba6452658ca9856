"""Placement of a file's tensors inside a model: renamed, stacked, fused or converted during loading."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import dot_natural_key, rename_source_key
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from lowbit.export.format import TensorReader
from lowbit.quant.naming import EXPERT

Shapes = Mapping[str, tuple[int, ...]]

# The name of a single expert's tensor, as engines use it; in the model it is a slice of a stack.
EXPERT_TENSOR = re.compile(r"(?P<home>.+)\.experts\.(?P<expert>\d+)\.(?P<role>\w+)\.(?P<leaf>weight|bias)")
JOINED, HALVES = "gate_up_proj", ("gate_proj", "up_proj")


@dataclass(frozen=True, eq=False)
class Conversion:
    """Parameters that transformers computes from tensors of the file by an operation that is not inverted here.

    converter  transformers' converter
    target     the first of the parameters, which is the conversion's name in transformers
    sources    the file's tensors, each with the matching pattern of `converter`
    """

    converter: Any
    target: str
    sources: list[tuple[str, str]] = field(default_factory=list)

    @property
    def of_weights(self) -> bool:
        """True if all sources are weights.

        If any weight is packed, transformers 5.23 expects a packed one for each, and loses the others.
        """
        return all(source.endswith(".weight") for source in self.converter.source_patterns)

    def parameters(self, model: PreTrainedModel, read: TensorReader) -> dict[str, Tensor]:
        """The parameters by name, computed from the tensors that `read` returns."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in sorted(self.sources, key=lambda source: dot_natural_key(source[0])):
            converter.add_tensor(self.target, name, pattern, lambda name=name: read(name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Placement:
    """The place of a file's tensor inside the model: a whole parameter, or a part of a fused one.

    parameter   the parameter's (or buffer's) name in the model
    expert      index in the first dimension, for experts stacked in one 3-dimensional parameter
    part        index among `parts` equal slices of dimension `axis` of the rest (gate and up share one parameter)
    swapped     True if the file has the last two dimensions exchanged
    conversion  computes the parameter from the file's tensor, if the tensor is not a view of it
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    axis: int = 0
    swapped: bool = False
    conversion: Conversion | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """The slice of `parameter` that holds the file's tensor."""
        inner = parameter if self.expert is None else parameter[self.expert]
        inner = inner.mT if self.swapped else inner
        return inner.chunk(self.parts, self.axis)[self.part] if self.parts > 1 else inner


def place(model: PreTrainedModel, names: list[str], shapes: Shapes | None = None) -> dict[str, Placement]:
    """The placement of each of a file's tensors. Names without a place in the model are left out.

    Applies transformers' renamings, its two fusions of experts (stacking, and concatenation of gate and up) and its
    transpositions. Single experts are also found in stacks for which transformers knows no single names.

    shapes  of the file's tensors: some are transposed only if their shape requires it
    """
    renamings, converters = _transforms(model)
    state = dict(model.state_dict(keep_vars=True))
    conversions: dict[str, Conversion] = {}

    def renamed(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        # as in transformers: a renaming without a target in the model does not apply to a name that the model has
        return (name, None) if target not in state and name in state else (target, pattern)

    def placed(name: str) -> Placement | None:
        target, pattern = renamed(name)
        if target not in state:
            return _in_stack(model, name, lambda stack: renamed(stack)[0])
        converter = next((c for c in converters if pattern in c.source_patterns), None) if pattern else None
        if converter is None:
            return Placement(target)
        if _stacks(converter):
            expert = int(re.findall(r"\.(\d+)\.", name)[-1])
            return Placement(target, expert, converter.source_patterns.index(pattern), len(converter.source_patterns))
        if _swaps(converter):
            fits = shapes is not None and tuple(state[target].shape) == shapes[name]
            return Placement(target, swapped=not (fits and converter.operations[0].check_dims))
        conversion = conversions.setdefault(target, Conversion(converter, target))
        conversion.sources.append((name, str(pattern)))
        return Placement(target, conversion=conversion)

    return {name: placement for name in names if (placement := placed(name)) is not None}


def tensor_of(model: nn.Module, placement: Placement) -> Tensor:
    """The whole parameter or buffer of `placement`."""
    owner, _, leaf = placement.parameter.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _transforms(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' renamings for this model, and its conversions of several tensors into one."""
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if hasattr(transform, "operations")]
    return [transform for transform in transforms if transform not in converters], converters


def _operations(converter: Any) -> list[str]:
    return [type(operation).__name__ for operation in converter.operations]


def _stacks(converter: Any) -> bool:
    """True if a conversion stacks experts, each from one source or from two concatenated ones."""
    return _operations(converter) in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def _swaps(converter: Any) -> bool:
    """True if a conversion only exchanges a tensor's last two dimensions."""
    return _operations(converter) == ["Transpose"] and len(converter.target_patterns) == 1


def experts_in(model: PreTrainedModel, name: str, placement: Placement) -> dict[str, Placement]:
    """The slices of a stack of experts (one tensor `name` in the file), by the names of single experts.

    The names come from transformers' own mapping of single experts to the stack, inverted, if loading by these names
    gives the same slices; otherwise they are vLLM's names. Empty if the tensor is not such a stack.
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
    home = name.removesuffix(".weight").rpartition(".")[0].removesuffix(".experts")
    return {
        f"{home}.experts.{expert}.{role}.weight": slice_of
        for expert in range(count)
        for role, slice_of in _slices(model, placement.parameter, expert)
    }


def stacked_only(model: PreTrainedModel, experts: Mapping[str, Placement]) -> bool:
    """True if transformers cannot load single experts by their names in the file, but only stacks of them.

    Classes that its quantizers split themselves (Llama 4's) can load single experts.
    """
    renamings, converters = _transforms(model)
    state = model.state_dict(keep_vars=True)

    def lost(name: str, placement: Placement) -> bool:
        owner = model.get_submodule(placement.parameter.rpartition(".")[0])
        target = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, state)[0]
        return target not in state and type(owner).__name__ not in MODULES_TO_PATCH_FOR_QUANTIZATION

    return any(lost(name, placement) for name, placement in islice(experts.items(), 1))


def _slices(model: nn.Module, parameter: str, expert: int) -> Iterator[tuple[str, Placement]]:
    """Names and placements of the linears of one expert in a stack; none if `parameter` is not a stack of experts."""
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    stack = owner._parameters.get(leaf)
    axis = None if stack is None else _output_axis(owner, leaf, stack)
    if axis is None:
        return
    if leaf == JOINED and getattr(owner, "is_concatenated", True):
        for part, role in enumerate(HALVES):
            yield role, Placement(parameter, expert, part, len(HALVES), axis)
    else:
        yield owner_name.rpartition(".")[2] if leaf == "weight" else leaf, Placement(parameter, expert, axis=axis)


def _output_axis(owner: nn.Module, leaf: str, stack: Tensor) -> int | None:
    """The output dimension of the matrices in a stack of experts; None if it is not one, or if that is unclear."""
    if stack.ndim != 3 or getattr(owner, "num_experts", None) != stack.shape[0]:
        return None
    if hasattr(owner, "is_transposed"):
        return 1 if owner.is_transposed else 0
    if leaf == "weight":
        return 0
    hidden = getattr(owner, "hidden_size", getattr(owner, "hidden_dim", None))
    inputs = [dimension for dimension in (1, 2) if (stack.shape[dimension] == hidden) != leaf.startswith("down")]
    return 2 - inputs[0] if len(inputs) == 1 else None


def stacked_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Engines' names for the linears in a file's tensor that the model lacks: its own, or experts in a stack."""
    linear = name.removesuffix(".weight")
    home, _, leaf = linear.rpartition(".")
    if len(shape) != 3 or not home.endswith(".experts"):
        return [linear]
    return [f"{home}.{expert}.{role}" for expert in range(shape[0]) for role in (HALVES if leaf == JOINED else (leaf,))]


def engine_names(linears: Iterable[str]) -> list[str]:
    """Names of linears as engines look them up.

    vLLM asks for an expert's gate and up by themselves, also if they share a matrix (gpt-oss, rows by turns).
    """
    named = []
    for linear in linears:
        named.append(linear)
        home, _, leaf = linear.rpartition(".")
        if leaf == JOINED and EXPERT.search(linear):
            named += [f"{home}.{half}" for half in HALVES]
    return named


def _in_stack(model: nn.Module, name: str, renamed: Callable[[str], str]) -> Placement | None:
    """The placement of one expert's weight or bias in a stack without single names in transformers, or None."""
    found = EXPERT_TENSOR.fullmatch(name)
    if found is None:
        return None
    home, expert, role = found["home"], int(found["expert"]), found["role"]
    leaf = JOINED if role in HALVES else role
    for stack in (f"{home}.experts.{leaf}", f"{home}.experts.{leaf}.weight", f"{home}.{leaf}.weight"):
        owner, _, parameter = renamed(stack).rpartition(".")
        if parameter in getattr(_submodule(model, owner), "_parameters", {}):
            weight = dict(_slices(model, f"{owner}.{parameter}", expert)).get(role)
            if weight is not None:
                return weight if found["leaf"] == "weight" else bias_of(model, weight)
    return None


def bias_of(model: nn.Module, weight: Placement) -> Placement | None:
    """The placement of the bias that belongs to the weight at `weight`; None without a bias."""
    stacked = weight.expert is not None
    name = f"{weight.parameter}_bias" if stacked else weight.parameter.removesuffix("weight") + "bias"
    owner, _, leaf = name.rpartition(".")
    if getattr(_submodule(model, owner), "_parameters", {}).get(leaf) is None:
        return None
    return Placement(name, weight.expert, weight.part, weight.parts) if stacked else Placement(name)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
