"""Values that lie on the symmetric integer grid of ``sparsehooks.row_scales``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsehooks import ArtifactError, Codec, Layout, from_codes, kernels, row_scales, to_codes
from sparsehooks.builtin.codecs.entropy import squeeze, unsqueeze
from sparsehooks.builtin.codecs.planes import planes_length
from sparsehooks.builtin.codecs.tiles import hopeless

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"F32": torch.uint32, "BF16": torch.uint16, "F16": torch.uint16}
_WIDTHS = (2, 3, 4, 5, 6, 7, 8)


class Integer(Codec):
    """A code of 2 to 8 bits for each value and a scale (float32) for each row.

    Whether values lie on a grid is found from the values alone: the scale of a row follows from its largest
    magnitude, and the codes have to give back every bit. The part: bits of a code (u8), zeros (u8, u16), the scales,
    and the codes plus the largest code: bytes, or for less than 8 bits as bit planes.
    """

    role = "values"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of float32, bfloat16 or float16 that all lie on the grid of their row."""
        grid = _grid(data, layout)
        return None if grid is None else 4 + 4 * layout.rows + _codes_length(layout.count, grid.width)

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Scales and codes."""
        head, codes, width = _encoded(data, layout)
        return head + (codes.tobytes() if width == 8 else kernels().pack_planes(codes, width))

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The products of codes and scales."""
        width, scales, rest = _read_scales(part, layout)
        if len(rest) != _codes_length(layout.count, width):
            raise ArtifactError(f"{len(rest)} bytes are not {layout.count} codes of {width} bits")
        codes = np.frombuffer(rest, np.uint8) if width == 8 else kernels().unpack_planes(rest, width, layout.count)
        return _products(codes, scales, width, layout)


class IntegerEntropy(Codec):
    """The same with the codes entropy-coded, a byte each."""

    role = "values"
    level = "small"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of float32, bfloat16 or float16 that all lie on the grid of their row."""
        grid = _grid(data, layout)
        return None if grid is None else 5 + 4 * layout.rows

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Scales and codes."""
        head, codes, _ = _encoded(data, layout)
        return head + squeeze(codes)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The products of codes and scales."""
        width, scales, rest = _read_scales(part, layout)
        return _products(unsqueeze(rest, layout.count), scales, width, layout)


@dataclass(frozen=True, eq=False)
class _Grid:
    """The codes (int8, one a value) and scales (float32, one a row) that give the values back."""

    width: int
    codes: Tensor
    scales: Tensor

    def unsigned(self) -> np.ndarray:
        """The codes from 0 on, as uint8."""
        codes: np.ndarray = (self.codes.numpy().view(np.uint8) + np.uint8(_code_max(self.width))).astype(np.uint8)
        return codes


def _code_max(width: int) -> int:
    return (1 << (width - 1)) - 1


def _codes_length(count: int, width: int) -> int:
    return count if width == 8 else planes_length(count, width)


def _grid(data: np.ndarray, layout: Layout) -> _Grid | None:
    """The grid of the fewest bits that holds every value; None if there is none."""
    if layout.dtype not in _DTYPES or not data.size or hopeless(data, layout):
        return None
    values = torch.from_numpy(data).view(_DTYPES[layout.dtype])
    row = values[_first_row(data, layout)]
    for width in _plausible(row):
        if _on_grid(row, row_scales(row[None], _code_max(width))[0], width) is None:
            continue
        counts = layout.row_counts()
        scales = row_scales(_largest(values, counts)[:, None], _code_max(width))[:, 0]
        codes = _on_grid(values, torch.from_numpy(np.repeat(scales.numpy(), counts)), width)
        if codes is not None:
            return _Grid(width, codes, scales)
    return None


def _first_row(data: np.ndarray, layout: Layout) -> slice:
    """The values of the first row that is not all zeros: zeros lie on every grid."""
    nonzero = int(np.argmax(data != 0))
    place = nonzero if layout.positions is None else int(layout.positions[nonzero])
    start = place // layout.columns * layout.columns
    if layout.positions is None:
        return slice(start, start + layout.columns)
    return slice(*np.searchsorted(layout.positions, (start, start + layout.columns)).tolist())


def _plausible(row: Tensor) -> list[int]:
    """The widths whose grid may hold a row, as far as float32 can tell; random values fit none."""
    magnitudes = row.float().abs().numpy()
    largest = magnitudes.max()
    if not 0 < largest < np.inf:
        return []
    code_max = np.array([[_code_max(width)] for width in _WIDTHS], np.float32)
    codes = magnitudes / largest * code_max
    info = torch.finfo(row.dtype)
    rounding = info.eps / 2 * codes + info.smallest_normal / largest * code_max
    off = np.abs(codes - np.rint(codes)) > np.maximum(rounding, 1e-3)
    return [width for width, outside in zip(_WIDTHS, off.any(axis=1), strict=True) if not outside]


def _on_grid(values: Tensor, scales: Tensor, width: int) -> Tensor | None:
    """The codes, if they give back every bit."""
    if not torch.isfinite(scales).all():
        return None
    codes = to_codes(values, scales, _code_max(width))
    bits = torch.int32 if values.dtype == torch.float32 else torch.int16
    return codes if torch.equal(from_codes(codes, scales, values.dtype).view(bits), values.view(bits)) else None


def _largest(values: Tensor, counts: np.ndarray) -> Tensor:
    """The largest magnitude of each row, 0 for a row without values."""
    largest = np.zeros(counts.size, np.float32)
    filled = counts > 0
    starts = (np.cumsum(counts) - counts)[filled]
    largest[filled] = np.maximum.reduceat(values.abs().float().numpy(), starts)
    return torch.from_numpy(largest)


def _encoded(data: np.ndarray, layout: Layout) -> tuple[bytes, np.ndarray, int]:
    grid = _grid(data, layout)
    if grid is None:
        raise ValueError("the values do not lie on a grid")
    return bytes([grid.width, 0, 0, 0]) + grid.scales.numpy().tobytes(), grid.unsigned(), grid.width


def _read_scales(part: memoryview, layout: Layout) -> tuple[int, Tensor, memoryview]:
    if layout.dtype not in _DTYPES:
        raise ArtifactError(f"integer codes cannot stand for {layout.dtype} values")
    end = 4 + 4 * layout.rows
    if len(part) < end or part[0] not in _WIDTHS or any(part[1:4]):
        raise ArtifactError(f"the scales are not those of {layout.rows} rows")
    scales = torch.from_numpy(np.frombuffer(part[4:end], np.float32).copy())
    # a row of the largest code gives its scale back
    again = row_scales(_code_max(part[0]) * scales[:, None], _code_max(part[0]))[:, 0]
    if not torch.equal(again, scales):
        raise ArtifactError("a scale lies outside the grid")
    return part[0], scales, part[end:]


def _products(codes: np.ndarray, scales: Tensor, width: int, layout: Layout) -> np.ndarray:
    if codes.size and codes.max() > 2 * _code_max(width):
        raise ArtifactError("a code lies outside the grid")
    signed = torch.from_numpy((codes - np.uint8(_code_max(width))).view(np.int8))
    spread = torch.from_numpy(np.repeat(scales.numpy(), layout.row_counts()))
    values: np.ndarray = from_codes(signed, spread, _DTYPES[layout.dtype]).view(_BITS[layout.dtype]).numpy()
    return values
