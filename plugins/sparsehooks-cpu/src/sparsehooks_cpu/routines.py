"""The inner loops of files and masks, compiled; see routines.cpp."""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsehooks import Kernels
from sparsehooks_cpu.library import library

_Start = ctypes.c_char * 0


class Cpu(Kernels):
    """One pass over memory each, on one thread; without Python's global lock."""

    def problem(self) -> str | None:
        """Why there is no library, or nobody to call it."""
        return library().problem or (None if np.dtype(np.intp) == np.int64 else "Python is not of 64 bits")

    def nonzero(self, values: np.ndarray, shift: int) -> np.ndarray:
        """A bit for each value, and the positions of the bits."""
        bits = np.empty(-(-values.size // 8), np.uint8)
        ones = _call("flag", values, values.itemsize, values.size, shift, bits)
        return _positions(bits, ones)

    def pack_bits(self, positions: np.ndarray, size: int) -> bytes:
        """Through a byte for each bit, in pieces."""
        bits = np.empty(-(-size // 8), np.uint8)
        if not _call("pack_bits", _intp(positions), positions.size, size, bits):
            raise IndexError(f"a position lies outside of {size} bits")
        return bits.tobytes()

    def unpack_bits(self, part: memoryview) -> np.ndarray:
        """By a table of bytes."""
        bits = np.frombuffer(part, np.uint8)
        return _positions(bits, _call("count", bits, bits.size))

    def pack_planes(self, numbers: np.ndarray, width: int) -> bytes:
        """Eight numbers at once."""
        planes = np.empty(width * -(-numbers.size // 8), np.uint8)
        _call("pack_planes", numbers, numbers.itemsize, numbers.size, width, planes)
        return planes.tobytes()

    def unpack_planes(self, part: memoryview, width: int, count: int) -> np.ndarray:
        """Eight numbers at once."""
        planes = np.frombuffer(part, np.uint8)
        if planes.size != width * -(-count // 8):
            raise ValueError(f"{planes.size} bytes are not {count} numbers of {width} bits")
        numbers = np.zeros(count, np.uint8 if width <= 8 else np.uint16)
        _call("unpack_planes", planes, width, count, numbers.itemsize, numbers)
        return numbers

    def split_gaps(self, positions: np.ndarray, low: int) -> tuple[np.ndarray, np.ndarray]:
        """In one pass."""
        lowest = np.empty(positions.size, np.uint8 if low <= 8 else np.uint16)
        ones = np.empty(positions.size, np.intp)
        _call("split_gaps", _intp(positions), positions.size, low, lowest, ones)
        return lowest, ones

    def join_gaps(self, gaps: np.ndarray, ones: np.ndarray | None = None, low: int = 0) -> np.ndarray:
        """By a running sum."""
        if ones is not None and ones.size != gaps.size:
            raise ValueError(f"there are {gaps.size} gaps for {ones.size} ones")
        positions = np.empty(gaps.size, np.intp)
        _call("join_gaps", gaps, gaps.itemsize, gaps.size, None if ones is None else _intp(ones), low, positions)
        return positions

    def split_exponents(
        self, values: np.ndarray, shift: int, frequent: np.ndarray, size: int
    ) -> tuple[bytes, np.ndarray, bytes]:
        """In pieces, digit by digit."""
        if values.itemsize not in (2, 4) or not 2 <= size <= 5:
            raise ValueError(f"{values.dtype} is not split into bytes of {size} digits")
        sizes = (-(-values.size // size), -(-values.size // 8), values.size)
        codes, bits, rest = (np.empty(length, np.uint8) for length in sizes)
        given = (values, values.itemsize, values.size, shift, frequent, frequent.size, size)
        exceptions = _call("split_exponents", *given, codes, bits, rest)
        return codes.tobytes(), _positions(bits, exceptions), rest.tobytes()

    def checksum(self, data: bytes | memoryview, start: int = 0) -> int:
        """By products without carries, where the CPU has them."""
        given = np.frombuffer(data, np.uint8)
        found = _call("checksum", given, given.size, start)
        return found if found >= 0 else zlib.crc32(data, start)

    def between(self, scores: Tensor, low: float, high: float) -> tuple[int, Tensor]:
        """In one pass."""
        inside, above = torch.empty_like(scores), np.empty(1, np.int64)
        bounds = torch.tensor([low, high, torch.inf], dtype=scores.dtype, device="cpu")
        found = _call("between", scores, scores.itemsize, scores.numel(), bounds, inside, above)
        return int(above[0]), inside[:found].clone()

    def largest(self, scores: Tensor, cut: float, ties: int) -> Tensor:
        """In one pass."""
        mask = torch.empty_like(scores, dtype=torch.bool)
        bounds = torch.tensor([cut, torch.inf], dtype=scores.dtype, device="cpu")
        _call("largest", scores, scores.itemsize, scores.numel(), bounds, ties, mask)
        return mask


def _call(routine: str, *arguments: np.ndarray | Tensor | int | None) -> int:
    return library().routines[routine](*map(_argument, arguments))


def _argument(value: np.ndarray | Tensor | int | None) -> Any:
    """What C gets for it: of an array where it begins."""
    if isinstance(value, np.ndarray):
        if not (value.flags.c_contiguous and value.dtype.isnative):
            raise ValueError(f"an array of {value.size} {value.dtype} is not contiguous, or of another machine")
        # the short way, a quarter of the other's time
        return _Start.from_buffer(value.data) if value.flags.writeable else value.ctypes.data
    return value.data_ptr() if isinstance(value, Tensor) else value


def _intp(positions: np.ndarray) -> np.ndarray:
    if positions.dtype != np.int64:
        raise ValueError(f"positions are int64, not {positions.dtype}")
    return positions


def _positions(bits: np.ndarray, ones: int) -> np.ndarray:
    positions = np.empty(ones, np.intp)
    if _call("unpack_bits", bits, bits.size, positions, ones) != ones:
        raise ValueError(f"{bits.size} bytes have changed while they were read")
    return positions
