"""Ranges: how far a quantizer's grid reaches.

All take (blocks, values) and give the lower ends (at most 0) and the upper ends (at least 0), float32 of shape
(blocks, 1). Zeros are left out where a share of the values counts: of a sparse weight nearly all would be zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsehooks.grids import Steps, min_max

Range = Literal["min_max", "percentile", "mse", "entropy", "half_quadratic"]
"""The ways to find a range."""
SHRINKS = 80
"""How many ranges the search for the least squared error tries, from the whole range down to a fifth of it."""
BINS = 2048
"""Bins of the histogram whose clipped versions are compared by their entropy."""
TINY = 1e-12
"""Counts where a logarithm needs more than zero."""


def percentile(blocks: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Without the largest and the smallest ``1 - share`` of the values that are not zero, in percent."""
    ordered = blocks.detach().to(torch.float32).masked_fill(blocks == 0, torch.nan).sort(dim=1).values  # NaN are last
    count = (~ordered.isnan()).sum(dim=1, keepdim=True)
    outside = ((1 - share / 100) * count).floor().long()
    last = (count - 1 - outside).clamp(min=0)
    low, high = ordered.gather(1, outside.clamp(max=ordered.shape[1] - 1)), ordered.gather(1, last)
    empty = count == 0
    return low.masked_fill(empty, 0).clamp(max=0), high.masked_fill(empty, 0).clamp(min=0)


def least_squares(blocks: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """The part of the whole range whose grid has the least squared error; the whole range is tried."""
    blocks = blocks.detach().to(torch.float32)
    low, high = min_max(blocks)

    def error(grid: dict[str, Tensor]) -> Tensor:
        scales, zeros = grid["scales"], grid.get("zeros")
        found = steps.values(steps.codes(blocks, scales, zeros), scales, zeros, torch.float32)
        return found.sub_(blocks).square_().sum(dim=1, keepdim=True)

    best = torch.ones_like(low)
    least = error(steps.fit(low, high))
    for index in range(1, SHRINKS):
        part = 1 - 0.8 * index / SHRINKS
        found = error(steps.fit(part * low, part * high))
        better = found < least
        best, least = torch.where(better, part, best), torch.where(better, found, least)
    return best * low, best * high


def entropy(blocks: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """The range whose quantized histogram has the least divergence from the clipped one (Migacz 2017, TensorRT)."""
    blocks = blocks.detach().to(torch.float32)
    low, high = min_max(blocks)
    limits = torch.stack([_entropy_limit(block[block != 0].abs(), steps) for block in blocks])[:, None]
    return torch.maximum(low, -limits), torch.minimum(high, limits)


def _entropy_limit(magnitudes: Tensor, steps: Steps) -> Tensor:
    if not magnitudes.numel() or not bool(magnitudes.isfinite().all()):
        return torch.full((), torch.inf, device=magnitudes.device)
    top = float(magnitudes.max())
    histogram = torch.histc(magnitudes, BINS, 0, top).double()
    levels = steps.most if steps.symmetric else steps.most // 2 + 1
    best = int(_divergences(histogram, levels).argmin()) + levels
    return torch.full((), top * best / BINS, device=magnitudes.device)


def _divergences(histogram: Tensor, levels: int) -> Tensor:
    """Of the histogram cut after ``levels`` bins, one bin more, ... and all bins, from cumulative sums.

    Of the first ``end`` bins, with what lies beyond them counted in the last, bin ``b`` has the level ``b * levels //
    end``; a level's counts are spread evenly over its bins that are not empty. An empty last bin takes next to nothing
    of them, and where all bins are empty nothing can be compared.
    """
    ends = torch.arange(levels, len(histogram) + 1, device=histogram.device)
    edges = -(-ends[:, None] * torch.arange(levels + 1, device=histogram.device) // levels)  # of the levels, rounded up

    def before(values: Tensor) -> Tensor:
        return F.pad(values.cumsum(0), (1, 0))

    counts, filled = before(histogram), before((histogram > 0).double())
    members, bins = counts[edges].diff(), filled[edges].diff()
    inside, total, last = counts[ends], counts[-1], histogram[ends - 1]
    beyond = total - inside
    alone = torch.where(last == 0, beyond, 0)
    spread = members / bins.clamp(min=1)
    members[:, -1] += beyond - alone
    cross = torch.xlogy(members, spread).sum(dim=1) + torch.xlogy(alone, TINY)
    cross -= total * (inside + TINY * (alone > 0)).log()
    own = before(torch.xlogy(histogram, histogram))[ends - 1] + torch.xlogy(last + beyond, last + beyond)
    return ((own - total * total.log() - cross) / total).masked_fill(inside == 0, torch.inf)


def half_quadratic(
    blocks: Tensor, steps: Steps, *, power: float = 0.7, beta: float = 10.0, growth: float = 1.01, rounds: int = 20
) -> tuple[Tensor, Tensor]:
    """The range that HQQ moves to: its error in the norm ``power`` is never larger than of the whole range.

    Half-quadratic splitting of the error into what is sparse and the rest (Badri and Shaji 2023, mobiusml.github.io/
    hqq_blog, with its defaults); there the zero point moves and is a float, here it stays a whole number, so that zero
    stays on the grid, and what moves is the range around it.
    """
    blocks = blocks.detach().to(torch.float32)
    low, high = min_max(blocks)

    def error(grid: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        scales, zeros = grid["scales"], grid.get("zeros")
        found = steps.values(steps.codes(blocks, scales, zeros), scales, zeros, torch.float32)
        return found, (blocks - found).abs().pow(power).sum(dim=1, keepdim=True)

    found, least = error(steps.fit(low, high))
    best_low, best_high = low, high
    for _ in range(rounds):
        missed = blocks - found
        sparse = missed.sign() * (missed.abs() - missed.abs().clamp(min=1e-8).pow(power - 1) / beta).clamp(min=0)
        # the scale that fits the codes to what is left, by least squares
        grid = steps.fit(low, high)
        signed = steps.codes(blocks, grid["scales"], grid.get("zeros"))
        signed = signed if "zeros" not in grid else signed - grid["zeros"]
        fitted = (signed * (blocks - sparse)).sum(dim=1, keepdim=True) / signed.square().sum(dim=1, keepdim=True)
        part = (fitted / grid["scales"]).nan_to_num(1.0).clamp(0.2, 1.5)
        low, high = part * low, part * high
        found, now = error(steps.fit(low, high))
        better = now < least
        least = torch.where(better, now, least)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
        beta *= growth
    return best_low, best_high


def find_range(blocks: Tensor, how: Range, steps: Steps, share: float) -> tuple[Tensor, Tensor]:
    """By name."""
    simple: dict[Range, Callable[[], tuple[Tensor, Tensor]]] = {
        "min_max": lambda: min_max(blocks),
        "percentile": lambda: percentile(blocks, share),
        "mse": lambda: least_squares(blocks, steps),
        "entropy": lambda: entropy(blocks, steps),
        "half_quadratic": lambda: half_quadratic(blocks, steps),
    }
    assert set(simple) == set(get_args(Range))
    return simple[how]()
