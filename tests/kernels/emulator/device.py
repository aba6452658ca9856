"""An emulated GPU: CPU tensors report the device cuda:0, and the wrappers launch the emulated kernels.

Tests run with it in a separate process: a read past a tensor ends that process, with the position on stderr.
"""

import ctypes
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
MAKES_OUTPUTS = (torch.empty, torch.empty_like, Tensor.new_empty)
PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
CUDA = {  # of torch.cuda, what the wrappers ask
    "device": lambda device: nullcontext(),
    "current_stream": lambda: SimpleNamespace(cuda_stream=0),
    "get_device_properties": lambda device: PROPERTIES,
    "get_device_capability": lambda device: (PROPERTIES.major, PROPERTIES.minor),
}
SECONDS = 1200  # of a child, however busy the machine


class Gpu(TorchFunctionMode):
    """Memory with guard pages, and what the previous kernel does to it. `with gpu:` is one launch on it.

    A tensor that is made within it is an output: full of NaN, and not to be written before the previous kernel ends.
    """

    def __init__(self, library: Path) -> None:
        super().__init__()
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_allocate.restype = ctypes.c_void_p
        self.library.emulator_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        for function in (self.library.emulator_late, self.library.emulator_untouched):
            function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def start(self, seed: int, case: Any = "") -> None:
        """Run everything that follows in the order of `seed`; in every third, copies land at once. Failures name
        `case`."""
        sys.stderr.write(f"seed {seed}: {case}\n")
        self.library.emulator_start(seed, ctypes.c_bool(seed % 3 == 0))

    def put(self, value: Any, alignment: int = 16) -> Any:
        """A copy of the tensor that ends just before a page without access, its first two dimensions in the same order
        in memory; for a dataclass, of all its tensors."""
        if isinstance(value, Tensor) and value.ndim > 1 and not value.is_contiguous():
            swapped = value.transpose(0, 1)
            return self.put(swapped).transpose(0, 1) if swapped.is_contiguous() else self.put(value.contiguous())
        if isinstance(value, Tensor):
            made = self.allocate(value.shape, value.dtype, alignment)
            made.copy_(value)
            return made
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{each.name: self.put(getattr(value, each.name)) for each in fields(value)})
        return value

    def allocate(self, shape: torch.Size, dtype: torch.dtype, alignment: int) -> Tensor:
        """A tensor full of ones: NaN in every float."""
        size = shape.numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        address = self.library.emulator_allocate(size, alignment)
        memory = (ctypes.c_uint8 * size).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)

    def late(self, *tensors: Tensor | None) -> None:
        """The previous kernel writes these: until a dependent launch has waited for it they hold NaN."""
        for tensor in tensors:
            if tensor is not None:
                self.library.emulator_late(tensor.data_ptr(), tensor.nbytes)

    def untouched(self, *tensors: Tensor | None) -> None:
        """The next launch writes these, but not before it has waited for the previous kernel."""
        for tensor in tensors:
            if tensor is not None:
                self.library.emulator_untouched(tensor.data_ptr(), tensor.nbytes)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function == Tensor.device.__get__:
            return DEVICE
        if function == Tensor.is_cuda.__get__:
            return True
        made = function(*args, **{name: value for name, value in (kwargs or {}).items() if name != "device"})
        if function in MAKES_OUTPUTS:
            made = self.allocate(made.shape, made.dtype, 16)
            self.untouched(made)
        elif function is torch.nn.functional.pad:
            made = self.put(made)
            self.late(made)
        return made

    def __enter__(self) -> "Gpu":
        self.patches = mock.patch.multiple(torch.cuda, **CUDA)
        self.patches.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.stop()


def load(library: Path) -> ModuleType:
    """The module _C that `library` is."""
    loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def failure_of(library: Path, check: Callable, *args: Any) -> str | None:
    """The failure of check(gpu, *args), run in a process of its own, or None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        child = context.Process(target=run_check, args=(log, library, check.__module__, check.__name__, args))
        child.start()
        child.join(SECONDS)
        if child.exitcode is None:
            child.kill()
            child.join()
        if child.exitcode == 0:
            return None
        said = log.read_text()[-4000:] if log.exists() else ""
        return f"the emulated kernels ended with {child.exitcode}:\n{said}"


def run_check(log: Path, library: Path, module: str, name: str, args: tuple) -> None:
    """The check `name` of `module`, on the emulator of `library`; what it writes to stderr goes to `log`.

    By name, because `module` must find the emulated lowbit.quant._C when it imports quant.
    """
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.modules["lowbit.quant._C"] = load(library)
    getattr(importlib.import_module(module), name)(Gpu(library), *args)
