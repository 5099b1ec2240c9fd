"""Distillation: the teachers of a run, what is learned beside the student, and the loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsehooks.components import LEARNING_RATE, Distiller, Need
from sparsehooks.distributed import seed_of
from sparsehooks.errors import SessionError
from sparsehooks.learned import Learned
from sparsehooks.outputs import Outputs
from sparsehooks.plugins import attributed
from sparsehooks.recipe import DistillStage
from sparsehooks.teachers import Teacher, frozen_copy, keep_start, open_teacher, read_start
from sparsehooks.views import Batch

if TYPE_CHECKING:
    from sparsehooks.plan import PlannedStage


class Distillation:
    """The distill stages of a run.

    Args:
        stages: the planned stages and their distillers.
        model: the student.
        learned: where what the distillers learn lives.
        seed: the recipe's.
        folder: where the start of the run is kept for resuming; None keeps it in memory only.
        start: the fingerprint of that start, for a resumed run.
    """

    def __init__(
        self,
        stages: Mapping[int, tuple[PlannedStage, Distiller]],
        model: nn.Module,
        learned: Learned,
        seed: int,
        folder: Path | None,
        start: str | None,
    ) -> None:
        self._stages = stages
        self._model = model
        self._shifts = _shifts_labels(model)
        self.start = start
        self._teachers: dict[str, Teacher] = {}
        self._learned = learned
        self._unused = False
        self._weights: dict[int, Tensor] = {}
        needs: dict[str, set[Need]] = {}
        for planned, distiller in stages.values():
            assert isinstance(planned.stage, DistillStage)
            needs.setdefault(planned.stage.teacher, set()).update(distiller.needs)
        device = next(model.parameters()).device
        for index, (planned, distiller) in stages.items():
            assert isinstance(planned.stage, DistillStage)
            name = planned.stage.teacher
            if name not in self._teachers:
                self._teachers[name] = Teacher(self._open(name, folder), needs[name])
            generator = torch.Generator().manual_seed(seed_of(seed, index, "learned"))
            with attributed(planned.components["distill"].record):
                made = distiller.prepare(model, self._teachers[name].model, generator)
            learned.add(f"{index}.distill", made, device, LEARNING_RATE)
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
            self._weights[index] = weight.to(next(self._model.parameters()).device)

    def terms(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """The sum of all loss terms of one micro-batch; see ``Session.loss_terms``."""
        total = None
        batch = Batch(inputs, self._shifts)
        items = inputs.get("num_items_in_batch")
        answers: dict[str, Any] = {}
        outputs = self.outputs.complete(outputs)
        for index, (planned, distiller) in self._stages.items():
            if index not in self._weights:
                continue
            assert isinstance(planned.stage, DistillStage)
            name = planned.stage.teacher
            if name not in answers:
                answers[name] = self._teachers[name](inputs)
            with attributed(planned.components["distill"].record):
                values = distiller.loss(outputs, answers[name], batch, self._learned.of(f"{index}.distill"))
                if values.dim() != 1:
                    raise SessionError(
                        f"{planned.label}: loss() must return one value an item, shape (items,), "
                        f"got {tuple(values.shape)}"
                    )
            term = self._weights[index] * values.sum() / max(values.numel(), 1)
            if items is not None:  # the share of this micro-batch in all that the Trainer accumulates
                counted = batch.count()
                term = term * (values.numel() if counted is None else counted) / items
            total = term if total is None else total + term
        if total is not None and total.requires_grad and not torch.compiler.is_compiling():
            self._unused = True
            total.register_hook(self._mark_used)
        return total

    def before_step(self) -> None:
        """Check that the terms reached the gradient."""
        if self._unused:
            raise SessionError(
                "the distillation loss was computed but not trained on: the loop computes its own loss (label "
                "smoothing, compute_loss_func); use sparsehooks.attach_trainer(trainer, recipe) instead of the callback"
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

    def _open(self, name: str, folder: Path | None) -> nn.Module:
        if name != "self":
            teacher = open_teacher(name, self._model)
            ours, theirs = (getattr(getattr(m, "config", None), "vocab_size", None) for m in (self._model, teacher))
            if ours is not None and theirs is not None and theirs < ours:
                raise SessionError(
                    f"the teacher '{name}' knows {theirs} tokens and the student {ours}; take one with its tokenizer"
                )
            return teacher
        if self.start is not None:
            return read_start(self._model, folder, self.start)
        self.start = keep_start(self._model, folder)
        return frozen_copy(self._model)

    def _mark_used(self, gradient: Tensor) -> None:
        self._unused = False


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss compares position i with label i + 1, as the Trainer decides it."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
