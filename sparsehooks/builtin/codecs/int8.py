"""Values that lie on the symmetric int8 grid of ``sparsehooks.row_scales``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from sparsehooks import ArtifactError, Codec, Layout, from_codes, row_scales, to_codes

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"F32": torch.uint32, "BF16": torch.uint16, "F16": torch.uint16}
_BLOCK = 1 << 18
"""About so many values are worked on at once."""


class Int8(Codec):
    """A code (int8) for each value and a scale (float32) for each row.

    Whether values lie on the grid is found from the values alone: the scale of a row follows from its largest
    magnitude, and the codes have to give back every bit.
    """

    role = "values"
    sections = ("codes", "scales")

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of float32, bfloat16 or float16 that all lie on the grid of their row."""
        if layout.dtype not in _DTYPES or any(block is None for block in _quantized(data, layout)):
            return None
        return layout.count + 4 * layout.rows

    def encode(self, data: np.ndarray, layout: Layout) -> dict[str, bytes]:
        """Codes and scales."""
        blocks = [block for block in _quantized(data, layout) if block is not None]
        return {
            "codes": b"".join(codes.numpy().tobytes() for codes, _ in blocks),
            "scales": b"".join(scales.numpy().tobytes() for _, scales in blocks),
        }

    def decode(self, sections: Mapping[str, memoryview], layout: Layout) -> np.ndarray:
        """The values again."""
        if layout.dtype not in _DTYPES:
            raise ArtifactError(f"int8 codes cannot stand for {layout.dtype} values")
        if len(sections["codes"]) != layout.count or len(sections["scales"]) != 4 * layout.rows:
            raise ArtifactError(f"codes and scales do not fit {layout.count} values in {layout.rows} rows")
        codes = torch.from_numpy(np.frombuffer(sections["codes"], np.int8).copy())
        scales = torch.from_numpy(np.frombuffer(sections["scales"], np.float32).copy())
        if bool((codes == -128).any()) or not _on_grid(scales):
            raise ArtifactError("a code or a scale lies outside the int8 grid")
        values = torch.empty(layout.count, dtype=_DTYPES[layout.dtype])
        for rows, block, counts in _blocks(layout):
            values[block] = from_codes(codes[block], _spread(scales[rows], counts), values.dtype)
        return values.view(_BITS[layout.dtype]).numpy()


def _quantized(data: np.ndarray, layout: Layout) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Codes and scales of each block of rows; None for a block that is not on the grid."""
    bits = torch.from_numpy(data)
    for _, block, counts in _blocks(layout):
        values = bits[block].view(_DTYPES[layout.dtype])
        scales = row_scales(_largest(values, counts)[:, None])[:, 0]
        if not torch.isfinite(scales).all():
            yield None
            continue
        spread = _spread(scales, counts)
        codes = to_codes(values, spread)
        again = from_codes(codes, spread, values.dtype)
        yield (codes, scales) if torch.equal(again.view(bits.dtype), bits[block]) else None


def _largest(values: Tensor, counts: np.ndarray) -> Tensor:
    """The largest magnitude of each row, 0 for a row without values."""
    largest = np.zeros(counts.size, np.float32)
    filled = counts > 0
    if values.numel():
        starts = (np.cumsum(counts) - counts)[filled]
        largest[filled] = np.maximum.reduceat(values.abs().float().numpy(), starts)
    return torch.from_numpy(largest)


def _spread(scales: Tensor, counts: np.ndarray) -> Tensor:
    """The scale of each value."""
    return torch.from_numpy(np.repeat(scales.numpy(), counts))


def _on_grid(scales: Tensor) -> bool:
    """Whether ``row_scales`` can have made these scales: a row of the largest code gives them back."""
    return torch.equal(row_scales(127 * scales[:, None])[:, 0], scales)


def _blocks(layout: Layout) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Runs of whole rows: the rows, their values, and how many values each row has."""
    counts = np.ascontiguousarray(layout.row_counts, np.int64)
    ends = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    while first < layout.rows:
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + _BLOCK, side="right")) - 1)
        yield slice(first, last), slice(int(ends[first]), int(ends[last])), counts[first:last]
        first = last
