"""The rows of a step that checks drafts."""

ROWS = 8  # of a step: up to 8, products and attention add up in the order of a single row
MOST_SEQUENCES = 4
WIDTHS = (1, 2, 4, 8)  # rows of each sequence: few, since each has its own graphs


def wide(rows: int) -> int:
    """The least width that holds so many rows of a sequence."""
    return next(width for width in WIDTHS if width >= rows)
