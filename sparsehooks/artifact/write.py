"""Writing artifacts: the encoded state dict, and a folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsehooks.artifact.folder import check_level, encode_state_dict, new_folder
from sparsehooks.components import Level
from sparsehooks.errors import ArtifactError, PluginError

if TYPE_CHECKING:
    from torch import Tensor, nn


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    level: Level = "balanced",
    signed_zeros: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Path:
    """Save a model in the sparse form: every piece of a tensor takes the codecs that are smallest for it.

    The folder is written beside its final place and then renamed, so it is never half there. After ``import
    sparsehooks``, ``AutoModel.from_pretrained`` opens it bit for bit (a negative zero becomes a positive one).

    Args:
        model: a transformers model, or any module, which is saved as ``model.safetensors`` alone. With sharded weights
            (FSDP2) every rank has to call this; rank 0 writes.
        folder: a new or empty folder, or an earlier artifact to replace.
        level: how much work saving may put into a smaller file: "fast", "balanced" or "small". All open alike.
        signed_zeros: keep -0.0, which otherwise becomes +0.0 in the tensors that are encoded.
        backend: what shall run the layers of a transformers model once it is opened, such as "auto": see
            ``accelerate_model``. It is kept when the opened model is saved again, until another is given; "dense" takes
            it out.
        options: passed on to the model's own ``save_pretrained`` (``max_shard_size``, ...).

    Raises:
        ArtifactError: if the level or an option does not exist, a weight is still a pair of torch.nn.utils.prune, or
            the folder holds something else or cannot be written.
        PluginError: if no installed plugin offers the backend.
    """
    from sparsehooks.distributed import once
    from sparsehooks.sharding import is_sharded, whole_state

    check_level(level)
    if not hasattr(model, "state_dict"):
        raise ArtifactError(f"save_pretrained takes a module, not a {type(model).__name__}")
    _check_backend(backend)
    options["backend"] = backend
    if options.get("push_to_hub"):
        options.setdefault("repo_id", Path(folder).name)  # transformers would take the name of the temporary folder
    if is_sharded(model):
        state = whole_state(model)
        once(lambda: _write_folder(model, folder, level, signed_zeros, options | {"state_dict": state}))
    else:
        _write_folder(model, folder, level, signed_zeros, options)
    return Path(folder)


def _check_backend(backend: str | None) -> None:
    """Whether whoever opens the model can find the backend."""
    from sparsehooks.accelerating import AUTO
    from sparsehooks.plugins import installed_catalog

    if backend in (None, AUTO):
        return
    try:
        installed_catalog().resolve("backend", str(backend))
    except PluginError as error:
        raise PluginError(f"{error} (install the package that brings it, or save '{AUTO}')") from error


def _write_folder(
    model: nn.Module, folder: str | Path, level: Level, signed_zeros: bool, options: Mapping[str, Any]
) -> None:
    with new_folder(folder) as temporary:
        write_model(model, temporary, level=level, signed_zeros=signed_zeros, **options)


def write_model(
    model: nn.Module,
    folder: Path,
    *,
    level: Level = "balanced",
    signed_zeros: bool = False,
    state_dict: dict[str, Tensor] | None = None,
    backend: str | None = None,
    **options: Any,
) -> None:
    """What ``save_pretrained`` writes, into a folder that is there already."""
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    from sparsehooks.artifact.quantizer import SparseHooksConfig, arm, disarm
    from sparsehooks.trials import DENSE

    if not isinstance(model, PreTrainedModel):
        if backend is not None:
            options["backend"] = backend
        if options:
            raise ArtifactError(f"a module that is no transformers model is saved without option '{min(options)}'")
        state = dict(model.state_dict() if state_dict is None else state_dict)
        tensors, metadata = encode_state_dict(state, level=level, signed_zeros=signed_zeros)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})
        return
    config = disarm(model)
    written = config or SparseHooksConfig()
    if backend is not None:
        written.backend = None if backend == DENSE else backend
    arm(model, written, level=level, signed_zeros=signed_zeros)
    try:
        model.save_pretrained(folder, state_dict=state_dict, **options)
    finally:
        disarm(model)
        if config is not None:
            arm(model, config)
