"""GGUF, the files of llama.cpp: one file with hyperparameters, tokenizer and tensors in blocks."""
