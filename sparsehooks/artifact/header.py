"""What a blob says about itself: header and table of the chunks, read with the checks that anybody's bytes need."""

from __future__ import annotations

import functools
import itertools
import math
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparsehooks.errors import ArtifactError
from sparsehooks.views import Layout

VERSION = 1
MAGIC = b"\x89SPHK1\r\n"
ALIGN = 8
"""Chunks and their parts start at multiples of this, so that numpy reads them where they lie."""
MAX_DIMS = 8
MAX_CHUNK = 1 << 20
"""Elements of the largest chunk that is read: the most that a hostile blob makes a codec allocate for."""
ALL = 255
"""Stands for a codec where every element of a chunk has a value."""
DTYPES = {
    "F64": (torch.float64, torch.uint64),
    "F32": (torch.float32, torch.uint32),
    "BF16": (torch.bfloat16, torch.uint16),
    "F16": (torch.float16, torch.uint16),
    "F8_E4M3": (torch.float8_e4m3fn, torch.uint8),
    "F8_E5M2": (torch.float8_e5m2, torch.uint8),
    "F8_E4M3FNUZ": (torch.float8_e4m3fnuz, torch.uint8),
    "F8_E5M2FNUZ": (torch.float8_e5m2fnuz, torch.uint8),
    "I64": (torch.int64, torch.uint64),
    "I32": (torch.int32, torch.uint32),
    "I16": (torch.int16, torch.uint16),
    "I8": (torch.int8, torch.uint8),
    "U64": (torch.uint64, torch.uint64),
    "U32": (torch.uint32, torch.uint32),
    "U16": (torch.uint16, torch.uint16),
    "U8": (torch.uint8, torch.uint8),
    "BOOL": (torch.bool, torch.uint8),
}
"""The dtypes that are encoded, and the unsigned integers of their bits."""
_PREFIX = struct.Struct("<8sIBBHI")
"""Magic, CRC-32 of what follows it up to the chunks, version, number of dimensions, length of the names, chunk."""
_CHECKED_FROM = len(MAGIC) + 4
_ROW = struct.Struct("<IIIIBB")
_MAX_ELEMENTS = 1 << 44

Read = Callable[[int, int], memoryview]
"""Gives so many bytes of a blob from an offset on; fewer where it ends."""


class Chunk(NamedTuple):
    """What the table says of a chunk.

    Attributes:
        kept: how many values it has.
        positions_length: the bytes of its positions.
        values_length: the bytes of its values.
        crc32: the checksum of both with their padding.
        positions: the place of their codec in the header; ``ALL`` if every element has a value.
        values: the place of their codec.
    """

    kept: int
    positions_length: int
    values_length: int
    crc32: int
    positions: int
    values: int

    @property
    def length(self) -> int:
        """The bytes of both parts with their padding."""
        return self.positions_length + self.values_length + padding(self.positions_length) + padding(self.values_length)


@dataclass(frozen=True)
class Header:
    """What a blob says about itself.

    Attributes:
        dtype: the safetensors name of the tensor's dtype.
        shape: the tensor's shape, at least two dimensions, none of them 0.
        chunk: the elements of each chunk but the last: some whole rows, or fewer than one row has; these may
            go over the end of a row.
        codecs: the names of the codecs; the table names them by their place here.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk: int
    codecs: tuple[str, ...]

    @property
    def rows(self) -> int:
        """The first dimension."""
        return self.shape[0]

    @functools.cached_property
    def columns(self) -> int:
        """The product of the other dimensions."""
        return math.prod(self.shape[1:])

    @functools.cached_property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """The size of the decoded tensor."""
        return self.size * DTYPES[self.dtype][0].itemsize

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.size // self.chunk)

    def layout(self, number: int, count: int) -> Layout:
        """What codecs get to know of a chunk: its whole rows, or one row of all its elements."""
        size = min(self.chunk, self.size - number * self.chunk)
        rows, columns = (size // self.columns, self.columns) if self.chunk % self.columns == 0 else (1, size)
        return Layout(self.dtype, rows, columns, count)


def padding(length: int) -> int:
    """How many bytes follow ``length`` bytes up to the next multiple of ``ALIGN``."""
    return -length % ALIGN


def write_header(header: Header, table: Iterable[Chunk]) -> bytes:
    """The bytes that start a blob: magic, checksum, the header itself and the table of the chunks."""
    names = "\n".join([header.dtype, *header.codecs]).encode()
    start = _PREFIX.pack(MAGIC, 0, VERSION, len(header.shape), len(names), header.chunk)
    shape = struct.pack(f"<{len(header.shape)}Q", *header.shape)
    data = bytearray(start + shape + names + b"".join(_ROW.pack(*chunk) for chunk in table))
    data += bytes(padding(len(data)))
    data[len(MAGIC) : _CHECKED_FROM] = zlib.crc32(data[_CHECKED_FROM:]).to_bytes(4, "little")
    return bytes(data)


def parse_header(read: Read, size: int) -> tuple[Header, list[Chunk], list[int]]:
    """The header of a blob, the table of its chunks, and where they start; they lie within the blob and fill it.

    Args:
        read: gives bytes of the blob.
        size: how many bytes it has.

    Returns:
        the header, the table, and the offsets of the chunks from the start of the blob, with that of its end.

    Raises:
        ArtifactError: if it is damaged, hostile or of another version.
    """
    start = read(0, _PREFIX.size)
    if len(start) < _PREFIX.size or start[: len(MAGIC)] != MAGIC:
        raise ArtifactError("this is not an encoded tensor")
    _, crc, version, dims, names, chunk = _PREFIX.unpack(start)
    if version != VERSION:
        raise ArtifactError(f"container version {version} is not known to this release; upgrade sparsehooks")
    text = bytes(read(_PREFIX.size, 8 * dims + names))
    if len(text) != 8 * dims + names:
        raise ArtifactError("the file is damaged: it ends within its header")
    header = _header(struct.unpack(f"<{dims}Q", text[: 8 * dims]), text[8 * dims :], chunk)
    table_start = _PREFIX.size + len(text)
    table_end = table_start + header.chunks * _ROW.size
    body = table_end + padding(table_end)
    if body > size:
        raise ArtifactError("the file is damaged: it is too short for the chunks of its shape")
    stored = read(table_start, body - table_start)
    if zlib.crc32(stored, zlib.crc32(text, zlib.crc32(start[_CHECKED_FROM:]))) != crc:
        raise ArtifactError("the file is damaged: its header does not match its checksum")
    table = [Chunk(*row) for row in _ROW.iter_unpack(stored[: table_end - table_start])]
    starts = list(itertools.accumulate((chunk.length for chunk in table), initial=body))
    if starts[-1] != size or any(stored[table_end - table_start :]):
        raise ArtifactError(f"it has {size} bytes instead of {starts[-1]}")
    return header, table, starts


def _header(shape: tuple[int, ...], names: bytes, chunk: int) -> Header:
    """A header from values that may be anything."""
    try:
        dtype, *codecs = names.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise ArtifactError("the file is damaged: its header names no codecs") from None
    if dtype not in DTYPES:
        raise ArtifactError(f"the file is damaged: dtype {dtype[:20]!r} is not one of {', '.join(DTYPES)}")
    if not 2 <= len(shape) <= MAX_DIMS or 0 in shape or max(shape) > _MAX_ELEMENTS or math.prod(shape) > _MAX_ELEMENTS:
        raise ArtifactError("the file is damaged: its shape is not that of an encoded tensor")
    columns = math.prod(shape[1:])
    if not 0 < chunk <= MAX_CHUNK or (chunk % columns and chunk > columns):
        raise ArtifactError("the file is damaged: its chunks have an impossible size")
    if not 0 < len(codecs) < ALL or "" in codecs or len(set(codecs)) != len(codecs):
        raise ArtifactError("the file is damaged: its codecs are not a list of names")
    return Header(dtype, shape, chunk, tuple(codecs))
