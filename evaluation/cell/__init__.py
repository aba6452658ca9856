"""The processes that run generated programs: their walls, and the verdict.

They run in a bare interpreter, so this package imports only the standard library.
"""
