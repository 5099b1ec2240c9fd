"""Weights put on their grids by a solver, without training, so that the outputs of their layers change little."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsehooks.balancing import Balance, balances
from sparsehooks.components import Quantizer, Solver
from sparsehooks.errors import SessionError
from sparsehooks.masks import check_finite
from sparsehooks.plugins import attributed
from sparsehooks.problems import BalanceProblem, LayerProblem, Quantize
from sparsehooks.running import Run
from sparsehooks.sequential import Evidence, Rerun
from sparsehooks.stages import PlannedStage
from sparsehooks.targets import Target

Grid = dict[str, Tensor]


def fitted(stage: PlannedStage, quantizer: Quantizer, matrix: Tensor) -> tuple[Grid, Quantize]:
    """The grid of a matrix, and how some of its columns go onto it, float32."""
    with attributed(stage.components["quantize"].record):
        grid = dict(quantizer.columns(quantizer.grid(matrix), 0, matrix.shape[1]))

    def project(values: Tensor, columns: slice) -> Tensor:
        with attributed(stage.components["quantize"].record):
            part = quantizer.columns(grid, columns.start, columns.stop)
            return quantizer.dequantize(quantizer.quantize(values, part), part, torch.float32)

    return grid, project


class Rounding:
    """A solver at work on the targets of a quantize stage.

    Args:
        stage: planned.
        quantizer: of the stage.
        solver: of the stage.
        run: of the session.
        fixed: the names of weights that lie on their grids already.

    Attributes:
        grids: on which each weight lies now, by its name.
    """

    def __init__(
        self, stage: PlannedStage, quantizer: Quantizer, solver: Solver, run: Run, fixed: Collection[str]
    ) -> None:
        self._stage, self._quantizer, self._solver, self._run, self._fixed = stage, quantizer, solver, run, fixed
        self._scaled = 0
        self.grids: dict[str, Grid] = {}

    def visit(self, targets: Sequence[Target], evidence: Evidence, rerun: Rerun | None) -> None:
        """Balance and solve targets that were measured together."""
        known: dict[str, Mapping[str, Any]] = dict(evidence)
        if rerun is not None and self._scales:
            for balance in balances(self._run.model, targets, known, rerun, self._fixed):
                self._balance(balance, known)
        for target in targets:
            self._solve(target, known[target.parameter])

    def end(self) -> None:
        """Warn if the solver scales inputs, and found none that it can scale."""
        if self._scales and self.grids and not self._scaled:
            name = self._stage.components["solver"].record.component.name
            warnings.warn(
                f"{self._stage.label}: '{name}' found no input that it can scale, and only rounded to the nearest; "
                "use 'gptq'",
                stacklevel=2,
            )

    @property
    def _scales(self) -> bool:
        return type(self._solver).balance is not Solver.balance

    def _balance(self, balance: Balance, known: dict[str, Mapping[str, Any]]) -> None:
        weights = {t.parameter: t.matrix(self._run.weight(t).detach()).float() for t in balance.targets}
        shared = known[balance.targets[0].parameter]

        def quantize(matrix: Tensor) -> Tensor:
            return fitted(self._stage, self._quantizer, matrix)[1](matrix, slice(0, matrix.shape[1]))

        problem = BalanceProblem(weights, shared["gram"], shared["input_mean"], shared["input_peak"], quantize)
        with attributed(self._stage.components["solver"].record):
            factors = self._solver.balance(problem)
        if factors is None:
            return
        check_finite(f"factors of the inputs of '{balance.targets[0].parameter}'", factors, "exclude the layer")
        balance.apply(factors)
        self._scaled += 1
        for target in balance.targets:
            gram = shared["gram"] / (factors[:, None] * factors)
            known[target.parameter] = {**known[target.parameter], "gram": gram}

    def _solve(self, target: Target, evidence: Mapping[str, Any]) -> None:
        name, weight = target.parameter, self._run.weight(target)
        matrix = target.matrix(weight.detach())
        check_finite(f"weights of '{name}'", matrix, "the model is damaged")
        with attributed(self._stage.components["quantize"].record):
            reason = self._quantizer.check(matrix.shape)
        if reason is not None:
            raise SessionError(f"{self._stage.label}: '{name}' has shrunk, and {reason}; exclude it")
        keep = matrix != 0  # a weight that is sparse stays so, whoever has pruned it
        self.grids[name], project = fitted(self._stage, self._quantizer, matrix)
        gram, before = evidence["gram"], matrix.float()
        nearest = project(before * keep, slice(0, matrix.shape[1]))
        with attributed(self._stage.components["solver"].record):
            problem = LayerProblem(name, before.clone(), gram)
            solved, _ = self._solver.solve(problem, lambda start, stop, *_: keep[:, start:stop], project)
            check_finite(f"solved weights of '{name}'", solved, "raise the solver's damping")
        # rows do not depend on each other: none shall lose more than by rounding to the nearest
        worse = _loss(solved - before, gram) > _loss(nearest - before, gram)
        solved = torch.where(worse[:, None], nearest, solved)
        weight.copy_(target.restore(solved, weight.shape).to(weight.dtype))


def _loss(moved: Tensor, gram: Tensor) -> Tensor:
    """Of each row ``d H d^T``: the mean square by which its output changes."""
    return (moved @ gram).mul_(moved).sum(dim=1)
