"""The public functions of lowbit: each takes plain values, reports progress to a callback and returns a value."""
