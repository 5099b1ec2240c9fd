"""Making an artifact of a model that is there already, without opening it as a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsehooks.artifact.container import Rows, encode, is_blob
from sparsehooks.artifact.folder import Progress, check_level, installed_codecs, new_folder
from sparsehooks.artifact.reading import CONFIG, INDEX
from sparsehooks.artifact.restoring import Weight
from sparsehooks.artifact.shards import CHECKSUMS, ShardWriter
from sparsehooks.artifact.sources import Source
from sparsehooks.components import Level
from sparsehooks.errors import ArtifactError

_METADATA = {"format": "pt", "sparsehooks.format": "1"}


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    level: Level = "balanced",
    signed_zeros: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model in the sparse form, bit for bit; needs no more memory than its largest tensor.

    Weights may lie in safetensors files or in those of ``torch.save``, whole or sharded; as ``torch.nn.utils.prune``
    keeps them; in the sparse formats of compressed-tensors; or in an artifact, which is encoded anew. The other files
    of a folder are copied, except hidden folders and the checkpoints of a training.

    Args:
        source: a model folder, or one .safetensors, .bin, .pt or .pth file.
        out: a new or empty folder, or an earlier artifact to replace.
        level: how much work saving may put into a smaller file: "fast", "balanced" or "small".
        signed_zeros: keep -0.0, which otherwise becomes +0.0 in the tensors that are encoded.
        progress: called after each tensor with the bytes done and the bytes in all, as the dense model has them.

    Returns:
        ``out``.

    Raises:
        ArtifactError: if the source is missing, damaged, hostile, quantized or something else, or ``out`` cannot be
            written; then nothing is left of it.
    """
    check_level(level)
    model = Source.open(source, installed_codecs())
    config = _marked(model) if model.config else None
    done, total = 0, sum(weight.nbytes for weight in model.weights.values())

    def load(name: str) -> Tensor | Rows:
        nonlocal done
        found = _encoded(model.weights[name], level=level, signed_zeros=signed_zeros)
        done += model.weights[name].nbytes
        if progress is not None:
            progress(done, total)
        return found

    with new_folder(out) as temporary:
        # every file carries the checksums of all tensors, so headers are written when all tensors are
        known = {**model.file_metadata, **_METADATA}
        longest = {**known, CHECKSUMS: json.dumps(dict.fromkeys(model.weights, 2**32 - 1))}
        files = model.files()
        writers = []
        for file, names in files.items():
            contents = {name: (model.weights[name].dtype, model.weights[name].shape) for name in names}
            writers.append(ShardWriter(temporary / file, contents, longest))
            writers[-1].write(load)
        checksums = {name: checksum for writer in writers for name, checksum in writer.checksums.items()}
        for writer in writers:
            writer.finish({**known, CHECKSUMS: json.dumps(checksums)})
        if len(files) > 1:
            metadata = {**model.metadata, "total_size": sum(writer.bytes for writer in writers)}
            weight_map = {name: file for file, names in files.items() for name in names}
            _write_json(temporary / INDEX, {"metadata": metadata, "weight_map": weight_map})
        if config is not None:
            _write_json(temporary / CONFIG, config)
        for name, path in model.others.items():
            _copy(path, temporary / name)
    return Path(out)


def _encoded(weight: Weight, *, level: Level, signed_zeros: bool) -> Tensor | Rows:
    """The blob of a tensor, or the tensor if that is smaller."""
    loaded = weight.load()
    blob = encode(loaded, installed_codecs(), level=level, signed_zeros=signed_zeros)
    if blob is None and isinstance(loaded, Tensor) and is_blob(loaded):
        raise ArtifactError(f"{weight.where} starts like an encoded one; it cannot be told from one in a file")
    return loaded if blob is None else blob


def _marked(model: Source) -> dict[str, Any]:
    """config.json with what ``from_pretrained`` needs to open the artifact."""
    from sparsehooks.artifact.quantizer import SparseHooksConfig

    marks = SparseHooksConfig(**model.config.get("quantization_config", {}))
    masked = {name for name, weight in model.weights.items() if weight.masked}
    marks.pruned = sorted(masked.union(marks.pruned))
    return {**model.config, "quantization_config": marks.to_dict()}


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror}") from error
    with file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
