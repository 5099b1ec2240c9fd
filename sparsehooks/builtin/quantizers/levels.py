"""Grids of levels that are not equally far apart: NF4 and additive powers of two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsehooks import Quantizer, significant


class Levels(Quantizer):
    """Levels in [-1, 1], zero among them, times a scale for each block of columns."""

    @property
    def table(self) -> tuple[float, ...]:
        """The levels in ascending order, zero in the middle (the lower middle of an even number)."""
        raise NotImplementedError

    def levels(self, device: torch.device) -> Tensor:
        """The table, float32."""
        return torch.tensor(self.table, dtype=torch.float32).to(device, non_blocking=True)  # no forward waits for it

    def block(self, columns: int) -> int:
        """How many columns share a scale."""
        raise NotImplementedError

    def scales(self, grid: Mapping[str, Tensor]) -> Tensor:
        """Of each block, (rows, blocks)."""
        return grid["scales"]

    def quantize(self, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """uint8: the places of the nearest levels."""
        blocks, scales = self._blocks(weight.detach()), self.scales(grid).detach().reshape(-1, 1)
        return nearest(blocks, scales, self.levels(weight.device)).reshape(weight.shape)

    def dequantize(self, codes: Tensor, grid: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``scale * level``."""
        scales = self.scales(grid).detach().reshape(-1, 1)
        values = self.levels(codes.device)[self._blocks(codes).long()] * scales
        return values.to(dtype).add_(0.0).reshape(codes.shape)

    def columns(self, grid: Mapping[str, Tensor], start: int, stop: int) -> Mapping[str, Tensor]:
        """The scales of the blocks that hold the columns."""
        scales = self.scales(grid)
        block = self.block(stop)
        return {"scales": scales[:, start // block : (stop - 1) // block + 1]} if scales.shape[1] > 1 else grid

    def _blocks(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, min(self.block(matrix.shape[1]), matrix.shape[1]))


def nearest(blocks: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """uint8: the place of the level that times the scale is nearest; zero stays zero."""
    middles = (levels[1:] + levels[:-1]) / 2
    ratio = blocks.to(torch.float32) / scales
    return torch.bucketize(ratio, middles).to(torch.uint8).masked_fill_(blocks == 0, (len(levels) - 1) // 2)


# ------------------------------------------------------------------------------------------------------------- NF4


@dataclass(frozen=True)
class NF4Options:
    """The options of NF4.

    Attributes:
        block: how many columns of a row share a scale.
        double: whether the scales are quantized too: 8 bits each, and a scale of scales for 256 of them.
    """

    block: int = 64
    double: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"'block' = {self.block} is not a number of columns, such as 64")


class NF4(Levels):
    """The 16 quantiles of a normal distribution, scaled to the largest magnitude of a block (arXiv:2305.14314)."""

    Config = NF4Options
    config: NF4Options
    BLOCKS = 256

    def check(self, shape: Sequence[int]) -> str | None:
        """Blocks must divide the columns."""
        if shape[1] % self.config.block:
            near = math.gcd(shape[1], self.config.block)
            return f"its {shape[1]} input features do not divide by the block of {self.config.block}, but by {near}"
        return None

    @property
    def table(self) -> tuple[float, ...]:
        """Seven below zero, zero, and eight above."""
        return NORMAL

    def block(self, columns: int) -> int:
        """As the options say."""
        return self.config.block

    def grid(self, weight: Tensor) -> dict[str, Tensor]:
        """``scales`` float32 (rows, blocks): the largest magnitudes, on a grid of their own if ``double``."""
        largest = self._blocks(weight.detach()).abs().amax(dim=1).to(torch.float32)
        if self.config.double:
            padded = torch.nn.functional.pad(largest, (0, -len(largest) % self.BLOCKS)).reshape(-1, self.BLOCKS)
            step = significant((padded.amax(dim=1, keepdim=True) / 255).clamp(min=2.0**-126), 16)
            largest = ((padded / step).round().clamp(min=1) * step).flatten()[: len(largest)]
        scales = torch.where(largest > 0, largest, 1.0)
        return {"scales": scales.reshape(len(weight), -1)}


def _normal_levels() -> tuple[float, ...]:
    edge = 0.9677083  # the middle of the shares that 15 and 16 levels leave out at the end (bitsandbytes)
    above = [NormalDist().inv_cdf(0.5 + (edge - 0.5) * index / 8) for index in range(1, 9)]
    below = [-NormalDist().inv_cdf(0.5 + (edge - 0.5) * index / 7) for index in range(1, 8)]
    return tuple(value / above[-1] for value in sorted([*below, 0.0, *above]))


NORMAL = _normal_levels()
"""The levels of NF4."""


# ----------------------------------------------------------------------------------------- additive powers of two


@dataclass(frozen=True)
class APoTOptions:
    """The options of additive powers of two.

    Attributes:
        bits: of a code, 2 to 8, with the sign.
        learning_rate: of the logarithm of the scale.
    """

    bits: int = 4
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"'bits' = {self.bits} is outside 2 to 8")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"'learning_rate' = {self.learning_rate} is not a positive number, such as 0.001")


class APoT(Levels):
    """Sums of powers of two, with one learned scale for the matrix (Li et al. 2020, arXiv:1909.13144).

    The scale starts where the squared error is least.
    """

    Config = APoTOptions
    config: APoTOptions
    learned: ClassVar[tuple[str, ...]] = ("log_scales",)

    @property
    def table(self) -> tuple[float, ...]:
        """The sums and their negatives."""
        return POWERS[self.config.bits]

    def block(self, columns: int) -> int:
        """All of them."""
        return columns

    def learning_rate(self) -> float:
        """As the options say."""
        return self.config.learning_rate

    def scales(self, grid: Mapping[str, Tensor]) -> Tensor:
        """One."""
        return grid["log_scales"].exp()

    def grid(self, weight: Tensor) -> dict[str, Tensor]:
        """``log_scales`` float32, (1, 1)."""
        weight, levels = weight.detach().to(torch.float32), self.levels(weight.device)
        top = weight.abs().max()
        if not bool(top > 0):
            return {"log_scales": torch.zeros(1, 1, device=weight.device)}
        tried = top * torch.linspace(1.0, 0.2, 41, device=weight.device)
        errors = [(levels[nearest(weight, scale, levels).long()] * scale - weight).square().sum() for scale in tried]
        return {"log_scales": tried[torch.stack(errors).argmin()].log().reshape(1, 1)}

    def fake_quantize(self, weight: Tensor, grid: Mapping[str, Tensor] | None = None) -> Tensor:
        """With a gradient for the scale: what the level misses inside the range, the level outside."""
        grid = self.grid(weight) if grid is None else grid
        made: Tensor = _Scaled.apply(weight, grid["log_scales"], self.levels(weight.device))  # type: ignore[no-untyped-call]
        return made

    def columns(self, grid: Mapping[str, Tensor], start: int, stop: int) -> Mapping[str, Tensor]:
        """All columns share the scale."""
        return grid

    def _blocks(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(1, -1)


def _power_levels(bits: int) -> tuple[float, ...]:
    """Equation 5, with k = 2: the sums of one number of each set of 0 and powers of two, scaled to 1.

    The powers are dealt to the sets in turn, for three rounds. Where a bit is left, a set of its own takes one power
    between the second round and the third (github.com/yhhhli/APoT_Quantization, ``build_power_value``).
    """
    terms, left = divmod(bits - 1, 2)  # a bit is the sign
    starts = (0, terms, 2 * terms + left)  # of the rounds
    sets = [[0.0, *(2.0 ** -(start + index) for start in starts)] for index in range(terms)]
    if left:
        sets.append([0.0, 2.0 ** -(2 * terms)])
    sums = sorted({sum(chosen) for chosen in itertools.product(*sets)})
    return tuple(value / sums[-1] for value in sorted({*sums, *(-value for value in sums)}))


POWERS = {bits: _power_levels(bits) for bits in range(2, 9)}
"""The levels of each number of bits."""


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, levels: Tensor) -> Tensor:
        scale = log_scale.exp()
        level = levels[nearest(weight, scale, levels).long()]
        ratio = weight.to(torch.float32) / scale
        inside = ratio.abs() <= 1
        ctx.save_for_backward(inside, torch.where(inside, level - ratio, level), scale)
        return (level * scale).to(weight.dtype).add_(0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        inside, slope, scale = ctx.saved_tensors
        found = (gradient.to(torch.float32) * slope).sum().reshape(1, 1) * scale / math.sqrt(slope.numel())
        return gradient * inside, found, None
