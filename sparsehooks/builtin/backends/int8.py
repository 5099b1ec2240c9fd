"""Int8 on CPUs."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sparsehooks import Backend, SessionError, Steps, Support, read_grid

STEPS = Steps(8)


class Int8(Backend):
    """Linear layers whose weights lie on a symmetric grid of at most 8 bits, multiplied as int8 (FBGEMM, oneDNN).

    What enters a layer is rounded to 8 bits, one grid for all its tokens; to 7 where the CPU adds products in 16 bits
    (no VNNI), which would overflow.
    """

    rounds_inputs = True

    def supports(self, layer: nn.Module, device: torch.device) -> Support:
        """Yes for Linear on a CPU with a weight on a grid, one scale a row or one for all."""
        if device.type != "cpu":
            return Support(False, f"int8 runs on CPUs, not on {device.type}")
        if type(layer) is not nn.Linear:
            return Support(False, f"it is a {type(layer).__name__}, not a Linear")
        if layer.weight.dtype != torch.float32:
            return Support(False, f"its weight is {layer.weight.dtype}; load it as float32")
        if read_grid(layer.weight, STEPS) is None:
            return Support(False, "its weight lies on no int8 grid of rows; quantize it by int8")
        return Support(True)

    def convert(self, layer: nn.Module) -> nn.Module:
        """The packed layer."""
        return Int8Linear(cast(nn.Linear, layer))


class Int8Linear(nn.Module):
    """``nn.Linear`` with int8 codes and float32 scales.

    Args:
        layer: with a weight on a grid of its rows.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        grid = read_grid(weight, STEPS)
        assert grid is not None, "supports() has read the grid"
        scales = grid["scales"].flatten().double()
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            # torch deprecates its quantized tensors, but its fastest int8 kernel still takes no other
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)  # the weight lies on this grid
        self.bias = None if layer.bias is None else layer.bias.detach()
        self._packed: Any = torch.ops.quantized.linear_prepack(codes, self.bias)
        self._reduce_range = not has_vnni()

    @property
    def weight(self) -> Tensor:
        """Float32, for models that read it; unpacked only where its numbers are used."""
        shape = self.out_features, self.in_features
        made: Any = Tensor._make_wrapper_subclass(Unpacked, shape, dtype=torch.float32)
        made.packed = self._packed
        return cast(Tensor, made)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch's layers use
        """The product of the rounded inputs, in their dtype."""
        rows = input.to(torch.float32).reshape(-1, input.shape[-1])
        found: Tensor = torch.ops.quantized.linear_dynamic(rows, self._packed, self._reduce_range)
        return found.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    def extra_repr(self) -> str:
        """As torch's layers show."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise SessionError(f"'{prefix[:-1]}' runs as int8 and cannot be saved; save the model before use_backend")


class Unpacked(Tensor):
    """A packed weight in float32: its shape and dtype cost nothing, every operation on it unpacks the numbers."""

    packed: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As without one; ``nn.TransformerEncoderLayer`` sees that there is one, and calls its layers."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """The operation on the numbers."""

        def unpack(weight: Unpacked) -> Tensor:
            codes: Tensor = torch.ops.quantized.linear_unpack(weight.packed)[0]
            return codes.dequantize()

        args, kwargs = tree_map_only(cls, unpack, (args, kwargs or {}))
        return func(*args, **kwargs)


def has_vnni() -> bool:
    """Whether the CPU adds products of int8 in 32 bits."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod"))
