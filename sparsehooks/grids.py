"""Uniform grids: integer codes times a scale, for a whole matrix, each row, or groups of columns.

A value is ``scale * (code - zero)``. Scales have so few significant bits that this product is exact in float32: 17 for
symmetric grids, whose codes have 7 bits, and 16 for asymmetric ones, whose codes differ from zero by up to 8. So the
grid can be read back from the values alone, and quantizing a second time with the same grid changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2.0**-126
"""The smallest normal float32; a row with smaller steps is rounded to multiples of it."""


def significant(values: Tensor, bits: int) -> Tensor:
    """Positive float32 values, rounded to so many significant bits, ties to even."""
    dropped = 24 - bits
    raw = values.view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((raw >> dropped) & 1)
    return ((raw + half) & -(1 << dropped)).view(torch.float32)


def largest_scale(code: int, bits: int) -> float:
    """The largest number of so many significant bits that gives a finite float32 times a code."""
    mantissa, exponent = math.frexp(torch.finfo(torch.float32).max / code)
    return math.ldexp(math.floor(mantissa * (1 << bits)), exponent - bits)


@dataclass(frozen=True)
class Steps:
    """The codes of a uniform grid.

    Attributes:
        bits: of a code, 2 to 8.
        symmetric: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1 and no zero point; else from 0 to 2^bits - 1.
    """

    bits: int
    symmetric: bool = True

    @property
    def least(self) -> int:
        """The smallest code."""
        return -self.most if self.symmetric else 0

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def fit(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """The grid that covers ranges.

        Args:
            low: the lower ends, at most 0, float32, any shape.
            high: the upper ends, at least 0, of the same shape.

        Returns:
            ``scales`` float32 and, of an asymmetric grid, ``zeros`` uint8, of the shape of the ranges; a range of
            nothing but zero has the scale 1. Where a range is not finite the scale is NaN: this runs in every forward
            of quantized training, where a check would stop the device and ``torch.compile``.
        """
        width = torch.maximum(-low, high) if self.symmetric else high - low
        bits = 17 if self.symmetric else 16
        steps = (width / self.most).clamp(SMALLEST, largest_scale(self.most, bits))
        scales = significant(steps.contiguous(), bits)
        scales = scales.masked_fill(width == 0, 1.0).masked_fill(~torch.isfinite(width), torch.nan)
        if self.symmetric:
            return {"scales": scales}
        zeros = torch.where(torch.isfinite(scales), (-low / scales).round_(), 0)
        return {"scales": scales, "zeros": zeros.clamp_(0, self.most).to(torch.uint8)}

    def codes(self, blocks: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """The nearest code of each value, ties to even: float32, of the shape of the values."""
        codes = (blocks.to(torch.float32) * (1 / scales)).round_()
        if zeros is not None:
            codes.add_(zeros)
        return codes.clamp_(self.least, self.most)

    def values(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What codes stand for, rounded to ``dtype``; a zero is always +0.0."""
        signed = codes.to(torch.float32) if zeros is None else codes.to(torch.float32) - zeros
        return (signed * scales).to(dtype).add_(0.0)


def min_max(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The lower end (at most 0) and the upper end (at least 0) of each block: float32, (blocks, 1)."""
    low, high = blocks.detach().aminmax(dim=1, keepdim=True)
    return low.to(torch.float32).clamp(max=0), high.to(torch.float32).clamp(min=0)


def read_grid(blocks: Tensor, steps: Steps) -> dict[str, Tensor] | None:
    """The grid that values lie on, found from the values alone: what ``Steps.fit`` gave, or a coarser one.

    Args:
        blocks: (blocks, values), any floating dtype.
        steps: the codes that the grid may have.

    Returns:
        ``scales`` float32 and, of an asymmetric grid, ``zeros`` uint8, both (blocks, 1), from which ``steps.values``
        gives back every bit of the values; None if some block lies on no such grid, as what is not finite never does.
    """
    blocks = blocks.detach()
    if not _may_lie(blocks[:: max(1, len(blocks) // 8)], steps):
        return None  # at little cost
    values, reach = blocks.to(torch.float32), _reach(blocks, steps)
    if not reach.isfinite().all():
        return None
    scales, lowest = torch.ones_like(values[:, :1]), torch.zeros_like(values[:, :1])
    left = (reach > 0).flatten().nonzero().flatten()
    for size in range(steps.most, 0, -1):
        if not len(left):
            break
        tried = _scales(reach[left] / size, steps)
        codes = (values[left] / tried).round_()
        fits = (steps.values(codes, tried, None, blocks.dtype) == blocks[left]).all(dim=1)
        chosen = left[fits]
        scales[chosen], lowest[chosen] = tried[fits], codes[fits].amin(dim=1, keepdim=True).clamp(max=0)
        left = left[~fits]
    if len(left):
        return None
    return {"scales": scales} if steps.symmetric else {"scales": scales, "zeros": (-lowest).to(torch.uint8)}


def _may_lie(blocks: Tensor, steps: Steps) -> bool:
    """Whether each block has a grid for some of its values: of all sizes at once."""
    few = blocks[:, :: -(-blocks.shape[1] // 64)]
    sizes = torch.arange(1, steps.most + 1, device=blocks.device)[:, None, None]
    tried = _scales(_reach(blocks, steps) / sizes, steps)
    codes = (few.to(torch.float32) / tried).round_()
    fits = (steps.values(codes, tried, None, blocks.dtype) == few).all(dim=2)
    return bool(fits.any(dim=0).all())


def _reach(blocks: Tensor, steps: Steps) -> Tensor:
    """What the steps of a grid span: float64, (blocks, 1)."""
    low, high = (end.double() for end in min_max(blocks))
    return torch.maximum(-low, high) if steps.symmetric else high - low


def _scales(exact: Tensor, steps: Steps) -> Tensor:
    return significant(exact.to(torch.float32).clamp(min=SMALLEST), 17 if steps.symmetric else 16)


def fake_quantize(blocks: Tensor, scales: Tensor, zeros: Tensor | None, steps: Steps, *, clips: bool) -> Tensor:
    """Values on their grid, with a straight-through gradient (Bengio et al. 2013, arXiv:1308.3432).

    Args:
        blocks: (blocks, values).
        scales: float32, (blocks, 1).
        zeros: uint8, (blocks, 1), of an asymmetric grid.
        steps: the codes.
        clips: whether values may lie outside the range; the gradient is zero there.
    """
    made: Tensor = _FakeQuantize.apply(blocks, scales, zeros, steps, clips)  # type: ignore[no-untyped-call]
    return made


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, scales: Tensor, zeros: Tensor | None, steps: Steps, clips: bool) -> Tensor:
        ctx.clips = clips
        codes = (blocks.to(torch.float32) * (1 / scales)).round_()
        if zeros is not None:
            codes.add_(zeros)
        if clips:
            ctx.save_for_backward((codes >= steps.least) & (codes <= steps.most))
        codes.clamp_(steps.least, steps.most)
        if zeros is not None:
            codes.sub_(zeros)
        return codes.mul_(scales).to(blocks.dtype).add_(0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        if ctx.clips:
            gradient = gradient * ctx.saved_tensors[0]
        return gradient, None, None, None, None
