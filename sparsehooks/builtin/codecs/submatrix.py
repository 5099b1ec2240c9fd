"""Positions within the rows and columns that are not all zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout, kernels
from sparsehooks.builtin.codecs.bitmap import Bitmap
from sparsehooks.builtin.codecs.gaps import Gaps

_ALL = 0
_INNER: dict[int, Codec] = {1: Bitmap(), 2: Gaps()}
"""How the positions within the sub-matrix are written where it is not all of them."""
_SAMPLE = 4096
_FULL = 0.97
"""A sub-matrix of a larger share of the matrix is not worth its own bytes."""
_DENSE = 0.9
"""A sub-matrix is kept as a whole from this density on."""


class Submatrix(Codec):
    """Two bitmaps of the rows and columns that are kept, and the positions among those.

    The part: the bits of the rows, the bits of the columns (each from the lowest bit of a byte on, unused last bits
    0), how the positions within are written (u8: 0 all of them, 1 bitmap, 2 gaps), and those.
    """

    role = "positions"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Positions that leave some rows or columns empty."""
        found = _kept(data, layout)
        if found is None:
            return None
        if _nearly_all(data, *found):
            return _head(layout)
        inner, within = _within(data, layout, *found)
        bounds = [codec.bound(inner, within) for codec in _INNER.values()]
        return _head(layout) + min(bound for bound in bounds if bound is not None)

    def cover(self, data: np.ndarray, layout: Layout) -> np.ndarray:
        """The whole sub-matrix if nearly all of it is kept."""
        found = _kept(data, layout)
        return data if found is None or not _nearly_all(data, *found) else _outer(*found, layout)

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """The bitmaps and the smallest inner codec."""
        found = _kept(data, layout)
        if found is None:
            raise ValueError("no row or column is empty")
        parts = b""
        for kept, size in zip(found, (layout.rows, layout.columns), strict=True):
            parts += kernels().pack_bits(kept, size)
        inner, within = _within(data, layout, *found)
        if inner.size == within.size:
            return parts + bytes([_ALL])
        usable = {mode: codec for mode, codec in _INNER.items() if codec.bound(inner, within) is not None}
        return parts + min((bytes([mode]) + codec.encode(inner, within) for mode, codec in usable.items()), key=len)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """From places within the sub-matrix to positions."""
        head = _head(layout)
        if len(part) < head or part[head - 1] not in (_ALL, *_INNER):
            raise ArtifactError("the rows and columns of the sub-matrix are cut short")
        row_bytes = -(-layout.rows // 8)
        rows, columns = _unpack(part[:row_bytes], layout.rows), _unpack(part[row_bytes : head - 1], layout.columns)
        mode = part[head - 1]
        if mode == _ALL:
            if layout.count != rows.size * columns.size or len(part) != head:
                raise ArtifactError(f"{layout.count} values are not {rows.size} rows of {columns.size}")
            return _outer(rows, columns, layout)
        within = replace(layout, rows=rows.size, columns=columns.size)
        inner = _INNER[mode].decode(part[head:], within)
        row, column = np.divmod(inner, max(1, columns.size))
        positions: np.ndarray = rows[row] * layout.columns + columns[column]
        return positions


def _head(layout: Layout) -> int:
    return -(-layout.rows // 8) + -(-layout.columns // 8) + 1


def _kept(data: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows and the columns that are not empty; None if nearly all are not."""
    full = _FULL * layout.size
    row_counts = np.diff(np.searchsorted(data, np.arange(layout.rows + 1) * layout.columns))
    rows = np.flatnonzero(row_counts)
    # the first rows show almost all columns where these are not pruned as such
    for part in (data[:_SAMPLE], data):
        columns = np.flatnonzero(np.bincount(part % layout.columns, minlength=layout.columns))
        if rows.size * columns.size > full:
            return None
    return rows, columns


def _within(data: np.ndarray, layout: Layout, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, Layout]:
    """The positions within the sub-matrix, and its layout."""
    row_place, column_place = np.zeros(layout.rows, np.intp), np.zeros(layout.columns, np.intp)
    row_place[rows], column_place[columns] = np.arange(rows.size) * columns.size, np.arange(columns.size)
    row, column = np.divmod(data, layout.columns)
    return row_place[row] + column_place[column], replace(layout, rows=rows.size, columns=columns.size)


def _nearly_all(data: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> bool:
    return data.size >= _DENSE * rows.size * columns.size


def _outer(rows: np.ndarray, columns: np.ndarray, layout: Layout) -> np.ndarray:
    positions: np.ndarray = np.add.outer(rows * layout.columns, columns).reshape(-1)
    return positions


def _unpack(part: memoryview, size: int) -> np.ndarray:
    if size % 8 and part[-1] >> (size % 8):
        raise ArtifactError("the rows or columns of the sub-matrix have bits set after their end")
    return kernels().unpack_bits(part)
