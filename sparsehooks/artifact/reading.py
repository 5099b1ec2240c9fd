"""A saved model folder, opened strictly: its files may come from anybody."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsehooks.artifact.container import is_blob
from sparsehooks.artifact.shards import CHECKSUMS, MAX_HEADER, Entry, Shard, checksum, parse_json
from sparsehooks.errors import ArtifactError

METHOD = "sparsehooks"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


@dataclass(frozen=True)
class Folder:
    """An opened artifact: the checked headers of its files; tensors are read one at a time.

    Attributes:
        path: the folder.
        config: config.json, or empty if there is none (a plain ``nn.Module``).
        index: the index of the shards, or empty if there is one file only.
        shards: the weight files.
    """

    path: Path
    config: Mapping[str, Any]
    index: Mapping[str, Any]
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Folder:
        """Open a folder that sparsehooks saved.

        Raises:
            ArtifactError: if it is missing, damaged, hostile, or not such a folder.
        """
        root = Path(path)
        if not root.is_dir():
            raise ArtifactError(f"there is no folder '{path}'")
        config = _read_json(root, CONFIG) if (root / CONFIG).exists() else {}
        index = _read_json(root, INDEX) if (root / INDEX).exists() else {}
        if index and (root / WEIGHTS).exists():
            raise ArtifactError(f"'{path}' holds both {WEIGHTS} and {INDEX}; remove the one that is not the model")
        if not index and not (root / WEIGHTS).exists():
            raise ArtifactError(f"'{path}' holds no model: there is neither {WEIGHTS} nor {INDEX}")
        shards = _indexed_shards(root, index) if index else (Shard.open(_own(root, WEIGHTS)),)
        folder = cls(root, config, index, shards)
        if not folder._is_marked():
            raise ArtifactError(f"'{path}' was not saved by sparsehooks; compress it first")
        return folder

    def entries(self) -> Iterator[tuple[Shard, Entry]]:
        """Every tensor and the file that holds it; ``shard.read(entry)`` gives it as stored, a blob or plain."""
        return ((shard, entry) for shard in self.shards for entry in shard.entries)

    @property
    def bytes(self) -> int:
        """The bytes of all tensors as stored."""
        return sum(entry.length for _, entry in self.entries())

    def files(self) -> list[Path]:
        """Every file of the folder and of the folders in it.

        Raises:
            ArtifactError: if a link leads out of the folder.
        """
        found = sorted(path for path in self.path.rglob("*") if not path.is_dir())
        return [_own(self.path, str(path.relative_to(self.path))) for path in found]

    def _is_marked(self) -> bool:
        marks = self.config.get("quantization_config")
        return (
            (isinstance(marks, dict) and marks.get("quant_method") == METHOD)
            or any(CHECKSUMS in shard.metadata for shard in self.shards)
            or any(stored_blob(shard, entry) is not None for shard, entry in self.entries())
        )


def stored_blob(shard: Shard, entry: Entry) -> Tensor | None:
    """The tensor as stored if it is a blob; what cannot be one is not read."""
    if entry.dtype != "U8" or len(entry.shape) != 1:
        return None
    stored = shard.read(entry)
    return stored if is_blob(stored) else None


def _indexed_shards(root: Path, index: Mapping[str, Any]) -> tuple[Shard, ...]:
    """The files that an index names, which hold exactly the tensors that it lists for them."""
    where = f"'{root / INDEX}'"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{where} has no weight_map")
    for file in weight_map.values():
        if not _is_plain_name(file):
            raise ArtifactError(f"{where} names {str(file)[:80]!r}, which is not a .safetensors file of this folder")
    shards = tuple(Shard.open(_own(root, file)) for file in sorted(set(weight_map.values())))
    found = [(entry.name, shard.path.name) for shard in shards for entry in shard.entries]
    wrong = set(found) ^ set(weight_map.items())
    if wrong:
        name, file = min(wrong)
        raise ArtifactError(f"{where} and '{file}' disagree on tensor {name[:80]!r}; get all files of the model again")
    return shards


def _is_plain_name(file: Any) -> bool:
    """Whether an entry of the index names a weight file in the folder itself."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and file.isprintable()
        and "/" not in file
        and "\\" not in file
    )


def _own(root: Path, name: str) -> Path:
    """A file of the folder; a link may lead out of it only within a Hugging Face cache."""
    path = root / name
    if not path.is_file():
        raise ArtifactError(f"'{path}' is missing or not a file")
    target, home = path.resolve(), root.resolve()
    caches = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not target.is_relative_to(home) and target.parent not in caches:
        raise ArtifactError(f"'{path}' leads out of its folder to '{target}'; copy the file into the folder")
    return path


def check_files(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Compare every tensor of weight files with its checksum, where they have any.

    Raises:
        ArtifactError: if a file is damaged.
    """
    with torch.device("cpu"):  # transformers calls this where tensors are made on the meta device
        for path in paths:
            shard = Shard.open(Path(path))
            if CHECKSUMS in shard.metadata:
                expected = shard.checksums()
                for entry in shard.entries:
                    check_tensor(shard, entry, shard.read(entry), expected)


def check_tensor(shard: Shard, entry: Entry, stored: Tensor, expected: Mapping[str, int]) -> None:
    """Compare one tensor with its checksum.

    Raises:
        ArtifactError: if it is another one, or has none.
    """
    if expected.get(entry.name) != checksum(stored):
        raise ArtifactError(
            f"'{shard.path}' is damaged: tensor '{entry.name}' does not match its checksum; get the file again"
        )


def _read_json(root: Path, name: str) -> dict[str, Any]:
    path = _own(root, name)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror}") from error
    fields = parse_json(text, path) if len(text) <= MAX_HEADER else None
    if not isinstance(fields, dict) or not fields:
        raise ArtifactError(f"'{path}' is damaged: it is not a JSON object of reasonable size")
    return fields
