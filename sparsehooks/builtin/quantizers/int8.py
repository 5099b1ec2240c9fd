"""int8."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsehooks import Quantizer, from_codes, row_scales, to_codes


class Int8(Quantizer):
    """Symmetric 8-bit codes in [-127, 127], one scale for each output row.

    The scale is ``max|w| / 127`` rounded to 17 significant bits, so that every product ``code * scale`` is exact in
    float32: the grid can be read back from the values alone, and quantizing twice changes nothing. Training sees
    the grid through a straight-through gradient (Bengio et al. 2013, arXiv:1308.3432).
    """

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """The nearest point of the grid; the gradient passes as if it were the weight."""
        scales = row_scales(weight.detach())
        rounded = from_codes(to_codes(weight.detach(), scales), scales, weight.dtype)
        return rounded + (weight - weight.detach())

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """``codes`` int8 of the weight's shape, ``scales`` float32 (rows, 1, ...).

        Raises:
            ValueError: if a value is not finite.
        """
        scales = row_scales(weight.detach())
        if not torch.isfinite(scales).all():
            raise ValueError("values that are not finite cannot be quantized")
        return {"codes": to_codes(weight.detach(), scales), "scales": scales}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``codes * scales``."""
        return from_codes(parts["codes"], parts["scales"], dtype)
