"""The compilation units of the extension, for setup.py and the tests' emulator. Needs no torch."""

import re
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path
from typing import NamedTuple

# A source is compiled once for every combination of values of the macros it mentions, so that they compile in parallel.
WHOLE = ("Int4", "Int8", "Fp4", "Fp8")  # numbers that divide a word evenly
AXES = {
    "LOWBIT_T": ("__half", "__nv_bfloat16"),
    "LOWBIT_NUMBER": (*WHOLE, "Int2", "Int3", "Int5", "Int6", "Int7"),
    "LOWBIT_WHOLE": WHOLE,
    "LOWBIT_TILE": ("0", "1"),
    "LOWBIT_CODES": ("int8_t", "__nv_fp8_e4m3"),
    "LOWBIT_CACHE": ("SameCache", "Int8Cache", "Fp8Cache", "Int4Cache"),
}
HOPPER = "LOWBIT_WGMMA"  # in sources for sm_90a alone; defined empty elsewhere
CUTLASS = "#include <cutlass/"


class Unit(NamedTuple):
    """A source with its macros.

    hopper   True if the code is for sm_90a alone
    cutlass  True if it includes CUTLASS's headers, which cost forty seconds of nvcc per unit
    """

    source: str
    defines: tuple[str, ...]
    hopper: bool
    cutlass: bool


def units_in(folder: Path, sample: bool = False) -> list[Unit]:
    """The units of the sources in `folder`: CUTLASS first, then by length, since these take the longest to compile.

    sample  as many units of a source as its macro with the most values has, so that each value occurs
    """
    sources = sorted((path for path in folder.iterdir() if path.suffix in (".cu", ".cpp")), key=lambda path: path.name)
    texts = {path.name: path.read_text() for path in sources}
    units = [unit for source, text in texts.items() for unit in _units_of(source, text, sample)]
    return sorted(units, key=lambda unit: (not unit.cutlass, -len(texts[unit.source])))


def _units_of(source: str, text: str, sample: bool) -> Iterator[Unit]:
    cutlass = CUTLASS in text
    named = [name for name in AXES if re.search(rf"\b{name}\b", text)]
    axes = [AXES[name] for name in named]
    for values in _together(axes) if sample and axes else product(*axes):
        defines = tuple(f"{name}={value}" for name, value in zip(named, values, strict=True))
        yield Unit(source, defines, cutlass or HOPPER in text, cutlass)


def _together(axes: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """The values of all axes side by side, shorter axes from their start again."""
    return islice(zip(*map(cycle, axes), strict=True), max(map(len, axes)))
