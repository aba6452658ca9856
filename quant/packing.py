"""The canonical bit order: unsigned codes in int32 words, lowest bits first. No other Python code shifts bits."""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` packed into words along the last dimension.

    codes   (..., k)  unsigned values below 2^bits, any integer dtype
    return  (..., ceil(k * bits / 32))  int32; element i of a word starts at bit i * bits; unused bits are zero
    """
    per_word = 32 // bits
    padding = -codes.shape[-1] % per_word
    values = torch.nn.functional.pad(codes.to(torch.int32), (0, padding)).unflatten(-1, (-1, per_word))
    words = torch.zeros(values.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        words |= values[..., i] << (i * bits)
    return words


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """The first `k` codes of each row of words, uint8. The inverse of `pack`.

    words   (..., ceil(k * bits / 32))  int32
    return  (..., k)  uint8
    """
    per_word = 32 // bits
    expected = -(-k // per_word)
    if words.shape[-1] != expected:
        raise ValueError(f"{words.shape[-1]} words a row cannot hold {k} codes of {bits} bits: {expected} are needed")
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2)[..., :k].to(torch.uint8)
