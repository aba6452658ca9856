"""Calibration: texts in, statistics of every site out, and the pipeline that quantizes a model block by block."""
