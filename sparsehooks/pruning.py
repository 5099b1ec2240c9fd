"""Pruning: the masks of a run, and how a stage updates them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparsehooks import masks
from sparsehooks.components import Allocation, Criterion, Pattern
from sparsehooks.distributed import agree, seed_of
from sparsehooks.errors import SessionError
from sparsehooks.masks import MaskChange
from sparsehooks.plugins import attributed
from sparsehooks.recipe import PruneStage
from sparsehooks.views import WeightView

if TYPE_CHECKING:
    from sparsehooks.plan import PlannedStage
    from sparsehooks.targets import Target


@dataclass(frozen=True)
class Pruner:
    """The components of one prune stage, at work."""

    stage: PlannedStage
    criterion: Criterion
    pattern: Pattern
    allocation: Allocation

    @classmethod
    def of(cls, stage: PlannedStage, objects: Mapping[str, Any]) -> Pruner:
        """From the objects of a stage, by key."""
        return cls(stage, objects["prune"], objects["pattern"], objects["allocation"])

    @property
    def sparsity(self) -> float:
        """The final sparsity: the recipe's, or what the pattern fixes."""
        given = cast(PruneStage, self.stage.stage).sparsity
        return self.pattern.share() if given is None else given


class Masks:
    """The masks of a run: plain bool tensors by parameter name, True where a weight stays.

    Never buffers or parametrizations: both change the keys of the state dict.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], seed: int) -> None:
        self._weights = weights
        self._seed = seed
        self.masks: dict[str, Tensor] = {}
        self._kept: dict[str, int] = {}
        self._packed: dict[str, Tensor] = {}

    @property
    def sparsity(self) -> float:
        """The share of zeros among all weights that have a mask, or 0 if none has."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(self._kept.values()) / total if total else 0.0

    @torch.no_grad()
    def apply(self) -> None:
        """Zero what the masks exclude, in place."""
        masks.apply([self._weights[name] for name in self.masks], list(self.masks.values()))

    @torch.no_grad()
    def clear_signs(self) -> None:
        """Make masked weights +0.0: a negative weight times zero is -0.0, which files do not keep."""
        for name in self.masks:
            self._weights[name].add_(0.0)

    @torch.no_grad()
    def update(self, pruner: Pruner, step: int, progress: float) -> Mapping[str, MaskChange]:
        """Choose the masks of a stage anew on the weights as they are; what went stays gone.

        Args:
            pruner: the stage.
            step: finished optimizer steps.
            progress: the share of the final sparsity that is due.

        Raises:
            SessionError: scores of the wrong shape or not finite, a layer that would be emptied, ranks that differ.
        """
        self.apply()  # the optimizer has just moved masked weights; a criterion shall see them as they count
        stage = pruner.stage
        targets = {target.parameter: target for target in stage.targets}
        scores = {name: self._score(pruner, target, step) for name, target in targets.items()}
        with attributed(stage.components["pattern"].record):
            units = pruner.pattern.units(scores)
        with attributed(stage.components["allocation"].record):
            shapes = {key: targets[key].shape if key in targets else unit.shape for key, unit in units.items()}
            counts = pruner.allocation.keep(units, shapes, progress * pruner.sparsity / pruner.pattern.share())
        for name, count in counts.items():
            if count == 0 and pruner.pattern.share() == 1.0:  # N:M keeps some of every unit
                raise SessionError(
                    f"{stage.label}: nothing of '{name}' would be left at step {step}; lower 'sparsity', exclude the "
                    'layer, or use allocation = "uniform"'
                )
        with attributed(stage.components["pattern"].record):
            chosen = pruner.pattern.expand(masks.select(units, counts), scores)
        changes = {name: self._replace(target, chosen[name]) for name, target in targets.items()}
        agree(lambda: masks.digest(self._packed), f"{stage.label}: the ranks chose different masks at step {step}")
        self.apply()
        return changes

    def from_zeros(self, names: Iterable[str]) -> None:
        """Take the zeros of these weights of an opened artifact as their masks."""
        for name in names:
            mask = self._weights[name].detach() != 0
            if not mask.all():
                self._set(name, mask)

    def state_dict(self) -> dict[str, Tensor]:
        """The masks as bits, by parameter name."""
        return dict(self._packed)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave."""
        for name, stored in state.items():
            bits = stored.cpu()  # a loop may have moved them to the weights' device
            weight = self._weights[name]
            mask = masks.unpack(bits, weight.shape, weight.device)
            self.masks[name], self._packed[name], self._kept[name] = mask, bits, int(torch.count_nonzero(mask))

    def _score(self, pruner: Pruner, target: Target, step: int) -> Tensor:
        stage, name = pruner.stage, target.parameter
        weight = target.matrix(self._weights[name].detach())
        masks.check_finite(f"weights of '{name}'", weight, "the training has diverged, lower the learning rate")
        version = weight._version
        view = WeightView(name, weight, seed_of(self._seed, stage.index, step, name))
        with attributed(stage.components["prune"].record):
            score = pruner.criterion.score(view)
            if not isinstance(score, Tensor):
                raise SessionError(f"{stage.label}: score() of '{name}' returned {score!r} instead of a tensor")
            if score.shape != weight.shape or not score.is_floating_point():
                raise SessionError(
                    f"{stage.label}: score() of '{name}' must return floats of shape {tuple(weight.shape)}, "
                    f"got {score.dtype} {tuple(score.shape)}"
                )
            if weight._version != version:
                raise SessionError(f"{stage.label}: score() wrote to the weights of '{name}'; it must work on a copy")
            masks.check_finite(f"scores of '{name}'", score, f"{stage.label} cannot choose by them")
        old = self.masks.get(name)
        return score if old is None else score.masked_fill(~target.matrix(old), float("-inf"))

    def _replace(self, target: Target, chosen: Tensor) -> MaskChange:
        name = target.parameter
        mask = target.restore(chosen).contiguous()
        if name in self.masks:
            mask &= self.masks[name]
        before = self._kept.get(name, mask.numel())
        kept = self._set(name, mask)
        return MaskChange(before - kept, 0, kept, mask.numel())

    def _set(self, name: str, mask: Tensor) -> int:
        kept = int(torch.count_nonzero(mask))
        self.masks[name], self._packed[name], self._kept[name] = mask, masks.pack(mask), kept
        return kept
