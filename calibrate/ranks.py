"""One run by several processes, as torchrun starts them: what each does of it, and what all know.

All know everything: each process holds the block at work, the statistics and the hidden states. What is shared out is
work. An item of it (a batch, a candidate, a linear) is done by one process and what came of it is sent to all; sums
over batches are added up. So all decide alike, and the first process, the leader, can write for all.

Where torchrun did not start this process there is one, and everything here costs nothing.
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

# torchrun ends the others where a process dies, so nobody has to give up waiting: the leader may be at a long download.
PATIENCE = timedelta(hours=24)
POLL_SECONDS = 1e-4
FLOATS, INTS = (torch.float32, torch.bfloat16, torch.float16), (torch.int32, torch.int8, torch.uint8)
DTYPES = (*FLOATS, *INTS, torch.float8_e4m3fn)  # that results come in
MOST_DIMENSIONS = 4


class Lost(RuntimeError):
    """Another process of the run has ended."""


def join() -> None:
    """Join the processes that torchrun started beside this one, if it did."""
    if dist.is_torchelastic_launched():
        store, rank, size = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def leave() -> None:
    """Wait for the others once more; from here on each process is alone."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """True if this is the process that writes and prints."""
    return index() == 0


def first_to_fail() -> bool:
    """True if no other process has failed yet, so that this one's message is the one to print."""
    return not dist.is_torchelastic_launched() or next(rendezvous("env://"))[0].add("failed", 1) == 1


def own_device(device: str) -> str:
    """`device`, where that is cuda the GPU that is this process's own. CheckpointError where there is none."""
    if count() == 1 or device == "cpu":
        return device
    own, there = dist.get_node_local_rank(), torch.cuda.device_count()
    if device != "cuda" or own >= there:
        raise CheckpointError(
            f"device {device!r} for process {own} of this machine, which has {there} GPUs: each process takes one, "
            f"so pass --device cuda or none, and --nproc-per-node {there} at most"
        )
    torch.cuda.set_device(own)
    return f"cuda:{own}"


@contextmanager
def leader_first() -> Iterator[None]:
    """A block that the leader goes through alone (it may download), then the others (they find it done)."""
    if not leads():
        wait()
    yield
    if leads():
        wait()


def mine(items: Iterable[Item]) -> list[Item]:
    """The items that are this process's to do: every `count`-th."""
    return list(items)[index() :: count()]


def each(items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]:
    """What `work` makes of each item, known to all."""
    return [only for (only,) in each_several(items, lambda item: (work(item),))]


def each_number(items: Sequence[Item], work: Callable[[Item], float]) -> list[float]:
    """The same for work that ends in a number."""
    found = torch.zeros(len(items), dtype=torch.float64)
    for place in mine(range(len(items))):
        found[place] = work(items[place])
    return total(found).tolist()


def each_several(items: Sequence[Item], work: Callable[[Item], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The same for work that ends in several tensors; they are on the CPU, or all on this process's device."""
    done = {place: work(items[place]) for place in mine(range(len(items)))}
    if count() == 1:
        return list(done.values())
    return [_sent(done.get(place), place % count()) for place in range(len(items))]


def leaders(value: Tensor) -> Tensor:
    """The leader's `value`, contiguous and of the same shape for all; it overwrites the others'."""
    _from(0, value)
    return value


def leaders_number(value: float) -> float:
    """The leader's `value`."""
    return float(leaders(torch.tensor(value, dtype=torch.float64)))


def total(value: Tensor) -> Tensor:
    """The sum of every process's `value`, the same to the bit for all; `value` is overwritten."""
    return _reduced(value, dist.ReduceOp.SUM)


def largest(value: Tensor) -> Tensor:
    """The largest of every process's `value`, element by element; `value` is overwritten."""
    return _reduced(value, dist.ReduceOp.MAX)


def total_gradients(parameters: Iterable[Tensor]) -> None:
    """Every parameter's gradient becomes the sum of all processes'; none where none has one."""
    if count() == 1:
        return
    unique = list(dict.fromkeys(parameters))
    reached = total(torch.tensor([float(parameter.grad is not None) for parameter in unique]))
    for parameter, some in zip(unique, reached.tolist(), strict=True):
        if some:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            parameter.grad = total(gradient)


def wait() -> None:
    """Wait until all processes are here."""
    total(torch.zeros(1))


def _reduced(value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
    if count() > 1:
        _finish(lambda: dist.all_reduce(value, how, async_op=True))
    return value


def _from(owner: int, value: Tensor) -> None:
    """Overwrite `value`, contiguous, by that of process `owner`."""
    if count() > 1 and value.numel():
        # as bytes: not every backend moves every dtype
        _finish(lambda: dist.broadcast(value.view(-1).view(torch.uint8), owner, async_op=True))


def _sent(values: tuple[Tensor, ...] | None, owner: int) -> tuple[Tensor, ...]:
    """The `values` of process `owner`; for it they are what it has, for the others None."""
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
    """The few `numbers` of process `owner`, zeros behind them."""
    header = torch.zeros(3 + MOST_DIMENSIONS, dtype=torch.int64)
    header[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    _from(owner, header)
    return header.tolist()


def _finish(begin: Callable[[], dist.Work]) -> None:
    """Begin something that all processes do and wait for it in Python, where a signal can end the wait."""
    try:
        work = begin()
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        raise Lost("another process of this run has ended; what it printed, if anything, says why") from error
