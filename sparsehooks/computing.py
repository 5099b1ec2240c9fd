"""What computes the inner loops of files and masks: compiled kernels of a plugin, or the reference in numpy."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from sparsehooks.components import Kernels
from sparsehooks.plugins import attributed, installed_catalog

if TYPE_CHECKING:
    from sparsehooks.catalog import Record

Call = tuple[str, tuple[Any, ...]]
"""The name of a method, and what it is given."""


@functools.cache
def kernels() -> Kernels:
    """The kernels of this process: those of the first plugin, by their name, that can run here; else the reference.

    Only installed, enabled plugins are asked. One whose kernels cannot be loaded or give other bits than the reference
    is named in a warning and left out; one whose kernels fail later is named in a note of the error.
    """
    for record in installed_catalog().records("kernels"):
        if record.plugin.source == "builtin":
            continue
        try:
            found = cast("Kernels", record.load()())
            if found.problem() is not None:
                continue
            wrong = difference(found, lambda: calls((1, 70)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - files must stay readable
            wrong = f"{type(error).__name__}: {error}"
        if wrong is None:
            for method in Kernels.__abstractmethods__:
                setattr(found, method, _attributing(record, getattr(found, method)))
            return found
        warnings.warn(f"the kernels of plugin {record.plugin.describe()} are not used: {wrong}", stacklevel=2)
    return reference()


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
