"""SparseGPT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsehooks import Choose, LayerProblem, Quantize, Solver
from sparsehooks.builtin.solvers.damping import Options, factor, without_dead

BLOCK = 128
"""Columns that are chosen at once, and whose errors reach the columns after them in one product."""
STRIP = 32
"""Columns of a block whose errors reach the rest of the block in one product."""


class SparseGPT(Solver):
    """Column by column: what a weight leaves behind is moved into the columns that follow (arXiv:2301.00774)."""

    Config = Options
    config: Options

    def solve(self, layer: LayerProblem, choose: Choose, quantize: Quantize | None = None) -> tuple[Tensor, Tensor]:
        """Blocks of 128 columns are chosen when they are reached; groups of N:M too."""
        return eliminate(layer, choose, quantize, self.config.damping)


def eliminate(
    layer: LayerProblem,
    choose: Choose,
    quantize: Quantize | None,
    damping: float,
    places: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fix the columns from left to right, each error moved into those that follow; see ``Solver.solve``.

    With a lower R and H = R^T R, what is lost is the sum over columns j of (sum over i <= j of R_ji d_i)^2, where d
    is what the columns moved by. The inverse that the papers update with is needed within a block only: R_bb^-1.
    ``places`` says which columns of the grid these are, if they are in another order.
    """
    gram, dead = without_dead(layer.gram)
    # one factorization, of H read backwards: R = J L^T J
    _, lower = factor(layer.name, gram.flip(0, 1), damping)
    root = lower.t().flip(0, 1)
    weight = layer.weight.t().contiguous()  # a column of the layer lies together
    weight[dead] = 0.0
    moved, mask = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    group = layer.group or BLOCK
    block = max(group, BLOCK // group * group)
    strip = STRIP // group * group or (group if group % STRIP else STRIP)
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        own = root[start:stop, start:stop]
        inverse = torch.linalg.solve_triangular(own, torch.eye(len(own)).to(own), upper=False)
        before = weight[start:stop].clone()
        if start:  # the optimum of what is still free
            weight[start:stop] += inverse @ (root[start:stop, :start] @ moved[:start])
        where = range(start, stop) if places is None else places[start:stop]
        part = _Block(weight[start:stop], mask[start:stop], inverse.t().contiguous(), start, where, group, strip)
        part.solve(choose, quantize)
        moved[start:stop] = before - weight[start:stop]
    return weight.t().contiguous(), mask.t().contiguous()


class _Block:
    """Columns that compensate for each other one by one.

    Args:
        weight: (columns, rows), replaced by what is chosen.
        mask: (columns, rows), filled.
        upper: the factor of the inverse, ``[H^-1] = U^T U`` over the columns from these on.
        start: the first of the columns in the layer.
        places: which columns of the grid they are.
        group: columns that are chosen at once.
        strip: columns whose errors reach the rest of the block in one product.
    """

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor,
        upper: Tensor,
        start: int,
        places: Sequence[int],
        group: int,
        strip: int,
    ) -> None:
        self._weight, self._mask, self._upper = weight, mask, upper
        self._start, self._places, self._group, self._strip = start, places, group, strip
        self._errors = torch.empty_like(weight)

    def solve(self, choose: Choose, quantize: Quantize | None) -> None:
        size, spread = len(self._weight), self._upper.diagonal().square()
        for first in range(0, size, self._strip):
            last = min(first + self._strip, size)
            for column in range(first, last):
                if column % self._group == 0:
                    end = min(column + self._group, size)
                    chosen = choose(
                        self._start + column, self._start + end, self._weight[column:end].t(), spread[column:end]
                    )
                    self._mask[column:end] = chosen.t()
                self._fix(column, last, quantize)
            if last < size:
                self._weight[last:].addmm_(self._upper[first:last, last:].t(), self._errors[first:last], alpha=-1)

    def _fix(self, column: int, last: int, quantize: Quantize | None) -> None:
        """Fix a column, and move its error into those up to ``last``."""
        old = self._weight[column]
        new = old * self._mask[column]
        if quantize is not None:
            place = self._places[column]
            new = quantize(new[:, None], slice(place, place + 1))[:, 0]
        error, row = self._errors[column], self._upper[column, column:last]
        torch.sub(old, new, out=error)
        error.div_(row[0])
        old.copy_(new)
        if column + 1 < last:
            self._weight[column + 1 : last].addr_(row[1:], error, alpha=-1)
