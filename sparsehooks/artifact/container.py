"""One tensor as one self-describing blob of bytes, stored under the tensor's own name.

Layout, little-endian::

    magic (8 bytes) | header length (u32) | CRC-32 of the header (u32) | header | sections

The header is canonical JSON, padded with spaces so that the sections start at a multiple of 64; each section is padded
with zeros to a multiple of 64. Values come back bit for bit, NaN payloads included, with one exception: where a codec
drops zeros, -0.0 is a zero like any other and comes back as +0.0 (``weight * mask`` makes half of the pruned zeros
negative).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparsehooks.artifact.header import DTYPES, MAGIC, MAX_DIMS, Header, Section, padding, parse_header, write_header
from sparsehooks.components import Codec
from sparsehooks.errors import ArtifactError
from sparsehooks.views import Layout

MIN_SAVED_SHARE = 0.1
"""A tensor is encoded only if that saves at least this share of its bytes ..."""
MIN_SAVED_BYTES = 4096
"""... and at least so many bytes."""

_CHUNK = 1 << 18
"""Elements that are gathered or scattered at once: few enough for the cache."""


def is_blob(tensor: Tensor) -> bool:
    """Whether a tensor is a blob: one dimension of U8 that starts with the magic."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        return False
    return bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


def read_header(blob: Tensor, *, name: str) -> Header:
    """The checked header of a blob; its sections lie within the blob and fill it.

    Args:
        blob: uint8, one dimension, on the CPU.
        name: the tensor's name, for errors.

    Raises:
        ArtifactError: if it is damaged, hostile or of another version.
    """
    with _naming(name):
        return parse_header(_view(blob))[0]


def encode(tensor: Tensor, codecs: Mapping[str, Codec]) -> Tensor | None:
    """The smallest blob that holds a tensor.

    Args:
        tensor: any shape, dtype and device.
        codecs: the codecs to choose from, by name.

    Returns:
        uint8, one dimension, on the CPU; None if the tensor is not a floating one of at least two dimensions, or a
        blob would save less than ``MIN_SAVED_SHARE`` and ``MIN_SAVED_BYTES``.
    """
    dtype = next((name for name, (dtype, _) in DTYPES.items() if dtype == tensor.dtype), None)
    if dtype is None or not 2 <= tensor.dim() <= MAX_DIMS or not tensor.numel():
        return None
    bits = tensor.detach().cpu().contiguous().view(DTYPES[dtype][1]).numpy().reshape(len(tensor), -1)
    limit = bits.nbytes - max(MIN_SAVED_BYTES, math.ceil(MIN_SAVED_SHARE * bits.nbytes))
    choice = _choose(bits, dtype, codecs, limit)
    if choice is None:
        return None
    parts = _encoded(choice, codecs)
    header = Header(dtype, tuple(tensor.shape), choice.positions, choice.values, choice.layout.count, _sections(parts))
    blob = _join(header, parts)
    return blob if blob.numel() <= limit else None


def decode(
    blob: Tensor,
    codecs: Mapping[str, Codec],
    *,
    name: str,
    shape: Sequence[int] | None = None,
    max_bytes: int = 2**31,
) -> Tensor:
    """The tensor that a blob holds.

    The blob may come from anybody: nothing is allocated before the header, the checksums and the lengths agree.

    Args:
        blob: uint8, one dimension, on the CPU.
        codecs: the codecs that may be used, by name.
        name: the tensor's name, for errors.
        shape: the shape it must have, if that is known.
        max_bytes: the largest decoded size to accept where ``shape`` is not given.

    Raises:
        ArtifactError: if the blob is damaged, hostile, of another shape or version, or needs a codec that is missing.
    """
    with _naming(name):
        return _decode(_view(blob), codecs, None if shape is None else tuple(shape), max_bytes)


# ------------------------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class _Choice:
    """A pair of codecs, what they would write, and the size of that."""

    positions: str | None
    kept: np.ndarray | None
    values: str
    data: np.ndarray
    layout: Layout
    size: int


def _choose(bits: np.ndarray, dtype: str, codecs: Mapping[str, Codec], limit: int) -> _Choice | None:
    """The pair of codecs that writes the fewest bytes; between equals the one with the fewest sections, the first."""
    best: _Choice | None = None
    for positions, kept, size in _positions(bits, dtype, codecs):
        if size > limit:
            continue
        data = bits.reshape(-1) if kept is None else _gather(bits, kept)
        layout = replace(_layout(bits, dtype, kept), row_counts=_row_counts(bits.shape, kept))
        for values, codec in _of_role("values", codecs):
            bound = codec.bound(data, layout)
            if bound is not None and size + bound <= limit:
                choice = _Choice(positions, kept, values, data, layout, size + bound)
                if best is None or _cost(choice, codecs) < _cost(best, codecs):
                    best = choice
    return best


def _positions(
    bits: np.ndarray, dtype: str, codecs: Mapping[str, Codec]
) -> Iterator[tuple[str | None, np.ndarray | None, int]]:
    """The ways to write the positions: codec, positions kept and bytes needed; first of all, every position."""
    yield None, None, 0
    nonzero = _nonzero(bits)
    layout = _layout(bits, dtype, nonzero)
    if layout.count == layout.size:
        return
    for name, codec in _of_role("positions", codecs):
        bound = codec.bound(nonzero, layout)
        if bound is not None:
            yield name, codec.cover(nonzero, layout), bound


def _cost(choice: _Choice, codecs: Mapping[str, Codec]) -> tuple[int, int]:
    names = [choice.values] if choice.positions is None else [choice.positions, choice.values]
    return choice.size, sum(len(codecs[name].sections) for name in names)


def _encoded(choice: _Choice, codecs: Mapping[str, Codec]) -> dict[str, bytes]:
    """The sections of both codecs, by role and name, in order."""
    parts: dict[str, bytes] = {}
    for role, name, data in (
        ("positions", choice.positions, choice.kept),
        ("values", choice.values, choice.data),
    ):
        if name is not None and data is not None:
            layout = choice.layout if role == "values" else replace(choice.layout, row_counts=None)
            sections = codecs[name].encode(data, layout)
            parts |= {f"{role}.{section}": sections[section] for section in codecs[name].sections}
    return parts


def _sections(parts: Mapping[str, bytes]) -> tuple[Section, ...]:
    sections, offset = [], 0
    for name, part in parts.items():
        sections.append(Section(name, offset, len(part), zlib.crc32(part)))
        offset += len(part) + padding(len(part))
    return tuple(sections)


def _join(header: Header, parts: Mapping[str, bytes]) -> Tensor:
    blob = bytearray(write_header(header))
    for part in parts.values():
        blob += part
        blob += bytes(padding(len(part)))
    return torch.frombuffer(blob, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------------ reading


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"tensor '{name}': {error}") from None


def _decode(data: memoryview, codecs: Mapping[str, Codec], shape: tuple[int, ...] | None, max_bytes: int) -> Tensor:
    header, start = parse_header(data)
    if shape is not None and shape != header.shape:
        raise ArtifactError(f"the file holds shape {list(header.shape)}, but the model has {list(shape)}")
    if shape is None and header.dense_bytes > max_bytes:
        raise ArtifactError(f"it would decode to {header.dense_bytes} bytes, more than the limit of {max_bytes}")
    positions = None if header.positions is None else _codec(codecs, "positions", header.positions)
    values = _codec(codecs, "values", header.values)
    sections = _checked_sections(data[start:], header, positions, values)

    layout = header.layout
    kept = None
    if positions is not None:
        kept = positions.decode(sections["positions"], layout)
        if np.count_nonzero(kept) != layout.count:
            raise ArtifactError(f"the positions are not the {layout.count} that its header says")
    elif layout.count != layout.size:
        raise ArtifactError(f"there are {layout.count} values for {layout.size} elements")
    row_counts = _row_counts((layout.rows, layout.columns), kept)
    found = values.decode(sections["values"], replace(layout, row_counts=row_counts))
    dense = _scatter(found, kept) if kept is not None else found if found.flags.writeable else found.copy()
    return torch.from_numpy(dense).view(DTYPES[header.dtype][0]).view(header.shape)


def _codec(codecs: Mapping[str, Codec], role: str, name: str) -> Codec:
    codec = codecs.get(name)
    if codec is None or codec.role != role:
        raise ArtifactError(f"it needs the {role} codec {name[:40]!r}; install the plugin that offers it")
    return codec


def _checked_sections(
    body: memoryview, header: Header, positions: Codec | None, values: Codec
) -> dict[str, dict[str, memoryview]]:
    """The sections of each role, by name, with their checksums and paddings verified."""
    expected = [(codec.role, name) for codec in (positions, values) if codec is not None for name in codec.sections]
    if [f"{role}.{name}" for role, name in expected] != [section.name for section in header.sections]:
        raise ArtifactError("its sections are not those of its codecs")
    found: dict[str, dict[str, memoryview]] = {"positions": {}, "values": {}}
    for (role, name), section in zip(expected, header.sections, strict=True):
        end = section.offset + section.length
        part = body[section.offset : end]
        if zlib.crc32(part) != section.crc32 or any(body[end : end + padding(section.length)]):
            raise ArtifactError(f"the file is damaged: section '{section.name}' does not match its checksum")
        found[role][name] = part
    return found


# ------------------------------------------------------------------------------------------------------- arrays


def _view(blob: Tensor) -> memoryview:
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ArtifactError("this is not an encoded tensor")
    data: np.ndarray = blob.contiguous().numpy()
    return data.data.toreadonly()


def _of_role(role: str, codecs: Mapping[str, Codec]) -> Iterator[tuple[str, Codec]]:
    return ((name, codec) for name, codec in codecs.items() if codec.role == role)


def _layout(bits: np.ndarray, dtype: str, kept: np.ndarray | None) -> Layout:
    rows, columns = bits.shape
    return Layout(dtype, rows, columns, bits.size if kept is None else int(np.count_nonzero(kept)))


def _row_counts(shape: tuple[int, ...], kept: np.ndarray | None) -> np.ndarray:
    if kept is None:
        return np.broadcast_to(np.int64(shape[1]), shape[0])
    counts: np.ndarray = kept.view(np.uint8).sum(axis=1, dtype=np.int64)
    return counts


def _nonzero(bits: np.ndarray) -> np.ndarray:
    """Where a value is neither +0.0 nor -0.0; bool, the shape of the bits."""
    flat, nonzero = bits.reshape(-1), np.empty(bits.size, np.bool_)
    for start in range(0, flat.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        np.not_equal(flat[chunk] << 1, 0, out=nonzero[chunk])
    return nonzero.reshape(bits.shape)


def _gather(bits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept values in row-major order; a kept zero is always +0.0."""
    flat, mask = bits.reshape(-1), kept.reshape(-1)
    values = np.empty(np.count_nonzero(mask), bits.dtype)
    filled = 0
    for start in range(0, flat.size, _CHUNK):
        found = flat[start : start + _CHUNK][np.flatnonzero(mask[start : start + _CHUNK])]
        values[filled : filled + found.size] = np.where(found << 1 == 0, 0, found)
        filled += found.size
    return values


def _scatter(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Zeros, with the values at the kept positions; flat."""
    mask = kept.reshape(-1)
    dense = np.zeros(mask.size, values.dtype)
    used = 0
    for start in range(0, mask.size, _CHUNK):
        positions = np.flatnonzero(mask[start : start + _CHUNK])
        dense[start : start + _CHUNK][positions] = values[used : used + positions.size]
        used += positions.size
    return dense
