"""Token selection at the end of a decode step, in one kernel with the advance of positions: csrc/choose_tokens.cu.

Random numbers are a hash of (seed, tokens written so far, token), so a row's draws do not depend on the batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.quant.kernels.extension import launch, reason_against_device

BLOCK_SCORES = 16384  # scores per block
BLOCK_DRAWS = 4096  # scores per block with noise, which costs some hundred instructions each
MAX_BLOCKS = 8  # of a cluster that shares a row
MAX_ROWS = 65535  # largest grid

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


@dataclass(frozen=True)
class Cursor:
    """Positions of the rows in their sequences.

    positions  (m) int64  each row's position
    slots      (m) int64  each row's place in the cache
    last       the last position; a row that has reached it does not move
    """

    positions: Tensor
    slots: Tensor
    last: int


@dataclass(frozen=True)
class Noise:
    """Noise that turns the argmax into a draw from softmax(scores / temperature): the Gumbel-max trick.

    temperature  (m) float32  0 for greedy decoding of that row
    seed         (m) int64
    """

    temperature: Tensor
    seed: Tensor


@dataclass(frozen=True)
class Mailbox:
    """The rows' last tokens in memory of the host, to which the kernel writes. A copy behind each step would keep the
    GPU waiting for its copy engine.

    tokens  (steps, m) int64  on the host; pinned, if the scores are on a GPU
    turns   (m) int64  each row's steps so far; a step writes to row turns % steps of `tokens`
    """

    tokens: Tensor
    turns: Tensor


@dataclass(frozen=True)
class ChoiceCall:
    """The inputs of a token selection. Everything but the scores is written in place.

    scores   (m, n) float32  contiguous
    tokens   (m)    int64    written: index of each row's largest score; the first one of several, or the first NaN, as
                             in Tensor.argmax
    written  (m)    int64    incremented
    cursor   advanced by one position; None: rows stay
    noise    added to scores / temperature before the comparison; None for greedy decoding
    dependent  launch without waiting for the previous kernel (programmatic dependent launch)
    mailbox  the tokens go there, too; None: nowhere else
    """

    scores: Tensor
    tokens: Tensor
    written: Tensor
    cursor: Cursor | None = None
    noise: Noise | None = None
    dependent: bool = False
    mailbox: Mailbox | None = None


def choose(call: ChoiceCall) -> None:
    """Write the tokens of `call` and advance its rows. ValueError if the tensors do not fit together."""
    check(call)
    if reason_against(call):
        reference(call)
    else:
        run_kernel(call)


def run_kernel(call: ChoiceCall) -> None:
    """Run the kernel on `call`, which `check` has passed."""
    (m, n), device = call.scores.shape, call.scores.device
    args: dict[str, Any] = dict.fromkeys(("positions", "slots", "temperature", "seed", "turns")) | rows_of(call)
    args |= {"scores": call.scores, "m": m, "n": n, "last": call.cursor.last if call.cursor else 0}
    sent = None if call.mailbox is None else call.mailbox.tokens
    args |= {"sent": sent, "steps": 0 if sent is None else len(sent)}
    blocks = choose_blocks(n, call.noise is not None, torch.cuda.get_device_capability(device))
    launch("choose_tokens", device=device, args=args, blocks=blocks, dependent=call.dependent)


def choose_blocks(n: int, noise: bool, capability: tuple[int, int]) -> int:
    """Number of blocks that share a row of n scores."""
    return min(MAX_BLOCKS, -(-n // (BLOCK_DRAWS if noise else BLOCK_SCORES))) if capability >= (9, 0) else 1


def rows_of(call: ChoiceCall) -> dict[str, Tensor]:
    """The tensors with one value per row, by name."""
    rows = {"tokens": call.tokens, "written": call.written}
    if call.cursor is not None:
        rows |= {"positions": call.cursor.positions, "slots": call.cursor.slots}
    if call.noise is not None:
        rows |= {"temperature": call.noise.temperature, "seed": call.noise.seed}
    if call.mailbox is not None:
        rows["turns"] = call.mailbox.turns
    return rows


def check(call: ChoiceCall) -> None:
    """ValueError if the parts of `call` do not fit together."""
    scores = call.scores
    if scores.ndim != 2 or scores.dtype != torch.float32 or not scores.is_contiguous() or not scores.shape[1]:
        shape, strides = tuple(scores.shape), scores.stride()
        raise ValueError(f"scores are {shape} {scores.dtype} of strides {strides}: rows of torch.float32 are needed")
    for name, tensor in rows_of(call).items():
        dtype = torch.float32 if name == "temperature" else torch.int64
        if tuple(tensor.shape) != (len(scores),) or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not ({len(scores)},) {dtype}")
        if tensor.device != scores.device:
            raise ValueError(f"{name} is on {tensor.device}, the scores on {scores.device}")
    if call.mailbox is not None:
        check_sent(call.mailbox.tokens, scores)


def check_sent(sent: Tensor, scores: Tensor) -> None:
    """ValueError if the kernel cannot write the tokens of these scores to `sent`."""
    if sent.ndim != 2 or sent.shape[1] != len(scores) or not len(sent) or sent.dtype != torch.int64:
        raise ValueError(f"the mailbox is {tuple(sent.shape)} {sent.dtype}, not (steps, {len(scores)}) torch.int64")
    if sent.device.type != "cpu" or not sent.is_contiguous() or (scores.is_cuda and not sent.is_pinned()):
        raise ValueError(f"the mailbox is on {sent.device}: contiguous memory of the host, pinned for a GPU, is needed")


def reason_against(call: ChoiceCall) -> str | None:
    """The reason why the kernel cannot run on these rows, or None."""
    scores = call.scores
    if scores.device.type != "cuda":
        return f"the tensors are on the {scores.device.type}"
    if not 0 < len(scores) <= MAX_ROWS:
        return f"{len(scores)} rows: 1 to {MAX_ROWS} are taken"
    return reason_against_device(torch.cuda.get_device_capability(scores.device))


def reference(call: ChoiceCall) -> None:
    """`call` in plain torch."""
    call.tokens.copy_(perturbed(call).argmax(-1))
    call.written.add_(1)
    if call.mailbox is not None:
        sent, turns = call.mailbox.tokens, call.mailbox.turns
        sent[(turns % len(sent)).cpu(), torch.arange(len(turns))] = call.tokens.cpu()
        turns.add_(1)
    if call.cursor is not None:
        positions = call.cursor.positions
        moved = (positions + 1).clamp(max=call.cursor.last) - positions
        positions.add_(moved)
        call.cursor.slots.add_(moved)


def perturbed(call: ChoiceCall) -> Tensor:
    """The scores to compare, in plain torch."""
    if call.noise is None:
        return call.scores
    temperature, seed = call.noise.temperature.unsqueeze(1), call.noise.seed.unsqueeze(1)
    warm = temperature > 0
    scaled = call.scores / torch.where(warm, temperature, 1.0)
    return torch.where(warm, scaled + gumbel(seed, call.written.unsqueeze(1), call.scores.shape[1]), call.scores)


def mix(values: Tensor) -> Tensor:
    """SplitMix64's finalizer on int64: every bit of the result depends on every bit of the value."""
    for shift, factor in MIX:
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def gumbel(seed: Tensor, written: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise (B, vocabulary) float32 for seeds (B, 1) and steps (B, 1)."""
    stream = mix(mix(seed * GOLDEN + 1) + written * GOLDEN)
    bits = mix(stream + torch.arange(vocabulary, device=seed.device) * GOLDEN)
    uniform = (((bits >> 41) & ((1 << 23) - 1)).float() + 0.5) / (1 << 23)  # never 0, never 1
    return -torch.log(-torch.log(uniform))
