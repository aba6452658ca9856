"""The end of a decode step in one kernel: each row's likeliest token, and the row moved on: csrc/choose_tokens.cu."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.kernels.extension import EXTENSION, reason_against_device

BLOCK_SCORES = 16384  # that a block asks for at once
MAX_BLOCKS = 8  # of a cluster, which share a row
MAX_ROWS = 65535  # of a grid


@dataclass(frozen=True)
class Cursor:
    """Where rows stand in their sequences.

    positions  (m) int64  each row's position
    slots      (m) int64  and its place in the cache
    last       the last position: a row that has come there stays
    """

    positions: Tensor
    slots: Tensor
    last: int


@dataclass(frozen=True)
class Choice:
    """What a step ends with. All but the scores are written in place.

    scores   (m, n) float32  contiguous
    tokens   (m)    int64    becomes the index of each row's largest score: the first where there are more, the first
                             NaN where there is one, as Tensor.argmax has it
    written  (m)    int64    becomes one more
    cursor   moves on by one position; None: rows stay
    dependent  launch without waiting for the previous kernel (programmatic dependent launch)
    """

    scores: Tensor
    tokens: Tensor
    written: Tensor
    cursor: Cursor | None = None
    dependent: bool = False


def choose(call: Choice) -> None:
    """Writes the tokens of `call`, and moves its rows on. ValueError where the tensors do not fit together."""
    check(call)
    if reason_against(call):
        reference(call)
    else:
        launch(call)


def launch(call: Choice) -> None:
    """Runs the kernel on `call`, which `check` has passed."""
    assert EXTENSION is not None
    args: Any = EXTENSION.ChooseTokensArgs()
    addresses = {"scores": call.scores, "tokens": call.tokens, "written": call.written}
    if call.cursor is not None:
        addresses |= {"positions": call.cursor.positions, "slots": call.cursor.slots}
        args.last = call.cursor.last
    for name, tensor in addresses.items():
        setattr(args, name, tensor.data_ptr())
    args.m, args.n = call.scores.shape
    device = call.scores.device
    cut = EXTENSION.ChooseTokensLaunch()
    cut.device, cut.dependent = device.index, call.dependent
    cut.blocks = choose_blocks(args.n, torch.cuda.get_device_capability(device))
    with torch.cuda.device(device):
        EXTENSION.choose_tokens(args, cut, torch.cuda.current_stream().cuda_stream)


def choose_blocks(n: int, capability: tuple[int, int]) -> int:
    """Blocks that share a row of n scores."""
    return min(MAX_BLOCKS, -(-n // BLOCK_SCORES)) if capability >= (9, 0) else 1


def check(call: Choice) -> None:
    """Raises ValueError where the parts of `call` do not go together."""
    scores = call.scores
    if scores.ndim != 2 or scores.dtype != torch.float32 or not scores.is_contiguous() or not scores.shape[1]:
        shape, strides = tuple(scores.shape), scores.stride()
        raise ValueError(f"scores are {shape} {scores.dtype} of strides {strides}: rows of torch.float32 are needed")
    rows = {"tokens": call.tokens, "written": call.written}
    if call.cursor is not None:
        rows |= {"positions": call.cursor.positions, "slots": call.cursor.slots}
    for name, tensor in rows.items():
        if tuple(tensor.shape) != (len(scores),) or tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not ({len(scores)},) torch.int64")
        if tensor.device != scores.device:
            raise ValueError(f"{name} is on {tensor.device}, the scores on {scores.device}")


def reason_against(call: Choice) -> str | None:
    """Why the kernel cannot take the rows, or None."""
    scores = call.scores
    if scores.device.type != "cuda":
        return f"the tensors are on the {scores.device.type}"
    if not 0 < len(scores) <= MAX_ROWS:
        return f"{len(scores)} rows: 1 to {MAX_ROWS} are taken"
    return reason_against_device(torch.cuda.get_device_capability(scores.device))


def reference(call: Choice) -> None:
    """`call` in plain torch."""
    call.tokens.copy_(call.scores.argmax(-1))
    call.written.add_(1)
    if call.cursor is not None:
        positions = call.cursor.positions
        moved = (positions + 1).clamp(max=call.cursor.last) - positions
        positions.add_(moved)
        call.cursor.slots.add_(moved)
