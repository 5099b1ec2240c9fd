"""Values as they are."""

from __future__ import annotations

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout


class Raw(Codec):
    """The values one after another, little-endian."""

    role = "values"

    def bound(self, data: np.ndarray, layout: Layout) -> int:
        """Any values fit."""
        return data.nbytes

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Copy the values."""
        return data.tobytes()

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The bytes themselves, not a copy."""
        if len(part) != layout.count * layout.bits.itemsize:
            raise ArtifactError(f"{len(part)} bytes are not {layout.count} values of {layout.dtype}")
        return np.frombuffer(part, layout.bits)
