"""Device names in the user's notation."""

import psutil
import torch

from lowbit.errors import DeviceError


def check_device(device: str) -> str:
    """`device` in torch's spelling, with `auto` resolved. DeviceError if it does not exist."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        named = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"device {device!r}: write cpu, cuda, or cuda:1") from None
    if named.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {device!r}: {named.type} is not supported; write cpu, cuda, or cuda:1")
    if named.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {device!r}: torch {torch.__version__} sees no GPU here; use --device cpu")
    if named.type == "cuda" and (named.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {device!r}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return device


def free_bytes(device: str) -> int:
    """Free memory of a device: the GPU's, or the host's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
