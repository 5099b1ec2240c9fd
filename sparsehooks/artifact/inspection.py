"""What an artifact holds, as values to print or to compare."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TensorRow:
    """One tensor of an artifact.

    Attributes:
        name: its name.
        file: the file that holds it.
        shape: its shape once decoded.
        dtype: the safetensors name of its dtype once decoded.
        zeros: how many of its elements are exactly zero.
        positions: the codec of its positions; None if every element has a value.
        values: the codec of its values; None if it is stored plain.
        bytes: its size in the file.
        dense_bytes: its size once decoded.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "shape": list(self.shape),
            "sparsity": self.sparsity,
            "bits_per_weight": self.bits_per_weight,
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
            },
        }
