"""Dense."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsehooks import Backend, Support


class Dense(Backend):
    """Runs every layer as torch does."""

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes."""
        return Support(ok=True)

    def pack(self, layer: nn.Linear) -> tuple[Any, ...]:
        """The weight and the bias themselves."""
        return layer.weight, layer.bias

    def run(self, packed: tuple[Any, ...], input: Tensor) -> Tensor:  # noqa: A002
        """Torch's own product."""
        return F.linear(input, *packed)
