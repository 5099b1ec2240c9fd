"""Positions of 2:4 sparsity, as sparse tensor cores read it (Mishra et al. 2021, arXiv:2104.08378)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout

_PAIRS = tuple(combinations(range(4), 2))
_CODES = len(_PAIRS) ** 3
"""Three groups a byte, six pairs a group."""

_MASK_OF_CODE = np.array([1 << first | 1 << second for first, second in _PAIRS], np.uint8)
_FITS = np.array([nibble.bit_count() <= 2 for nibble in range(16)])
# The first pair that covers a group of at most two; 0 where there is none.
_CODE_OF_MASK = np.array([int(np.argmax(_MASK_OF_CODE & nibble == nibble)) for nibble in range(16)], np.uint8)
# The twelve positions that a byte stands for.
_POSITIONS = np.array(
    [[pair in _PAIRS[byte // 6**group % 6] for group in range(3) for pair in range(4)] for byte in range(_CODES)]
)


class TwoOfFour(Codec):
    """Two values in each group of four neighbours of a row, the pair as a base-6 digit, three digits a byte.

    A group with fewer than two nonzeros keeps explicit zeros. The first group is the lowest digit; unused last digits
    are 0.
    """

    role = "positions"
    sections = ("pairs",)

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Rows of whole groups, with at most two nonzeros in each."""
        if layout.columns % 4 or layout.count > layout.size // 2 or not _FITS[_groups(data)].all():
            return None
        return _length(layout)

    def cover(self, data: np.ndarray, layout: Layout) -> np.ndarray:
        """Exactly two positions in each group."""
        masks = _MASK_OF_CODE[_CODE_OF_MASK[_groups(data)]]
        packed = masks[0::2] | masks[1::2] << 4
        return np.unpackbits(packed, count=layout.size, bitorder="little").view(np.bool_).reshape(data.shape)

    def encode(self, data: np.ndarray, layout: Layout) -> dict[str, bytes]:
        """Three digits a byte."""
        digits = np.zeros(3 * _length(layout), np.uint8)
        digits[: layout.size // 4] = _CODE_OF_MASK[_groups(data)[: layout.size // 4]]
        low, middle, high = digits[0::3], digits[1::3], digits[2::3]
        return {"pairs": (low + 6 * middle + 36 * high).tobytes()}

    def decode(self, sections: Mapping[str, memoryview], layout: Layout) -> np.ndarray:
        """Two positions in each group."""
        pairs = np.frombuffer(sections["pairs"], np.uint8)
        if layout.columns % 4 or layout.count != layout.size // 2:
            raise ArtifactError(f"{layout.count} values in rows of {layout.columns} are not two of each four")
        if pairs.size != _length(layout):
            raise ArtifactError(f"{pairs.size} bytes are not three groups of four each for {layout.size} elements")
        unused = -(layout.size // 4) % 3
        if pairs.max() >= _CODES or pairs[-1] >= 6 ** (3 - unused):
            raise ArtifactError("a group of four has no such pair of positions")
        positions = _POSITIONS.take(pairs, axis=0).reshape(-1)[: layout.size]
        return positions.reshape(layout.rows, layout.columns)


def _groups(data: np.ndarray) -> np.ndarray:
    """Each group of four as a 4-bit mask, in order; a zero group more where their number is odd."""
    packed = np.packbits(data, bitorder="little")
    groups = np.empty(2 * packed.size, np.uint8)
    groups[0::2], groups[1::2] = packed & 15, packed >> 4
    return groups


def _length(layout: Layout) -> int:
    return -(-layout.size // 12)
