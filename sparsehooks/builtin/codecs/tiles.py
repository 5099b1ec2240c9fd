"""Values that are one of few levels times a scale for each tile of a matrix: found from the values alone.

For a level each value leaves an interval of scales whose products round to it. A scale has fewer significant bits than
float32, so the smallest number of so many bits in all intervals of a tile is its scale, or one as good.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from sparsehooks import Layout

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"F32": torch.uint32, "BF16": torch.uint16, "F16": torch.uint16}
SMALLEST = 0x00800000
"""The bits of 2^-126, the smallest scale."""
_MOST = 255
_SAMPLE = 64
_OFF = 1e-4
_CLOSE = 1e-6
"""How far off a code, or a level of at most 1, float32 may be."""
_EVIDENCE = 20
_TILES = 8
_PATIENCE = 32
"""How often values are compared before a tile that fits no scale ends the search."""
_FIRST = 5
_VARIED, _DIFFERENT = 32, 24
"""Of so many values of a grid of 5 bits so many differ at most; random ones nearly all do."""
_GROUP = 16
"""Smaller groups are not looked for: their scales would take more than their codes."""
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Levels:
    """What codes stand for before they are scaled.

    Attributes:
        values: float32, ascending, zero among them.
        significant: the bits of a scale.
        width: the bits of a code.
        range: how far apart the codes of a tile may be, zero included: an asymmetric grid; 0 if that does not matter.
        whole: whether the values are integers without a gap.
    """

    values: np.ndarray
    significant: int
    width: int
    range: int = 0
    whole: bool = True

    @functools.cached_property
    def zero(self) -> int:
        """The place of zero."""
        return int(np.flatnonzero(self.values == 0)[0])

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """What may be the largest magnitude of a tile, or the range of an asymmetric one, in descending order."""
        sizes: np.ndarray = np.arange(self.range, 0, -1.0) if self.range else np.unique(np.abs(self.values))[:0:-1]
        return sizes

    def nearest(self, ratios: np.ndarray) -> np.ndarray:
        """The places of the nearest levels: int32."""
        if self.whole:
            places: np.ndarray = np.clip(np.rint(ratios) + self.zero, 0, len(self.values) - 1).astype(np.int32)
            return places
        return np.searchsorted((self.values[1:] + self.values[:-1]) / 2, ratios).astype(np.int32)


@functools.cache
def symmetric(width: int) -> Levels:
    """The codes of a symmetric grid."""
    most = (1 << (width - 1)) - 1
    return Levels(np.arange(-most, most + 1, dtype=np.float32), 17, width)


@functools.cache
def asymmetric(width: int) -> Levels:
    """The codes of an asymmetric grid, less their zero point."""
    most = (1 << width) - 1
    return Levels(np.arange(-most, most + 1, dtype=np.float32), 16, width, most)


@functools.cache
def unsigned() -> Levels:
    """Bytes: scales that are quantized too are a byte times a scale of their own."""
    return Levels(np.arange(_MOST + 1, dtype=np.float32), 16, 8)


@functools.cache
def normal(significant: int) -> Levels:
    """NF4, quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314)."""
    quantile, edge = NormalDist().inv_cdf, 0.9677083 - 0.5
    above = [quantile(0.5 + edge * place / 8) for place in range(9)]
    below = [-quantile(0.5 + edge * place / 7) for place in range(7, 0, -1)]
    values = np.array([value / above[-1] for value in below + above]).astype(np.float32)
    return Levels(values, significant, 4, whole=False)


def remembered(function: Callable[[np.ndarray, Layout], Result]) -> Callable[[np.ndarray, Layout], Result]:
    """Keep the last result of each thread: several codecs ask about the same values."""
    memory = threading.local()

    @functools.wraps(function)
    def asked(data: np.ndarray, layout: Layout) -> Result:
        last = getattr(memory, "last", None)
        if last is None or last[0] is not data or last[1] is not layout:
            memory.last = last = data, layout, function(data, layout)
        result: Result = last[2]
        return result

    return asked


class Tile(NamedTuple):
    """A shape that cuts a matrix into parts with a scale each, in row-major order; the last ones may be smaller."""

    rows: int
    columns: int

    def count(self, layout: Layout) -> int:
        """How many there are."""
        return -(-layout.rows // self.rows) * -(-layout.columns // self.columns)

    def numbers(self, layout: Layout) -> np.ndarray:
        """The tile of each value."""
        places = np.arange(layout.size) if layout.positions is None else layout.positions
        if self.columns >= layout.columns:
            return places // (self.rows * layout.columns)
        if self.rows == 1 and layout.columns % self.columns == 0:
            return places // self.columns
        row, column = np.divmod(places, layout.columns)
        numbers: np.ndarray = row // self.rows * -(-layout.columns // self.columns) + column // self.columns
        return numbers


class Found(NamedTuple):
    """A grid that gives back every bit: scales (float32) of each tile, the place of the level (int32) of each value."""

    tile: Tile
    levels: Levels
    scales: np.ndarray
    places: np.ndarray


def products(levels: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of levels times scales, both float32: rounded to float32, then to the dtype; a zero is +0.0."""
    values = (torch.from_numpy(levels) * torch.from_numpy(scales)).to(DTYPES[dtype]).add_(0.0)
    bits: np.ndarray = values.view(_BITS[dtype]).numpy()
    return bits


def find(data: np.ndarray, layout: Layout) -> Found | None:
    """The grid on which values lie: that of the fewest bits, of the largest tiles; None if there is none."""
    if layout.dtype not in DTYPES or not data.size:
        return None
    if hopeless(data, layout):
        return None
    rows, columns = _first_values(data, layout)
    if layout.dtype == "BF16":
        apart = [_differ(max(rows, key=len), if_few=False), *(_differ(sample, if_few=True) for sample in columns)]
        if all(apart):
            return None
    if not any(plausible(sample, layout.dtype, _EVIDENCE) for sample in rows + columns):
        return None
    for tile in _tiles(layout):
        numbers = tile.numbers(layout)
        counts = np.bincount(numbers, minlength=tile.count(layout))
        order = None if tile.rows == 1 or tile.columns == layout.columns else np.argsort(numbers, kind="stable")
        values = _Values(data if order is None else data[order], layout.dtype, counts[counts > 0])
        for levels in _candidates(values):
            fitted = fit(values, levels)
            if fitted is None:
                continue
            scales, places = np.ones(counts.size, np.float32), fitted[1]
            scales[counts > 0] = fitted[0]
            if order is not None:
                places = np.empty_like(places)
                places[order] = fitted[1]
            return Found(tile, levels, scales, places)
    return None


# --------------------------------------------------------------------------------------------- the scales of tiles


class _Values(NamedTuple):
    """The bits of values, tile by tile, and how many each tile has; none is empty."""

    data: np.ndarray
    dtype: str
    counts: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        starts: np.ndarray = np.cumsum(self.counts) - self.counts
        return starts

    def within(self, tiles: np.ndarray) -> np.ndarray:
        """The places of the values of tiles in ascending order."""
        if tiles.size == self.counts.size:
            return np.arange(self.data.size)
        counts = self.counts[tiles]
        starts = np.repeat(self.starts[tiles] - (np.cumsum(counts) - counts), counts)
        places: np.ndarray = starts + np.arange(starts.size)
        return places

    def some(self, tiles: np.ndarray) -> _Values:
        """Those of tiles in ascending order."""
        return _Values(self.data[self.within(tiles)], self.dtype, self.counts[tiles])

    def few(self) -> _Values:
        """Some of each tile."""
        steps = -(-self.counts // _SAMPLE)
        kept = (np.arange(self.data.size) - np.repeat(self.starts, self.counts)) % np.repeat(steps, self.counts) == 0
        return _Values(self.data[kept], self.dtype, -(-self.counts // steps))


def of_floats(numbers: np.ndarray, run: int, first: int) -> _Values:
    """Float32 numbers in runs; the first one is shorter or longer."""
    cuts = np.array([0, *range(first, numbers.size, run), numbers.size])
    return _Values(numbers.view(np.uint32), "F32", np.diff(cuts))


def fit(values: _Values, levels: Levels) -> tuple[np.ndarray, np.ndarray] | None:
    """Scales and places of levels that give back every bit: float32 of each tile, int32 of each value."""
    reach = _reach(values, levels)
    if not np.isfinite(reach).all():
        return None
    scales, places = np.ones(reach.size, np.float32), np.full(values.data.size, levels.zero, np.int32)
    few, left, work = values.few(), np.flatnonzero(reach), 0
    for size in levels.sizes:
        if not left.size or work > _PATIENCE * max(values.data.size, 1 << 15):
            break
        part = few.some(left)
        some = left[_try(part, levels, reach[left] / size)[0]]
        tried = values.some(some)
        work += part.data.size + tried.data.size
        if not some.size:
            continue
        fits, found, at = _try(tried, levels, reach[some] / size)
        chosen = np.repeat(fits, tried.counts)
        places[values.within(some)[chosen]] = at[chosen]
        scales[some[fits]] = found[fits]
        left = np.setdiff1d(left, some[fits], assume_unique=True)
    return None if left.size else (scales, places)


def _reach(values: _Values, levels: Levels) -> np.ndarray:
    """The largest magnitude of each tile, or its range with zero: a multiple of its scale."""
    numbers = _floats(values.data, values.dtype).astype(np.float64)
    high = np.maximum.reduceat(numbers, values.starts).clip(min=0)
    low = np.minimum.reduceat(numbers, values.starts).clip(max=0)
    reach: np.ndarray = high - low if levels.range else np.maximum(high, -low)
    return reach


def _try(values: _Values, levels: Levels, guess: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which tiles a scale near the guess gives back, these scales, and the places of the levels."""
    numbers = _floats(values.data, values.dtype)
    places = levels.nearest(numbers / np.repeat(guess, values.counts))
    chosen = levels.values.take(places)
    sizes = np.abs(chosen).astype(np.float64)
    least = np.divide(_least(values), sizes, out=np.zeros(sizes.size), where=sizes > 0)
    scales = _round_up(np.maximum.reduceat(least, values.starts), levels.significant)
    allowed = np.ones(scales.size, np.bool_)
    if levels.range:
        signed = places - levels.zero
        high = np.maximum.reduceat(signed, values.starts).clip(min=0)
        allowed = high - np.minimum.reduceat(signed, values.starts).clip(max=0) <= levels.range
    step = np.uint32(1 << (24 - levels.significant))
    fits = np.zeros(scales.size, np.bool_)
    for _ in range(2):  # at the end of an interval a tie may round the other way
        made = products(chosen, np.repeat(scales, values.counts), values.dtype)
        fits = np.logical_and.reduceat(made == values.data, values.starts) & allowed
        if fits.all():
            break
        scales = np.where(fits, scales, (scales.view(np.uint32) + step).view(np.float32))
    return fits, scales, places


def _least(values: _Values) -> np.ndarray:
    """The magnitudes from which on numbers round to the values; float64."""
    sizes = values.data & values.data.dtype.type((1 << 8 * values.data.itemsize - 1) - 1)
    here, below = _floats(sizes, values.dtype), _floats(np.maximum(sizes, 1) - sizes.dtype.type(1), values.dtype)
    middle: np.ndarray = (here.astype(np.float64) + below) / 2
    return middle


def _round_up(numbers: np.ndarray, significant: int) -> np.ndarray:
    """The smallest float32 of so many significant bits, none below 2^-126, that are not smaller."""
    near = np.clip(numbers, 2.0**-126, float(np.finfo(np.float32).max)).astype(np.float32)
    mask = np.uint32((1 << (24 - significant)) - 1)
    raw = near.view(np.uint32) + (near < numbers).astype(np.uint32)
    rounded: np.ndarray = ((raw + mask) & ~mask).view(np.float32)
    return rounded


def _floats(data: np.ndarray, dtype: str) -> np.ndarray:
    values: np.ndarray = torch.from_numpy(data).view(DTYPES[dtype]).float().numpy()
    return values


# ------------------------------------------------------------------------------------------- what is worth a try


@functools.cache
def _orders(dtype: str) -> tuple[Levels, ...]:
    """All levels, those of the fewest bits first."""
    integers = [levels(width) for width in range(2, 9) for levels in (symmetric, asymmetric)]
    at = 6  # after the grids of 4 bits
    if dtype == "BF16":  # its 8 bits do not tell larger codes apart, so that almost anything may lie on those grids
        integers = [levels for levels in integers if levels.width <= 5]
    return (*integers[:at], *(normal(bits) for bits in ((24,) if dtype == "F32" else (17, 24))), *integers[at:])


def plausible(sample: np.ndarray, dtype: str, evidence: float = 0) -> tuple[Levels, ...]:
    """The levels of which bits of a tile may be multiples, as far as float32 can tell; of random values there are none.

    What passes is compared bit by bit later; here random values shall not take any time.

    Args:
        sample: bits of values of one tile.
        dtype: the safetensors name of their dtype.
        evidence: random values lie on the levels with a probability of at most 2 to the minus this.
    """
    values = _floats(sample, dtype)
    reach = np.abs(values).max(initial=0)
    if not 0 < reach < np.inf:
        return ()
    eps, ratios = float(torch.finfo(DTYPES[dtype]).eps), values / reach
    most, on_normal = _least_code(ratios, eps, evidence), _is_normal(ratios, eps, evidence)
    if not most:
        return tuple(levels for levels in _orders(dtype) if not levels.whole) if on_normal else ()
    span = int(np.rint(values.max(initial=0) / reach * most) - np.rint(values.min(initial=0) / reach * most))
    return tuple(
        levels
        for levels in _orders(dtype)
        if (on_normal if not levels.whole else span <= levels.range if levels.range else most <= levels.values[-1])
    )


def _least_code(ratios: np.ndarray, eps: float, evidence: float) -> int:
    """The smallest code that the largest magnitude may have; 0 if there is none."""
    codes = _codes() * ratios
    near = np.abs(np.rint(codes))
    codes = np.abs(codes)
    fits = np.flatnonzero((np.abs(codes - near) <= eps * near + _OFF).all(axis=1))
    if fits.size and evidence:
        chance = np.minimum(2 * (eps * codes[fits] + _OFF), 1)
        chance[:, (ratios == 0) | (np.abs(ratios) == 1)] = 1
        fits = fits[np.log2(chance).sum(axis=1) <= -evidence]
    return int(fits[0]) + 1 if fits.size else 0


def _is_normal(ratios: np.ndarray, eps: float, evidence: float) -> bool:
    """Whether values may be levels of NF4."""
    levels = normal(24)
    tried = _sizes() * ratios
    near = levels.values.take(levels.nearest(tried))
    chance = float((eps * np.abs(levels.values) + _CLOSE).sum())
    enough = -np.log2(chance) * (np.count_nonzero(ratios) - 1) >= evidence
    return bool(enough and (np.abs(tried - near) <= eps * np.abs(near) + _CLOSE).all(axis=1).any())


@functools.cache
def _codes() -> np.ndarray:
    return np.arange(1, _MOST + 1, dtype=np.float32)[:, None]


@functools.cache
def _sizes() -> np.ndarray:
    return normal(24).sizes.astype(np.float32)[:, None]


def _first_values(data: np.ndarray, layout: Layout) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Few values of rows, and of columns, that have a scale together on a grid that is looked for."""
    first = 0 if data[0] else int(np.argmax(data != 0))  # zeros lie on every grid
    lengths = (_GROUP, _SAMPLE) if layout.dtype == "BF16" else (_GROUP,)  # there 16 codes of 8 bits may be any values
    if layout.positions is None:
        row = first // layout.columns * layout.columns
        column = data[first % layout.columns :: layout.columns]
        rows = [data[row : row + min(length, layout.columns)] for length in lengths]
        return rows, [column[:length] for length in lengths]
    places, bits = layout.positions[first : first + 4096], data[first : first + 4096]
    row = int(places[0]) // layout.columns * layout.columns
    found = []
    for width in {_smallest(layout), layout.columns}:
        starts = np.arange(row, min(row + 4 * layout.columns, layout.size), layout.columns)
        low, high = places.searchsorted(starts), places.searchsorted(starts + width)
        most = int((high - low).argmax())
        found.append(bits[low[most] : high[most]][: lengths[-1]])
    columns = places % layout.columns
    return found, [bits[columns == columns[len(columns) // 2]][: lengths[-1]]]


@remembered
def hopeless(data: np.ndarray, layout: Layout) -> bool:
    """Whether the first few values of a row and of a column tell that there is no grid: this is quick."""
    rows, columns = _first_values(data, layout)
    if min(sample.size for sample in rows) < _FIRST:
        return False
    few = np.array([sample[:_FIRST] for sample in rows + columns if sample.size >= _FIRST])
    values, info = _floats(few, layout.dtype), torch.finfo(DTYPES[layout.dtype])
    reach = np.abs(values).max(axis=1)[:, None, None]
    if not (reach > 0).all() or not np.isfinite(reach).all():
        return not np.isfinite(reach).all()
    ratios = values[:, None] / reach
    codes = _codes() * ratios
    near = np.rint(codes)
    codes -= near
    off = _OFF + info.smallest_normal / reach * _codes()
    if (np.abs(codes) <= info.eps * np.abs(near) + off).all(axis=2).any():
        return False
    levels = normal(24)
    tried = _sizes() * ratios
    near = levels.values.take(levels.nearest(tried))
    return not (np.abs(tried - near) <= info.eps * np.abs(near) + _CLOSE).all(axis=2).any()


def _differ(sample: np.ndarray, *, if_few: bool) -> bool:
    """Whether bfloat16 values are too different to be codes of at most 5 bits."""
    if sample.size < _VARIED:
        return if_few
    sizes = sample[:_VARIED] & sample.dtype.type(0x7FFF)
    return bool(np.unique(sizes).size > _DIFFERENT)


def _smallest(layout: Layout) -> int:
    """The fewest elements of a group: enough for some values."""
    values = 8 if layout.dtype == "F32" else 12
    return max(_GROUP, -(-values * layout.size // max(1, layout.count)))


def _tiles(layout: Layout) -> Iterator[Tile]:
    """Those that are looked for, the largest first."""
    smallest = _smallest(layout)
    yield Tile(layout.rows, layout.columns)
    for size in _divisors(layout.columns):
        if size == layout.columns > 1 or smallest <= size:
            yield Tile(1, size)
    for size in _divisors(layout.rows):
        if size == layout.rows > 1 or smallest <= size:
            yield Tile(size, 1)


def _divisors(number: int) -> list[int]:
    """In descending order."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)}, reverse=True)


def _candidates(values: _Values) -> Iterator[Levels]:
    """The levels on which some values of some tiles lie."""
    ends = np.cumsum(values.counts)
    most = np.argsort(-values.counts[:4096], kind="stable")[: _TILES // 2]
    spread = np.linspace(0, ends.size - 1, _TILES // 2).astype(np.intp)
    samples = []
    for tile in {*most.tolist(), *spread.tolist()}:
        places = np.linspace(ends[tile] - values.counts[tile], ends[tile] - 1, min(_SAMPLE, values.counts[tile]))
        samples.append(values.data[places.astype(np.intp)])
    left = _orders(values.dtype)
    for sample in samples:
        if sample.any():
            allowed = plausible(sample, values.dtype)
            left = tuple(levels for levels in left if levels in allowed)
        if not left:
            return
    part = _Values(np.concatenate(samples), values.dtype, np.array([sample.size for sample in samples]))
    yield from (levels for levels in left if fit(part, levels) is not None)
