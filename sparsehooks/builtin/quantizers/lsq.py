"""Uniform grids whose scales are learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsehooks import Quantizer, Steps, significant


@dataclass(frozen=True)
class Options:
    """The options of LSQ.

    Attributes:
        bits: of a code, 2 to 8.
        per: what shares a scale: the whole matrix or each output row ("channel").
        learning_rate: of the scales' logarithms: by what part a scale changes in a step.
    """

    bits: int = 8
    per: Literal["tensor", "channel"] = "channel"
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"'bits' = {self.bits} is outside 2 to 8")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"'learning_rate' = {self.learning_rate} is not a positive number, such as 0.001")


class Lsq(Quantizer):
    """Symmetric integers whose scales train with the weights (Esser et al. 2020, arXiv:1902.08153).

    The scales are kept as logarithms, so that Adam changes them by a part of themselves whatever their size.
    """

    Config = Options
    config: Options
    learned: ClassVar[tuple[str, ...]] = ("log_scales",)

    def grid(self, weight: Tensor) -> dict[str, Tensor]:
        """``log_scales`` float32, (1, 1) or (rows, 1): of ``2 mean|w| / sqrt(largest code)`` (section 2.1)."""
        size = weight.detach().to(torch.float32).abs()
        count = (size != 0).sum(dim=1, keepdim=True)  # of a sparse weight the zeros are no part of the mean
        total = size.sum(dim=1, keepdim=True)
        if self.config.per == "tensor":
            count, total = count.sum().reshape(1, 1), total.sum().reshape(1, 1)
        start = 2 * total / count.clamp(min=1) / math.sqrt(self._steps.most)
        return {"log_scales": torch.where(start > 0, start, 1.0).log()}

    def learning_rate(self) -> float:
        """As the options say."""
        return self.config.learning_rate

    def quantize(self, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """int8."""
        return self._steps.codes(weight.detach(), self._scales(grid), None).to(torch.int8)

    def dequantize(self, codes: Tensor, grid: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``scale * code``."""
        return self._steps.values(codes, self._scales(grid), None, dtype)

    def fake_quantize(self, weight: Tensor, grid: Mapping[str, Tensor] | None = None) -> Tensor:
        """With the gradients of equations 3 and 5 for the scales."""
        grid = self.grid(weight) if grid is None else grid
        made: Tensor = _Lsq.apply(weight, grid["log_scales"], self._scales(grid), self._steps)  # type: ignore[no-untyped-call]
        return made

    @property
    def _steps(self) -> Steps:
        return Steps(self.config.bits)

    @staticmethod
    def _scales(grid: Mapping[str, Tensor]) -> Tensor:
        return significant(grid["log_scales"].detach().exp(), 17)


class _Lsq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, _: Tensor, scales: Tensor, steps: Steps) -> Tensor:
        ratio = weight.to(torch.float32) * (1 / scales)
        codes = ratio.round().clamp_(steps.least, steps.most)
        inside = (ratio >= steps.least) & (ratio <= steps.most)
        # d w' / d s = round(w / s) - w / s inside the range, the outermost code outside
        ctx.save_for_backward(inside, torch.where(inside, codes - ratio, codes), scales)
        ctx.most = steps.most
        return (codes * scales).to(weight.dtype).add_(0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        inside, slope, scales = ctx.saved_tensors
        found = gradient.to(torch.float32) * slope
        found = found.sum(dim=1, keepdim=True) if len(scales) > 1 else found.sum().reshape(1, 1)
        each = slope.numel() / scales.numel()
        return gradient * inside, found * scales / math.sqrt(each * ctx.most), None, None
