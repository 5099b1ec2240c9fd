"""Plans: a recipe bound to the catalog and fitted to a model, with every problem reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from sparsehooks.checks import check_components, check_fit, check_model, check_stages, check_training
from sparsehooks.decoding import decode
from sparsehooks.discovery import require
from sparsehooks.errors import PlanError, PluginError, RecipeError
from sparsehooks.plugins import PluginManager
from sparsehooks.recipe import (
    ActivationStage,
    DistillStage,
    Grow,
    PruneStage,
    QuantizeStage,
    Recipe,
    RegularizeStage,
    ShrinkStage,
    Stage,
    Use,
)
from sparsehooks.stages import Bound, PlannedStage
from sparsehooks.targets import find, first_match

if TYPE_CHECKING:
    from torch import nn

KEYS = {
    PruneStage: {
        "prune": "criterion",
        "pattern": "pattern",
        "allocation": "allocation",
        "schedule": "schedule",
        "grow": "criterion",
        "solver": "solver",
        "backend": "backend",
    },
    RegularizeStage: {"regularize": "regularizer", "pattern": "pattern", "schedule": "schedule"},
    ActivationStage: {"activation": "activation", "schedule": "schedule"},
    ShrinkStage: {},
    QuantizeStage: {"quantize": "quantizer", "schedule": "schedule", "solver": "solver"},
    DistillStage: {"distill": "distiller", "schedule": "schedule"},
}
"""For each kind of stage: which of its keys name a component, and of which kind."""


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        recipe: where it came from.
        stages: in the order of the recipe.
        total_steps: optimizer steps of the run, or None where that is not known.
    """

    recipe: Recipe
    stages: tuple[PlannedStage, ...]
    total_steps: int | None = None

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        manager: PluginManager,
        model: nn.Module | None = None,
        total_steps: int | None = None,
    ) -> Plan:
        """Bind the recipe to the plugins and, if there is one, fit it to the model. Changes nothing.

        Raises:
            PlanError: all problems together.
        """
        problems = require(recipe.requires) + check_model(model)
        stages = []
        for index, stage in enumerate(recipe.stages):
            planned = _bind(index, stage, manager, problems)
            problems += check_components(planned)
            if model is not None:
                planned = _fit(planned, model, problems)
                problems += check_fit(planned, model)
            if total_steps:
                problems += check_training(planned, model)
            stages.append(planned)
        plan = cls(recipe, tuple(stages), total_steps)
        problems += check_stages(plan.stages, total_steps)
        if not problems:
            problems += manager.check_plan(plan)
        if problems:
            raise PlanError(problems)
        return plan


def _bind(index: int, stage: Stage, manager: PluginManager, problems: list[str]) -> PlannedStage:
    """The stage with the components that can be had; of the others ``problems`` tells."""
    components = {}
    for key, kind in KEYS[type(stage)].items():
        path = f"recipe.stage[{index}].{key}"
        use = getattr(stage, key)
        if use is None:
            continue
        use = use.use if isinstance(use, Grow) else cast(Use, use)
        with _collecting(problems, path):
            record, options = manager.catalog.resolve(kind, use.use)
            component = record.load()
            with _collecting(problems):
                if twice := options.keys() & use.options:
                    raise RecipeError(f"{path}: '{use.use}' says '{min(twice)}' already")
                config: Any = decode(component.Config, {**options, **use.options}, path)
                components[key] = Bound(record, config, component)
    return PlannedStage(index, stage, components)


def _fit(planned: PlannedStage, model: nn.Module, problems: list[str]) -> PlannedStage:
    """The stage with its targets in the model; ``problems`` tells why there are none."""
    stage = planned.stage
    if isinstance(stage, (DistillStage, ShrinkStage)):  # neither names weights
        return planned
    with _collecting(problems, f"{planned.path}.targets"):
        targets, notes = find(model, stage.targets, stage.exclude)
        planned = replace(planned, targets=tuple(targets), notes=tuple(notes))
    if isinstance(stage, PruneStage):
        matches = {target.parameter: first_match(model, target, stage.overrides) for target in planned.targets}
        overrides = {name: stage.overrides[match] for name, match in matches.items() if match is not None}
        planned = replace(planned, overrides=overrides)
    return planned


@contextmanager
def _collecting(problems: list[str], path: str = "") -> Iterator[None]:
    try:
        yield
    except (RecipeError, PluginError) as error:
        problems.append(f"{path}: {error}" if path else str(error))
