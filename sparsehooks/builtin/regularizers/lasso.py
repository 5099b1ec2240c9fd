"""The lasso, over weights and over groups."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsehooks import Pattern, Regularizer


@dataclass(frozen=True)
class Options:
    """The options of the lasso.

    Attributes:
        strength: the factor of the penalty.
        method: "proximal" shrinks after the optimizer's step and makes exact zeros, "subgradient" adds to the gradient.
    """

    strength: float = 1e-4
    method: Literal["proximal", "subgradient"] = "proximal"

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"'strength' = {self.strength} is not positive")


class GroupLasso(Regularizer):
    """``strength * sum over groups of sqrt(size) * norm`` (Yuan and Lin 2006), over the groups of the pattern.

    Each group shrinks by the factor ``max(0, 1 - step * strength / rms)`` with the root mean square of its weights
    (Parikh and Boyd 2014, section 6.5.4). Under Adam the step is each weight's own, and for a group their mean.
    """

    Config = Options
    config: Options

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self._warned = False

    def gradient(self, weights: Mapping[str, Tensor], pattern: Pattern, strength: float) -> Mapping[str, Tensor] | None:
        """``strength * w / rms``."""
        if self.config.method != "subgradient":
            return None
        factor = strength * self.config.strength
        return {
            name: torch.where(rms > 0, factor * weights[name] / rms, 0.0).to(weights[name].dtype)
            for name, rms in self._rms(weights, pattern).items()
        }

    def proximal(
        self, weights: Mapping[str, Tensor], pattern: Pattern, step_sizes: Mapping[str, Tensor | float]
    ) -> Mapping[str, Tensor] | None:
        """The shrunk weights."""
        if self.config.method != "proximal":
            return None
        narrow = {weight.dtype for weight in weights.values() if torch.finfo(weight.dtype).bits < 32}
        if narrow and not self._warned:
            self._warned = True
            warnings.warn(
                f"the proximal lasso moves weights by less than {narrow.pop()} can tell; train float32 weights (under "
                "bf16 = true they stay so)",
                stacklevel=2,
            )
        steps = {
            n: torch.as_tensor(step, device=weights[n].device).expand(weights[n].shape)
            for n, step in step_sizes.items()
        }
        steps = dict(pattern.spread(pattern.units(steps), steps))
        moved = {}
        for name, rms in self._rms(weights, pattern).items():
            weight = weights[name]
            shrunk = weight * (1 - steps[name] * self.config.strength / rms).clamp(min=0)
            moved[name] = torch.where(rms > 0, shrunk, 0.0).to(weight.dtype)
        return moved

    def _rms(self, weights: Mapping[str, Tensor], pattern: Pattern) -> dict[str, Tensor]:
        squares = {name: weight.float().square() for name, weight in weights.items()}
        return {name: mean.sqrt() for name, mean in pattern.spread(pattern.units(squares), squares).items()}


class L1(GroupLasso):
    """``strength * sum |w|`` (Tibshirani 1996): with the unstructured pattern each weight is a group.

    The proximal step is soft thresholding; under Adam by each weight's own step ``lr / (sqrt(v) + eps)``, the metric
    in which Adam moves (Yun et al. 2021, arXiv:2007.07484).
    """
