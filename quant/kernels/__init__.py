"""Kernels for quantized weights: one operator, a plain-torch reference on every device, CUDA where it was built."""
