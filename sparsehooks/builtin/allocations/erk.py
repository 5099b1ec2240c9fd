"""Erdos-Renyi-kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from sparsehooks import Allocation, least_counts
from sparsehooks.builtin.allocations.over_all import Options


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
        budget = (1 - sparsity) * sum(sizes.values())
        dense: set[str] = set()
        while len(dense) < len(sizes):
            rest = [name for name in sizes if name not in dense]
            left = budget - sum(sizes[name] for name in dense)
            epsilon = left / sum(raw[name] * sizes[name] for name in rest)
            above = {name for name in rest if epsilon * raw[name] > 1}
            if not above:
                break
            dense.add(max(above, key=lambda name: raw[name]))
        least = least_counts(sizes, self.config.floor) if sparsity < 1 else {}
        return {
            name: size if name in dense else min(size, max(least.get(name, 0), round(epsilon * raw[name] * size)))
            for name, size in sizes.items()
        }
