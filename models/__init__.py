"""What transformers knows of a model: its skeleton, its blocks, where each file tensor belongs, and the demo model."""

if __name__ == "models":
    raise ImportError("the import name is lowbit: write lowbit.models instead of models")
