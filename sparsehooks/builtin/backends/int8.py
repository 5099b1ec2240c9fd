"""Int8 on CPUs."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sparsehooks import Backend, Steps, Support, read_grid

STEPS = Steps(8)


class Int8(Backend):
    """Linear layers whose weights lie on a symmetric grid of at most 8 bits, multiplied as int8 (FBGEMM, oneDNN).

    What enters a layer is rounded to 8 bits, one grid for all its tokens; to 7 where the CPU adds products in 16 bits
    (no VNNI), which would overflow. Inputs have to be finite: a NaN comes out as a finite number, and an infinity
    spoils the outputs of all tokens (looking for them would take up to a fifth of the time of the product).
    """

    rounds_inputs = True

    def supports(self, layer: nn.Linear, device: torch.device) -> Support:
        """Yes on a CPU, for a weight on a grid, one scale a row or one for all."""
        if device.type != "cpu":
            return Support(ok=False, reason=f"int8 runs on CPUs, not on {device.type}")
        if layer.weight.dtype != torch.float32:
            return Support(ok=False, reason=f"its weight is {layer.weight.dtype}; load it as float32")
        if read_grid(layer.weight, STEPS) is None:
            return Support(ok=False, reason="its weight lies on no int8 grid of rows; quantize it by int8")
        return Support(ok=True, exact=False)

    def pack(self, layer: nn.Linear) -> tuple[Any, int]:
        """The int8 codes with their scales and the bias, in torch's own object; and how many rows there are."""
        weight = layer.weight.detach()
        grid = read_grid(weight, STEPS)
        assert grid is not None, "supports() has read the grid"
        scales = grid["scales"].flatten().double()
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            # torch deprecates its quantized tensors, but its fastest int8 kernel still takes no other
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)  # the weight lies on this grid
        bias = None if layer.bias is None else layer.bias.detach()
        return torch.ops.quantized.linear_prepack(codes, bias), len(weight)

    def run(self, packed: tuple[Any, int], input: Tensor) -> Tensor:  # noqa: A002
        """The product of the rounded inputs."""
        codes, outputs = packed
        rows = input.to(torch.float32).reshape(-1, input.shape[-1])
        found: Tensor = torch.ops.quantized.linear_dynamic(rows, codes, not has_vnni())
        return found.reshape(*input.shape[:-1], outputs).to(input.dtype)


@functools.cache
def has_vnni() -> bool:
    """Whether the CPU adds products of int8 in 32 bits."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod"))
