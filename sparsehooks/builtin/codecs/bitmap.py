"""Positions as a bitmap."""

from __future__ import annotations

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout, kernels


class Bitmap(Codec):
    """One bit an element in row-major order, the first in the lowest bit of a byte; unused last bits are 0."""

    role = "positions"

    def bound(self, data: np.ndarray, layout: Layout) -> int:
        """Any positions fit."""
        return -(-layout.size // 8)

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Pack the bits."""
        return kernels().pack_bits(data, layout.size)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Unpack the bits."""
        if len(part) != -(-layout.size // 8):
            raise ArtifactError(f"the bitmap has {len(part)} bytes for {layout.size} elements")
        if layout.size % 8 and part[-1] >> (layout.size % 8):
            raise ArtifactError("the bitmap has bits set after its end")
        positions = kernels().unpack_bits(part)
        if positions.size != layout.count:
            raise ArtifactError(f"the bitmap has {positions.size} bits set for {layout.count} values")
        return positions
