"""Ramps from 0 to 1 over a window."""

from __future__ import annotations

import math

from sparsehooks import Moment, Schedule


class OneShot(Schedule):
    """Everything at ``start``."""

    Config = Moment

    def sparsity(self, progress: float) -> float:
        """1."""
        return 1.0


class Linear(Schedule):
    """In equal steps."""

    def sparsity(self, progress: float) -> float:
        """``p``."""
        return progress


class Cubic(Schedule):
    """Fast while weights are redundant, then slowly (Zhu and Gupta 2017, arXiv:1710.01878, equation 1)."""

    def sparsity(self, progress: float) -> float:
        """``1 - (1 - p)^3``."""
        return 1 - (1 - progress) ** 3


class Cosine(Schedule):
    """Slowly, fast, slowly."""

    def sparsity(self, progress: float) -> float:
        """``(1 - cos(pi p)) / 2``."""
        return (1 - math.cos(math.pi * progress)) / 2
