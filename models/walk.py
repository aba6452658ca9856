"""Running a model block by block: one block in memory at a time, whatever the architecture.

The model's own forward pass is run twice with its blocks stubbed out: once to learn what each block is called with
(hidden states, masks, rotary tables), once to turn the last hidden states into logits. Between the two, each block is
called directly with those arguments. They do not depend on hidden states, only on the batch's shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.models.placement import Placement
from lowbit.models.products import input_rounding, rounded_inputs
from lowbit.models.skeleton import Skeleton, empty, fill, hollow

HEAD_SLICE = 1 << 25  # elements of the head converted at once: 128 MiB in float32


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Walk:
    """A walk through the blocks of `skeleton` on `device` in `dtype`.

    calls  arguments of every block, by the (batch, length) they hold for; filled by `start`
    """

    skeleton: Skeleton
    device: str
    dtype: torch.dtype
    calls: dict[tuple[int, int], list[Call]] = field(default_factory=dict)
    _returns_tuple: bool | None = None

    @torch.no_grad()
    def start(self, batches: list[Tensor]) -> list[Tensor]:
        """The hidden states (B, T, width) that enter the first block, for each batch of token ids (B, T)."""
        self._require_positions(max(batch.shape[1] for batch in batches))
        with self._entrance():
            self._learn_return_type(batches[0])
            return [self._embed(batch.to(self.device)) for batch in batches]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """The output of block `index`, whose module must be loaded, for `hidden` (B, T, width)."""
        return self.run_module(self.skeleton.blocks[index].module, index, hidden)

    def run_module(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The output of `module`, a copy of block `index`, called as that block would be."""
        call = self.calls[hidden.shape[0], hidden.shape[1]][index]
        with self._quantized_inputs(index):
            output = module(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, ids: list[Tensor], hidden: list[Tensor]) -> Iterator[Tensor]:
        """The logits (B, T, vocabulary) for each batch of `ids`, from the last block's output `hidden`."""
        with self.head_loaded():
            for batch, states in zip(ids, hidden, strict=True):
                yield self.logits_of(batch, states)

    def logits_of(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits (B, T, vocabulary) for one batch; the head must be loaded. A tape runs through it to `hidden`."""
        with self._stubs(_constant(self._wrapped(hidden))):
            return self.skeleton.model(input_ids=ids.to(self.device), use_cache=False).logits

    def loaded(self, index: int) -> Any:
        """A context in which block `index` is in memory."""
        block = self.skeleton.blocks[index]
        return self.skeleton.loaded(block.name, block.tensors, self.device, self.dtype)

    def _quantized_inputs(self, index: int) -> Any:
        """A context in which the block computes with int8 inputs where its file says so."""
        rounds = {name: input_rounding(scale) for name, scale in self.skeleton.inputs.items()}
        return rounded_inputs(self.skeleton.blocks[index], self.skeleton.model, rounds)

    def _require_positions(self, length: int) -> None:
        """CheckpointError where the model looks positions up in a table (GPT-2, OPT) that ends before `length`."""
        model = self.skeleton.model
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        learned = any(t.num_embeddings >= limit and t is not model.get_input_embeddings() for t in tables)
        if learned and length > limit:
            raise CheckpointError(
                f"windows of {length} tokens, but {type(model).__name__} has positions for {limit}: pass a shorter "
                "--seqlen or --context, and --eval-windows 0 where the limit is below 512"
            )

    def _embed(self, batch: Tensor) -> Tensor:
        calls: list[Call] = []
        first: list[Tensor] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append(Call(tuple(args[1:]), kwargs))
            if index == 0:
                first.append(hidden)
            if index == len(self.skeleton.blocks) - 1:
                raise _Stop
            return self._wrapped(hidden)

        with self._stubs(record):
            self._run_until_stop(batch)
        self.calls.setdefault((batch.shape[0], batch.shape[1]), calls)
        return first[0]

    def _learn_return_type(self, batch: Tensor) -> None:
        """Blocks return a tensor, or a tuple that begins with it: run the first one to see."""
        if self._returns_tuple is not None:
            return
        block = self.skeleton.blocks[0].module

        def look(module: nn.Module, args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            raise _Stop

        handle = block.register_forward_hook(look)
        try:
            with self.loaded(0):
                self._run_until_stop(batch[:1, :8].to(self.device))
        finally:
            handle.remove()

    def _run_until_stop(self, batch: Tensor) -> None:
        try:
            self.skeleton.model(input_ids=batch, use_cache=False)
        except _Stop:
            return

    def _wrapped(self, hidden: Tensor) -> Any:
        return (hidden, None) if self._returns_tuple else hidden

    @contextmanager
    def _stubs(self, answer: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Blocks answer with `answer(index, args, kwargs)` instead of computing."""
        modules = [block.module for block in self.skeleton.blocks]
        for index, module in enumerate(modules):
            module.forward = lambda *args, _index=index, **kwargs: answer(_index, args, kwargs)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    @contextmanager
    def _entrance(self) -> Iterator[None]:
        """In memory: all of the model but its blocks and its head."""
        with self._filled(self.skeleton.model.get_output_embeddings()):
            yield

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """In memory: all of the model but its blocks and its embeddings, which the stubs make nobody look at.

        The head is often the largest matrix of all: it keeps the file's dtype, and is brought to the walk's a slice at
        a time while it multiplies.
        """
        model = self.skeleton.model
        head, embeddings = _linear_head(model), model.get_input_embeddings()
        head.forward = lambda x: _sliced_linear(x, head)
        embeddings.forward = lambda ids: torch.zeros(
            *ids.shape, embeddings.weight.shape[1], dtype=self.dtype, device=self.device
        )
        try:
            with self._filled(head, embeddings):
                fill(model, [head], self._head_tensors(head), self.skeleton.read, self.device, None)
                yield
        finally:
            empty([head])
            del head.forward, embeddings.forward

    @contextmanager
    def _filled(self, *skipped: nn.Module | None) -> Iterator[None]:
        """In memory: every module but the blocks, the towers and `skipped`."""
        model = self.skeleton.model
        stubs = set(self.skeleton.towers())
        stubs |= {name for name, module in model.named_modules() if any(module is other for other in skipped)}
        outside = stubs | {block.name for block in self.skeleton.blocks}
        head = model.get_output_embeddings()
        hollowed = [module for name, module in model.named_modules() if _within(name, stubs) and module is not head]
        owners = {name: module for name, module in model.named_modules() if not _within(name, outside)}
        tensors = {
            key: place for key, place in self.skeleton.others.items() if place.parameter.rpartition(".")[0] in owners
        }
        try:
            hollow(hollowed, self.device, self.dtype)
            fill(model, owners.values(), tensors, self.skeleton.read, self.device, self.dtype)
            yield
        finally:
            empty([*owners.values(), *hollowed])

    def _head_tensors(self, head: nn.Module) -> dict[str, Placement]:
        """The file's tensors of the head; the embeddings' where it is tied to them."""
        names = {module: name for name, module in self.skeleton.model.named_modules()}
        own, tied = f"{names[head]}.", f"{names[self.skeleton.model.get_input_embeddings()]}.weight"
        found = {key: place for key, place in self.skeleton.others.items() if place.parameter.startswith(own)}
        if any(place.parameter == f"{own}weight" for place in found.values()):
            return found
        return found | {
            key: Placement(f"{own}weight") for key, place in self.skeleton.others.items() if place.parameter == tied
        }


def _linear_head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise CheckpointError(f"{type(model).__name__}: its head is {type(head).__name__}, not a linear layer")
    return head


def _sliced_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """`linear(x)` in the dtype of `x`, the weight converted HEAD_SLICE elements at a time."""
    n, k = linear.weight.shape
    rows = max(HEAD_SLICE // k, 1)
    result = x.new_empty(*x.shape[:-1], n)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        bias = None if linear.bias is None else linear.bias[part].to(x.dtype)
        result[..., part] = torch.nn.functional.linear(x, linear.weight[part].to(x.dtype), bias)
    return result


def _constant(value: Any) -> Callable[[int, tuple[Any, ...], dict[str, Any]], Any]:
    """A stub that always answers `value`."""
    return lambda index, args, kwargs: value


def _within(name: str, outer: set[str]) -> bool:
    """Whether the module `name` is one of `outer` or inside one."""
    return any(name == other or name.startswith(other + ".") for other in outer)
