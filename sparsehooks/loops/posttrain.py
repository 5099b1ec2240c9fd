"""No loop at all: compress a model as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from sparsehooks.artifact.folder import check_level, new_folder
from sparsehooks.artifact.quantizer import SparseHooksConfig, arm, disarm
from sparsehooks.artifact.write import write_model
from sparsehooks.batches import Batches
from sparsehooks.calibration import Calibration, needs_calibration, reads_inputs
from sparsehooks.collecting import unsupported
from sparsehooks.components import Activation, Criterion, Level, Need, Schedule
from sparsehooks.errors import PlanError
from sparsehooks.models import copy_companions, open_model
from sparsehooks.plan import Plan
from sparsehooks.plugins import PluginManager, as_manager
from sparsehooks.recipe import (
    ActivationStage,
    DistillStage,
    PruneStage,
    QuantizeStage,
    Recipe,
    RegularizeStage,
    Use,
)
from sparsehooks.session import Session
from sparsehooks.stages import PlannedStage


def compress(
    model_or_path: nn.Module | str | Path,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path | None = None,
    tokenizer: Any = None,
    calibration: Iterable[Any] | None = None,
    plugins: Sequence[Any] | PluginManager = (),
    *,
    level: Level = "balanced",
) -> nn.Module:
    """Compress a model without training: every stage at once, at its final value; schedules do not apply.

    Args:
        model_or_path: a model, which is changed in place; a folder; or a name on the Hub.
        recipe: a path, a mapping, or a ``Recipe``.
        out: where to save the result; a new or empty folder, or an earlier artifact to replace.
        tokenizer: saved beside the model. Of a folder, the tokenizer's files are taken along without it.
        calibration: batches for criteria and solvers that need data: dicts of tensors (the keyword arguments of the
            forward, with an attention mask where there is padding), lists of tensors (positional), or tensors.
        plugins: see ``PluginManager``.
        level: how much work saving may put into a smaller file; see ``save_pretrained``.

    Returns:
        the compressed model; saving it writes the sparse form.

    Raises:
        PlanError: all problems together, before the model is touched; distillation is one.
        ArtifactError: if ``out`` cannot be written.
    """
    check_level(level)
    manager = as_manager(plugins)
    recipe = Recipe.of(recipe, manager)
    plan = Plan.build(recipe, manager)  # a schedule that does not apply shall be right all the same
    recipe = at_once(recipe)
    reads = _check_data(plan, given=calibration is not None)
    if calibration is not None and not reads:
        warnings.warn("calibration data was given, but nothing in the recipe reads it", stacklevel=2)
    with nullcontext() if out is None else new_folder(out) as folder:  # a bad folder is refused before the work
        if isinstance(model_or_path, nn.Module):
            model, source = model_or_path, None
        else:
            model, source = open_model(model_or_path)
        session = Session.of(recipe, manager, model, total_steps=0)
        batches = None if calibration is None else Batches(model, calibration)
        calibrated = None
        if batches is not None and any(needs_calibration(stage) for stage in session.plan.stages):
            _check_layers(session.plan, model)
            calibrated = Calibration(model, batches)
        config = disarm(model)
        with session.aborting():
            session.start(model, opened=config.pruned if config is not None else None, calibration=calibrated)
            if batches is not None and any(_has_threshold(stage) for stage in session.plan.stages):
                session.calibrate(batches)
            session.finish()
        arm(model, SparseHooksConfig(**session.provenance(model)))
        if folder is not None:
            write_model(model, folder, level=level)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            elif source is not None:
                copy_companions(source, folder)
    return model


def _has_threshold(stage: PlannedStage) -> bool:
    """Whether a stage fits something to the activations that it sees."""
    if not isinstance(stage.stage, ActivationStage):
        return False
    return cast(Activation, stage.components["activation"].cls).calibrated is not None


def _needs_training(stage: PlannedStage) -> str | None:
    """Why a prune stage makes no sense without training, or None."""
    if not isinstance(stage.stage, PruneStage):
        return None
    advice = "use CompressionCallback or attach"
    if cast(type[Criterion], stage.components["prune"].cls).acts == "forward":
        return f"'{stage.stage.prune.use}' learns which weights matter while the model trains; {advice}"
    if cast(type[Schedule], stage.components["schedule"].cls).adaptive:
        return f"the schedule '{stage.stage.schedule.use}' follows the evaluations of training; {advice}"
    return None


def _check_data(plan: Plan, *, given: bool) -> bool:
    """Whether any stage reads calibration batches.

    Raises:
        PlanError: they are missing, or a criterion needs what only an optimizer has.
    """
    readers = [stage for stage in plan.stages if needs_calibration(stage) or _has_threshold(stage)]
    problems = [
        f"{stage.path}: '{stage.components['prune'].record.component.name}' reads the optimizer's momentum; use "
        "CompressionCallback or attach"
        for stage in plan.stages
        if isinstance(stage.stage, PruneStage) and Need.MOMENTUM in stage.components["prune"].cls.needs
    ]
    problems += [f"{stage.path}: {why}" for stage in plan.stages if (why := _needs_training(stage)) is not None]
    if not given:
        problems += [
            f"{stage.label}: needs calibration batches, such as a hundred texts: calibration=batches, or "
            "--calibration FILE"
            for stage in readers
        ]
    if problems:
        raise PlanError(problems)
    return bool(readers)


def _check_layers(plan: Plan, model: nn.Module) -> None:
    problems = [
        f"{stage.path}: {problem}"
        for stage in plan.stages
        if reads_inputs(stage)
        for problem in unsupported(model, stage.targets)
    ]
    if problems:
        raise PlanError(problems)


def at_once(recipe: Recipe) -> Recipe:
    """The recipe with every schedule replaced by ``oneshot``.

    Raises:
        PlanError: for stages that need training.
    """
    problems = [
        f"recipe.stage[{index}]: {what} needs training; use CompressionCallback or attach, or leave it out"
        for index, stage in enumerate(recipe.stages)
        for cls, what in ((DistillStage, "distillation"), (RegularizeStage, "regularization"))
        if isinstance(stage, cls)
    ]
    if problems:
        raise PlanError(problems)
    stages = tuple(
        replace(stage, schedule=Use("oneshot"))
        if isinstance(stage, (PruneStage, ActivationStage, QuantizeStage))
        else stage
        for stage in recipe.stages
    )
    for index, stage in enumerate(stages):
        if isinstance(stage, PruneStage) and stage.grow is not None:
            warnings.warn(f"recipe.stage[{index}].grow: nothing grows where everything goes at once", stacklevel=3)
        if isinstance(stage, PruneStage) and stage.backend is not None:
            warnings.warn(f"recipe.stage[{index}].backend: nothing trains here; see accelerate_model", stacklevel=3)
    stages = tuple(
        replace(stage, grow=None, backend=None) if isinstance(stage, PruneStage) else stage for stage in stages
    )
    return replace(recipe, stages=stages)
