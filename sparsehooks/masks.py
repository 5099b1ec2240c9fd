"""Masks: exact selection by count, and how masks are stored and applied.

The one place where weights are chosen. Selection is by exact integer count over the whole tensors; equal scores go
to the earlier parameter, then to the lower flat index.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsehooks.components import Kernels
from sparsehooks.computing import kernels, reference
from sparsehooks.errors import SessionError


@dataclass(frozen=True)
class MaskChange:
    """How the mask of one parameter changed.

    Attributes:
        pruned: weights that went.
        grown: weights that came back.
        kept: weights that stay now.
        total: all weights of the parameter.
    """

    pruned: int
    grown: int
    kept: int
    total: int


def top_counts(scores: Mapping[str, Tensor], keep: int, floor: float | None = None) -> dict[str, int]:
    """How many of the ``keep`` largest scores of all tensors together lie in each tensor.

    Args:
        scores: floating point, not NaN, any shapes.
        keep: between 0 and the number of scores.
        floor: the least share of each tensor that is taken, at least one score; what it takes the others give, as far
            as they can. None takes what the scores say.
    """
    counts = _top_counts(scores, keep)
    least = {} if floor is None else least_counts({name: score.numel() for name, score in scores.items()}, floor)
    raised: dict[str, int] = {}
    while below := [name for name in least if name not in raised and counts[name] < least[name]]:
        raised |= {name: least[name] for name in below}
        rest = {name: score for name, score in scores.items() if name not in raised}
        counts = {**_top_counts(rest, max(keep - sum(raised.values()), 0)), **raised}
    return {name: counts[name] for name in scores}


def least_counts(sizes: Mapping[str, int], floor: float) -> dict[str, int]:
    """How many units of each matrix stay at least: the share ``floor`` of them, and one."""
    return {name: max(1, math.ceil(floor * size)) for name, size in sizes.items()}


def _top_counts(scores: Mapping[str, Tensor], keep: int) -> dict[str, int]:
    names = list(scores)
    if keep <= 0:
        return dict.fromkeys(names, 0)
    cut = _cut([_flat(scores[name]) for name in names], keep)
    counts, ties = {}, keep - sum(cut.above)
    for name, above, equal in zip(names, cut.above, cut.equal, strict=True):
        taken = min(equal, ties)
        counts[name], ties = above + taken, ties - taken
    return counts


def select(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The bool mask of the ``counts[name]`` largest scores of each tensor, of the tensor's shape."""
    masks = {}
    for name, tensor in scores.items():
        count = counts[name]
        if not 0 <= count <= tensor.numel():
            raise SessionError(f"{name}: the allocation asks for {count} of {tensor.numel()} units")
        if count in (0, tensor.numel()):
            masks[name] = torch.full_like(tensor, count > 0, dtype=torch.bool)
            continue
        flat = _flat(tensor)
        cut = _cut([flat], count)
        masks[name] = _kernels(flat).largest(flat, cut.value, count - cut.above[0]).view(tensor.shape)
    return masks


def _flat(scores: Tensor) -> Tensor:
    """As kernels read them: one after another, and what they are, not a view that says so."""
    return scores.flatten().contiguous().resolve_neg()


@dataclass(frozen=True)
class _Cut:
    """The k-th largest value, and how many values of each tensor lie above it and on it."""

    value: float
    above: list[int]
    equal: list[int]


_SELECTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that kernels select among, on the CPU; the reference takes any other, and other devices."""
SAMPLE = 1 << 16
"""How many values bracket the k-th largest before it is found exactly."""


def _cut(tensors: Sequence[Tensor], k: int) -> _Cut:
    """The exact k-th largest value of all (flat) tensors.

    A regular sample brackets it (Floyd and Rivest 1975), one pass counts what lies above the bracket and collects
    what lies inside, and only the few values inside are sorted. The result does not depend on the sample: a bracket
    that misses is widened to everything.
    """
    total = sum(tensor.numel() for tensor in tensors)
    # one dtype for all: compared with a value that it cannot hold, a tensor would round it
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    tensors = [tensor.to(dtype) for tensor in tensors]
    low, high = float("-inf"), float("inf")
    if total > 4 * SAMPLE:
        stride = total // SAMPLE
        sample = torch.cat([tensor[::stride] for tensor in tensors]).detach().float().cpu().numpy()
        sample = sample[~np.isnan(sample)]
        middle = k / total * sample.size
        spread = 4 * (sample.size * (k / total) * (1 - k / total)) ** 0.5 + 2
        high = _descending(sample, int(middle - spread)) if middle >= spread else high
        low = _descending(sample, int(middle + spread)) if middle + spread < sample.size else low
    cut = _cut_inside(tensors, k, low, high)
    return cut if cut is not None else _cut_inside(tensors, k, float("-inf"), float("inf"))  # type: ignore[return-value]


def _cut_inside(tensors: Sequence[Tensor], k: int, low: float, high: float) -> _Cut | None:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)  # torch selects in no narrower one on CPUs
    above, inside = [], []
    for tensor in tensors:
        upper, middle = _kernels(tensor).between(tensor, low, high)
        above.append(upper)
        inside.append(middle.to(wide))
    wanted = k - sum(above)
    together = torch.cat(inside)
    if not 0 < wanted <= together.numel():
        return None
    value = together.kthvalue(together.numel() - wanted + 1).values
    return _Cut(
        value.item(),
        [count + int(torch.count_nonzero(values > value)) for count, values in zip(above, inside, strict=True)],
        [int(torch.count_nonzero(values == value)) for values in inside],
    )


def _descending(sample: np.ndarray, place: int) -> float:
    """The value at a place of the sample, sorted in descending order."""
    ascending = sample.size - 1 - place
    return float(np.partition(sample, ascending)[ascending])


def _kernels(scores: Tensor) -> Kernels:
    """Those that select among scores where they are."""
    compiled = scores.device.type == "cpu" and scores.dtype in _SELECTED
    return kernels() if compiled else reference()


def straight_through(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` where the mask is true and zero elsewhere, with the identity as its gradient (Bengio et al. 2013)."""
    return _StraightThrough.apply(weight, mask)  # type: ignore[no-any-return, no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight.masked_fill(~mask, 0.0)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


DIVERGED = "the training has diverged, lower the learning rate"
"""The advice on weights that are not finite while they train."""


def check_finite(what: str, values: Tensor, advice: str) -> None:
    """Refuse values that are not finite: compared with a threshold, a NaN would silently empty the mask.

    Raises:
        SessionError: ``3 of 64 WHAT are not finite; ADVICE``.
    """
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        bad = int(values.numel() - torch.isfinite(values).sum())
        raise SessionError(f"{bad} of {values.numel()} {what} are not finite; {advice}")


CHUNK = 1 << 20
"""Elements that are masked at once on a CPU."""


def apply(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the weights to zero where their mask is false, in place, all tensors in one call.

    Masks are bool, of the weights' shapes. Read as bytes they multiply three times faster than as bools on CPUs,
    which convert them to the weights' dtype first: in pieces that stay in the cache.
    """
    if weights:
        pieces = [piece for weight in weights for piece in _pieces(weight)]
        torch._foreach_mul_(pieces, [piece.view(torch.uint8) for mask in masks for piece in _pieces(mask)])


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    if tensor.numel() <= CHUNK or tensor.device.type != "cpu":
        return (tensor,)
    return tuple(tensor.split(max(1, CHUNK * tensor.shape[0] // tensor.numel())))


def pack(mask: Tensor) -> Tensor:
    """The mask as bits: uint8, one bit an element, little-endian, on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))


def unpack(bits: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """The mask that ``pack`` made bits of."""
    size = int(np.prod(shape))
    flat = np.unpackbits(bits.cpu().numpy(), count=size, bitorder="little")
    return torch.from_numpy(flat.view(np.bool_)).reshape(tuple(shape)).to(device)


def digest(masks: Mapping[str, Tensor]) -> str:
    """A fingerprint of packed masks (sha256), to compare between ranks."""
    total = hashlib.sha256()
    for name, bits in masks.items():
        total.update(name.encode() + bits.numpy().tobytes())
    return total.hexdigest()
