"""Dry runs of a model's blocks, which show the use of linears before any weight is read.

Every parameter is an expanded zero without memory, and products with the blocks' weights are not computed. Activations
are traced back to the linears that they come from. One block of each kind is run.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from lowbit.ahead import one_thread
from lowbit.errors import CheckpointError, LowbitError
from lowbit.models.cached import attending, file_name
from lowbit.models.products import MULTIPLICATIONS
from lowbit.models.skeleton import Block, LinearSpec, Skeleton, empty, hollow
from lowbit.models.states import States
from lowbit.models.walk import Walk

TOKENS = 8
LOADED = "_is_hf_initialized"  # transformers' flag on loaded tensors, which module setup does not overwrite
# Errors of a family's own code in a dry run. After one, the dry run yields no findings.
FAILURES = (LowbitError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)

CHOICES = {
    *(torch.topk, torch.argmax, torch.argsort, torch.sort, torch.max),
    *(Tensor.topk, Tensor.argmax, Tensor.argsort, Tensor.sort, Tensor.max),
}
MIXTURES = {
    torch.mul,
    Tensor.mul,
    Tensor.__mul__,
    torch.einsum,
    torch.bmm,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
}


@dataclass(frozen=True)
class Origin:
    """A linear that an activation is computed from.

    products  number of products with other activations in between
    weighs    True if one of them was a product with scores, which are such products themselves
    """

    linear: str
    n: int
    products: int = 0
    weighs: bool = False


class Choosers(TorchFunctionMode):
    """Finds linears whose outputs make choices. Computes no product with a weight.

    found  linear -> "router" if a choice is made among its outputs; or its role if it weighs the scores of a choice
    """

    def __init__(self, block: Block, parameter: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._names = {parameter(spec.placement.parameter).data_ptr(): spec for spec in block.linears}
        self._origins: dict[int, frozenset[Origin]] = {}
        self._alive: list[Any] = []  # keeps objects alive, so that addresses and ids are not reused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        spec = next((found for t in tensors if (found := self._names.get(_address(t)))), None)
        if func in MULTIPLICATIONS and spec is not None:
            like = pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            result = torch.zeros(func(*like[0], **like[1]).shape, dtype=tensors[0].dtype)
            origins = frozenset({Origin(spec.name, result.shape[-1])})
        else:
            origins = self._mixed([self._origins.get(id(t), frozenset()) for t in tensors], func in MIXTURES)
            if func in CHOICES and len(tensors) == 1:  # torch.max of two tensors is not a choice
                self._chosen(origins, tensors[0])
            result = func(*args, **kwargs)
        self._remember(result, origins)
        return result

    def _mixed(self, sources: list[frozenset[Origin]], product: bool) -> frozenset[Origin]:
        """The origins of a result of tensors with these origins."""
        every = frozenset[Origin]().union(*sources)
        if not product or sum(map(bool, sources)) < 2:
            return every
        scores = [any(origin.products for origin in source) for source in sources]
        return frozenset(
            replace(origin, products=origin.products + 1, weighs=origin.weighs or (any(scores) and not is_score))
            for source, is_score in zip(sources, scores, strict=True)
            for origin in source
        )

    def _chosen(self, origins: Iterable[Origin], among: Tensor) -> None:
        for origin in origins:
            if origin.weighs:
                self.found[origin.linear] = "weight of an indexer's heads"
            elif not origin.products and origin.n in among.shape:
                self.found[origin.linear] = "router"

    def _remember(self, result: Any, origins: frozenset[Origin]) -> None:
        if origins:
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._origins[id(leaf)] = origins
                    self._alive.append(leaf)


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.ndim >= 2 and tensor.numel() else 0


class _Rehearsal(Walk):
    """A walk without loading any weight."""

    def loaded(self, index: int) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def _entrance(self, seeing: bool) -> Iterator[None]:
        yield


@contextmanager
def rehearsed(skeleton: Skeleton) -> Iterator[tuple[Walk, States]]:
    """A context with a walk through `skeleton` on zeros, and the input states of its first block."""
    modules = list(skeleton.model.modules())
    try:
        hollow(modules, "cpu", torch.float32)
        walk = _Rehearsal(skeleton, "cpu", torch.float32)
        with one_thread():
            (states,) = walk.start([torch.arange(2 * TOKENS).view(2, TOKENS)])
            yield walk, states
    finally:
        empty(modules)


def kinds(skeleton: Skeleton) -> list[tuple[int, list[int]]]:
    """The first block of each kind, with the indices of all blocks of that kind."""
    found: dict[Any, list[int]] = {}
    for index, block in enumerate(skeleton.blocks):
        found.setdefault(block.signature(), []).append(index)
    return [(alike[0], alike) for alike in found.values()]


@torch.no_grad()
def choosers(skeleton: Skeleton) -> dict[str, str]:
    """Linears whose outputs choose experts for a token, or positions for it to attend to, each with its role.

    Empty if the model's code fails in a dry run.
    """
    found: dict[str, str] = {}
    try:
        with rehearsed(skeleton) as (walk, states):
            for first, alike in kinds(skeleton):
                block, mode = skeleton.blocks[first], _mode(skeleton, first)
                with mode:
                    states = walk.run(first, states)
                for index in alike:
                    names = block.names_in(skeleton.blocks[index])
                    found |= {names[linear]: role for linear, role in mode.found.items()}
    except FAILURES:
        return {}
    return found


@torch.no_grad()
def reader_of_weights(skeleton: Skeleton, quantized: Container[str]) -> str | None:
    """The class of a block, or of the model around it, whose code reads the weight of one of the `quantized` linears
    directly, or None.

    Such code fails with packed weights. None also if the model's code fails in a dry run.
    """
    try:
        with rehearsed(skeleton) as (walk, states):
            for first, _ in kinds(skeleton):
                block = skeleton.blocks[first]
                with _mode(skeleton, first):
                    with _packed(skeleton.model, [spec for spec in block.linears if spec.name in quantized]):
                        reads = _reads_weights(skeleton.model, block.module, partial(walk.run, first, states))
                    if reads:
                        return type(block.module).__name__
                    states = walk.run(first, states)
    except FAILURES:
        pass
    return type(skeleton.model).__name__ if _fails_around_blocks(skeleton, quantized) else None


def _fails_around_blocks(skeleton: Skeleton, quantized: Container[str]) -> bool:
    """True if the model's code fails because a weight is missing: RWKV's divides weights before its first block."""
    specs = [spec for block in skeleton.blocks for spec in block.linears if spec.name in quantized]
    try:
        with _packed(skeleton.model, specs), rehearsed(skeleton):
            return False
    except FAILURES as error:
        return _is_missing_weight(error)


def _is_missing_weight(error: Exception) -> bool:
    return isinstance(error, AttributeError) and "no attribute 'weight'" in str(error)


def find_attentions(skeleton: Skeleton) -> dict[str, str]:
    """The modules that store keys and values, found by running each kind of block on zeros, with the file's names.

    CheckpointError if none is found, or if one stores a latent vector in place of keys and values.
    """
    found: list[str] = []
    names = {module: name for name, module in skeleton.model.named_modules()}
    try:
        with rehearsed(skeleton) as (walk, states):
            for first, alike in kinds(skeleton):
                seen: list[nn.Module] = []
                with attending(partial(_seen, seen)):
                    states = walk.run(first, states)
                inside = [names[module].removeprefix(skeleton.blocks[first].name) for module in dict.fromkeys(seen)]
                found += [f"{skeleton.blocks[index].name}{name}" for index in alike for name in inside]
    except FAILURES as error:
        raise CheckpointError(f"{skeleton.source.directory}: its attention cannot be watched ({error})") from error
    latent = [name for name in found if hasattr(skeleton.model.get_submodule(name), "kv_lora_rank")]
    if latent or not found:
        reason = (
            f"{latent[0]} caches a latent vector, from which engines compute keys and values"
            if latent
            else "transformers' table of attention functions runs none of its attention"
        )
        raise CheckpointError(f"{skeleton.source.directory}: {reason}; leave out --kv-cache")
    return {name: file_name(skeleton, name) for name in found}


def _seen(
    modules: list[nn.Module], module: nn.Module, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    modules.append(module)
    return key, value


def _mode(skeleton: Skeleton, index: int) -> Choosers:
    return Choosers(skeleton.blocks[index], skeleton.model.get_parameter)


def _reads_weights(model: PreTrainedModel, block: nn.Module, run: Callable[[], States]) -> bool:
    """True if the block's setup or run fails because a weight is missing."""
    for tensor in (*block.parameters(), *block.buffers()):
        setattr(tensor, LOADED, True)
    try:
        for module in block.modules():
            packed = isinstance(module, nn.Linear) and "weight" not in module._parameters
            if packed or next(module.children(), None) is not None:
                model._init_weights(module)
        run()
    except AttributeError as error:
        return _is_missing_weight(error)
    return False


@contextmanager
def _packed(model: PreTrainedModel, specs: Iterable[LinearSpec]) -> Iterator[None]:
    """A context in which the modules of `specs` have no weight, as after loading packed weights."""
    weights: dict[nn.Module, nn.Parameter | None] = {}
    model.config._is_quantized = True  # set as transformers does, for code that checks it
    for spec in specs:
        module = model.get_submodule(spec.placement.parameter.rpartition(".")[0])
        if spec.placement.expert is None and not spec.transposed:
            weights[module] = module._parameters.pop("weight")
            if type(module).forward is nn.Linear.forward:
                module.forward = partial(_zeros, spec.n)
    try:
        yield
    finally:
        del model.config._is_quantized
        for module, weight in weights.items():
            module.__dict__.pop("forward", None)
            module._parameters = {"weight": weight} | module._parameters


def _zeros(n: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], n)
