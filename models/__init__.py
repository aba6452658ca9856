"""Models as transformers defines them: skeleton, blocks, placement of the file's tensors, and the demo model."""

if __name__ == "models":
    raise ImportError("the import name is lowbit: write lowbit.models instead of models")
