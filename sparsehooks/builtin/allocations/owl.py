"""Outlier-weighed layer-wise sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsehooks import Allocation, SessionError, least_counts
from sparsehooks.builtin.allocations.over_all import Options as Floor, whole


@dataclass(frozen=True)
class Options(Floor):
    """The options of OWL.

    Attributes:
        outlier: how many times the mean of its layer a score must exceed.
        spread: how far a layer's sparsity may lie from the mean.
    """

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.outlier > 0:
            raise ValueError(f"'outlier' = {self.outlier} is not positive")
        if not 0.0 < self.spread < 1.0:
            raise ValueError(f"'spread' = {self.spread} is outside (0, 1)")


class Owl(Allocation):
    """Layers with more outliers keep more (Yin et al. 2023, arXiv:2310.05175, section 3.2).

    The share of scores above ``outlier`` times their mean, scaled to a range of twice ``spread`` over all layers, is
    added to the density. The mean weighs each layer by its units, so that the whole meets the budget.
    """

    Config = Options
    config: Options

    def keep(
        self, units: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], sparsity: float
    ) -> Mapping[str, int]:
        """The budget, moved between layers."""
        sizes = {name: unit.numel() for name, unit in units.items()}
        shares = {name: self._outliers(name, unit) for name, unit in units.items()}
        low, high = min(shares.values()), max(shares.values())
        spread = min(self.config.spread, sparsity, 1 - sparsity)
        scaled = {n: (share - low) / (high - low) * 2 * spread if high > low else 0.0 for n, share in shares.items()}
        mean = sum(scaled[name] * size for name, size in sizes.items()) / sum(sizes.values())
        least = least_counts(sizes, self.config.floor) if sparsity < 1 else dict.fromkeys(sizes, 0)
        wanted = {n: (1 - sparsity + scaled[n] - mean) * size for n, size in sizes.items()}
        return whole(wanted, sizes, least, sum(sizes.values()) - round(sparsity * sum(sizes.values())))

    def _outliers(self, name: str, unit: Tensor) -> float:
        here = unit[unit != float("-inf")].float()
        if not here.numel():
            return 0.0
        if here.min() < 0:  # learned scores: all of them, or none, would exceed the mean
            raise SessionError(
                f"{name}: the allocation 'owl' compares scores with their mean, and some are negative; use a criterion "
                "such as 'wanda'"
            )
        return float((here > self.config.outlier * here.mean()).float().mean())
