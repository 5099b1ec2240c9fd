"""Calibration: what criteria and solvers want to know of a model's inputs, collected over batches without training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsehooks.batches import Batches, measuring
from sparsehooks.components import Criterion, Need, Solver
from sparsehooks.errors import SessionError
from sparsehooks.masks import MaskChange, check_finite
from sparsehooks.plugins import attributed
from sparsehooks.problems import LayerProblem, Quantize
from sparsehooks.pruning import Masks, Pruner
from sparsehooks.recipe import PruneStage
from sparsehooks.sequential import Evidence, Rerun, Visit, collect, in_order, inside
from sparsehooks.stages import PlannedStage, crosses_targets
from sparsehooks.targets import Target
from sparsehooks.views import WeightView
from sparsehooks.walking import Blocks, block_lists

INPUTS = frozenset({Need.INPUT_NORM, Need.GRAM})
"""What the inputs of a layer tell."""
COLLECTED = INPUTS | {Need.GRADIENT, Need.INFLUENCE}
"""What calibration batches give."""


class _Size(Criterion):
    """For counts that do not depend on scores."""

    def score(self, view: WeightView) -> Tensor:
        return view.weight.abs()


OnGrid = Callable[[Target, Tensor], "Quantize | None"]
"""How a target's columns go onto the grid that they will lie on, if a quantize stage solves for them too."""


class Calibration:
    """Prunes and quantizes by calibration batches.

    Args:
        model: on its device.
        batches: to look at.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self._model = model
        self.batches = batches

    def prune(self, masks: Masks, pruner: Pruner, on_grid: OnGrid) -> Mapping[str, MaskChange]:
        """Choose the masks of a stage, and solve for what stays."""
        with measuring(self._model), torch.no_grad():
            return _Stage(self._model, self.batches, masks, pruner, on_grid).run()

    def visit(self, targets: Sequence[Target], visit: Visit, needs: Collection[Need]) -> None:
        """Visit targets one after the other, each with what enters it; see ``in_order``."""
        with measuring(self._model), torch.no_grad():
            in_order(self.batches, targets, visit, needs)


class _Stage:
    """One stage on its way through the model."""

    def __init__(self, model: nn.Module, batches: Batches, masks: Masks, pruner: Pruner, on_grid: OnGrid) -> None:
        self.model = model
        self.on_grid = on_grid
        self.batches = batches
        self.masks = masks
        self.pruner = pruner
        bound = pruner.stage.components.get("solver")
        self.solver = None if bound is None else cast(Solver, bound.create())
        self.targets = pruner.stage.targets
        self.needs = pruner.needs
        self.gram = self.solver is not None or Need.GRAM in self.needs
        self.known: dict[str, dict[str, Any]] = {target.parameter: {} for target in self.targets}
        self.counts: Mapping[str, int] | None = None
        self.changes: dict[str, MaskChange] = {}

    def run(self) -> dict[str, MaskChange]:
        if Need.GRADIENT in self.needs:
            self._gradients()
        sequential = self.gram or Need.INPUT_NORM in self.needs
        if crosses_targets(self.pruner.stage, self.pruner.pattern):
            self._dense()
            sequential = False
        elif not sequential and Need.INFLUENCE in self.needs:
            self._dense()
        elif self.pruner.allocation.reads_scores and sequential:
            self._dense()
            self.counts = self.masks.counts(self.pruner, 0, 1.0, self._evidence)
            for known in self.known.values():
                for key in ("input_norm", "gram", "influence"):
                    known.pop(key, None)
        if not sequential:
            return dict(self.masks.update(self.pruner, 0, 1.0, self._evidence))
        if self.counts is None:
            self.counts = self.masks.counts(replace(self.pruner, criterion=_Size()), 0, 1.0)
        needs = self.needs | {Need.GRAM} if self.gram else self.needs
        in_order(self.batches, self.targets, self._prune, needs)
        return self.changes

    def _evidence(self, target: Target) -> Mapping[str, Any]:
        return self.known[target.parameter]

    def _gradients(self) -> None:  # noqa: C901 - a loop over batches and targets
        """The mean gradient of the loss; the criterion sees each batch's own."""
        weights = [self.model.get_parameter(target.parameter) for target in self.targets]
        flags = [(weight, weight.requires_grad) for weight in self.model.parameters()]
        criterion, label = self.pruner.criterion, self.pruner.stage.label
        total: list[Tensor | None] = [None] * len(weights)
        try:
            for weight, _ in flags:
                weight.requires_grad = False
            for weight in weights:
                weight.requires_grad = True
            for index in range(len(self.batches)):
                with torch.enable_grad():
                    outputs = self.batches.forward(index)
                    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
                    if loss is None:
                        raise SessionError(
                            f"{label}: the model's outputs have no loss; put labels into the calibration batches"
                        )
                    found: Sequence[Tensor | None] = torch.autograd.grad(loss, weights, allow_unused=True)
                for place, (target, gradient) in enumerate(zip(self.targets, found, strict=True)):
                    if gradient is None:
                        continue
                    check_finite(f"gradients of '{target.parameter}'", gradient, "look at the calibration data")
                    before = total[place]
                    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
                    total[place] = wide if before is None else before.add_(wide)
                    if criterion.samples:
                        view = self._view(target, {"gradient": target.matrix(gradient)})
                        with attributed(self.pruner.stage.components["prune"].record):
                            criterion.collect(view)
        finally:
            for weight, flag in flags:
                weight.requires_grad = flag
        for target, mean in zip(self.targets, total, strict=True):
            if mean is None:
                raise SessionError(f"{label}: no gradient reached '{target.parameter}'; exclude it")
            self.known[target.parameter]["gradient"] = target.matrix(mean / len(self.batches))

    def _view(self, target: Target, evidence: Mapping[str, Any]) -> WeightView:
        return self.masks.view(self.pruner, "prune", target, 0, lambda _: evidence)

    def _dense(self) -> None:
        """What the criterion needs of all targets, on the model as it is."""
        if Need.INFLUENCE in self.needs:
            for known in self.known.values():
                known["influence"] = 0.0
            for name in block_lists(self.batches, self.targets):
                walk = Blocks(self.batches, name)
                for block in range(len(walk.blocks)):
                    outputs = walk.run(block)
                    influence = walk.influence(outputs)
                    for target in self.targets:
                        if inside(target, f"{name}.{block}"):
                            self.known[target.parameter]["influence"] = influence
                    walk.advance(outputs)
        if self.needs & INPUTS:
            for name, found in collect(self.batches, self.targets, self.needs).items():
                self.known[name] |= found

    def _prune(self, targets: Sequence[Target], evidence: Evidence, _: Rerun | None) -> None:
        assert self.counts is not None
        for name, found in evidence.items():
            self.known[name] |= found
        if self.solver is None:
            mine = {target.parameter: self.counts[target.parameter] for target in targets}
            self.changes |= self.masks.update(self.pruner, 0, 1.0, self._evidence, targets, mine)
        else:
            for target in targets:
                self._solve(target)
        for target in targets:
            self.known[target.parameter].clear()

    def _solve(self, target: Target) -> None:
        solver, weight = self.solver, self.model.get_parameter(target.parameter)
        assert solver is not None
        assert self.counts is not None
        matrix = target.matrix(weight.detach())
        check_finite(f"weights of '{target.parameter}'", matrix, "the model is damaged")
        evidence = self.known[target.parameter]
        choice = Choice(self.pruner, target, self.masks, evidence, self.counts[target.parameter])
        problem = LayerProblem(target.parameter, matrix.float().clone(), evidence["gram"], choice.group)
        with attributed(self.pruner.stage.components["solver"].record):
            solved, mask = solver.solve(problem, choice, self.on_grid(target, matrix))
            check_finite(f"solved weights of '{target.parameter}'", solved, "raise the solver's damping")
        weight.copy_(target.restore(solved).to(weight.dtype))
        shaped = target.restore(mask)
        self.changes[target.parameter] = self.masks.replace(target.parameter, shaped, None, revives=self.pruner.revives)
        self.masks.apply()


class Choice:
    """Which weights of some columns stay, by criterion, pattern and count: the callback of solvers.

    Over blocks of columns the counts are rounded so that the layer's total is exact. Where the pattern's units cannot
    be told from some columns alone (rows, blocks), the mask is chosen once, on the weights as they were.

    A criterion that needs the Gram matrix is asked through the inverse that the solver has: what is lost by
    ``w^2 / [H^-1]_jj``, of the columns that are still free.
    """

    def __init__(self, pruner: Pruner, target: Target, masks: Masks, evidence: Mapping[str, Any], count: int) -> None:
        self._pruner = pruner
        self._name = target.parameter
        self._evidence = evidence
        self._count = count
        self._taken = 0
        old = masks.masks.get(target.parameter)
        self._old = None if old is None or pruner.criterion.acts == "forward" else target.matrix(old)
        self._view = masks.view(pruner, "prune", target, 0, lambda _: evidence)
        rows, self._columns = target.matrix_shape
        units = self._units(self._view.weight.abs())
        self.group: int | None = None
        self._fixed: Tensor | None = None
        if pruner.pattern.share() < 1.0 and units.dim() == 2 and len(units) == rows:
            self.group = self._columns // units.shape[1]
        elif units.shape != (rows, self._columns):
            with attributed(pruner.stage.components["prune"].record):
                score = pruner.criterion.score(self._view)
            self._fixed = self._expand(self._masked(score, 0, self._columns), count)

    def __call__(self, start: int, stop: int, weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
        """See ``Solver.solve``."""
        if self._fixed is not None:
            return self._fixed[:, start:stop]
        score = self._score(start, stop, weights, inverse_diagonal)
        check_finite(f"scores of '{self._name}'", score, f"{self._pruner.stage.label} cannot choose by them")
        score = self._masked(score, start, stop)
        due = round(self._count * self._part(stop))
        due, self._taken = due - self._taken, due
        return self._expand(score, due)

    def _part(self, stop: int) -> float:
        """The part of what may stay that lies in the columns before this one."""
        if self._old is None:
            return stop / self._columns
        return int(self._old[:, :stop].sum()) / max(1, int(self._old.sum()))

    def _score(self, start: int, stop: int, weights: Tensor, inverse_diagonal: Tensor) -> Tensor:
        if Need.GRAM in self._pruner.needs:
            return weights.square() / inverse_diagonal
        view = self._view
        columns = slice(start, stop)
        norm, gradient = view.input_norm, view.gradient
        part = replace(
            view,
            weight=weights,
            seed=view.seed + start,
            gram=None,
            input_norm=None if norm is None else norm[columns],
            gradient=None if gradient is None else gradient[:, columns],
        )
        with attributed(self._pruner.stage.components["prune"].record):
            return self._pruner.criterion.score(part)

    def _masked(self, score: Tensor, start: int, stop: int) -> Tensor:
        return score if self._old is None else score.masked_fill(~self._old[:, start:stop], float("-inf"))

    def _units(self, score: Tensor) -> Tensor:
        with attributed(self._pruner.stage.components["pattern"].record):
            return self._pruner.pattern.units({self._name: score})[self._name]

    def _expand(self, score: Tensor, count: int) -> Tensor:
        units = {self._name: self._units(score)}
        with attributed(self._pruner.stage.components["pattern"].record):
            keep = self._pruner.pattern.select(units, {self._name: count})
            return self._pruner.pattern.expand(keep, {self._name: score})[self._name]


def needs_calibration(stage: PlannedStage) -> bool:
    """Whether a stage wants calibration batches."""
    if "solver" in stage.components:
        return True
    return isinstance(stage.stage, PruneStage) and bool(stage.components["prune"].cls.needs & COLLECTED)


def reads_inputs(stage: PlannedStage) -> bool:
    """Whether a stage wants to know what goes into its layers."""
    if "solver" in stage.components:
        return True
    return isinstance(stage.stage, PruneStage) and bool(stage.components["prune"].cls.needs & INPUTS)
