"""A check of the token ids in a tokenizer's files, before a library sizes arrays by the largest of them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError
from lowbit.export.files import read_bytes
from lowbit.export.plain import parse_json

MOST_IDS = 10_000_000  # forty times the largest vocabulary of today
LARGEST = 1 << 128  # transformers writes 10^30 for a length without limit
LONG = re.compile(rb"[0-9]{8}")  # digits of MOST_IDS: files without such a number are not parsed


def require_small_ids(directory: Path) -> None:
    """CheckpointError if a token id of the tokenizer in `directory` is MOST_IDS or larger.

    The tokenizers library allocates an element for each id up to the largest: a single id of 2^31 takes 8 GiB and then
    ends the process.
    """
    for name, ids_of in IDS.items():
        path = directory / name
        if not path.is_file() or not LONG.search(raw := read_bytes(path)):
            continue
        largest = max((each for each in ids_of(parse_json(raw, path, LARGEST)) if isinstance(each, int)), default=0)
        if largest >= MOST_IDS:
            raise CheckpointError(
                f"{path}: token id {largest}; ids end below {MOST_IDS:,} here, since memory is taken for all of them"
            )


def _of_tokenizer(value: Any) -> Iterator[Any]:
    """Ids in tokenizer.json. A vocabulary that is a list has none: positions are ids."""
    yield from _of_vocabulary(_part(_part(value, "model"), "vocab"))
    added = _part(value, "added_tokens")
    yield from (_part(token, "id") for token in (added if isinstance(added, list) else ()))


def _of_vocabulary(value: Any) -> Iterator[Any]:
    """Ids in vocab.json and added_tokens.json: the values."""
    yield from value.values() if isinstance(value, dict) else ()


def _of_settings(value: Any) -> Iterator[Any]:
    """Ids in tokenizer_config.json: the keys of its added tokens."""
    added = _part(value, "added_tokens_decoder")
    yield from (int(key) for key in (added if isinstance(added, dict) else ()) if key.isdecimal())


def _part(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


IDS = {
    "tokenizer.json": _of_tokenizer,
    "vocab.json": _of_vocabulary,
    "added_tokens.json": _of_vocabulary,
    "tokenizer_config.json": _of_settings,
}
