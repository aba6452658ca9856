"""The rows of one pass through the decoder, and how their heads turn."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Rope


@dataclass(frozen=True)
class Step:
    """What one pass computes.

    tokens, positions  (m) int64
    turns              (m) int64  each row's place in the tables of turns: see Decoder.turns_at
    starts             (m) int64  the cache's slot of position 0 of each row's sequence
    slots              (m) int64  starts + positions: where each row's keys and values go
    longest            positions that no row's sequence comes beyond; 0 where nobody knows
    prompt             (sequence, length): the rows are the last of `length` positions of one sequence; None where each
                       row attends by itself
    """

    tokens: Tensor
    positions: Tensor
    turns: Tensor
    starts: Tensor
    slots: Tensor
    longest: int = 0
    prompt: tuple[int, int] | None = None


@dataclass(frozen=True)
class Turns:
    """cosines, sines (places, head_dim / 2) float32 of one rope; 1 and 0 for inputs that do not turn."""

    cosines: Tensor
    sines: Tensor


def turns_of(rope: Rope, head_dim: int, positions: int, device: torch.device) -> Turns:
    """The table of a rope for positions below `positions`; the long frequencies' below it, where they can be needed."""
    counted = torch.arange(positions, dtype=torch.float32).unsqueeze(1)
    angles = counted * rope.frequencies.float()
    if rope.long is not None and positions > rope.short:
        angles = torch.cat([angles, counted * rope.long.float()])
    still = head_dim // 2 - angles.shape[1]
    cosines = functional.pad(angles.cos() * rope.scaling, (0, still), value=1.0)
    sines = functional.pad(angles.sin() * rope.scaling, (0, still))
    return Turns(cosines.to(device), sines.to(device))
