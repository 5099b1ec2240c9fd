"""Values of which few differ, as a table and indices into it (Han et al. 2016, arXiv:1510.00149)."""

from __future__ import annotations

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout, kernels
from sparsehooks.builtin.codecs.entropy import squeeze, unsqueeze
from sparsehooks.builtin.codecs.planes import planes_length

_MOST = 256
_SAMPLE = 512


class Codebook(Codec):
    """At most 256 different values.

    The part: their number less one (u8), the values in ascending order of their bits, and the indices as bit planes,
    as many as the largest index needs.
    """

    role = "values"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of which at most 256 differ."""
        table = _table(data)
        if table is None:
            return None
        return 1 + table.nbytes + planes_length(data.size, _width(table))

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """The table and the indices."""
        head, indices, width = _indexed(data)
        return head + kernels().pack_planes(indices, width)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Look the values up."""
        table, rest = _read_table(part, layout)
        if len(rest) != planes_length(layout.count, _width(table)):
            raise ArtifactError(f"the indices do not fit {layout.count} values of {table.size} different ones")
        return _look_up(table, kernels().unpack_planes(rest, _width(table), layout.count))


class CodebookEntropy(Codec):
    """The same table, and the indices entropy-coded."""

    role = "values"
    level = "small"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of which at most 256 differ."""
        table = _table(data)
        return None if table is None else 2 + table.nbytes

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """The table and the indices."""
        head, indices, _ = _indexed(data)
        return head + squeeze(indices)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Look the values up."""
        table, rest = _read_table(part, layout)
        return _look_up(table, unsqueeze(rest, layout.count))


def _table(data: np.ndarray) -> np.ndarray | None:
    """The different values, ascending; None if there are too many."""
    if not data.size or len(set(data[:_SAMPLE].tolist())) > _MOST:  # random values do not get any further
        return None
    table = np.unique(data) if data.dtype.itemsize > 2 else _used(data)
    return table if table is not None and table.size <= _MOST else None


def _used(data: np.ndarray) -> np.ndarray | None:
    """The different values of at most 16 bits, without sorting; None if the first values are too many already."""
    for part in (data[: 8 * _SAMPLE], data):
        used = np.zeros(1 << 8 * data.dtype.itemsize, np.bool_)
        used[part] = True
        if np.count_nonzero(used) > _MOST:
            return None
    return np.flatnonzero(used).astype(data.dtype)


def _indexed(data: np.ndarray) -> tuple[bytes, np.ndarray, int]:
    table = _table(data)
    assert table is not None, "bound() found a table"
    return bytes([table.size - 1]) + table.tobytes(), np.searchsorted(table, data).astype(np.uint8), _width(table)


def _width(table: np.ndarray) -> int:
    """How many bits an index needs."""
    return (table.size - 1).bit_length()


def _read_table(part: memoryview, layout: Layout) -> tuple[np.ndarray, memoryview]:
    end = 1 + (part[0] + 1) * layout.bits.itemsize if part else 0
    if not 1 < end <= len(part):
        raise ArtifactError("the table of different values is cut short")
    table = np.frombuffer(part[1:end], layout.bits)
    if (table[1:] <= table[:-1]).any():
        raise ArtifactError("the table of different values is not in ascending order")
    return table, part[end:]


def _look_up(table: np.ndarray, indices: np.ndarray) -> np.ndarray:
    if indices.size and indices.max() >= table.size:
        raise ArtifactError(f"an index lies beyond the table of {table.size} different values")
    return table.take(indices)
