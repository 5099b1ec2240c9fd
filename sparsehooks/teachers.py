"""Teachers: frozen models to learn from, and the start of a run that a resumed run needs again."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsehooks.components import Need
from sparsehooks.distributed import once
from sparsehooks.errors import SessionError
from sparsehooks.models import open_model
from sparsehooks.outputs import Outputs
from sparsehooks.sharding import is_sharded, whole_copy, whole_state

START = "sparsehooks-start"
"""The folder, in the output folder of a run, that keeps the model as it was before step 1."""

LABELS = {"labels", "shift_labels", "num_items_in_batch"}


class Teacher:
    """A frozen model in eval mode that answers the student's batches.

    Args:
        model: the teacher; it is changed to eval mode and its parameters to ``requires_grad=False``.
        needs: what it returns beyond the usual.
    """

    def __init__(self, model: nn.Module, needs: Collection[Need]) -> None:
        self.model = model.eval().requires_grad_(False)
        parameters = inspect.signature(model.forward).parameters
        self._accepts = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            self._accepts -= LABELS - {"labels"}  # which it shifts into the decoder's inputs
        else:
            self._accepts -= LABELS
        self._outputs = Outputs(model, needs)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """The teacher's output for the student's inputs."""
        given = {name: value for name, value in inputs.items() if name in self._accepts}
        return self._outputs.complete(self.model(**{**given, **self._outputs.ask()}))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model as it is now."""
    duplicate = whole_copy(model) if is_sharded(model) else copy.deepcopy(model)
    # Mixed precision binds ``forward`` on the instance; the copy's would still call the original.
    for attribute in ("forward", "_original_forward"):
        duplicate.__dict__.pop(attribute, None)
    return duplicate


def open_teacher(name: str, student: nn.Module) -> nn.Module:
    """The model of a folder or a Hub name, on the student's device.

    Raises:
        SparseHooksError: if it cannot be had.
    """
    teacher: nn.Module = open_model(name)[0]
    return teacher.to(next(student.parameters()).device)


def keep_start(model: nn.Module, folder: Path | None) -> str:
    """The fingerprint (sha256) of the model's weights, which are kept in the folder if there is one; on every rank.

    Raises:
        SessionError: if the folder cannot be written.
    """
    state = whole_state(model)
    return once(lambda: weights_digest(state) if folder is None else write_start(state, folder))


def write_start(state: Mapping[str, Tensor], folder: Path) -> str:
    """Keep a model's state dict in ``folder/sparsehooks-start``, and return the fingerprint (sha256) that names them.

    Raises:
        SessionError: if the folder cannot be written.
    """
    temporary = folder / START / f".{os.getpid()}.tmp"
    unique: dict[int, str] = {}
    tensors = {name: t.contiguous() for name, t in state.items() if unique.setdefault(_key(t), name) == name}
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        fingerprint = file_digest(temporary)
        temporary.replace(_start_file(folder, fingerprint))
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise SessionError(f"the start of the run cannot be kept in '{folder / START}': {error}") from error
    return fingerprint


def read_start(model: nn.Module, folder: Path | None, fingerprint: str) -> nn.Module:
    """The model as it was before step 1, from what ``write_start`` kept.

    Raises:
        SessionError: if it is missing or another one.
    """
    path = None if folder is None else _start_file(folder, fingerprint)
    if path is None or not path.is_file():
        where = "this loop has no output folder" if path is None else f"'{path}' is missing"
        raise SessionError(f"the run cannot be resumed: it needs the model as it was at the start, and {where}")
    if file_digest(path) != fingerprint:
        raise SessionError(f"the run cannot be resumed: '{path}' is damaged; restore it")
    start = frozen_copy(model)
    missing, _ = start.load_state_dict(load_file(path), strict=False)
    names = {name for name, tensor in start.state_dict().items() if tensor is not None}
    tied = {_key(tensor) for name, tensor in start.state_dict().items() if name not in missing}
    lost = [name for name in missing if name in names and _key(start.state_dict()[name]) not in tied]
    if lost:
        raise SessionError(f"the run cannot be resumed: '{path}' lacks '{lost[0]}'")
    return start


def _start_file(folder: Path, fingerprint: str) -> Path:
    return folder / START / f"{fingerprint}.safetensors"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """A fingerprint of a model's state dict (sha256), for a start that is kept in memory only."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else id(tensor)
