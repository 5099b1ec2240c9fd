"""Small whole numbers as bit planes."""

from __future__ import annotations


def planes_length(count: int, width: int) -> int:
    """The bytes that ``count`` numbers of ``width`` bits take."""
    return width * -(-count // 8)
