"""L0 by hard concrete gates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsehooks import Criterion, WeightView

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the distribution, as in the paper."""
EPSILON = 1e-6


@dataclass(frozen=True)
class Options:
    """The options of L0.

    Attributes:
        gates: what has a gate of its own.
        learning_rate: of the gates and the multipliers.
        drop: the share of gates that are closed at the start.
    """

    gates: Literal["weight", "row", "column"] = "weight"
    learning_rate: float = 0.1
    drop: float = 0.05

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"'learning_rate' = {self.learning_rate} is not positive; 0.1 is the default")
        if not 0.0 < self.drop < 1.0:
            raise ValueError(f"'drop' = {self.drop} is outside (0, 1)")


class L0(Criterion):
    """Gates that learn to close (Louizos et al. 2018, arXiv:1712.01312), held at a sparsity by a Lagrangian.

    The multipliers of ``l1 (s - t) + l2 (s - t)^2`` (Xia et al. 2022, arXiv:2204.00408, section 3.3) ascend. At the end
    the count of weights that stay decides, and each keeps the value of its gate.
    """

    Config = Options
    config: Options
    acts = "forward"

    def prepare(self, view: WeightView) -> dict[str, Tensor]:
        """Gates about to close with probability ``drop``, and the two multipliers."""
        rows, columns = view.weight.shape
        shape = {"weight": (rows, columns), "row": (rows, 1), "column": (1, columns)}[self.config.gates]
        noise = 0.01 * torch.randn(shape, generator=view.generator())
        return {"gates": noise + math.log(1 / self.config.drop - 1), "multipliers": torch.zeros(2)}

    def learning_rate(self) -> float:
        """As the options say."""
        return self.config.learning_rate

    def score(self, view: WeightView) -> Tensor:
        """``log alpha``; equal ones in order of the weights."""
        return view.learned["gates"].detach().expand(view.weight.shape)

    def effective(self, view: WeightView, mask: Tensor) -> Tensor:
        """``W * z``: z is drawn while the layer trains, and its median cut to the mask while it does not."""
        gates = view.learned["gates"]
        if view.training:
            uniform = torch.empty_like(gates).uniform_(EPSILON, 1 - EPSILON)
            return view.weight * _stretch((uniform.logit() + gates) / BETA).to(view.weight.dtype)
        return view.weight * _stretch(gates).to(view.weight.dtype) * mask

    def penalty(self, learned: Mapping[str, Mapping[str, Tensor]], sparsity: float) -> Tensor | None:
        """The Lagrangian over all gates of the stage."""
        total = sum(tensors["gates"].numel() for tensors in learned.values())
        opened = torch.stack([open_probability(tensors["gates"]).sum() for tensors in learned.values()]).sum() / total
        together = torch.stack([tensors["multipliers"] for tensors in learned.values()]).sum(0)
        multipliers: Tensor = _Ascend.apply(together)  # type: ignore[no-untyped-call]
        missed = (1 - opened) - sparsity
        return multipliers[0] * missed + multipliers[1] * missed.square()


def open_probability(gates: Tensor) -> Tensor:
    """``P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))`` (equation 12)."""
    return (gates - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def _stretch(logits: Tensor) -> Tensor:
    return (logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class _Ascend(torch.autograd.Function):
    """The identity, with the gradient turned round: what is minimised for all else is maximised for this."""

    @staticmethod
    def forward(_: Any, multipliers: Tensor) -> Tensor:
        return multipliers.view_as(multipliers)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]
