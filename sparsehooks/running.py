"""Prune and regularize stages at work: what each does before and after the optimizer's steps."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparsehooks import slots, swapping
from sparsehooks.components import Need, Pattern, Regularizer, Schedule
from sparsehooks.distributed import seed_of
from sparsehooks.errors import SessionError
from sparsehooks.learned import Learned
from sparsehooks.masks import MaskChange, check_finite
from sparsehooks.multiplying import Products
from sparsehooks.plugins import attributed
from sparsehooks.pruning import NEEDS_STEP, Masks, Pruner, no_evidence
from sparsehooks.rewinding import Snapshot
from sparsehooks.sharding import local, part, whole, write
from sparsehooks.stages import PlannedStage
from sparsehooks.targets import Target
from sparsehooks.views import WeightView

if TYPE_CHECKING:
    from sparsehooks.calibration import Calibration, OnGrid

Changes = Mapping[str, MaskChange]


@dataclass(frozen=True)
class Run:
    """What the stages of a run share.

    Attributes:
        model: the unwrapped model.
        optimizer: the user's; None without training.
        masks: of all stages.
        learned: of all components.
        swap: lets a target's layers compute with another weight, and by another product.
        total_steps: of the run.
        folder: where a resumed run finds what it needs of its start.
        calibration: without training, for stages that decide by calibration batches.
        on_grid: how a target's columns go onto their grid, if a solver shall do both.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    masks: Masks
    learned: Learned
    swap: Callable[[Target, swapping.Step, swapping.Transform, swapping.Product | None], None]
    total_steps: int
    folder: Path | None
    calibration: Calibration | None
    on_grid: OnGrid

    def weight(self, target: Target) -> nn.Parameter:
        """The parameter of a target; of sharded ones the shard, whatever a forward has put in its place."""
        return self.masks.weights[target.parameter]


class PruneRun:
    """A prune stage at work.

    Criteria that need a gradient decide before a step, when the gradients of the weights as they are lie ready; all
    others after it.
    """

    def __init__(self, stage: PlannedStage, objects: Mapping[str, Any], run: Run, *, new: bool) -> None:
        self._stage = stage
        self._pruner = Pruner.of(stage, objects)
        self._schedule = self._pruner.schedule
        self._run = run
        self._snapshot: Snapshot | None = None
        self._share = 0.0
        self._deferred = self._rewinds = False
        self._unseen = "no evaluation has allowed it; evaluate while training"
        self._by_gradient = run.optimizer is not None and bool(self._pruner.needs & NEEDS_STEP)
        with attributed(stage.components["pattern"].record):
            self._pruner.pattern.couple(run.model, stage.targets)
            if new:
                self._pruner.pattern.arrange(run.model, stage.targets, seed_of(run.masks.seed, stage.index, "arrange"))
        if new:
            self._check_growth()
        criterion = self._pruner.criterion
        products = Products(stage, objects["backend"]) if "backend" in objects else None
        for target in stage.targets:
            with attributed(stage.components["prune"].record):
                made = criterion.prepare(run.masks.view(self._pruner, "prune", target, 0, no_evidence))
            run.learned.add(self._owner(target), made, run.weight(target).device, criterion.learning_rate())
            if run.optimizer is None:
                continue
            if criterion.acts == "forward":
                run.masks.alive.add(target.parameter)
            if criterion.acts == "forward" or products is not None:
                product = None if products is None else products.of(target, functools.partial(self._final, target))
                run.swap(target, "mask", self._masking(target), product)

    def before_step(self, step: int, scale: float) -> Changes:
        """What has to be done while the gradients are there: penalties, collecting, deciding by them.

        Args:
            step: the number of the step that is about to be made.
            scale: the factor of a gradient scaler.
        """
        self._penalize(step)
        if not self._by_gradient:
            return {}
        total, criterion = self._run.total_steps, self._pruner.criterion
        decides = self._schedule.due(step, total) or self.pending(step - 1)
        ahead = range(step + 1, step + criterion.samples)
        collects = criterion.samples > 0 and (decides or any(self._schedule.due(later, total) for later in ahead))
        overflowed = (decides or collects) and scale != 1.0 and self._overflowed()
        if collects and not overflowed:
            for target in self._stage.targets:
                view = self._run.masks.view(self._pruner, "prune", target, step, self._evidence)
                with attributed(self._stage.components["prune"].record):
                    criterion.collect(view)
        if not decides:
            return {}
        self._deferred = overflowed
        return {} if overflowed else self._update(step)

    def pending(self, step: int) -> bool:
        """Whether, after ``step`` finished steps, an update that was due still waits for a gradient."""
        first_of_run = self._by_gradient and step == 0 and self._schedule.due(0, self._run.total_steps)
        return self._deferred or first_of_run

    @property
    def follows(self) -> bool:
        """Whether the metrics decide."""
        return self._schedule.adaptive

    @property
    def learns(self) -> bool:
        """Whether the criterion learns tensors beside the weights."""
        return any(self._learned(target) for target in self._stage.targets)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show an evaluation to the schedule, if it falls into its window.

        What the schedule follows may be missing: there can be several evaluation sets, each with metrics of its own.
        """
        first, last = self._schedule.window(self._run.total_steps)
        if first <= step <= last:
            try:
                with attributed(self._stage.components["schedule"].record):
                    self._schedule.observe(metrics)
            except SessionError as error:
                self._unseen = str(error)

    def remember(self, step: int) -> None:
        """Keep the weights of the step that later ones return to."""
        if step == self._schedule.rewind(self._run.total_steps) and self._snapshot is None:
            self._snapshot = Snapshot(self._run.model, self._run.folder)

    def after_step(self, step: int) -> Changes:
        """What is due after ``step`` finished steps."""
        changes: Changes = {}
        if not self._by_gradient and self._schedule.due(step, self._run.total_steps):
            changes = self._update(step)
        if self._rewinds and self._snapshot is not None and self._run.optimizer is not None:
            self._snapshot.restore(self._run.model, self._run.optimizer)
            self._run.masks.apply()
        self._rewinds = False
        return changes

    @torch.no_grad()
    def write(self) -> None:
        """Write what the layers compute with into their parameters, where masks act in the forward."""
        if self._schedule.adaptive and self._share == 0.0:
            warnings.warn(f"{self._stage.label} pruned nothing: {self._unseen}", stacklevel=2)
        if self._deferred:
            warnings.warn(
                f"{self._stage.label} has not made its last update: the gradients that were to decide overflowed, and "
                "no step followed; let it end some steps before the run does, or train in bf16",
                stacklevel=2,
            )
        for target in self._stage.targets:
            if target.parameter in self._run.masks.alive:
                weight = self._run.weight(target)
                write(weight, target.restore(self._masking(target)(target.matrix(whole(weight)), False)))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        snapshot = None if self._snapshot is None else self._snapshot.fingerprint
        return {"share": self._share, "deferred": self._deferred, "snapshot": snapshot}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._share, self._deferred = state["share"], state["deferred"]
        if self._snapshot is not None and self._snapshot.fingerprint != state["snapshot"]:
            self._snapshot = None
        if self._snapshot is None and state["snapshot"] is not None:
            self._snapshot = Snapshot(self._run.model, self._run.folder, state["snapshot"])

    def _update(self, step: int) -> Changes:
        run, pruner, schedule = self._run, self._pruner, self._schedule
        first, last = schedule.window(run.total_steps)
        moment = max(step, first)
        share, before = schedule.at(moment, run.total_steps), self._share
        self._share = share
        schedule.acted()
        if share < before and schedule.adaptive:
            return run.masks.step_back(self._stage.index)
        if run.calibration is not None and (self._stage.components.get("solver") or pruner.needs):
            return run.calibration.prune(run.masks, pruner, run.on_grid)
        self._rewinds = first < moment < last
        return run.masks.update(pruner, step, share, self._evidence, growth=self._growth(moment))

    def _growth(self, moment: int) -> float:
        """The part of what stays that gives way to others in an update at ``moment`` of the window."""
        grow = self._pruner.recipe.grow
        if grow is None:
            return 0.0
        first, last = self._schedule.window(self._run.total_steps)
        return grow.share(1.0 if moment >= last else (moment - first) / (last - first))

    def _check_growth(self) -> None:
        """Warn if nothing ever grows: the first update only prunes, and a fraction that falls is zero in the last."""
        if self._pruner.recipe.grow is None:
            return
        total = self._run.total_steps
        first, last = self._schedule.window(total)
        if not any(self._schedule.due(step, total) and self._growth(step) for step in range(first + 1, last + 1)):
            warnings.warn(
                f"{self._stage.label}: 'grow' finds no update between the first at step {first} and the end at step "
                f"{last}; lower the schedule's 'every', or train longer",
                stacklevel=2,
            )

    def _penalize(self, step: int) -> None:
        learned = {target.parameter: self._learned(target) for target in self._stage.targets}
        if any(learned.values()):
            sparsity = self._pruner.sparsity * self._schedule.at(step, self._run.total_steps)
            with torch.enable_grad(), attributed(self._stage.components["prune"].record):
                penalty = self._pruner.criterion.penalty(learned, sparsity)
                if penalty is not None:
                    penalty.backward()

    def _overflowed(self) -> bool:
        """Whether a gradient scaler is about to skip this step."""
        gradients = [self._run.weight(target).grad for target in self._stage.targets]
        return not all(gradient is None or bool(torch.isfinite(whole(gradient)).all()) for gradient in gradients)

    def _final(self, target: Target) -> Tensor | None:
        """The mask of a target, once all that shall go is masked."""
        return self._run.masks.masks.get(target.parameter) if self._share == 1.0 else None

    def _masking(self, target: Target) -> swapping.Transform:
        learned = self._learned(target)

        def mask(matrix: Tensor, training: bool) -> Tensor:
            chosen = self._run.masks.masks.get(target.parameter)
            # before the stage begins nothing is masked, and what is learned learns already
            keep = torch.ones_like(matrix, dtype=torch.bool) if chosen is None else target.matrix(chosen)
            view = WeightView(target.parameter, matrix, 0, learned=learned, training=training)
            return self._pruner.criterion.effective(view, keep)

        return mask

    def _evidence(self, target: Target) -> Mapping[str, Any]:
        """What the criteria need, as it is between the backward pass and the step."""
        found: dict[str, Any] = {}
        if learned := self._learned(target):
            found["learned"] = {key: tensor.detach() for key, tensor in learned.items()}
        if self._by_gradient:
            name, weight = target.parameter, self._run.weight(target)
            if weight.grad is None:
                raise SessionError(f"{self._stage.label}: no gradient reached '{name}'; unfreeze it or exclude it")
            gradient = whole(weight.grad)
            check_finite(f"gradients of '{name}'", gradient, "lower the learning rate, or look at the data")
            found["gradient"] = target.matrix(gradient)
            if Need.MOMENTUM in self._pruner.needs:
                found["momentum"] = target.matrix(whole(self._momentum(weight)))
        return found

    def _momentum(self, weight: nn.Parameter) -> Tensor:
        assert self._run.optimizer is not None
        found = slots.momentum(self._run.optimizer, weight)
        if found is None:
            raise SessionError(f"{self._stage.label}: the optimizer keeps no momentum; use Adam, or SGD with momentum")
        return found

    def _learned(self, target: Target) -> dict[str, Tensor]:
        return self._run.learned.of(self._owner(target))

    def _owner(self, target: Target) -> str:
        return f"{self._stage.index}.{target.parameter}"


class RegularizeRun:
    """A regularize stage at work."""

    def __init__(self, stage: PlannedStage, objects: Mapping[str, Any], run: Run) -> None:
        self._stage = stage
        self._run = run
        self._regularizer = cast(Regularizer, objects["regularize"])
        self._pattern = cast(Pattern, objects["pattern"])
        self._schedule = cast(Schedule, objects["schedule"])
        with attributed(stage.components["pattern"].record):
            self._pattern.couple(run.model, stage.targets)

    def before_step(self, step: int, scale: float) -> None:
        """Add to the gradients."""
        strength = self._schedule.at(step, self._run.total_steps)
        if strength == 0.0:
            return
        with torch.no_grad(), attributed(self._stage.components["regularize"].record):
            added = self._regularizer.gradient(self._matrices(), self._pattern, strength)
        if added is None:
            return
        if scale != 1.0:
            raise SessionError(
                f"{self._stage.label}: adds to gradients, which a gradient scaler scales; train in bf16, or use the "
                "proximal form"
            )
        for target in self._stage.targets:
            gradient = self._run.weight(target).grad
            if gradient is not None and target.parameter in added:  # else no group holds it
                local(gradient).add_(part(target.restore(added[target.parameter]), gradient))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take the proximal step."""
        strength = self._schedule.at(step, self._run.total_steps)
        if strength == 0.0:
            return
        sizes = {target.parameter: self._step_size(target, strength) for target in self._stage.targets}
        with attributed(self._stage.components["regularize"].record):
            moved = self._regularizer.proximal(self._matrices(), self._pattern, sizes)
        for target in self._stage.targets:
            if moved is not None and target.parameter in moved:
                write(self._run.weight(target), target.restore(moved[target.parameter]))

    def _matrices(self) -> dict[str, Tensor]:
        weights = {target: self._run.weight(target).detach() for target in self._stage.targets}
        return {target.parameter: target.matrix(whole(weight)) for target, weight in weights.items()}

    def _step_size(self, target: Target, strength: float) -> Tensor | float:
        """By how much a weight moves for a unit of gradient, times the strength; a matrix under Adam."""
        assert self._run.optimizer is not None
        sizes = slots.step_size(self._run.optimizer, self._run.weight(target), strength)
        return target.matrix(sizes) if isinstance(sizes, Tensor) else sizes
