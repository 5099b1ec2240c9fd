"""What solvers get to solve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Choose = Callable[[int, int, Tensor, Tensor], Tensor]
"""Which weights of some columns stay; see ``Solver.solve``."""
Quantize = Callable[[Tensor, slice], Tensor]
"""Some columns of a layer on the grid that they will lie on."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer.

    Attributes:
        name: of the weight, for messages.
        weight: (rows, columns), float32.
        gram: ``X^T X / tokens`` of the layer's inputs, undamped, float32, shape (columns, columns).
        group: where the pattern chooses within groups of so many columns (the m of N:M), how many; else None.
    """

    name: str
    weight: Tensor
    gram: Tensor
    group: int | None = None


@dataclass(frozen=True, eq=False)
class BalanceProblem:
    """Layers that share their input.

    Attributes:
        weights: by name, (rows, columns), float32.
        gram: of the input they share, as of a ``LayerProblem``.
        input_mean: the mean magnitude of each input feature, float32, (columns,).
        input_peak: the largest one.
        quantize: puts a weight on a grid of its own.
    """

    weights: Mapping[str, Tensor]
    gram: Tensor
    input_mean: Tensor
    input_peak: Tensor
    quantize: Callable[[Tensor], Tensor]
