"""Students: smaller models made of a teacher's own blocks."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from sparsehooks.artifact.quantizer import disarm
from sparsehooks.coupling import find_couplings
from sparsehooks.errors import SparseHooksError
from sparsehooks.shrinking import MARK, keep_blocks
from sparsehooks.teachers import frozen_copy

M = TypeVar("M", bound=nn.Module)
Layers = int | Sequence[int]

QUARTERS = {(12, 4): [0, 4, 8, 11]}
"""A published map that even spacing does not give (Shleifer and Rush 2020, arXiv:2010.13002)."""


def keep_layers(model: M, layers: Layers | Mapping[str, Layers]) -> M:
    """A student that has some of a model's transformer blocks, and all else that the model has.

    What stays is copied bit for bit (Sanh et al. 2019, arXiv:1910.01108), and the config counts the blocks that are
    left: the student saves, and opens with ``from_pretrained``, like any model of its class. One made of an opened
    artifact is dense; ``sparsehooks.save_pretrained`` writes the sparse form again.

    Args:
        model: the teacher, or a model to train as a student of it; it stays as it is.
        layers: the blocks to keep, as their indices from 0 in ascending order, or how many: a number takes evenly
            spaced ones, the first and the last among them (of 12 blocks 6: 0, 2, 4, 7, 9, 11; of 6 blocks 3: 0, 2, 5).
            Of a model with an encoder and a decoder, a mapping by the name of the list of blocks, such as
            ``{"decoder.block": 3}``; lists that it does not name stay whole.

    Raises:
        SparseHooksError: the model has no blocks that can be taken out, or not those.
    """
    couplings, notes = find_couplings(model, "layer")
    stacks = {coupling.name: coupling for coupling in couplings}
    if not stacks:
        raise SparseHooksError(f"no layers can be taken out: {'; '.join(note for _, note in notes)}")
    if not isinstance(layers, Mapping):
        if len(stacks) > 1:
            raise SparseHooksError(f"'layers' must say of which: {_names(stacks)}; give a mapping by these names")
        layers = dict.fromkeys(stacks, layers)
    for name in layers:
        if name not in stacks:
            raise SparseHooksError(f"'{name}' is no list of blocks; this model has {_names(stacks)}")
    kept = {name: _indices(name, stacks[name].units, wanted) for name, wanted in layers.items()}
    student = frozen_copy(model)
    disarm(student)
    for name, indices in kept.items():
        keep_blocks(student, stacks[name], indices)
    if hasattr(student, MARK):  # a shrunk model says how many blocks it has
        counted = {name: len(kept[name]) for name in kept if name in getattr(student, MARK)}
        setattr(student, MARK, {**getattr(student, MARK), **counted})
    return student


def _names(names: Mapping[str, object]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def _indices(name: str, count: int, layers: Layers) -> list[int]:
    """The blocks to keep of ``count``."""
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise SparseHooksError(f"'{name}' has {count} blocks and cannot keep {layers}; keep 1 to {count}")
        even = [round(place * (count - 1) / max(layers - 1, 1)) for place in range(layers)]
        return QUARTERS.get((count, layers), even)
    try:
        indices = [operator.index(index) for index in layers]
    except TypeError as error:
        raise SparseHooksError(f"'{name}': {layers!r} is neither a number of blocks nor a list of indices") from error
    if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < count:
        raise SparseHooksError(
            f"'{name}' cannot keep the blocks {indices}; name blocks of 0 to {count - 1}, ascending and each once"
        )
    return indices
