"""Small whole numbers as bit planes."""

from __future__ import annotations

import numpy as np


def planes_length(count: int, width: int) -> int:
    """The bytes that ``count`` numbers of ``width`` bits take."""
    return width * -(-count // 8)


def pack_planes(numbers: np.ndarray, width: int) -> bytes:
    """Each bit of all numbers as one bitmap, the lowest bits first; unused last bits of a bitmap are 0.

    Args:
        numbers: unsigned, less than ``2 ** width``.
        width: bits a number.
    """
    bits = [numbers >> bit & 1 for bit in range(width)]
    return np.packbits(np.array(bits, np.uint8), axis=1, bitorder="little").tobytes() if width else b""


def unpack_planes(part: memoryview, width: int, count: int) -> np.ndarray:
    """The numbers again.

    Args:
        part: ``planes_length(count, width)`` bytes.
        width: bits a number, at most 16.
        count: how many numbers.

    Returns:
        uint8 where the width allows it, else uint16; shape (count,).
    """
    dtype = np.uint8 if width <= 8 else np.uint16
    numbers: np.ndarray = np.zeros(count, dtype)
    if width and count:
        packed = np.frombuffer(part, np.uint8).reshape(width, -(-count // 8))
        for plane in np.unpackbits(packed, axis=1, count=count, bitorder="little").astype(dtype, copy=False)[::-1]:
            numbers += numbers  # faster than shifting
            numbers += plane
    return numbers
