"""Distillation: the teachers of a run, what is learned beside the student, and the loss terms."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsehooks.components import LEARNING_RATE, Distiller, Need, Pattern
from sparsehooks.distributed import seed_of
from sparsehooks.errors import SessionError
from sparsehooks.learned import Learned
from sparsehooks.models import open_model
from sparsehooks.outputs import Outputs
from sparsehooks.padding import is_encoder_decoder
from sparsehooks.plan import Plan
from sparsehooks.plugins import attributed
from sparsehooks.recipe import DistillStage, PruneStage, Teachers, TeacherUse
from sparsehooks.sharding import is_sharded
from sparsehooks.stages import PlannedStage, crosses_targets
from sparsehooks.teachers import Teacher, frozen_copy, keep_start, read_start, share
from sparsehooks.views import Batch

SCALED = 1024.0
"""A loss that arrives multiplied by more has met a gradient scaler."""


class Distillation:
    """The distill stages of a run.

    Args:
        stages: the planned stages and their distillers.
        plan: of the whole run.
        model: the student.
        learned: where what the distillers learn lives.
        folder: where the start of the run is kept for resuming; None keeps it in memory only.
        start: the fingerprint of that start, for a resumed run.
    """

    def __init__(
        self,
        stages: Mapping[int, tuple[PlannedStage, Distiller]],
        plan: Plan,
        model: nn.Module,
        learned: Learned,
        folder: Path | None,
        start: str | None,
    ) -> None:
        self._stages = stages
        self._model = model
        self._shifts = _shifts_labels(model)
        self.start = start
        self._resumed = start is not None
        self._learned = learned
        self._unused = False
        self._arrived: float | None = None
        self._weights: dict[int, Tensor] = {}
        self._teachers: dict[TeacherUse, Teacher] = {}
        needs: dict[TeacherUse, set[Need]] = {}
        for planned, distiller in stages.values():
            for use in _uses(planned):
                needs.setdefault(use, set()).update(distiller.needs)
        device = self._device = next(model.parameters()).device
        unchanged = _unchanged(model, plan)
        caches = _caches(plan)
        for index, (planned, distiller) in stages.items():
            generator = torch.Generator().manual_seed(seed_of(plan.recipe.seed, index, "learned"))
            for number, use in enumerate(_uses(planned)):
                if use not in self._teachers:
                    self._teachers[use] = self._open(use, needs[use], folder, unchanged, caches.get(use))
                with attributed(planned.components["distill"].record), _labelled(planned):
                    made = distiller.prepare(model, self._teachers[use].model, generator)
                learned.add(_owner(index, number), made, device, LEARNING_RATE)
        self.outputs = Outputs(model, set().union(*needs.values()))

    def advance(self, index: int, share: float) -> None:
        """The share of its weight that the schedule of a stage gives its loss in the next step."""
        planned, _ = self._stages[index]
        assert isinstance(planned.stage, DistillStage)
        weight = torch.tensor(planned.stage.weight * share)  # compiled code would take a number for a constant
        if share == 0.0:
            self._weights.pop(index, None)
        elif index in self._weights:
            self._weights[index].copy_(weight)
        else:
            self._weights[index] = weight.to(self._device)

    def terms(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """The sum of all loss terms of one micro-batch; see ``Session.loss_terms``."""
        with torch.autocast(self._device.type, enabled=False):  # losses and teachers choose their own precision
            return self._terms(outputs, inputs)

    def _terms(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        total = None
        batch = Batch(inputs, self._shifts)
        items = inputs.get("num_items_in_batch")
        answers: dict[TeacherUse, Mapping[str, Any]] = {}
        outputs = self.outputs.complete(outputs)
        for index, (planned, distiller) in self._stages.items():
            if index not in self._weights:
                continue
            assert isinstance(planned.stage, DistillStage)
            losses = []
            for number, use in enumerate(planned.stage.teacher):
                if use not in answers:
                    answers[use] = self._teachers[use](inputs)
                learned = self._learned.of(_owner(index, number))
                with attributed(planned.components["distill"].record), _labelled(planned):
                    values = distiller.loss(outputs, answers[use], batch, learned)
                    if values.dim() != 1:
                        raise SessionError(
                            f"loss() must return one value an item, shape (items,), got {tuple(values.shape)}"
                        )
                losses.append(values)
            values = losses[0] if len(losses) == 1 else torch.stack(losses).mean(dim=0)
            term = self._weights[index] * values.sum() / max(values.numel(), 1)
            if items is not None:  # the share of this micro-batch in all that the Trainer accumulates
                counted = batch.count()
                term = term * (values.numel() if counted is None else counted) / items
            total = term if total is None else total + term
        if total is not None and total.requires_grad and not torch.compiler.is_compiling():
            self._unused = True
            total.register_hook(self._mark_used)
        return total

    def before_step(self, scale: float) -> None:
        """Check that the terms reached the gradient, and that the teachers stay what they are.

        Args:
            scale: the factor of a gradient scaler that the loop knows of.
        """
        for teacher in self._teachers.values():
            teacher.before_step()
        if self._unused:
            raise SessionError(
                "the distillation loss was computed but not trained on: the loop makes its own loss; add the model's "
                "outputs.loss to it, or, of a Trainer (label smoothing, compute_loss_func), use "
                "sparsehooks.attach_trainer(trainer, recipe) instead of the callback"
            )
        if scale == 1.0 and self._arrived is not None and self._arrived > SCALED:
            raise SessionError(
                f"the loss is scaled by about {self._arrived:.0f}, as by a gradient scaler; give it to "
                "sparsehooks.attach as scaler=, so that what the recipe learns is unscaled too"
            )

    def state_dict(self) -> dict[str, Any]:
        """The fingerprint of the start."""
        return {"start": self.start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            SessionError: if it belongs to a run that started from other weights.
        """
        if state["start"] != self.start:
            raise SessionError(
                "the state that was loaded belongs to a run with another start, so its teacher is not here; load the "
                "optimizer before sparsehooks.attach, with the folder of that run"
            )
        self._weights.clear()  # stages that have begun by then say theirs next

    def flush(self, *, due: bool = False) -> None:
        """Write what the teachers answered since the last time, where a cache keeps it.

        Args:
            due: only if it is time; see ``TeacherCache.flush``.
        """
        for teacher in self._teachers.values():
            teacher.flush(due=due)

    def _open(
        self, use: TeacherUse, needs: set[Need], folder: Path | None, unchanged: set[str], cache: str | None
    ) -> Teacher:
        dtype = None if use.dtype is None else getattr(torch, use.dtype)
        shared: Collection[str] = ()
        if use.use == "self":
            if dtype is None:
                shared = unchanged
            model, shared = self._open_self(folder, shared)
        else:
            model = self._open_other(use.use)
        kept = None if cache is None else Path(cache)
        return Teacher(model, self._model, needs, shared=shared, dtype=dtype, cache=kept)

    def _open_other(self, name: str) -> nn.Module:
        teacher = open_model(name)[0]
        ours, theirs = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (self._model, teacher))
        if ours is not None and theirs is not None and theirs < ours:
            teacher.register_forward_pre_hook(_refusing_tokens(name, theirs), with_kwargs=True)
        return teacher

    def _open_self(self, folder: Path | None, shared: Collection[str]) -> tuple[nn.Module, Collection[str]]:
        """The model as it was at the start, and which parameters of the student it shares."""
        if self._resumed:
            assert self.start is not None
            start = read_start(self._model, folder, self.start)
            return start, share(start, self._model, shared)
        if self.start is None:
            self.start = keep_start(self._model, folder)
        return frozen_copy(self._model, shared), shared

    def _mark_used(self, gradient: Tensor) -> None:
        self._unused = False
        if self._arrived is None:  # the first of the run is enough, and reading it makes a GPU wait
            self._arrived = float(gradient)


@contextmanager
def _labelled(planned: PlannedStage) -> Iterator[None]:
    """Errors inside say which stage they are about."""
    try:
        yield
    except SessionError as error:
        raise SessionError(f"{planned.label}: {error}") from error


def _refusing_tokens(name: str, known: int) -> Any:
    """Before a forward of a teacher that knows fewer tokens than its student: are there any that it does not know?"""

    def check(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if tokens is not None and int(tokens.max()) >= known:
            raise SessionError(
                f"the teacher '{name}' knows {known} tokens, and the batch holds token {int(tokens.max())}; take one "
                "with the student's tokenizer"
            )

    return check


def _uses(planned: PlannedStage) -> Teachers:
    assert isinstance(planned.stage, DistillStage)
    return planned.stage.teacher


def _owner(index: int, number: int) -> str:
    """Where what a stage learns for one of its teachers lives."""
    return f"{index}.distill.{number}" if number else f"{index}.distill"


def _caches(plan: Plan) -> dict[TeacherUse, str]:
    """Where the answers of each teacher are kept."""
    stages = [planned.stage for planned in plan.stages if isinstance(planned.stage, DistillStage)]
    return {use: stage.cache for stage in stages if stage.cache is not None for use in stage.teacher}


def _unchanged(model: nn.Module, plan: Plan) -> set[str]:
    """The matrices that neither train nor are targets; what is masked along with a target is smaller than one."""
    if is_sharded(model):
        return set()
    names = {name for name, weight in model.named_parameters() if _can_be_shared(weight)}
    for planned in plan.stages:
        names -= {target.parameter for target in planned.targets}
        if names and isinstance(planned.stage, PruneStage):
            pattern = cast(Pattern, planned.components["pattern"].create())
            pattern.couple(model, planned.targets)
            if crosses_targets(planned, pattern):  # it may mask anything in a block
                return set()
    return names


def _can_be_shared(weight: nn.Parameter) -> bool:
    return type(weight) is nn.Parameter and not weight.requires_grad and weight.dim() > 1


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss compares position i with label i + 1, as the Trainer decides it."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not is_encoder_decoder(model)
