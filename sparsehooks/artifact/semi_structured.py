"""2:4 tensors as sparse tensor cores want them, straight from the file (Mishra et al. 2021, arXiv:2104.08378)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsehooks.artifact.blob import Blob
from sparsehooks.artifact.header import DTYPES
from sparsehooks.errors import ArtifactError


def semi_structured(blob: Blob) -> tuple[Tensor, Tensor]:
    """The values and the 2-bit positions of a 2:4 tensor; no dense tensor is made on the way.

    Args:
        blob: of a tensor with two dimensions (rows, columns), columns a multiple of 8.

    Returns:
        values in the tensor's dtype, shape (rows, columns / 2), two for each group of four neighbours; and uint8,
        shape (rows, columns / 8): a nibble for each group, the first in the lower one, in it the position of the
        first value in the lower two bits, and that of the second, a larger one, in the upper two. A group with fewer
        than two nonzeros has explicit zeros, at the positions that torch's own packing takes: the last ones, but the
        third where a lone value is in the first half.

    Raises:
        ArtifactError: if the shape does not fit, a group has more than two values, or the blob is damaged or hostile.
    """
    header = blob.header
    if len(header.shape) != 2 or header.columns % 8 or header.chunk % header.columns:
        raise ArtifactError(f"tensor '{blob.name}' of shape {list(header.shape)} has no rows of whole pairs of groups")
    values, nibbles = [], []
    for layout, kept, _ in blob.chunks():
        nonzero = kept != 0
        positions = (np.arange(layout.size) if layout.positions is None else layout.positions)[nonzero]
        group, place = positions >> 2, (positions & 3).astype(np.uint8)
        second = np.zeros(group.size, np.bool_)
        second[1:] = group[1:] == group[:-1]
        if (group[2:] == group[:-2]).any():
            raise ArtifactError(f"tensor '{blob.name}' has a group of four with more than two values; it is not 2:4")
        lone = np.bincount(group, minlength=layout.size // 4)[group] == 1
        side = np.where(lone, place == 3, second).astype(np.intp)
        places = np.tile(np.array([2, 3], np.uint8), (layout.size // 4, 1))
        places[group, side] = place
        places[group[lone & (place < 2)], 1] = 2
        pairs = np.zeros(places.shape, kept.dtype)
        pairs[group, side] = kept[nonzero]
        values.append(pairs.reshape(layout.rows, -1))
        nibble = places[:, 0] | places[:, 1] << 2
        nibbles.append((nibble[0::2] | nibble[1::2] << 4).reshape(layout.rows, -1))
    bits = torch.from_numpy(np.concatenate(values))
    return bits.view(DTYPES[header.dtype][0]), torch.from_numpy(np.concatenate(nibbles))
