"""Calibration: texts in, statistics of every site out, and the pipeline that quantizes a model block by block."""

if __name__ == "calibrate":
    raise ImportError("the import name is lowbit: write lowbit.calibrate instead of calibrate")
