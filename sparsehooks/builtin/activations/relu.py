"""ReLU in place of smooth activation functions."""

from __future__ import annotations

from torch import Tensor, nn

from sparsehooks import Activation


class ReLU(Activation):
    """GELU and SiLU give way to ReLU, of which more and more is mixed in (arXiv:2310.04564).

    At the share p of the schedule the model computes ``(1 - p) * old(x) + p * relu(x)``; at the end the module is an
    ordinary ``nn.ReLU``, and config.json says ``"relu"``.
    """

    place = "function"
    hidden_act = "relu"

    def apply(self, values: Tensor, amount: float | Tensor, before: Tensor | None = None) -> Tensor:
        """The mix of both."""
        if amount == 1.0 or before is None:
            return values.relu()
        return before if amount == 0.0 else (1 - amount) * before + amount * values.relu()

    def replacement(self) -> nn.Module:
        """``nn.ReLU``."""
        return nn.ReLU()
