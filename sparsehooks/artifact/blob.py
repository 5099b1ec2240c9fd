"""Reading blobs, all of a tensor or some of its rows; they may come from anybody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sparsehooks.artifact.header import ALL, DTYPES, Chunk, Header, Read, padding, parse_header
from sparsehooks.components import Codec
from sparsehooks.computing import kernels
from sparsehooks.errors import ArtifactError
from sparsehooks.views import Layout


class Blob:
    """An encoded tensor of which the header is checked; chunks are read and decoded on demand.

    Nothing is allocated for a chunk before its checksum and its lengths agree.

    Attributes:
        name: the tensor's name.
        size: the bytes of the blob.
        header: what the blob says about itself.
        table: what it says about each chunk.

    Raises:
        ArtifactError: if it is damaged, hostile, of another version, or needs a codec that is missing.
    """

    def __init__(self, read: Read, size: int, codecs: Mapping[str, Codec], *, name: str) -> None:
        self.name = name
        self.size = size
        self._read = read
        with self._naming():
            self.header, self.table, self._starts = parse_header(read, size)
            self._positions = _by_place("positions", self.header, self.table, codecs)
            self._values = _by_place("values", self.header, self.table, codecs)

    @classmethod
    def of(cls, blob: Tensor, codecs: Mapping[str, Codec], *, name: str) -> Blob:
        """The blob that a uint8 tensor on the CPU is."""
        if blob.dtype != torch.uint8 or blob.dim() != 1:
            raise ArtifactError(f"tensor '{name}': this is not an encoded tensor")
        data = blob.contiguous().numpy().data
        return cls(lambda offset, length: data[offset : offset + length], len(data), codecs, name=name)

    def tensor(self) -> Tensor:
        """All of it."""
        return self.rows(0, self.header.rows)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` (excluded) of the first dimension; only their chunks are read.

        Raises:
            ArtifactError: if a chunk is damaged or hostile.
        """
        header = self.header
        start, stop = first * header.columns, last * header.columns
        dense = np.zeros(stop - start, header.layout(0, 0).bits)  # new memory is zero, at no cost
        for number in range(start // header.chunk, -(-stop // header.chunk)):
            at = number * header.chunk - start
            size = min(header.chunk, header.size - number * header.chunk)
            if at >= 0 and at + size <= dense.size:
                self._decode(number, dense[at : at + size])
            else:
                chunk = np.zeros(size, dense.dtype)
                self._decode(number, chunk)
                dense[max(at, 0) : at + size] = chunk[max(-at, 0) : dense.size - at]
        with self._naming():
            if header.dtype == "BOOL" and dense.max(initial=0) > 1:
                raise ArtifactError("it has values that are neither true nor false")
        return torch.from_numpy(dense).view(DTYPES[header.dtype][0]).view(last - first, *header.shape[1:])

    def chunks(self) -> Iterator[tuple[Layout, np.ndarray, str | None]]:
        """Of each chunk the layout with its positions, the bits of the values, and the codec of the positions."""
        for number in range(self.header.chunks):
            layout, values = self._parts(number)
            place = self.table[number].positions
            yield layout, values, None if place == ALL else self.header.codecs[place]

    def codecs(self, role: str) -> tuple[str, ...]:
        """The names of the codecs that its chunks use for the positions, or for the values."""
        return tuple(self.header.codecs[place] for place in sorted(_places(role, self.table)))

    def _decode(self, number: int, dense: np.ndarray) -> None:
        """Write a chunk into memory of zeros."""
        layout, values = self._parts(number)
        if layout.positions is None:
            dense[:] = values
        else:
            # torch scatters faster than numpy, signed numbers only
            signed = f"i{dense.itemsize}"
            found = torch.from_numpy(np.require(values, requirements="W").view(signed))
            torch.from_numpy(dense.view(signed)).scatter_(
                0, torch.from_numpy(np.require(layout.positions, requirements="W")), found
            )

    def _parts(self, number: int) -> tuple[Layout, np.ndarray]:
        with self._naming():
            count, positions_length, values_length, crc, positions_place, values_place = self.table[number]
            layout = self.header.layout(number, count)
            data = self._read(self._starts[number], self._starts[number + 1] - self._starts[number])
            middle = positions_length + padding(positions_length)
            end = middle + values_length
            if kernels().checksum(data) != crc or any(data[positions_length:middle]) or any(data[end:]):
                raise ArtifactError(f"the file is damaged: chunk {number} does not match its checksum")
            kept = None
            if positions_place != ALL:
                kept = self._positions[positions_place].decode(data[:positions_length], layout)
            elif count != layout.size or positions_length:
                raise ArtifactError(f"chunk {number} has {count} values for {layout.size} elements")
            if kept is not None and (kept.size != count or (count and not 0 <= kept[0] <= kept[-1] < layout.size)):
                raise ArtifactError(f"chunk {number} does not have the {count} positions that its table says")
            layout = replace(layout, positions=kept)
            values = self._values[values_place].decode(data[middle:end], layout)
            if values.size != count:
                raise ArtifactError(f"chunk {number} does not have the {count} values that its table says")
        return layout, values

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except ArtifactError as error:
            raise ArtifactError(f"tensor '{self.name}': {error}") from None


def decode(
    blob: Tensor,
    codecs: Mapping[str, Codec],
    *,
    name: str,
    shape: Sequence[int] | None = None,
    max_bytes: int = 2**31,
) -> Tensor:
    """The tensor that a blob holds.

    The blob may come from anybody: nothing is allocated before header, table and shape agree.

    Args:
        blob: uint8, one dimension, on the CPU.
        codecs: the codecs that may be used, by name.
        name: the tensor's name, for errors.
        shape: the shape it must have, if that is known.
        max_bytes: the largest decoded size to accept where ``shape`` is not given.

    Raises:
        ArtifactError: if the blob is damaged, hostile, of another shape or version, or needs a codec that is missing.
    """
    opened = Blob.of(blob, codecs, name=name)
    header = opened.header
    if shape is not None and tuple(shape) != header.shape:
        raise ArtifactError(
            f"tensor '{name}': the file holds shape {list(header.shape)}, but the model has {list(shape)}"
        )
    if shape is None and header.dense_bytes > max_bytes:
        raise ArtifactError(
            f"tensor '{name}': it would decode to {header.dense_bytes} bytes, more than the limit of {max_bytes}"
        )
    return opened.tensor()


def _by_place(role: str, header: Header, table: list[Chunk], codecs: Mapping[str, Codec]) -> dict[int, Codec]:
    """The codecs of one role that the table names, by their place in the header."""
    found = {}
    for place in _places(role, table):
        if place >= len(header.codecs):
            raise ArtifactError(f"its table names codec {place} of {len(header.codecs)}")
        codec = codecs.get(header.codecs[place])
        if codec is None or codec.role != role:
            name = header.codecs[place][:40]
            raise ArtifactError(f"it needs the {role} codec {name!r}; install the plugin that offers it")
        found[place] = codec
    return found


def _places(role: str, table: list[Chunk]) -> set[int]:
    """The places in the header of the codecs of one role."""
    return {chunk.positions for chunk in table} - {ALL} if role == "positions" else {chunk.values for chunk in table}
