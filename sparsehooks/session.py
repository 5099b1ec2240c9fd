"""The session: the one engine behind every loop, and the only owner of a run's state."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparsehooks import slots, swapping
from sparsehooks.activations import Activations
from sparsehooks.batches import Batches
from sparsehooks.components import Activation, ComponentBase, Distiller, Schedule, step_of
from sparsehooks.distillation import Distillation
from sparsehooks.distributed import once
from sparsehooks.errors import SessionError
from sparsehooks.hookspecs import StageStatus
from sparsehooks.learned import Learned
from sparsehooks.masks import DIVERGED, check_finite
from sparsehooks.outputs import Outputs
from sparsehooks.plan import Plan
from sparsehooks.plugins import PluginManager
from sparsehooks.pruning import Masks
from sparsehooks.quantizing import QuantizeRun
from sparsehooks.recipe import (
    ActivationStage,
    DistillStage,
    PruneStage,
    QuantizeStage,
    Recipe,
    RegularizeStage,
    ShrinkStage,
)
from sparsehooks.resuming import Carrier, Origin, Parts
from sparsehooks.running import Changes, PruneRun, RegularizeRun, Run
from sparsehooks.sharding import is_sharded, misfit, reshard, unsupported
from sparsehooks.sites import recorded
from sparsehooks.stages import PlannedStage
from sparsehooks.targets import Target, plain_name
from sparsehooks.views import SessionView

if TYPE_CHECKING:
    from sparsehooks.calibration import Calibration
    from sparsehooks.problems import Quantize


class Session:
    """A run of a plan on a model.

    A loop calls ``start``; then for each optimizer step ``loss_terms`` (in the forward), ``before_step`` and
    ``after_step``; ``metrics`` after an evaluation; and ``finish`` or ``abort`` at the end.

    Args:
        plan: fitted to the model, with ``total_steps``.
        manager: the plugins to tell.
    """

    def __init__(self, plan: Plan, manager: PluginManager) -> None:
        if plan.total_steps is None:
            raise SessionError("the plan does not say how many optimizer steps the run has; build it with total_steps")
        self.plan = plan
        self.manager = manager
        self.total_steps = plan.total_steps
        self.step = 0
        self.view = SessionView(self)
        self.masks = Masks({}, plan.recipe.seed)
        self._metadata: dict[str, dict[str, str]] = {}
        self.running = self._distilled = self._loaded = self.sharded = False
        self._objects: dict[int, dict[str, ComponentBase]] = {
            stage.index: {key: bound.create() for key, bound in stage.components.items()} for stage in plan.stages
        }
        self._origin = Origin.of(plan, self._objects, self.total_steps)
        self._carrier = Carrier(None)
        self._optimizer: torch.optim.Optimizer | None = None
        self._learned = Learned()
        self._pruning: dict[int, PruneRun] = {}
        self._regularizing: dict[int, RegularizeRun] = {}
        self._statuses: dict[int, StageStatus] = {}
        self._swapped: dict[str, Target] = {}
        self._quantizing: dict[int, QuantizeRun] = {}
        self._shrunk: dict[str, Any] = {}
        self._activations = Activations((), nn.Module())
        self._at_end = ExitStack()

    @classmethod
    def of(cls, recipe: Recipe, manager: PluginManager, model: nn.Module, total_steps: int) -> Session:
        """A session for a recipe and a model.

        Raises:
            PlanError: all problems together, before anything is touched.
        """
        return cls(Plan.build(recipe, manager, model, total_steps), manager)

    # ------------------------------------------------------------------------------------------- the driver surface

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        step: int = 0,
        *,
        state: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        opened: Collection[str] | None = None,
        calibration: Calibration | None = None,
        start: str | None = None,
    ) -> None:
        """Begin, or go on after ``step`` finished optimizer steps.

        Args:
            model: the unwrapped model, on its device.
            optimizer: the torch optimizer; a resumed one carries the state of the session.
            step: 0 for a new run.
            state: of a resumed run on sharded parameters, whose optimizer carries none.
            folder: where to keep what a resumed run needs of its start.
            opened: of an artifact that is trained further, the names of its pruned parameters: their zeros, and
                those of the recipe's own targets, are the first masks.
            calibration: without training: for the stages that need calibration batches.
            start: of a run that begins once more, the fingerprint of its first start (``Session.start_of_run``).

        Raises:
            SessionError: if a resumed run lacks its state, or belongs to another recipe.
        """
        reshard(model)
        self._model = model
        self._optimizer = optimizer
        self._weights = dict(model.named_parameters())
        self.sharded = is_sharded(model)
        self._check_sharding()
        self._carrier = Carrier(optimizer, carries=not self.sharded)
        self._carrier.check_free(new=step == 0)
        if step > 0 and state is None:
            state = self._carrier.read(f"of step {step}")
        self.step = step
        self.masks = Masks(self._weights, self.plan.recipe.seed)
        self.masks.on_grown = self._reset_slots
        if state is not None:
            start = self._origin.check(state)["distillation"]["start"]
        distillers = {
            stage.index: (stage, cast(Distiller, self._objects[stage.index]["distill"]))
            for stage in self.plan.stages
            if isinstance(stage.stage, DistillStage)
        }
        # before layers are swapped: a copy of a swapped layer would compute with the masks of the student
        self._distillation = Distillation(distillers, self.plan, model, self._learned, folder, start)
        self._at_end.callback(self._distillation.outputs.close)
        run = Run(
            model,
            optimizer,
            self.masks,
            self._learned,
            self._swap,
            self.total_steps,
            folder,
            calibration,
            self._on_grid,
        )
        self._make_runs(run, new=state is None)
        self._parts = Parts(
            self._objects,
            self.masks,
            self._learned,
            self._distillation,
            self._activations,
            self._pruning,
            self._quantizing,
        )
        self._keep_answers(optimizer)
        if state is not None:
            self._take(state)
            self._check_weights()
            self.masks.apply()  # a checkpoint of adapters does not hold the weights under them
        elif opened is not None:
            self.masks.from_zeros(self._pruned(opened))
        self.running = True
        self._carrier.attach()
        self._on_step = self.manager.step_finished()
        self.manager.session_started(self.view)
        self._advance(update=state is None)
        self._carrier.write(self.state_dict)

    def _make_runs(self, run: Run, *, new: bool) -> None:
        """One object for each stage that acts on weights, and one for all that act on activations."""
        for stage in self.plan.stages:
            if isinstance(stage.stage, PruneStage):
                self._pruning[stage.index] = PruneRun(stage, self._objects[stage.index], run, new=new)
            elif isinstance(stage.stage, RegularizeStage):
                self._regularizing[stage.index] = RegularizeRun(stage, self._objects[stage.index], run)
            elif isinstance(stage.stage, QuantizeStage):
                self._quantizing[stage.index] = QuantizeRun(stage, self._objects[stage.index], run)
        acting = [
            (stage, cast(Activation, self._objects[stage.index]["activation"]), stage.targets)
            for stage in self.plan.stages
            if isinstance(stage.stage, ActivationStage)
        ]
        learned = self._learned if run.optimizer is not None else None
        self._activations = Activations(acting, run.model, learned)

    @property
    def start_of_run(self) -> str | None:
        """The fingerprint of the model as it was at the start, if something in the run needs that."""
        return self._distillation.start

    @property
    def distils(self) -> bool:
        """Whether this run adds loss terms."""
        return any(isinstance(stage.stage, DistillStage) for stage in self.plan.stages)

    @property
    def outputs(self) -> Outputs:
        """What the student's training forwards have to return."""
        return self._distillation.outputs

    def loss_terms(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """What the distillers add to the loss of one micro-batch: a scalar, or None if there are none.

        Args:
            outputs: the student's model output.
            inputs: the keyword arguments of its forward. With ``num_items_in_batch`` the sum is divided by it, as
                the Trainer does over accumulated batches and ranks; else by the number of items here.
        """
        self._distilled = True
        terms = self._distillation.terms(outputs, inputs)
        self._distillation.flush(due=True)  # before gradients are averaged: every rank finds it in the next step
        return terms

    def before_step(self, scale: float = 1.0) -> None:
        """Call before each optimizer step.

        Args:
            scale: the factor of a gradient scaler, if one is in use.

        Raises:
            SessionError: if loss terms were not computed, or never reached the gradient.
        """
        if self.distils and not self._distilled:
            raise SessionError(
                "the model was never called in training mode, so there is nothing to distil: call it as model(**batch) "
                "after model.train(), and not one of its parts"
            )
        self._distilled = False
        if self._loaded:
            self._check_weights()
        self._distillation.before_step(scale)
        self._learned.before_step(scale)
        step = self.step + 1
        for index, pruning in self._pruning.items():
            self._tell(index, step, pruning.before_step(step, scale))
        for regularizing in self._regularizing.values():
            regularizing.before_step(step, scale)

    def reload(self) -> None:
        """Call after the loop has loaded a checkpoint into the optimizer: go on where that was.

        Raises:
            SessionError: if it carries no state, or that of another run.
        """
        self.load_state_dict(self._carrier.read())

    def after_step(self, *, skipped: bool = False) -> None:
        """Call after each optimizer step.

        Args:
            skipped: whether the optimizer left the weights alone (an overflow under fp16).
        """
        self.step += 1
        self._learned.after_step(skipped=skipped)
        if not skipped:
            for regularizing in self._regularizing.values():
                regularizing.after_step(self.step)
        self._advance(update=True)
        self.masks.apply()
        self._carrier.write(self.state_dict)
        if not skipped:
            self._on_step(self.view, self.step)

    def calibrate(self, batches: Batches) -> None:
        """Without training: fit what activation stages need to these batches, before ``finish``."""
        self._activations.calibrate(batches)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """Call after an evaluation, on every rank: adaptive schedules decide by rank 0's what the next step does."""
        following = [pruning for pruning in self._pruning.values() if pruning.follows]
        told = once(lambda: dict(metrics)) if following else metrics
        for pruning in following:
            pruning.observe(self.step, told)
        self.manager.metrics_reported(self.view, MappingProxyType(dict(told)))

    @property
    def learns(self) -> bool:
        """Whether components learn tensors beside the weights, which only the state of this session has."""
        acting = [objects["activation"] for objects in self._objects.values() if "activation" in objects]
        return (
            any(pruning.learns for pruning in self._pruning.values())
            or any(quantizing.learns for quantizing in self._quantizing.values())
            or any(cast(Activation, component).learned for component in acting)
        )

    def take_learned(self, state: Mapping[str, Any]) -> None:
        """Call after the loop has gone back to the weights of a checkpoint: to its masks and what was learned, too.

        Args:
            state: of the session in that checkpoint.

        Raises:
            SessionError: if it is that of another run.
        """
        self._parts.load_learned(self._origin.check(state))

    def finish(self) -> None:
        """End the run: write the effective weights into the parameters and undo every swap."""
        reshard(self._model)
        for stage in self.plan.stages:
            status = self._statuses.get(stage.index)
            if isinstance(stage.stage, (DistillStage, RegularizeStage, ShrinkStage)):
                self._change(stage, "finished")
            elif status != "finished":
                how = "never began" if status is None else f"did not reach its end (sparsity {self.sparsity:.3f})"
                warnings.warn(f"{stage.label} {how}: the run stopped at step {self.step}", stacklevel=2)
                self._change(stage, "skipped")
        for name in self.masks.masks:
            check_finite(f"weights of '{name}'", self._weights[name].detach(), DIVERGED)
        for pruning in self._pruning.values():
            pruning.write()
        self.masks.alive.clear()
        self.masks.apply()
        self.masks.clear_signs()
        self._activations.finish()
        self._unswap()
        self._round_and_shrink()
        self._metadata = self.manager.artifact_metadata(self.view)
        self._end(None)

    def _round_and_shrink(self) -> None:
        """Solvers come last: they measure what the model that has shrunk gives."""
        for quantizing in self._quantizing.values():
            if not quantizing.solves:
                quantizing.write(self._weights)
        if any(isinstance(stage.stage, ShrinkStage) for stage in self.plan.stages):
            from sparsehooks.shrinking import shrink

            self._shrunk = shrink(self._model, self.masks.masks)
        left = {id(weight) for weight in self._model.parameters()}
        for quantizing in self._quantizing.values():
            if quantizing.solves:
                quantizing.write({name: weight for name, weight in self._weights.items() if id(weight) in left})

    def abort(self, error: BaseException | None = None) -> None:
        """End the run early: undo every swap and leave the weights as they are. Does nothing after ``finish``."""
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._activations.abort()
        self._unswap()
        self._at_end.close()
        if self.running:
            self.running = False
            self._carrier.detach()
            self.manager.session_finished(self.view, error)

    def _keep_answers(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Write what the teachers answered with each checkpoint, for runs that go on from it, and at the end."""
        self._at_end.callback(self._distillation.flush)
        if optimizer is not None:
            self._at_end.callback(optimizer.register_state_dict_pre_hook(lambda _: self._distillation.flush()).remove)

    @contextmanager
    def aborting(self) -> Iterator[Session]:
        """Whatever is raised inside ends the run on its way out."""
        try:
            yield self
        except BaseException as error:
            self.abort(error)
            raise

    def provenance(self, part: nn.Module) -> dict[str, Any]:
        """What the model, or a part of it, says about itself where it is saved on its own.

        These are the recipe, what plugins added, and the pruned parameters, under the names that they have without
        adapters.
        """
        masked = {id(self._weights[name]) for name in self.masks.masks}
        pruned = sorted(plain_name(name) for name, weight in part.named_parameters() if id(weight) in masked)
        said: dict[str, Any] = {"recipe": self.plan.recipe.to_dict(), "plugins": self._metadata, "pruned": pruned}
        return said | {"shrunk": self._shrunk if part is self._model else {}, "activations": recorded(part)}

    # ------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain values and tensors."""
        progress = {"step": self.step, "statuses": dict(self._statuses)}
        return self._origin.to_plain() | progress | self._parts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called, on the weights of that moment.

        Raises:
            SessionError: if it belongs to another recipe or another version.
        """
        self._take(state)
        self._loaded = self.sharded
        self._advance(update=False)
        self._carrier.write(self.state_dict)

    def _take(self, state: Mapping[str, Any]) -> None:
        state = self._origin.check(state)
        self.step, self._statuses = state["step"], dict(state["statuses"])
        self._parts.load_state_dict(state)

    def _pruned(self, opened: Collection[str]) -> list[str]:
        """What an opened artifact or this recipe prunes; a base model lacks the prefix of its task model."""
        own = {t.parameter for stage in self.plan.stages if stage.stage.action == "prune" for t in stage.targets}
        for name in self._weights:
            plain = f".{plain_name(name)}"
            own |= {name for old in opened if f".{old}".endswith(plain) or plain.endswith(f".{old}")}
        return [name for name in self._weights if name in own]

    def _check_weights(self) -> None:
        """State and sharded weights come from two files: they have to fit."""
        self._loaded = False
        if self.sharded and (name := misfit(self._weights, self.masks.masked_weights())) is not None:
            raise SessionError(
                f"the weights of '{name}' and the masks that were loaded do not belong together; resume from the "
                "folder that holds both"
            )

    def _check_sharding(self) -> None:
        if (why := unsupported(self._model)) is not None:
            raise SessionError(f"{why}, which masks cannot follow; shard with FSDP2 alone, or train with DDP")
        if self.sharded and any(isinstance(stage.stage, ShrinkStage) for stage in self.plan.stages):
            raise SessionError(
                "sharded weights (FSDP2) cannot shrink; leave the stage out, save, and call sparsehooks.compress on "
                "the folder with a recipe that only says 'shrink = true'"
            )

    # ---------------------------------------------------------------------------------------------------- progress

    @property
    def sparsity(self) -> float:
        """The share of zeros among all weights that this run prunes, or 0 if it prunes none."""
        return self.masks.sparsity

    @property
    def complete(self) -> bool:
        """Whether every schedule has ended: only checkpoints from here on are what the recipe asks for."""
        return all(
            self.step >= self._end_of(stage) and not self._pending(stage)
            for stage in self.plan.stages
            if "schedule" in stage.components
        )

    def _end_of(self, stage: PlannedStage) -> int:
        """The step after which a stage changes nothing more of itself."""
        last = self._schedule(stage).window(self.total_steps)[1]
        freeze = getattr(stage.stage, "freeze", None)
        return last if freeze is None else max(last, step_of(freeze, self.total_steps))

    def _schedule(self, stage: PlannedStage) -> Schedule:
        return cast(Schedule, self._objects[stage.index]["schedule"])

    def _pending(self, stage: PlannedStage) -> bool:
        return stage.index in self._pruning and self._pruning[stage.index].pending(self.step)

    def _advance(self, *, update: bool) -> None:
        """Do what the schedules ask for after ``self.step`` finished steps.

        Args:
            update: whether masks that are due are chosen now; those of a resumed run were, before it was saved.
        """
        for stage in self.plan.stages:
            if "schedule" in stage.components:
                self._follow(stage, update=update)
            elif stage.index not in self._statuses:
                self._change(stage, "started")

    def _follow(self, stage: PlannedStage, *, update: bool) -> None:
        """Do what the schedule of one stage asks for."""
        schedule = self._schedule(stage)
        first, last = schedule.window(self.total_steps)
        if isinstance(stage.stage, PruneStage) and update:
            self._pruning[stage.index].remember(self.step)
        if isinstance(stage.stage, DistillStage):
            self._distillation.advance(stage.index, schedule.at(self.step + 1, self.total_steps))
        if self.step < first:
            return
        if stage.index not in self._statuses:
            self._change(stage, "started")
        if isinstance(stage.stage, QuantizeStage):
            self._quantizing[stage.index].advance(self.step)
        elif isinstance(stage.stage, ActivationStage):
            self._activations.advance(stage, schedule.at(self.step, self.total_steps))
        elif isinstance(stage.stage, PruneStage) and update:
            self._tell(stage.index, self.step, self._pruning[stage.index].after_step(self.step))
        ends = not isinstance(stage.stage, (RegularizeStage, DistillStage))  # what is added lasts as long as the run
        if ends and not self._pending(stage) and self.step >= last and self._statuses[stage.index] == "started":
            self._change(stage, "finished")

    def _tell(self, index: int, step: int, changes: Changes) -> None:
        if any(change.pruned or change.grown for change in changes.values()):
            stage = self.plan.stages[index]
            if index not in self._statuses:  # a gradient decides before the step is finished
                self._change(stage, "started")
            self.manager.masks_updated(self.view, stage.label, step, MappingProxyType(dict(changes)))

    def _reset_slots(self, name: str, grown: Tensor) -> None:
        """A weight that grows begins with an optimizer that has not seen it."""
        if self._optimizer is not None:
            slots.reset(self._optimizer, self._weights[name], grown)

    def _change(self, stage: PlannedStage, status: StageStatus) -> None:
        self._statuses[stage.index] = status
        self.manager.stage_changed(self.view, stage.label, status)

    def _on_grid(self, target: Target, matrix: Tensor) -> Quantize | None:
        """How a solver that prunes puts columns on the grid of a quantize stage that has a solver, too."""
        found = (quantizing.on_grid(target, matrix) for quantizing in self._quantizing.values())
        return next((on_grid for on_grid in found if on_grid is not None), None)

    def _swap(
        self,
        target: Target,
        step: swapping.Step,
        transform: swapping.Transform,
        product: swapping.Product | None,
    ) -> None:
        swapping.swap(self._model, target, step, transform, product)
        self._swapped[target.parameter] = target

    def _unswap(self) -> None:
        for target in self._swapped.values():
            swapping.unswap(self._model, target)
        self._swapped.clear()
