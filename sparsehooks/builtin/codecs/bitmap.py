"""Positions as a bitmap."""

from __future__ import annotations

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout


class Bitmap(Codec):
    """One bit an element in row-major order, the first in the lowest bit of a byte; unused last bits are 0."""

    role = "positions"

    def bound(self, data: np.ndarray, layout: Layout) -> int:
        """Any positions fit."""
        return -(-layout.size // 8)

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Pack the bits."""
        bits = np.zeros(layout.size, np.bool_)
        bits[data] = True
        return np.packbits(bits, bitorder="little").tobytes()

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Unpack the bits."""
        if len(part) != -(-layout.size // 8):
            raise ArtifactError(f"the bitmap has {len(part)} bytes for {layout.size} elements")
        if layout.size % 8 and part[-1] >> (layout.size % 8):
            raise ArtifactError("the bitmap has bits set after its end")
        bits = np.unpackbits(np.frombuffer(part, np.uint8), count=layout.size, bitorder="little")
        positions = np.flatnonzero(bits.view(np.bool_))
        if positions.size != layout.count:
            raise ArtifactError(f"the bitmap has {positions.size} bits set for {layout.count} values")
        return positions
