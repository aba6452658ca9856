"""The compiled extension lowbit.quant._C, or None if it is not built."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

EXTENSION: ModuleType | None
try:
    EXTENSION = importlib.import_module("lowbit.quant._C")
except ImportError:
    EXTENSION = None


def launch(
    kernel: str, *variant: torch.dtype | int | str, device: torch.device, args: Mapping[str, Any], **cut: Any
) -> None:
    """Launch a kernel on the device's current stream.

    kernel, variant  the name and the types in csrc's declaration of it
    args             a value for each field of its arguments, by name: a tensor, None for an absent one, a number, or
                     the text of an enum's value
    cut              the same for its launch, except `device`

    ValueError if a field has no value, or a value no field. RuntimeError, with CUDA's message, if the launch fails.
    """
    assert EXTENSION is not None
    name = " ".join((kernel, *(str(part).removeprefix("torch.") for part in variant)))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        EXTENSION.launch(name, args, {"device": device.index, **cut}, stream)


def reason_against_device(capability: tuple[int, int]) -> str | None:
    """The reason why no built code runs on a GPU with this compute capability, or None."""
    if EXTENSION is None:
        return "lowbit.quant._C was not built (pip install --no-build-isolation -e . with nvcc on PATH)"
    return reason_against_capability(capability, EXTENSION.architectures)


def reason_against_90a() -> str | None:
    """The reason why code for sm_90a does not run on a GPU with compute capability 9.0, or None."""
    reason = reason_against_device((9, 0))
    if reason is None and EXTENSION is not None and "90a" not in EXTENSION.architectures.split():
        return f"it needs code for 90a, lowbit.quant._C was built for {EXTENSION.architectures}"
    return reason


def reason_against_capability(capability: tuple[int, int], architectures: str) -> str | None:
    """The reason why no code in `architectures` ("80 90a 90+PTX") runs on this compute capability, or None.

    Machine code runs on its own version and on newer ones of the same major version ("90a" only on 9.0); PTX runs on
    all newer GPUs. Exception: PTX from before 9.0 does not run on 9.0 or newer. There the launchers use clusters and
    dependent launch, whose barriers and waits this PTX lacks.
    """
    for name in architectures.split():
        number, _, ptx = name.partition("+")
        built = divmod(int(number.rstrip("a")), 10)
        same_major = capability[0] == built[0] and not number.endswith("a")
        waits = built >= (9, 0) or capability < (9, 0)
        if capability == built or (capability > built and (same_major or (ptx and waits))):
            return None
    major, minor = capability
    return f"the GPU is sm_{major}{minor}, lowbit.quant._C was built for {architectures} (LOWBIT_CUDA_ARCHS)"
