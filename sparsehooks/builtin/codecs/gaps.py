"""Positions as the gaps between them: a byte each, or Golomb-Rice codes (Golomb 1966; Rice and Plaunt 1971)."""

from __future__ import annotations

import math

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout, kernels
from sparsehooks.builtin.codecs.planes import planes_length

_MAX_LOW = 15
_LARGE = 255


class Gaps(Codec):
    """Golomb-Rice codes of the number of zeros before each position.

    A first byte says how many low bits ``k`` a gap has. Then the unary parts follow, ``gap >> k`` zeros and a one for
    each position, as one bitmap, and then the low bits as ``k`` bit planes: split so, numpy decodes all at once.
    """

    role = "positions"
    level = "balanced"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Positions of which at most half are kept: beyond that a bitmap is as small."""
        if 2 * data.size > layout.size:
            return None
        low = _low_bits(layout)
        total = int(data[-1]) + 1 - data.size if data.size else 0
        unary = data.size + max(0, total - ((1 << low) - 1) * data.size >> low)
        return 1 + -(-unary // 8) + planes_length(data.size, low)

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Split each gap."""
        low = _low_bits(layout)
        lowest, ones = kernels().split_gaps(data, low)
        unary = kernels().pack_bits(ones, int(ones[-1]) + 1 if ones.size else 0)
        return bytes([low]) + unary + kernels().pack_planes(lowest, low)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Add the gaps up."""
        count = layout.count
        if count > layout.size or not part or part[0] > _MAX_LOW:
            raise ArtifactError("the gaps have an impossible number of low bits")
        low = part[0]
        end = len(part) - planes_length(count, low)
        if not 1 <= end <= 1 + -(-(count + (layout.size >> low)) // 8):
            raise ArtifactError(f"{len(part)} bytes are not {count} gaps with {low} low bits")
        ones = kernels().unpack_bits(part[1:end])
        if ones.size != count or end - 1 != (ones[-1] // 8 + 1 if count else 0):
            raise ArtifactError(f"the unary parts are not those of {count} gaps")
        positions = kernels().join_gaps(kernels().unpack_planes(part[end:], low, count), ones, low) if low else ones
        return _within(positions, layout)


class GapBytes(Codec):
    """The number of zeros before each position as a byte; 255 stands for a number of its own, u32, at the end."""

    role = "positions"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Positions of which at most an eighth are kept: beyond that a bitmap is smaller."""
        return data.size if 8 * data.size <= layout.size else None

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Set the large gaps apart."""
        gaps = np.diff(data, prepend=-1) - 1
        steps, large = np.minimum(gaps, _LARGE).astype(np.uint8), gaps[gaps >= _LARGE].astype(np.uint32)
        return b"".join([steps.tobytes(), large.tobytes()])

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Add the gaps up."""
        gaps = np.frombuffer(part[: layout.count], np.uint8)
        large = np.flatnonzero(gaps == _LARGE)
        if layout.count > layout.size or len(part) != layout.count + 4 * large.size:
            raise ArtifactError(f"{len(part)} bytes are not {layout.count} gaps of which {large.size} are large")
        if large.size:
            gaps = gaps.astype(np.int64)
            gaps[large] = np.frombuffer(part[layout.count :], np.uint8).view(np.uint32)
        return _within(kernels().join_gaps(gaps), layout)


def _within(positions: np.ndarray, layout: Layout) -> np.ndarray:
    if positions.size and positions[-1] >= layout.size:
        raise ArtifactError(f"a position lies beyond the last of {layout.size} elements")
    return positions


def _low_bits(layout: Layout) -> int:
    """The best number of low bits for random positions (Kiely 2004, "Selecting the Golomb Parameter")."""
    mean = layout.size / max(1, layout.count) - 1
    if mean <= 0 or not layout.count:
        return 0
    golden = (1 + math.sqrt(5)) / 2
    return min(_MAX_LOW, max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log(mean / (mean + 1))))))
