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
from sparsehooks.artifact.container import Rows, encode, is_blob
from sparsehooks.artifact.inspection import Inspection, TensorRow, row_of
from sparsehooks.artifact.reading import CONFIG, INDEX, METHOD, Folder, check_tensor
from sparsehooks.artifact.shards import CHECKSUMS, Shard, ShardWriter, checksums
from sparsehooks.artifact.stored import Stored
from sparsehooks.components import LEVELS, Codec, Level
from sparsehooks.errors import ArtifactError, PluginError, suggest

if TYPE_CHECKING:
    from sparsehooks.catalog import Catalog

__all__ = [
    "Folder",
    "Inspection",
    "TensorRow",
    "check_level",
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


def new_folder(out: str | os.PathLike[str], *, replace: bool = True) -> AbstractContextManager[Path]:
    """Write a model folder that appears complete or not at all.

    ``with new_folder(out) as temporary`` gives a temporary folder beside ``out``. When the block ends, every file in
    it gets ordinary permissions and is forced to the disk, and the folder takes its name. When anything raises, the
    temporary folder is removed and ``out`` stays as it was.

    Args:
        out: the folder to make; missing parents are made too.
        replace: whether an artifact that is there already may be replaced, but for those of its files that are no
            weights and have no successor. A folder that is no artifact is always refused.

    Raises:
        ArtifactError: on entering or leaving the block, if ``out`` is refused or cannot be written.
    """
    return atomic_folder(out, lambda found: replace and _is_artifact(found))


def check_level(level: str) -> None:
    """Whether a level exists.

    Raises:
        ArtifactError: if it does not.
    """
    if level not in LEVELS:
        raise ArtifactError(f"there is no level {str(level)[:40]!r}{suggest(str(level), LEVELS)}")


@functools.cache
def load_codecs(catalog: Catalog) -> Mapping[str, Codec]:
    """Every codec of a catalog, by name; one that is broken or clashes is left out with a warning."""
    codecs: dict[str, Codec] = {}
    for name in dict.fromkeys(record.component.name for record in catalog.records("codec")):
        try:
            if not name.isascii() or not name.isprintable():  # it is written into files
                raise PluginError("its name is not printable ASCII")
            codecs[name] = cast("Codec", catalog.create("codec", name))
        except PluginError as error:
            warnings.warn(f"the codec '{name}' is not used: {error}", stacklevel=2)
    return codecs


def installed_codecs() -> Mapping[str, Codec]:
    """Every codec of the installed, enabled plugins, by name."""
    from sparsehooks.plugins import installed_catalog

    return load_codecs(installed_catalog())


def encode_state_dict(
    state: Mapping[str, Tensor], *, level: Level = "balanced", signed_zeros: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor in its smallest form, under its own name, and the metadata of the file.

    Args:
        state: tensors of any device by name.
        level: codecs of a higher level are not used.
        signed_zeros: keep -0.0 apart from +0.0.

    Returns:
        tensors (a blob where that is smaller, else the tensor itself), and strings for ``__metadata__``.
    """
    for name in state:
        if name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in state:
            weight = name.removesuffix("_orig")
            raise ArtifactError(
                f"'{weight}' is still a pair of torch.nn.utils.prune, which no model opens; call "
                "torch.nn.utils.prune.remove on its module first"
            )
    codecs = installed_codecs()
    encoded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        blob = encode(tensor, codecs, level=level, signed_zeros=signed_zeros)
        if blob is None and is_blob(tensor):
            raise ArtifactError(f"tensor '{name}' starts like an encoded one; it cannot be told from one in a file")
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
    """Write the ordinary dense model that an artifact stands for, bit for bit; a few megabytes in memory at a time.

    A model that has shrunk, or whose activations are sparse, is dense afterwards and still needs sparsehooks to open.

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
        source.check_in_place()
        if source.index:
            metadata = source.index.get("metadata")
            known = metadata if isinstance(metadata, dict) else {}
            _write_json(temporary / INDEX, {**source.index, "metadata": {**known, "total_size": dense_bytes}})
        if source.config:
            config = {key: value for key, value in source.config.items() if key != "quantization_config"}
            if needed := _needed(source.config.get("quantization_config")):
                config["quantization_config"] = needed
            _write_json(temporary / CONFIG, config)
    return Path(out)


def _needed(marks: Any) -> dict[str, Any]:
    """What a dense model says about itself that its architecture cannot: it has shrunk, its activations are sparse."""
    marks = marks if isinstance(marks, dict) else {}
    kept = {key: marks[key] for key in ("shrunk", "activations") if marks.get(key)}
    return {"quant_method": METHOD, "version": marks.get("version"), **kept} if kept else {}


def _scan(
    folder: Folder, codecs: Mapping[str, Codec] | None, progress: Progress | None, *, verified: bool
) -> Inspection:
    codecs = installed_codecs() if codecs is None else codecs
    report = _Reporter(folder.bytes, progress)
    rows = []
    for shard in folder.shards:
        expected = shard.checksums() if verified else {}
        for entry in shard.entries:
            if verified:
                check_tensor(shard, entry, expected)
            rows.append(row_of(Stored(shard, entry, codecs)))
            report(entry.length)
    return Inspection(tuple(rows))


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
    stored = {entry.name: Stored(shard, entry, codecs) for entry in shard.entries}
    for tensor in stored.values():
        tensor.check_size()
    expected = shard.checksums() if CHECKSUMS in shard.metadata else None

    def load(name: str) -> Tensor | Rows:
        if expected is not None:
            check_tensor(shard, stored[name].entry, expected)
        report(stored[name].entry.length)
        return stored[name] if stored[name].shape else stored[name].tensor()

    contents = {name: (tensor.dtype_name, tensor.shape) for name, tensor in stored.items()}
    metadata = {key: value for key, value in shard.metadata.items() if not key.startswith("sparsehooks.")}
    writer = ShardWriter(target / shard.path.name, contents, metadata)
    writer.write(load)
    writer.finish(metadata)
    return writer.bytes


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _is_artifact(path: Path) -> bool:
    try:
        Folder.open(path)
    except ArtifactError:
        return False
    return True
