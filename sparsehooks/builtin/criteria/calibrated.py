"""Criteria that look at what goes into a layer, on calibration batches."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsehooks import Criterion, Need, WeightView


class Wanda(Criterion):
    """Weights by the size of what they multiply (Sun et al. 2023, arXiv:2306.11695, equation 1).

    The paper compares within a row: ``pattern = { use = "unstructured", per = "row" }``, or N:M.
    """

    needs = frozenset({Need.INPUT_NORM})

    def score(self, view: WeightView) -> Tensor:
        """``|w_ij| norm(x_j)``."""
        assert view.input_norm is not None
        return view.weight.abs().float() * view.input_norm


class SparseGpt(Criterion):
    """What is lost if the other weights make up for it (Frantar and Alistarh 2023, arXiv:2301.00774, equation 3)."""

    needs = frozenset({Need.GRAM})

    def score(self, view: WeightView) -> Tensor:
        """``w_ij^2 / (H^-1)_jj`` with ``H = X^T X / n``, damped by 1 % of its mean diagonal."""
        assert view.gram is not None
        gram = view.gram.double()
        dead = gram.diagonal() == 0
        damping = 0.01 * gram.diagonal().mean()
        gram = gram + torch.diag(torch.where(dead, 1.0, damping))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)).diagonal()
        return (view.weight.double().square() / inverse).masked_fill(dead, 0.0).float()


class Influence(Criterion):
    """How much the block that holds the weight changes its input (Men et al. 2024, arXiv:2403.03853, equation 1).

    The same for all weights of a transformer block; for ``pattern = "layer"``.
    """

    needs = frozenset({Need.INFLUENCE})

    def score(self, view: WeightView) -> Tensor:
        """``1 - mean cos(block input, block output)``."""
        assert view.influence is not None
        return torch.full_like(view.weight, view.influence, dtype=torch.float32)
