"""What an artifact holds, as values to print or to compare."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsehooks.artifact.header import DTYPES
from sparsehooks.artifact.stored import Stored
from sparsehooks.quantization import from_codes, row_scales, to_codes

_MAX_COLUMNS = 1 << 24
"""Longer rows are not analysed: that takes several times their own memory."""
_MANTISSA = {"F32": 23, "BF16": 7, "F16": 10}


@dataclass(frozen=True)
class TensorRow:
    """One tensor of an artifact.

    Attributes:
        name: its name.
        file: the file that holds it.
        shape: its shape once decoded.
        dtype: the safetensors name of its dtype once decoded.
        zeros: how many of its elements are exactly zero.
        positions: the codecs of its positions, joined by "+"; None if every element has a value.
        values: the codecs of its values, joined by "+"; None if it is stored plain.
        bytes: its size in the file.
        dense_bytes: its size once decoded.
        entropy_bytes: what an ideal code would need that knows only how often values occur: of positions their
            share (for N:M, the combinations; for empty rows and columns, the rest of the matrix), of values the
            exponents where all mantissas differ, else the values themselves with a table, or the codes of a symmetric
            integer grid with a scale a row.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    positions: str | None
    values: str | None
    bytes: int
    dense_bytes: int
    entropy_bytes: float

    @property
    def parameters(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The share of exact zeros."""
        return self.zeros / max(1, self.parameters)

    @property
    def bits_per_weight(self) -> float:
        """The bits that an element takes in the file."""
        return 8 * self.bytes / max(1, self.parameters)

    @property
    def over_entropy(self) -> float:
        """Its size in the file as a multiple of the ideal one; below 1 where the file knows finer grids."""
        return self.bytes / max(1.0, self.entropy_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "shape": list(self.shape),
            "sparsity": self.sparsity,
            "bits_per_weight": self.bits_per_weight,
            "over_entropy": self.over_entropy,
        }


@dataclass(frozen=True)
class Inspection:
    """What an artifact holds.

    Attributes:
        tensors: one row a tensor, in the order of the files.
    """

    tensors: tuple[TensorRow, ...]

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(row.parameters for row in self.tensors)

    @property
    def zeros(self) -> int:
        """How many of them are exactly zero."""
        return sum(row.zeros for row in self.tensors)

    @property
    def bytes(self) -> int:
        """The size of all tensors in the files."""
        return sum(row.bytes for row in self.tensors)

    @property
    def dense_bytes(self) -> int:
        """The size of all tensors once decoded."""
        return sum(row.dense_bytes for row in self.tensors)

    @property
    def entropy_bytes(self) -> float:
        """What an ideal code would need for all tensors; see ``TensorRow``."""
        return sum(row.entropy_bytes for row in self.tensors)

    @property
    def ratio(self) -> float:
        """The size in the files as a share of the size once decoded."""
        return self.bytes / max(1, self.dense_bytes)

    @property
    def sparsity(self) -> float:
        """The share of exact zeros."""
        return self.zeros / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "tensors": [row.to_dict() for row in self.tensors],
            "totals": {
                "tensors": len(self.tensors),
                "parameters": self.parameters,
                "zeros": self.zeros,
                "sparsity": self.sparsity,
                "bytes": self.bytes,
                "dense_bytes": self.dense_bytes,
                "ratio": self.ratio,
                "entropy_bytes": self.entropy_bytes,
            },
        }


def row_of(stored: Stored) -> TensorRow:
    """What one tensor of a file holds; decodes a few megabytes at a time.

    Raises:
        ArtifactError: if it is damaged or hostile.
    """
    blob = stored.blob
    zeros, entropy = _measure(stored)
    return TensorRow(
        name=stored.entry.name,
        file=stored.shard.path.name,
        shape=stored.shape,
        dtype=stored.dtype_name,
        zeros=zeros,
        positions=None if blob is None else "+".join(blob.codecs("positions")) or None,
        values=None if blob is None else "+".join(blob.codecs("values")),
        bytes=stored.entry.length,
        dense_bytes=stored.nbytes,
        entropy_bytes=entropy / 8,
    )


def _measure(stored: Stored) -> tuple[int, float]:
    """The number of zeros, and the bits of an ideal code."""
    if stored.dtype_name not in DTYPES or not stored.shape or math.prod(stored.shape[1:]) > _MAX_COLUMNS:
        tensor = stored.tensor()
        return int(np.count_nonzero((tensor == 0).numpy())), 8.0 * tensor.nbytes
    mask, values, grid = _Mask(stored.shape), _Values(stored.dtype_name), _Grid(stored.dtype_name)
    for piece in stored.pieces():
        tensor = stored[piece]
        nonzero = tensor != 0
        mask.add(nonzero.numpy().reshape(-1))
        values.add(tensor[nonzero].view(DTYPES[stored.dtype_name][1]).numpy())
        grid.add(tensor.reshape(len(tensor), -1))
    return mask.zeros, mask.entropy() + min(values.entropy(), grid.entropy())


class _Mask:
    """Counts of the positions that are not zero."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._columns = math.prod(shape[1:])
        self._rows, self._kept, self._size = 0, 0, 0
        self._columns_used = np.zeros(self._columns, np.bool_)
        self._group_max = dict.fromkeys((2, 4, 8, 16), 0)

    def add(self, nonzero: np.ndarray) -> None:
        rows = nonzero.reshape(-1, self._columns)
        self._size += nonzero.size
        self._kept += int(np.count_nonzero(nonzero))
        self._rows += int(rows.any(axis=1).sum())
        self._columns_used |= np.bitwise_or.reduce(rows, axis=0)
        for m in self._group_max:
            if self._columns % m == 0:
                counts = nonzero.view(np.uint8).reshape(-1, m).sum(axis=1, dtype=np.uint8)
                self._group_max[m] = max(self._group_max[m], int(counts.max(initial=0)))
            else:
                self._group_max[m] = m

    @property
    def zeros(self) -> int:
        return self._size - self._kept

    def entropy(self) -> float:
        """The bits of the best of three models: random, N:M, and random within the rows and columns in use."""
        found = [self._size * _entropy(self._kept, self._size)]
        if self._size:
            columns = int(np.count_nonzero(self._columns_used))
            rows, all_rows = self._rows, self._size // self._columns
            outline = all_rows * _entropy(rows, all_rows) + self._columns * _entropy(columns, self._columns)
            found.append(outline + rows * columns * _entropy(self._kept, rows * columns))
        for m, n in self._group_max.items():
            if 0 < n < m and self._kept * m == n * self._size:
                found.append(self._size / m * math.log2(math.comb(m, n)))
        return min(found)


class _Values:
    """Counts of values, or of exponents where there are too many different values."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._values: dict[int, int] | None = {}
        self._exponents = np.zeros(256, np.int64)
        self._count = 0

    def add(self, bits: np.ndarray) -> None:
        self._count += bits.size
        if self._values is not None:
            different, counts = np.unique(bits, return_counts=True)
            for value, count in zip(different.tolist(), counts.tolist(), strict=True):
                self._values[value] = self._values.get(value, 0) + count
            if len(self._values) > 1 << 16:
                self._values = None
        if self._dtype in _MANTISSA:
            exponents = bits >> _MANTISSA[self._dtype] & (31 if self._dtype == "F16" else 255)
            self._exponents += np.bincount(exponents.astype(np.uint8), minlength=256)

    def entropy(self) -> float:
        width = 8 * DTYPES[self._dtype][0].itemsize
        found = [float(width * self._count)]
        if self._dtype in _MANTISSA:
            found.append(self._count * (1 + _MANTISSA[self._dtype]) + _bits(self._exponents))
        if self._values is not None:
            found.append(width * len(self._values) + _bits(np.array(list(self._values.values()), np.int64)))
        return min(found)


class _Grid:
    """Counts of the codes of the integer grid on which all values lie, if they do."""

    def __init__(self, dtype: str) -> None:
        self._found = 0.0 if dtype in _MANTISSA else math.inf

    def add(self, rows: Tensor) -> None:
        if self._found < math.inf:
            self._found += next((bits for width in range(2, 9) if (bits := _grid_bits(rows, width))), math.inf)

    def entropy(self) -> float:
        return self._found


def _grid_bits(rows: Tensor, width: int) -> float | None:
    """The bits of the scales and codes of rows that lie on the grid of so many bits."""
    code_max = (1 << (width - 1)) - 1
    for part in (rows[:8], rows):  # few rows tell of most tensors that they lie on none
        scales = row_scales(part, code_max)
        codes = to_codes(part, scales, code_max)
        if not torch.equal(from_codes(codes, scales, part.dtype), part):
            return None
    counts = np.bincount(codes[codes != 0].view(torch.uint8).numpy(), minlength=256)
    return 32 * len(rows) + _bits(counts)


def _entropy(part: int, whole: int) -> float:
    """The bits of one yes or no of which ``part`` in ``whole`` are yes."""
    return _bits(np.array([part, whole - part])) / max(1, whole)


def _bits(counts: np.ndarray) -> float:
    """The bits of all symbols that occur so often."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) if counts.size else 0.0
