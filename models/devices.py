"""Names of devices, as users write them."""

import torch

from lowbit.errors import DeviceError


def check_device(device: str) -> str:
    """`device` in torch's spelling, with `auto` resolved. DeviceError where it is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise DeviceError(f"device {device!r}: write cpu, cuda, or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {device!r}: torch {torch.__version__} sees no GPU here; use --device cpu")
    return device
