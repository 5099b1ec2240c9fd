"""LAMP."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsehooks import Criterion, WeightView


class Lamp(Criterion):
    """Layer-adaptive magnitude, to compare layers by (Lee et al. 2021, arXiv:2010.07611, equation 3)."""

    def score(self, view: WeightView) -> Tensor:
        """``w_u^2 / sum of w_v^2 over all v with |w_v| >= |w_u|``; 1 for the largest weight of every layer."""
        squares = view.weight.flatten().to(torch.float64).square()
        ascending, order = squares.sort(stable=True)
        larger = ascending.flip(0).cumsum(0).flip(0)
        first = torch.searchsorted(ascending, ascending)  # equal weights count each other
        scores = torch.empty_like(squares)
        scores[order] = torch.where(ascending > 0, ascending / larger[first], 0.0)
        return scores.float().reshape(view.weight.shape)
