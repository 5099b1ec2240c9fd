"""Erdos-Renyi-kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from sparsehooks import Allocation, least_counts
from sparsehooks.builtin.allocations.over_all import Options, whole


class Erk(Allocation):
    """Small layers stay denser (Evci et al. 2020, arXiv:1911.11134, appendix; Mocanu et al. 2018).

    The density of a layer is ``epsilon * sum(dimensions) / product(dimensions)``, kernel dimensions included; layers
    that would be more than dense stay dense, and ``epsilon`` meets the budget with the others.
    """

    Config = Options
    config: Options
    reads_scores = False

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], sparsity: float
    ) -> Mapping[str, int]:
        """By the shapes alone."""
        sizes = {name: unit.numel() for name, unit in units.items()}
        raw = {n: sum(shapes.get(n, (size,))) / math.prod(shapes.get(n, (size,))) for n, size in sizes.items()}
        total = sum(sizes.values())
        least = least_counts(sizes, self.config.floor) if sparsity < 1 else dict.fromkeys(sizes, 0)

        def wanted(epsilon: float) -> dict[str, float]:
            return {n: min(size, max(least[n], epsilon * raw[n] * size)) for n, size in sizes.items()}

        low, high = 0.0, 1 / min(raw.values())
        while low < (epsilon := (low + high) / 2) < high:  # until two floats lie side by side
            if sum(wanted(epsilon).values()) < (1 - sparsity) * total:
                low = epsilon
            else:
                high = epsilon
        return whole(wanted(high), sizes, least, total - round(sparsity * total))
