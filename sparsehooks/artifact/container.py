"""One tensor as one self-describing blob of bytes, stored under the tensor's own name: how it is written.

Layout, little-endian::

    magic (8 bytes) | CRC-32 of header and table (u32) | header | table | chunks

A chunk is a piece of the tensor in row-major order, of whole rows where they are not
too long; its positions and its values are encoded by a codec each. The table says for each chunk which codecs these
are, how many bytes they wrote, and their checksum: any rows can be read without the others. ``docs/format.md`` is the
specification; ``Blob`` reads it.

Values come back bit for bit, NaN payloads included, with one exception: -0.0 is a zero like any other, so it comes
back as +0.0 unless ``signed_zeros`` is asked for (``weight * mask`` makes half of the pruned zeros negative).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sparsehooks.artifact.header import ALL, DTYPES, MAGIC, MAX_CHUNK, MAX_DIMS, Chunk, Header, padding, write_header
from sparsehooks.components import LEVELS, Codec, Level
from sparsehooks.computing import kernels
from sparsehooks.views import Layout

MIN_SAVED_SHARE = 0.1
"""A tensor is encoded if that saves at least this share of its bytes ..."""
MIN_SAVED_BYTES = 4096
"""... and at least so many bytes ..."""
_SMALL_SHARE, _SMALL_BYTES = 0.5, 256
"""... or, of a small one, this share and so many bytes: a blob is not worth its trouble for less."""

_WORTH = 7 / 8
"""At the level "balanced" a codec that is not "fast" has to write at most this share of what those write."""
_CHUNK = 1 << 18
"""About so many elements make a chunk: enough for numpy to be fast, few enough for the cache."""
_SIGNED_ZERO = {"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"}
"""The dtypes in which a lone sign bit is a zero."""


_NO_CHUNK = Chunk(0, 0, 0, 0, 0, 0)


class Rows(Protocol):
    """A tensor, or anything that gives pieces of one by its first dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all of it."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def is_blob(tensor: Tensor) -> bool:
    """Whether a tensor is a blob: one dimension of U8 that starts with the magic."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        return False
    return bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


def encode(
    tensor: Tensor | Rows, codecs: Mapping[str, Codec], *, level: Level = "balanced", signed_zeros: bool = False
) -> Tensor | None:
    """The smallest blob that holds a tensor; needs no more memory than the blob and a few chunks.

    Args:
        tensor: any shape, dtype and device.
        codecs: the codecs to choose from, by name.
        level: codecs of a higher level are not used; at "balanced", slower ones only where it is worth it.
        signed_zeros: keep -0.0, as a value like any other.

    Returns:
        uint8, one dimension, on the CPU; None if the tensor has not at least two dimensions, no codec can hold it, or
        a blob would save too little: less than a tenth and 4 KiB, and less than half and 256 bytes.
    """
    dtype = next((name for name, (dtype, _) in DTYPES.items() if dtype == tensor.dtype), None)
    shape = tuple(tensor.shape)
    if dtype is None or not 2 <= len(shape) <= MAX_DIMS or 0 in shape:
        return None
    header = Header(dtype, shape, _chunk(shape[0], math.prod(shape[1:])), ())
    enough = (MIN_SAVED_SHARE, MIN_SAVED_BYTES), (_SMALL_SHARE, _SMALL_BYTES)
    limit = header.dense_bytes - min(max(least, math.ceil(share * header.dense_bytes)) for share, least in enough)
    if limit <= 0:
        return None
    usable = [
        _Candidate(name, codec, 1 if level == "small" or codec.level == "fast" else 1 / _WORTH)
        for name, codec in codecs.items()
        if LEVELS.index(codec.level) <= LEVELS.index(level)
    ]
    names: list[str] = []
    sign = 1 if dtype in _SIGNED_ZERO and not signed_zeros else 0
    table: list[Chunk] = []
    # the header comes last, when all names are known, and goes right before the chunks
    room = len(write_header(replace(header, codecs=tuple(codecs)), [_NO_CHUNK] * header.chunks))
    blob = bytearray(room)
    for number, bits in enumerate(_pieces(tensor, header)):
        chunk = _encode_chunk(bits, header.layout(number, bits.size), usable, sign)
        if chunk is None:
            return None
        parts = [part + bytes(padding(len(part))) for part in chunk.parts]
        names += [name for name in chunk.codecs if name is not None and name not in names]
        first, second = chunk.codecs
        places = ALL if first is None else names.index(first), names.index(second)
        lengths = len(chunk.parts[0]), len(chunk.parts[1])
        crc = kernels().checksum(parts[1], kernels().checksum(parts[0]))
        table.append(Chunk(chunk.kept, *lengths, crc, *places))
        blob += parts[0]
        blob += parts[1]
        if len(blob) - room > limit:
            return None
    start = write_header(replace(header, codecs=tuple(names)), table)
    blob[room - len(start) : room] = start
    encoded = torch.frombuffer(blob, dtype=torch.uint8, offset=room - len(start))
    return encoded if encoded.numel() <= limit else None


class _Encoded(NamedTuple):
    kept: int
    codecs: tuple[str | None, str]
    parts: tuple[bytes, bytes]


def _chunk(rows: int, columns: int) -> int:
    """How many elements make a chunk: whole rows, all chunks of about the same size."""
    if columns > MAX_CHUNK:
        return _CHUNK
    chunks = max(1, round(rows * columns / _CHUNK))
    return columns * min(-(-rows // chunks), MAX_CHUNK // columns)


def _pieces(tensor: Tensor | Rows, header: Header) -> Iterator[np.ndarray]:
    """The bits of each chunk, flat."""
    bits = DTYPES[header.dtype][1]
    rows = max(1, header.chunk // header.columns)
    rest = torch.empty(0, dtype=bits)
    for first in range(0, header.rows, rows):
        block = tensor[first : first + rows].detach().cpu().contiguous().reshape(-1).view(bits)
        block = torch.cat([rest, block]) if len(rest) else block  # a chunk of no whole rows goes over the end of one
        chunks = block.split(header.chunk)
        if len(chunks[-1]) < header.chunk and first + rows < header.rows:
            *chunks, rest = chunks
        else:
            rest = block[:0]
        yield from (chunk.numpy() for chunk in chunks)


class _Candidate(NamedTuple):
    """A codec that may be used, and how much more a byte of it counts than one of a faster codec."""

    name: str
    codec: Codec
    cost: float


def _encode_chunk(bits: np.ndarray, layout: Layout, candidates: Sequence[_Candidate], sign: int) -> _Encoded | None:
    """The smallest pair of parts, of all pairs of codecs; None if none can hold the values."""
    best: _Encoded | None = None
    nonzero = kernels().nonzero(bits, sign)
    positions_codecs = [candidate for candidate in candidates if candidate.codec.role == "positions"]
    values_codecs = [candidate for candidate in candidates if candidate.codec.role == "values"]
    for data, (positions, part) in _positions(nonzero, replace(layout, count=nonzero.size), positions_codecs):
        values = bits if data is None else bits.take(data)
        if sign and values.size > nonzero.size:  # there are zeros among them
            values = np.where(values << 1 == 0, 0, values)
        found = _smallest(values_codecs, values, replace(layout, count=values.size, positions=data))
        if found is not None and (best is None or len(part) + len(found[1]) < sum(map(len, best.parts))):
            best = _Encoded(values.size, (positions, found[0]), (part, found[1]))
    return best


def _positions(
    nonzero: np.ndarray, layout: Layout, candidates: Sequence[_Candidate]
) -> Iterator[tuple[np.ndarray | None, tuple[str | None, bytes]]]:
    """The ways to say where the values are that may be the smallest: the positions kept, the codec and its bytes.

    Codecs that keep the same positions compete by their own size alone. A chunk of at least a quarter zeros is not
    considered without positions: a bit for each is then hardly ever more than what the zeros would take as values.
    """
    if 4 * nonzero.size > 3 * layout.size:
        yield None, (None, b"")
    if nonzero.size == layout.size:
        return
    same: list[_Candidate] = []
    for candidate in candidates:
        if candidate.codec.bound(nonzero, layout) is None:
            continue
        data = candidate.codec.cover(nonzero, layout)
        if data.size == nonzero.size:
            same.append(candidate)
        else:
            yield data, (candidate.name, candidate.codec.encode(data, replace(layout, count=data.size)))
    found = _smallest(same, nonzero, layout)
    if found is not None:
        yield nonzero, found


def _smallest(candidates: Sequence[_Candidate], data: np.ndarray, layout: Layout) -> tuple[str, bytes] | None:
    """The codec that writes the fewest bytes, and these; between equals the first."""
    bounds = [(candidate.codec.bound(data, layout), candidate) for candidate in candidates]
    costs = [(bound * candidate.cost, candidate) for bound, candidate in bounds if bound is not None]
    best: tuple[float, str, bytes] | None = None
    for least, candidate in sorted(costs, key=lambda pair: pair[0]):
        if best is not None and least >= best[0]:
            break
        part = candidate.codec.encode(data, layout)
        if best is None or len(part) * candidate.cost < best[0]:
            best = len(part) * candidate.cost, candidate.name, part
    return None if best is None else best[1:]
