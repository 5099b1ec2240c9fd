"""Criteria that look at the gradient of the loss."""

from __future__ import annotations

from torch import Tensor

from sparsehooks import Criterion, Need, WeightView


class Gradient(Criterion):
    """The absolute value of the gradient: how fast the loss changes (grows weights in RigL, Evci et al. 2020)."""

    needs = frozenset({Need.GRADIENT})

    def score(self, view: WeightView) -> Tensor:
        """``|g|``."""
        assert view.gradient is not None
        return view.gradient.abs()


class Taylor(Criterion):
    """How much the loss would change to first order (Molchanov et al. 2019, arXiv:1906.10771, equation 8)."""

    needs = frozenset({Need.GRADIENT})

    def score(self, view: WeightView) -> Tensor:
        """``|w g|``."""
        assert view.gradient is not None
        return (view.weight.float() * view.gradient.float()).abs()  # float16 would lose most products


class Snip(Taylor):
    """The sensitivity ``|dL/dm| = |w g|`` of the loss to a mask of ones, before training (Lee et al. 2019).

    arXiv:1810.02340, equation 5. In a loop the first step's gradient decides, before that step is made: accumulate
    gradients for more batches. The paper divides by the sum over all layers, which changes no comparison and is left
    out.
    """


class Momentum(Criterion):
    """The running mean of the gradient (Dettmers and Zettlemoyer 2019, arXiv:1907.04840)."""

    needs = frozenset({Need.GRADIENT, Need.MOMENTUM})

    def score(self, view: WeightView) -> Tensor:
        """``|m|``."""
        assert view.momentum is not None
        return view.momentum.abs()
