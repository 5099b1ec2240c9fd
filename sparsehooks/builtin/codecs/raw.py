"""Values as they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout

_BITS = {"F64": np.uint64, "F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}


class Raw(Codec):
    """The values one after another, little-endian."""

    role = "values"
    sections = ("values",)

    def bound(self, data: np.ndarray, layout: Layout) -> int:
        """Any values fit."""
        return data.nbytes

    def encode(self, data: np.ndarray, layout: Layout) -> dict[str, bytes]:
        """Copy the values."""
        return {"values": data.tobytes()}

    def decode(self, sections: Mapping[str, memoryview], layout: Layout) -> np.ndarray:
        """The bytes of the section themselves, not a copy."""
        dtype = np.dtype(_BITS[layout.dtype])
        found = len(sections["values"])
        if found != layout.count * dtype.itemsize:
            raise ArtifactError(f"{found} bytes are not {layout.count} values of {dtype.itemsize} bytes")
        return np.frombuffer(sections["values"], dtype)
