"""The units that the extension is compiled from: setup.py and the tests' emulator both ask here. Needs no torch."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

# A source is compiled once for every value of each of these macros that it names, so that they compile in parallel.
AXES = {"LOWBIT_T": ("__half", "__nv_bfloat16"), "LOWBIT_BITS": ("4", "8"), "LOWBIT_TILE": ("0", "1")}
HOPPER = "LOWBIT_WGMMA"  # this macro is in a source that is for sm_90a alone, and empty elsewhere
CUTLASS = "#include <cutlass/"


class Unit(NamedTuple):
    """A source and its macros.

    hopper   True if the code is for sm_90a alone
    cutlass  True if it is made of CUTLASS's headers: such a product costs forty seconds of nvcc
    """

    source: str
    defines: tuple[str, ...]
    hopper: bool
    cutlass: bool


def units_in(folder: Path) -> list[Unit]:
    """The units of the sources in `folder`, those of CUTLASS first and then the longest, which take the most time."""
    sources = sorted((path for path in folder.iterdir() if path.suffix in (".cu", ".cpp")), key=lambda path: path.name)
    texts = {path.name: path.read_text() for path in sources}
    units = [unit for source, text in texts.items() for unit in _units_of(source, text)]
    return sorted(units, key=lambda unit: (not unit.cutlass, -len(texts[unit.source])))


def _units_of(source: str, text: str) -> Iterator[Unit]:
    cutlass = CUTLASS in text
    named = [name for name in AXES if re.search(rf"\b{name}\b", text)]
    for values in product(*(AXES[name] for name in named)):
        defines = tuple(f"{name}={value}" for name, value in zip(named, values, strict=True))
        yield Unit(source, defines, cutlass or HOPPER in text, cutlass)
