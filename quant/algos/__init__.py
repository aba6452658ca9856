"""Rounders, transforms and searches: pure functions of tensors."""
