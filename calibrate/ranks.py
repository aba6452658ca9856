"""Data-parallel runs under torchrun: split work over ranks, and replicate its results.

State is replicated on every rank: the current block, statistics and hidden states. Only work is split. Each item (a
batch, a candidate, a linear) runs on one rank and its result is broadcast; sums over batches are all-reduced. So all
ranks make the same decisions, and rank 0, the leader, can write for all.

Without torchrun there is one rank, and all functions here cost nothing.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lowbit.errors import CheckpointError

Item = TypeVar("Item")

# torchrun stops the other ranks if one dies, so a long timeout is safe: the leader may be at a long download.
PATIENCE = timedelta(hours=24)
POLL_SECONDS = 1e-4
FLOATS, INTS = (torch.float32, torch.bfloat16, torch.float16), (torch.int32, torch.int8, torch.uint8)
DTYPES = (*FLOATS, torch.float64, *INTS, torch.float8_e4m3fn)  # dtypes of results
MOST_DIMENSIONS = 4


class Lost(RuntimeError):
    """Another rank of this run has ended."""


def join() -> None:
    """Join the process group, if torchrun started this process."""
    if dist.is_torchelastic_launched():
        store, rank, size = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def leave() -> None:
    """Wait for all ranks once more, then leave the process group."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def count() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """True on the rank that writes and prints."""
    return index() == 0


def first_to_fail() -> bool:
    """True if no other rank has failed before: only the first failure is printed."""
    return not dist.is_torchelastic_launched() or next(rendezvous("env://"))[0].add("failed", 1) == 1


def own_device(device: str) -> str:
    """`device`, or this rank's own GPU for "cuda". CheckpointError if there is none."""
    if count() == 1 or device == "cpu":
        return device
    own, there = dist.get_node_local_rank(), torch.cuda.device_count()
    if device != "cuda" or own >= there:
        raise CheckpointError(
            f"device {device!r} for local rank {own} on a machine with {there} GPUs: each rank needs its own,  "
            f"so use --device cuda (or omit it) and --nproc-per-node {there} at most"
        )
    torch.cuda.set_device(own)
    return f"cuda:{own}"


@contextmanager
def leader_first() -> Iterator[None]:
    """A context that the leader passes first (it may download), then the other ranks (which find it done)."""
    if not leads():
        wait()
    yield
    if leads():
        wait()


def mine(items: Iterable[Item]) -> list[Item]:
    """This rank's items: every `count`-th."""
    return list(items)[index() :: count()]


def each(items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]:
    """The results of `work` for all items, on every rank."""
    return [only for (only,) in each_several(items, lambda item: (work(item),))]


def each_numbers(items: Sequence[Item], size: int, work: Callable[[Item], list[float]]) -> list[list[float]]:
    """Like `each`, for work that returns `size` numbers."""
    found = torch.zeros(len(items), size, dtype=torch.float64)
    for place in mine(range(len(items))):
        found[place] = torch.tensor(work(items[place]), dtype=torch.float64)
    return total(found).tolist()


def each_several(items: Sequence[Item], work: Callable[[Item], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Like `each`, for work that returns several tensors, all on the CPU or all on this rank's device."""
    return each_together(items, lambda own: [work(item) for item in own])


def each_together(
    items: Sequence[Item], work: Callable[[list[Item]], list[tuple[Tensor, ...]]]
) -> list[tuple[Tensor, ...]]:
    """Like `each_several`, for work that takes all items of a rank at once."""
    own = mine(range(len(items)))
    done = dict(zip(own, work([items[place] for place in own]), strict=True))
    if count() == 1:
        return list(done.values())
    return [_sent(done.get(place), place % count()) for place in range(len(items))]


def leaders(value: Tensor) -> Tensor:
    """The leader's `value`, broadcast in place; contiguous, with the same shape on every rank."""
    _from(0, value)
    return value


def leaders_number(value: float) -> float:
    """The leader's `value`."""
    return float(leaders(torch.tensor(value, dtype=torch.float64)))


def total(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, in place, bit-identical on every rank."""
    return _reduced(value, dist.ReduceOp.SUM)


def largest(value: Tensor) -> Tensor:
    """The elementwise maximum of `value` over all ranks, in place."""
    return _reduced(value, dist.ReduceOp.MAX)


def total_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum every parameter's gradient over all ranks. A parameter without a gradient on any rank keeps none."""
    if count() == 1:
        return
    unique = list(dict.fromkeys(parameters))
    reached = total(torch.tensor([float(parameter.grad is not None) for parameter in unique]))
    for parameter, some in zip(unique, reached.tolist(), strict=True):
        if some:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            parameter.grad = total(gradient)


def wait() -> None:
    """Barrier: wait until all ranks are here."""
    total(torch.zeros(1))


def _reduced(value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if count() > 1:
        _finish(lambda: dist.all_reduce(value, how, async_op=True))
    return value


def _from(owner: int, value: Tensor) -> None:
    """Overwrite the contiguous `value` with the one of rank `owner`."""
    if count() > 1 and value.numel():
        # sent as bytes: not every backend supports every dtype
        _finish(lambda: dist.broadcast(value.view(-1).view(torch.uint8), owner, async_op=True))


def _sent(values: tuple[Tensor, ...] | None, owner: int) -> tuple[Tensor, ...]:
    """The `values` of rank `owner`, which passes them; the others pass None."""
    number = int(_header([len(values or ())], owner)[0])
    return tuple(_sent_one(values[place] if values else None, owner) for place in range(number))


def _sent_one(value: Tensor | None, owner: int) -> Tensor:
    about = [] if value is None else [DTYPES.index(value.dtype), value.is_cuda, value.ndim, *value.shape]
    dtype, on_gpu, ndim, *shape = _header(about, owner)
    if value is None:
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        value = torch.empty(shape[:ndim], dtype=DTYPES[dtype], device=device)
    value = value.contiguous()
    _from(owner, value)
    return value


def _header(numbers: Sequence[int], owner: int) -> list[int]:
    """The few integers of rank `owner`, padded with zeros."""
    header = torch.zeros(3 + MOST_DIMENSIONS, dtype=torch.int64)
    header[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    _from(owner, header)
    return header.tolist()


def _finish(begin: Callable[[], dist.Work]) -> None:
    """Start a collective operation and poll for its end, so that a signal can interrupt the wait."""
    try:
        work = begin()
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        raise Lost("another rank of this run has ended; see its output for the reason") from error
