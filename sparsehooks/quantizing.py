"""A quantize stage at work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsehooks import swapping
from sparsehooks.activations import exact_inputs
from sparsehooks.components import Need, Quantizer, Solver
from sparsehooks.masks import DIVERGED, check_finite
from sparsehooks.plugins import attributed
from sparsehooks.problems import Quantize
from sparsehooks.recipe import QuantizeStage
from sparsehooks.rounding import Grid, Rounding, fitted
from sparsehooks.running import Run
from sparsehooks.sharding import whole, write
from sparsehooks.stages import PlannedStage
from sparsehooks.targets import Target


class QuantizeRun:
    """Lets the layers of a stage compute with weights on their grids, from where its schedule begins.

    The grid of a weight is fitted in each forward, or when the stage begins; what it learns belongs to the session.
    When the stage freezes, all grids stay as they are. Without training, a solver may put the weights on their grids
    block by block, each block measured on what those before it give then.
    """

    def __init__(self, stage: PlannedStage, objects: Mapping[str, Any], run: Run) -> None:
        self._stage = stage
        self._quantizer = cast(Quantizer, objects["quantize"])
        self._solver = cast(Solver | None, objects.get("solver"))
        self._run = run
        self._grids: dict[str, Grid] = {}
        self._begun = self._frozen = False

    def advance(self, step: int) -> None:
        """Begin, if that is still to be done, and freeze when it is time."""
        if not self._begun:
            self._begun = True
            if self._run.optimizer is None:
                return  # without training the weights are projected as they are at the end
            if not self._quantizer.follows:
                self._fit()
                self._learn()
            self._swap()
        if not self._frozen and step >= cast(QuantizeStage, self._stage.stage).freezes(self._run.total_steps):
            self._frozen = True
            if self._quantizer.follows:
                self._fit()
            else:
                self._grids = {target.parameter: self._detached(target) for target in self._stage.targets}

    @torch.no_grad()
    def write(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Project these weights, by their names; only after all masks are written.

        Where a solver is at work, after the model has shrunk; else before, so that what was trained on is what stays.
        """
        targets = [target for target in self._stage.targets if self._begun and target.parameter in weights]
        if self.solves:
            self._solve(targets)
        for target in targets:
            weight = weights[target.parameter]
            matrix = target.matrix(whole(weight))
            self._check(target, matrix)
            with attributed(self._stage.components["quantize"].record):
                grid = self._grid(target) or self._quantizer.grid(matrix)
                found = self._quantizer.dequantize(self._quantizer.quantize(matrix, grid), grid, matrix.dtype)
            write(weight, target.restore(found, weight.shape))
        self._grids.clear()  # the values say it all

    @property
    def solves(self) -> bool:
        """Whether a solver puts the weights on their grids, by calibration batches."""
        return self._solver is not None and self._run.calibration is not None

    @property
    def learns(self) -> bool:
        """Whether the grids hold what the weights alone do not tell."""
        return not self._quantizer.follows or cast(QuantizeStage, self._stage.stage).freeze is not None

    def on_grid(self, target: Target, matrix: Tensor) -> Quantize | None:
        """The columns' way onto the grid of this matrix, for a solver that prunes too; None if it is not to solve."""
        if self._solver is None or target not in self._stage.targets:
            return None
        grid, project = fitted(self._stage, self._quantizer, matrix)
        self._grids[target.parameter] = grid
        return project

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"begun": self._begun, "frozen": self._frozen, "grids": {n: dict(g) for n, g in self._grids.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave, before what is learned comes back."""
        devices = {target.parameter: self._run.weight(target).device for target in self._stage.targets}
        self._grids = {
            name: {key: part.to(devices[name]) for key, part in grid.items()} for name, grid in state["grids"].items()
        }
        self._begun, self._frozen = state["begun"], state["frozen"]
        if self._begun:
            self._learn()
            self._swap()

    def _solve(self, targets: Sequence[Target]) -> None:
        calibration, solver = self._run.calibration, self._solver
        assert calibration is not None
        assert solver is not None
        free = [target for target in targets if target.parameter not in self._grids]
        rounding = Rounding(self._stage, self._quantizer, solver, self._run, self._grids.keys())
        with exact_inputs(self._run.model, calibration.batches):
            calibration.visit(free, rounding.visit, {Need.GRAM} | solver.needs)
        rounding.end()
        self._grids |= rounding.grids

    @torch.no_grad()
    def _fit(self) -> None:
        """Find the grids of the weights as the layers see them."""
        self._run.masks.apply()  # the optimizer's step has moved what they exclude
        for target in self._stage.targets:
            matrix = swapping.entering(self._run.model, target, "quantize")
            self._check(target, matrix)
            with attributed(self._stage.components["quantize"].record):
                self._grids[target.parameter] = self._quantizer.grid(matrix)

    def _learn(self) -> None:
        """Hand what the grids learn to the session."""
        for target in self._stage.targets:
            grid, device = self._grids.get(target.parameter, {}), self._run.weight(target).device
            made = {name: grid[name] for name in self._quantizer.learned if name in grid}
            self._run.learned.add(self._owner(target), made, device, self._quantizer.learning_rate())

    def _detached(self, target: Target) -> Grid:
        grid = self._grid(target)
        assert grid is not None
        return {name: part.detach().clone() for name, part in grid.items()}

    def _swap(self) -> None:
        for target in self._stage.targets:
            self._run.swap(target, "quantize", self._transform(target), None)

    def _transform(self, target: Target) -> Any:
        def quantize(matrix: Tensor, _: bool) -> Tensor:
            if not self._begun:  # an earlier checkpoint was loaded
                return matrix
            return self._quantizer.fake_quantize(matrix, self._grid(target))

        return quantize

    def _grid(self, target: Target) -> Grid | None:
        """As it is now; None if it follows the weight."""
        grid = self._grids.get(target.parameter)
        if grid is None or self._frozen:
            return grid
        return grid | self._run.learned.of(self._owner(target))

    def _owner(self, target: Target) -> str:
        return f"{self._stage.index}.{target.parameter}"

    def _check(self, target: Target, matrix: Tensor) -> None:
        check_finite(f"weights of '{target.parameter}'", matrix, DIVERGED)
