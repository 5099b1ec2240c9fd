"""SparseGPT."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsehooks import Choose, LayerProblem, Quantize, Solver
from sparsehooks.builtin.solvers.damping import Options, factor, without_dead

BLOCK = 128
"""Columns that are chosen at once, and whose errors reach the columns after them in one product."""
STRIP = 32
"""Columns of a block whose errors reach the rest of the block in one product."""
LEAF = 64


class SparseGPT(Solver):
    """Column by column: what a weight leaves behind is moved into the columns that follow (arXiv:2301.00774)."""

    Config = Options
    config: Options

    def solve(self, layer: LayerProblem, choose: Choose, quantize: Quantize | None = None) -> tuple[Tensor, Tensor]:
        """Blocks of 128 columns are chosen when they are reached; groups of N:M too."""
        gram, dead = without_dead(layer.gram)
        # H^-1 = U^T U with an upper U, by one factorization: of H read backwards, H = (J L J)(J L J)^T
        _, lower = factor(layer.name, gram.flip(0, 1), self.config.damping)
        upper = invert_lower(lower).flip(0, 1).contiguous()
        diagonal = upper.diagonal().clone()
        weight = layer.weight.t().contiguous()  # a column of the layer lies together
        weight[dead] = 0.0
        mask = torch.empty_like(weight, dtype=torch.bool)
        group = layer.group or BLOCK
        block = max(group, BLOCK // group * group)
        strip = group if group > STRIP else STRIP // group * group
        for start in range(0, len(weight), block):
            stop = min(start + block, len(weight))
            errors = torch.empty_like(weight[start:stop])
            for first in range(start, stop, strip):
                last = min(first + strip, stop)
                for column in range(first, last):
                    if (column - start) % group == 0:
                        end = min(column + group, stop)
                        if end > last:  # a block chosen as a whole, at its start
                            assert column == start
                        chosen = choose(column, end, weight[column:end].t(), diagonal[column:end].square())
                        mask[column:end] = chosen.t()
                    self._column(weight, mask, upper, errors, column, start, last, quantize)
                if last < stop:
                    weight[last:stop].addmm_(
                        upper[first:last, last:stop].t(), errors[first - start : last - start], alpha=-1
                    )
            if stop < len(weight):
                weight[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
        return weight.t().contiguous(), mask.t().contiguous()

    @staticmethod
    def _column(
        weight: Tensor,
        mask: Tensor,
        upper: Tensor,
        errors: Tensor,
        column: int,
        start: int,
        last: int,
        quantize: Quantize | None,
    ) -> None:
        """Fix a column, and move its error into those up to ``last``."""
        old = weight[column]
        new = old * mask[column]
        if quantize is not None:
            new = quantize(new[:, None], slice(column, column + 1))[:, 0]
        error = errors[column - start]
        torch.sub(old, new, out=error)
        row = upper[column, column:last]
        error.div_(row[0])
        old.copy_(new)
        if column + 1 < last:
            weight[column + 1 : last].addr_(row[1:], error, alpha=-1)


def invert_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in halves: nearly all of it products."""
    size = len(lower)
    if size <= LEAF:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return solved
    half = size // 2
    inverse = torch.zeros_like(lower)
    first, second = invert_lower(lower[:half, :half]), invert_lower(lower[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = -(second @ (lower[half:, :half] @ first))
    return inverse
