"""The compiled extension quant._C, or None where it was not built."""

from types import ModuleType

try:
    from quant import _C as extension
except ImportError:
    extension = None

EXTENSION: ModuleType | None = extension


def reason_against_device(capability: tuple[int, int]) -> str | None:
    """Why no built code runs on a GPU of this compute capability, or None.

    Machine code runs within its major version from its own minor one up ("90a" on 9.0 alone); PTX on all newer GPUs.
    """
    if EXTENSION is None:
        return "quant._C was not built (pip install --no-build-isolation -e . with nvcc on PATH)"
    for name in EXTENSION.architectures.split():
        number, _, ptx = name.partition("+")
        built = divmod(int(number.rstrip("a")), 10)
        if capability == built or (not number.endswith("a") and capability[0] == built[0] and capability > built):
            return None
        if ptx and capability > built:
            return None
    major, minor = capability
    return f"the GPU is sm_{major}{minor}, quant._C was built for {EXTENSION.architectures} (LOWBIT_CUDA_ARCHS)"
