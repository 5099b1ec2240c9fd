"""Planned stages: a stage of a recipe with the components, weights and sparsities that it resolved to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsehooks.components import ComponentBase, Pattern
from sparsehooks.plugins import attributed
from sparsehooks.recipe import Stage
from sparsehooks.targets import Target

if TYPE_CHECKING:
    from sparsehooks.catalog import Record


@dataclass(frozen=True)
class Bound:
    """A component chosen by a recipe, with its options decoded."""

    record: Record
    config: Any
    cls: type[ComponentBase]

    def create(self) -> ComponentBase:
        """A new object of the component."""
        return self.cls(self.config)


@dataclass(frozen=True)
class PlannedStage:
    """One stage with what it resolved to.

    Attributes:
        index: its place in the recipe.
        stage: the stage as the recipe has it.
        components: what its keys chose, by key (``"prune"``, ``"pattern"``, ``"schedule"``, ...).
        targets: the weights it acts on; empty for distillation and without a model.
        notes: what was left out, and why.
        overrides: the sparsity of the weights that have one of their own.
    """

    index: int
    stage: Stage
    components: Mapping[str, Bound]
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()
    overrides: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """How messages and hooks call this stage."""
        return f"stage[{self.index}] {self.stage.action} {self.stage.component.use}"

    @property
    def path(self) -> str:
        """Where it stands in the recipe."""
        return f"recipe.stage[{self.index}]"


def crosses_targets(planned: PlannedStage, pattern: Pattern) -> bool:
    """Whether units of a pattern, coupled to the model, reach over several of the stage's targets."""
    import torch

    sizes = {target.parameter: torch.empty(target.matrix_shape, device="meta") for target in planned.targets}
    try:
        with attributed(planned.components["pattern"].record):
            return pattern.units(sizes).keys() != sizes.keys()
    except (RuntimeError, TypeError, NotImplementedError):  # it reads the scores, and meta tensors have none
        return False
