"""Dense weights, packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks import Backend, Support

BY_DTYPE = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


class DensePacked(Backend):
    """Dense weights in the order in which oneDNN's kernels read them, which torch otherwise makes anew in each call.

    By operations that torch keeps to itself: they are what its own compiler calls on CPUs.
    """

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes on a CPU, if torch has the operations: in float32, and in the smaller types that the CPU computes in."""
        if device.type != "cpu":
            return Support(ok=False, reason=f"oneDNN runs on CPUs, not on {device.type}")
        if not torch.backends.mkldnn.is_available() or _operation("_reorder_linear_weight") is None:
            return Support(ok=False, reason="this torch has no oneDNN that takes packed weights")
        dtype = layer.weight.dtype
        if dtype in BY_DTYPE:
            able = _operation(BY_DTYPE[dtype])
            if able is None or not able():
                return Support(ok=False, reason=f"this CPU does not compute in {dtype}")
        elif dtype != torch.float32:
            return Support(ok=False, reason=f"oneDNN has no linear layer of {dtype}")
        return Support(ok=True)

    def pack(self, layer: nn.Linear) -> tuple[Any, ...]:
        """The weight in oneDNN's own layout, and the bias."""
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        return weight, None if layer.bias is None else layer.bias.detach()

    def run(self, packed: tuple[Any, ...], input: Tensor) -> Tensor:  # noqa: A002
        """The same sums in another order."""
        weight, bias = packed
        found: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
        return found


def _operation(name: str) -> Any:
    return getattr(torch.ops.mkldnn, name, None)
