"""Tensors that other tools store in several parts, put together again.

``torch.nn.utils.prune`` keeps ``X_orig`` and ``X_mask`` of a pruned ``X``. compressed-tensors 0.5 to 0.14 could write
"sparse-bitmask" (the nonzero values in order, and a bit for each element) and "sparse-24-bitmask" (the same of 2:4
weights). What the parts say may come from anybody: it is compared before anything is made of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparsehooks.artifact.container import Rows
from sparsehooks.artifact.header import MAX_DIMS
from sparsehooks.artifact.shards import DTYPES
from sparsehooks.errors import ArtifactError

_PIECE = 1 << 22
"""About so many elements are unpacked at once to look at them."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a model to convert.

    Attributes:
        where: file and name, for errors.
        file: the file that holds it, or its first part.
        dtype: the safetensors name of its dtype.
        shape: its shape.
        load: gives the tensor; where it has two dimensions or more, it may give something to read rows from. Raises
            ArtifactError, then or when rows are read, if it is damaged or hostile.
        masked: whether its zeros are known to be those of a mask.
    """

    where: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor | Rows]
    masked: bool = False

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def tensor(self) -> Tensor:
        """All of it.

        Raises:
            ArtifactError: if it is damaged or hostile.
        """
        loaded = self.load()
        return loaded if isinstance(loaded, Tensor) else loaded[0 : self.shape[0]]


def restored(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The tensors that a model has, of those that its files hold.

    Raises:
        ArtifactError: if parts are missing or do not fit together.
    """
    return _unpruned(_unpacked(weights))


# ------------------------------------------------------------------------------------------- torch.nn.utils.prune


def _unpruned(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Replace each ``X_orig`` and ``X_mask`` by ``X``."""
    found = dict(weights)
    for stem in dict.fromkeys(name[:-5] for name in weights if name.endswith(("_orig", "_mask"))):
        original, mask = weights.get(f"{stem}_orig"), weights.get(f"{stem}_mask")
        if original is not None and mask is not None:
            del found[f"{stem}_orig"], found[f"{stem}_mask"]
            _add(found, stem, _masked(original, mask))
        elif re.search(r"(weight|bias)[^.]*$", stem) and f"{stem}_u" not in weights:
            # buffers may well be called attn_mask, and spectral_norm has a weight_orig beside weight_u
            there = f"{stem}_mask" if original is None else f"{stem}_orig"
            raise ArtifactError(
                f"{weights[there].where} is one part of a pruned tensor, and the other is missing; get all files of "
                "the model again"
            )
    return found


def _masked(original: Weight, mask: Weight) -> Weight:
    if not original.shape or original.shape != mask.shape:
        raise ArtifactError(f"{mask.where} has another shape than the tensor that it is the mask of")

    def load() -> Tensor | Rows:
        rows = _Masked(original.load(), mask.load(), mask.where)
        return rows if len(original.shape) > 1 else rows[0 : original.shape[0]]

    return replace(original, load=load, masked=True)


class _Masked:
    """A tensor with +0.0 wherever its mask is 0."""

    def __init__(self, original: Tensor | Rows, mask: Tensor | Rows, where: str) -> None:
        self.shape = tuple(original.shape)
        self.dtype = original.dtype
        self._original, self._mask, self._where = original, mask, where

    def __getitem__(self, rows: slice) -> Tensor:
        mask = self._mask[rows]
        kept = mask == 1
        if not (kept | (mask == 0)).all():
            raise ArtifactError(f"{self._where} is the mask of a tensor, but has values other than 0 and 1")
        return torch.where(kept, self._original[rows], torch.zeros((), dtype=self.dtype))


# ---------------------------------------------------------------------------------------------- compressed-tensors


def _unpacked(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Replace the parts of each sparse-bitmask or sparse-24-bitmask tensor by the tensor."""
    prefixes = dict.fromkeys(name.removesuffix(".compressed") for name in weights if name.endswith(".compressed"))
    for name, weight in weights.items():
        if name.endswith(".bitmask") and name.removesuffix(".bitmask") not in prefixes:
            raise ArtifactError(f"{weight.where} has no '.compressed' beside it; get all files of the model again")
    # until 0.8.1 the parts were named after parameters, later after modules
    suffix = "" if any(re.search(r"(^|\.)weight$", prefix) for prefix in prefixes) else ".weight"
    found = dict(weights)
    for prefix in prefixes:
        compressed = found.pop(f"{prefix}.compressed")
        bitmask, shape, offsets = (found.pop(f"{prefix}.{part}", None) for part in ("bitmask", "shape", "row_offsets"))
        if bitmask is None or shape is None:
            missing = ".bitmask" if bitmask is None else ".shape"
            raise ArtifactError(f"{compressed.where} has no '{missing}' beside it; get all files of the model again")
        _add(found, f"{prefix}{suffix}", _unpacked_weight(compressed, bitmask, shape, offsets))
    return found


def _unpacked_weight(compressed: Weight, bitmask: Weight, shape: Weight, offsets: Weight | None) -> Weight:
    sizes = _sizes(shape)
    if bitmask.dtype != "U8" or bitmask.shape != (*sizes[:-1], -(-sizes[-1] // 8)):
        raise ArtifactError(f"{bitmask.where} does not fit the shape {list(sizes)}")
    elements, count = math.prod(sizes), math.prod(compressed.shape)
    two_of_four = 2 * count == elements and elements % 4 == 0 and compressed.shape == (sizes[0], sizes[-1] // 2)
    if count > elements or (len(compressed.shape) > 1 and not (two_of_four and len(sizes) == 2)):
        raise ArtifactError(f"{compressed.where} does not fit the shape {list(sizes)}")

    def load() -> Tensor | Rows:
        if not elements:  # may be very many rows of nothing
            return compressed.tensor().view(sizes)
        rows = _Unpacked(sizes, compressed.tensor(), bitmask.tensor(), compressed.where)
        if offsets is not None and len(sizes) < 3:  # of more dimensions they were never right
            rows.check_offsets(offsets.tensor())
        return rows if len(sizes) > 1 else rows[0:1].view(sizes)

    return replace(compressed, shape=sizes, load=load, masked=len(sizes) > 1 and count < elements)


def _sizes(shape: Weight) -> tuple[int, ...]:
    sizes: list[int] = []
    if shape.dtype == "I64" and math.prod(shape.shape) <= MAX_DIMS:
        sizes = shape.tensor().flatten().tolist()
    if not sizes or not all(0 <= size < 1 << 44 for size in sizes):
        raise ArtifactError(f"{shape.where} is not the shape of a tensor")
    return tuple(sizes)


class _Unpacked:
    """A tensor of which the nonzero values and a bitmask are in memory.

    Raises:
        ArtifactError: if the bitmask has bits beyond the columns, or not as many as there are values; of values in
            two dimensions also if it does not have two in each group of four.
    """

    def __init__(self, shape: tuple[int, ...], compressed: Tensor, bitmask: Tensor, where: str) -> None:
        self.shape = shape if len(shape) > 1 else (1, *shape)
        self.dtype = compressed.dtype
        self._where = where
        self._columns = self.shape[-1]
        self._mask = bitmask.contiguous().numpy().reshape(*self.shape[:-1], -(-self._columns // 8))
        self._values = compressed.contiguous().flatten().view(torch.uint8).numpy().view(f"u{self.dtype.itemsize}")
        counts = np.bitwise_count(self._mask).sum(axis=tuple(range(1, self._mask.ndim)), dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        if self._columns % 8 and (self._mask[..., -1] >> self._columns % 8).any():
            raise ArtifactError(f"{where} has a bitmask with bits beyond its columns")
        if self._starts[-1] != self._values.size:
            raise ArtifactError(f"{where} has {self._values.size} values, but a bitmask of {self._starts[-1]}")
        if compressed.dim() > 1 and not self._is_two_of_four():
            raise ArtifactError(f"{where} has a bitmask that does not keep two of each four elements")

    def check_offsets(self, offsets: Tensor) -> None:
        """Compare where each row is said to start among the values.

        Raises:
            ArtifactError: if that is wrong.
        """
        if offsets.dtype != torch.int64 or not np.array_equal(offsets.flatten().numpy(), self._starts[:-1]):
            raise ArtifactError(f"{self._where} has row offsets that do not fit its bitmask")

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(self.shape[0])
        kept = np.flatnonzero(self._unpack(first, last))
        dense = np.zeros((last - first) * math.prod(self.shape[1:]), self._values.dtype)
        dense[kept] = self._values[self._starts[first] : self._starts[last]]
        return torch.from_numpy(dense).view(self.dtype).view(last - first, *self.shape[1:])

    def _unpack(self, first: int, last: int) -> np.ndarray:
        """0 or 1 for each element of some rows, flat."""
        return np.unpackbits(self._mask[first:last], axis=-1, count=self._columns, bitorder="little").reshape(-1)

    def _is_two_of_four(self) -> bool:
        step = 4 * max(1, _PIECE // (4 * self._columns))  # so that pieces hold whole groups
        pieces = (self._unpack(first, first + step) for first in range(0, self.shape[0], step))
        return all((np.bitwise_count(piece.view("<u4")) == 2).all() for piece in pieces)


def _add(found: dict[str, Weight], name: str, weight: Weight) -> None:
    if name in found:
        raise ArtifactError(f"{weight.where} is a part of '{name}', which is there too; remove what is not the model")
    found[name] = weight
