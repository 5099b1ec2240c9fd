"""The models that ``convert`` takes, opened strictly and read one tensor at a time.

Dense weight files, those of ``torch.save`` among them; the masks of ``torch.nn.utils.prune``; the sparse forms that
compressed-tensors wrote until 0.14; and artifacts. A model may be several of these at once: each way to store a
tensor is undone by itself. Nothing of this imports transformers, and no pickled object other than a tensor is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks.artifact.container import Rows
from sparsehooks.artifact.header import MAX_DIMS
from sparsehooks.artifact.reading import (
    CONFIG,
    INDEX,
    METHOD,
    WEIGHTS,
    check_same_model,
    check_tensor,
    indexed_shards,
    own_file,
    read_json,
)
from sparsehooks.artifact.restoring import Weight, restored
from sparsehooks.artifact.shards import CHECKSUMS, DTYPES, Shard, is_tensor_name
from sparsehooks.artifact.stored import Stored
from sparsehooks.components import Codec
from sparsehooks.errors import ArtifactError

_TORCH_WEIGHTS = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_TORCH_SUFFIXES = {".bin", ".pt", ".pth"}
_ZIP = b"PK\3\4"
_WEIGHT_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|gguf)(\.index(\.json)?)?")
_SPARSE_FORMATS = {None, "dense", "sparse-bitmask", "sparse-24-bitmask"}
_PEER = "compressed-tensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """A model to convert; its headers are checked, its tensors are read on demand.

    Attributes:
        weights: its tensors by name.
        config: config.json without what described another compressed form; empty if there is none.
        metadata: what the index of its files says besides their names.
        file_metadata: the ``__metadata__`` of its safetensors files, without what belongs to a format.
        others: every file to copy, by its path within the folder.
    """

    weights: Mapping[str, Weight]
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    file_metadata: Mapping[str, str]
    others: Mapping[str, Path]

    @classmethod
    def open(cls, path: str | os.PathLike[str], codecs: Mapping[str, Codec]) -> Source:
        """Open a model folder, or one weight file.

        Args:
            path: the folder or file.
            codecs: the codecs by name, for tensors that are encoded already.

        Raises:
            ArtifactError: if it is missing, damaged, hostile, quantized, or nothing that can be converted.
        """
        root = Path(path)
        if root.is_file():
            weights = _file_weights(root, codecs)
            return cls(restored(weights), {}, {}, _file_metadata(root.parent, weights), {})
        if not root.is_dir():
            raise ArtifactError(f"there is no folder or file '{path}'")
        config = _plain_config(read_json(root, CONFIG), root / CONFIG) if (root / CONFIG).exists() else {}
        index, weights = _folder_weights(root, codecs)
        metadata = index.get("metadata")
        others = {name: own_file(root, name) for name in _others(root)}
        known = metadata if isinstance(metadata, dict) else {}
        return cls(restored(weights), config, known, _file_metadata(root, weights), others)

    def files(self) -> dict[str, list[str]]:
        """The names of the tensors of each weight file of the model once converted."""
        found = sorted({weight.file for weight in self.weights.values()})
        names = {
            file: WEIGHTS if len(found) == 1 else f"model-{number:05}-of-{len(found):05}.safetensors"
            for number, file in enumerate(found, 1)
        }
        return {names[file]: [name for name, weight in self.weights.items() if weight.file == file] for file in found}


# ------------------------------------------------------------------------------------------------- folders and files


def _folder_weights(root: Path, codecs: Mapping[str, Codec]) -> tuple[Mapping[str, Any], dict[str, Weight]]:
    """The index of a folder, if it has one, and the tensors as stored."""
    for single, index_name in ((WEIGHTS, INDEX), (_TORCH_WEIGHTS, _TORCH_INDEX)):
        if (root / single).exists() and (root / index_name).exists():
            raise ArtifactError(f"'{root}' holds both {single} and {index_name}; remove the one that is not the model")
        if (root / single).exists():
            return {}, _file_weights(own_file(root, single), codecs)
        if (root / index_name).exists():
            index = read_json(root, index_name)
            if index_name == INDEX:
                return index, _shard_weights(indexed_shards(root, index), codecs)
            return index, _indexed_torch_weights(root, index)
    raise ArtifactError(f"'{root}' holds no model: there is neither {WEIGHTS} nor {_TORCH_WEIGHTS} nor an index of one")


def _file_metadata(root: Path, weights: Mapping[str, Weight]) -> dict[str, str]:
    files = sorted({weight.file for weight in weights.values() if weight.file.endswith(".safetensors")})
    every = (pair for file in files for pair in Shard.open(root / file).metadata.items())
    return {key: value for key, value in every if not key.startswith("sparsehooks.")}


def _others(root: Path) -> Iterator[str]:
    """What is copied: all but weights, hidden folders and what a training needs; other folders keep their weights."""
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        skipped = any(part.startswith((".", "checkpoint-", "sparsehooks-start")) for part in inner.parts[:-1])
        weights = len(inner.parts) == 1 and (inner.name == CONFIG or _WEIGHT_FILE.fullmatch(inner.name))
        if not path.is_dir() and not skipped and not weights:
            yield str(inner)


def _file_weights(path: Path, codecs: Mapping[str, Codec]) -> dict[str, Weight]:
    if path.suffix == ".safetensors":
        return _shard_weights((Shard.open(path),), codecs)
    if path.suffix in _TORCH_SUFFIXES:
        return _torch_weights(path)
    raise ArtifactError(f"'{path}' is neither a .safetensors file nor one of {', '.join(sorted(_TORCH_SUFFIXES))}")


def _shard_weights(shards: tuple[Shard, ...], codecs: Mapping[str, Codec]) -> dict[str, Weight]:
    check_same_model(shards)
    found = {}
    for shard in shards:
        expected = shard.checksums() if CHECKSUMS in shard.metadata else None
        for entry in shard.entries:
            stored = Stored(shard, entry, codecs)
            stored.check_size()
            found[entry.name] = Weight(
                where=f"'{shard.path}': tensor '{entry.name}'",
                file=shard.path.name,
                dtype=stored.dtype_name,
                shape=stored.shape,
                load=_Load(stored, expected),
            )
    return found


@dataclass(frozen=True)
class _Load:
    """Reads a tensor of a safetensors file, after its checksum was compared if it has one."""

    stored: Stored
    expected: Mapping[str, int] | None

    def __call__(self) -> Tensor | Rows:
        if self.expected is not None:
            check_tensor(self.stored.shard, self.stored.entry, self.expected)
        return self.stored if len(self.stored.shape) >= 2 else self.stored.tensor()


def _indexed_torch_weights(root: Path, index: Mapping[str, Any]) -> dict[str, Weight]:
    """The tensors of all files that an index names, which hold exactly what it lists for them."""
    where = f"'{root / _TORCH_INDEX}'"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{where} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.bin", file) or not file.isprintable():
            raise ArtifactError(f"{where} names {str(file)[:80]!r}, which is not a .bin file of this folder")
    found: dict[str, Weight] = {}
    for file in sorted(set(weight_map.values())):
        weights = _torch_weights(own_file(root, file))
        wrong = {name for name, listed in weight_map.items() if listed == file} ^ weights.keys()
        if wrong:
            raise ArtifactError(
                f"{where} and '{file}' disagree on tensor {min(wrong)[:80]!r}; get all files of the model again"
            )
        found |= weights
    return found


def _torch_weights(path: Path) -> dict[str, Weight]:
    """The tensors of a file that ``torch.save`` wrote; mapped, not read, where its format allows that."""
    try:
        with path.open("rb") as file:
            mapped = file.read(len(_ZIP)) == _ZIP  # files from before torch 1.6 are no archives, and cannot be mapped
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror}") from error
    try:
        loaded = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise ArtifactError(
            f"'{path}' is damaged, or holds other objects than tensors; save the model's state dict alone"
        ) from error
    if not isinstance(loaded, dict) or not loaded:
        raise ArtifactError(f"'{path}' does not hold a dict of tensors; save the model's state dict alone")
    found = {}
    for name, tensor in loaded.items():
        if type(tensor) not in {Tensor, nn.Parameter}:
            kind = type(tensor).__name__
            raise ArtifactError(f"'{path}': {str(name)[:80]!r} is a {kind}; save the model's state dict alone")
        if not isinstance(name, str) or not is_tensor_name(name):
            raise ArtifactError(f"'{path}': {str(name)[:80]!r} cannot be the name of a tensor")
        if not _is_ordinary(tensor):
            raise ArtifactError(
                f"'{path}': tensor '{name}' is not an ordinary dense tensor; make it one and save again"
            )
        found[name] = Weight(
            where=f"'{path}': tensor '{name}'",
            file=path.name,
            dtype=_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            load=tensor.detach,
        )
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in loaded.values()}
    if sum(storages.values()) > path.stat().st_size:
        raise ArtifactError(f"'{path}' is damaged: its tensors are larger than the file; get the file again")
    return found


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is dense, in memory, no larger than its memory, and of a dtype that safetensors has."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in _NAMES
        and tensor.dim() <= MAX_DIMS
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _plain_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """config.json without what described another sparse form; that of an artifact stays."""
    plain = dict(config)
    for key in ("quantization_config", "compression_config"):
        marks = plain.get(key)
        if isinstance(marks, dict) and key == "quantization_config" and marks.get("quant_method") == METHOD:
            continue
        if marks is not None:
            _check_sparse_only(marks, key, path)
        plain.pop(key, None)
    return plain


def _check_sparse_only(marks: Any, key: str, path: Path) -> None:
    if not isinstance(marks, dict):
        raise ArtifactError(f"'{path}' is damaged: {key} is not a table; get the file again")
    method = marks.get("quant_method", _PEER if key == "compression_config" else "an unknown method")
    sparsity = marks.get("sparsity_config") or {}
    form = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    if method != _PEER or any(marks.get(part) for part in ("config_groups", "kv_cache_scheme", "transform_config")):
        raise ArtifactError(
            f"'{path}': the model is quantized with {str(method)[:40]!r}; convert takes only the sparse formats of "
            f"{_PEER}, so start from the model before it was quantized"
        )
    if not (form is None or isinstance(form, str)) or form not in _SPARSE_FORMATS:
        raise ArtifactError(f"'{path}': the sparse format {str(form)[:40]!r} is not known; get a dense model instead")
