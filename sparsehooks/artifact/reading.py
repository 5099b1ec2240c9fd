"""A saved model folder, opened strictly: its files may come from anybody."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsehooks.artifact.shards import CHECKSUMS, MAX_HEADER, Entry, Shard, of_nothing, parse_json
from sparsehooks.artifact.stored import holds_blob
from sparsehooks.computing import kernels
from sparsehooks.errors import ArtifactError

METHOD = "sparsehooks"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_PIECE = 1 << 22
_TRIES = 10
"""Times that a folder is opened again because another one took its place meanwhile."""


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
    _found: tuple[int, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Folder:
        """Open a folder that sparsehooks saved; if it is replaced meanwhile, this is the old one or the new one.

        Raises:
            ArtifactError: if it is missing, damaged, hostile, or not such a folder.
        """
        root = Path(path)
        for _ in range(_TRIES):
            found = _identity(root)
            try:
                folder = cls._open(root, found)
            except ArtifactError:
                if _identity(root) == found:
                    raise
            else:
                if _identity(root) == found:
                    return folder
        raise ArtifactError(f"'{path}' is changed all the time; open it when nothing writes into it")

    @classmethod
    def _open(cls, root: Path, found: tuple[int, ...]) -> Folder:
        if not root.is_dir():
            what = "is a file; name its folder" if root.is_file() else "does not exist"
            raise ArtifactError(f"there is no folder '{root}': it {what}")
        config = read_json(root, CONFIG) if (root / CONFIG).exists() else {}
        index = read_json(root, INDEX) if (root / INDEX).exists() else {}
        if index and (root / WEIGHTS).exists():
            raise ArtifactError(f"'{root}' holds both {WEIGHTS} and {INDEX}; remove the one that is not the model")
        if not index and not (root / WEIGHTS).exists():
            raise ArtifactError(f"'{root}' holds no model: there is neither {WEIGHTS} nor {INDEX}")
        shards = indexed_shards(root, index) if index else (Shard.open(own_file(root, WEIGHTS)),)
        check_same_model(shards)
        _check_complete(shards)
        folder = cls(root, config, index, shards, found)
        if not folder._is_marked():
            raise ArtifactError(f"'{root}' was not saved by sparsehooks; convert or compress it first")
        return folder

    def entries(self) -> Iterator[tuple[Shard, Entry]]:
        """Every tensor and the file that holds it; in no particular order."""
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
        return [own_file(self.path, str(path.relative_to(self.path))) for path in found]

    def check_in_place(self) -> None:
        """The files that are read by their names are still those of the folder that was opened.

        Raises:
            ArtifactError: if another folder has taken its place.
        """
        if _identity(self.path)[:2] != self._found[:2]:  # the rest changes when anything is written into it
            raise ArtifactError(f"'{self.path}' was replaced while it was read; try again")

    def _is_marked(self) -> bool:
        marks = self.config.get("quantization_config")
        return (
            (isinstance(marks, dict) and marks.get("quant_method") == METHOD)
            or any(CHECKSUMS in shard.metadata for shard in self.shards)
            or any(holds_blob(shard, entry) for shard, entry in self.entries())
        )


def _identity(root: Path) -> tuple[int, ...]:
    """What changes when another folder takes this one's place, or a file in it is replaced."""
    try:
        status = root.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def indexed_shards(root: Path, index: Mapping[str, Any]) -> tuple[Shard, ...]:
    """The files that an index names, which hold exactly the tensors that it lists for them.

    Raises:
        ArtifactError: if they do not, or if a file is missing, damaged or outside the folder.
    """
    where = f"'{root / INDEX}'"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{where} has no weight_map")
    for file in weight_map.values():
        if not _is_plain_name(file):
            raise ArtifactError(f"{where} names {str(file)[:80]!r}, which is not a .safetensors file of this folder")
    shards = tuple(Shard.open(own_file(root, file)) for file in sorted(set(weight_map.values())))
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


def own_file(root: Path, name: str) -> Path:
    """A file of a folder; a link may lead out of it only within a Hugging Face cache.

    Raises:
        ArtifactError: if it is missing, or a link leads elsewhere.
    """
    path = root / name
    if not path.is_file():
        raise ArtifactError(f"'{path}' is missing or not a file")
    target, home = path.resolve(), root.resolve()
    caches = [parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"]
    if not target.is_relative_to(home) and target.parent not in caches:
        raise ArtifactError(f"'{path}' leads out of its folder to '{target}'; copy the file into the folder")
    return path


def check_files(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Compare every plain tensor of the weight files of a model with its checksum, where they have any.

    Blobs carry checksums of their own, which are compared when they are decoded.

    Raises:
        ArtifactError: if a file is damaged, or belongs to another model than the first one.
    """
    with torch.device("cpu"):  # transformers calls this where tensors are made on the meta device
        shards = [Shard.open(Path(path)) for path in paths]
        check_same_model(shards)
        for shard in shards:
            if CHECKSUMS in shard.metadata:
                expected = shard.checksums()
                for entry in shard.entries:
                    if not holds_blob(shard, entry):
                        check_tensor(shard, entry, expected)


def check_same_model(shards: Sequence[Shard]) -> None:
    """The files of a model carry the same checksums, those of all its tensors.

    Raises:
        ArtifactError: if a file does not, because it is another model's.
    """
    for shard in shards[1:]:
        if shard.metadata.get(CHECKSUMS) != shards[0].metadata.get(CHECKSUMS):
            raise ArtifactError(
                f"'{shard.path}' and '{shards[0].path}' were not saved together; get all files of the model again"
            )


def _check_complete(shards: Sequence[Shard]) -> None:
    """No tensor is missing of which the files of a model have a checksum."""
    if CHECKSUMS in shards[0].metadata:
        absent = shards[0].checksums().keys() - {entry.name for shard in shards for entry in shard.entries}
        if absent:
            name = min(absent)[:80]
            raise ArtifactError(
                f"'{shards[0].path}' has a checksum of tensor {name!r}, which no file holds; get all files again"
            )


def check_tensor(shard: Shard, entry: Entry, expected: Mapping[str, int]) -> None:
    """Compare one tensor as stored with its checksum, a few megabytes in memory at a time.

    Raises:
        ArtifactError: if it is another one, or has none.
    """
    found = 0 if entry.length else of_nothing(entry.shape)
    for offset in range(0, entry.length, _PIECE):
        found = kernels().checksum(shard.read_bytes(entry, offset, min(_PIECE, entry.length - offset)), found)
    if expected.get(entry.name) != found and (entry.length or expected.get(entry.name) != 0):  # 0: of an older release
        raise ArtifactError(
            f"'{shard.path}' is damaged: tensor '{entry.name}' does not match its checksum; get the file again"
        )


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A file of a folder that holds a JSON object.

    Raises:
        ArtifactError: if it is missing, damaged or hostile.
    """
    path = own_file(root, name)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADER + 1)
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror}") from error
    fields = parse_json(text, path) if len(text) <= MAX_HEADER else None
    if not isinstance(fields, dict) or not fields:
        raise ArtifactError(f"'{path}' is damaged: it is not a JSON object of reasonable size")
    return fields
