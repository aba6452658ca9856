"""lowbit's kernels inside other programs. Nothing in lowbit imports this package."""

if __name__ == "integrations":
    raise ImportError("the import name is lowbit: write lowbit.integrations instead of integrations")
