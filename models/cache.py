"""The cache directory: the only place in the package, with setup.py, that reads the environment."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """This user's directory of lowbit's files: $LOWBIT_CACHE, or else what the system has for caches (XDG)."""
    chosen = os.environ.get("LOWBIT_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else user_cache_path("lowbit", appauthor=False)
