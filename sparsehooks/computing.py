"""What computes the inner loops of files and masks: compiled kernels of a plugin, or the reference in numpy."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from sparsehooks.components import Kernels
from sparsehooks.plugins import attributed, installed_catalog

if TYPE_CHECKING:
    from sparsehooks.catalog import Catalog, Record

Call = tuple[str, tuple[Any, ...]]
"""The name of a method, and what it is given."""
LARGE = (1 << 18) + 37
"""More elements than a chunk of a file usually has, aligned to no vector; masks of more are selected in two passes."""


def kernels() -> Kernels:
    """The kernels of this process: the first that a plugin offers, by name, and that can run here; else the reference.

    Asked are the installed, enabled plugins (in a command, those of its command line), whatever ``plugins`` a call is
    given. Kernels that cannot be loaded, or differ from the reference in some calls of each method, are named in a
    warning and left out; where they fail later, a note of the error names their plugin.
    """
    return _choose(installed_catalog())[0]


def statuses() -> list[tuple[Record, str]]:
    """All kernels that are offered to this process, and of each whether it runs, or why not."""
    return _choose(installed_catalog())[1]


@functools.cache
def _choose(catalog: Catalog) -> tuple[Kernels, list[tuple[Record, str]]]:
    chosen: Kernels | None = None
    statuses = []
    for record in sorted(catalog.records("kernels"), key=lambda record: record.plugin.source == "builtin"):
        if chosen is not None:
            statuses.append((record, "not needed"))
            continue
        found, problem = _try(record)
        statuses.append((record, problem or "runs"))
        chosen = None if problem else found
    return chosen or reference(), statuses


def _try(record: Record) -> tuple[Kernels | None, str | None]:
    """The kernels, or why they are not used."""
    if record.plugin.source == "builtin":
        return reference(), None
    try:
        found = cast("Kernels", record.load()())
        problem = found.problem()
        if problem is not None:
            return None, problem
        wrong = difference(found, lambda: itertools.chain(calls((1, 70)), large_calls()))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - files must stay readable
        wrong = f"{type(error).__name__}: {error}"
    if wrong is not None:
        warnings.warn(f"the kernels of plugin {record.plugin.describe()} are not used: {wrong}", stacklevel=4)
        return None, wrong
    for method in Kernels.__abstractmethods__:
        setattr(found, method, _attributing(record, getattr(found, method)))
    return found, None


@functools.cache
def reference() -> Kernels:
    """The built-in kernels, also where their plugin is switched off."""
    from sparsehooks.builtin.kernels.reference import Numpy

    return Numpy()


def _attributing(record: Record, method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method, which names its plugin in an error; ``attributed`` around each call would take a microsecond."""

    @functools.wraps(method)
    def call(*given: Any, **named: Any) -> Any:
        try:
            return method(*given, **named)
        except Exception:
            with attributed(record):
                raise

    return call


def difference(found: Kernels, calls: Callable[[], Iterator[Call]]) -> str | None:
    """Where kernels first give other bits than the reference, or write to what they are given; None: nowhere.

    Args:
        found: the kernels.
        calls: makes the same calls each time.
    """
    for (method, given), (_, expected) in zip(calls(), calls(), strict=True):
        if _outcome(found, method, given) != _outcome(reference(), method, expected):
            return f"{method}() differs from the reference for {', '.join(map(_described, expected))}"
    return None


def _outcome(kernels: Kernels, method: str, given: tuple[Any, ...]) -> Any:
    """What is returned or raised, and what the arguments are then, as something that can be compared."""
    try:
        answer = getattr(kernels, method)(*given)
    except (ValueError, IndexError) as error:
        return type(error)
    return _bits(answer), _bits(given)


def _bits(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_bits(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(torch.uint8).numpy().tobytes()
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def _described(value: Any) -> str:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{len(value)} of {value.dtype}"
    return f"{len(value)} bytes" if isinstance(value, memoryview) else str(value)


def calls(sizes: Sequence[int]) -> Iterator[Call]:
    """Calls of all methods with arrays of some sizes, aligned to elements and not to vectors, and wrong ones."""
    random = np.random.default_rng(0)
    for size in sizes:
        yield from _of_bits(random, size)
        for density in (0, 0.02, 0.5, 1):
            yield from _of_positions(random, np.flatnonzero(random.random(size) < density), size)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            yield from _of_scores(random, size, dtype)


def large_calls(size: int = LARGE) -> Iterator[Call]:
    """A call of each method for each kind of array, of the size of a chunk of a file: few, because they take longer."""
    random = np.random.default_rng(0)
    data = memoryview(random.bytes(4 * size))
    yield "checksum", (data, 1)
    yield "unpack_bits", (data[: -(-size // 8)],)
    positions = np.flatnonzero(random.random(size) < 0.3)
    yield "pack_bits", (positions, size)
    for low in (1, 9):
        yield "split_gaps", (positions, low)
        yield "join_gaps", (*reference().split_gaps(positions, low), low)
    for name in ("u1", "u2", "u4", "u8"):
        values = np.zeros(size, name)
        values[positions] = random.integers(1, 256, positions.size)
        yield "nonzero", (values, 1)
    for name in ("u1", "u2", "i8"):
        yield "join_gaps", (random.integers(0, 256, size).astype(name),)
    for name, width in (("u1", 5), ("u2", 11)):
        yield "pack_planes", (random.integers(0, 1 << width, size).astype(name), width)
        yield "unpack_planes", (data[: width * -(-size // 8)], width, size)
    for name in ("u2", "u4"):
        yield "split_exponents", (np.frombuffer(data, name)[:size], 11, np.arange(3, dtype=np.uint8), 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scores = torch.from_numpy(random.standard_normal(size)).to(dtype)
        yield "between", (scores, 0.5, 1.0)
        yield "largest", (scores, 0.5, 3)


def _of_bits(random: np.random.Generator, size: int) -> Iterator[Call]:
    for bits in (np.zeros(size, np.uint8), np.full(size, 255, np.uint8), random.integers(0, 256, size, np.uint8)):
        yield "unpack_bits", (memoryview(bytes(bits)),)
    for values in (random.integers(0, 1 << 8 * width, size + 1).astype(f"u{width}")[1:] for width in (2, 4)):
        narrow = values >> 8 * values.itemsize - 4 << 8 * values.itemsize - 4  # of few exponents
        for base, digits in ((3, 5), (4, 4), (6, 3), (16, 2)):
            yield "split_exponents", (values, 8, random.permutation(256).astype(np.uint8)[:base], digits)
            yield "split_exponents", (narrow, 11, 2 * random.permutation(16).astype(np.uint8)[:base], digits)
    data = random.bytes(8 * size + 1)
    yield from (("checksum", (memoryview(data)[first:], start)) for first in (0, 1) for start in (0, 1, 0xFFFFFFFF))
    for width in range(17):
        length = width * -(-size // 8)
        yield "unpack_planes", (memoryview(random.bytes(length)), width, size)
        yield "unpack_planes", (memoryview(random.bytes(length + 1)), width, size)
        for dtype in (np.uint8, np.uint16)[width > 8 :]:
            yield "pack_planes", (random.integers(0, 1 << width, size + 1).astype(dtype)[1:], width)
    for numbers in (random.integers(0, 256, size + 1).astype(name)[1:] for name in ("u1", "u2", "i8")):
        yield "join_gaps", (numbers,)


def _of_positions(random: np.random.Generator, positions: np.ndarray, size: int) -> Iterator[Call]:
    yield "pack_bits", (positions, size)
    for low in (0, 1, 7, 8, 9, 15):
        lowest, ones = reference().split_gaps(positions, low)
        yield "split_gaps", (positions, low)
        yield "join_gaps", (lowest, ones, low)
        yield "join_gaps", (lowest, ones[1:], low) if ones.size else (lowest, np.zeros(1, np.intp), low)
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        values = random.integers(0, 256, (size + 1) * np.dtype(dtype).itemsize, np.uint8).view(dtype)[1:]
        dense = np.zeros(size + 1, dtype)[1:]
        dense[positions] = values[positions]
        signs = np.where(dense == 0, dtype(1) << dtype(8 * dense.itemsize - 1), dense)
        yield from (("nonzero", (bits, shift)) for bits in (dense, signs, values) for shift in (0, 1))


def _of_scores(random: np.random.Generator, size: int, dtype: torch.dtype) -> Iterator[Call]:
    normal = torch.from_numpy(random.standard_normal(size + 1)).to(dtype)[1:]
    some = torch.from_numpy(random.random(size))
    special = torch.tensor([-0.0, 0.0, torch.nan, torch.inf, -torch.inf], dtype=dtype, device="cpu").repeat(size)[:size]
    odd = torch.where(some < 0.2, special, normal)
    for scores in (normal, (2 * normal).round(), odd, torch.zeros_like(normal)):
        middle = scores[~scores.isnan()].sort().values[size // 3 : size // 3 + 1].tolist()
        for high in (-torch.inf, -0.0, 0.0, *middle, torch.inf):
            yield from (("between", (scores, low, high)) for low in (-torch.inf, -0.0, 0.0, *middle) if low <= high)
            yield from (("largest", (scores, high, ties)) for ties in (0, 3, size))
