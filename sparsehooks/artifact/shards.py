"""safetensors files: read strictly, because anybody may have written them, and written one tensor at a time.

The safetensors library accepts duplicate names, any number of dimensions and unknown fields, and takes gigabytes for a
hostile header; its writer wants all tensors in memory. So the header is read and written here.
"""

from __future__ import annotations

import json
import math
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsehooks.artifact.container import Rows
from sparsehooks.computing import kernels
from sparsehooks.errors import ArtifactError

CHECKSUMS = "sparsehooks.crc32"
"""The metadata key of the checksums: JSON, the CRC-32 of the bytes of each tensor by name."""
MAX_HEADER = 16 << 20
MAX_TENSORS = 200_000
_MAX_DIMS = 8
_MAX_NAME = 500
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST = 1 << 44
"""More bytes than any file has."""
_PIECE = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as the header describes it.

    Attributes:
        name: the tensor's name.
        dtype: the safetensors name of the dtype.
        shape: the shape as stored; of a blob that is its number of bytes.
        offset: where its bytes start in the file.
        length: how many they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Shard:
    """One checked safetensors file.

    Attributes:
        path: the file.
        metadata: its ``__metadata__``.
        entries: its tensors, in the order of their bytes; together they fill the file.
    """

    path: Path
    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]
    _file: _OpenFile = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read and check the header of a file.

        Raises:
            ArtifactError: if the file cannot be read, or is damaged or hostile.
        """
        try:
            file = _OpenFile(path)
            size = file.size()
            length = int.from_bytes(file.read(8, 0), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ArtifactError(f"'{path}' is truncated or not a safetensors file")
            text = bytes(file.read(length, 8))
        except OSError as error:
            raise ArtifactError(f"cannot read '{path}': {error.strerror}") from error
        header = parse_json(text, path)
        if not text.startswith(b"{") or not isinstance(header, dict):
            raise ArtifactError(f"'{path}' is not a safetensors file")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
            raise ArtifactError(f"'{path}' has metadata that are not strings")
        return cls(path, metadata, _entries(header, path, 8 + length, size), file)

    def read_bytes(self, entry: Entry, offset: int, length: int) -> memoryview:
        """Some bytes of a tensor as stored, in memory of their own.

        Raises:
            ArtifactError: if the file cannot be read or has shrunk.
        """
        length = max(0, min(length, entry.length - offset))
        try:
            data = self._file.read(length, entry.offset + offset)
        except OSError as error:
            raise ArtifactError(f"cannot read '{self.path}': {error.strerror}") from error
        if len(data) != length:
            raise ArtifactError(f"'{self.path}' became shorter while tensor '{entry.name}' was read; get it again")
        return data

    def read(self, entry: Entry, offset: int, length: int) -> Tensor:
        """Some elements of a tensor as stored, in memory of their own.

        Args:
            entry: the tensor.
            offset: the first byte, counted from the tensor's own.
            length: how many bytes.

        Returns:
            one dimension, in the dtype as stored.

        Raises:
            ArtifactError: if the file cannot be read or has shrunk.
        """
        data = self.read_bytes(entry, offset, length)
        if not len(data):
            return torch.empty(0, dtype=DTYPES[entry.dtype])
        if entry.dtype == "BOOL" and np.frombuffer(data, np.uint8).max() > 1:
            raise ArtifactError(f"'{self.path}': tensor '{entry.name}' has bytes that are neither true nor false")
        return torch.frombuffer(data, dtype=torch.uint8).view(DTYPES[entry.dtype])

    def checksums(self) -> dict[str, int]:
        """The CRC-32 of tensors by name, as the writer left it.

        Raises:
            ArtifactError: if there is none.
        """
        if CHECKSUMS not in self.metadata:
            raise ArtifactError(f"'{self.path}' has no checksums to verify; save the model again with sparsehooks")
        found = parse_json(self.metadata[CHECKSUMS], self.path)
        if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
            raise ArtifactError(f"'{self.path}' has checksums that are not numbers")
        return found


class _OpenFile:
    """A file that is open as long as this object lives: what takes its name meanwhile is not read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)

    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def read(self, length: int, offset: int) -> memoryview:
        """Bytes in memory of their own, fewer where the file ends; threads and forked processes may read at once."""
        data = memoryview(bytearray(length))
        done = 0
        while done < length and (found := os.preadv(self._file.fileno(), [data[done:]], offset + done)):
            done += found
        return data[:done]


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata that let ``verify`` find any damage of these tensors, blobs or plain.

    Args:
        tensors: everything that one file will hold, or a whole model; any dtype and device.

    Returns:
        one entry for the ``metadata`` of ``safetensors.torch.save_file``.
    """
    return {CHECKSUMS: json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})}


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's bytes in row-major order; of its shape, if it has none."""
    return kernels().checksum(_bytes(tensor)) if tensor.numel() else of_nothing(tensor.shape)


def of_nothing(shape: Sequence[int]) -> int:
    """The checksum of a tensor without elements, of which only the shape can be damaged."""
    return zlib.crc32(json.dumps(list(shape)).encode())


class ShardWriter:
    """A safetensors file that is written one tensor at a time, and its header last.

    Which tensors become blobs, and of what size, is known only once they are written. So the file begins with room
    for the longest header that it can get; what the header leaves free is spaces.

    Args:
        path: the file to make.
        contents: dtype (as safetensors names it) and shape of each tensor before it is encoded.
        metadata: what ``finish`` will be given, or longer strings.

    Attributes:
        path: the file.
        checksums: the CRC-32 of each tensor as it was written, by name.
        bytes: what these tensors take in the file.

    Raises:
        ArtifactError: if no reader would accept so long a header.
    """

    def __init__(
        self, path: Path, contents: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.checksums: dict[str, int] = {}
        self.bytes = 0
        # wide dtypes first, as safetensors does: then every tensor is aligned; and before vectors, blobs to 8 bytes too
        self._names = sorted(
            contents, key=lambda name: (-DTYPES[contents[name][0]].itemsize, len(contents[name][1]) < 2)
        )
        self._header: dict[str, Any] = {}
        longest = {
            name: _fields(max(DTYPES, key=len), _longer(shape), _MOST, _MOST) for name, (_, shape) in contents.items()
        }
        self._room = len(_header_text(metadata, longest))
        if self._room > MAX_HEADER:
            raise ArtifactError(f"'{path}' would need a header of {self._room} bytes; {MAX_HEADER} is the limit")

    def write(self, load: Callable[[str], Tensor | Rows]) -> None:
        """Write all tensors.

        Args:
            load: gives a tensor, or its blob, by its name; called once for each, in the order of the file. What
                gives pieces by rows is read piece by piece.

        Raises:
            OSError: if the file cannot be written.
        """
        with self.path.open("xb") as file:
            file.seek(8 + self._room)
            for name in self._names:
                tensor, crc, start = load(name), 0, self.bytes
                for piece in _pieces(tensor):
                    file.write(piece)
                    crc = kernels().checksum(piece, crc)
                    self.bytes += len(piece)
                self.checksums[name] = crc if self.bytes > start else of_nothing(tuple(tensor.shape))
                self._header[name] = _fields(_NAMES[tensor.dtype], tuple(tensor.shape), start, self.bytes)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header; now the file is complete.

        Raises:
            OSError: if the file cannot be written.
        """
        text = _header_text(metadata, self._header)
        assert len(text) <= self._room
        with self.path.open("r+b") as file:
            file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))


def parse_json(text: bytes | str, path: Path) -> Any:
    """JSON in UTF-8 without duplicate keys.

    Raises:
        ArtifactError: if it is not, naming the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ArtifactError(f"'{path}' has a key twice in its JSON")
        return fields

    try:
        return json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise ArtifactError(f"'{path}' is damaged: its JSON cannot be read") from None


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may have this name: names are printed, and other tools may make paths of them."""
    return name.isprintable() and len(name) <= _MAX_NAME and name not in {"", "__metadata__"} and ".." not in name


def _is_text(value: Any) -> bool:
    """Whether a value is a string that can be written again: JSON may name halves of characters."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _fields(dtype: str, shape: tuple[int, ...], first: int, last: int) -> dict[str, Any]:
    """What a header says about a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


def _header_text(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> bytes:
    header = {"__metadata__": dict(sorted(metadata.items())), **tensors} if metadata else tensors
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _longer(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor or the longest that its blob can have, whichever takes more room."""
    return max(shape, (_MOST,), key=lambda sizes: len(str(list(sizes))))


def _pieces(tensor: Tensor | Rows) -> Iterator[memoryview]:
    """The bytes in row-major order, some megabytes at a time where the tensor has rows."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, Tensor) and not shape:
        yield _bytes(tensor)
        return
    size = math.prod(shape) * tensor.dtype.itemsize
    rows = max(1, _PIECE * shape[0] // max(1, size))
    for first in range(0, shape[0] if size else 0, rows):
        yield _bytes(tensor[first : first + rows])


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes in row-major order: those of the tensor itself if it is contiguous and on the CPU."""
    data: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.data


def _entries(header: Mapping[str, Any], path: Path, start: int, size: int) -> tuple[Entry, ...]:
    if len(header) > MAX_TENSORS:
        raise ArtifactError(f"'{path}' lists {len(header)} tensors; {MAX_TENSORS} is the limit")
    entries = sorted(
        (_entry(name, fields, path, start) for name, fields in header.items()),
        key=lambda entry: (entry.offset, entry.length),
    )
    end = start
    for entry in entries:
        if entry.offset != end:
            raise ArtifactError(f"'{path}': tensor '{entry.name}' does not follow the one before it")
        end += entry.length
    if end != size:
        raise ArtifactError(f"'{path}' has {size} bytes instead of {end}; get the file again")
    return tuple(entries)


def _entry(name: str, fields: Any, path: Path, start: int) -> Entry:
    if not is_tensor_name(name):
        raise ArtifactError(f"'{path}': {name[:80]!r} cannot be the name of a tensor")
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, last]} if len(fields) == 3:
            pass
        case _:
            raise ArtifactError(f"'{path}': the header of tensor '{name}' is malformed")
    if dtype not in DTYPES:
        raise ArtifactError(f"'{path}': tensor '{name}' has dtype {dtype[:20]!r}, which sparsehooks does not read")
    if (
        len(shape) > _MAX_DIMS
        or not all(type(size) is int and 0 <= size < _MOST for size in (*shape, first, last))
        or math.prod(size for size in shape if size) > _MOST  # torch multiplies the sizes of empty tensors too
    ):
        raise ArtifactError(f"'{path}': tensor '{name}' has an impossible shape or offset")
    if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ArtifactError(f"'{path}': tensor '{name}' has another size than its shape says")
    return Entry(name, dtype, tuple(shape), start + first, last - first)
