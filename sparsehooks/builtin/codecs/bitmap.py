"""Positions as a bitmap."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout


class Bitmap(Codec):
    """One bit an element in row-major order, the first in the lowest bit of a byte; unused last bits are 0."""

    role = "positions"
    sections = ("bits",)

    def bound(self, data: np.ndarray, layout: Layout) -> int:
        """Any positions fit."""
        return -(-layout.size // 8)

    def encode(self, data: np.ndarray, layout: Layout) -> dict[str, bytes]:
        """Pack the bits."""
        return {"bits": np.packbits(data, bitorder="little").tobytes()}

    def decode(self, sections: Mapping[str, memoryview], layout: Layout) -> np.ndarray:
        """Unpack the bits."""
        bits = np.frombuffer(sections["bits"], np.uint8)
        if bits.size != -(-layout.size // 8):
            raise ArtifactError(f"the bitmap has {bits.size} bytes for {layout.size} elements")
        if layout.size % 8 and bits[-1] >> (layout.size % 8):
            raise ArtifactError("the bitmap has bits set after its end")
        unpacked = np.unpackbits(bits, count=layout.size, bitorder="little")
        return unpacked.view(np.bool_).reshape(layout.rows, layout.columns)
