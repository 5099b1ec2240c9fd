"""Ranges: how far a quantizer's grid reaches.

All take (blocks, values) and give the lower ends (at most 0) and the upper ends (at least 0), float32 of shape
(blocks, 1). Zeros are left out where a share of the values counts: of a sparse weight nearly all would be zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from sparsehooks.grids import Steps, min_max

Range = Literal["min_max", "percentile", "mse", "entropy", "half_quadratic"]
"""The ways to find a range."""
SHRINKS = 80
"""How many ranges the search for the least squared error tries, from the whole range down to a fifth of it."""
BINS = 2048
"""Bins of the histogram whose clipped versions are compared by their entropy."""


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
    found = []
    for end in range(levels, BINS + 1):
        clipped = histogram[:end].clone()
        clipped[-1] += histogram[end:].sum()
        level = torch.arange(end, device=histogram.device) * levels // end
        sums, full = torch.zeros(2, levels, dtype=torch.float64, device=histogram.device)
        sums.index_add_(0, level, histogram[:end])
        full.index_add_(0, level, (histogram[:end] > 0).double())
        spread = torch.where(histogram[:end] > 0, (sums / full.clamp(min=1))[level], 0)
        kept = clipped > 0
        spread = spread[kept].clamp(min=1e-12)
        share = clipped[kept] / clipped.sum()
        found.append((share * (share / (spread / spread.sum())).log()).sum())
    best = int(torch.stack(found).argmin()) + levels
    return torch.full((), top * best / BINS, device=magnitudes.device)


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
