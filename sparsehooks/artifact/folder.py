"""What is done with a saved model folder: look into it, verify it, undo it, write it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from sparsehooks.artifact.atomic import atomic_folder
from sparsehooks.artifact.container import decode, encode, is_blob, read_header
from sparsehooks.artifact.inspection import Inspection, TensorRow
from sparsehooks.artifact.reading import CONFIG, INDEX, Folder, check_tensor, stored_blob
from sparsehooks.artifact.shards import Entry, Shard, checksums, write_shard
from sparsehooks.components import Codec
from sparsehooks.errors import ArtifactError, PluginError

if TYPE_CHECKING:
    from sparsehooks.catalog import Catalog

__all__ = [
    "Folder",
    "Inspection",
    "TensorRow",
    "checksums",
    "decompress",
    "encode_state_dict",
    "inspect",
    "installed_codecs",
    "load_codecs",
    "new_folder",
    "verify",
]

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

_MAX_EXPANSION = 256
"""A larger factor between a tensor and its blob is refused beyond the 2 GiB that ``decode`` allows anyway."""


def new_folder(out: str | os.PathLike[str], *, replace: bool = True) -> AbstractContextManager[Path]:
    """Write a model folder that appears complete or not at all.

    ``with new_folder(out) as temporary`` gives a temporary folder beside ``out``. When the block ends, every file in
    it gets ordinary permissions and is forced to the disk, and the folder takes its name. When anything raises, the
    temporary folder is removed and ``out`` stays as it was.

    Args:
        out: the folder to make; missing parents are made too.
        replace: whether an artifact that is there already may be replaced. A folder with any other content, or an
            artifact with folders inside (checkpoints), is always refused.

    Raises:
        ArtifactError: on entering or leaving the block, if ``out`` is refused or cannot be written.
    """
    return atomic_folder(out, lambda found: replace and _is_artifact(found))


def load_codecs(catalog: Catalog) -> dict[str, Codec]:
    """Every codec of a catalog, by name; one that is broken or clashes is left out with a warning."""
    codecs = {}
    for name in dict.fromkeys(record.component.name for record in catalog.records("codec")):
        try:
            codecs[name] = cast("Codec", catalog.create("codec", name))
        except PluginError as error:
            warnings.warn(f"the codec '{name}' is not used: {error}", stacklevel=2)
    return codecs


@functools.cache
def installed_codecs() -> Mapping[str, Codec]:
    """Every codec of the installed, enabled plugins, by name."""
    from sparsehooks.plugins import installed_catalog

    return load_codecs(installed_catalog())


def encode_state_dict(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor in its smallest form, under its own name, and the metadata of the file.

    Returns:
        tensors (a blob where that is smaller, else the tensor itself), and strings for ``__metadata__``.
    """
    codecs = installed_codecs()
    encoded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        blob = encode(tensor, codecs)
        # safetensors refuses tensors that share memory, such as tied ones of a plain module
        encoded[name] = tensor.detach().clone().contiguous() if blob is None else blob
    return encoded, {"sparsehooks.format": "1", **checksums(encoded)}


def inspect(
    folder: str | os.PathLike[str],
    *,
    codecs: Mapping[str, Codec] | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """What an artifact holds, tensor by tensor; decodes one at a time.

    Args:
        folder: the artifact.
        codecs: the codecs by name; default: those of the installed plugins.
        progress: called after each tensor.

    Raises:
        ArtifactError: if it is missing, damaged, hostile or not an artifact.
    """
    return _scan(Folder.open(folder), codecs, progress, verified=False)


def verify(
    folder: str | os.PathLike[str],
    *,
    codecs: Mapping[str, Codec] | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """What an artifact holds, after every checksum was compared and every tensor decoded.

    Args:
        folder: the artifact.
        codecs: the codecs by name; default: those of the installed plugins.
        progress: called after each tensor.

    Raises:
        ArtifactError: as ``inspect``, and if a tensor is not the one that was saved or has no checksum.
    """
    return _scan(Folder.open(folder), codecs, progress, verified=True)


def decompress(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    codecs: Mapping[str, Codec] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the ordinary dense model that an artifact stands for, bit for bit; one tensor in memory at a time.

    Args:
        folder: the artifact.
        out: the folder to make; it must not exist, or be empty.
        codecs: the codecs by name; default: those of the installed plugins.
        progress: called after each tensor.

    Returns:
        ``out``.

    Raises:
        ArtifactError: as ``inspect``, and if ``out`` cannot be written; then nothing is left of it.
    """
    source = Folder.open(folder)
    codecs = installed_codecs() if codecs is None else codecs
    written = {shard.path.name for shard in source.shards} | {CONFIG, INDEX}
    others = [path for path in source.files() if str(path.relative_to(source.path)) not in written]
    report = _Reporter(source.bytes, progress)
    with new_folder(out, replace=False) as temporary:
        dense_bytes = sum(_write_dense(shard, temporary, codecs, report) for shard in source.shards)
        for path in others:
            target = temporary / path.relative_to(source.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        if source.index:
            metadata = source.index.get("metadata")
            known = metadata if isinstance(metadata, dict) else {}
            _write_json(temporary / INDEX, {**source.index, "metadata": {**known, "total_size": dense_bytes}})
        if source.config:
            config = {key: value for key, value in source.config.items() if key != "quantization_config"}
            _write_json(temporary / CONFIG, config)
    return Path(out)


def _decoded(stored: Tensor, name: str, codecs: Mapping[str, Codec]) -> Tensor:
    return decode(stored, codecs, name=name, max_bytes=max(2**31, _MAX_EXPANSION * stored.numel()))


def _scan(
    folder: Folder, codecs: Mapping[str, Codec] | None, progress: Progress | None, *, verified: bool
) -> Inspection:
    codecs = installed_codecs() if codecs is None else codecs
    report = _Reporter(folder.bytes, progress)
    names = {entry.name for _, entry in folder.entries()}
    rows = []
    for shard in folder.shards:
        expected = shard.checksums() if verified else {}
        absent = expected.keys() - names
        if absent:
            raise ArtifactError(f"'{shard.path}' has a checksum of tensor '{min(absent)}', which no file holds")
        for entry in shard.entries:
            stored = shard.read(entry)
            if verified:
                check_tensor(shard, entry, stored, expected)
            rows.append(_row(shard, entry, stored, codecs))
            report(entry.length)
    return Inspection(tuple(rows))


def _row(shard: Shard, entry: Entry, stored: Tensor, codecs: Mapping[str, Codec]) -> TensorRow:
    dtype, positions, values, dense = entry.dtype, None, None, stored
    if is_blob(stored):
        dense = _decoded(stored, entry.name, codecs)
        header = read_header(stored, name=entry.name)
        dtype, positions, values = header.dtype, header.positions, header.values
    return TensorRow(
        name=entry.name,
        file=shard.path.name,
        shape=tuple(dense.shape),
        dtype=dtype,
        zeros=int((dense == 0).sum()),
        positions=positions,
        values=values,
        bytes=entry.length,
        dense_bytes=dense.nbytes,
    )


class _Reporter:
    """Adds up the bytes that are done and tells them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, length: int) -> None:
        self._done += length
        if self._progress is not None:
            self._progress(self._done, self._total)


def _write_dense(shard: Shard, target: Path, codecs: Mapping[str, Codec], report: _Reporter) -> int:
    """Write one file with every tensor decoded; returns the bytes of its tensors."""
    entries = {entry.name: entry for entry in shard.entries}
    contents = {entry.name: _dense_form(shard, entry) for entry in shard.entries}
    written = 0

    def load(name: str) -> Tensor:
        nonlocal written
        stored = shard.read(entries[name])
        dense = _decoded(stored, name, codecs) if is_blob(stored) else stored
        report(entries[name].length)
        written += dense.nbytes
        return dense

    metadata = {key: value for key, value in shard.metadata.items() if not key.startswith("sparsehooks.")}
    write_shard(target / shard.path.name, contents, load, metadata)
    return written


def _dense_form(shard: Shard, entry: Entry) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor once decoded."""
    blob = stored_blob(shard, entry)
    if blob is None:
        return entry.dtype, entry.shape
    header = read_header(blob, name=entry.name)
    return header.dtype, header.shape


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _is_artifact(path: Path) -> bool:
    try:
        Folder.open(path)
    except ArtifactError:
        return False
    return True
