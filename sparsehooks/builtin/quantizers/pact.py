"""Activations clipped at a learned level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsehooks import Quantizer, Steps, significant


@dataclass(frozen=True)
class Options:
    """The options of PACT.

    Attributes:
        bits: of a code, 2 to 8.
        start: the level at which activations are clipped at first; the largest one that is seen if it is left out.
        learning_rate: of the level.
    """

    bits: int = 8
    start: float | None = None
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"'bits' = {self.bits} is outside 2 to 8")
        for name in ("start", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"'{name}' = {value} is not positive")


class Pact(Quantizer):
    """``clip(x, 0, alpha)`` in equal steps, with a learned alpha (Choi et al. 2018, arXiv:1805.06085).

    For activations that are not negative, as ReLU leaves them: ``activations = "pact"``.
    """

    Config = Options
    config: Options
    learned: ClassVar[tuple[str, ...]] = ("alpha",)
    signed = False

    def grid(self, weight: Tensor) -> dict[str, Tensor]:
        """``alpha`` float32, (1, 1)."""
        largest = weight.detach().max().to(torch.float32).clamp(min=2.0**-100).reshape(1, 1)
        return {"alpha": largest if self.config.start is None else torch.full_like(largest, self.config.start)}

    def learning_rate(self) -> float:
        """As the options say."""
        return self.config.learning_rate

    def quantize(self, weight: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """uint8."""
        return self._steps.codes(weight.detach(), self._scale(grid), None).to(torch.uint8)

    def dequantize(self, codes: Tensor, grid: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``alpha / (2^bits - 1)`` times the code."""
        return self._steps.values(codes, self._scale(grid), None, dtype)

    def fake_quantize(self, weight: Tensor, grid: Mapping[str, Tensor] | None = None) -> Tensor:
        """With the gradient of equation 3: what is clipped above moves alpha, what lies inside the input."""
        grid = self.grid(weight) if grid is None else grid
        made: Tensor = _Clip.apply(weight, grid["alpha"], self._scale(grid), self._steps)  # type: ignore[no-untyped-call]
        return made

    @property
    def _steps(self) -> Steps:
        return Steps(self.config.bits, symmetric=False)

    def _scale(self, grid: Mapping[str, Tensor]) -> Tensor:
        return significant((grid["alpha"].detach() / self._steps.most).clamp(min=2.0**-126), 16)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, alpha: Tensor, scale: Tensor, steps: Steps) -> Tensor:
        above = inputs >= alpha
        ctx.save_for_backward((inputs > 0) & ~above, above)
        return steps.values(steps.codes(inputs, scale, None), scale, None, inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        inside, above = ctx.saved_tensors
        return gradient * inside, (gradient * above).sum().to(torch.float32).reshape(1, 1), None, None
