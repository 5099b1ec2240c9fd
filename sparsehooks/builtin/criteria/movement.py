"""Movement pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsehooks import Criterion, WeightView


@dataclass(frozen=True)
class Options:
    """The options of movement pruning.

    Attributes:
        learning_rate: of the scores.
        start: where they start: at zero, as in the paper, or at the magnitudes of the weights, divided by their mean,
            for runs too short to recover from the loss of large weights that have not moved yet.
    """

    learning_rate: float = 1e-2
    start: Literal["zero", "magnitude"] = "zero"

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"'learning_rate' = {self.learning_rate} is not positive; 0.01 is the paper's")


class Movement(Criterion):
    """Learned scores that grow where training moves a weight away from zero (Sanh et al. 2020, arXiv:2005.07683).

    Before scores that start at zero have moved, the first weights win: begin the schedule after some steps.
    """

    Config: ClassVar[type] = Options
    acts = "forward"

    def prepare(self, view: WeightView) -> dict[str, Tensor]:
        """The scores as they start."""
        if self.config.start == "zero":
            return {"scores": torch.zeros(view.weight.shape)}
        size = view.weight.detach().to(torch.float32).abs()
        return {"scores": size / size.mean().clamp(min=torch.finfo(torch.float32).tiny)}

    def learning_rate(self) -> float:
        """As the options say."""
        return float(self.config.learning_rate)

    def score(self, view: WeightView) -> Tensor:
        """The learned scores."""
        return view.learned["scores"].detach()

    def effective(self, view: WeightView, mask: Tensor) -> Tensor:
        """``W * M``, where the scores receive ``dL/dW' * W`` (section 4, straight through the choice)."""
        return _Masked.apply(view.weight, mask, view.learned["scores"])  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class SoftOptions(Options):
    """The options of soft movement pruning.

    Attributes:
        strength: the factor of the penalty.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength >= 0:
            raise ValueError(f"'strength' = {self.strength} is not 0 or more")


class SoftMovement(Movement):
    """Movement pruning with a penalty on the scores, compared over all layers (Sanh et al. 2020, section 4).

    The paper cuts at a threshold; here the count of weights that stay decides, so the sparsity is exact and the
    threshold follows. Use ``allocation = "global"``.
    """

    Config = SoftOptions
    config: SoftOptions

    def score(self, view: WeightView) -> Tensor:
        """``sigmoid(S)``."""
        return super().score(view).sigmoid()

    def penalty(self, learned: Mapping[str, Mapping[str, Tensor]], sparsity: float) -> Tensor | None:
        """``strength * sparsity * mean sigmoid(S)`` over all weights of the stage."""
        total = torch.stack([tensors["scores"].sigmoid().sum() for tensors in learned.values()]).sum()
        mean: Tensor = total / sum(tensors["scores"].numel() for tensors in learned.values())
        return self.config.strength * sparsity * mean


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.dtype = scores.dtype
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        weight, mask = ctx.saved_tensors
        return gradients[0] * mask, None, (gradients[0] * weight).to(ctx.dtype)
