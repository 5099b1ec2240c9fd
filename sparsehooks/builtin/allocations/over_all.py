"""Global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsehooks import Allocation, top_counts


@dataclass(frozen=True)
class Options:
    """The option of allocations that may take nearly all of a layer.

    Attributes:
        floor: the least share of each layer that stays, in [0, 1); at least one unit does.
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(f"'floor' = {self.floor} is outside [0, 1); 0.01 keeps a hundredth of each layer")


class Global(Allocation):
    """One threshold over all layers of the stage; layers with smaller scores lose more."""

    Config = Options
    config: Options

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], sparsity: float
    ) -> Mapping[str, int]:
        """Where the ``n - round(sparsity * n)`` largest of all units lie."""
        total = sum(score.numel() for score in units.values())
        return top_counts(units, total - round(sparsity * total), None if sparsity == 1.0 else self.config.floor)


def whole(
    wanted: Mapping[str, float], sizes: Mapping[str, int], least: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Whole numbers within their bounds whose sum is the budget, where that can be."""
    counts = {name: min(sizes[name], max(least[name], int(value))) for name, value in wanted.items()}
    while missing := budget - sum(counts.values()):
        step = 1 if missing > 0 else -1
        free = [n for n in counts if (counts[n] < sizes[n] if step > 0 else counts[n] > least[n])]
        if not free:
            break
        each = max(1, abs(missing) // len(free))
        for name in free:
            room = sizes[name] - counts[name] if step > 0 else counts[name] - least[name]
            counts[name] += step * min(each, room, abs(budget - sum(counts.values())))
    return counts
