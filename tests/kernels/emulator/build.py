"""The extension for the emulator: the kernels' sources under g++, each object cached by the hash of its sources."""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowbit.quant.kernels.units import units_in

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "quant" / "kernels" / "csrc"
KEPT = ROOT / "build" / "emulator"
SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}
UNITS = [
    *((unit.source, unit.defines) for unit in units_in(CSRC) if not unit.cutlass),
    *((source, ()) for source in ("scheduler.cpp", "tensor.cpp")),
]
# Number types that mistakes are not looked for in, unless a test says in which.
OTHERS = {
    *(f"LOWBIT_{axis}={name}" for axis in ("NUMBER", "WHOLE") for name in ("Fp4", "Fp8")),
    *(f"LOWBIT_NUMBER=Int{bits}" for bits in (2, 3, 5, 6, 7)),
    *(f"LOWBIT_CACHE={name}Cache" for name in ("Fp8", "Int4")),
    "LOWBIT_CODES=__nv_fp8_e4m3",
}
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-w", "-fvisibility=hidden", "-fno-strict-aliasing", "-x", "c++")
# Hopper's code, whatever `architectures` says to Python: it is what the emulated GPU claims to be.
DEFINES = ("-D__CUDA_ARCH_FEAT_SM90_ALL", '-DLOWBIT_ARCHITECTURES="90a"')


@dataclass(frozen=True)
class Mutant:
    """A mistake to be found: `source` with its one `old` as `new`."""

    source: str
    old: str
    new: str


def reason_against() -> str | None:
    """The reason why the emulator cannot be built here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"fibers are written for Linux on x86_64, this is {platform.system()} on {platform.machine()}"
    if shutil.which("g++") is None:
        return "no g++"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11"
    return None if cuda_headers() else "no CUDA headers: neither beside nvcc nor under CUDA_HOME or /usr/local/cuda"


@cache
def cuda_headers() -> Path | None:
    """The folder of cuda_runtime.h, or None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_runtime.h").exists()), None)


def build(mutant: Mutant | None = None, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Path:
    """The library, with the mistake of `mutant` if there is one. RuntimeError with g++'s output if compilation
    fails.

    only     the kernels' sources that it is of; all if there are none
    without  macros of units that it is not of; of a mutant those of OTHERS if there are none
    """
    sources = read_sources(mutant)
    folder = KEPT / f"sources-{hash_of(*sources, *sources.values())}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        (folder / name).write_text(text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        left_out = set(without) or (OTHERS if mutant else set())
        units = [unit for unit in UNITS if not left_out.intersection(unit[1])]
        units = [unit for unit in units if not only or unit[0] in only or not unit[0].endswith(".cu")]
        objects = list(pool.map(lambda unit: compile_unit(folder, sources, *unit), units))
    library = KEPT / f"{hash_of(*map(str, objects))}.so"
    if not library.exists():
        run("-shared", *map(str, objects), target=library)
    return library


def read_sources(mutant: Mutant | None) -> dict[str, str]:
    """Every source by its name: csrc's, or the emulator's replacement with the same name."""
    paths = [path for folder in (CSRC, HERE) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    sources = {path.name: path.read_text() for path in paths}
    if mutant:
        text = sources[mutant.source]
        if text.count(mutant.old) != 1:
            raise RuntimeError(f"{mutant.source} has {text.count(mutant.old)} times, not once: {mutant.old}")
        sources[mutant.source] = text.replace(mutant.old, mutant.new)
    return sources


def compile_unit(folder: Path, sources: dict[str, str], source: str, defines: tuple[str, ...]) -> Path:
    """The object of one of UNITS, compiled if it is not cached."""
    flags = [*FLAGS, *DEFINES, *(f"-D{define}" for define in defines)]
    if source.endswith(".cu"):
        flags += ["-include", "emulator.h"]
    included = [sources[name] for name in sorted(included_by(source, sources))]
    target = KEPT / f"{source}-{hash_of(compiler(), *flags, *included)}.o"
    if not target.exists():
        import pybind11  # beside the extension's compiler, and as optional

        folders = [folder, cuda_headers(), pybind11.get_include(), sysconfig.get_path("include")]
        run(*flags, *(f"-I{each}" for each in folders), "-c", str(folder / source), target=target)
    return target


def included_by(source: str, sources: dict[str, str]) -> set[str]:
    """The sources that are read to compile `source`: itself, emulator.h, and all headers that these include."""
    found, left = set(), [source, "emulator.h"]
    while left:
        name = left.pop()
        found.add(name)
        left += [each for each in re.findall(r'#include "([^"]+)"', sources[name]) if each in sources.keys() - found]
    return found


@cache
def compiler() -> str:
    """The version of g++, and the CUDA headers it reads."""
    version = subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout
    return f"{version} {cuda_headers()}"


def run(*arguments: str, target: Path) -> None:
    """Run g++ so that `target` appears complete or not at all."""
    unfinished = target.with_suffix(f".{os.getpid()}{target.suffix}")
    command = ["g++", *arguments, "-o", str(unfinished)]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"building the emulator failed at\n  {' '.join(command)}\n{found.stderr[-4000:]}")
    unfinished.replace(target)


def hash_of(*texts: str) -> str:
    """A name for `texts`."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
