"""States that flow from block to block, and the arguments that blocks are called with.

A block's arguments other than its hidden states are of four kinds. They are told apart by recordings of the model's own
forward pass with stubbed blocks:

- equal for all batches of one shape (masks, rotary tables): stored once per shape
- dependent on the tokens (Gemma 4's embedding per layer): stored with the batch
- returned by an earlier block next to its hidden states (the indices of an indexer): passed on
- an empty mapping in which blocks store values for each other (shared keys and values): copied for each batch

A sample with images has a call of its own, and additions of the model between blocks (Qwen3-VL's deep features).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowbit.errors import CheckpointError

Place = tuple[int, int]  # a block, and the index of its argument after flattening
ADDED = -1  # in place of an argument: the model's addition to the hidden states after the block


@dataclass(frozen=True)
class States:
    """The input of a block for one batch of sequences. The first dimension of every tensor is the sequence.

    hidden   (B, T, width), or (B, ..., T, width) for models with several streams
    shape    (B, T)
    own      arguments of blocks that depend on the tokens
    carried  values from earlier blocks, by name: tensors (B, ...) or (B * T, ...), in dicts and tuples
    label    hash of a sample with images, which has a call of its own; empty for texts
    """

    hidden: Tensor
    shape: tuple[int, int]
    own: dict[Place, Tensor] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden states and the batch's own arguments; views of one tensor count once."""
        storages = [value.untyped_storage() for value in (self.hidden, *self.own.values())]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def flow(self) -> list[Tensor]:
        """All tensors that blocks compute and gradients flow through, hidden states first."""
        return [self.hidden, *(leaf for leaf in pytree.tree_leaves(self.carried) if leaf.is_floating_point())]

    def at(self, index: int) -> "States":
        """The states with the arguments of block `index` only."""
        return replace(self, own={place: value for place, value in self.own.items() if place[0] == index})

    def to(self, device: str) -> "States":
        """The states on `device`."""
        hidden, own, carried = pytree.tree_map(lambda leaf: leaf.to(device), (self.hidden, self.own, self.carried))
        return replace(self, hidden=hidden, own=own, carried=carried)

    def rows(self) -> list["States"]:
        """The states of each sequence on its own."""
        count, length = self.shape
        leaves, spec = pytree.tree_flatten((self.hidden, self.own, self.carried))
        if any(len(leaf) % count for leaf in leaves):
            shapes = sorted({tuple(leaf.shape) for leaf in leaves if len(leaf) % count})
            raise CheckpointError(f"blocks hand on {shapes[0]} for {count} sequences: no even part for each")
        parts = zip(*(leaf.chunk(count) for leaf in leaves), strict=True)
        return [_states(spec, part, (1, length), self.label) for part in parts]

    def taped(self) -> "States":
        """The states as leaves of a new autograd graph."""

        def leaf(value: Tensor) -> Tensor:
            return value.detach().requires_grad_(value.is_floating_point())

        return replace(self, hidden=leaf(self.hidden), carried=pytree.tree_map(leaf, self.carried))

    def packed(self) -> tuple[Tensor, ...]:
        """The tensors that change from block to block, as a tuple that can be sent to another rank."""
        leaves, spec = pytree.tree_flatten(self.carried)
        said = torch.tensor(list(pytree.treespec_dumps(spec).encode()), dtype=torch.uint8)
        return said, self.hidden, *leaves

    def unpacked(self, parts: tuple[Tensor, ...]) -> "States":
        """These states after a block that returned `parts`, which come from `packed`."""
        said, hidden, *leaves = parts
        spec = pytree.treespec_loads(bytes(said.tolist()).decode())
        return replace(self, hidden=hidden, carried=pytree.tree_unflatten(leaves, spec))


def joined(rows: Iterable[States]) -> States:
    """One batch from several of equal length and label."""
    rows = list(rows)
    flat = [pytree.tree_flatten((row.hidden, row.own, row.carried)) for row in rows]
    leaves = [torch.cat(column) for column in zip(*(leaves for leaves, _ in flat), strict=True)]
    return _states(flat[0][1], leaves, (sum(row.shape[0] for row in rows), rows[0].shape[1]), rows[0].label)


def batched(rows: Iterable[States], size: int) -> list[States]:
    """Sequences in batches: `size` of one length and label together, as blocks are called; those left over alone."""
    alike: dict[tuple[int, str], list[States]] = defaultdict(list)
    for row in rows:
        alike[row.shape[1], row.label].append(row)
    whole = {key: len(group) // size * size for key, group in alike.items()}
    together = [joined(group[i : i + size]) for key, group in alike.items() for i in range(0, whole[key], size)]
    return together + [row for key, group in alike.items() for row in group[whole[key] :]]


def _states(spec: pytree.TreeSpec, leaves: Iterable[Tensor], shape: tuple[int, int], label: str) -> States:
    hidden, own, carried = pytree.tree_unflatten(list(leaves), spec)
    return States(hidden, shape, own, carried, label)


def pulled(run: Callable[[States], States], states: States, gradient: list[Tensor | None]) -> list[Tensor | None]:
    """The gradient with respect to the flow of `states`, from that of the flow of `run(states)`.

    Entries are None where no gradient arrives. Parameters with requires_grad get their gradients too.
    """
    states = states.taped()
    with torch.enable_grad():
        reached = [
            (value, slope)
            for value, slope in zip(run(states).flow, gradient, strict=True)
            if slope is not None and value.requires_grad
        ]
        torch.autograd.backward([value for value, _ in reached], [slope for _, slope in reached])
    return [value.grad for value in states.flow]


@dataclass(frozen=True)
class Call:
    """A block's arguments other than its hidden states: `leaves`, nested as in `spec`."""

    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        return cls(*pytree.tree_flatten((args, kwargs)))

    def arguments(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, with `leaves` in place of the original ones."""
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


@dataclass(frozen=True)
class Recording:
    """One forward pass of the model with stubbed blocks.

    entered  the hidden states that enter each block, in the model's layout
    calls    the other arguments of each block
    handed   the values that each stub returned next to hidden states
    """

    entered: list[Tensor]
    calls: list[Call]
    handed: list[tuple[Tensor, ...]]

    @property
    def hidden(self) -> Tensor:
        """The hidden states that enter the first block."""
        return self.entered[0]


@dataclass(frozen=True)
class Wiring:
    """Connections between a model's blocks other than hidden states.

    rows      the sequence dimension of the model's hidden states
    own       arguments that depend on the tokens, with the sequence dimension of each
    returned  arguments returned by an earlier block, with their names in States.carried
    stores    arguments that are mappings for blocks to store values in, with their names there
    """

    rows: int
    own: dict[Place, int]
    returned: dict[Place, str]
    stores: dict[Place, str]

    @property
    def carries(self) -> bool:
        """True if blocks pass on more than hidden states."""
        return bool(self.returned or self.stores)

    def is_given(self, index: int, at: int) -> bool:
        """True if the model itself computes this argument of block `index`."""
        return (index, at) not in self.returned and (index, at) not in self.stores

    def template(self, recording: Recording) -> list[Call]:
        """The calls of `recording` without the arguments that depend on its tokens."""
        return [
            Call([None if (i, at) in self.own else leaf for at, leaf in enumerate(call.leaves)], call.spec)
            for i, call in enumerate(recording.calls)
        ]

    def states(self, recording: Recording, shape: tuple[int, int]) -> States:
        """The states for `recording` of a batch of `shape`."""
        own = {(i, at): recording.calls[i].leaves[at].movedim(dimension, 0) for (i, at), dimension in self.own.items()}
        return States(recording.hidden.movedim(self.rows, 0), shape, own)

    def entering(self, index: int, template: Call, states: States) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of block `index`, and the stores among them by name."""
        leaves, stores = list(template.leaves), {}
        for at, leaf in enumerate(leaves):
            place = index, at
            if place in self.own:
                leaves[at] = states.own[place].movedim(0, self.own[place])
            elif place in self.returned:
                leaves[at] = states.carried.get(self.returned[place])
            elif place in self.stores:
                name = self.stores[place]
                leaves[at] = stores[name] = type(leaf)(states.carried.get(name, {}))
        return leaves, stores

    def leaving(self, index: int, output: Any, stores: dict[str, Any], states: States) -> States:
        """`states` after block `index`, which returned `output`."""
        first, *rest = output if isinstance(output, tuple | list) else (output,)
        wanted = {name for (i, _), name in self.returned.items() if i > index}
        carried = {name: value for name, value in states.carried.items() if name in wanted or name in self._store_names}
        carried |= {name: dict(store) for name, store in stores.items()}
        named = {_name(index, number): value for number, value in enumerate(rest)}
        carried |= {name: value for name, value in named.items() if name in wanted and value is not None}
        hidden, added = first.movedim(self.rows, 0), states.own.get((index, ADDED))
        return replace(states, hidden=hidden if added is None else hidden + added, carried=carried)

    @property
    def _store_names(self) -> set[str]:
        return set(self.stores.values())


def _name(index: int, number: int) -> str:
    return f"{index}.{number}"


def wiring_of(one: Recording, other: Recording, longer: Recording) -> Wiring:
    """The wiring derived from three recordings.

    one, other  of two batches of equal shape that differ in every token
    longer      of a batch with more sequences
    """
    alone = wiring_alone(one, _rows(one.hidden, longer.hidden))
    own = {
        (i, at): _rows(leaf, longer.calls[i].leaves[at])
        for i, call in enumerate(one.calls)
        for at, leaf in enumerate(call.leaves)
        if alone.is_given(i, at) and not alike(leaf, other.calls[i].leaves[at])
    }
    return replace(alone, own=own)


def wiring_alone(recording: Recording, rows: int) -> Wiring:
    """The wiring of one sample with a call of its own. Sequences are stacked along dimension `rows`."""
    handed = {id(value): _name(i, number) for i, row in enumerate(recording.handed) for number, value in enumerate(row)}
    returned, stores = {}, {}
    for i, call in enumerate(recording.calls):
        for at, leaf in enumerate(call.leaves):
            if id(leaf) in handed:
                returned[i, at] = handed[id(leaf)]
            elif isinstance(leaf, MutableMapping) and not leaf:
                stores[i, at] = id(leaf)
    names = {store: f"store {number}" for number, store in enumerate(dict.fromkeys(stores.values()))}
    return Wiring(rows, {}, returned, {place: names[store] for place, store in stores.items()})


def alike(one: Any, other: Any) -> bool:
    """True if two arguments are equal for a block."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    plain = (bool, int, float, str, type(None), Tensor)
    return not isinstance(one, plain) or (type(one) is type(other) and one == other)


def _rows(short: Any, long: Any) -> int:
    """The dimension that grows with the number of sequences. CheckpointError if there is none, or several."""
    both = isinstance(short, Tensor) and isinstance(long, Tensor) and short.ndim == long.ndim
    grown = [i for i in range(short.ndim) if short.shape[i] != long.shape[i]] if both else []
    if len(grown) != 1:
        said = [list(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in (short, long)]
        raise CheckpointError(
            f"a block's argument depends on the tokens, and is {said[0]} for 2 sequences, {said[1]} for 3: it cannot "
            "be cut into sequences, so the model cannot be run block by block"
        )
    return grown[0]
