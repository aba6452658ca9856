"""Block-by-block execution of a model of any architecture, with one block in memory at a time.

The model's own forward pass runs twice with stubbed blocks: once to record the arguments of each block (hidden states,
masks, rotary tables), once to turn the last hidden states into logits. In between, each block is called directly with
those arguments (models/states.py describes their kinds).
Samples with images pass the towers before the first block, in the walk's dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError
from lowbit.export.untrusted import untrusted
from lowbit.models.cached import rounded_cache
from lowbit.models.imagetext import Batch, ImageText, ids_of, words_of
from lowbit.models.placement import Placement
from lowbit.models.products import rounded_inputs
from lowbit.models.skeleton import Skeleton, empty, fill, hollow, share
from lowbit.models.states import ADDED, Call, Recording, States, Wiring, alike, wiring_alone, wiring_of

HEAD_SLICE = 1 << 25  # elements of the head converted at a time: 128 MiB in float32
NOT_BY_BLOCKS = (
    "it cannot be run block by block. Methods without calibration take it (int8, rtn), with --eval-windows 0"
)
LOOK_TOKENS = 8  # tokens per sequence for learning the wiring of blocks


class _Stop(Exception):
    """Stops a forward pass early."""


@dataclass(frozen=True)
class _Route:
    """The calls of all blocks, and their wiring, for batches of one shape or one sample with images."""

    calls: list[Call]
    wiring: Wiring


@dataclass
class Walk:
    """A walk through the blocks of `skeleton` on `device` in `dtype`."""

    skeleton: Skeleton
    device: str
    dtype: torch.dtype
    _routes: dict[tuple[tuple[int, int], str], _Route] = field(default_factory=dict)  # by shape and label
    _returned: int | None = None
    _sees: bool = False  # True after the check that samples with images can run block by block
    _wiring: Wiring | None = None

    @property
    def wiring(self) -> Wiring:
        """The connections between blocks, known after `start`."""
        assert self._wiring is not None, "a walk starts before its blocks run"
        return self._wiring

    @torch.no_grad()
    def start(self, batches: Sequence[Batch]) -> list[States]:
        """The input states of the first block, for each batch."""
        self._require_positions(max(ids_of(batch).shape[1] for batch in batches))
        texts = [batch for batch in batches if not isinstance(batch, ImageText)]
        seeing = len(texts) < len(batches)
        with self._entrance(seeing):
            self._learn(words_of(batches[0]).to(self.device), ids_of(batches[0]).shape[1])
            if seeing and texts:  # a text may be left alone between samples with images (`batched`)
                self._embed(texts[0][:1].to(self.device))
            return [
                self._see(batch) if isinstance(batch, ImageText) else self._embed(batch.to(self.device))
                for batch in batches
            ]

    @torch.no_grad()
    def start_some(self, batches: Iterator[Tensor], nbytes: int) -> list[tuple[Tensor, States]]:
        """The next batches of token ids with their input states of the first block; empty at the end.

        nbytes  stop after a batch if the states then hold more than this minus those of a batch
        """
        begun: list[tuple[Tensor, States]] = []
        ids, held = next(batches, None), 0
        if ids is None:  # nothing to load the embeddings for
            return begun
        with self._entrance(seeing=False):
            while ids is not None:
                self._require_positions(ids.shape[1])
                self._learn(ids.flatten().to(self.device), ids.shape[1])
                begun.append((ids, self._embed(ids.to(self.device))))
                last = begun[-1][1].nbytes
                held += last
                ids = next(batches, None) if held + last <= nbytes else None
        return begun

    def run(self, index: int, states: States) -> States:
        """The output states of block `index`, whose module must be loaded."""
        return self.run_module(self.skeleton.blocks[index].module, index, states)

    def run_module(self, module: nn.Module, index: int, states: States) -> States:
        """The output states of `module`, a copy of block `index` that is called like that block."""
        route = self._routes[states.shape, states.label]
        wiring, call = route.wiring, route.calls[index]
        leaves, stores = wiring.entering(index, call, states)
        args, kwargs = call.arguments(leaves)
        with self._as_stored(index):
            output = module(states.hidden.movedim(0, wiring.rows), *args, **kwargs)
        return wiring.leaving(index, output, stores, states)

    @torch.no_grad()
    def logits(self, batches: Sequence[Batch], left: list[States]) -> Iterator[Tensor]:
        """The logits (B, T, vocabulary) for each batch, from the last block's output states `left`."""
        with self.head_loaded():
            for batch, states in zip(batches, left, strict=True):
                yield self.logits_of(batch, states.hidden)

    def logits_of(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The logits (B, T, vocabulary) of one batch, differentiable with respect to `hidden`, which may be in host
        memory. The head must be loaded."""
        answer = self._wrapped(hidden.to(self.device).movedim(0, self.wiring.rows))
        with self._stubs(lambda index, args, kwargs: answer):
            return self.skeleton.model(input_ids=ids_of(batch).to(self.device), use_cache=False).logits

    @torch.no_grad()
    def head_inputs(self, batches: Sequence[Batch], left: list[States]) -> Iterator[Tensor]:
        """The head's inputs (B, T, width) for each batch, from the last block's output states `left`."""
        head, embeddings = _linear_head(self.skeleton.model), self.skeleton.model.get_input_embeddings()
        entering: list[Tensor] = []

        def stop(module: nn.Module, args: Any) -> None:
            entering.append(args[0])
            raise _Stop

        handle = head.register_forward_pre_hook(stop)
        try:
            with self._filled(head, embeddings):
                for batch, states in zip(batches, left, strict=True):
                    with suppress(_Stop):
                        self.logits_of(batch, states.hidden)
                    yield entering.pop()
        finally:
            handle.remove()

    def loaded(self, index: int) -> Any:
        """A context with block `index` in memory."""
        block = self.skeleton.blocks[index]
        return self.skeleton.loaded(block.name, block.tensors, self.device, self.dtype)

    @contextmanager
    def _as_stored(self, index: int) -> Iterator[None]:
        """A context in which the block rounds its linears' inputs, and its keys and values, if its file says so."""
        block, model = self.skeleton.blocks[index], self.skeleton.model
        with rounded_inputs(block, model, self.skeleton.inputs), rounded_cache(self.skeleton, self.skeleton.cache):
            yield

    def _require_positions(self, length: int) -> None:
        """CheckpointError if the model has a table of positions (GPT-2, OPT) shorter than `length`."""
        model = self.skeleton.model
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        learned = any(t.num_embeddings >= limit and t is not model.get_input_embeddings() for t in tables)
        if learned and length > limit:
            raise CheckpointError(
                f"windows of {length} tokens, but {type(model).__name__} has positions for {limit}: pass a shorter "
                "--seqlen or --context, and --eval-windows 0 where the limit is below 512"
            )

    def _embed(self, batch: Tensor) -> States:
        recording = self._record(batch)
        shape = batch.shape[0], batch.shape[1]
        calls = self.wiring.template(recording)
        self._require_alike(self._routes.setdefault((shape, ""), _Route(calls, self.wiring)).calls, calls)
        return self.wiring.states(recording, shape)

    def _see(self, sample: ImageText) -> States:
        """The input states of the first block for a sample with images, and the additions between blocks."""
        name = type(self.skeleton.model).__name__
        with untrusted(name, "cannot take a sample with images as its processor makes it"):
            recording = self._record(sample, level=0.0)
            if not self._sees:
                self._require_added(sample, recording)
        wiring = wiring_alone(recording, self.wiring.rows)
        length = sample.ids.shape[1]
        self._routes[(1, length), sample.sha256] = _Route(recording.calls, wiring)
        added = {
            (index, ADDED): entered.movedim(wiring.rows, 0)
            for index, entered in enumerate(recording.entered[1:])
            if bool(entered.any())
        }
        return States(recording.hidden.movedim(wiring.rows, 0), (1, length), added, label=sample.sha256)

    def _require_added(self, sample: ImageText, zeros: Recording) -> None:
        """CheckpointError if a block's input is not the output of the block before plus a constant, or if the head's
        input depends on the images directly.

        zeros  the recording of `sample` with stubs that return 0
        """
        ones = self._record(sample, level=1.0)
        for index, pair in enumerate(zip(zeros.entered, ones.entered, strict=True)):
            if index and not torch.allclose(pair[0] + 1.0, pair[1], rtol=1e-2, atol=1e-2):
                raise self._not_by_blocks(index)
        seen, read = (self._before_head(batch, change=0.0)[1][0] for batch in (sample, sample.ids.to(self.device)))
        if not torch.allclose(seen, read, equal_nan=True):
            raise self._not_by_blocks(None)
        self._sees = True

    def _not_by_blocks(self, index: int | None) -> CheckpointError:
        """The error for block `index`, or the head if None, with other inputs than the last block's output."""
        name = type(self.skeleton.model).__name__
        if index is None:
            how = "makes its head's input of more than what its last block returns"
        else:
            how = f"computes with the outputs of its blocks before it calls {self.skeleton.blocks[index].name}"
        return CheckpointError(f"{name} {how}: {NOT_BY_BLOCKS}")

    def _record(self, batch: Batch, change: float = 0.0, level: float | None = None) -> Recording:
        """The calls of all blocks for a batch. Stubs add `change` to hidden states, or return `level` everywhere."""
        calls: list[Call] = []
        entered: list[Tensor] = []
        handed: list[tuple[Tensor, ...]] = []
        flat: dict[str, Tensor] = {}

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append(Call.of(tuple(args[1:]), kwargs))
            entered.append(hidden)
            if index == len(self.skeleton.blocks) - 1:
                raise _Stop
            # unique tensors: if one turns up among a later block's arguments, the model passes it on
            handed.append(tuple(hidden.new_empty(0) for _ in range((self._returned or 1) - 1)))
            if level is not None:  # one tensor for all blocks: there may be a hundred
                hidden = flat.setdefault("", torch.full_like(hidden, level))
            return self._wrapped(hidden + change if change else hidden, handed[-1])

        with self._stubs(record):
            self._run_until_stop(batch)
        return Recording(entered, calls, handed)

    def _require_alike(self, known: list[Call], calls: list[Call]) -> None:
        """CheckpointError if a batch calls blocks with other arguments than an earlier one of the same shape."""
        compared: dict[tuple[int, int], bool] = {}
        for index, (one, other) in enumerate(zip(known, calls, strict=True)):
            for pair in zip(one.leaves, other.leaves, strict=True):
                key = id(pair[0]), id(pair[1])
                if key not in compared:
                    compared[key] = alike(*pair)
                if not compared[key]:
                    raise CheckpointError(
                        f"{self.skeleton.blocks[index].name} is called with an argument that changes with every  "
                        "batch, but did not on a few tokens: the model cannot be run block by block"
                    )

    def _learn(self, words: Tensor, length: int) -> None:
        """Learn the return values of blocks, and their wiring, on tokens of `words`, at most `length` per sequence."""
        if self._wiring is not None:
            return
        length = min(LOOK_TOKENS, length)
        tokens = words[torch.arange(3 * length, device=words.device) % words.numel()].view(3, length)
        self._returned = self._count_returned(tokens[:1])
        head = self._require_one_run_each(tokens[:2])
        vocabulary = self.skeleton.model.get_input_embeddings().weight.shape[0]
        others = (tokens + 1) % vocabulary
        plain = self._record(tokens[:2])
        self._wiring = wiring_of(plain, self._record(others[:2]), self._record(tokens))
        self._require_direct(tokens[:2], others[:2], plain, head)

    def _require_direct(self, tokens: Tensor, others: Tensor, plain: Recording, head: Tensor) -> None:
        """CheckpointError if the model computes with block outputs between its blocks, or between blocks and head.

        others  as many tokens, all different
        plain   the recording of `tokens`
        head    the head's input for `tokens`
        """
        changed = self._record(tokens, change=1.0)
        for index, (one, other) in enumerate(zip(plain.calls, changed.calls, strict=True)):
            passed_on = index == 0 or torch.equal(changed.entered[index], changed.entered[index - 1] + 1.0)
            pairs = enumerate(zip(one.leaves, other.leaves, strict=True))
            if not passed_on or not all(alike(*pair) for at, pair in pairs if self.wiring.is_given(index, at)):
                raise self._not_by_blocks(index)
        heads = (self._before_head(*asked)[1][0] for asked in ((tokens, 1.0), (others, 0.0)))
        if not all(torch.allclose(head, other, equal_nan=True) for other in heads):
            raise self._not_by_blocks(None)

    def _require_one_run_each(self, batch: Tensor) -> Tensor:
        """The head's input. CheckpointError if the model does not run its blocks in order, each once."""
        order, heads = self._before_head(batch, change=0.0)
        if order != list(range(len(self.skeleton.blocks))):
            raise CheckpointError(
                f"{type(self.skeleton.model).__name__} does not run its {len(self.skeleton.blocks)} blocks one after "
                f"another, each once, but {len(order)} times: {NOT_BY_BLOCKS}"
            )
        return heads[0]

    def _before_head(self, batch: Batch, change: float) -> tuple[list[int], list[Tensor]]:
        """The order of blocks in a forward pass, and the input of the head.

        Every stub adds `change` to its hidden states, except the last one, which returns ones.
        """
        order: list[int] = []
        entering: list[Tensor] = []

        def passed(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            order.append(index)
            hidden = args[0] if args else kwargs["hidden_states"]
            last = index == len(self.skeleton.blocks) - 1
            return self._wrapped(torch.ones_like(hidden) if last else hidden + change)

        def stop(module: nn.Module, args: Any) -> None:
            entering.append(args[0])
            raise _Stop

        handle = _linear_head(self.skeleton.model).register_forward_pre_hook(stop)
        try:
            with self._stubs(passed):
                self._run_until_stop(batch)
        finally:
            handle.remove()
        return order, entering

    def _count_returned(self, batch: Tensor) -> int | None:
        """The number of values a block returns, hidden states first; None for a bare tensor. Runs the first block."""
        found: list[int | None] = []

        def look(module: nn.Module, args: Any, output: Any) -> None:
            found.append(len(output) if isinstance(output, tuple | list) else None)
            raise _Stop

        handle = self.skeleton.blocks[0].module.register_forward_hook(look)
        try:
            with self.loaded(0):
                self._run_until_stop(batch)
        finally:
            handle.remove()
        return found[0]

    def _run_until_stop(self, batch: Batch) -> None:
        seen = batch.arguments(self.device, self.dtype) if isinstance(batch, ImageText) else {"input_ids": batch}
        try:
            self.skeleton.model(**seen, use_cache=False)
        except _Stop:
            return

    def _wrapped(self, hidden: Tensor, rest: tuple[Any, ...] | None = None) -> Any:
        """`hidden` in the form that blocks return, with `rest` or None in the other places."""
        if self._returned is None:
            return hidden
        return hidden, *(rest if rest is not None else (None,) * (self._returned - 1))

    @contextmanager
    def _stubs(self, answer: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """A context in which blocks return `answer(index, args, kwargs)` instead of computing."""
        modules = [block.module for block in self.skeleton.blocks]
        for index, module in enumerate(modules):
            module.forward = lambda *args, _index=index, **kwargs: answer(_index, args, kwargs)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    @contextmanager
    def _entrance(self, seeing: bool) -> Iterator[None]:
        """A context with the model in memory, without its blocks and its head; with its towers if `seeing`."""
        with self._filled(self.skeleton.model.get_output_embeddings(), towers=seeing):
            yield

    @contextmanager
    def head_loaded(self) -> Iterator[None]:
        """A context with the model in memory, without its blocks, and with zeros as embeddings.

        The head is often the largest matrix: it stays in the file's dtype, and is converted in slices during the
        product.
        """
        model = self.skeleton.model
        head, embeddings = _linear_head(model), model.get_input_embeddings()
        head.forward = lambda x: _sliced_linear(x, head)
        try:
            with self._filled(head, embeddings):
                fill(model, [head, embeddings], self._head_tensors(head), self.skeleton.read, self.device, None)
                yield
        finally:
            empty([head])
            del head.forward

    @contextmanager
    def _filled(self, *skipped: nn.Module | None, towers: bool = False) -> Iterator[None]:
        """A context with all modules in memory except blocks, `skipped`, and (without `towers`) the towers."""
        model = self.skeleton.model
        stubs = set() if towers else set(self.skeleton.towers())
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
            share(model, owners)
            yield
        finally:
            empty([*owners.values(), *hollowed])

    def _head_tensors(self, head: nn.Module) -> dict[str, Placement]:
        """The file's tensors for the head, or for the parameter it is tied to (usually the embeddings)."""
        name = next(name for name, module in self.skeleton.model.named_modules() if module is head)
        keys = {place.parameter: key for key, place in self.skeleton.others.items()}
        found = {}
        for leaf in (leaf for leaf, parameter in head._parameters.items() if parameter is not None):
            own = f"{name}.{leaf}"
            source = own if own in keys else self.skeleton.model.all_tied_weights_keys.get(own)
            if source in keys:
                key = keys[source]
                found[key] = self.skeleton.others[key] if source == own else Placement(own)
        return found


def _linear_head(model: Any) -> Any:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise CheckpointError(f"{type(model).__name__}: its head is {type(head).__name__}, not a linear layer")
    return head


def _sliced_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """`linear(x)` in the dtype of `x`, with the weight converted HEAD_SLICE elements at a time."""
    n, k = linear.weight.shape
    rows = max(HEAD_SLICE // k, 1)
    result = x.new_empty(*x.shape[:-1], n)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        bias = None if linear.bias is None else linear.bias[part].to(x.dtype)
        result[..., part] = torch.nn.functional.linear(x, linear.weight[part].to(x.dtype), bias)
    return result


def _within(name: str, outer: set[str]) -> bool:
    """True if the module `name` is in `outer`, or inside a module in it."""
    return any(name == other or name.startswith(other + ".") for other in outer)
