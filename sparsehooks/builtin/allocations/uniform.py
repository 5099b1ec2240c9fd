"""Uniform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparsehooks import Allocation


class Uniform(Allocation):
    """The same share of every layer goes, rounded to whole units."""

    reads_scores = False

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], sparsity: float
    ) -> Mapping[str, int]:
        """``n - round(sparsity * n)`` of each matrix."""
        return {name: score.numel() - round(sparsity * score.numel()) for name, score in units.items()}
