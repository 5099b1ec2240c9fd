"""Magnitude."""

from __future__ import annotations

from torch import Tensor

from sparsehooks import Criterion, WeightView


class Magnitude(Criterion):
    """The absolute value of the weight (Han et al. 2015, arXiv:1506.02626)."""

    def score(self, view: WeightView) -> Tensor:
        """``|w|``."""
        return view.weight.abs()
