"""Solvers that scale the inputs of layers, and then round to the nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsehooks import BalanceProblem, Choose, LayerProblem, Need, Quantize, Solver

SMALLEST = 1e-5
"""Of magnitudes and factors."""


class Scaling(Solver):
    """Rounds to the nearest."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUT_RANGE})
    serves = frozenset({"quantize"})

    def solve(self, layer: LayerProblem, choose: Choose, quantize: Quantize | None = None) -> tuple[Tensor, Tensor]:
        """All columns at once; of the inverse of the Gram matrix ``choose`` is told its uncorrelated form."""
        columns = slice(0, layer.weight.shape[1])
        mask = choose(0, columns.stop, layer.weight, 1 / layer.gram.diagonal().clamp(min=1e-12))
        weight = layer.weight * mask
        return (weight if quantize is None else quantize(weight, columns)), mask


@dataclass(frozen=True)
class AWQOptions:
    """The options of AWQ.

    Attributes:
        steps: how many exponents of the input's size are tried, from 0 on in equal steps below 1.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"'steps' = {self.steps} is not a number of exponents to try, such as 20")


class AWQ(Scaling):
    """Columns with large inputs are scaled up before rounding, by what loses least (Lin et al. 2023, arXiv:2306.00978).

    Factors ``mean|X|^r`` with r from a grid that begins at 0, where nothing is scaled (equations 4 and 5). What is lost
    is measured on the layers that share the input, ``tr(dW H dW^T)``; the paper measures it on the whole block, and
    then clips the weights, which here only the quantizer's range does.
    """

    Config = AWQOptions
    config: AWQOptions

    def balance(self, problem: BalanceProblem) -> Tensor:
        """The best of the factors."""
        found: list[tuple[float, Tensor]] = []
        for step in range(self.config.steps):
            factors = problem.input_mean.clamp(min=SMALLEST) ** (step / self.config.steps)
            factors = factors / (factors.max() * factors.min()).sqrt()
            loss = 0.0
            for weight in problem.weights.values():
                moved = problem.quantize(weight * factors) / factors - weight
                loss += float(((moved @ problem.gram) * moved).sum())
            found.append((loss, factors))
        return min(found, key=lambda item: item[0])[1]


@dataclass(frozen=True)
class SmoothQuantOptions:
    """The options of SmoothQuant.

    Attributes:
        alpha: how much of the difficulty moves from the activations to the weights, in [0, 1].
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"'alpha' = {self.alpha} is outside [0, 1]; 0.5 is the paper's")


class SmoothQuant(Scaling):
    """Activations are divided by what makes them as even as the weights (Xiao et al. 2023, arXiv:2211.10438).

    Factors ``max|X|^alpha / max|W|^(1 - alpha)`` (equation 4), for models whose activations are quantized too.
    """

    Config = SmoothQuantOptions
    config: SmoothQuantOptions

    def balance(self, problem: BalanceProblem) -> Tensor:
        """From the largest magnitudes of each feature."""
        tops = torch.stack([weight.abs().amax(dim=0) for weight in problem.weights.values()]).amax(dim=0)
        alpha, peak = self.config.alpha, problem.input_peak.clamp(min=SMALLEST)
        return (peak**alpha / tops.clamp(min=SMALLEST) ** (1 - alpha)).clamp(min=SMALLEST)
