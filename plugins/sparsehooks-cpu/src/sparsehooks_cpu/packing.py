"""The order in which the kernels read a sparse weight; see kernels.cpp."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, PANEL, LANES = 256, 96, 16
"""Of a tile: its rows and its columns of units, and how many rows are interleaved."""


def units(weight: Tensor) -> Tensor:
    """Each block of 4 bytes along a row as one integer, which is zero where the block is; shorter rows end in zeros.

    Args:
        weight: (rows, columns), float32, bfloat16 or int8.

    Returns:
        int32, (rows, columns / block rounded up).
    """
    block = 4 // weight.element_size()
    padded = F.pad(weight, (0, -weight.shape[1] % block))
    if weight.dtype.is_floating_point:
        padded = padded + 0.0  # a negative zero has a bit
    return padded.contiguous().view(torch.int32)


def interleave(units: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tiles of a matrix.

    Args:
        units: int32, (rows, columns).

    Returns:
        ``values`` int32 and ``columns`` uint8, one of each for a unit that is not zero (some more, which are zero);
        ``rows`` and ``counts`` uint8, (tiles, ROWS); ``starts`` int64, (tiles + 1,).
    """
    height, width = units.shape
    padded = F.pad(units, (0, -width % PANEL, 0, -height % ROWS)).numpy()
    tiles = padded.reshape(-1, ROWS, padded.shape[1] // PANEL, PANEL).transpose(0, 2, 1, 3)
    counts = np.count_nonzero(tiles, axis=3).reshape(-1, ROWS)
    rows = np.argsort(-counts, axis=1, kind="stable")
    counts = np.take_along_axis(counts, rows, axis=1)
    sorted_rows = tiles[
        np.arange(len(rows))[:, None] // tiles.shape[1], np.arange(len(rows))[:, None] % tiles.shape[1], rows
    ].reshape(-1)
    kept = np.flatnonzero(sorted_rows)
    longest = counts[:, ::LANES].reshape(-1)
    slices = np.concatenate([[0], np.cumsum(longest, dtype=np.int64) * LANES])
    row = kept // PANEL
    first = np.concatenate([[0], np.cumsum(counts.reshape(-1))[:-1]])
    places = slices[row // LANES] + (np.arange(len(kept)) - first[row]) * LANES + row % LANES
    values = np.zeros(slices[-1], np.int32)
    columns = np.zeros(slices[-1], np.uint8)
    values[places] = sorted_rows[kept]
    columns[places] = kept % PANEL
    starts = slices[:: ROWS // LANES].copy()
    return (
        torch.from_numpy(values),
        torch.from_numpy(columns),
        torch.from_numpy(rows.astype(np.uint8)),
        torch.from_numpy(counts.astype(np.uint8)),
        torch.from_numpy(starts),
    )
