"""Frequencies of rotary embeddings by the rules of rope_parameters.

A rule takes the parameters, the number of rotated inputs of a head and the model's positions, and returns frequencies
(dims / 2,) float32 and the factor of cosines and sines.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.engine.fields import NotComputed
from lowbit.errors import CheckpointError

Parameters = Mapping[str, Any]
Frequencies = tuple[Tensor, float]


def plain_frequencies(dims: int, theta: float) -> Tensor:
    """theta^(-2 j / dims) for dims / 2 pairs, in float32 as in transformers."""
    if not theta > 0:
        raise CheckpointError(f"config.json: rope_theta is {theta}, and must be above 0: the file is damaged")
    return 1.0 / powers(dims, theta)


def powers(dims: int, theta: float) -> Tensor:
    """theta^(2 j / dims) for dims / 2 pairs."""
    return torch.pow(theta, torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)


def linear(rope: Parameters, dims: int, positions: int) -> Frequencies:
    """All frequencies divided by `factor`."""
    return plain_frequencies(dims, rope["rope_theta"]) / rope["factor"], 1.0


def dynamic(rope: Parameters, dims: int, positions: int) -> Frequencies:
    """Plain frequencies: others come with sequences longer than the model's positions, which the engine refuses."""
    return plain_frequencies(dims, rope["rope_theta"]), 1.0


def llama3(rope: Parameters, dims: int, positions: int) -> Frequencies:
    """Llama 3.1: slow pairs are divided by `factor`, fast ones stay; a ramp leads from one to the other.

    A pair is slow if it turns less than low_freq_factor times within the positions of training, and fast from
    high_freq_factor turns on.
    """
    plain = plain_frequencies(dims, rope["rope_theta"])
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    waves = 2 * math.pi / plain
    slow, fast = waves > length / low, waves < length / high
    ramp = (length / waves - low) / (high - low)
    between = (1 - ramp) * plain / rope["factor"] + ramp * plain
    return torch.where(slow, plain / rope["factor"], torch.where(fast, plain, between)), 1.0


def yarn(rope: Parameters, dims: int, positions: int) -> Frequencies:
    """YaRN (arXiv 2309.00071): pairs below `beta_slow` turns are divided by `factor`, those above `beta_fast` stay."""
    theta, length, factor = rope["rope_theta"], rope["original_max_position_embeddings"], rope["factor"]
    factor = positions / length if factor is None else factor
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    first, last = (dims * math.log(length / (each * 2 * math.pi)) / (2 * math.log(theta)) for each in turns)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    width = last - first or 0.001
    stays = 1 - ((torch.arange(dims // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    spread = powers(dims, theta)
    frequencies = 1.0 / (factor * spread) * (1 - stays) + 1.0 / spread * stays
    scaling = rope.get("attention_factor")
    return frequencies, yarn_scaling(rope, factor) if scaling is None else scaling


def yarn_scaling(rope: Parameters, factor: float) -> float:
    """YaRN's factor of cosines and sines, in which DeepSeek's files have two of their own."""
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")

    def scaling(of: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * of * math.log(factor) + 1.0

    return scaling(above) / scaling(below) if above and below else scaling(1)


def longrope(rope: Parameters, dims: int, positions: int, long: bool = False) -> Frequencies:
    """LongRoPE (arXiv 2402.13753): each pair has a divisor, and another one in sequences beyond those of training."""
    length, factor = rope["original_max_position_embeddings"], rope.get("factor")
    divisors = rope["long_factor" if long else "short_factor"]
    if len(divisors) != dims // 2:
        raise NotComputed(f"rope_parameters turn {2 * len(divisors)} inputs of a head; this family turns {dims}")
    factor = positions / length if factor is None else factor
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * powers(dims, rope["rope_theta"])), scaling


def proportional(rope: Parameters, dims: int, positions: int) -> Frequencies:
    """Plain frequencies of a head whose last pairs, all but a share of them, are not rotated (Gemma 4)."""
    turned = int(rope.get("partial_rotary_factor", 1.0) * dims // 2)
    frequencies = plain_frequencies(dims, rope["rope_theta"])
    frequencies[turned:] = 0
    return frequencies / rope.get("factor", 1.0), 1.0


RULES: dict[str, Callable[[Parameters, int, int], Frequencies]] = {
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "longrope": longrope,
    "llama3": llama3,
    "proportional": proportional,
}
WHOLE_HEADS = ("proportional",)  # rules that take the width of a head, and rotate a share of it themselves
