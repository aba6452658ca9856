"""What was lost: perplexity and samples of text, before and after."""
