"""The processes in which programs nobody has read run: their walls, and how a verdict comes out of them.

Imported by a bare interpreter, so all of it needs the standard library alone.
"""
