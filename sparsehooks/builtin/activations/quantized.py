"""Inputs of layers on integer grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsehooks import Activation, Steps, fake_quantize, find_range, min_max, significant


@dataclass(frozen=True)
class Options:
    """What all grids of activations share.

    Attributes:
        bits: of a code, 2 to 8.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"'bits' = {self.bits} is outside 2 to 8")


@dataclass(frozen=True)
class DynamicOptions(Options):
    """The options of grids that are fitted while the model runs.

    Attributes:
        per: what shares a scale: each token, or the whole batch ("tensor"). Of four dimensions, as of images before
            Conv2d, each sample; of three the second one counts the tokens, which before Conv1d is wrong: use "tensor".
        symmetric: whether the codes lie around zero; else the range is fitted at both ends.
    """

    per: Literal["token", "tensor"] = "token"
    symmetric: bool = True


class Dynamic(Activation):
    """The inputs of layers on a grid of their own, fitted to each token or batch whenever the model runs.

    Training sees the grid through a straight-through gradient (Bengio et al. 2013, arXiv:1308.3432).
    """

    Config = DynamicOptions
    config: DynamicOptions
    place = "input"
    rounds = True

    def apply(self, values: Tensor, amount: float | Tensor, before: Tensor | None = None) -> Tensor:
        """From the schedule's start on."""
        if amount == 0.0:
            return values
        if self.config.per == "tensor":
            rows = values.reshape(1, -1)
        else:
            rows = values.flatten(1) if values.dim() == 4 else values.reshape(-1, values.shape[-1])
        steps = Steps(self.config.bits, self.config.symmetric)
        grid = steps.fit(*min_max(rows))
        return fake_quantize(rows, grid["scales"], grid.get("zeros"), steps, clips=False).reshape(values.shape)


@dataclass(frozen=True)
class StaticOptions(Options):
    """The options of grids that are fitted once.

    Attributes:
        signed: whether there are codes for negative values; they become zero otherwise.
        range: how far the grid reaches: over all that was seen ("min_max"), to the moving average of each batch's
            largest magnitude ("moving_average"), over a share of the magnitudes ("percentile"), with the least squared
            error ("mse"), or with the least divergence of the histogram ("entropy").
        percentile: the share, in percent.
        averaging: the weight of the newest batch in the moving average.
        batches: on how many training batches it is fitted, where no calibration batches are given.
    """

    signed: bool = True
    range: Literal["min_max", "moving_average", "percentile", "mse", "entropy"] = "min_max"
    percentile: float = 99.99
    averaging: float = 0.1
    batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 < self.percentile <= 100:
            raise ValueError(f"'percentile' = {self.percentile} is outside (50, 100]")
        if self.percentile != StaticOptions.percentile and self.range != "percentile":
            raise ValueError(
                f"'percentile' = {self.percentile} has no effect with range = \"{self.range}\"; "
                'add range = "percentile", or leave it out'
            )
        if not 0 < self.averaging <= 1:
            raise ValueError(f"'averaging' = {self.averaging} is outside (0, 1]")
        if self.batches < 1:
            raise ValueError(f"'batches' must be at least 1, got {self.batches}")


class Static(Activation):
    """The inputs of layers on one grid, fitted to the calibration tokens, without padding."""

    Config = StaticOptions
    config: StaticOptions
    place = "input"
    calibrated = "range"

    def batches(self) -> int:
        """As the option says."""
        return self.config.batches

    def reach(self, magnitudes: Tensor, peaks: Tensor) -> float:
        """The largest magnitude that has a code."""
        if self.config.range == "min_max":
            return float(peaks.max())
        if self.config.range == "moving_average":
            mean = float(peaks[0])
            for peak in peaks[1:].tolist():
                mean += self.config.averaging * (peak - mean)
            return mean
        steps = Steps(self.config.bits, symmetric=self.config.signed)
        low, high = find_range(magnitudes[None], self.config.range, steps, self.config.percentile)
        return float(torch.maximum(-low, high))

    def apply(self, values: Tensor, amount: float | Tensor, before: Tensor | None = None) -> Tensor:
        """Clipped at the amount, and rounded; the gradient is zero where a value was clipped."""
        steps = Steps(self.config.bits, symmetric=self.config.signed)
        scales = values.new_full((1, 1), float(amount) / steps.most, dtype=torch.float32)
        scales = significant(scales.clamp(min=2.0**-126), 17 if self.config.signed else 16)
        return fake_quantize(values.reshape(1, -1), scales, None, steps, clips=True).reshape(values.shape)


@dataclass(frozen=True)
class PactOptions(Options):
    """The options of PACT.

    Attributes:
        start: the level at which values are clipped at first; the largest one that is seen if it is left out.
        learning_rate: of the level.
        batches: on how many training batches the start is found.
    """

    start: float | None = None
    learning_rate: float = 1e-2
    batches: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"'{name}' = {value} is not a positive number")
        if self.batches < 1:
            raise ValueError(f"'batches' must be at least 1, got {self.batches}")


class Pact(Activation):
    """``clip(x, 0, alpha)`` in equal steps, with an alpha that trains (Choi et al. 2018, arXiv:1805.06085).

    For layers whose inputs are not negative, as ReLU leaves them: what is negative becomes zero. An alpha that training
    has brought below 1e-6 counts as 1e-6, and its gradient can raise it again.
    """

    Config = PactOptions
    config: PactOptions
    place = "input"
    calibrated = "range"
    learned = True

    def batches(self) -> int:
        """As the option says."""
        return self.config.batches

    def learning_rate(self) -> float:
        """As the option says."""
        return self.config.learning_rate

    def reach(self, magnitudes: Tensor, peaks: Tensor) -> float:
        """Where alpha starts."""
        return float(peaks.max()) if self.config.start is None else self.config.start

    def apply(self, values: Tensor, amount: float | Tensor, before: Tensor | None = None) -> Tensor:
        """With the gradient of equation 3: what is clipped above moves alpha, what lies inside the input."""
        alpha = torch.as_tensor(amount, dtype=torch.float32, device=values.device)
        made: Tensor = _Clip.apply(values, alpha, Steps(self.config.bits, symmetric=False))  # type: ignore[no-untyped-call]
        return made


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, alpha: Tensor, steps: Steps) -> Tensor:
        alpha = alpha.clamp(min=1e-6)
        above = values >= alpha
        ctx.save_for_backward((values > 0) & ~above, above)
        scale = significant((alpha / steps.most).clamp(min=2.0**-126).reshape(1), 16)
        return steps.values(steps.codes(values, scale, None), scale, None, values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        inside, above = ctx.saved_tensors
        return gradient * inside, (gradient * above).sum().to(torch.float32), None
