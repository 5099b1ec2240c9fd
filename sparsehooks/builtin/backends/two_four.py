"""2:4 matrices as sparse tensor cores take them (Mishra et al. 2021, arXiv:2104.08378), bit for bit.

Of each group of four neighbours in a row, two values are kept, with their positions in four bits. All of it moves bits
and computes nothing, so it is exact for every dtype; what is zero is +0.0 afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def off_pattern(weight: Tensor) -> str | None:
    """Where a matrix first has more than two nonzeros in a group of four, or None if it is 2:4."""
    columns = weight.shape[1]
    counts = torch.nn.functional.pad(weight != 0, (0, -columns % 4)).unflatten(1, (-1, 4)).sum(dim=2)
    if not bool((counts > 2).any()):
        return None
    row, group = (counts > 2).nonzero()[0].tolist()
    last = min(4 * group + 3, columns - 1)
    return f"row {row} has {int(counts[row, group])} nonzeros in the columns {4 * group} to {last}"


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the 2-bit positions of a 2:4 matrix: what ``get_semi_structured`` reads from a file.

    Args:
        weight: shape (rows, columns), columns a multiple of 8; ``off_pattern`` has checked it.

    Returns:
        values in the weight's dtype, shape (rows, columns / 2); and uint8, shape (rows, columns / 8), with a nibble for
        each group, the first in the lower one: the position of the first value in the lower two bits, that of the
        second in the upper two. A group with fewer than two nonzeros keeps zeros, at the positions that torch's own
        packing takes.
    """
    rows, columns = weight.shape
    kept = weight != 0
    one, two, _, four = kept.view(rows, columns // 4, 4).unbind(dim=2)
    first = torch.where(one, 0, torch.where(two, 1, 2))
    second = torch.where(one & two, 1, torch.where((one | two) & ~four, 2, 3))
    places = torch.stack((first, second), dim=2)
    bits = weight.contiguous().view(_BITS[weight.element_size()])
    bits = torch.where(kept, bits, torch.zeros((), dtype=bits.dtype, device=bits.device))
    values = bits.view(rows, columns // 4, 4).gather(2, places).reshape(rows, columns // 2)
    nibbles = (first | second << 2).to(torch.uint8)
    return values.view(weight.dtype), nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack(values: Tensor, positions: Tensor) -> Tensor:
    """The matrix of which ``pack`` made these."""
    rows, kept = values.shape
    nibbles = torch.stack((positions & 15, positions >> 4), dim=2).view(rows, kept // 2)
    places = torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()
    bits = values.contiguous().view(_BITS[values.element_size()])
    dense = bits.new_zeros(rows, kept // 2, 4).scatter_(2, places, bits.view(rows, kept // 2, 2))
    return dense.view(rows, 2 * kept).view(values.dtype)


def cutlass_order(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Positions in the order in which the kernels of CUTLASS read them.

    Words of four groups (eight for int8) change places: rows within blocks of 32 (16), then each 2 x 2 block is
    transposed, then pairs of columns lie one after the other (``ReorderMeta`` and ``ColumnMajorInterleaved<2>`` there).

    Args:
        positions: as ``pack`` gives them, rows a multiple of 32 (16), and of the columns of the matrix 64 (128).
        dtype: of the values: float16, bfloat16 or int8.
    """
    words = positions.contiguous().view(torch.int32 if dtype == torch.int8 else torch.int16)
    rows, columns = words.shape
    block = 16 if dtype == torch.int8 else 32
    words = words.view(rows // block, block // 8, 8, columns).transpose(1, 2)
    words = words.reshape(rows // 2, 2, columns // 2, 2).transpose(1, 3)
    words = words.reshape(rows, columns // 2, 2).transpose(0, 1)
    return words.reshape(rows, columns)
