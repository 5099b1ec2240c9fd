"""safetensors files: read strictly, because anybody may have written them, and written one tensor at a time.

The safetensors library accepts duplicate names, any number of dimensions and unknown fields, and takes gigabytes for a
hostile header; its writer wants all tensors in memory. So the header is read and written here.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsehooks.errors import ArtifactError

CHECKSUMS = "sparsehooks.crc32"
"""The metadata key of the checksums: JSON, the CRC-32 of the bytes of each tensor by name."""
MAX_HEADER = 16 << 20
MAX_TENSORS = 200_000
_MAX_DIMS = 8
_DTYPES = {
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

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read and check the header of a file.

        Raises:
            ArtifactError: if the file cannot be read, or is damaged or hostile.
        """
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                    raise ArtifactError(f"'{path}' is truncated or not a safetensors file")
                text = file.read(length)
        except OSError as error:
            raise ArtifactError(f"cannot read '{path}': {error.strerror}") from error
        header = parse_json(text, path)
        if not text.startswith(b"{") or not isinstance(header, dict):
            raise ArtifactError(f"'{path}' is not a safetensors file")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ArtifactError(f"'{path}' has metadata that are not strings")
        return cls(path, metadata, _entries(header, path, 8 + length, size))

    def read(self, entry: Entry) -> Tensor:
        """The tensor as stored, read into memory of its own.

        Raises:
            ArtifactError: if the file cannot be read or has shrunk.
        """
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        data = _bytes(tensor)
        try:
            with self.path.open("rb") as file:
                file.seek(entry.offset)
                found = file.readinto(data)
        except OSError as error:
            raise ArtifactError(f"cannot read '{self.path}': {error.strerror}") from error
        if found != entry.length:
            raise ArtifactError(f"'{self.path}' became shorter while it was read")
        if tensor.dtype == torch.bool and np.frombuffer(data, np.uint8).max(initial=0) > 1:
            raise ArtifactError(f"'{self.path}': tensor '{entry.name}' has bytes that are neither true nor false")
        return tensor

    def checksums(self) -> dict[str, int]:
        """The CRC-32 of tensors by name, as the writer left it.

        Raises:
            ArtifactError: if there is none.
        """
        if CHECKSUMS not in self.metadata:
            raise ArtifactError(f"'{self.path}' has no checksums to verify; save the model again with sparsehooks")
        found = parse_json(self.metadata[CHECKSUMS].encode(), self.path)
        if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
            raise ArtifactError(f"'{self.path}' has checksums that are not numbers")
        return found


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata that let ``verify`` find any damage of these tensors, blobs or plain.

    Args:
        tensors: everything that one file will hold, or a whole model; any dtype and device.

    Returns:
        one entry for the ``metadata`` of ``safetensors.torch.save_file``.
    """
    return {CHECKSUMS: json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})}


def checksum(tensor: Tensor) -> int:
    """The CRC-32 of a tensor's bytes in row-major order."""
    return zlib.crc32(_bytes(tensor))


def write_shard(
    path: Path,
    contents: Mapping[str, tuple[str, tuple[int, ...]]],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Args:
        path: the file to make.
        contents: dtype (as safetensors names it) and shape of each tensor.
        load: gives a tensor by its name; called once for each, in the order of the file.
        metadata: the file's ``__metadata__``.

    Raises:
        OSError: if the file cannot be written.
    """
    # wide dtypes first, as safetensors does: then every tensor is aligned
    names = sorted(contents, key=lambda name: -_DTYPES[contents[name][0]].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        dtype, shape = contents[name]
        end = offset + math.prod(shape) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(_bytes(load(name)))


def parse_json(text: bytes, path: Path) -> Any:
    """JSON without duplicate keys.

    Raises:
        ArtifactError: if it is not, naming the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ArtifactError(f"'{path}' has a key twice in its JSON")
        return fields

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise ArtifactError(f"'{path}' is damaged: its JSON cannot be read") from None


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
    # names are printed, and other tools may make paths of them
    if not name.isprintable() or not name or ".." in name:
        raise ArtifactError(f"'{path}': {name[:80]!r} cannot be the name of a tensor")
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, last]} if len(fields) == 3:
            pass
        case _:
            raise ArtifactError(f"'{path}': the header of tensor '{name}' is malformed")
    if dtype not in _DTYPES:
        raise ArtifactError(f"'{path}': tensor '{name}' has dtype {dtype[:20]!r}, which sparsehooks does not read")
    if len(shape) > _MAX_DIMS or not all(type(size) is int and 0 <= size < 1 << 44 for size in (*shape, first, last)):
        raise ArtifactError(f"'{path}': tensor '{name}' has an impossible shape or offset")
    if last - first != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ArtifactError(f"'{path}': tensor '{name}' has another size than its shape says")
    return Entry(name, dtype, tuple(shape), start + first, last - first)
