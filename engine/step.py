"""The rows of one pass through the decoder, and their rotary embeddings."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.engine.architecture import Rope


@dataclass(frozen=True)
class Step:
    """The input of one pass.

    tokens, positions  (m) int64
    turns              (m) int64  each row's index in the rope tables: see Decoder.turns_at
    starts             (m) int64  the cache slot of position 0 of each row's sequence
    slots              (m) int64  starts + positions: the cache slot of each row's keys and values
    longest            upper bound on every row's sequence length; 0 if unknown
    prefix             for a prompt: the cache slots of one sequence, whose last positions are the rows; None if each
                       row is a sequence's last position
    prompts            the prefix's sequences, of equal numbers of rows; all rows are new where there are several
    adjacent           adjacent rows that are consecutive positions of one sequence: drafts to be checked
    alone              True: each row has a sequence of its own, whose last position it is
    wanted             for a prompt: the rows whose outputs are wanted, or None for all. The last layer computes no
                       others, once it has the keys and values of all
    """

    tokens: Tensor
    positions: Tensor
    turns: Tensor
    starts: Tensor
    slots: Tensor
    _: KW_ONLY
    longest: int = 0
    prefix: slice | Tensor | None = None
    prompts: int = 1
    adjacent: int = 1
    alone: bool = False
    wanted: Tensor | None = None


@dataclass(frozen=True)
class Turns:
    """Tables of one rope: cosines, sines (indices, head_dim / 2) float32; 1 and 0 for inputs that are not rotated."""

    cosines: Tensor
    sines: Tensor


def turns_of(rope: Rope, head_dim: int, positions: int, device: torch.device) -> Turns:
    """The rope's table for positions below `positions`, followed by one for the long frequencies if needed."""
    counted = torch.arange(positions, dtype=torch.float32).unsqueeze(1)
    angles = counted * rope.frequencies.float()
    if rope.long is not None and positions > rope.short:
        angles = torch.cat([angles, counted * rope.long.float()])
    still = head_dim // 2 - angles.shape[1]
    cosines = functional.pad(angles.cos() * rope.scaling, (0, still), value=1.0)
    sines = functional.pad(angles.sin() * rope.scaling, (0, still))
    return Turns(cosines.to(device), sines.to(device))
