"""Uniform integer grids."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsehooks import Quantizer, Range, Steps, fake_quantize, find_range


@dataclass(frozen=True)
class Options:
    """The options of uniform grids.

    Attributes:
        bits: of a code, 2 to 8.
        symmetric: whether the codes lie around zero; else the range is fitted at both ends.
        per: what shares a scale: the whole matrix, each output row ("channel"), or ``group`` columns of a row. Of
            activations a row is a token.
        group: how many columns share a scale, with per = "group".
        range: how far the grid reaches: over all values ("min_max"), over a share of those that are not zero
            ("percentile"), with the least squared error ("mse"), with the least divergence of the histogram
            ("entropy", per = "tensor" only), or by half-quadratic splitting ("half_quadratic", HQQ).
        percentile: the share, in percent.
    """

    bits: int = 8
    symmetric: bool = True
    per: Literal["tensor", "channel", "group"] = "channel"
    group: int = 128
    range: Range = "min_max"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"'bits' = {self.bits} is outside 2 to 8")
        if self.group < 1:
            raise ValueError(f"'group' = {self.group} is not a number of columns, such as 128")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"'percentile' = {self.percentile} is outside (50, 100]")
        if self.range == "entropy" and self.per != "tensor":
            raise ValueError('range = "entropy" compares histograms of whole tensors; add per = "tensor"')
        if self.group != Options.group and self.per != "group":
            raise ValueError(
                f'\'group\' = {self.group} has no effect with per = "{self.per}"; add per = "group", or leave it out'
            )
        if self.percentile != Options.percentile and self.range != "percentile":
            raise ValueError(
                f"'percentile' = {self.percentile} has no effect with range = \"{self.range}\"; "
                'add range = "percentile", or leave it out'
            )


class Uniform(Quantizer):
    """Integers of 2 to 8 bits times a scale, symmetric or with a zero point.

    Scales are rounded so that every product is exact in float32: the grid can be read back from the values alone, and
    quantizing twice changes nothing. Training sees the grid through a straight-through gradient (Bengio et al. 2013,
    arXiv:1308.3432), zero where a value was clipped.
    """

    Config = Options
    config: Options

    @property
    def follows(self) -> bool:
        """The ranges that take one pass."""
        return self.config.range == "min_max"

    def check(self, shape: Sequence[int]) -> str | None:
        """Groups must divide the columns."""
        if self.config.per == "group" and shape[1] % self.config.group:
            near = math.gcd(shape[1], self.config.group)
            return f"its {shape[1]} input features do not divide by the group of {self.config.group}, but by {near}"
        return None

    def grid(self, weight: Tensor) -> dict[str, Tensor]:
        """``scales`` float32 and, of an asymmetric grid, ``zeros`` uint8: (1, 1), (rows, 1) or (rows, groups)."""
        blocks = self._blocks(weight.detach())
        low, high = find_range(blocks, self.config.range, self._steps, self.config.percentile)
        rows = 1 if self.config.per == "tensor" else len(weight)
        return {name: part.reshape(rows, -1) for name, part in self._steps.fit(low, high).items()}

    def quantize(self, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """int8, or uint8 of an asymmetric grid."""
        codes = self._steps.codes(self._blocks(weight.detach()), *self._parts(grid))
        return codes.to(torch.int8 if self.config.symmetric else torch.uint8).reshape(weight.shape)

    def dequantize(self, codes: Tensor, grid: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``scale * (code - zero)``."""
        return self._steps.values(self._blocks(codes), *self._parts(grid), dtype).reshape(codes.shape)

    def fake_quantize(self, weight: Tensor, grid: Mapping[str, Tensor] | None = None) -> Tensor:
        """In one pass."""
        clips = grid is not None or self.config.range != "min_max"
        scales, zeros = self._parts(self.grid(weight) if grid is None else grid)
        return fake_quantize(self._blocks(weight), scales, zeros, self._steps, clips=clips).reshape(weight.shape)

    def columns(self, grid: Mapping[str, Tensor], start: int, stop: int) -> Mapping[str, Tensor]:
        """The scales of the groups that hold the columns."""
        if self.config.per != "group":
            return grid
        first, last = start // self.config.group, (stop - 1) // self.config.group
        return {name: part[:, first : last + 1] for name, part in grid.items()}

    @functools.cached_property
    def _steps(self) -> Steps:
        return Steps(self.config.bits, self.config.symmetric)

    def _blocks(self, matrix: Tensor) -> Tensor:
        if self.config.per == "tensor":
            return matrix.reshape(1, -1)
        return matrix.reshape(-1, min(self.config.group, matrix.shape[1])) if self.config.per == "group" else matrix

    def _parts(self, grid: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        zeros = grid.get("zeros")
        return grid["scales"].reshape(-1, 1), None if zeros is None else zeros.reshape(-1, 1)
