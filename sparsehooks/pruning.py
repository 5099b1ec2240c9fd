"""Pruning: the masks of a run, and how a stage updates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparsehooks import masks
from sparsehooks.components import Allocation, Criterion, Need, Pattern, Schedule
from sparsehooks.distributed import agree, seed_of
from sparsehooks.errors import SessionError
from sparsehooks.masks import MaskChange
from sparsehooks.plugins import attributed
from sparsehooks.recipe import PruneStage
from sparsehooks.sharding import local, part, whole, write
from sparsehooks.views import WeightView

if TYPE_CHECKING:
    from sparsehooks.stages import PlannedStage
    from sparsehooks.targets import Target

Evidence = Callable[["Target"], Mapping[str, Any]]
"""What a criterion may ask for of a target, as fields of its ``WeightView``."""
NEEDS_STEP = frozenset({Need.GRADIENT, Need.MOMENTUM})
"""What is there between the backward pass and the optimizer's step."""


def no_evidence(_: Target) -> Mapping[str, Any]:
    """Nothing but the weight itself."""
    return {}


@dataclass(frozen=True)
class Pruner:
    """The components of one prune stage, at work."""

    stage: PlannedStage
    criterion: Criterion
    pattern: Pattern
    allocation: Allocation
    schedule: Schedule
    grow: Criterion | None = None

    @classmethod
    def of(cls, stage: PlannedStage, objects: Mapping[str, Any]) -> Pruner:
        """From the objects of a stage, by key."""
        return cls(
            stage,
            objects["prune"],
            objects["pattern"],
            objects["allocation"],
            objects["schedule"],
            objects.get("grow"),
        )

    @property
    def recipe(self) -> PruneStage:
        """The stage as the recipe has it."""
        return cast(PruneStage, self.stage.stage)

    @property
    def sparsity(self) -> float:
        """The final sparsity: the recipe's, or what the pattern fixes."""
        return self.pattern.share() if self.recipe.sparsity is None else self.recipe.sparsity

    @property
    def needs(self) -> frozenset[Need]:
        """What its criteria ask for."""
        return self.criterion.needs | (self.grow.needs if self.grow is not None else frozenset())

    @property
    def revives(self) -> bool:
        """Whether an update may choose weights that went before."""
        return self.criterion.acts == "forward" or self.grow is not None


class Masks:
    """The masks of a run: plain bool tensors by parameter name, True where a weight stays.

    Never buffers or parametrizations: both change the keys of the state dict.

    Attributes:
        weights: the parameters of the model, as they were when the run began.
        masks: the mask of each parameter.
        seed: the recipe's.
        alive: the ones that act in the forward: their weights stay alive behind the mask.
        on_grown: called with the name of a weight and where it has grown.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], seed: int) -> None:
        self.weights = weights
        self.seed = seed
        self.masks: dict[str, Tensor] = {}
        self.alive: set[str] = set()
        self.on_grown: Callable[[str, Tensor], None] | None = None
        self._kept: dict[str, int] = {}
        self._packed: dict[str, Tensor] = {}
        self._undo: dict[int, dict[str, dict[str, Tensor]]] = {}

    @property
    def sparsity(self) -> float:
        """The share of zeros among all weights that have a mask, or 0 if none has."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(self._kept.values()) / total if total else 0.0

    def masked_weights(self) -> dict[str, Tensor]:
        """The masks of the weights that are zero where their mask says so."""
        return {name: mask for name, mask in self.masks.items() if name not in self.alive}

    @torch.no_grad()
    def apply(self) -> None:
        """Zero what the masks exclude, in place."""
        acting = self.masked_weights()
        masks.apply(
            [local(self.weights[name]) for name in acting],
            [part(mask, self.weights[name]) for name, mask in acting.items()],
        )

    @torch.no_grad()
    def clear_signs(self) -> None:
        """Make masked weights +0.0: a negative weight times zero is -0.0, which files do not keep."""
        for name in self.masks:
            local(self.weights[name]).add_(0.0)

    @torch.no_grad()
    def update(
        self,
        pruner: Pruner,
        step: int,
        progress: float,
        evidence: Evidence = no_evidence,
        targets: Iterable[Target] | None = None,
        counts: Mapping[str, int] | None = None,
        growth: float = 0.0,
    ) -> Mapping[str, MaskChange]:
        """Choose the masks of a stage anew on the weights as they are.

        What went stays gone, unless something grows or the mask acts in the forward.

        Args:
            pruner: the stage.
            step: finished optimizer steps.
            progress: the share of the final sparsity that is due.
            evidence: what the criteria need.
            targets: a part of the stage's targets, one after the other; all if it is left out.
            counts: how many units stay, where that was decided before (``Masks.counts``).
            growth: the part of the weights that stay which gives way to others.

        Raises:
            SessionError: scores of the wrong shape or not finite, a layer that would be emptied, ranks that differ.
        """
        self.apply()  # the optimizer has just moved masked weights; a criterion shall see them as they count
        chosen_targets = {t.parameter: t for t in (pruner.stage.targets if targets is None else targets)}
        scores = {
            name: self._score(pruner, pruner.criterion, "prune", target, step, evidence)
            for name, target in chosen_targets.items()
        }
        if pruner.criterion.acts == "weight":  # what is masked cannot stay, it can only grow
            scores = {name: self._without_masked(target, scores[name]) for name, target in chosen_targets.items()}
        units = self._units(pruner, scores)
        if counts is None:
            counts = self._counts(pruner, units, progress, step)
        if growth and all(name in self.masks for name in chosen_targets):
            grown = {key: int(growth * count) for key, count in counts.items()}
            keep = self._select(pruner, units, {key: counts[key] - grown[key] for key in counts})
            keep = self._grow(pruner, chosen_targets, keep, grown, step, evidence)
        else:
            keep = self._select(pruner, units, counts)
        with attributed(pruner.stage.components["pattern"].record):
            chosen = pruner.pattern.expand(keep, scores)
        undo: dict[str, dict[str, Tensor]] | None = {} if pruner.schedule.adaptive else None
        changes = {}
        if self.alive & chosen_targets.keys():  # biases and norms that go along would not come back either
            self.alive |= chosen.keys()
        for name, mask in chosen.items():
            shaped = chosen_targets[name].restore(mask) if name in chosen_targets else mask
            changes[name] = self.replace(name, shaped, undo, revives=pruner.revives)
        if undo is not None:
            self._undo[pruner.stage.index] = undo
        label = pruner.stage.label
        agree(lambda: masks.digest(self._packed), f"{label}: the ranks chose different masks at step {step}")
        self.apply()
        return changes

    def counts(self, pruner: Pruner, step: int, progress: float, evidence: Evidence = no_evidence) -> Mapping[str, int]:
        """How many units of each matrix would stay, by the scores of all targets together; changes nothing."""
        with torch.no_grad():
            scores = {}
            for target in pruner.stage.targets:
                score = self._score(pruner, pruner.criterion, "prune", target, step, evidence)
                scores[target.parameter] = self._without_masked(target, score)
            return self._counts(pruner, self._units(pruner, scores), progress, step)

    @torch.no_grad()
    def step_back(self, index: int) -> Mapping[str, MaskChange]:
        """Undo the last update of the adaptive stage ``index``: the masks before it, and the values that it took."""
        changes = {}
        for name, kept in self._undo.pop(index, {}).items():
            weight = self.weights[name]
            mask = masks.unpack(kept["mask"], weight.shape, weight.device)
            back = mask & ~self.masks[name]
            if name not in self.alive:
                values = whole(weight)
                values[back] = kept["values"].to(values)
                write(weight, values)
            changes[name] = MaskChange(0, int(back.sum()), self._set(name, mask), mask.numel())
        return changes

    def from_zeros(self, names: Iterable[str]) -> None:
        """Take the zeros of these weights of an opened artifact as their masks."""
        for name in names:
            mask = whole(self.weights[name].detach()) != 0
            if not mask.all():
                self._set(name, mask)

    def state_dict(self) -> dict[str, Tensor]:
        """The masks as bits, by parameter name."""
        return dict(self._packed)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state_dict`` gave."""
        for kept in (self.masks, self._packed, self._kept):
            kept.clear()
        for name, stored in state.items():
            bits = stored.cpu()  # a loop may have moved them to the weights' device
            weight = self.weights[name]
            mask = masks.unpack(bits, weight.shape, weight.device)
            self.masks[name], self._packed[name], self._kept[name] = mask, bits, int(torch.count_nonzero(mask))

    def undo_state(self) -> dict[int, dict[str, dict[str, Tensor]]]:
        """What ``step_back`` needs, for a checkpoint."""
        return {index: {name: dict(kept) for name, kept in undo.items()} for index, undo in self._undo.items()}

    def load_undo_state(self, state: Mapping[int, Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Take back what ``undo_state`` gave."""
        self._undo = {index: {name: dict(kept) for name, kept in undo.items()} for index, undo in state.items()}

    def view(self, pruner: Pruner, key: str, target: Target, step: int, evidence: Evidence) -> WeightView:
        """What a criterion of the stage sees of a target."""
        weight = target.matrix(whole(self.weights[target.parameter].detach()))
        seed = seed_of(self.seed, pruner.stage.index, step, target.parameter, *(() if key == "prune" else (key,)))
        return WeightView(target.parameter, weight, seed, **evidence(target))

    def _units(self, pruner: Pruner, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with attributed(pruner.stage.components["pattern"].record):
            return pruner.pattern.units(scores)

    def _select(self, pruner: Pruner, units: Mapping[str, Tensor], counts: Mapping[str, int]) -> Mapping[str, Tensor]:
        with attributed(pruner.stage.components["pattern"].record):
            return pruner.pattern.select(units, counts)

    def _counts(self, pruner: Pruner, units: Mapping[str, Tensor], progress: float, step: int) -> Mapping[str, int]:
        stage, share = pruner.stage, pruner.pattern.share()
        shapes = {target.parameter: target.shape for target in stage.targets}
        counts: dict[str, int] = {}
        own = {key: stage.overrides[key] for key in units if key in stage.overrides}
        for key, sparsity in own.items():
            size = units[key].numel()
            counts[key] = size - round(progress * sparsity / share * size)
        rest = {key: unit for key, unit in units.items() if key not in own}
        if rest:
            with attributed(stage.components["allocation"].record):
                counts |= pruner.allocation.keep(
                    rest,
                    {key: shapes.get(key, tuple(unit.shape)) for key, unit in rest.items()},
                    progress * pruner.sparsity / share,
                )
        for name, count in counts.items():
            if count == 0 and share == 1.0:  # N:M keeps some of every unit
                advice = "lower 'sparsity', exclude the layer, or use allocation = \"uniform\""
                raise SessionError(
                    f"{stage.label}: nothing of '{name}' would be left at step {step}; "
                    + ("lower its sparsity in 'overrides', or exclude the layer" if name in own else advice)
                )
        return {key: counts[key] for key in units}

    def _grow(
        self,
        pruner: Pruner,
        targets: Mapping[str, Target],
        keep: Mapping[str, Tensor],
        grown: Mapping[str, int],
        step: int,
        evidence: Evidence,
    ) -> Mapping[str, Tensor]:
        """What stays, and the best of all other units (Evci et al. 2020, arXiv:1911.11134, algorithm 1).

        What has just been dropped may come back, and keeps its value then. With an allocation that compares the layers
        by their scores, what grows is shared by its scores too (Dettmers and Zettlemoyer 2019, arXiv:1907.04840).
        """
        assert pruner.grow is not None
        scores = {n: self._score(pruner, pruner.grow, "grow", t, step, evidence) for n, t in targets.items()}
        units = self._units(pruner, scores)
        if pruner.allocation.reads_scores:
            free = {key: unit.masked_fill(keep[key], float("-inf")) for key, unit in units.items()}
            grown = masks.top_counts(free, sum(grown.values()))
        # chosen together with what stays, so that what the pattern spreads evenly is even in sum
        units = {key: unit.masked_fill(keep[key], float("inf")) for key, unit in units.items()}
        return self._select(pruner, units, {key: int(keep[key].sum()) + grown[key] for key in keep})

    def _score(
        self, pruner: Pruner, criterion: Criterion, key: str, target: Target, step: int, evidence: Evidence
    ) -> Tensor:
        stage, name = pruner.stage, target.parameter
        view = self.view(pruner, key, target, step, evidence)
        weight = view.weight
        masks.check_finite(f"weights of '{name}'", weight, masks.DIVERGED)
        version = weight._version
        with attributed(stage.components[key].record):
            score = criterion.score(view)
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
        return score

    def _without_masked(self, target: Target, score: Tensor) -> Tensor:
        old = self.masks.get(target.parameter)
        return score if old is None else score.masked_fill(~target.matrix(old), float("-inf"))

    def replace(
        self, name: str, mask: Tensor, undo: dict[str, dict[str, Tensor]] | None, *, revives: bool
    ) -> MaskChange:
        """Take a new mask (of the parameter's shape) for a weight.

        Args:
            name: of the parameter.
            mask: bool, True where a weight stays.
            undo: receives what ``step_back`` needs, if it is given.
            revives: whether weights that went before may come back.
        """
        mask = mask.contiguous()
        old = self.masks.get(name)
        if old is not None and not revives:
            mask = mask & old
        if undo is not None:
            before = torch.ones_like(mask) if old is None else old
            undo[name] = {"mask": masks.pack(before), "values": whole(self.weights[name])[before & ~mask].clone()}
        kept_before = self._kept.get(name, mask.numel())
        back = None if old is None or not revives else mask & ~old
        grown = 0 if back is None else int(torch.count_nonzero(back))
        if back is not None and grown and self.on_grown is not None and name not in self.alive:
            self.on_grown(name, back)
        kept = self._set(name, mask)
        return MaskChange(kept_before + grown - kept, grown, kept, mask.numel())

    def _set(self, name: str, mask: Tensor) -> int:
        kept = int(torch.count_nonzero(mask))
        self.masks[name], self._packed[name], self._kept[name] = mask, masks.pack(mask), kept
        return kept
