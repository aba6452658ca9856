"""A GGUF file alone as a model directory: in the cache, with config.json and a tokenizer made from its keys."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from lowbit.export.gguf.container import HEAD_NAME
from lowbit.export.gguf.file import read_header
from lowbit.export.gguf.foreign import unpack
from lowbit.export.sharded import CONFIG_NAME
from lowbit.models.cache import cache_dir


def directory_of(file: Path) -> Path:
    """The model directory of a GGUF `file`: its own if config.json is there and it has our name, else one in the cache.

    The file in the cache is a hard link, or a copy on another disk. CheckpointError for a damaged file, and for a
    family or a setting that is not read from keys.
    """
    if file.name == HEAD_NAME and (file.parent / CONFIG_NAME).exists():
        return file.parent
    real, parent = Path(os.path.realpath(file)), cache_dir() / "gguf"
    found = os.stat(real)  # without the time of the last change, which a hard link moves
    key = f"{real}\n{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}"
    place = parent / hashlib.sha256(key.encode()).hexdigest()[:24]
    if (place / HEAD_NAME).exists():
        return place
    header = read_header(real)
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        unpack(header, made)
        try:
            os.link(real, made / HEAD_NAME)
        except OSError:
            shutil.copyfile(real, made / HEAD_NAME)
        if not place.exists():
            made.rename(place)
    return place
