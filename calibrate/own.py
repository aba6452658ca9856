"""The model's own text: windows that the unquantized model writes, to calibrate on more than one kind of text.

Methods that learn do so on the kind of text that they are given. A model's own text has all kinds that it was trained
on: each piece begins with a token of the vocabulary, every one as likely, and goes on with draws from the model's own
distribution, unchanged (Liu et al., LLM-QAT, Findings of ACL 2024, who take the likeliest for the first few). If the
recipe's `own_prompt` says so, every second piece begins with tokens of the dataset instead, and goes on in its kind.
Every part of a recipe calibrates on `own_samples` windows of it; tuning alone reads `distill_samples` more.

Draws differ from one device to the next, and a resumed run needs the same: they are kept in the cache directory.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import GenerationConfig

from lowbit.errors import CheckpointError
from lowbit.export.files import replacing
from lowbit.models.cache import cache_dir
from lowbit.models.skeleton import fill_all, open_skeleton
from lowbit.models.source import Source
from lowbit.progress import Step, tell

PIECE = 512  # most tokens of a text; longer windows hold several
MOST_CACHE = 8 << 30  # bytes of keys and values
WRITING = "writing text of its own"


def own_text(
    source: Source, device: str, dtype: torch.dtype, shape: tuple[int, int], seed: int, prompts: Tensor | None = None
) -> Tensor:
    """Token ids of `shape` (windows, length) int64 that the model writes in `dtype` on `device`, where it is in memory
    meanwhile; on a CPU in float32.

    prompts  (n, tokens) int64  that every second piece begins with, by turns; None for tokens of the vocabulary alone

    CheckpointError if the model cannot generate.
    """
    windows, length = shape
    skeleton = fill_all(open_skeleton(source, original=True), device, torch.float32 if device == "cpu" else dtype)
    model = skeleton.model
    if not model.can_generate():
        raise CheckpointError(f"{type(model).__name__} writes no text: --own-samples 0 calibrates on the dataset alone")
    pieces = windows * -(-length // PIECE)
    size = min(length, PIECE)
    half = 0 if prompts is None else pieces // 2
    begun = [_first_tokens(source, pieces - half, seed)]
    if prompts is not None:
        begun.append(prompts[torch.arange(half) % len(prompts), : size - 1])
    model.generation_config = GenerationConfig()  # without the model's penalties, and without an end
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0, "max_length": size}
    rows: list[Tensor] = []
    with torch.no_grad(), torch.random.fork_rng([] if device == "cpu" else [device]):
        torch.manual_seed(seed)
        for part in (part for first in begun for part in first.split(_together(source, size, dtype))):
            tell(Step(WRITING, sum(map(len, rows)), pieces))
            ids = part.to(device)
            rows.append(model.generate(ids, attention_mask=torch.ones_like(ids), **settings).cpu())
    by_turns = torch.cat([2 * torch.arange(pieces - half), 2 * torch.arange(half) + 1]).argsort()
    return torch.cat(rows)[by_turns].view(windows, -1)[:, :length]


def prompts_of(ids: Tensor, count: int, tokens: int, seed: int) -> Tensor | None:
    """`count` pieces of at most `tokens` tokens from anywhere in the windows `ids` (n, length): (count, tokens); None
    without windows or tokens."""
    tokens = min(tokens, ids.shape[1]) if len(ids) else 0
    if not tokens:
        return None
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(len(ids), (count, 1), generator=generator)
    places = torch.randint(ids.shape[1] - tokens + 1, (count, 1), generator=generator)
    return ids[windows, places + torch.arange(tokens)]


def kept_own_text(
    source: Source,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    seed: int,
    sums: Mapping[str, str],
    prompts: Tensor | None = None,
) -> Tensor:
    """`own_text`, or that of an earlier run with the same model, settings and kind of device.

    sums  SHA-256 of the model's files, by name
    """
    told: list[Any] = [] if prompts is None else [prompts.tolist()]
    told += [*sorted(sums.items()), torch.device(device).type, str(dtype), shape, seed, torch.__version__]
    place = cache_dir() / "own" / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:32]}.safetensors"
    found = _kept(place, shape, source.vocabulary)
    if found is not None:
        return found
    ids = own_text(source, device, dtype, shape, seed, prompts).contiguous()
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as file:
        file.write(save({"ids": ids}))
    return ids


def _kept(place: Path, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    """The token ids in the file `place`, if they are there and whole."""
    try:
        ids = load_file(place)["ids"]
    except (OSError, SafetensorError, KeyError):
        return None
    good = (
        ids.dtype == torch.int64 and tuple(ids.shape) == shape and int(ids.min()) >= 0 and int(ids.max()) < vocabulary
    )
    return ids if good else None


def _first_tokens(source: Source, pieces: int, seed: int) -> Tensor:
    """A token to begin each piece with (pieces, 1): drawn from all that are not special."""
    tokenizer = source.tokenizer()
    special = set(tokenizer.all_special_ids)
    known = min(len(tokenizer), source.vocabulary)
    plain = torch.tensor([token for token in range(known) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    return plain[torch.randint(len(plain), (pieces, 1), generator=generator)]


def _together(source: Source, length: int, dtype: torch.dtype) -> int:
    """Pieces to write at a time, so that their keys and values take at most MOST_CACHE bytes."""
    config = source.config.get_text_config()
    heads, sizes = (source.of_layers(name) for name in ("num_key_value_heads", "head_dim"))
    width = sum(count * size for count, size in zip(heads, sizes, strict=False))
    one = 2 * (width or config.num_hidden_layers * config.hidden_size) * length * dtype.itemsize
    return max(1, min(MOST_CACHE // one, 1024))
