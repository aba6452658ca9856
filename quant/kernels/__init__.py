"""Kernels for quantized weights: one operator per task, with a plain-torch reference on every device, and CUDA if
built."""
