"""The inner loops of files and masks in numpy and torch: what all other kernels have to agree with."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from sparsehooks import Kernels


class Numpy(Kernels):
    """Whole arrays at once; scores may be on any device."""

    def nonzero(self, values: np.ndarray, shift: int) -> np.ndarray:
        """By comparing with zero."""
        mask = values << shift != 0
        count = np.count_nonzero(mask)
        if values.size // 50 < count <= values.size // 10:
            # numpy searches for each nonzero where at most a tenth are, which is slower than its other way until a
            # fiftieth
            mask = np.concatenate([mask, np.ones(values.size // 8, np.bool_)])
        return np.flatnonzero(mask)[:count]

    def pack_bits(self, positions: np.ndarray, size: int) -> bytes:
        """From a byte for each bit."""
        bits = np.zeros(size, np.bool_)
        bits[positions] = True
        return np.packbits(bits, bitorder="little").tobytes()

    def unpack_bits(self, part: memoryview) -> np.ndarray:
        """From a byte for each bit."""
        return np.flatnonzero(np.unpackbits(np.frombuffer(part, np.uint8), bitorder="little").view(np.bool_))

    def pack_planes(self, numbers: np.ndarray, width: int) -> bytes:
        """Plane by plane."""
        bits = [numbers >> bit & 1 for bit in range(width)]
        return np.packbits(np.array(bits, np.uint8), axis=1, bitorder="little").tobytes() if width else b""

    def unpack_planes(self, part: memoryview, width: int, count: int) -> np.ndarray:
        """Plane by plane, the highest first."""
        dtype = np.uint8 if width <= 8 else np.uint16
        packed = np.frombuffer(part, np.uint8).reshape(width, -(-count // 8))
        numbers: np.ndarray = np.zeros(count, dtype)
        if packed.size:
            for plane in np.unpackbits(packed, axis=1, count=count, bitorder="little").astype(dtype, copy=False)[::-1]:
                numbers += numbers  # faster than shifting
                numbers += plane
        return numbers

    def split_gaps(self, positions: np.ndarray, low: int) -> tuple[np.ndarray, np.ndarray]:
        """By differences."""
        gaps = np.diff(positions, prepend=-1) - 1
        ones = _running_sum((gaps >> low) + 1) - 1
        return (gaps & (1 << low) - 1).astype(np.uint8 if low <= 8 else np.uint16), ones

    def join_gaps(self, gaps: np.ndarray, ones: np.ndarray | None = None, low: int = 0) -> np.ndarray:
        """By a running sum."""
        positions = _running_sum(gaps)
        if ones is None:
            positions += np.arange(gaps.size)
            return positions
        if ones.size != gaps.size:
            raise ValueError(f"there are {gaps.size} gaps for {ones.size} ones")
        # before a one lie the ones of earlier positions, and the high parts of all gaps up to it
        positions += ones << low
        positions -= np.arange(gaps.size) * ((1 << low) - 1)
        return positions

    def split_exponents(
        self, values: np.ndarray, shift: int, frequent: np.ndarray, size: int
    ) -> tuple[bytes, np.ndarray, bytes]:
        """Digit by digit; bytes by a matrix product."""
        halves = values.view(np.uint16)[1::2] if values.itemsize == 4 else values
        rotated, base = halves << 1 | halves >> 15, frequent.size
        exponents = (rotated >> shift).astype(np.uint8)
        digits = np.full(exponents.size, base, np.uint8)
        for digit, exponent in enumerate(frequent):
            digits -= (exponents == exponent).view(np.uint8) * np.uint8(base - digit)
        exceptions = np.flatnonzero(digits == base)
        digits[exceptions] = 0
        padded = np.zeros((-(-digits.size // size), size), np.float32)
        padded.reshape(-1)[: digits.size] = digits
        with np.errstate(invalid="ignore"):  # some BLAS flag what their kernels read beyond the end
            codes = padded @ (base ** np.arange(size)).astype(np.float32)  # exact: less than 256
        return codes.astype(np.uint8).tobytes(), exceptions, rotated.astype(np.uint8).tobytes()

    def checksum(self, data: bytes | memoryview, start: int = 0) -> int:
        """By zlib."""
        return zlib.crc32(data, start)

    def between(self, scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
        """By comparing twice."""
        above = scores > high
        return int(torch.count_nonzero(above)), scores[_places((scores >= low) ^ above)]

    def largest(self, scores: Tensor, cut: float, ties: int) -> Tensor:
        """By comparing twice."""
        mask = scores > cut
        mask[_places(scores == cut)[:ties]] = True
        return mask


def _running_sum(numbers: np.ndarray) -> np.ndarray:
    """The sums up to each number, int64; torch adds four times as fast as numpy."""
    sums: np.ndarray = torch.from_numpy(np.require(numbers, requirements="W")).cumsum(0, dtype=torch.int64).numpy()
    return sums


def _places(mask: Tensor) -> Tensor:
    if mask.device.type == "cpu":  # numpy finds the few set bytes several times faster than torch
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten()
