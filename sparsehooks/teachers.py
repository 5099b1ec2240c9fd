"""Teachers: frozen models to learn from, and the start of a run that a resumed run needs again."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsehooks.artifact.atomic import atomic_file
from sparsehooks.components import Need
from sparsehooks.distributed import once
from sparsehooks.errors import SessionError
from sparsehooks.outputs import Outputs
from sparsehooks.padding import is_encoder_decoder
from sparsehooks.samples import raw_bytes
from sparsehooks.sharding import is_sharded, whole_copy, whole_state
from sparsehooks.teacher_cache import TeacherCache

START = "sparsehooks-start"
"""The folder, in the output folder of a run, that keeps the model as it was before step 1."""

M = TypeVar("M", bound=nn.Module)

ORIGIN = {"_name_or_path", "transformers_version", "architectures", "dtype", "problem_type"}
"""What a config says about where a model came from and how it was trained, and not about what it computes."""

LABELS = {"labels", "shift_labels", "num_items_in_batch"}

IDLE = 32
"""Batches without a question after which a cached teacher goes to the CPU: a few that are known say nothing yet."""


class Teacher:
    """A frozen model in eval mode that answers the student's batches.

    Args:
        model: the teacher; it is changed to eval mode and its parameters to ``requires_grad=False``.
        student: on its device the teacher answers.
        needs: what it returns beyond the usual.
        shared: the parameters whose memory is the student's.
        dtype: of its weights, if it shall be another one.
        cache: the folder that keeps its answers, if they are kept; while it is asked nothing it waits on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module,
        needs: Collection[Need],
        *,
        shared: Collection[str] = (),
        dtype: torch.dtype | None = None,
        cache: Path | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:
            model.to(dtype)
        self._dtype = dtype
        self._home = next(student.parameters()).device
        mine, theirs = dict(model.named_parameters()), dict(student.named_parameters())
        self._shared = [(mine[name], theirs[name]) for name in shared]
        divided = is_encoder_decoder(model)
        self._cache = None if cache is None else TeacherCache(cache, teacher_digest(model), pads=not divided)
        self._idle = 0
        parameters = inspect.signature(model.forward).parameters
        self._accepts = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
        self._accepts -= LABELS - {"labels"} if divided else LABELS  # it shifts labels into the decoder's inputs
        self._outputs = Outputs(model, needs)

    def __call__(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The teacher's output for the student's inputs."""
        given = {name: value for name, value in inputs.items() if name in self._accepts}
        if self._cache is None:
            return self._ask(given)
        if self._idle == IDLE:
            self._move(torch.device("cpu"))
        self._idle += 1
        return self._cache.answer(given, lambda: self._ask(given))

    def before_step(self) -> None:
        """Take a copy of what the student shares and is about to train."""
        for mine, theirs in self._shared:
            if theirs.requires_grad:
                mine.data = mine.data.clone()
        self._shared = [(mine, theirs) for mine, theirs in self._shared if not theirs.requires_grad]

    def flush(self, *, due: bool = False) -> None:
        """Write the answers that only memory holds; see ``TeacherCache.flush``."""
        if self._cache is not None:
            self._cache.flush(due=due)

    @torch.no_grad()
    def _ask(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        self._idle = 0
        self._move(self._home)
        asked = {name: self._cast(value) for name, value in given.items()} | self._outputs.ask()
        if "use_cache" in self._accepts:
            asked["use_cache"] = False
        try:
            return self._outputs.complete(self.model(**asked))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise SessionError(
                f"the teacher, a {type(self.model).__name__}, cannot answer the student's batch: {error}"
            ) from error

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self._dtype) if floating and self._dtype is not None else value

    def _move(self, device: torch.device) -> None:
        shared = {id(mine) for mine, _ in self._shared}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in shared and tensor.device != device:
                tensor.data = tensor.data.to(device)


def frozen_copy(model: M, shared: Collection[str] = ()) -> M:
    """A copy of the model as it is now, without the hooks of others than transformers.

    Args:
        model: any.
        shared: names of parameters that are not copied: both models have their memory. None of a sharded model.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, dict) and key.endswith("hooks"):
                memo[id(value)] = type(value)((at, hook) for at, hook in value.items() if _belongs(key, hook))
    for name, parameter in model.named_parameters():
        if name in shared:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    duplicate = cast(M, whole_copy(model, memo)) if is_sharded(model) else copy.deepcopy(model, memo)
    # Mixed precision binds ``forward`` on the instance; the copy's would still call the original.
    for attribute in ("forward", "_original_forward"):
        duplicate.__dict__.pop(attribute, None)
    return duplicate


def _belongs(key: str, hook: Any) -> bool:
    """Whether a copy takes a hook along: of forwards, those by which transformers records what layers return."""
    home = str(getattr(hook, "__module__", ""))
    return home.startswith("transformers.") if "forward" in key else not home.startswith("torch.distributed.")


def share(teacher: nn.Module, student: nn.Module, names: Collection[str]) -> set[str]:
    """Let a teacher have the student's memory for parameters, where both are the same; the names of those."""
    mine, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    same = {name for name in names if name in mine and torch.equal(mine[name], theirs[name])}
    for name in same:
        mine[name].data = theirs[name].detach()
    return same


def teacher_digest(model: nn.Module) -> str:
    """A fingerprint of a model's weights, class and config, in hexadecimal; not of where it came from."""
    config = getattr(model, "config", None)
    facts = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in ORIGIN}
    said = [type(model).__name__, facts, weights_digest(model.state_dict())]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


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
    unique: dict[int, str] = {}
    tensors = {name: t.contiguous() for name, t in state.items() if unique.setdefault(_key(t), name) == name}
    unnamed = folder / START / "unnamed.safetensors"
    try:
        with atomic_file(unnamed) as temporary:
            save_file(tensors, temporary)
        fingerprint = file_digest(unnamed)
        unnamed.replace(_start_file(folder, fingerprint))
    except (OSError, SafetensorError) as error:
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
    """The sha256 of the names and values of a state dict, in hexadecimal."""
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(name.encode())
        total.update(raw_bytes(tensor.detach().cpu()))
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else id(tensor)
