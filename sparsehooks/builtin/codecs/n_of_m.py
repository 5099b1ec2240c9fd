"""Positions of N:M sparsity, as sparse tensor cores read it for 2:4 (Mishra et al. 2021, arXiv:2104.08378)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout, kernels
from sparsehooks.builtin.codecs.planes import planes_length

_GROUPS = (2, 4, 8, 16)
_SAMPLE = 1024
_PADDED = 1.3
"""Groups are filled up with explicit zeros, but not beyond this multiple of the nonzeros."""


class Form(NamedTuple):
    """How groups of ``m`` with ``n`` kept are written.

    A group is the number of its combination, in lexicographic order. A word holds as many groups as fit 16 bits, the
    first in the lowest digit of a number to the base of the number of combinations.
    """

    n: int
    m: int

    @property
    def choices(self) -> int:
        """How many combinations there are."""
        return comb(self.m, self.n)

    @property
    def groups(self) -> int:
        """How many groups a word holds: as many as waste the fewest bits, at most 16 bits a word."""
        fits = [groups for groups in range(1, 9) if self.choices**groups <= 1 << 16]
        return min(fits, key=lambda groups: (_bits(self.choices**groups) / groups, groups))

    @property
    def width(self) -> int:
        """The bits of a word."""
        return _bits(self.choices**self.groups)


class NOfM(Codec):
    """Exactly N values in each group of M neighbours; M is 2, 4, 8 or 16.

    The part: N and M (a byte each) and the words of all groups as bit planes. A group with fewer than N nonzeros
    keeps explicit zeros. In the last word the digits of missing groups are 0. For 2:4 a word is 5 groups in 13 bits,
    0.65 bits an element, where log2(6) / 4 = 0.646.
    """

    role = "positions"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Chunks of whole groups, of which some leave room for not many more values than there are."""
        form = _fit(data, layout)
        return None if form is None else 2 + planes_length(_words(form, layout), form.width)

    def cover(self, data: np.ndarray, layout: Layout) -> np.ndarray:
        """Exactly N positions in each group: the first free ones are added."""
        form = _fit(data, layout)
        if form is None or data.size * form.m == form.n * layout.size:
            return data
        kept = np.zeros((layout.size // form.m, form.m), np.bool_)
        kept.reshape(-1)[data] = True
        short = np.flatnonzero(kept.sum(axis=1) < form.n)
        order = np.argsort(~kept[short], axis=1, kind="stable")[:, : form.n]
        kept[short[:, None], order] = True
        return np.flatnonzero(kept.reshape(-1))

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """The numbers of the combinations."""
        form = next(form for form in _forms(data, layout) if data.size * form.m == form.n * layout.size)
        places = (data & (form.m - 1)).astype(np.uint8).reshape(-1, form.n)
        masks = np.zeros(len(places), np.uint16)
        for place in range(form.n):
            masks |= np.uint16(1) << places[:, place].astype(np.uint16)
        digits = np.zeros((_words(form, layout), form.groups), np.float32)
        digits.reshape(-1)[: masks.size] = _number_of_mask(form).take(masks)
        words = digits @ (form.choices ** np.arange(form.groups)).astype(np.float32)  # exact: at most 16 bits
        return bytes([form.n, form.m]) + kernels().pack_planes(words.astype(np.uint16), form.width)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The positions of each combination."""
        form = Form(part[0], part[1]) if len(part) >= 2 else Form(0, 0)
        if form.m not in _GROUPS or not 0 < form.n < form.m or layout.size % form.m:
            raise ArtifactError("the positions are not N of each M")
        if layout.count * form.m != form.n * layout.size:
            raise ArtifactError(f"{layout.count} values are not {form.n} of each {form.m} of {layout.size} elements")
        if len(part) != 2 + planes_length(_words(form, layout), form.width):
            raise ArtifactError(f"{len(part)} bytes are not the {form.n}:{form.m} positions of {layout.size} elements")
        words = kernels().unpack_planes(part[2:], form.width, _words(form, layout))
        unused = -(layout.size // form.m) % form.groups
        if words.max() >= form.choices**form.groups or words[-1] >= form.choices ** (form.groups - unused):
            raise ArtifactError(f"a group of {form.m} has no such combination of {form.n} positions")
        positions = _positions_of_word(form).take(words, axis=0)
        positions += np.arange(len(words))[:, None] * (form.groups * form.m)
        return positions.reshape(-1)[: layout.count]


def _bits(numbers: int) -> int:
    return (numbers - 1).bit_length()


def _words(form: Form, layout: Layout) -> int:
    return -(-layout.size // (form.m * form.groups))


def _forms(data: np.ndarray, layout: Layout) -> Iterator[Form]:
    """The forms that hold the positions, those of the smallest groups first."""
    for m in _GROUPS:
        if layout.size % m or not data.size:
            continue
        sample = data[:_SAMPLE] // m  # random positions do not get any further
        n = int(np.bincount(sample - sample[0]).max())
        if n * int(sample[-1] - sample[0]) > _PADDED * sample.size + m or n * layout.size > _PADDED * m * data.size:
            continue
        groups = data >> m.bit_length() - 1
        if n < m and not (groups[n:] == groups[:-n]).any():
            yield Form(n, m)


def _fit(data: np.ndarray, layout: Layout) -> Form | None:
    return next(_forms(data, layout), None)


@functools.cache
def _number_of_mask(form: Form) -> np.ndarray:
    """The number of each combination, by its mask."""
    numbers = np.zeros(1 << form.m, np.uint32)
    for number, kept in enumerate(combinations(range(form.m), form.n)):
        numbers[sum(1 << place for place in kept)] = number
    return numbers


@functools.cache
def _positions_of_word(form: Form) -> np.ndarray:
    """The positions that each word stands for, in elements from the first of its groups: (words, groups * n)."""
    places = np.array(list(combinations(range(form.m), form.n)), np.intp)
    words = np.arange(form.choices**form.groups)
    digits = words[:, None] // form.choices ** np.arange(form.groups) % form.choices
    positions = places[digits] + form.m * np.arange(form.groups)[:, None]
    return positions.reshape(len(words), -1)
