"""One tensor of a weight file, encoded or plain: read and decoded on demand, all of it or some rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from sparsehooks.artifact.blob import Blob
from sparsehooks.artifact.header import MAGIC
from sparsehooks.artifact.shards import DTYPES, Entry, Shard
from sparsehooks.components import Codec
from sparsehooks.errors import ArtifactError

_PIECE = 1 << 22
"""About so many bytes are decoded at once where a tensor is gone through row by row."""
MAX_BYTES = 2**31
MAX_EXPANSION = 256
"""A tensor that would be larger than 2 GiB and than its blob by this factor is refused."""


class Stored:
    """A tensor as it lies in a file; ``stored[first:last]`` gives rows of it, and reads no others.

    Attributes:
        shard: the file.
        entry: where it lies there.
        blob: the encoded form; None if it is stored plain.
        shape: its shape once decoded.
        dtype: its dtype once decoded.

    Raises:
        ArtifactError: if it is encoded, and damaged or hostile.
    """

    def __init__(self, shard: Shard, entry: Entry, codecs: Mapping[str, Codec]) -> None:
        self.shard = shard
        self.entry = entry
        self.blob: Blob | None = None
        self.shape, dtype = entry.shape, entry.dtype
        if holds_blob(shard, entry):
            try:
                self.blob = Blob(self._read, entry.length, codecs, name=entry.name)
            except ArtifactError as error:
                raise ArtifactError(f"'{shard.path}': {error}") from None
            self.shape, dtype = self.blob.header.shape, self.blob.header.dtype
        self.dtype_name = dtype
        self.dtype = DTYPES[dtype]

    @property
    def nbytes(self) -> int:
        """Its size once decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check_size(self) -> None:
        """A small file cannot make anybody who wants all of it take much memory, time or disk.

        Raises:
            ArtifactError: if it would become too large.
        """
        self._check_bytes(self.nbytes)

    def _check_bytes(self, size: int) -> None:
        if self.blob is not None and size > max(MAX_BYTES, MAX_EXPANSION * self.entry.length):
            raise ArtifactError(
                f"'{self.shard.path}': tensor '{self.entry.name}' would decode from {self.entry.length} to {size} "
                "bytes; read some rows at a time with sparsehooks.safe_open(...).get_slice"
            )

    def tensor(self) -> Tensor:
        """All of it.

        Raises:
            ArtifactError: if it is damaged or hostile, or would become too large, or the file cannot be read.
        """
        self.check_size()
        if self.blob is None:
            return self.shard.read(self.entry, 0, self.entry.length).view(self.shape)
        return self[0 : self.shape[0]]

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"tensor '{self.entry.name}' can be read in steps of 1 only")
        last = max(first, last)
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._check_bytes((last - first) * row)
        if self.blob is not None:
            try:
                return self.blob.rows(first, last)
            except ArtifactError as error:
                raise ArtifactError(f"'{self.shard.path}': {error}") from None
        return self.shard.read(self.entry, first * row, (last - first) * row).view(last - first, *self.shape[1:])

    def pieces(self) -> list[slice]:
        """Slices of rows that make up all of it, each of about 4 MB once decoded.

        Raises:
            ArtifactError: if it would become too large.
        """
        self.check_size()
        if not self.shape or not self.nbytes:
            return []
        rows = max(1, _PIECE * self.shape[0] // self.nbytes)
        return [slice(first, first + rows) for first in range(0, self.shape[0], rows)]

    def _read(self, offset: int, length: int) -> memoryview:
        return self.shard.read_bytes(self.entry, offset, length)


def holds_blob(shard: Shard, entry: Entry) -> bool:
    """Whether a tensor as stored is a blob; reads no more than its first bytes.

    Raises:
        ArtifactError: if it is one under the label of another dtype or shape, which no checksum covers.
    """
    if entry.length < len(MAGIC) or shard.read_bytes(entry, 0, len(MAGIC)) != MAGIC:
        return False
    if entry.dtype != "U8" or len(entry.shape) != 1:
        raise ArtifactError(
            f"'{shard.path}' is damaged: tensor '{entry.name}' is encoded, but labelled {entry.dtype} of shape "
            f"{list(entry.shape)}; get the file again"
        )
    return True
