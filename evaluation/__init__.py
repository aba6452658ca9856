"""What was lost: perplexity and samples of text, before and after."""

if __name__ == "evaluation":
    raise ImportError("the import name is lowbit: write lowbit.evaluation instead of evaluation")
