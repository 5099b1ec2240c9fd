"""What a blob says about itself: the header, its one canonical text, and the checks of text that anybody may write."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsehooks.errors import ArtifactError
from sparsehooks.views import Layout

VERSION = 1
MAGIC = b"\x89SPHK1\r\n"
MAX_DIMS = 8
DTYPES = {
    "F64": (torch.float64, torch.uint64),
    "F32": (torch.float32, torch.uint32),
    "BF16": (torch.bfloat16, torch.uint16),
    "F16": (torch.float16, torch.uint16),
}
"""The dtypes that are encoded, and the unsigned integers of their bits."""

_PREFIX = struct.Struct("<II")
_START = len(MAGIC) + _PREFIX.size
_ALIGN = 64
_MAX_HEADER = 1 << 16
_MAX_ELEMENTS = 1 << 44


@dataclass(frozen=True)
class Section:
    """Some bytes of a blob.

    Attributes:
        name: role and name, such as ``"positions.bits"``.
        offset: where they start, counted from the end of the header.
        length: how many they are.
        crc32: their checksum.
    """

    name: str
    offset: int
    length: int
    crc32: int


@dataclass(frozen=True)
class Header:
    """What a blob says about itself.

    Attributes:
        dtype: the safetensors name of the tensor's dtype.
        shape: the tensor's shape, at least two dimensions, none of them 0.
        positions: the codec of the positions that carry a value; None if all do.
        values: the codec of the values.
        count: how many values there are.
        sections: the byte sections, those of the positions first.
    """

    dtype: str
    shape: tuple[int, ...]
    positions: str | None
    values: str
    count: int
    sections: tuple[Section, ...]

    @property
    def layout(self) -> Layout:
        """What codecs get to know."""
        return Layout(self.dtype, self.shape[0], math.prod(self.shape[1:]), self.count)

    @property
    def dense_bytes(self) -> int:
        """The size of the decoded tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype][0].itemsize


def padding(length: int) -> int:
    """How many bytes follow ``length`` bytes up to the next multiple of 64."""
    return -length % _ALIGN


def write_header(header: Header) -> bytes:
    """The bytes that start a blob: magic, length, checksum and the header itself."""
    text = _canonical(header)
    return MAGIC + _PREFIX.pack(len(text), zlib.crc32(text)) + text


def parse_header(data: memoryview) -> tuple[Header, int]:
    """The header of a blob and where its sections start; they lie within the blob and fill it.

    Raises:
        ArtifactError: if it is damaged, hostile or of another version.
    """
    if len(data) < _START or data[: len(MAGIC)] != MAGIC:
        raise ArtifactError("this is not an encoded tensor")
    length, crc = _PREFIX.unpack(data[len(MAGIC) : _START])
    start = _START + length
    if length > _MAX_HEADER or start > len(data) or start % _ALIGN:
        raise ArtifactError("the file is damaged: its header has an impossible length")
    text = bytes(data[_START:start])
    if zlib.crc32(text) != crc:
        raise ArtifactError("the file is damaged: its header does not match its checksum")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError("its header is not valid JSON") from None
    header = _header(fields)
    if _canonical(header) != text:
        raise ArtifactError("its header is not in the canonical form")
    end = 0
    for section in header.sections:
        if section.offset != end:
            raise ArtifactError(f"section {section.name[:40]!r} is not where it should be")
        end += section.length + padding(section.length)
    if start + end != len(data):
        raise ArtifactError(f"it has {len(data)} bytes instead of {start + end}")
    return header, start


def _header(fields: Any) -> Header:
    """A header from JSON values that may be anything."""
    if not isinstance(fields, dict) or type(fields.get("version")) is not int:
        raise ArtifactError("its header has no version")
    if fields["version"] != VERSION:
        raise ArtifactError(f"container version {fields['version']} is not known to this release; upgrade sparsehooks")
    match fields:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "positions": None | str() as positions,
            "values": str(values),
            "count": count,
            "sections": [*sections],
        } if len(fields) == 7:
            pass
        case _:
            raise ArtifactError("its header has missing, unknown or wrong fields")
    if dtype not in DTYPES:
        raise ArtifactError(f"dtype {dtype[:20]!r} is not one of {', '.join(DTYPES)}")
    if not 2 <= len(shape) <= MAX_DIMS or not all(_is_count(size) and size > 0 for size in shape):
        raise ArtifactError("its shape is not that of an encoded tensor")
    if math.prod(shape) > _MAX_ELEMENTS or not _is_count(count) or count > math.prod(shape):
        raise ArtifactError("its shape or its number of values is impossible")
    for section in sections:
        if not isinstance(section, list) or len(section) != 4 or not isinstance(section[0], str):
            raise ArtifactError("its header has a malformed section")
        if not all(_is_count(number) for number in section[1:]):
            raise ArtifactError(f"section {section[0][:40]!r} has an impossible offset, length or checksum")
    return Header(dtype, tuple(shape), positions, values, count, tuple(Section(*section) for section in sections))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_ELEMENTS


def _canonical(header: Header) -> bytes:
    """The one text of a header: sorted keys, no spaces but the padding."""
    fields = asdict(header) | {
        "version": VERSION,
        "sections": [[section.name, section.offset, section.length, section.crc32] for section in header.sections],
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return text + b" " * padding(_START + len(text))
