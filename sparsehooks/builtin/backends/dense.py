"""Dense."""

from __future__ import annotations

import torch
from torch import nn

from sparsehooks import Backend, Support


class Dense(Backend):
    """Runs every layer as torch does."""

    def supports(self, layer: nn.Module, device: torch.device) -> Support:
        """Yes."""
        return Support(True)

    def convert(self, layer: nn.Module) -> nn.Module:
        """The layer itself."""
        return layer
