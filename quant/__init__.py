"""The core: number types, schemes, the reference arithmetic, algorithms and kernels. It imports nothing above it."""

__version__ = "0.1.0"
