"""Calibration: statistics of every site from texts, and the pipeline that quantizes a model block by block."""

if __name__ == "calibrate":
    raise ImportError("the import name is lowbit: write lowbit.calibrate instead of calibrate")
