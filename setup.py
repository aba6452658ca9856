"""Builds lowbit.quant._C from quant/kernels/csrc with nvcc and pybind11; without nvcc, a pure-Python install.

Environment:
  LOWBIT_CUDA_ARCHS  architectures to compile for, default "80 86 89 90a 90+PTX"; "90a" alone takes 7 minutes on 2 cores
  LOWBIT_CUDA_SAMPLE "1" compiles every dtype and number type, but not every pair of them: a check in half the time, for
                     machines that run no kernel
  LOWBIT_CUDA        "0" leaves the extension out, "1" makes a missing nvcc an error; unset builds if there is an nvcc
  CUDA_HOME          directory of nvcc, used before PATH
  CUTLASS_PATH       a copy of CUTLASS, used before the package nvidia-cutlass
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# One import name: the folder `quant` is the package lowbit.quant. For a bare checkout lowbit/ holds a link to each.
FOLDERS = ("quant", "export", "models", "calibrate", "engine", "evaluation", "serve", "commands", "integrations")

SOURCES = Path("quant/kernels/csrc")
DEFAULT_ARCHITECTURES = "80 86 89 90a 90+PTX"
SAMPLE = os.environ.get("LOWBIT_CUDA_SAMPLE") == "1"
UNITS = runpy.run_path("quant/kernels/units.py")["units_in"](SOURCES, SAMPLE)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidate = Path(home) / "bin" / "nvcc" if home else None
    if candidate and candidate.exists():
        return str(candidate)
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cutlass_flags() -> list[str]:
    """nvcc's flags for CUTLASS: its include directories. RuntimeError without them."""
    home = os.environ.get("CUTLASS_PATH")
    package = importlib.util.find_spec("cutlass_library")
    if home is None and package is not None and package.origin is not None:
        home = str(Path(package.origin).with_name("source"))
    include = Path(home or "") / "include"
    if home is None or not (include / "cutlass" / "cutlass.h").exists():
        where = f"not in {include}, where CUTLASS_PATH says" if home else "nowhere"
        raise RuntimeError(
            f"CUTLASS's headers are {where}: pip install nvidia-cutlass, set CUTLASS_PATH to a copy of CUTLASS 4, or "
            "set LOWBIT_CUDA=0 for an install without CUDA"
        )
    macros = ["-DNDEBUG", "-DCUTLASS_ENABLE_GDC_FOR_SM90"]
    return [
        *macros,
        "--expt-relaxed-constexpr",
        "-I",
        str(include),
        "-I",
        str(include.parent / "tools" / "util" / "include"),
    ]


def architecture_flags(names: list[str]) -> list[str]:
    """nvcc's -gencode for "90a" (machine code) and "90+PTX" (code that newer GPUs compile at load)."""
    flags = []
    for name in names:
        arch, _, ptx = name.partition("+")
        kind = "compute" if ptx == "PTX" else "sm"
        flags += ["-gencode", f"arch=compute_{arch},code={kind}_{arch}"]
    return flags


class BuildCuda(build_ext):
    """nvcc for every unit, then one link against the static CUDA runtime. No torch header is read."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("LOWBIT_CUDA=1 but no nvcc: put it on PATH, set CUDA_HOME, or unset LOWBIT_CUDA")
        architectures = os.environ.get("LOWBIT_CUDA_ARCHS", DEFAULT_ARCHITECTURES).split()
        temporary = Path(self.build_temp)
        temporary.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            jobs = [pool.submit(self.compile, nvcc, architectures, temporary, unit) for unit in UNITS]
            objects = [job.result() for job in jobs]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.call([nvcc, "-shared", "--cudart", "static", "-o", str(target), *map(str, objects)])

    def compile(self, nvcc: str, architectures: list[str], temporary: Path, unit: Any) -> Path:
        """The object of one of UNITS."""
        import pybind11  # needed only for building

        target = temporary / ("-".join([unit.source, *unit.defines]).replace("=", "_") + ".o")
        command = [
            nvcc,
            "-std=c++20",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "-c",
            str(SOURCES / unit.source),
        ]
        command += [f"-D{define}" for define in (*unit.defines, f'LOWBIT_ARCHITECTURES="{" ".join(architectures)}"')]
        command += ["-I", pybind11.get_include(), "-I", sysconfig.get_path("include"), "-o", str(target)]
        if unit.cutlass:
            command += cutlass_flags()
        # empty elsewhere: compiled for 90a alone, or for what there is
        if unit.hopper:
            command += architecture_flags([name for name in architectures if name == "90a"] or architectures[:1])
        elif unit.source.endswith(".cu"):
            command += architecture_flags(architectures)
        self.call(command)
        return target

    def call(self, command: list[str]) -> None:
        """Run `command`. If it fails, its last lines of output are the error. Prints warnings that slow tensor
        products."""
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        lines = (result.stdout + result.stderr).strip().splitlines()
        if result.returncode:
            output = "\n".join(lines[-30:])
            raise RuntimeError(f"building lowbit.quant._C failed at\n  {' '.join(command)}\n{output}")
        for line in lines:
            if "Potential Performance Loss" in line:
                print(line)


def extensions() -> list[Extension]:
    wanted = os.environ.get("LOWBIT_CUDA")
    if wanted == "0" or (wanted != "1" and find_nvcc() is None):
        return []
    return [Extension("lowbit.quant._C", [str(SOURCES / unit.source) for unit in UNITS])]


def packages() -> list[str]:
    """Every package by its import name."""
    below = find_packages(include=[*FOLDERS, *(f"{folder}.*" for folder in FOLDERS)])
    return ["lowbit", "lowbit.api", *(f"lowbit.{name}" for name in below)]


setup(
    packages=packages(),
    package_dir={f"lowbit.{folder}": folder for folder in FOLDERS},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCuda},
)
