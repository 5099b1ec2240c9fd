"""SR-STE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsehooks import Criterion, WeightView


@dataclass(frozen=True)
class Options:
    """The options of SR-STE.

    Attributes:
        decay: how strongly masked weights are pulled towards zero.
    """

    decay: float = 2e-4

    def __post_init__(self) -> None:
        if not self.decay >= 0:
            raise ValueError(f"'decay' = {self.decay} is not 0 or more; the paper takes 0.0002")


class SrSte(Criterion):
    """Magnitudes, with masked weights alive and pulled to zero (Zhou et al. 2021, arXiv:2102.04010, equation 8)."""

    Config = Options
    config: Options
    acts = "forward"

    def score(self, view: WeightView) -> Tensor:
        """``|w|``, of masked weights too."""
        return view.weight.abs()

    def effective(self, view: WeightView, mask: Tensor) -> Tensor:
        """``W * M``, where the weight receives ``g + decay (1 - M) W``."""
        return _Decaying.apply(view.weight, mask, self.config.decay)  # type: ignore[no-any-return, no-untyped-call]


class _Decaying(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0] + ctx.decay * weight.masked_fill(mask, 0.0), None, None
