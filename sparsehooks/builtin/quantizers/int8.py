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
        rounded = self.unpack(self.pack(weight), weight.dtype)
        return rounded + (weight - weight.detach())

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """``codes`` int8 of the weight's shape, ``scales`` float32 (rows, 1, ...)."""
        scales = row_scales(weight.detach())
        return {"codes": to_codes(weight.detach(), scales), "scales": scales}

    def unpack(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``codes * scales``."""
        return from_codes(parts["codes"], parts["scales"], dtype)
