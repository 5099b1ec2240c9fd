"""Global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparsehooks import Allocation, top_counts


class Global(Allocation):
    """One threshold over all layers of the stage; layers with smaller scores lose more."""

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], sparsity: float
    ) -> Mapping[str, int]:
        """Where the ``n - round(sparsity * n)`` largest of all units lie."""
        total = sum(score.numel() for score in units.values())
        return top_counts(units, total - round(sparsity * total))
