"""Panels: the order of inputs in which wna16_gemv reads several rows.

A warp reads 32 inputs of 8 rows at once. From rows (m, k) these are halves of 8 lines of 128 bytes, in panels 512
adjacent bytes. The kernel that computes the inputs stores them so. docs/kernels/wna16_gemv.md has what it saves.

    panels (k / 32, m, 32) = rows (m, k / 32, 32) transposed

Memory holds 8 rows of each panel, or 16 for more than 8 rows: those past m are never written, and what a product
computes of them is dropped.
"""

from torch import Tensor

WIDTH = 32  # inputs of a panel
HEIGHTS = (8, 16)  # rows of a panel in memory


def height_for(m: int) -> int:
    """Rows of a panel in memory, for m rows."""
    return next(height for height in HEIGHTS if m <= height)


def fits(m: int, k: int) -> bool:
    """True if rows (m, k) can be in panels."""
    return m <= HEIGHTS[-1] and k % WIDTH == 0


def empty(like: Tensor, m: int, k: int) -> Tensor:
    """Memory for m rows of k inputs, in the dtype and on the device of `like`: (k / 32, m, 32)."""
    return like.new_empty(k // WIDTH, height_for(m), WIDTH)[:, :m]


def panels_of(rows: Tensor) -> Tensor:
    """The rows (m, k) in panels."""
    return empty(rows, *rows.shape).copy_(rows.unflatten(1, (-1, WIDTH)).transpose(0, 1))


def rows_of(x: Tensor) -> Tensor:
    """x as rows (m, k)."""
    return x.transpose(0, 1).flatten(1) if x.ndim == 3 else x


def shape_of(x: Tensor) -> tuple[int, int]:
    """(m, k) of x, rows or panels."""
    if x.ndim == 3:
        return x.shape[1], x.shape[0] * x.shape[2]
    return x.shape[0], x.shape[1]


def height_of(x: Tensor | None) -> int:
    """Rows of a panel of x in memory; 0 for rows, or None."""
    return x.stride(0) // WIDTH if x is not None and x.ndim == 3 else 0


def reason_against(x: Tensor) -> str | None:
    """The reason why x, of three dimensions, is not in panels, or None."""
    m = shape_of(x)[0]
    if x.shape[2] != WIDTH or not 0 < m <= HEIGHTS[-1]:
        return f"panels have the shape (k / {WIDTH}, m, {WIDTH}) of at most {HEIGHTS[-1]} rows, not {tuple(x.shape)}"
    strides = (height_for(m) * WIDTH, WIDTH, 1)
    return None if x.stride() == strides else f"panels have strides {x.stride()}, of {m} rows they are {strides}"
