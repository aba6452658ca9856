"""Measurements of quality before and after quantization: perplexity, divergence, tasks, generated text and code."""

if __name__ == "evaluation":
    raise ImportError("the import name is lowbit: write lowbit.evaluation instead of evaluation")
