"""The arithmetic of symmetric integer grids, one scale a row: shared by quantizers and codecs.

The scale of a row is the largest magnitude divided by the largest code (127 for int8) and rounded to 17 significant
bits, so that a code (7 bits) times a scale needs at most the 24 bits that float32 has: every grid value is exact, and
the scale can be found again from the values alone. In bfloat16 and float16 the product is rounded once more, which
keeps the largest magnitude of a row whose values have that dtype already. So quantizing a second time changes no bit,
for every finite row of float32, bfloat16 or float16 values, subnormal and huge ones included: scales are kept from
2^-126 to where all products are exact and finite (2.68e36 for int8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsehooks.grids import Steps

_STEPS = {steps.most: steps for steps in map(Steps, range(2, 9))}


def row_scales(weight: Tensor, code_max: int = 127) -> Tensor:
    """The scale of each row of a weight.

    Args:
        weight: shape (rows, ...) with at least two dimensions, none of them empty; any floating dtype, of which only
            the largest magnitudes are converted to float32.
        code_max: the largest code, ``2 ** (bits - 1) - 1`` of a grid of 2 to 8 bits.

    Returns:
        float32, shape (rows, 1, ...), which broadcasts against the weight: 17 significant bits, rounded to nearest
        even, at least 2^-126; 1 for a row of zeros.

    A value that is not finite makes the scale of its row, and so all its values, NaN. Nothing is raised, because this
    runs in every forward of quantized training, where a check would stop the device and ``torch.compile``.
    """
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).to(torch.float32)
    return _STEPS[code_max].fit(-largest, largest)["scales"]


def to_codes(weight: Tensor, scales: Tensor, code_max: int = 127) -> Tensor:
    """The code nearest to each value; ties go to the even code.

    Args:
        weight: finite values, any shape and floating dtype.
        scales: float32 from ``row_scales``; broadcasts against the weight.
        code_max: the largest code.

    Returns:
        int8, the shape of the weight, within [-code_max, code_max].
    """
    return (weight.detach().to(torch.float32) / scales).round_().clamp_(-code_max, code_max).to(torch.int8)


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that codes stand for: the float32 product, rounded to ``dtype``; a zero is always +0.0.

    Args:
        codes: int8, any shape.
        scales: float32; broadcasts against the codes.
        dtype: a floating dtype.

    Returns:
        the shape of the codes. No value is farther than half a scale from the one that ``to_codes`` received, but
        for the rounding to ``dtype``.
    """
    values = (codes * scales).to(dtype)
    # a tiny negative product rounds to -0.0 in float16
    return values.add_(0.0) if dtype == torch.float16 else values
