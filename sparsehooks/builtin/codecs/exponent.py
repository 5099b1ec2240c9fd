"""Floating-point values split into exponents, of which few differ, and the rest, which is noise.

The exponents of trained weights carry about 2.6 bits of 8 (Hershcovitch et al. 2024, "ZipNN", arXiv:2411.05239;
Zhang et al. 2025, "DFloat11", arXiv:2504.11651); those of the weights that pruning leaves less than 2.
"""

from __future__ import annotations

import functools
import struct

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout, kernels
from sparsehooks.builtin.codecs.entropy import squeeze, unsqueeze
from sparsehooks.builtin.codecs.gaps import GapBytes
from sparsehooks.builtin.codecs.planes import planes_length

_DTYPES = ("F32", "BF16", "F16")
_GAPS = GapBytes()
_DIGITS = {3: 5, 4: 4, 6: 3, 16: 2}
"""The bases of the codes, and how many digits to a base fit a byte."""
_SAMPLE = 4096
_HEAD = struct.Struct("<BBHII")
"""Base, 0, 0, how many exceptions, the bytes of their positions."""
_TOPS = struct.Struct("<BBHI")
"""Bits of the mantissa in a symbol, 0, how many symbols, the bytes of their coded indices."""
_MOST_TAKEN = 4


class Exponent(Codec):
    """Digits to the base of 3, 4, 6 or 16 for the most frequent exponents; the others are exceptions.

    The part: base (u8), zero (u8, u16), number of exceptions (u32), bytes of their positions (u32); the low halves
    of F32 values (u16 each); the exponents that the digits stand for (a byte each); the digits, 5, 4, 3 or 2 a byte,
    the first the lowest; the exceptions: their positions, coded as by ``gap-bytes``, and their exponents (a byte each);
    the rest of the upper 16 bits: mantissa and sign as a byte (F32, BF16), or the lower seven bits of the mantissa
    and the sign as a byte, and then the upper three bits of the mantissa as bit planes (F16).
    """

    role = "values"
    level = "balanced"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of float32, bfloat16 or float16."""
        if layout.dtype not in _DTYPES or not data.size:
            return None
        return _fixed_size(layout) + -(-layout.count // _DIGITS[3])

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Digits to the base that takes the fewest bytes."""
        shift = _shift(layout.dtype)
        counts = np.bincount(_upper(data[:: 1 + data.size // _SAMPLE].copy()) >> shift, minlength=256)
        base = _best_base(counts)
        frequent = np.argsort(-counts, kind="stable")[:base].astype(np.uint8)
        codes, exceptions, rest = kernels().split_exponents(data, shift, frequent, _DIGITS[base])
        places = _GAPS.encode(exceptions, _places(layout, exceptions.size)) if exceptions.size else b""
        return b"".join([
            _HEAD.pack(base, 0, 0, exceptions.size, len(places)),
            _lower(data),
            frequent.tobytes(),
            codes,
            places,
            (_upper(data[exceptions]) >> shift).astype(np.uint8).tobytes(),
            rest,
            kernels().pack_planes((_upper(data) >> 8 & 7).astype(np.uint8), 3) if layout.dtype == "F16" else b"",
        ])  # fmt: skip

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Look the exponents up and put the halves together."""
        count = layout.count
        if layout.dtype not in _DTYPES or len(part) < _HEAD.size:
            raise ArtifactError(f"exponent codes cannot stand for {layout.dtype} values")
        base, *zeros, exceptions, places_length = _HEAD.unpack(part[: _HEAD.size])
        if base not in _DIGITS or any(zeros) or exceptions > count:
            raise ArtifactError("the exponent codes have an impossible base or number of exceptions")
        halves_length = 2 * count * (layout.dtype == "F32")
        sizes = (halves_length, base, -(-count // _DIGITS[base]), places_length, exceptions, _rest_size(layout))
        if len(part) != _HEAD.size + sum(sizes):
            raise ArtifactError(f"{len(part)} bytes are not the exponent codes and mantissas of {count} values")
        halves, *middle, rest = _cut(part[_HEAD.size :], sizes)
        frequent, codes, places, others = (np.frombuffer(piece, np.uint8) for piece in middle)
        shift = _shift(layout.dtype)
        if max(frequent.max(), others.max(initial=0)) >= 1 << (16 - shift):
            raise ArtifactError(f"there is no such exponent in {layout.dtype}")
        if codes.max(initial=0) >= base ** _DIGITS[base]:
            raise ArtifactError(f"a byte of exponent codes is none of digits to the base of {base}")
        exponents_of = (frequent.astype(np.uint16) << shift).take(_digits(base))
        exponents = exponents_of.take(codes, axis=0).reshape(-1)[:count]
        if exceptions or places.size:
            found = _GAPS.decode(middle[2], _places(layout, exceptions))
            exponents[found] = others.astype(np.uint16) << shift
        exponents |= np.frombuffer(rest[:count], np.uint8).astype(np.uint16)
        if layout.dtype == "F16":
            exponents |= kernels().unpack_planes(rest[count:], 3, count).astype(np.uint16) << 8
        return _restore(halves, exponents, layout)


class ExponentEntropy(Codec):
    """Exponents with the first bits of the mantissa, entropy-coded together.

    After pruning by magnitude most values lie just above the threshold, so that the first bits of the mantissa are
    not noise either: at 90 % sparsity exponent and four bits take hardly more than these four bits alone.

    The part: bits of the mantissa that go with the exponent (u8, at most 4), zero (u8), number of different symbols
    (u16), length of the coded indices (u32); the low halves of F32 values (u16 each); the symbols in ascending order
    (u16 each); the indices of the symbols, entropy-coded; the rest of the mantissa and the sign as bit planes.
    """

    role = "values"
    level = "small"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of float32, bfloat16 or float16."""
        if layout.dtype not in _DTYPES or not data.size:
            return None
        rest = planes_length(layout.count, _shift(layout.dtype) - _MOST_TAKEN)
        return _TOPS.size + 2 * layout.count * (layout.dtype == "F32") + 3 + rest

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Split the values and squeeze the indices of the upper bits."""
        taken, _, symbols, indices, rest = _tops(data, layout)
        coded = squeeze(indices)
        head = _TOPS.pack(taken, 0, symbols.size, len(coded))
        return b"".join([head, _lower(data), symbols.tobytes(), coded, rest])

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """Put the pieces together."""
        count = layout.count
        if layout.dtype not in _DTYPES or len(part) < _TOPS.size:
            raise ArtifactError(f"coded exponents cannot stand for {layout.dtype} values")
        taken, zero, symbols_count, coded_length = _TOPS.unpack(part[: _TOPS.size])
        width = _shift(layout.dtype) - taken
        if taken > _MOST_TAKEN or zero:
            raise ArtifactError(f"{taken} bits of the mantissa cannot go with an exponent")
        sizes = (2 * count * (layout.dtype == "F32"), 2 * symbols_count, coded_length, planes_length(count, width))
        if len(part) != _TOPS.size + sum(sizes):
            raise ArtifactError(f"{len(part)} bytes are not the coded exponents and mantissas of {count} values")
        halves, symbols, coded, rest = _cut(part[_TOPS.size :], sizes)
        indices = unsqueeze(coded, count)
        if indices.max(initial=0) >= symbols_count:
            raise ArtifactError(f"a coded exponent is none of {symbols_count}")
        tops = np.frombuffer(symbols, np.uint16)
        if (tops[1:] <= tops[:-1]).any() or tops[-1:].max(initial=0) >= 1 << (16 - width):
            raise ArtifactError("the different exponents are not in ascending order, or too large")
        rotated = (tops << width).take(indices)
        rotated |= kernels().unpack_planes(rest, width, count)
        return _restore(halves, rotated, layout)


def _tops(data: np.ndarray, layout: Layout) -> tuple[int, int, np.ndarray, np.ndarray, bytes]:
    """The best number of mantissa bits to take, width of the rest, symbols, their indices (uint8), and the rest."""
    rotated, shift = _upper(data), _shift(layout.dtype)
    best: tuple[float, int] | None = None
    counts = np.bincount(rotated >> shift - _MOST_TAKEN)
    for taken in range(_MOST_TAKEN, -1, -1):
        used = counts[counts > 0]
        if used.size <= 256:
            bits = float((used * np.log2(data.size / used)).sum()) + 16 * used.size - taken * data.size
            best = min(best or (bits, taken), (bits, taken))
        counts = np.append(counts, 0)[: counts.size + counts.size % 2].reshape(-1, 2).sum(axis=1)
    assert best is not None, "there are at most 256 exponents"
    taken = best[1]
    width = shift - taken
    tops = rotated >> width
    symbols = np.flatnonzero(np.bincount(tops)).astype(np.uint16)
    index_of = np.zeros(int(symbols[-1]) + 1, np.uint8)
    index_of[symbols] = np.arange(symbols.size)
    return taken, width, symbols, index_of[tops], kernels().pack_planes(rotated & np.uint16((1 << width) - 1), width)


def _upper(data: np.ndarray) -> np.ndarray:
    """The upper 16 bits of the values, rotated so that the sign comes last: uint16."""
    halves = data.view(np.uint16)[1::2] if data.dtype.itemsize == 4 else data
    return halves << 1 | halves >> 15


def _lower(data: np.ndarray) -> bytes:
    return data.view(np.uint16)[0::2].tobytes() if data.dtype.itemsize == 4 else b""


def _restore(halves: memoryview, rotated: np.ndarray, layout: Layout) -> np.ndarray:
    """The values from their lower and their rotated upper halves."""
    upper = rotated >> 1
    rotated <<= 15
    upper |= rotated
    if layout.dtype != "F32":
        return upper
    values = upper.astype(np.uint32)
    values <<= 16
    values |= np.frombuffer(halves, np.uint16).astype(np.uint32)
    return values


def _shift(dtype: str) -> int:
    """How many bits of a rotated upper half lie below the exponent."""
    return 11 if dtype == "F16" else 8


def _rest_size(layout: Layout) -> int:
    return layout.count + (planes_length(layout.count, 3) if layout.dtype == "F16" else 0)


def _fixed_size(layout: Layout) -> int:
    """The bytes that do not depend on the exponents."""
    return _HEAD.size + 2 * layout.count * (layout.dtype == "F32") + _rest_size(layout)


def _best_base(counts: np.ndarray) -> int:
    """The base that takes the fewest bytes for exponents that occur so often; an exception takes about two."""
    counts = np.sort(counts)[::-1]
    return min(_DIGITS, key=lambda base: counts.sum() / _DIGITS[base] + 2 * counts[base:].sum())


def _places(layout: Layout, exceptions: int) -> Layout:
    """The layout of the exceptions among the values."""
    return Layout(layout.dtype, 1, layout.count, exceptions)


def _cut(part: memoryview, sizes: tuple[int, ...]) -> list[memoryview]:
    pieces = []
    for size in sizes:
        pieces.append(part[:size])
        part = part[size:]
    return pieces


@functools.cache
def _digits(base: int) -> np.ndarray:
    """The digits of each byte, the lowest first: (256, digits a byte)."""
    return (np.arange(256)[:, None] // base ** np.arange(_DIGITS[base]) % base).astype(np.uint8)
