"""Opening weight files tensor by tensor, as ``safetensors.safe_open`` does, encoded ones among them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sparsehooks.artifact.folder import installed_codecs
from sparsehooks.artifact.reading import Folder, check_tensor
from sparsehooks.artifact.semi_structured import semi_structured
from sparsehooks.artifact.shards import CHECKSUMS, Shard
from sparsehooks.artifact.stored import Stored
from sparsehooks.components import Codec
from sparsehooks.errors import ArtifactError, suggest


class safe_open:  # noqa: N801 - the name that users of safetensors know
    """A weight file, or a folder of them, with tensors that are read and decoded on demand.

    ``with sparsehooks.safe_open(path) as file: file.get_tensor(name)``. transformers is not needed.

    Args:
        path: a .safetensors file, or a folder that sparsehooks saved.
        framework: "pt", as in safetensors; nothing else is offered.
        device: where tensors shall be.
        codecs: the codecs by name; default: those of the installed plugins.

    Raises:
        ArtifactError: if the file is missing, damaged or hostile.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        framework: str = "pt",
        device: str | torch.device = "cpu",
        *,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:
        if framework not in {"pt", "torch"}:
            raise ArtifactError(f"framework {framework!r} is not offered; use 'pt'")
        shards = Folder.open(path).shards if Path(path).is_dir() else (Shard.open(Path(path)),)
        self._path = path
        self._device = torch.device(device)
        self._codecs = installed_codecs() if codecs is None else codecs
        self._shards = shards
        self._places = {entry.name: (shard, entry) for shard in shards for entry in shard.entries}
        # of all tensors, and the same in all files
        self._checksums = shards[0].checksums() if CHECKSUMS in shards[0].metadata else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files."""
        self._shards, self._places = (), {}

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._places)

    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of the files, without what belongs to the format."""
        return {
            key: value
            for shard in self._shards
            for key, value in shard.metadata.items()
            if not key.startswith("sparsehooks.")
        }

    def get_tensor(self, name: str) -> Tensor:
        """A whole tensor, after its checksum was compared.

        Raises:
            ArtifactError: if there is none of this name, or it is damaged or hostile.
        """
        stored = self._stored(name)
        if self._checksums is not None:
            check_tensor(stored.shard, stored.entry, self._checksums)
        return stored.tensor().to(self._device)

    def get_slice(self, name: str) -> Slice:
        """A tensor of which parts are read by indexing.

        Raises:
            ArtifactError: if there is none of this name, or it is damaged or hostile.
        """
        return Slice(self._stored(name), self._device)

    def get_semi_structured(self, name: str) -> tuple[Tensor, Tensor]:
        """The values and the 2-bit positions of a 2:4 tensor, as sparse tensor cores want them.

        Returns:
            for a tensor of shape (rows, columns): values (rows, columns / 2) in its dtype, and uint8 (rows,
            columns / 8) with a nibble for each group of four, the first in the lower one: the position of the first
            value in the lower two bits, that of the second in the upper two.

        Raises:
            ArtifactError: if the tensor is not encoded, not 2:4, or damaged or hostile.
        """
        stored = self._stored(name)
        if stored.blob is None:
            raise ArtifactError(f"'{stored.shard.path}': tensor '{name}' is stored plain; it has no 2:4 form")
        stored.check_size()
        try:
            values, places = semi_structured(stored.blob)
        except ArtifactError as error:
            raise ArtifactError(f"'{stored.shard.path}': {error}") from None
        return values.to(self._device), places.to(self._device)

    def _stored(self, name: str) -> Stored:
        if name not in self._places:
            raise ArtifactError(f"'{self._path}' holds no tensor '{name}'{suggest(name, self._places)}")
        return Stored(*self._places[name], self._codecs)


class Slice:
    """A tensor of a file: ``part[10:20]`` reads and decodes only the chunks in which these rows lie.

    The checksums of these chunks are compared; a tensor that is stored plain has only one for all of it, so nothing
    is compared there.
    """

    def __init__(self, stored: Stored, device: torch.device) -> None:
        self._stored = stored
        self._device = device

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        """The dtype once decoded, as safetensors names it."""
        return self._stored.dtype_name

    def __getitem__(self, index: Any) -> Tensor:
        """Any index that a tensor takes; the first dimension decides what is read.

        Raises:
            ArtifactError: if the tensor is damaged or hostile.
            IndexError: if the index does not fit the shape.
        """
        first, *others = index if isinstance(index, tuple) and index else (index,)
        shape = self._stored.shape
        if shape and type(first) is int and -shape[0] <= first < shape[0]:
            row = first % shape[0]
            part = self._stored[row : row + 1][(0, *others)]
        elif shape and isinstance(first, slice) and (first.step or 1) > 0:
            start, stop, step = first.indices(shape[0])
            part = self._stored[start:stop][(slice(None, None, step), *others)]
        else:
            part = self._stored.tensor()[index]
        return part.to(self._device)


def load_state_dict(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    codecs: Mapping[str, Codec] | None = None,
) -> dict[str, Tensor]:
    """Every tensor of a saved model, dense: for ``module.load_state_dict``, without transformers.

    Args:
        path: a folder that sparsehooks saved, or a .safetensors file.
        device: where the tensors shall be.
        codecs: the codecs by name; default: those of the installed plugins.

    Raises:
        ArtifactError: if it is missing, damaged or hostile.
    """
    with safe_open(path, device=device, codecs=codecs) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
