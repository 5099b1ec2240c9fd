"""Values that are integers, or levels of a table, times a scale for each tile: a tensor, a row, a group, a column."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout, kernels
from sparsehooks.builtin.codecs.entropy import squeeze, unsqueeze
from sparsehooks.builtin.codecs.planes import planes_length
from sparsehooks.builtin.codecs.tiles import (
    DTYPES,
    SMALLEST,
    Found,
    Tile,
    find,
    fit,
    of_floats,
    plausible,
    products,
    remembered,
    unsigned,
)

_HEAD = struct.Struct("<BBBBII")
"""Bits of a code, kind, form of the scales, zero, rows and columns of a tile."""
_SYMMETRIC, _ASYMMETRIC, _TABLE = range(3)
_SHORT, _FULL, _DOUBLE = 3, 4, 1
"""Forms of scales, by the bytes that each takes: 17 significant bits, float32, and a byte times a scale of a run."""
_RUN = 256
_LARGEST = 0x7F7FFFFF


class Grid(Codec):
    """A code of 2 to 8 bits for each value and a scale for each tile.

    Whether values lie on a grid is found from the values alone; codes and scales have to give back every bit.
    ``docs/format.md`` has the layout: what a code is, the shape of a tile, the scales, the zero points or the table of
    levels, and the codes.
    """

    role = "values"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of float32, bfloat16 or float16 that all lie on a grid."""
        found = _found(data, layout)
        return None if found is None else len(found.head) + planes_length(layout.count, found.width)

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """What the codes mean, and the codes as bit planes."""
        found = _checked(data, layout)
        return found.head + kernels().pack_planes(found.codes, found.width)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The products of levels and scales."""
        meaning, rest = _read(part, layout)
        if len(rest) != planes_length(layout.count, meaning.width):
            raise ArtifactError(f"{len(rest)} bytes are not {layout.count} codes of {meaning.width} bits")
        return meaning.values(kernels().unpack_planes(rest, meaning.width, layout.count), layout)


class GridEntropy(Codec):
    """The same with the codes entropy-coded, a byte each."""

    role = "values"
    level = "small"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of float32, bfloat16 or float16 that all lie on a grid."""
        found = _found(data, layout)
        return None if found is None else len(found.head) + 1

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """What the codes mean, and the codes."""
        found = _checked(data, layout)
        return found.head + squeeze(found.codes)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The products of levels and scales."""
        meaning, rest = _read(part, layout)
        return meaning.values(unsqueeze(rest, layout.count), layout)


# ------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, eq=False)
class _Written:
    """The bytes that say what codes mean, the bits of a code, and the codes (uint8, one a value)."""

    head: bytes
    width: int
    codes: np.ndarray


@remembered
def _found(data: np.ndarray, layout: Layout) -> _Written | None:
    found = find(data, layout)
    return None if found is None else _written(found, layout)


def _checked(data: np.ndarray, layout: Layout) -> _Written:
    found = _found(data, layout)
    if found is None:
        raise ValueError("the values do not lie on a grid")
    return found


def _written(found: Found, layout: Layout) -> _Written:
    levels, places = found.levels, found.places
    kind, more = _TABLE if not levels.whole else _ASYMMETRIC if levels.range else _SYMMETRIC, b""
    if kind == _TABLE:
        more = levels.values.tobytes()
    elif kind == _ASYMMETRIC:
        numbers = found.tile.numbers(layout)
        zeros = np.zeros(found.scales.size, np.int32)
        np.maximum.at(zeros, numbers, levels.zero - places)
        places = places - levels.zero + zeros[numbers]
        more = kernels().pack_planes(zeros.astype(np.uint8), levels.width)
    form, scales = _packed(found.scales)
    head = _HEAD.pack(levels.width, kind, form, 0, *found.tile)
    return _Written(head + scales + more, levels.width, places.astype(np.uint8))


def _packed(scales: np.ndarray) -> tuple[int, bytes]:
    """The shortest form of scales, and their bytes."""
    bits = scales.view(np.uint32)
    if not (bits & 127).any():
        return _SHORT, _short(scales)
    first = _first_run(scales)
    within = bits[first : first + 16]
    plain = within.size and not plausible(within, "F32")
    runs = None if plain or not first else fit(of_floats(scales, _RUN, first), unsigned())
    if runs is None:
        return _FULL, bits.tobytes()
    return _DOUBLE, struct.pack("<H", first) + runs[1].astype(np.uint8).tobytes() + _short(runs[0])


def _first_run(scales: np.ndarray) -> int:
    """How many of the first scales are bytes times one scale: a chunk may begin within a run."""
    low, high = 0, min(_RUN, scales.size)
    while low < high:
        middle = (low + high + 1) // 2
        fits = plausible(scales[:middle].view(np.uint32), "F32")
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _short(scales: np.ndarray) -> bytes:
    """The 24 bits below the sign, of which the lowest 7 of 31 are zero."""
    return (scales.view(np.uint32) >> 7).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class _Meaning:
    """What codes mean: a level is ``table[code]`` (float32), less the zero point of its tile if there are any."""

    width: int
    tile: Tile
    scales: np.ndarray
    table: np.ndarray
    zeros: np.ndarray | None

    def values(self, codes: np.ndarray, layout: Layout) -> np.ndarray:
        """The bits of the values."""
        if codes.max(initial=0) >= self.table.size:
            raise ArtifactError("a code lies outside the grid")
        numbers = self.tile.numbers(layout)
        levels = self.table.take(codes)
        if self.zeros is not None:
            levels -= self.zeros.take(numbers)
        return products(levels, self.scales.take(numbers), layout.dtype)


def _read(part: memoryview, layout: Layout) -> tuple[_Meaning, memoryview]:
    if layout.dtype not in DTYPES or len(part) < _HEAD.size:
        raise ArtifactError(f"codes of a grid cannot stand for {layout.dtype} values")
    width, kind, form, zero, *shape = _HEAD.unpack(part[: _HEAD.size])
    tile = Tile(*shape)
    if not 2 <= width <= 8 or kind > _TABLE or form not in (_SHORT, _FULL, _DOUBLE) or zero:
        raise ArtifactError("the grid is of an unknown kind")
    if not (0 < tile.rows <= layout.rows and 0 < tile.columns <= layout.columns):
        raise ArtifactError(f"tiles of {tile.rows} x {tile.columns} do not fit {layout.rows} x {layout.columns}")
    scales, rest = _read_scales(part[_HEAD.size :], form, tile.count(layout))
    most, zeros = (1 << width) - 1, None
    if kind == _SYMMETRIC:
        table = np.arange(most, dtype=np.float32) - most // 2
    elif kind == _ASYMMETRIC:
        table = np.arange(most + 1, dtype=np.float32)
        packed, rest = _cut(rest, planes_length(scales.size, width))
        zeros = kernels().unpack_planes(packed, width, scales.size).astype(np.float32)
    else:
        packed, rest = _cut(rest, 4 * (most + 1))
        table = np.frombuffer(packed, np.float32)
        if not np.isfinite(table).all():
            raise ArtifactError("a level of the grid is not finite")
    return _Meaning(width, tile, scales, table, zeros), rest


def _read_scales(part: memoryview, form: int, count: int) -> tuple[np.ndarray, memoryview]:
    if form != _DOUBLE:
        packed, rest = _cut(part, form * count)
        return (_unshort(packed) if form == _SHORT else _valid(np.frombuffer(packed, np.uint32))), rest
    packed, rest = _cut(part, 2 + count)
    first, factors = int.from_bytes(packed[:2], "little"), np.frombuffer(packed[2:], np.uint8)
    if not 0 < first <= min(_RUN, count) or not factors.all():
        raise ArtifactError("the scales of the grid are not bytes in runs of 256")
    runs = 1 + -(-(count - first) // _RUN)
    packed, rest = _cut(rest, _SHORT * runs)
    steps = _unshort(packed).repeat([first, *[_RUN] * (runs - 1)])[:count]
    with np.errstate(over="ignore"):
        return _valid((steps * factors.astype(np.float32)).view(np.uint32)), rest


def _unshort(packed: memoryview) -> np.ndarray:
    bits = np.zeros((len(packed) // 3, 4), np.uint8)
    bits[:, :3] = np.frombuffer(packed, np.uint8).reshape(-1, 3)
    return _valid(bits.view(np.uint32).reshape(-1) << 7)


def _valid(bits: np.ndarray) -> np.ndarray:
    if bits.min(initial=SMALLEST) < SMALLEST or bits.max(initial=0) > _LARGEST:
        raise ArtifactError("a scale of the grid is not a normal number")
    return bits.view(np.float32)


def _cut(part: memoryview, length: int) -> tuple[memoryview, memoryview]:
    if len(part) < length:
        raise ArtifactError("the grid is cut short")
    return part[:length], part[length:]
