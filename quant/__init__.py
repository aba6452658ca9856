"""The core: number types, schemes, the reference arithmetic, algorithms and kernels. It imports nothing above it."""

if __name__ == "quant":
    raise ImportError("the import name is lowbit: write lowbit.quant instead of quant")
