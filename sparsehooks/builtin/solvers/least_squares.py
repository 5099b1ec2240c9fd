"""Least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsehooks import Choose, LayerProblem, Quantize, Solver
from sparsehooks.builtin.solvers.damping import Options, factor, without_dead

BYTES = 1 << 28
"""Of the systems that are solved at once."""


class LeastSquares(Solver):
    """The mask is chosen on the weights as they are; then each row gets the values with the least output error."""

    Config = Options
    config: Options
    serves = frozenset({"prune"})

    def solve(self, layer: LayerProblem, choose: Choose, quantize: Quantize | None = None) -> tuple[Tensor, Tensor]:
        """For each row the system of the columns that stay, many rows at once."""
        gram, dead = without_dead(layer.gram)
        damped, lower = factor(layer.name, gram, self.config.damping)
        before = layer.weight.masked_fill(dead, 0.0)
        rows, columns = before.shape
        mask = choose(0, columns, before, torch.cholesky_inverse(lower).diagonal())
        kept = mask.sum(dim=1)
        widest = int(kept.max())
        if widest == 0:
            return torch.zeros_like(before), mask
        wanted = before @ damped
        places = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :widest]
        here = torch.arange(widest, device=mask.device) < kept[:, None]
        weight = torch.zeros_like(before)
        at_once = max(1, BYTES // (4 * widest * widest))
        for start in range(0, rows, at_once):
            place, real = places[start : start + at_once], here[start : start + at_once]
            system = damped[place[:, :, None], place[:, None, :]]
            system = system * (real[:, :, None] & real[:, None, :])  # rows that keep less: zeros that stay zero
            system.diagonal(dim1=1, dim2=2).masked_fill_(~real, 1.0)
            right = wanted[start : start + at_once].gather(1, place) * real
            solved = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
            weight[start : start + at_once].scatter_(1, place, solved * real)
        weight = weight * mask
        return (weight if quantize is None else quantize(weight, slice(0, columns)) * mask), mask
