"""Our kernels inside other people's programs; nothing of ours imports this."""

if __name__ == "integrations":
    raise ImportError("the import name is lowbit: write lowbit.integrations instead of integrations")
