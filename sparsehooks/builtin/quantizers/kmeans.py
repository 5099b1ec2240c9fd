"""A codebook by k-means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sparsehooks import Quantizer

FINE, COARSE = 1 << 16, 1 << 10
"""Bins of the histograms on which clusters move, and on which their start is optimal."""
ROUNDS = 100


@dataclass(frozen=True)
class Options:
    """The options of a k-means codebook.

    Attributes:
        bits: of an index, 1 to 8: of a sparse weight the 2^bits values are all for weights that are not zero; of a
            dense one zero is one of them.
        start: where the centroids start: at the best clusters of a histogram ("optimal"), or equally far apart
            between the smallest and the largest weight ("linear", as in Deep Compression).
        learning_rate: of the centroids.
    """

    bits: int = 4
    start: Literal["optimal", "linear"] = "optimal"
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"'bits' = {self.bits} is outside 1 to 8")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"'learning_rate' = {self.learning_rate} is not a positive number, such as 0.0001")


class KMeans(Quantizer):
    """Few shared values, found by k-means and trained on (Han et al. 2016, arXiv:1510.00149, section 3).

    Which weight shares which value is fixed when the stage begins; from then on a value receives the sum of its
    members' gradients (equation 3), and the weights themselves a zero. Zeros stay zero.
    """

    Config = Options
    config: Options
    learned: ClassVar[tuple[str, ...]] = ("codebook",)
    trains_weights = False

    def grid(self, weight: Tensor) -> dict[str, Tensor]:
        """``codebook`` float32, zero and then the centroids in ascending order; ``codes`` uint8 or int16, indices."""
        values = weight.detach().to(torch.float32)
        there = values[values != 0]
        if not bool(there.isfinite().all()):
            raise ValueError("values that are not finite cannot be clustered")
        sparse = there.numel() <= values.numel() // 2
        count = (1 << self.config.bits) - (0 if sparse else 1)
        found = clusters(there.cpu().numpy(), max(1, count), self.config.start)
        codebook = torch.cat([torch.zeros(1), torch.from_numpy(found)]).to(weight.device)
        return {"codebook": codebook, "codes": self._assign(values, codebook)}

    def learning_rate(self) -> float:
        """As the options say."""
        return self.config.learning_rate

    def quantize(self, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """The fixed indices; 0 where the weight is zero."""
        codes = grid["codes"] if "codes" in grid else self._assign(weight.detach(), grid["codebook"].detach())
        return codes.masked_fill(weight.detach() == 0, 0)

    def dequantize(self, codes: Tensor, grid: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Look the values up."""
        return grid["codebook"].detach()[codes.long()].to(dtype).add_(0.0)

    def fake_quantize(self, weight: Tensor, grid: Mapping[str, Tensor] | None = None) -> Tensor:
        """The gradient is the codebook's alone, once the codes are fixed; before, the weight's."""
        if grid is None or not grid["codebook"].requires_grad:
            return super().fake_quantize(weight, grid)
        codes = self.quantize(weight, grid)
        made: Tensor = _LookUp.apply(weight, grid["codebook"], codes)  # type: ignore[no-untyped-call]
        return made

    def columns(self, grid: Mapping[str, Tensor], start: int, stop: int) -> Mapping[str, Tensor]:
        """The codebook: columns alone take the values that are nearest."""
        return {"codebook": grid["codebook"]}

    @staticmethod
    def _assign(values: Tensor, codebook: Tensor) -> Tensor:
        centroids = codebook[1:]
        codes = torch.bucketize(values.to(torch.float32).contiguous(), (centroids[1:] + centroids[:-1]) / 2) + 1
        small = torch.uint8 if len(codebook) <= 256 else torch.int16
        return codes.masked_fill_(values == 0, 0).to(small)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.size = len(codebook)
        return codebook[codes.long()].to(weight.dtype).add_(0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (codes,) = gradients, ctx.saved_tensors
        total = torch.zeros(ctx.size, dtype=torch.float32, device=codes.device)
        total.index_add_(0, codes.flatten().long(), gradient.flatten().to(torch.float32))
        total[0] = 0.0  # zero stays zero
        return torch.zeros_like(gradient), total, None  # a zero, not none: DDP waits for every parameter's gradient


def clusters(values: np.ndarray, count: int, start: Literal["optimal", "linear"] = "optimal") -> np.ndarray:
    """At most so many centroids of one-dimensional values, ascending, float32.

    Lloyd's rounds run on a histogram of 65,536 bins, exact in counts and sums; the optimal start is that of dynamic
    programming on 1,024 bins (Wang and Song 2011, Ckmeans.1d.dp).
    """
    if not values.size:
        return np.zeros(1, np.float32)
    weights, means = _histogram(values, FINE)
    if len(means) <= count:
        return means.astype(np.float32)
    equal = start == "linear"
    centroids = np.linspace(means[0], means[-1], count) if equal else _optimal(weights, means, count)
    sums = np.concatenate([[0.0], np.cumsum(weights * means)])
    counts = np.concatenate([[0.0], np.cumsum(weights)])
    for _ in range(ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(means, (centroids[1:] + centroids[:-1]) / 2), [len(means)]])
        members = counts[edges[1:]] - counts[edges[:-1]]
        moved = (sums[edges[1:]] - sums[edges[:-1]]) / np.maximum(members, 1)
        moved = np.where(members > 0, moved, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return np.unique(centroids.astype(np.float32))


def _histogram(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """How many values lie in each bin that is not empty, and their mean, float64."""
    if values.size <= bins:
        means, weights = np.unique(values.astype(np.float64), return_counts=True)
        return weights.astype(np.float64), means
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.array([float(values.size)]), np.array([low])
    place = np.minimum(((values - low) * (bins / (high - low))).astype(np.int32), bins - 1)
    weights = np.bincount(place, minlength=bins).astype(np.float64)
    sums = np.bincount(place, weights=values, minlength=bins)
    there = weights > 0
    return weights[there], sums[there] / weights[there]


def _optimal(weights: np.ndarray, means: np.ndarray, count: int) -> np.ndarray:
    """The best centroids of a histogram of up to 1,024 bins; of a finer one, its bins are put together first."""
    edges = np.arange(len(means) + 1)
    if len(means) > COARSE:
        edges = np.searchsorted(means, np.linspace(means[0], means[-1], COARSE + 1))
        edges[-1] = len(means)
        edges = np.unique(edges)
    parts = [np.concatenate([[0.0], np.cumsum(weights * means**power)])[edges] for power in (0, 1, 2)]
    total, first, second = (part[None, :] - part[:, None] for part in parts)  # of the bins from row to column
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = second - first**2 / total
    cost[~(total > 0)] = np.inf
    best, cuts = cost[0], []
    for _ in range(count - 1):
        tried = best[:, None] + cost
        cuts.append(tried.argmin(axis=0))
        best = tried.min(axis=0)
    stops = [len(edges) - 1]
    for cut in reversed(cuts):
        stops.append(int(cut[stops[-1]]))
    stops = [*stops[::-1]]
    starts = [0, *stops[:-1]]
    pairs = [(a, b) for a, b in zip(starts, stops, strict=True) if b > a]
    return np.array([(parts[1][b] - parts[1][a]) / (parts[0][b] - parts[0][a]) for a, b in pairs])
