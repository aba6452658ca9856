"""Our kernels inside other people's programs; nothing of ours imports this."""
