"""Writing artifacts: the encoded state dict, and a folder that appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsehooks.artifact.folder import encode_state_dict, new_folder

if TYPE_CHECKING:
    from torch import nn


def save_pretrained(model: nn.Module, folder: str | Path, **options: Any) -> Path:
    """Save a model in the sparse form: every tensor takes the codec that is smallest for it.

    The folder is written beside its final place and then renamed, so it is never half there. After ``import
    sparsehooks``, ``AutoModel.from_pretrained`` opens it bit for bit (a negative zero becomes a positive one).

    Args:
        model: a transformers model, or any module, which is saved as ``model.safetensors`` alone.
        folder: a new or empty folder, or an earlier artifact to replace.
        options: passed on to the model's own ``save_pretrained`` (``max_shard_size``, ...).

    Raises:
        ArtifactError: if the folder holds something else, or cannot be written.
    """
    with new_folder(folder) as temporary:
        write_model(model, temporary, **options)
    return Path(folder)


def write_model(model: nn.Module, folder: Path, **options: Any) -> None:
    """What ``save_pretrained`` writes, into a folder that is there already."""
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    from sparsehooks.artifact.quantizer import SparseHooksConfig, arm, disarm

    if not isinstance(model, PreTrainedModel):
        tensors, metadata = encode_state_dict(model.state_dict())
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})
        return
    config = disarm(model)
    arm(model, config or SparseHooksConfig())
    try:
        model.save_pretrained(folder, **options)
    finally:
        if config is None:
            disarm(model)
