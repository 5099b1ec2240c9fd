"""Finding the grid of integers that a weight lies on, from its values alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsehooks import Steps, read_grid

SMALLEST_GROUP = 8
"""Columns; any few values lie on some grid."""
SAMPLE = 8
"""Rows that are looked at before the whole weight."""

Per = Literal["tensor", "channel", "group"]


@dataclass(frozen=True)
class Scheme:
    """What layers of one kind have in common.

    Attributes:
        bits: of a code as it is stored.
        symmetric: no zero points.
        per: what shares a scale.
        group: columns, with per = "group".
    """

    bits: int
    symmetric: bool
    per: Per
    group: int | None = None

    def __str__(self) -> str:
        per = f"group of {self.group}" if self.per == "group" else self.per
        return f"{self.bits} bits{'' if self.symmetric else ' with zero points'} per {per}"


@dataclass(frozen=True)
class Grid:
    """The grid of one weight.

    Attributes:
        scheme: which kind it is.
        scales: float32; (1,), (rows, 1) or (rows, groups).
        zeros: uint8, the code of the value 0 where the smallest code is 0, of the same shape; None if symmetric.
    """

    scheme: Scheme
    scales: Tensor
    zeros: Tensor | None


def find_grid(weight: Tensor, bits: Sequence[int], pers: Sequence[Per], *, zeros: bool = True) -> Grid | None:
    """The coarsest grid with the fewest bits that gives back every bit of a weight; None if there is none.

    Args:
        weight: (rows, columns).
        bits: of the codes that may be stored, in ascending order.
        pers: what may share a scale.
        zeros: whether there may be zero points.
    """
    rows, columns = weight.shape
    sample = weight[:: max(1, rows // SAMPLE)]
    for width in bits:
        for per, size in _parts(columns, pers):
            for symmetric in (True, False) if zeros else (True,):
                steps = Steps(width, symmetric)
                if read_grid(sample.reshape(-1, size or sample.numel()), steps) is None:
                    continue  # at little cost
                found = read_grid(weight.reshape(-1, size or weight.numel()), steps)
                if found is None:
                    continue
                shape = (1,) if per == "tensor" else (rows, -1)
                codes = found.get("zeros")
                return Grid(
                    Scheme(width, symmetric, per, size if per == "group" else None),
                    found["scales"].reshape(shape),
                    None if codes is None else codes.reshape(shape),
                )
    return None


def _parts(columns: int, pers: Sequence[Per]) -> Iterator[tuple[Per, int | None]]:
    """What shares a scale and how many values these are (None for all), coarse before fine."""
    if "tensor" in pers:
        yield "tensor", None
    if "channel" in pers:
        yield "channel", columns
    if "group" in pers:
        for size in range(columns // 2, SMALLEST_GROUP - 1, -1):
            if columns % size == 0:
                yield "group", size
