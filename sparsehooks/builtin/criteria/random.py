"""Random."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsehooks import Criterion, WeightView


class Random(Criterion):
    """A uniform random number for each weight: the baseline that a criterion has to beat."""

    def score(self, view: WeightView) -> Tensor:
        """Drawn on the CPU from the view's own seed, so that every device and rank chooses the same."""
        return torch.rand(view.weight.shape, generator=view.generator()).to(view.weight.device)
